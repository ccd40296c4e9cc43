"""What the tests of the encoder share: operands, and how a code is held against float64."""

import torch
from torch import Tensor

from fastsae import gpu, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENCODERS: list[gpu.Encoder] = ["fused", "chunked"]


def make(N: int, D: int, F: int, seed: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, D, generator=generator), torch.randn(F, D, generator=generator)
    return x.to(DEVICE), weight.to(DEVICE), (torch.randn(F, generator=generator) + shift).to(DEVICE)


def integers(N: int, D: int, F: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Small ones: every product and sum is exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-2, 3, size, generator=generator).float() for size in ((N, D), (F, D)))
    return x.to(DEVICE), weight.to(DEVICE), torch.randint(-2, 3, (F,), generator=generator).float().to(DEVICE)


def dense(found, F: int) -> Tensor:
    """[N, F] of used slots; unused ones must hold 0."""
    values, indices, counts = found[:3]
    used = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    assert not values[~used].any() and not indices[~used].any()
    assert (indices >= 0).all() and (indices < F).all()
    flat = torch.zeros(values.shape[0], F, dtype=torch.float64, device=values.device)
    taken = torch.zeros_like(flat).scatter_add_(1, indices.long(), used.double())
    assert (taken <= 1).all(), "a feature is in a row twice"
    return flat.scatter_add_(1, indices.long(), values.double())


def close(found, wanted: Tensor, x: Tensor, weight: Tensor) -> None:
    """The chosen entries equal float64's, but where two are within rounding of each other."""
    got = dense(found, weight.shape[0])
    scale = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1) + 1
    assert ((got - wanted).abs() <= 4e-6 * scale).all()
    assert torch.equal(found[2].long(), (wanted > 0).sum(1))


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    return reference.encode_topk(x.double(), weight.double(), bias.double(), k)


def with_encoders(*sizes: tuple) -> list[tuple]:
    """Each size (N, D, …) with each encoder that takes its D."""
    return [(*size, encoder) for size in sizes for encoder in ENCODERS if encoder == "chunked" or size[1] % 16 == 0]
