"""The truth: each op of `ops` in plain, dense, readable torch. Slow; tests and the bench compare against it.

Axes: N tokens, K active latents per token, F dictionary size, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.codes import SparseCode


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None = None) -> Tensor:
    """pre = (x − centre) · weightᵀ + bias: [N, F], from x [N, D], weight [F, D], bias [F] and centre [D]."""
    if centre is not None:
        x = x - centre
    return x @ weight.T + bias


def topk_mask(pre: Tensor, k: int) -> Tensor:
    """[N, F] bool: the k largest entries of each row that are positive; of equal ones the lower features."""
    order = pre.argsort(dim=-1, descending=True, stable=True)[:, :k]
    chosen = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, order, True)
    return chosen & (pre > 0)


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None) -> Tensor:
    """ReLU of the k largest pre-activations of each row, zero elsewhere: dense [N, F]."""
    pre = pre_activations(x, weight, bias, centre)
    return torch.where(topk_mask(pre.detach(), k), pre, torch.zeros_like(pre))


def encode_relu(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None = None) -> Tensor:
    """max(pre, 0): dense [N, F]."""
    return pre_activations(x, weight, bias, centre).relu()


def encode_jumprelu(
    x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, centre: Tensor | None = None, bandwidth: float = 0.0
) -> Tensor:
    """pre where it is above threshold [F] ≥ 0, zero elsewhere: dense [N, F]. The threshold's gradient: `jumprelu`."""
    return jumprelu(pre_activations(x, weight, bias, centre), threshold, bandwidth)


def jumprelu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """pre · 1[pre > threshold] of pre [N, F], threshold [F].

    Straight-through estimator of the threshold's gradient, "Jumping Ahead" (2024), eq. 11: −threshold / bandwidth where
    |pre − threshold| < bandwidth / 2; none at bandwidth 0.
    """
    return _JumpReLU.apply(pre, threshold, bandwidth)


def l0(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """How many entries of each row of pre [N, F] are above threshold [F]: [N].

    Straight-through estimator, eq. 12: −1 / bandwidth where |pre − threshold| < bandwidth / 2, for the threshold alone.
    """
    return _L0.apply(pre, threshold, bandwidth)


def _rectangle(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 / bandwidth within the band, 0 outside."""
    inside = (pre - threshold).abs() < bandwidth / 2
    return inside.to(pre.dtype) / (bandwidth or 1.0)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        slope = -threshold * _rectangle(pre, threshold, ctx.bandwidth)
        return torch.where(pre > threshold, grads[0], 0), (grads[0] * slope).sum(0), None


class _L0(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).sum(-1).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        return None, -(grads[0][:, None] * _rectangle(pre, threshold, ctx.bandwidth)).sum(0), None


def batchtopk_mask(pre: Tensor, k: int) -> Tensor:
    """[N, F] bool: the N · k largest entries that are positive; of equal ones those of earlier rows, lower features."""
    flat = pre.reshape(-1)
    order = flat.argsort(descending=True, stable=True)[: pre.shape[0] * k]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, order, True).view_as(pre) & (pre > 0)


def encode_batchtopk(x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None) -> Tensor:
    """ReLU of the N · k largest pre-activations of the batch, zero elsewhere: dense [N, F]."""
    pre = pre_activations(x, weight, bias, centre)
    return torch.where(batchtopk_mask(pre.detach(), k), pre, torch.zeros_like(pre))


def decode(code: SparseCode | Tensor, w_dec: Tensor) -> Tensor:
    """out = f · w_dec: [N, D], from f [N, F] (or its SparseCode) and w_dec [F, D]."""
    dense = code.to_dense().reshape(-1, code.d_sae) if isinstance(code, SparseCode) else code
    return dense @ w_dec


def l1(f: Tensor, w_dec: Tensor | None = None) -> Tensor:
    """Σ_f f[n, f] per row, or Σ_f f[n, f] · ‖w_dec[f]‖₂ when w_dec [F, D] is given: [N]."""
    return (f if w_dec is None else f * w_dec.norm(dim=1)).sum(-1)


def auxk(
    x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, e: Tensor, dead: Tensor, k: int,
    centre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ_d (ê − e)² per row [N]: e [N, D] rebuilt by the k largest of the dead latents [S]. e is a constant."""
    pre = pre_activations(x, weight, bias, centre)
    hidden = torch.full_like(pre, -1.0)
    hidden[:, dead] = pre.detach()[:, dead]
    f = torch.where(topk_mask(hidden, k), pre, torch.zeros_like(pre))
    return (decode(f, w_dec) - e.detach()).square().sum(-1)
