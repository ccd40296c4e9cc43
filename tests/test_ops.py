"""Forward and every gradient of each op against float64 autograd of its dense twin in `reference`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsae import cpu, ops, reference
from fastsae.autoencode import autoencode
from fastsae.codes import SparseCode

SIZES = [(1, 3, 5, 1), (7, 16, 63, 4), (33, 20, 507, 9), (65, 24, 1024, 32)]  # N, D, F, K


def problem(N: int, D: int, F: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=gen, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    return {
        "x": randn(N, D),
        "weight": randn(F, D, scale=D**-0.5),
        "bias": randn(F, scale=0.1),
        "centre": randn(D, scale=0.3),
        "w_dec": randn(F, D, scale=D**-0.5),
    }


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


def gradients(out: Tensor, tensors: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Of ⟨out, a fixed random tensor⟩."""
    gen = torch.Generator().manual_seed(seed)
    pull = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out.dtype)
    names = list(tensors)
    got = torch.autograd.grad((out * pull).sum(), [tensors[n] for n in names], allow_unused=True)
    return {n: g for n, g in zip(names, got, strict=True) if g is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max().clamp_min(1e-30)
        error = (got[name].double() - want[name]).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.3g} of the largest entry, at most {tolerance:g}"


TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("N,D,F,K", SIZES)
@pytest.mark.parametrize("centred", [True, False])
def test_topk_autoencoder_gradients_are_those_of_the_dense_reference(N, D, F, K, centred):
    p = problem(N, D, F)
    centre = p["centre"] if centred else None
    code = ops.encode_topk(p["x"], p["weight"], p["bias"], K, centre)
    dense = reference.encode_topk(p["x"], p["weight"], p["bias"], K, centre)
    torch.testing.assert_close(code.to_dense(), dense, rtol=1e-13, atol=1e-13)
    got = gradients(ops.decode(code, p["w_dec"]), p)
    assert_close(got, gradients(reference.decode(dense, p["w_dec"]), p), 1e-12)


@pytest.mark.parametrize("N,D,F,K", SIZES)
@pytest.mark.parametrize("bias", [-0.5, -2.0, -100.0])
def test_relu_autoencoder_gradients_are_those_of_the_dense_reference(N, D, F, K, bias):
    p = problem(N, D, F)
    with torch.no_grad():
        p["bias"] += bias
    code = ops.encode_relu(p["x"], p["weight"], p["bias"], F, p["centre"])
    assert code is not None
    f = reference.encode_relu(p["x"], p["weight"], p["bias"], p["centre"])
    torch.testing.assert_close(code.to_dense(), f, rtol=1e-13, atol=1e-13)
    got = gradients(ops.decode(code, p["w_dec"]), p)
    assert_close(got, gradients(reference.decode(f, p["w_dec"]), p), 1e-12)


@pytest.mark.parametrize(("N", "D", "F", "K"), SIZES)
def test_batchtopk(N, D, F, K):
    p = problem(N, D, F)
    dense = reference.encode_batchtopk(p["x"], p["weight"], p["bias"], K, p["centre"])
    code = ops.encode_batchtopk(p["x"], p["weight"], p["bias"], K, p["centre"])
    assert torch.equal(code.to_dense() > 0, dense > 0)
    assert_close(gradients(code.to_dense(), p), gradients(dense, p), 1e-12)


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_batchtopk_over_many_chunks_with_ties(k, rows, monkeypatch):
    """Small integers; chunks of few rows and columns, so that what is kept is boiled down again and again."""
    monkeypatch.setattr(cpu, "by_columns", lambda n, f: (rows, 16))
    generator = torch.Generator().manual_seed(k)
    x, weight = (torch.randint(-2, 3, size, generator=generator).double() for size in ((9, 4), (130, 4)))
    bias = torch.zeros(130, dtype=torch.float64)
    code = ops.encode_batchtopk(x, weight, bias, k)
    assert torch.equal(code.to_dense(), reference.encode_batchtopk(x, weight, bias, k))


