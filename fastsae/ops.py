"""The differentiable operations of a sparse autoencoder, on codes that are never [N, F].

Each has a dense twin in `reference`. Gradients are exact for the latents that were chosen; the choice itself has none.

Axes: N tokens, K active latents per token, F dictionary size, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae import cpu
from fastsae.codes import SparseCode
from fastsae.dispatch import Backend, Capacity, check_encode, check_indices, check_k, use_triton
from fastsae.errors import DataError


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None = None) -> Tensor:
    """(x − centre) · weightᵀ + bias, dense: [N, F], for those who ask for it."""
    return torch.nn.functional.linear(x if centre is None else x - centre, weight, bias)


def encode_topk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None, subset: Tensor | None = None,
    backend: Backend = "auto", check_finite: bool = False,
) -> SparseCode:  # fmt: skip
    """ReLU of the k largest entries of (x − centre) · weightᵀ + bias; of equal ones the lower features: k slots.

    x: [N, D], weight: [F, D], bias: [F], centre: [D]; all of one dtype and on one device; 1 ≤ k ≤ F. `values` carries
    the gradient of x, weight, bias and centre. subset: [S ≥ k] ascending features to choose among, all F without it;
    the choice among a subset is made in torch. check_finite: whether to look for NaN and infinity in x, which costs a
    pass and waits for the device; without it a row with NaN has an empty code.

    Raises DataError (a ValueError) for shapes, dtypes, devices and k that do not fit, and where backend="triton" and
    there are no kernels for these tensors.
    """
    check_encode(x, weight, bias, centre, check_finite)
    check_k(k, weight.shape[0] if subset is None else subset.numel())
    with torch.no_grad():
        if subset is None and use_triton(backend, weight, product=True, k=k):
            from fastsae import gpu

            values, indices, counts, _ = gpu.encode_topk(x, weight, bias, k, centre)
        else:
            among = (weight, bias) if subset is None else (weight[subset], bias[subset])
            values, indices = cpu.encode_topk(x, *among, k, centre)
            if subset is not None:
                indices = torch.where(values > 0, subset[indices], 0)
            # Values descend, so a row is full if its last slot is in use.
            counts = None if bool((values[:, -1] > 0).all()) else (values > 0).sum(-1)
    return _with_gradient(values, indices, counts, x, weight, bias, centre)


def encode_relu(
    x: Tensor, weight: Tensor, bias: Tensor, max_l0: int, centre: Tensor | None = None,
    backend: Backend = "auto", check_finite: bool = False, capacity: Capacity | None = None,
) -> SparseCode | None:  # fmt: skip
    """The positive entries of (x − centre) · weightᵀ + bias; None where a row has more than max_l0 of them.

    Arguments, gradients and errors as for `encode_topk`; no order within a row. capacity: of one caller, for all its
    calls, so that the kernels know how much room such codes take.
    """
    check_encode(x, weight, bias, centre, check_finite)
    with torch.no_grad():
        found = _above(x, weight, bias, max_l0, centre, backend, capacity)
    return None if found is None else _with_gradient(*found, x, weight, bias, centre)


def encode_jumprelu(
    x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, max_l0: int, centre: Tensor | None = None,
    bandwidth: float = 0.0, backend: Backend = "auto", check_finite: bool = False, capacity: Capacity | None = None,
) -> SparseCode | None:  # fmt: skip
    """Entries of pre = (x − centre) · weightᵀ + bias above their feature's threshold [F] ≥ 0, which keep their value.

    "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders" (2024), eq. 3. Entries within
    bandwidth / 2 below or above the threshold are those that the threshold's gradient comes from (eq. 11); those
    below are in the code too, with value 0. None where a row has more than max_l0 entries.

    Other arguments, gradients and errors as for `encode_relu`; the threshold has no gradient here.
    """
    check_encode(x, weight, bias, centre, check_finite)
    if threshold.shape != bias.shape or threshold.device != bias.device:
        raise DataError(
            f"threshold must be [{bias.numel()}] on {bias.device}, one for each feature, "
            f"got {tuple(threshold.shape)} on {threshold.device}"
        )
    if bandwidth < 0:
        raise DataError(f"bandwidth must be 0 or more, got {bandwidth}")
    with torch.no_grad():
        below = wide(threshold) - bandwidth / 2  # rounded to bfloat16, bias − threshold would choose other entries
        found = _above(x, weight, wide(bias) - below, max_l0, centre, backend, capacity)
        if found is None:
            return None
        margins, indices, counts = found
        active = margins > bandwidth / 2
        values = torch.where(active, margins + below[indices.long()].to(margins.dtype), 0)
    code = _with_gradient(values, indices, counts, x, weight, bias, centre)
    return code if bandwidth == 0 else replace(code, values=torch.where(active, code.values, 0))


def encode_batchtopk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None,
    backend: Backend = "auto", check_finite: bool = False, capacity: Capacity | None = None,
) -> SparseCode:  # fmt: skip
    """ReLU of the N · k largest entries of (x − centre) · weightᵀ + bias, however many a row has of them.

    "BatchTopK Sparse Autoencoders" (2024), eq. 3. Of equal entries those of earlier rows, then of lower features.
    Arguments, gradients and errors as for `encode_topk`, capacity as for `encode_relu`.
    """
    check_encode(x, weight, bias, centre, check_finite)
    check_k(k, weight.shape[0])
    with torch.no_grad():
        if use_triton(backend, weight, product=True):
            from fastsae import gpu

            found = gpu.encode_batchtopk(x, weight, bias, k, centre, capacity=capacity)
        else:
            found = cpu.encode_batchtopk(x, weight, bias, k, centre)
    return _with_gradient(*found, x, weight, bias, centre)


def decode(code: SparseCode, w_dec: Tensor, backend: Backend = "auto", check: bool = True) -> Tensor:
    """out[n] = Σ_k values[n, k] · w_dec[indices[n, k]], summed in fp32 (float64 in float64): [N, D] in w_dec's dtype.

    w_dec: [F, D]. Reads N·K·D + 2·N·K elements and writes N·D; backward the same again, and the [F, D] gradient.
    check: whether to look at the range of the indices, which waits for the device; not needed for an encoder's code.

    Raises DataError for indices that name no feature or w_dec of another size, and if backend is "triton" and there
    are no kernels for these tensors.
    """
    if w_dec.ndim != 2 or w_dec.shape[0] != code.d_sae:
        raise DataError(f"expected w_dec [{code.d_sae}, D], a row for each feature, got {tuple(w_dec.shape)}")
    if check:
        check_indices(code)
    return _decode(code, w_dec, backend, False)[0]


def decode_error(
    code: SparseCode, w_dec: Tensor, bias: Tensor, target: Tensor, backend: Backend = "auto", weighted: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ = decode + bias [N, D], the mean over rows of Σ_d (x̂ − target)² (0 for no rows), and l1.

    bias: [D], target: [N, D]; both have gradients. l1: [N], Σ_k values[n, k] · ‖w_dec[indices[n, k]]‖₂, here so that
    w_dec has one gradient buffer; empty unless weighted. In kernels the error comes from the decoder's own pass, from
    sums not yet rounded to w_dec's dtype.
    """
    if not use_triton(backend, w_dec):
        out, l1 = _decode(code, w_dec, backend, weighted)
        out = out + bias
        return out, squared_error(out, target), l1
    out, l1, error = _Decode.apply(code.values, w_dec, _order_of(code), True, weighted, bias, target)
    return out, error.sum() / max(code.n_tokens, 1), l1


