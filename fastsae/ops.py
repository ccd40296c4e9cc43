"""The differentiable operations of a sparse autoencoder one by one, on codes that are never [N, F].

Each has a dense twin in `reference`. Gradients are exact for the latents that were chosen; the choice itself has none.
`autoencode` is all of them in one, with one backward pass: what `SAE.loss` runs.

Axes: N tokens, K active latents per token, F dictionary size, D width, M used slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import cpu, selection
from fastsae.capacity import room_of
from fastsae.codes import SparseCode
from fastsae.dispatch import Backend, check_encode, check_indices, check_k, check_threshold, use_triton
from fastsae.errors import DataError
from fastsae.gradients import cast_for_autocast, no_second_gradient, sum_at


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None = None) -> Tensor:
    """(x − centre) · weightᵀ + bias, dense: [N, F], for those who ask for it."""
    return torch.nn.functional.linear(x if centre is None else x - centre, weight, bias)


def encode_topk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None, backend: Backend = "auto",
    check_finite: bool = False,
) -> SparseCode:  # fmt: skip
    """ReLU of the k largest entries of (x − centre) · weightᵀ + bias; of equal ones the lower features: k slots.

    x: [N, D], weight: [F, D], bias: [F], centre: [D]; all of one dtype and on one device; 1 ≤ k ≤ F. `values` carries
    the gradient of x, weight, bias and centre. check_finite: whether to look for NaN and infinity in x, which costs a
    pass and waits for the device; without it a row with NaN has an empty code.

    Raises DataError (a ValueError) for shapes, dtypes, devices and k that do not fit, and where backend="triton" and
    there are no kernels for these tensors.
    """
    check_encode(x, weight, bias, centre, check_finite)
    check_k(k, weight.shape[0])
    return _encode("topk", x, weight, bias, centre, backend, k=k)


def encode_relu(
    x: Tensor, weight: Tensor, bias: Tensor, max_l0: int, centre: Tensor | None = None,
    backend: Backend = "auto", check_finite: bool = False, room: int = 0,
) -> SparseCode | None:  # fmt: skip
    """The positive entries of (x − centre) · weightᵀ + bias; None where a row has more than max_l0 of them.

    Arguments, gradients and errors as for `encode_topk`; no order within a row. room: a number of the caller's own, for
    all its calls (`capacity.new_room`), so that the kernels know how much room such codes take.
    """
    check_encode(x, weight, bias, centre, check_finite)
    return _or_none(_encode("relu", x, weight, bias, centre, backend, most=max_l0, room=room), x)


def encode_jumprelu(
    x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, max_l0: int, centre: Tensor | None = None,
    bandwidth: float = 0.0, backend: Backend = "auto", check_finite: bool = False, room: int = 0,
) -> SparseCode | None:  # fmt: skip
    """Entries of pre = (x − centre) · weightᵀ + bias above their feature's threshold [F] ≥ 0, which keep their value.

    "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders" (2024), eq. 3. Entries within
    bandwidth / 2 below or above the threshold are those that the threshold's gradient comes from (eq. 11); those
    below are in the code too, with value 0. None where a row has more than max_l0 entries.

    Other arguments, gradients and errors as for `encode_relu`.
    """
    check_encode(x, weight, bias, centre, check_finite)
    check_threshold(threshold, bias, bandwidth)
    code = _encode("jumprelu", x, weight, bias, centre, backend, most=max_l0, threshold=threshold, bandwidth=bandwidth,
                   room=room)  # fmt: skip
    return _or_none(code, x)


def encode_batchtopk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None,
    backend: Backend = "auto", check_finite: bool = False, room: int = 0,
) -> SparseCode:  # fmt: skip
    """ReLU of the N · k largest entries of (x − centre) · weightᵀ + bias, however many a row has of them.

    "BatchTopK Sparse Autoencoders" (2024), eq. 3. Of equal entries those of earlier rows, then of lower features.
    Arguments, gradients and errors as for `encode_topk`, room as for `encode_relu`.
    """
    check_encode(x, weight, bias, centre, check_finite)
    check_k(k, weight.shape[0])
    return _encode("batchtopk", x, weight, bias, centre, backend, k=k, room=room)


def decode(code: SparseCode, w_dec: Tensor, backend: Backend = "auto", check: bool = True) -> Tensor:
    """out[n] = Σ_k values[n, k] · w_dec[indices[n, k]], summed in fp32 (float64 in float64): [N, D] in w_dec's dtype.

    w_dec: [F, D]. Reads N·K·D + 2·N·K elements and writes N·D; backward the same again, and the [F, D] gradient.
    check: whether to look at the range of the indices, which waits for the device; not needed for an encoder's code.

    Raises DataError for indices that name no feature or w_dec of another size, and if backend is "triton" and there
    are no kernels for these tensors.
    """
    if not isinstance(code, SparseCode):
        raise DataError(f"expected a SparseCode, got {type(code).__name__}; encode_sparse makes one")
    if w_dec.device != code.device:
        raise DataError(f"expected w_dec on the code's device {code.device}, got {w_dec.device}; move one with .to()")
    if w_dec.ndim != 2 or w_dec.shape[0] != code.d_sae:
        raise DataError(f"expected w_dec [{code.d_sae}, D], a row for each feature, got {tuple(w_dec.shape)}")
    if check:
        check_indices(code)
    (w_dec,) = cast_for_autocast(w_dec)
    return _decode(code.values, code.indices, code.counts, w_dec, backend)


# --- encode, as torch's own operation -------------------------------------------------------------------------------


def _encode(
    rule: str, x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None, backend: Backend,
    k: int = 0, most: int = 0, threshold: Tensor | None = None, bandwidth: float = 0.0, room: int = 0,
) -> SparseCode:  # fmt: skip
    if torch.is_autocast_enabled(x.device.type) and centre is not None:  # before x is rounded, as for nn.Linear
        x, centre = x - centre, None
    x, weight, bias, centre, threshold = cast_for_autocast(x.contiguous(), weight, bias, centre, threshold)
    values, indices, counts = _select(
        x, weight, bias, centre, threshold, rule, k, most, bandwidth, backend, room
    )
    return SparseCode(values, indices, weight.shape[0], counts, (values.shape[0],))


def _or_none(code: SparseCode, x: Tensor) -> SparseCode | None:
    """None for a code that was too dense for slots, which comes as one without rows."""
    return None if code.n_tokens != x.shape[0] else code


@torch.library.custom_op("fastsae::encode", mutates_args=())
def _select(
    x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None, threshold: Tensor | None,
    rule: str, k: int, most: int, bandwidth: float, backend: str, room: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """values, indices [N, K] and counts [N]; of shape [0, 0] and [0] where the code is too dense for slots."""
    with torch.autocast(x.device.type, enabled=False):
        rows = x if centre is None else x - centre
        found = selection.select(rows, weight, bias, threshold, rule, k, most, bandwidth, backend, room_of(room))
        triton = use_triton(backend, weight, product=True, k=k if rule == "topk" else 0)
        return selection.as_tensors(found, x, triton)


@_select.register_fake
def _(x, weight, bias, centre, threshold, rule, k, most, bandwidth, backend, room):
    return selection.fake(x, weight, rule, k, backend)


@torch.library.custom_op("fastsae::encode_backward", mutates_args=())
def _select_backward(
    d_values: Tensor, x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None, threshold: Tensor | None,
    values: Tensor, indices: Tensor, counts: Tensor, want_x: bool, bandwidth: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dL/d of x, weight, bias, centre and threshold; empty where there is no such thing."""
    with torch.autocast(x.device.type, enabled=False):
        F = weight.shape[0]
        order = cpu.by_feature(indices, counts, F)
        d_pre, d_threshold = order.of(d_values), x.new_empty(0)
        if threshold is not None:
            used, theta = order.of(values), threshold[order.feature]
            band = (used == 0) | (used - theta < bandwidth / 2)
            slope = -(d_pre * theta * band) / bandwidth if bandwidth else d_pre * 0
            d_threshold = sum_at(order.feature, slope, F, threshold)
            d_pre = d_pre * (used > 0)
        rows = x if centre is None else x - centre
        d_weight = cpu.weighted_rows(rows, order.token, d_pre, order.offsets)
        d_bias = sum_at(order.feature, d_pre, F, bias)
        d_x = x.new_empty(0)
        if want_x:
            flat = cpu.by_token(indices, counts)
            active = d_values if threshold is None else d_values * (values > 0)
            d_x = cpu.weighted_rows(weight, flat.feature, flat.of(active), flat.offsets)
        # Σ_n d_x[n] = Σ_f (Σ_n d_pre[n, f]) · weight[f]: one product with a vector, not a gather for each row.
        d_centre = x.new_empty(0) if centre is None else -(d_bias @ weight)
        return d_x, d_weight, d_bias, d_centre, d_threshold


