"""The encoder in kernels, for all four rules, against float64: in Triton's interpreter, or on a GPU.

Both encoders, one fused kernel and cuBLAS in chunks, leave the same groups; all that follows is tested with each.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from bench import checks
from fastsae import gpu, reference
from fastsae.kernels import encode, exact, repair, select
from tests.encode_case import DEVICE, ENCODERS, close, dense, integers, make, topk, with_encoders

# --- TopK -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "D", "F", "k", "encoder"),
    with_encoders(
        (1, 16, 1, 1), (1, 1, 1, 1), (17, 32, 300, 1), (3, 304, 63, 17), (3, 300, 63, 17), (17, 63, 300, 5),
        (2, 16, 999, 63), (2, 7, 63, 63),
    ),
)  # fmt: skip
def test_topk_on_ragged_shapes(N, D, F, k, encoder):
    x, weight, bias = make(N, D, F)
    found = gpu.encode_topk(x, weight, bias, k, encoder=encoder)
    close(found, topk(x, weight, bias, k), x, weight)
    assert (found.values.diff(dim=1) <= 0).all(), "values descend"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_large_k(encoder):
    """k beyond what r entries a group can hold, so that every group is repaired."""
    x, weight, bias = make(1, 16, 700)
    found = gpu.encode_topk(x, weight, bias, 512, encoder=encoder)
    close(found, topk(x, weight, bias, 512), x, weight)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rows_with_fewer_positive_entries_than_k(encoder):
    x, weight, bias = make(5, 16, 100, shift=-4.0)
    x[0] = 0
    bias[:10] = 0
    found = gpu.encode_topk(x, weight, bias, 40, encoder=encoder)
    close(found, topk(x, weight, bias, 40), x, weight)
    assert int(found.counts.min()) < 40


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_nothing_positive(sign):
    x, weight, _ = make(3, 16, 70)
    found = gpu.encode_topk(x * 0, weight, torch.full((70,), sign, device=DEVICE), 4)
    assert not found.counts.any() and not found.values.any() and not found.indices.any()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("N", "F", "k"), [(6, 90, 7), (3, 200, 40)])
def test_small_integers_equal_float64_ties_included(N, F, k, encoder):
    x, weight, bias = integers(N, 16, F)
    found = gpu.encode_topk(x, weight, bias, k, encoder=encoder)
    assert torch.equal(dense(found, F), topk(x, weight, bias, k))


def test_all_equal_takes_the_lowest_features_by_the_exact_kernel():
    x, weight = torch.ones(2, 16, device=DEVICE), torch.ones(3000, 16, device=DEVICE)
    found = gpu.encode_topk(x, weight, torch.zeros(3000, device=DEVICE), 5)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]] * 2 and (found.values == 16).all()
    assert found.effort.open.all()


def concentrated(k: int, F: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """One row whose k largest entries all stand in group 3: features 3, 3 + G, …"""
    G = F // encode.GROUP
    weight = torch.rand(F, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight[3 + G * torch.arange(k), :] += 5
    return torch.ones(1, 16, device=DEVICE), weight, torch.zeros(F, device=DEVICE)


@pytest.mark.parametrize("k", [5, 32])
def test_all_of_the_largest_in_one_group(k):
    x, weight, bias = concentrated(k)
    found = gpu.encode_topk(x, weight, bias, k, encoder="fused")
    close(found, topk(x, weight, bias, k), x, weight)
    assert int(found.effort.failed) > 0, "the certificate must have failed"


def test_without_the_repair_it_would_be_wrong(monkeypatch):
    """That the tests above can fail."""
    monkeypatch.setattr(repair, "repair", lambda *given: None)
    x, weight, bias = concentrated(5)
    found = gpu.encode_topk(x, weight, bias, 5, encoder="fused")
    assert not torch.equal(dense(found, 1024) > 0, topk(x, weight, bias, 5) > 0)


def test_one_more_equal_entry_in_a_group_than_are_kept():
    """r + 1 equal largest entries in one group: the r-th that is kept equals the one that is hidden."""
    F, G = 256, 8
    r = gpu.kept_per_group(5, F)
    weight = torch.full((F, 16), 0.25, device=DEVICE)
    weight[2 + G * torch.arange(r + 1)] = 1.0
    x, bias = torch.ones(1, 16, device=DEVICE), torch.zeros(F, device=DEVICE)
    found = gpu.encode_topk(x, weight, bias, r + 1, encoder="fused")
    assert torch.equal(dense(found, F), topk(x, weight, bias, r + 1))


def test_values_one_ulp_apart():
    """The order is that of all 32 bits: 200 neighbours in a shuffled order."""
    bits = torch.tensor(1.0).view(torch.int32) + torch.arange(200, dtype=torch.int32)
    value = bits.view(torch.float32)[torch.randperm(200, generator=torch.Generator().manual_seed(0))].to(DEVICE)
    x, weight = torch.zeros(1, 16, device=DEVICE), torch.zeros(200, 16, device=DEVICE)
    for encoder in ENCODERS:
        found = gpu.encode_topk(x, weight, value, 9, encoder=encoder)
        assert torch.equal(found.values[0], value.sort(descending=True).values[:9])


@pytest.mark.parametrize("open_rows", [False, True])
def test_rows_left_to_the_exact_kernel(open_rows, monkeypatch):
    """A list too short for a row's failed groups: the row is computed from all features, the others are not."""
    monkeypatch.setattr(gpu, "MOST_FAILED", 1 if open_rows else 32)
    x, weight, bias = make(2, 16, 90)
    found = gpu.encode_topk(x, weight, bias, 20)
    close(found, topk(x, weight, bias, 20), x, weight)
    assert bool(found.effort.open.any()) == open_rows