def squared_error(x_hat: Tensor, wanted: Tensor) -> Tensor:
    """Mean over rows of the squared error, summed over D in float32 or more; 0 for no rows."""
    return torch.nn.functional.mse_loss(wide(x_hat), wide(wanted), reduction="sum") / max(x_hat.shape[0], 1)


def wide(t: Tensor) -> Tensor:
    """t in float32, or as it is in float64: what losses are summed in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def relu_dense(
    x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, weighted: bool, centre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A ReLU code f too dense for slots, made and made again in chunks of features: out, l1, l0, fired.

    out = f · w_dec: [N, D]. l1: [N], Σ_f f, or Σ_f f·‖w_dec[f]‖ if weighted. l0: [N] and fired: [F] bool, without
    gradients. Ten products of N·D·F operations with the backward pass, as a dense layer, and one more.
    """
    return _ReLUDense.apply(x, weight, bias, w_dec, centre, weighted)


# --- autograd -------------------------------------------------------------------------------------------------------


def _not_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast too, an SAE computes in the dtype of its parameters; mixing the two would round sums midway."""

    @functools.wraps(method)
    def run(ctx: Any, *args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return method(ctx, *args)

    return run


class _Order:
    """A code sorted by feature. Two backward passes need it; the first makes it."""

    def __init__(self, indices: Tensor, counts: Tensor | None, d_sae: int) -> None:
        self.indices, self.counts, self.d_sae = indices, counts, d_sae
        self.made: cpu.ByFeature | None = None

    def get(self) -> cpu.ByFeature:
        if self.made is None:
            self.made = cpu.by_feature(self.indices, self.counts, self.d_sae)
        return self.made


def _with_gradient(
    values: Tensor, indices: Tensor, counts: Tensor | None,
    x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None,
) -> SparseCode:  # fmt: skip
    F = weight.shape[0]
    values = _PreActivationsAt.apply(x, weight, bias, centre, values, _Order(indices, counts, F))
    return SparseCode(values, indices, F, counts)


def _decode(code: SparseCode, w_dec: Tensor, backend: Backend, weighted: bool) -> tuple[Tensor, Tensor]:
    return _Decode.apply(code.values, w_dec, _order_of(code), use_triton(backend, w_dec), weighted, None, None)[:2]


def _order_of(code: SparseCode) -> _Order:
    order = getattr(code.values.grad_fn, "order", None)  # of _PreActivationsAt, if the values come straight from it
    if not isinstance(order, _Order) or order.indices is not code.indices or order.counts is not code.counts:
        order = _Order(code.indices, code.counts, code.d_sae)
    return order


def _sum_at(where: Tensor, what: Tensor, size: int, like: Tensor) -> Tensor:
    """out[f] = Σ of what[m] over where[m] = f: [size] in like's dtype, summed in fp32 or more."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(size, dtype=dtype, device=like.device).index_add_(0, where, what.to(dtype)).to(like.dtype)


