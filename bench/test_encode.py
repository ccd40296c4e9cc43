"""pytest-benchmark: the encoder on the CPU, by rule, beside the dense way: `pytest bench`."""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

N, D, F, K = 2048, 512, 16384, 32


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(N, D, generator=generator), torch.randn(F, D, generator=generator) * D**-0.5
    # Pre-activations are N(0, 1); with this bias about K of F are above 0.
    cut = torch.special.ndtri(torch.tensor(1 - K / F, dtype=torch.float64))
    return x, weight, torch.full((F,), -float(cut))


@pytest.mark.parametrize("rule", ["topk", "relu", "jumprelu", "batchtopk"])
def test_ops(benchmark, operands, rule):
    from fastsae import ops, reference

    x, weight, bias = operands
    threshold = torch.full_like(bias, 0.1)
    if rule == "topk":
        code, wanted = benchmark(ops.encode_topk, x, weight, bias, K), reference.encode_topk(x, weight, bias, K)
    elif rule == "relu":
        code, wanted = benchmark(ops.encode_relu, x, weight, bias, F), reference.encode_relu(x, weight, bias)
    elif rule == "jumprelu":
        code = benchmark(ops.encode_jumprelu, x, weight, bias, threshold, F)
        wanted = reference.encode_jumprelu(x, weight, bias, threshold)
    else:
        code = benchmark(ops.encode_batchtopk, x, weight, bias, K)
        wanted = reference.encode_batchtopk(x, weight, bias, K)
    wrong = (code.to_dense() - wanted).abs() > 1e-4
    assert int(wrong.sum()) <= N // 100  # two products may round the least entries of a few rows differently


def test_dense_topk(benchmark, operands):
    x, weight, bias = operands
    benchmark(lambda: torch.nn.functional.linear(x, weight, bias).relu().topk(K))


def test_product(benchmark, operands):
    x, weight, bias = operands
    benchmark(torch.nn.functional.linear, x, weight, bias)