@_select_backward.register_fake
def _(d_values, x, weight, bias, centre, threshold, values, indices, counts, want_x, bandwidth):
    none = x.new_empty(0)
    return (torch.empty_like(x) if want_x else none, torch.empty_like(weight), torch.empty_like(bias),
            none if centre is None else torch.empty_like(centre),
            none if threshold is None else torch.empty_like(threshold))  # fmt: skip


def _setup_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, centre, threshold, _, _, _, ctx.bandwidth, _, _ = inputs
    values, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(x, weight, bias, centre, threshold, values, indices, counts)


def _encode_pull_back(ctx: Any, d_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    want = ctx.needs_input_grad
    found = _select_backward(d_values, *ctx.saved_tensors, want[0], ctx.bandwidth)
    return tuple(d if w else None for d, w in zip(found, want[:5], strict=True)) + (None,) * 6


_select.register_autograd(_encode_pull_back, setup_context=_setup_encode)
_select_backward.register_autograd(no_second_gradient, setup_context=lambda ctx, inputs, output: None)


# --- decode, likewise -----------------------------------------------------------------------------------------------


@torch.library.custom_op("fastsae::decode", mutates_args=())
def _decode(values: Tensor, indices: Tensor, counts: Tensor | None, w_dec: Tensor, backend: str) -> Tensor:
    with torch.autocast(w_dec.device.type, enabled=False):
        if use_triton(backend, w_dec):
            from fastsae.kernels import decode as kernel

            return kernel.decode(indices, values, w_dec, counts)
        flat = cpu.by_token(indices, counts)
        return cpu.weighted_rows(w_dec, flat.feature, flat.of(values), flat.offsets)


@_decode.register_fake
def _(values, indices, counts, w_dec, backend):
    return w_dec.new_empty(values.shape[0], w_dec.shape[1])


@torch.library.custom_op("fastsae::decode_backward", mutates_args=())
def _decode_backward(
    d_out: Tensor, values: Tensor, indices: Tensor, counts: Tensor | None, w_dec: Tensor,
    want_values: bool, want_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dL/d of values [N, K] and w_dec [F, D]; empty where not wanted."""
    with torch.autocast(w_dec.device.type, enabled=False):
        d_out = d_out.contiguous()
        d_values, d_w = values.new_zeros(values.numel() if want_values else 0), w_dec.new_empty(0)
        order = cpu.by_feature(indices, counts, w_dec.shape[0])
        if want_values:
            dots = cpu.paired_dots(w_dec, order.feature, d_out, order.token)
            d_values = d_values.index_put_((order.slot,), dots.to(values.dtype)).view_as(values)
        if want_w:
            d_w = cpu.weighted_rows(d_out, order.token, order.of(values), order.offsets)
        return d_values, d_w


@_decode_backward.register_fake
def _(d_out, values, indices, counts, w_dec, want_values, want_w):
    return (torch.empty_like(values) if want_values else values.new_empty(0),
            torch.empty_like(w_dec) if want_w else w_dec.new_empty(0))  # fmt: skip


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, counts, w_dec, _ = inputs
    ctx.save_for_backward(values, indices, counts, w_dec)


def _decode_pull_back(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    want_values, want_w = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    d_values, d_w = _decode_backward(d_out, *ctx.saved_tensors, want_values, want_w)
    return d_values if want_values else None, None, None, d_w if want_w else None, None


_decode.register_autograd(_decode_pull_back, setup_context=_setup_decode)
_decode_backward.register_autograd(no_second_gradient, setup_context=lambda ctx, inputs, output: None)