class _PreActivationsAt(torch.autograd.Function):
    """values[n, k] = ⟨x[n] − centre, weight[indices[n, k]]⟩ + bias[indices[n, k]], which the selection has computed."""

    @staticmethod
    @_not_autocast
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None, values: Tensor, order: _Order
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, centre)
        ctx.order = order
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    @_not_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, centre = ctx.saved_tensors
        want_x, want_weight, want_bias, want_centre = ctx.needs_input_grad[:4]
        d_x = d_weight = d_bias = d_centre = None
        if want_weight or want_bias or want_centre:
            order = ctx.order.get()
            d_pre = order.of(grads[0])  # [M]
            if want_weight:
                rows = x if centre is None else x - centre
                d_weight = cpu.weighted_rows(rows, order.token, d_pre, order.offsets)
            d_bias = _sum_at(order.feature, d_pre, weight.shape[0], bias)
            if want_centre:
                # Σ_n d_x[n] = Σ_f (Σ_n d_pre[n, f]) · weight[f]: one product with a vector, not a gather for each row.
                d_centre = -(d_bias @ weight)
            ctx.order.made = None  # this was the last to need it
        if want_x:
            flat = cpu.by_token(ctx.order.indices, ctx.order.counts)
            d_x = cpu.weighted_rows(weight, flat.feature, flat.of(grads[0]), flat.offsets)
        return d_x, d_weight, d_bias if want_bias else None, d_centre, None, None