@pytest.mark.parametrize("bandwidth", [0.0, 0.4])
@pytest.mark.parametrize(("N", "D", "F", "K"), SIZES)
def test_jumprelu(N, D, F, K, bandwidth):
    """Entries in the band below the threshold are in the code with value 0 and pass a gradient on to the threshold
    alone."""
    p = problem(N, D, F)
    threshold = torch.rand(F, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p["threshold"] = threshold.requires_grad_()
    dense = reference.encode_jumprelu(p["x"], p["weight"], p["bias"], threshold, p["centre"], bandwidth)
    code = ops.encode_jumprelu(p["x"], p["weight"], p["bias"], threshold, F, p["centre"], bandwidth)
    assert code is not None
    torch.testing.assert_close(code.to_dense(), dense)
    assert_close(gradients(code.to_dense(), p), gradients(dense, p), 1e-12)


def test_no_rows_of_any_rule():
    weight, bias, x = torch.randn(20, 4), torch.zeros(20), torch.zeros(0, 4)
    assert ops.encode_batchtopk(x, weight, bias, 3).n_tokens == 0
    assert ops.encode_topk(x, weight, bias, 3).n_tokens == 0
    code = ops.encode_jumprelu(x, weight, bias, bias, 20)
    assert code is not None and code.n_tokens == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["topk", "relu", "relu, dense"])
def test_error_in_low_precision_is_no_larger_than_that_of_dense_torch(dtype, rule):
    """Both against float64, with the float64 choice of latents pinned to the one made in low precision."""
    N, D, F, K = 65, 48, 1024, 16
    p = problem(N, D, F, dtype)
    with torch.no_grad():
        p["bias"] -= 1.5
    if rule == "relu, dense":
        made = autoencode(p["x"], p["weight"], p["bias"], p["w_dec"], p["centre"], rule="relu", most=1)
        assert made.code(F) is None
        out = made.x_hat - p["centre"]
        chosen = ops.pre_activations(p["x"], p["weight"], p["bias"], p["centre"]) > 0  # added up as the op does
    else:
        if rule == "topk":
            code = ops.encode_topk(p["x"], p["weight"], p["bias"], K, p["centre"])
        else:
            code = ops.encode_relu(p["x"], p["weight"], p["bias"], F, p["centre"])
        assert code is not None
        out, chosen = ops.decode(code, p["w_dec"]), code.to_dense() > 0

    def dense(t: dict[str, Tensor]) -> Tensor:
        pre = reference.pre_activations(t["x"], t["weight"], t["bias"], t["centre"])
        return reference.decode(torch.where(chosen, pre, torch.zeros_like(pre)), t["w_dec"])

    exact = double(p)
    truth, torchs = dense(exact), dense(p)
    want = {"out": truth.detach(), **gradients(truth, exact)}
    ours = {"out": out.detach(), **gradients(out, p)}
    theirs = {"out": torchs.detach(), **gradients(torchs, p)}
    slack = 4 * torch.finfo(dtype).eps
    for name, w in want.items():
        scale = w.abs().max()
        mine, other = ((t[name].double() - w).abs().max() / scale for t in (ours, theirs))
        assert mine <= other * 1.5 + slack, f"{name}: {mine:.3g} against {other:.3g} of torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 5, 32, 200])
def test_ties_go_to_the_lower_feature(dtype, K):
    """Small integers: every product is exact, nearly every row has equal entries around its k-th."""
    gen = torch.Generator().manual_seed(3)
    N, D, F = 40, 6, 1000
    x = torch.randint(-2, 3, (N, D), generator=gen).to(dtype)
    weight = torch.randint(-1, 2, (F, D), generator=gen).to(dtype)
    bias = torch.randint(-1, 2, (F,), generator=gen).to(dtype)
    code = ops.encode_topk(x, weight, bias, K)
    assert torch.equal(code.to_dense(), reference.encode_topk(x, weight, bias, K))


def test_rows_with_equal_entries_everywhere_and_in_rising_order():
    F, K = 1000, 7
    x = torch.ones(3, 1)
    flat = ops.encode_topk(x, torch.ones(F, 1), torch.zeros(F), K)
    assert flat.indices.sort(-1).values.tolist() == [list(range(K))] * 3
    rising = ops.encode_topk(x, torch.arange(1.0, F + 1)[:, None], torch.zeros(F), K)
    assert rising.indices.tolist() == [list(range(F - 1, F - 1 - K, -1))] * 3


