"""BatchTopK without the host: where its choice ends over rows with slots and without, exactly, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import fastsae
from fastsae import autoencode as fused
from fastsae import capacity, gpu, reference
from fastsae.autoencode import Autoencoded, autoencode
from fastsae.kernels import batch_cut
from tests.encode_case import DEVICE
from tests.test_autoencode import NAMES, close, dense, problem, pulled
from tests.test_dense_rows import room_with

OUTPUTS = ("x_hat", "error", "l1", "aux")


def run(p: dict[str, Tensor], k: int, room: int, weighted: bool = False) -> Autoencoded:
    return autoencode(
        p["x"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], rule="batchtopk", target=p["target"], k=k,
        weighted=weighted, backend="triton", room=room,
    )  # fmt: skip


def compare(p: dict[str, Tensor], k: int, room: int, tolerance: float = 3e-5, weighted: bool = False) -> Autoencoded:
    """Every output and gradient against float64; with tolerance 0 only gradients may be rounded."""
    exact = {name: t.detach().double().requires_grad_() for name, t in p.items()}
    want = dense(exact, "batchtopk", k, True, weighted, 0.0, None, 0)
    made = run(p, k, room, weighted)
    f, _ = want.pop(), want.pop(3)
    got = [getattr(made, name) for name in OUTPUTS]
    assert torch.equal(made.l0.long(), (f > 0).sum(1)) and torch.equal(made.fired.long(), (f > 0).sum(0))
    least, kept = made.cut[0].int().view(torch.float32).double(), f[f > 0].detach()
    assert (least - kept.min()).abs() <= tolerance * kept.max() if kept.numel() else least.isnan()
    for name, g, w in zip(OUTPUTS, got, want, strict=True):
        close(name, g, w, tolerance)
    mine, truth = pulled(got, p), pulled(want, exact)
    assert mine.keys() == truth.keys() == set(NAMES) - {"threshold"}
    for name in truth:
        close(f"gradient of {name}", mine[name], truth[name], tolerance or 3e-5)
    return made


# --- the cut of slots -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    N=st.integers(1, 6), F=st.integers(1, 20), total=st.integers(1, 70), most=st.integers(1, 4), seed=st.integers(0, 9)
)  # fmt: skip
def test_the_cut_of_slots(N, F, total, most, seed):
    """Of any order within a row, with ties and unused slots: chosen by hand, counted and packed."""
    gen = torch.Generator().manual_seed(seed)
    z = torch.randint(-1, most + 1, (N, F), generator=gen).float()
    counts = (z > 0).sum(1).int()
    order = torch.rand(N, F, generator=gen).masked_fill(z <= 0, 2.0).argsort(1)
    used = torch.arange(F) < counts[:, None]
    values, indices = z.gather(1, order) * used, (order * used).int()
    values, indices, counts = values.to(DEVICE), indices.to(DEVICE), counts.to(DEVICE)
    cut = batch_cut.find(values, indices, total, F)
    flat = z.reshape(-1)
    chosen = flat.argsort(descending=True, stable=True)[:total]
    wanted = torch.zeros(N * F).scatter_(0, chosen, flat[chosen].clamp_min(0)).view(N, F)
    kept, features, number = (t.cpu() for t in batch_cut.keep(values, indices, counts, cut, F))
    assert torch.equal(torch.zeros(N, F).scatter_add_(1, features.long(), kept), wanted)
    assert torch.equal(number.long(), (wanted > 0).sum(1))
    left = torch.arange(F) >= number[:, None]
    assert not kept[left].any() and not features[left].any() and (kept[~left] > 0).all()
    if not (z > 0).any():
        assert torch.equal(cut, batch_cut.nothing(cut.device))


def test_values_from_subnormal_to_infinite_and_more_than_one_program():
    values = torch.rand(30, 400, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    values[0, 0], values[3, 9], values[7, 7] = 1e-40, float("inf"), 3e38
    indices = torch.arange(400, dtype=torch.int32, device=DEVICE).expand(30, 400).contiguous()
    ordered = values.reshape(-1).sort(descending=True).values
    for total in (1, 2, 5000, 11999, 12000, 13000):
        cut = batch_cut.find(values, indices, total, 400)
        assert cut[0].int().view(torch.float32) == ordered[min(total, 12000) - 1]


# --- rows with slots and without --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "D", "F", "k", "slots", "groups", "shift", "n_open"),
    [
        (21, 17, 70, 5, 6, 64, 0.0, range(1, 21)),  # too few slots in some rows
        (21, 17, 63, 5, 1, 64, 0.0, range(2, 22)),
        (5, 16, 40, 3, 64, 0, 0.0, range(1, 6)),  # too few groups
        (6, 16, 300, 4, 64, 64, 0.0, range(1)),
        (3, 16, 90, 1, 1, 64, 0.0, range(1, 4)),
        (1, 16, 300, 7, 4, 64, 0.0, range(1, 2)),
        (4, 17, 300, 50, 8, 64, -1.5, range(4, 5)),  # fewer are positive than may be chosen, in every row
        (3, 16, 63, 2, 8, 64, -100.0, range(1)),  # none is
    ],
)
def test_every_output_and_gradient(N, D, F, k, slots, groups, shift, n_open):
    p = problem(N, D, F, torch.float32, shift=shift)
    made = compare(p, k, room_with(slots, groups), weighted=N == 21)
    assert int(made.is_open.sum()) in n_open and (made.code(F) is None) == bool(made.is_open.any())
    again = run(p, k, room_with(slots, groups), weighted=N == 21)
    assert all(torch.equal(a, b) for a, b in zip(again, made, strict=True)), "same bits"


def test_one_row_takes_nearly_all_and_never_gets_slots_for_it():
    p = problem(20, 16, 300, torch.float32)
    with torch.no_grad():
        p["x"][2] *= 100
    room = capacity.new_room()
    for _ in range(capacity.DELAY + 1):
        made = compare(p, 5, room)
        assert made.is_open.nonzero().tolist() == [[2]]
        assert made.l0[2] > 90 and made.values.shape[1] <= 8 * 5


def staircase(N: int, F: int, seed: int) -> dict[str, Tensor]:
    """z = x: small integers, in odd rows with many more of the larger ones, so that those are open."""
    gen = torch.Generator().manual_seed(seed)

    def ints(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=gen).float()

    x = torch.randint(-6, 3, (N, F), generator=gen)
    x[1::2] = torch.randint(-1, 4, x[1::2].shape, generator=gen)
    made = {"x": x.float(), "target": ints(N, F), "weight": torch.eye(F), "bias": torch.zeros(F),
            "w_dec": ints(F, F), "b_dec": torch.zeros(F), "threshold": torch.ones(F)}  # fmt: skip
    return {name: t.to(DEVICE).requires_grad_() for name, t in made.items()}


@pytest.mark.parametrize(
    ("seed", "k", "ends"),
    [
        (0, 4, ("within", False)),  # a row with slots
        (0, 5, ("within", True)),  # a row without
        (1, 5, ("after", False)),
        (4, 6, ("after", True)),
    ],
)
def test_ties_go_to_earlier_rows_and_lower_features(seed, k, ends):
    """With small integers all is exact."""
    p = staircase(6, 33, seed)
    made = compare(p, k, room_with(16, 64), tolerance=0.0)
    chosen = reference.batchtopk_mask(p["x"], k)
    ties = p["x"] == p["x"][chosen].min()
    row = int((ties & chosen).any(1).nonzero()[-1])
    left_out = (ties & ~chosen).any(1).nonzero().flatten().tolist()
    assert left_out and (("within" if row in left_out else "after"), bool(made.is_open[row])) == ends
    assert made.is_open.any() and not made.is_open.all()


def test_a_row_of_nan_chooses_nothing_and_the_others_have_its_share():
    p = problem(7, 16, 63, torch.float32)
    x = p["x"].detach().clone()
    x[3] = float("nan")
    for slots in (2, 64):
        made = run(p | {"x": x}, 4, room_with(slots, 64))
        pre = reference.pre_activations(x.double(), p["weight"].double(), p["bias"].double(), p["b_dec"].double())
        chosen = reference.batchtopk_mask(pre.nan_to_num(-1.0), 4)
        assert torch.equal(made.fired.long(), chosen.sum(0)) and torch.equal(made.l0.long(), chosen.sum(1))
        assert bool(made.is_open.any()) == (slots == 2) and not made.x_hat.isnan().any()


def test_an_empty_batch():
    p = problem(4, 16, 40, torch.float32)
    p |= {name: p[name].detach()[:0].requires_grad_() for name in ("x", "target")}
    made = run(p, 3, room_with(4, 4))
    assert made.x_hat.shape == (0, 16) and made.is_open.shape == (0,) and made.cut.shape == (2,)
    found = torch.autograd.grad(made.error.sum(), [p["weight"], p["w_dec"]])
    assert not any(g.any() for g in found)


@settings(max_examples=12)
@given(
    N=st.integers(1, 5), D=st.integers(1, 5), F=st.integers(1, 40), k=st.integers(1, 40), slots=st.integers(1, 12),
    groups=st.integers(0, 2), shift=st.sampled_from([-1.0, 0.0, 1.0]),
)  # fmt: skip
def test_any_shape(N, D, F, k, slots, groups, shift):
    compare(problem(N, D, F, torch.float32, shift=shift), min(k, F), room_with(slots, groups))


# --- within a model ---------------------------------------------------------------------------------------------------


def test_the_running_threshold_follows_what_is_not_in_slots():
    options = {"d_in": 16, "d_sae": 64, "activation": "batchtopk", "k": 4, "threshold_rate": 0.25, "seed": 1}
    mine = fastsae.SAE(**options, backend="triton", device=DEVICE)
    theirs = fastsae.SAE(**options, backend="torch", device=DEVICE)
    opened = 0
    for seed in range(3):
        x = torch.randn(9, 16, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        known = capacity.room_of(mine.room)
        known.slots, known.needed, known.counters = 5, 1, capacity.Counters()
        opened += int(mine.loss(x).made.is_open.sum())
        theirs.loss(x)
        torch.testing.assert_close(mine.running_threshold, theirs.running_threshold)
    assert opened and mine.running_threshold > 0
    before = mine.running_threshold.clone()
    with torch.no_grad():
        mine.encoder.bias.sub_(100)
    mine.loss(x)
    assert mine.running_threshold == before, "where nothing is chosen it stays"


class NoWaiting(TorchDispatchMode):
    """An error where a number is asked of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket._qualified_op_name.split("::")[1] not in (
            "_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal",
        ), func  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("slots", [3, 64])
