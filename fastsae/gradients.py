"""The backward pass of the sparse path, without autograd: what `autoencode` and `ops` share.

Only what fired is touched, in a fixed order: the code is sorted by feature, and each feature's rows of the gradients
are sums over its tokens.

Axes: N tokens, K slots per token, F dictionary size, D width, M used slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    code = ByFeature.of(rows, values, indices, counts, bias, w_dec, threshold, bandwidth, norms, pull)
    code = code.compact() if compact else code
    made = code.gradients(0, code.offsets.numel() - 1)
    return made, code.of_rows(weight, values, indices, counts) if want_x else None


@dataclass(frozen=True, eq=False)
class ByFeature:
    """A code sorted by feature, with what pulls at each of its M entries: any range of rows of the gradients is then
    two sums over rows of x and g. features: None, or [U], which features there are rows for; offsets [U + 1]: the
    entries of each."""

    rows: Tensor
    w_dec: Tensor
    norms: Tensor | None
    pull: Pull
    order: cpu.ByFeature
    used: Tensor  # [M]: values
    d_pre: Tensor  # [M]
    sums: tuple[Tensor, Tensor | None, Tensor | None]
    """dL/d bias [F], dL/d threshold [F], and Σ pull.l1 · value [F], which pulls at the norms."""
    offsets: Tensor
    features: Tensor | None = None

    @classmethod
    def of(
        cls, rows: Tensor, values: Tensor, indices: Tensor, counts: Tensor | None, bias: Tensor, w_dec: Tensor,
        threshold: Tensor | None, bandwidth: float, norms: Tensor | None, pull: Pull,
    ) -> ByFeature:  # fmt: skip
        """Arguments as for `of_code`."""
        F = w_dec.shape[0]
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
        d_threshold = of_norms = None
        if threshold is not None:
            theta = threshold[order.feature]
            band = (used == 0) | (used - theta < bandwidth / 2)
            slope = d_values * theta if pull.l0 is None else d_values * theta + pull.l0[order.token]
            slope = -(slope * band) / bandwidth if bandwidth else slope * 0
            d_threshold = sum_at(order.feature, slope, F, threshold)
            d_values = d_values * (used > 0)
        if norms is not None and pull.l1 is not None:
            of_norms = sum_at(order.feature, pull.l1[order.token] * used, F, norms)
        sums = sum_at(order.feature, d_values, F, bias), d_threshold, of_norms
        return cls(rows, w_dec, norms, pull, order, used, d_values, sums, order.offsets)

    def compact(self, also: Tensor | None = None) -> ByFeature:
        """With rows only for features that fired, and those of also [F] bool."""
        there = self.offsets.diff() > 0
        features = (there if also is None else there | also).nonzero().squeeze(1)
        offsets = torch.cat([self.offsets[features], self.offsets[-1:]])
        sums = tuple(t if t is None else t[features] for t in self.sums)
        return replace(self, features=features, offsets=offsets, sums=sums)

    def gradients(self, start: int, stop: int, between: tuple[int, int] | None = None) -> WeightGradients:
        """Rows start : stop of the gradients. between: offsets[start] and offsets[stop], where they are known."""
        first, last = between or (int(self.offsets[start]), int(self.offsets[stop]))
        part, at = slice(first, last), slice(start, stop)
        token, offsets = self.order.token[part], self.offsets[start : stop + 1] - first
        d_weight = cpu.weighted_rows(self.rows, token, self.d_pre[part], offsets)
        d_w = cpu.weighted_rows(self.pull.out, token, self.used[part], offsets)
        d_bias, d_threshold, of_norms = (None if t is None else t[at] for t in self.sums)
        assert d_bias is not None
        features = None if self.features is None else self.features[at]
        if of_norms is not None and self.norms is not None:
            which = at if features is None else features
            add_norm_gradient(d_w, self.w_dec[which].to(d_w.dtype), of_norms, self.norms[which])
        return WeightGradients(d_w, d_weight, d_bias, d_threshold, features)

    def of_rows(self, weight: Tensor, values: Tensor, indices: Tensor, counts: Tensor | None) -> Tensor:
        """Of rows: Σ_f dL/dpre[n, f] · weight[f]."""
        flat = cpu.by_token(indices, counts)
        by_slot = self.d_pre.new_zeros(values.numel()).index_put_((self.order.slot,), self.d_pre).view_as(values)
        return cpu.weighted_rows(weight, flat.feature, flat.of(by_slot), flat.offsets)


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