def test_rows_with_fewer_than_k_positive_entries_leave_slots_unused():
    x, weight, bias = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[3.0], [2.0], [-1.0], [0.0]]), torch.zeros(4)
    code = ops.encode_topk(x, weight, bias, 3)
    assert code.counts is not None and code.counts.tolist() == [2, 1, 0]
    assert code.values.tolist() == [[3.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert code.indices.tolist() == [[0, 1, 0], [2, 0, 0], [0, 0, 0]]
    w_dec = torch.eye(4, requires_grad=True)
    ops.decode(code, w_dec).sum().backward()
    assert w_dec.grad is not None and w_dec.grad.sum(1).tolist() == [12.0, 8.0, 4.0, 0.0]


@pytest.mark.parametrize("encode", [ops.encode_topk, ops.encode_relu])
def test_no_rows(encode):
    p = problem(0, 8, 64)
    code = encode(p["x"], p["weight"], p["bias"], 4, p["centre"])
    assert code is not None and code.to_dense().shape == (0, 64)
    out = ops.decode(code, p["w_dec"])
    assert out.shape == (0, 8)
    for gradient in gradients(out, p).values():
        assert not gradient.any()


def test_gradients_with_respect_to_values_and_an_expanded_incoming_gradient():
    p = problem(9, 8, 40)
    values = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(40)[:3] for _ in range(9)])
    code = SparseCode(values, indices, 40)
    assert torch.autograd.gradcheck(lambda v, w: ops.decode(SparseCode(v, indices, 40), w), (values, p["w_dec"]))
    (d_values,) = torch.autograd.grad(ops.decode(code, p["w_dec"]).sum(), values)
    torch.testing.assert_close(d_values, p["w_dec"].detach().sum(1)[indices])


def test_a_feature_twice_in_a_row_counts_twice():
    code = SparseCode(torch.tensor([[2.0, 3.0]]), torch.tensor([[1, 1]]), 3)
    w = torch.eye(3, requires_grad=True)
    out = ops.decode(code, w)
    assert out.tolist() == [[0.0, 5.0, 0.0]]
    out.sum().backward()
    assert w.grad is not None and w.grad[1].tolist() == [5.0, 5.0, 5.0]


def test_too_dense_a_relu_code_is_refused():
    x, weight = torch.ones(2, 1), torch.ones(50, 1)
    assert ops.encode_relu(x, weight, torch.zeros(50), 49) is None
    assert ops.encode_relu(x, weight, torch.zeros(50), 50) is not None


@pytest.mark.parametrize("least_rows", [1, 1000])
def test_chunks_of_rows_and_of_columns_make_the_same_code(monkeypatch, least_rows):
    monkeypatch.setattr(cpu, "CHUNK_ROWS", 16)
    monkeypatch.setattr(cpu, "LEAST_ROWS", least_rows)
    p = problem(37, 8, 100, torch.float32)
    assert torch.equal(
        ops.encode_topk(p["x"], p["weight"], p["bias"], 6).to_dense() > 0,
        reference.encode_topk(p["x"], p["weight"], p["bias"], 6) > 0,
    )
    code = ops.encode_relu(p["x"], p["weight"], p["bias"], 100)
    assert code is not None
    torch.testing.assert_close(code.to_dense(), reference.encode_relu(p["x"], p["weight"], p["bias"]))


@pytest.mark.parametrize("shape", [cpu.by_rows, cpu.by_columns])
@pytest.mark.parametrize(
    "N,F", [(2048, 16384), (1, 16384), (100_000, 4096), (256, 1024), (8, 512), (8, 1 << 20), (4096, 2048), (0, 512)]
)
def test_chunks_stay_below_a_quarter_of_the_dense_code(shape, N, F):
    rows, columns = shape(N, F)
    assert 1 <= rows <= max(N, 1) and 1 <= columns <= F
    assert rows * columns < max(N, 1) * F / 4
    assert rows * columns <= cpu.ROW_CHUNK_ELEMENTS


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_on_a_gpu(backend):
    p = {name: t.detach().float().cuda().requires_grad_() for name, t in problem(65, 48, 1024).items()}
    code = ops.encode_topk(p["x"], p["weight"], p["bias"], 16, p["centre"])
    exact = double(p)
    dense = reference.encode_topk(exact["x"], exact["weight"], exact["bias"], 16, exact["centre"])
    pull = torch.randn(65, 48, device="cuda", dtype=torch.float64)
    want = torch.autograd.grad((reference.decode(dense, exact["w_dec"]) * pull).sum(), list(exact.values()))
    got = torch.autograd.grad((ops.decode(code, p["w_dec"], backend) * pull.float()).sum(), list(p.values()))
    assert_close(dict(zip(p, got, strict=True)), dict(zip(p, want, strict=True)), 1e-5)
