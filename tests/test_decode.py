"""kernels/decode.py against float64: in Triton's interpreter, or compiled where there is a GPU.

The interpreter gets bf16 arithmetic wrong without saying so; this kernel computes in fp32 alone, so that bf16 storage
can be tested there too, but for the last step: the interpreter cuts to bf16 where a GPU rounds.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from fastsae.kernels import decode as kernel  # noqa: E402  (Triton may be missing, which the line above handles)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7, torch.float16: 2.0**-11}


def make(N: int, K: int, F: int, D: int, dtype=torch.float32, index=torch.int32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, F, (N, K), generator=generator).to(index)
    values = torch.randn(N, K, generator=generator)
    w_dec = torch.randn(F, D, generator=generator).to(dtype)
    return indices.to(DEVICE), values.to(DEVICE), w_dec.to(DEVICE)


def truth(indices: Tensor, values: Tensor, w_dec: Tensor, counts: Tensor | None = None) -> Tensor:
    """float64, one token at a time."""
    out = torch.zeros(indices.shape[0], w_dec.shape[1], dtype=torch.float64, device=w_dec.device)
    for n in range(indices.shape[0]):
        used = indices.shape[1] if counts is None else int(counts[n])
        out[n] = values[n, :used].double() @ w_dec[indices[n, :used].long()].double()
    return out


def bound(indices: Tensor, values: Tensor, w_dec: Tensor) -> Tensor:
    """What rounding can do: K + 1 fp32 operations on Σ |value · w|, and one rounding of the result. [N, D]"""
    size = truth(indices, values.abs(), w_dec.abs())
    fp32 = (indices.shape[1] + 1) * EPSILON[torch.float32]
    last_bit = torch.finfo(w_dec.dtype).smallest_normal * torch.finfo(w_dec.dtype).eps  # of subnormal results
    return size * (fp32 + EPSILON[w_dec.dtype]) + last_bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "F", "D"), [(1, 1, 1, 1), (17, 5, 40, 63), (3, 64, 507, 17), (5, 4, 9, 507), (2, 3, 8, 2055)]
)
def test_matches_float64(N, K, F, D, dtype):
    indices, values, w_dec = make(N, K, F, D, dtype)
    out = kernel.decode(indices, values, w_dec)
    assert out.shape == (N, D) and out.dtype == dtype
    assert ((out.double() - truth(indices, values, w_dec)).abs() <= bound(indices, values, w_dec)).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_no_worse_than_torch(dtype):
    indices, values, w_dec = make(31, 17, 301, 64, dtype)
    values = values.to(dtype)  # embedding_bag takes nothing else
    expected = truth(indices, values, w_dec)
    torch_out = torch.nn.functional.embedding_bag(indices, w_dec, per_sample_weights=values, mode="sum")
    torch_error = (torch_out.double() - expected).abs().max()
    error = (kernel.decode(indices, values, w_dec).double() - expected).abs().max()
    assert error <= 1.01 * torch_error + 1e-6


@pytest.mark.parametrize("count_type", [torch.int32, torch.int64], ids=str)
def test_slots_past_the_count_are_never_read(count_type):
    indices, values, w_dec = make(17, 7, 40, 33)
    counts = (torch.arange(17, device=DEVICE) % 8).to(count_type)  # from empty rows to full ones
    unused = torch.arange(7, device=DEVICE) >= counts[:, None]
    expected = truth(indices, values, w_dec, counts)
    values[unused] = float("nan")
    indices[unused] = 2**30  # far outside W_dec
    out = kernel.decode(indices, values, w_dec, counts)
    assert torch.equal(out[counts == 0], torch.zeros_like(out[counts == 0]))
    assert ((out.double() - expected).abs() < 1e-5).all()


def test_a_count_past_the_slots_stays_in_its_row():
    indices, values, w_dec = make(4, 3, 10, 8)
    counts = torch.full((4,), 5, device=DEVICE)
    assert torch.equal(kernel.decode(indices, values, w_dec, counts), kernel.decode(indices, values, w_dec))


def test_rows_of_w_outside_the_slice_are_not_read():
    indices, values, padded = make(9, 4, 21, 48)
    padded[:, 37:] = float("nan")
    w_dec = padded[:, :37]
    out = kernel.decode(indices, values, w_dec)
    assert ((out.double() - truth(indices, values, w_dec)).abs() < 1e-5).all()


def test_rows_that_no_slot_names_are_not_read():
    """Row 0 among them, to which slots past the last round's end would point: 0 · NaN is NaN."""
    indices, values, w_dec = make(6, 5, 8, 9)
    indices[indices == 0] = 3
    w_dec[0] = float("nan")
    assert ((kernel.decode(indices, values, w_dec).double() - truth(indices, values, w_dec)).abs() < 1e-5).all()


