"""Training by the torch backend, by the kernels and densely, from one start: the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import reference
from tests.encode_case import DEVICE

STEPS, D, F, N = 200, 6, 20, 4
OPTIONS = [{"activation": "topk", "k": 3, "aux_coefficient": 0.0}, {"activation": "relu", "l1_coefficient": 0.5}]


def dense_loss(sae: fastsae.SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss as the reference has it, and which latents fired."""
    weights = x, sae.encoder.weight, sae.encoder.bias
    if sae.cfg.activation == "topk":
        f = reference.encode_topk(*weights, sae.cfg.k, sae.b_dec)
    else:
        f = reference.encode_relu(*weights, sae.b_dec)
    error = (reference.decode(f, sae.W_dec) + sae.b_dec - x).square().sum(-1).mean()
    penalty = 0.0 if sae.cfg.activation == "topk" else sae.cfg.l1_coefficient * reference.l1(f, sae.W_dec).mean()
    return error + penalty, (f > 0).any(0)


def train(options: dict[str, Any], path: str) -> tuple[list[float], list[int]]:
    """Losses of all steps, and the latents that did not fire in the last 50."""
    backend: Any = "torch" if path == "dense" else path
    sae = fastsae.SAE(d_in=D, d_sae=F, **options, backend=backend, dead_after_tokens=50 * N, device=DEVICE)
    with torch.no_grad():
        sae.encoder.bias[::4] = -4.0  # some of them die
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    gen = torch.Generator().manual_seed(1)
    atoms = torch.randn(F, D, generator=gen)
    losses = []
    for _ in range(STEPS):
        x = (torch.rand(N, F, generator=gen) < 0.12).float() @ atoms
        x = x.to(DEVICE)
        if path == "dense":
            loss, fired = dense_loss(sae, x)
            sae.tokens_since_fired.add_(N).masked_fill_(fired, 0)
        else:
            loss = sae.loss(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, (sae.tokens_since_fired >= 50 * N).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_losses_and_the_same_dead_latents(options, monkeypatch):
    pytest.importorskip("triton")
    from fastsae import gpu

    # The sort of 128 slots takes the interpreter a tenth of a second a row.
    monkeypatch.setattr(gpu, "slots_for", lambda k: 16)
    dense, dead = train(options, "dense")
    assert dense[-1] < 0.6 * dense[0]
    assert 0 < len(dead) < F  # or comparing them says nothing
    for path in ("torch", "triton"):
        losses, also_dead = train(options, path)
        # What rounding does to a loss grows with the steps: each starts from weights that differ by it already.
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(dense), rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(torch.tensor(losses[:20]), torch.tensor(dense[:20]), rtol=1e-5, atol=1e-5)
        assert also_dead == dead