def test_later_calls_wait_for_nothing(slots, monkeypatch):
    """As far as that can be told without a device: no tensor is made a Python number of."""
    p = problem(9, 16, 63, torch.float32)
    room = room_with(slots, 64)

    def never(*given: object, **options: object) -> None:
        raise AssertionError("waits for the device")

    monkeypatch.setattr(gpu, "_all_above", never)
    monkeypatch.setattr(capacity.Counters, "receive", lambda counters: [])  # reads what has arrived
    for name in ("tolist", "item", "__int__", "__float__", "__bool__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, never)
    with NoWaiting():
        found = gpu.encode_batchtopk_open(p["x"], p["weight"], p["bias"], 4, capacity.room_of(room))
    monkeypatch.undo()
    assert bool(found.is_open.any()) == (slots == 3)


@pytest.mark.parametrize("rule", ["relu", "batchtopk"])
def test_the_first_pass_may_be_one_that_torch_runs_again(rule):
    """It learns how much room there has to be, and makes a code of the shape that later calls have."""
    from torch.utils.checkpoint import checkpoint

    sae = fastsae.SAE(d_in=16, d_sae=64, activation=rule, k=4, backend="triton", device=DEVICE)
    x = torch.randn(6, 16, device=DEVICE, requires_grad=True)
    out = checkpoint(lambda x: sae(x), x, use_reentrant=False)
    assert isinstance(out, Tensor)
    got = torch.autograd.grad(out.square().sum(), [x, *sae.parameters()])
    want = torch.autograd.grad(sae(x).square().sum(), [x, *sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "batchtopk"])
def test_shapes_are_what_torch_compile_is_told(rule):
    p = problem(6, 16, 40, torch.float32)
    tensors = (p["x"], p["target"], p["weight"], p["bias"], p["w_dec"], p["b_dec"],
               p["threshold"] if rule == "jumprelu" else None, None, None)  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    options = (rule, 3, 40, 0.2, True, False, 0, "triton", room_with(4, 8))
    torch.library.opcheck(fused._autoencode, (*tensors, *options), test_utils=tests)


def test_a_compiled_loss_is_one_graph():
    def made() -> fastsae.SAE:
        return fastsae.SAE(d_in=16, d_sae=64, activation="batchtopk", k=4, backend="triton", device=DEVICE)

    sae, eager = made(), made()
    compiled = torch.compile(lambda x: sae.loss(x).loss, fullgraph=True, backend="aot_eager")
    for model, loss in ((sae, compiled), (eager, lambda x: eager.loss(x).loss)):
        known = capacity.room_of(model.room)
        known.slots, known.needed = 5, 1
        loss(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)).backward()
    assert torch.equal(sae.running_threshold, eager.running_threshold)
    for p, q in zip(sae.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