def test_an_index_may_appear_twice():
    _, _, w_dec = make(1, 1, 6, 31)
    indices = torch.tensor([[2, 2, 5, 2]], dtype=torch.int32, device=DEVICE)
    values = torch.tensor([[1.0, 2.0, -1.0, 4.0]], device=DEVICE)
    assert torch.allclose(kernel.decode(indices, values, w_dec)[0], 7 * w_dec[2] - w_dec[5], atol=1e-5)


def test_small_integers_are_exact():
    indices, _, _ = make(17, 9, 50, 63)
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-8, 9, (17, 9), generator=generator).float().to(DEVICE)
    w_dec = torch.randint(-8, 9, (50, 63), generator=generator).float().to(DEVICE)
    assert torch.equal(kernel.decode(indices, values, w_dec).double(), truth(indices, values, w_dec))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_strides_of_the_code(index):
    indices, values, w_dec = make(12, 10, 30, 40, index=index)
    out = kernel.decode(indices[::2, 1::3], values.T.contiguous().T[::2, 1::3], w_dec)
    assert torch.equal(out, kernel.decode(indices[::2, 1::3].contiguous(), values[::2, 1::3].contiguous(), w_dec))


@pytest.mark.parametrize(("N", "K", "D"), [(0, 3, 8), (5, 0, 8), (5, 3, 0)])
def test_nothing_to_add(N, K, D):
    indices, values, w_dec = make(N, K, 4, D)
    assert torch.equal(kernel.decode(indices, values, w_dec), torch.zeros(N, D, device=DEVICE))


def test_same_bits_every_time():
    indices, values, w_dec = make(7, 33, 200, 1030)
    first = kernel.decode(indices, values, w_dec)
    for _ in range(3):
        assert torch.equal(kernel.decode(indices, values, w_dec), first)


@pytest.mark.skipif(DEVICE == "cuda", reason="the pages of a mapped file need not exist; GPU memory has to")
def test_offsets_beyond_two_to_the_31(tmp_path):
    """W_dec of 2³¹ + 2²⁰ elements in a sparse file: only the rows that are written take up space."""
    D = 2**20
    F = 2**11 + 1
    mapped = np.memmap(tmp_path / "w_dec", dtype=np.float32, mode="w+", shape=(F, D))
    mapped[F - 1, :3] = [1.0, 2.0, 3.0]
    mapped[1, :3] = [10.0, 20.0, 30.0]
    w_dec = torch.from_numpy(mapped)[:, :5]  # rows 2²⁰ elements apart, of which 5 are looked at
    indices = torch.tensor([[F - 1, 1]], dtype=torch.int32)
    out = kernel.decode(indices, torch.tensor([[1.0, 0.5]]), w_dec)
    assert out[0].tolist() == [6.0, 12.0, 18.0, 0.0, 0.0]


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_offsets_of_rows_beyond_two_to_the_31(tmp_path):
    """Indices whose third row starts at element 2³¹."""
    mapped = np.memmap(tmp_path / "indices", dtype=np.int32, mode="w+", shape=(3, 2**30))
    mapped[:, :2] = [[0, 1], [1, 2], [2, 3]]
    _, values, w_dec = make(3, 2, 4, 5)
    out = kernel.decode(torch.from_numpy(mapped)[:, :2], values, w_dec)
    indices = torch.tensor([[0, 1], [1, 2], [2, 3]])
    assert ((out.double() - truth(indices, values, w_dec)).abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "K", "F", "D"), [(1, 1, 1, 1), (17, 5, 40, 63), (3, 7, 40, 2055)])
