"""The yardstick: a sparse autoencoder as one writes it in ten lines, dense [N, F] and all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class NaiveSAE(nn.Module):
    """f = ReLU((x − b_dec) · W_encᵀ + b_enc), x̂ = f · W_dec + b_dec; loss ‖x − x̂‖² + λ Σ f, means over rows."""

    def __init__(self, d_in: int, d_sae: int, dtype: torch.dtype, device: torch.device, l1_coefficient: float = 5.0):
        super().__init__()
        rows = torch.randn(d_sae, d_in, dtype=dtype, device=device)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype, device=device))
        self.l1_coefficient = l1_coefficient

    def loss(self, x: Tensor) -> Tensor:
        f = torch.nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
        error = (f @ self.W_dec + self.b_dec - x).square().sum(-1)
        return (error + self.l1_coefficient * f.sum(-1)).mean()


def step(sae: NaiveSAE, x: Tensor) -> Callable[[], None]:
    """A whole training step on x [N, D] with torch's fused Adam, as a call to be timed."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        sae.loss(x).backward()
        optimizer.step()

    return run
