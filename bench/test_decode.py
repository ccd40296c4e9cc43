"""pytest-benchmark: decode on the CPU, ours beside torch's: `pytest bench`."""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

N, D, F, K = 2048, 512, 16384, 32


@pytest.fixture(scope="module")
def code():
    from fastsae.codes import SparseCode

    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, F, (N, K), generator=generator)
    return SparseCode(torch.rand(N, K, generator=generator), indices, F)


@pytest.fixture(scope="module")
def w_dec():
    return torch.randn(F, D, generator=torch.Generator().manual_seed(1))


def test_ops(benchmark, code, w_dec):
    from fastsae import ops, reference

    out = benchmark(ops.decode, code, w_dec)
    assert torch.allclose(out, reference.decode(code, w_dec), rtol=1e-4, atol=1e-4)


def test_embedding_bag(benchmark, code, w_dec):
    benchmark(
        torch.nn.functional.embedding_bag, code.indices, w_dec, per_sample_weights=code.values, mode="sum"
    )


def test_dense(benchmark, code, w_dec):
    dense = code.to_dense()
    benchmark(torch.mm, dense, w_dec)
