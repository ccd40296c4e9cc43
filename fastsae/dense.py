"""The exact path for codes too dense for slots: the code is made, and made again in the backward pass, in chunks of F.

For ReLU and JumpReLU, whose latents decide one by one: f = z · 1[z > θ] with z = x · weightᵀ + bias, θ = 0 for ReLU.
Ten products of N·D·F operations with the backward pass, as a dense layer, and one more; never [N, F].

Axes: N tokens, F dictionary size, D width, C features of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import cpu
from fastsae.gradients import Pull, WeightGradients, add_norm_gradient, widened


class Dense(NamedTuple):
    """out = f · w_dec [N, D], l1 [N] (weighted with norms [F] where given), l0 [N] and fired [F], how often; and
    entries [N]: l0, and those of the threshold's band below it."""

    out: Tensor
    l1: Tensor
    l0: Tensor
    fired: Tensor
    entries: Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, threshold: Tensor | None, norms: Tensor | None,
    bandwidth: float = 0.0,
) -> Dense:  # fmt: skip
    """out, l1 and l0 in fp32 or more."""
    N, F = x.shape[0], weight.shape[0]
    out = widened(x.new_empty(0)).new_zeros(N, w_dec.shape[1])
    l1, l0, entries = (out.new_zeros(N) for _ in range(3))
    fired = torch.zeros(F, dtype=torch.int32, device=x.device)
    for chunk in cpu.chunks(x, weight, bias, cpu.by_columns(N, F)[1]):
        part = slice(chunk.start, chunk.stop)
        if threshold is not None and bandwidth:
            entries += (chunk.pre > threshold[part] - bandwidth / 2).sum(-1)
        f = _activate(chunk.pre, threshold, part)
        out += torch.mm(f, w_dec[part])
        l1 += f.sum(-1, dtype=out.dtype) if norms is None else f @ norms[part].to(f.dtype)
        active = f > 0
        l0 += active.sum(-1)
        fired[part] = active.sum(0)
    return Dense(out, l1, l0, fired, entries if threshold is not None and bandwidth else l0)


def backward(
    x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, threshold: Tensor | None, bandwidth: float,
    norms: Tensor | None, pull: Pull, want_x: bool,
) -> tuple[WeightGradients, Tensor | None]:  # fmt: skip
    """Gradients of weight, bias, w_dec and threshold, and of x if wanted, where pull holds those of the outputs."""
    N, F = x.shape[0], weight.shape[0]
    d_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if want_x else None
    made = WeightGradients(
        torch.empty_like(w_dec), torch.empty_like(weight), torch.empty_like(bias),
        None if threshold is None else torch.empty_like(threshold),
    )  # fmt: skip
    width = cpu.by_columns(N, F)[1]
    buffer = x.new_empty(N * min(width, F))
    for start in range(0, F, width):
        part = slice(start, min(start + width, F))
        features = of_features(part, x, weight, bias, w_dec, threshold, bandwidth, norms, pull, d_x, buffer, made)
        if made.threshold is not None and features.threshold is not None:
            made.threshold[part] = features.threshold
    return made, d_x


def of_features(
    part: slice, x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, threshold: Tensor | None, bandwidth: float,
    norms: Tensor | None, pull: Pull, d_x: Tensor | None = None, buffer: Tensor | None = None,
    out: WeightGradients | None = None,
) -> WeightGradients:  # fmt: skip
    """The rows of the gradients of some features, [C, D] and [C]; views of out where that is given.

    Adds to d_x [N, D]. buffer: N · C elements to make the pre-activations in."""
    w, C = w_dec[part], part.stop - part.start
    buffer = x.new_empty(x.shape[0] * C) if buffer is None else buffer
    pre = buffer[: x.shape[0] * C].view(x.shape[0], C)
    torch.addmm(bias[part], x, weight[part].T, out=pre)
    if out is None:
        d_w, d_weight, d_bias = torch.empty_like(w), torch.empty_like(weight[part]), torch.empty_like(bias[part])
    else:
        d_w, d_weight, d_bias = (t[part] for t in (out.w_dec, out.weight, out.bias))
    d_f = pull.out @ w.T  # [N, C]
    if pull.l1 is not None:
        d_f += pull.l1[:, None] if norms is None else pull.l1[:, None] * norms[part].to(d_f.dtype)
    d_threshold = None if threshold is None else _slope(pre, d_f, threshold[part], bandwidth, pull.l0)
    f = _activate(pre, threshold, part)
    torch.mm(f.T, pull.out, out=d_w)
    if norms is not None and pull.l1 is not None:
        add_norm_gradient(d_w, w, pull.l1.to(f.dtype) @ f, norms[part])
    d_pre = d_f.mul_(f > 0)
    torch.mm(d_pre.T, x, out=d_weight)
    torch.sum(d_pre, 0, out=d_bias)
    if d_x is not None:
        d_x += d_pre @ weight[part]
    return WeightGradients(d_w, d_weight, d_bias, d_threshold)


def _slope(pre: Tensor, d_f: Tensor, theta: Tensor, bandwidth: float, d_l0: Tensor | None) -> Tensor:
    """dL/dθ [C] of the entries pre [N, C] whose latents' values pull with d_f [N, C]."""
    if not bandwidth:
        return torch.zeros_like(theta)
    band = ((pre - theta).abs() < bandwidth / 2).to(d_f.dtype)
    slope = d_f * theta if d_l0 is None else d_f * theta + d_l0[:, None]
    return (-(slope * band).sum(0) / bandwidth).to(theta.dtype)


def _activate(pre: Tensor, threshold: Tensor | None, part: slice) -> Tensor:
    """f of a chunk's pre-activations, in place."""
    if threshold is None:
        return pre.relu_()
    return pre.mul_(pre > threshold[part])