def test_duplicate_rows_have_equal_codes():
    x, weight, bias = make(1, 16, 200)
    found = gpu.encode_topk(x.expand(5, -1).contiguous(), weight, bias, 9)
    assert (found.values == found.values[0]).all() and (found.indices == found.indices[0]).all()


def test_fired_counts_the_rows_of_each_latent():
    x, weight, bias = make(9, 16, 100)
    fired = torch.zeros(100, dtype=torch.int32, device=DEVICE)
    gpu.encode_topk(x, weight, bias, 4, fired=fired)
    assert torch.equal(fired.long(), (topk(x, weight, bias, 4) > 0).sum(0))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_half_precision(encoder):
    """Sums are fp32, so values are as near to float64's, of the same inputs, as they are in float32."""
    x, weight, bias = (t.half() for t in make(7, 48, 200))
    found = gpu.encode_topk(x, weight, bias, 9, encoder=encoder)
    close(found, topk(x, weight, bias, 9), x, weight)
    above = gpu.encode_above(x, weight, bias, 200, encoder=encoder)
    assert above is not None
    close(above, reference.encode_relu(x.double(), weight.double(), bias.double()), x, weight)


# --- any input --------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    N=st.integers(1, 6), D=st.sampled_from([1, 8, 16, 48]), F=st.integers(1, 130), k=st.integers(1, 40),
    scale=st.sampled_from([2.0**-60, 1.0, 2.0**30]), whole=st.booleans(), encoder=st.sampled_from(["auto", "chunked"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_values(N, D, F, k, scale, whole, encoder, seed):
    x, weight, bias = integers(N, D, F, seed) if whole else make(N, D, F, seed)
    x, bias, k = x * scale, bias * scale, min(k, F)
    found = gpu.encode_topk(x, weight, bias, k, encoder=encoder)
    wanted = topk(x, weight, bias, k)
    got = dense(found, F)
    if whole:  # exact at any power of two
        assert torch.equal(got, wanted)
    assert ((got.sort(1).values - wanted.sort(1).values).abs() <= 1e-5 * scale * (D + 1)).all()


def test_no_rows():
    _, weight, bias = make(1, 16, 50)
    x = torch.zeros(0, 16, device=DEVICE)
    assert gpu.encode_topk(x, weight, bias, 3).values.shape == (0, 3)
    assert gpu.encode_batchtopk(x, weight, bias, 3).counts.shape == (0,)
    above = gpu.encode_above(x, weight, bias, 50)
    assert above is not None and above.counts.shape == (0,)


def test_strides_and_centre():
    x, weight, bias = make(6, 16, 90)
    wide = torch.full((6, 40), float("nan"), device=DEVICE)
    wide[:, 3:19] = x
    centre = torch.linspace(-1, 1, 16, device=DEVICE)
    wanted = reference.encode_topk(x.double(), weight.double(), bias.double(), 4, centre.double())
    close(gpu.encode_topk(wide[:, 3:19], weight, bias, 4, centre), wanted, x, weight)
    across = x.T.contiguous().T
    close(gpu.encode_topk(across, weight, bias, 4), topk(x, weight, bias, 4), x, weight)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_weights_and_bias_of_any_strides(encoder):
    """W_enc.T of a parameter [D, F], and every second entry of a bias: kernels read contiguous rows."""
    x, weight, bias = make(3, 16, 96)
    twice = bias.repeat_interleave(2)
    wanted = gpu.encode_topk(x, weight, bias, 5, encoder=encoder)
    found = gpu.encode_topk(x, weight.T.contiguous().T, twice[::2], 5, encoder=encoder)
    assert torch.equal(found.values, wanted.values) and torch.equal(found.indices, wanted.indices)


@pytest.mark.parametrize("D", [7, 16])
def test_autocast_changes_nothing(D):
    x, weight, bias = make(3, D, 90)
    wanted = gpu.encode_topk(x, weight, bias, 5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = gpu.encode_topk(x, weight, bias, 5)
    assert torch.equal(found.values, wanted.values) and torch.equal(found.indices, wanted.indices)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_nan_stays_in_its_row_and_infinity_is_chosen(encoder):
    x, weight, bias = make(4, 16, 100)
    clean = gpu.encode_topk(x, weight, bias, 5, encoder=encoder)
    x[1, 3] = float("nan")
    found = gpu.encode_topk(x, weight, bias, 5, encoder=encoder)
    assert int(found.counts[1]) == 0
    rows = [0, 2, 3]
    assert torch.equal(found.values[rows], clean.values[rows]) and torch.equal(found.indices[rows], clean.indices[rows])
    bias[77] = float("inf")
    found = gpu.encode_topk(x[rows], weight, bias, 5, encoder=encoder)
    assert (found.indices[:, 0] == 77).all() and torch.isinf(found.values[:, 0]).all()


def test_nothing_is_read_that_was_not_written(monkeypatch):
    """All buffers that start as they come are filled with NaN and with indices far out."""
    def poisoned(*shape, **options):
        made = torch.zeros(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(2**7)

    x, weight, bias = make(5, 16, 130)
    wanted = gpu.encode_topk(x, weight, bias, 9)
    for module in (encode, select, exact):
        monkeypatch.setattr(module, "torch", _With(torch, empty=poisoned))
    found = gpu.encode_topk(x, weight, bias, 9)
    assert torch.equal(found.values, wanted.values) and torch.equal(found.indices, wanted.indices)


class _With:
    """A module with some names replaced."""

    def __init__(self, module, **names):
        self.__dict__ |= names
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def test_same_bits_every_time():
    x, weight, bias = make(5, 16, 300)
    first = gpu.encode_topk(x, weight, bias, 20)
    again = gpu.encode_topk(x, weight, bias, 20)
    assert torch.equal(first.values, again.values) and torch.equal(first.indices, again.indices)


def test_groups_are_the_best_of_each_group():
    """Of both encoders, against a plain reading of what Groups says."""
    x, weight, bias = make(3, 16, 150)
    pre = reference.pre_activations(x, weight, bias).clamp_min(0)
    for make_groups in (encode.encode_fused, encode.encode_chunked):
        best, place, span = make_groups(x, weight, bias, 3)
        for group in range(best.shape[2]):
            features = [(group // span) * 32 * span + group % span + j * span for j in range(32)]
            real = [f for f in features if f < 150]
            kept = pre[:, real].sort(dim=1, descending=True, stable=True)
            for r in range(min(3, len(real))):
                assert torch.allclose(best[r, :, group], kept.values[:, r], atol=1e-5)
                positive = best[r, :, group] > 0
                chosen = torch.tensor(features, device=DEVICE)[place[r, :, group].long()]
                assert torch.equal(chosen[positive], torch.tensor(real, device=DEVICE)[kept.indices[:, r]][positive])


@pytest.mark.skipif(DEVICE == "cuda", reason="the pages of a mapped file need not exist; GPU memory has to")
def test_offsets_beyond_two_to_the_31(tmp_path):
    """Two rows of x 2³¹ elements apart, in a sparse file of which only those rows take up space."""
    import numpy as np

    _, weight, bias = make(1, 16, 70)
    mapped = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(2, 2**31))
    mapped[:, :16] = make(2, 16, 1)[0].numpy()
    x = torch.from_numpy(mapped)[:, :16]
    for encoder in ENCODERS:
        close(gpu.encode_topk(x, weight, bias, 30, encoder=encoder), topk(x, weight, bias, 30), x, weight)
    far_apart = np.memmap(tmp_path / "best", dtype=np.float32, mode="w+", shape=(3, 2**30))
    places = np.memmap(tmp_path / "place", dtype=np.uint8, mode="w+", shape=(3, 2**30))
    near = encode.encode_fused(x, weight, bias, 3)
    G = near.best.shape[2]
    for r in range(3):  # the third starts at element 2³¹, of strides that fit 32 bits
        far_apart[r, : 2 * G], places[r, : 2 * G] = near.best[r].reshape(-1), near.place[r].reshape(-1)
    best, place = (torch.from_numpy(t)[:, : 2 * G].unflatten(1, (2, G)) for t in (far_apart, places))
    apart = encode.Groups(best, place, G)
    bound = torch.zeros(2)
    one, other = (select.collect(groups, bound, 64, 4) for groups in (near, apart))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("values", "indices", "counts"))
    rows = np.memmap(tmp_path / "w", dtype=np.float32, mode="w+", shape=(70, 2**25 + 16))
    rows[:, :16] = weight.numpy()  # the last rows start past element 2³¹
    far = torch.from_numpy(rows)[:, :16]
    close(gpu.encode_topk(x, far, bias, 30, encoder="fused"), topk(x, weight, bias, 30), x, weight)


# --- the checks of the bench ------------------------------------------------------------------------------------------


def test_the_bench_finds_nothing_wrong():
    rows = checks.encode_checks(torch.device(DEVICE))
    assert {row["case"].split()[0] for row in rows} == {"topk", "relu", "jumprelu", "batchtopk"}
    assert [row for row in rows if not row["passed"]] == []


@pytest.mark.parametrize("damage", ["value", "feature", "dropped", "twice", "range"])
def test_the_bench_would_find_a_wrong_code(damage):
    x, weight, bias = make(3, 16, 100)
    pre = reference.pre_activations(x.double(), weight.double(), bias.double())
    values, indices, counts, _ = gpu.encode_topk(x, weight, bias, 5)
    allowed = checks.allowed_error(x, weight)
    assert checks.code_error(values, indices, counts, pre, allowed, 5) <= 1
    if damage == "value":
        values[1, 2] += 0.01
    elif damage == "feature":
        indices[1, 2] = int(pre[1].argmin())
    elif damage == "dropped":
        values[1, 4], indices[1, 4], counts[1] = 0, 0, 4
    elif damage == "twice":
        indices[1, 2], values[1, 2] = indices[1, 0].clone(), values[1, 0].clone()
    else:
        indices[1, 2] = 100
    assert checks.code_error(values, indices, counts, pre, allowed, 5) > 1