def test_residual_and_squared_error(N, K, F, D, dtype):
    indices, values, w_dec = make(N, K, F, D, dtype)
    generator = torch.Generator().manual_seed(5)
    bias, target = (torch.randn(*size, generator=generator).to(dtype).to(DEVICE) for size in ((D,), (N, D)))
    counts = (torch.arange(N, device=DEVICE) % (K + 1)).int()
    found = kernel.decode_error(indices, values, w_dec, bias, target, counts)
    out = truth(indices, values, w_dec, counts) + bias.double()
    allowed = bound(indices, values, w_dec) + 4 * EPSILON[dtype] * (out.abs() + target.double().abs())
    assert ((found.out.double() - out).abs() <= allowed).all()
    assert ((found.residual.double() - (out - target.double())).abs() <= allowed).all()
    torch.testing.assert_close(found.error.double(), (out - target.double()).square().sum(1), rtol=1e-5, atol=1e-5)
    across = target.T.contiguous().T  # any strides
    assert torch.equal(kernel.decode_error(indices, values, w_dec, bias, across, counts).residual, found.residual)


def test_no_rows_have_no_error():
    indices, values, w_dec = make(0, 3, 4, 8)
    found = kernel.decode_error(indices, values, w_dec, w_dec[0], torch.empty(0, 8, device=DEVICE))
    assert found.error.shape == (0,) and found.residual.shape == (0, 8)


def test_long_rows_start_first_and_change_nothing():
    K = kernel.LONG_ROW
    indices, values, w_dec = make(6, K, 90, 9)
    counts = torch.tensor([3, K, 0, 40, K, 1], device=DEVICE)
    out = kernel.decode(indices, values, w_dec, counts)
    for n, used in enumerate(counts.tolist()):
        assert torch.equal(out[n : n + 1], kernel.decode(indices[n : n + 1, :used], values[n : n + 1, :used], w_dec))


@pytest.mark.parametrize(
    ("bias", "target", "message"), [((7,), (5, 8), r"bias \[8\]"), ((8,), (4, 8), r"target must be \[5, 8\]")]
)
def test_targets_that_do_not_fit(bias, target, message):
    indices, values, w_dec = make(5, 3, 10, 8)
    with pytest.raises(ValueError, match=message):
        kernel.decode_error(indices, values, w_dec, torch.zeros(bias), torch.zeros(target))


@pytest.mark.gpu
def test_w_dec_of_more_than_two_to_the_31_elements():
    F, D = 2**20 + 7, 2056
    if torch.cuda.get_device_properties(0).total_memory < 8 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")
    w_dec = torch.empty(F, D, dtype=torch.bfloat16, device="cuda")
    rows = torch.tensor([0, 2**20 - 3, F - 1], device="cuda")
    w_dec[rows] = torch.randn(3, D, device="cuda").bfloat16()
    values = torch.tensor([[1.0, -2.0, 3.0]], device="cuda")
    out = kernel.decode(rows[None].int(), values, w_dec)
    assert torch.allclose(out.double(), truth(rows[None], values, w_dec), rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, v, w: (i, v[:, :-1], w), "must both be"),
        (lambda i, v, w: (i[0], v[0], w), "flatten the leading dimensions"),
        (lambda i, v, w: (i.float(), v, w), "int32 or int64"),
        (lambda i, v, w: (i, v, w.double()), "fastsae.reference.decode"),
        (lambda i, v, w: (i, v, w[:, ::2]), r"\.contiguous\(\)"),
        (lambda i, v, w: (i, v, w, torch.ones(3, dtype=torch.int32, device=DEVICE)), "4 integers"),
        (lambda i, v, w: (i, v, w, torch.ones(4, device=DEVICE)), "4 integers"),
        (lambda i, v, w: (i, v.to("meta"), w), "w_dec's device"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernel.decode(*change(*make(4, 3, 10, 8)))