class _Decode(torch.autograd.Function):
    """out [N, D], l1 [N] if weighted, and the squared error [N] of out + bias if there is a target; else empty ones."""

    @staticmethod
    @_not_autocast
    def forward(
        ctx: Any, values: Tensor, w_dec: Tensor, order: _Order, triton: bool, weighted: bool,
        bias: Tensor | None, target: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.order, ctx.weighted = order, weighted
        indices, counts = order.indices, order.counts
        residual, error, l1 = None, values.new_empty(0), values.new_empty(0)
        if target is not None:
            from fastsae.kernels.decode import decode_error as fused

            assert triton and bias is not None
            out, residual, error = fused(indices, values, w_dec, bias, target, counts)
        elif triton:
            from fastsae.kernels.decode import decode as kernel

            out = kernel(indices, values, w_dec, counts)
        else:
            flat = cpu.by_token(indices, counts)
            out = cpu.weighted_rows(w_dec, flat.feature, flat.of(values), flat.offsets)
        ctx.save_for_backward(values, w_dec, residual)
        if weighted:
            used = values if counts is None else values * _used(indices, counts)
            l1 = (used * w_dec.norm(dim=1)[indices]).sum(-1)
        ctx.mark_non_differentiable(*([] if weighted else [l1]), *([] if target is not None else [error]))
        return out, l1, error

    @staticmethod
    @once_differentiable
    @_not_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, w_dec, residual = ctx.saved_tensors
        d_out, d_l1 = grads[0].contiguous(), grads[1]
        d_bias = d_target = None
        if residual is not None:
            pull_of_error = (2 * grads[2])[:, None].to(residual.dtype) * residual
            d_out = d_out + pull_of_error
            d_bias = d_out.sum(0) if ctx.needs_input_grad[5] else None
            d_target = -pull_of_error if ctx.needs_input_grad[6] else None
        order = ctx.order.get()
        d_values = d_w = None
        norms = w_dec.norm(dim=1) if ctx.weighted else None
        if ctx.needs_input_grad[0]:
            d = cpu.paired_dots(w_dec, order.feature, d_out, order.token)
            if norms is not None:
                d = d + d_l1[order.token] * norms[order.feature]
            d_values = values.new_zeros(values.numel()).index_put_((order.slot,), d.to(values.dtype)).view_as(values)
        if ctx.needs_input_grad[1]:
            sorted_values = order.of(values)
            d_w = cpu.weighted_rows(d_out, order.token, sorted_values, order.offsets)
            if norms is not None:
                pull = _sum_at(order.feature, d_l1[order.token] * sorted_values, w_dec.shape[0], w_dec)
                _add_norm_gradient(d_w, w_dec, pull, norms)
        return d_values, d_w, None, None, None, d_bias, d_target


def _used(indices: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(indices.shape[1], device=indices.device) < counts[:, None]


def _add_norm_gradient(d_w: Tensor, w_dec: Tensor, pull: Tensor, norms: Tensor) -> None:
    """d_w[f] += pull[f] · w_dec[f] / ‖w_dec[f]‖, nothing where the norm is 0, in place: [F, D] is not made twice."""
    d_w.addcmul_(w_dec, torch.where(norms > 0, pull / norms, 0)[:, None])


class _ReLUDense(torch.autograd.Function):
    """Forward and backward both make f chunk by chunk, so the code is never kept."""

    @staticmethod
    @_not_autocast
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, centre: Tensor | None, weighted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, w_dec, centre)
        ctx.weighted = weighted
        rows = x if centre is None else x - centre
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = torch.zeros(x.shape[0], w_dec.shape[1], dtype=dtype, device=x.device)
        l1 = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
        l0 = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        fired = torch.zeros(weight.shape[0], dtype=torch.bool, device=x.device)
        for chunk in cpu.chunks(rows, weight, bias, cpu.by_columns(rows.shape[0], weight.shape[0])[1]):
            f, w = chunk.pre.relu_(), w_dec[chunk.start : chunk.stop]
            out += torch.mm(f, w)
            l1 += f @ w.norm(dim=1) if weighted else f.sum(-1)
            active = f > 0
            l0 += active.sum(-1)
            fired[chunk.start : chunk.stop] = active.any(0)
        ctx.mark_non_differentiable(l0, fired)
        return out.to(x.dtype), l1.to(x.dtype), l0, fired

    @staticmethod
    @once_differentiable
    @_not_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, w_dec, centre = ctx.saved_tensors
        d_out, d_l1 = grads[0].contiguous(), grads[1]
        rows = x if centre is None else x - centre
        want_x = ctx.needs_input_grad[0]
        d_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if want_x else None
        d_weight, d_bias, d_w = torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(w_dec)
        for chunk in cpu.chunks(rows, weight, bias, cpu.by_columns(rows.shape[0], weight.shape[0])[1]):
            part = slice(chunk.start, chunk.stop)
            f, w = chunk.pre.relu_(), w_dec[part]
            torch.mm(f.T, d_out, out=d_w[part])
            d_pre = d_out @ w.T  # [N, C]
            if ctx.weighted:
                norms = w.norm(dim=1)
                d_pre.addcmul_(d_l1[:, None], norms)
                _add_norm_gradient(d_w[part], w, d_l1 @ f, norms)
            else:
                d_pre += d_l1[:, None]
            d_pre.mul_(f > 0)
            torch.mm(d_pre.T, rows, out=d_weight[part])
            torch.sum(d_pre, 0, out=d_bias[part])
            if d_x is not None:
                d_x += d_pre @ weight[part]
        d_centre = None if centre is None else -(d_bias @ weight)
        return None if d_x is None else d_x.to(x.dtype), d_weight, d_bias, d_w, d_centre, None


def _above(
    x: Tensor, weight: Tensor, bias: Tensor, most: int, centre: Tensor | None, backend: Backend,
    capacity: Capacity | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    if use_triton(backend, weight, product=True):
        from fastsae import gpu

        return gpu.encode_above(x, weight, bias, most, centre, capacity=capacity)
    return cpu.encode_relu(x, weight, bias.to(x.dtype), most, centre)
