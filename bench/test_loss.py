"""pytest-benchmark: loss and backward of an SAE on the CPU, beside the naive one: `pytest bench`."""

import pytest
import torch

from bench.naive import NaiveSAE

pytest.importorskip("pytest_benchmark")

N, D, F, K = 512, 256, 4096, 32


@pytest.fixture(scope="module")
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu"])
def test_loss_and_backward(benchmark, x, activation):
    import fastsae

    sae = fastsae.SAE(d_in=D, d_sae=F, activation=activation, k=K, max_l0=F)
    if activation in ("relu", "jumprelu"):
        sae.b_enc.data.fill_(-2.4)  # 30 or so latents above 0, as x ~ N(0, 1) and rows are unit ones

    def call():
        out = sae.loss(x)
        out.loss.backward()
        return out

    out = benchmark(call)
    assert out.x_hat.shape == x.shape and sae.W_dec.grad is not None


def test_naive_dense(benchmark, x):
    sae = NaiveSAE(D, F, torch.float32, torch.device("cpu"))
    benchmark(lambda: sae.loss(x).backward())
    assert sae.W_dec.grad is not None
