"""The backward pass of the sparse path, without autograd: what `autoencode` and `ops` share.

Only what fired is touched, in a fixed order: the code is sorted by feature, and each feature's rows of the gradients
are sums over its tokens.

Axes: N tokens, K slots per token, F dictionary size, D width, M used slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae import cpu


class Pull(NamedTuple):
    """What pulls at the outputs: dL/d of Σ_k values · w_dec rows [N, D], of l1 [N], of l0 [N], of values [N, K]."""

    out: Tensor
    l1: Tensor | None = None
    l0: Tensor | None = None
    values: Tensor | None = None


class WeightGradients(NamedTuple):
    """w_dec and weight [F, D], bias [F], and threshold [F] where there is one; in the dtypes of the parameters.

    features: None, or [U] where there are rows for some features only: which, F for rows that stand for none.
    """

    w_dec: Tensor
    weight: Tensor
    bias: Tensor
    threshold: Tensor | None
    features: Tensor | None = None


def of_code(
    rows: Tensor, values: Tensor, indices: Tensor, counts: Tensor | None, weight: Tensor, bias: Tensor, w_dec: Tensor,
    threshold: Tensor | None, bandwidth: float, norms: Tensor | None, pull: Pull, want_x: bool, triton: bool,
    compact: bool = False,
) -> tuple[WeightGradients, Tensor | None]:  # fmt: skip
    """Gradients of all weights, and of rows (x − centre, [N, D]) if wanted.

    With g = pull.out, dL/dpre[n, f] = ⟨g[n], w_dec[f]⟩ + pull.l1[n] (· norms[f] where given) + pull.values of active
    entries. threshold [F] and bandwidth: of JumpReLU, whose band of entries passes a gradient on to the threshold
    ("Jumping Ahead", 2024, eq. 11 and 12); entries of the band that are not active have value 0.
    compact: rows only for features that fired (`features` says which; a kernel's list may end in rows that stand for
    none), for an optimizer that needs no dense gradient.
    """
    if triton:
        from fastsae.kernels import weight_grad

        return weight_grad.of_code(
            rows, values, indices, counts, weight, bias, w_dec, threshold, bandwidth, norms, pull, want_x, compact
        )
    F = weight.shape[0]
    if counts is not None and counts.device.type == "cpu" and bool((counts == indices.shape[1]).all()):
        counts = None  # every slot is in use: nothing to pick out
    order = cpu.by_feature(indices, counts, F)
    used = order.of(values)
    d_values = cpu.paired_dots(w_dec, order.feature, pull.out, order.token)  # [M]
    if pull.l1 is not None:
        of_l1 = pull.l1[order.token].to(d_values.dtype)
        d_values += of_l1 if norms is None else of_l1 * norms[order.feature].to(d_values.dtype)
    if pull.values is not None:
        d_values += order.of(pull.values).to(d_values.dtype)
    features, at, offsets, U = None, order.feature, order.offsets, F  # at: the row of the gradients of each entry
    if compact:
        fired = offsets.diff() > 0
        features = fired.nonzero().squeeze(1)
        U = features.numel()
        at = (fired.cumsum(0) - 1)[order.feature]
        offsets = torch.cat([offsets[:-1][fired], offsets[-1:]])
    d_threshold = None
    if threshold is not None:
        theta = threshold[order.feature]
        band = (used == 0) | (used - theta < bandwidth / 2)
        slope = d_values * theta if pull.l0 is None else d_values * theta + pull.l0[order.token]
        d_threshold = sum_at(at, -(slope * band) / bandwidth if bandwidth else slope * 0, U, threshold)
        d_values = d_values * (used > 0)
    d_weight = cpu.weighted_rows(rows, order.token, d_values, offsets)
    d_bias = sum_at(at, d_values, U, bias)
    d_w = cpu.weighted_rows(pull.out, order.token, used, offsets)
    if norms is not None and pull.l1 is not None:
        of_rows = (w_dec, norms) if features is None else (w_dec[features], norms[features])
        add_norm_gradient(d_w, of_rows[0], sum_at(at, pull.l1[order.token] * used, U, norms), of_rows[1])
    d_rows = None
    if want_x:
        flat = cpu.by_token(indices, counts)
        by_slot = d_values.new_zeros(values.numel()).index_put_((order.slot,), d_values).view_as(values)
        d_rows = cpu.weighted_rows(weight, flat.feature, flat.of(by_slot), flat.offsets)
    return WeightGradients(d_w, d_weight, d_bias, d_threshold, features), d_rows


def sum_at(where: Tensor, what: Tensor, size: int, like: Tensor) -> Tensor:
    """out[f] = Σ of what[m] over where[m] = f: [size] in like's dtype, summed in fp32 or more."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(size, dtype=dtype, device=like.device).index_add_(0, where, what.to(dtype)).to(like.dtype)


def add_norm_gradient(d_w: Tensor, w_dec: Tensor, pull: Tensor, norms: Tensor) -> None:
    """d_w[f] += pull[f] · w_dec[f] / ‖w_dec[f]‖, nothing where the norm is 0, in place: [F, D] is not made twice."""
    d_w.addcmul_(w_dec, torch.where(norms > 0, pull / norms, 0).to(d_w.dtype)[:, None])


def widened(t: Tensor) -> Tensor:
    """t in float32, or as it is in float64: what losses are summed in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The floating-point ones in autocast's dtype where autocast is on, as nn.Linear takes its operands; else as is."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the gradients of a fastsae SAE cannot be differentiated a second time; for double backward build the loss "
        "from the dense functions of fastsae.reference"
    )
