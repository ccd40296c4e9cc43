"""The whole autoencoder as one differentiable operation: select, decode, errors and penalties; and one backward pass.

An operation of torch's own registry (`torch.library`), so that torch.compile takes it as it is and traces nothing
inside. Its truth is `reference`; its second gradient does not exist.

    x̂ = f · w_dec + b_dec     f = ReLU(select((x − centre) · weightᵀ + bias)), centre = b_dec or 0
    error[n] = Σ_d (x̂ − target)²     l1[n] = Σ_f f or Σ_f f · ‖w_dec[f]‖     l0[n] = number of f > 0
    aux[n] = Σ_d (ê − e)², what dead latents leave of e = target − x̂ (`fastsae.auxk`)

Gradients: the choice of latents has none, except JumpReLU's threshold θ, by the straight-through estimators of "Jumping
Ahead" (2024), eq. 11 and 12, with a rectangle of width `bandwidth` around θ: ∂f/∂θ = −θ/bandwidth and ∂l0/∂θ =
−1/bandwidth where |pre − θ| < bandwidth / 2. pre is the pre-activation itself, not its ReLU, so a latent far below 0
does not pull at a small threshold.

Axes: N tokens, D width, F dictionary size, K slots per token, S dead latents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae import auxk, cpu, dense, gradients, selection
from fastsae.capacity import room_of
from fastsae.codes import SparseCode
from fastsae.dispatch import check_encode, check_k, check_threshold, use_triton
from fastsae.errors import DataError
from fastsae.gradients import Pull, cast_for_autocast, no_second_gradient, widened

RULES = ("relu", "topk", "jumprelu", "batchtopk")


class Autoencoded(NamedTuple):
    """x_hat [N, D] in x's dtype. error, l1, l0, aux [N] in fp32 or more; error is empty without a target, aux without
    dead latents. values, indices [N, K] and counts [N] (slots in use), or shape [0, 0] where the code was too dense for
    slots. fired [F] int32: the rows in which a latent was active. x_hat, error, l1, aux and values have gradients,
    and l0 has one with a threshold. is_open [N] bool: rows that needed more slots than the kernels had, which are
    not in the code and in all else; cut [2] int64: of batchtopk then, the bits of the least chosen value and its
    position (`kernels.batch_cut`); residual [N, D]: x̂ − target; norms [F] of w_dec's rows where l1 is weighted with
    them. These four are empty where there is no such thing."""

    x_hat: Tensor
    error: Tensor
    l1: Tensor
    l0: Tensor
    aux: Tensor
    values: Tensor
    indices: Tensor
    counts: Tensor
    fired: Tensor
    is_open: Tensor
    cut: Tensor
    residual: Tensor
    norms: Tensor

    def code(self, d_sae: int) -> SparseCode | None:
        """The code; None where it was too dense for slots. Waits for the device if rows may be missing from it."""
        if self.values.shape[0] != self.x_hat.shape[0] or (self.is_open.numel() and bool(self.is_open.any())):
            return None
        return SparseCode(self.values, self.indices, d_sae, self.counts)


def autoencode(
    x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, b_dec: Tensor, *,
    rule: str, target: Tensor | None = None, centred: bool = True, k: int = 1, most: int | None = None,
    threshold: Tensor | None = None, bandwidth: float = 0.0, weighted: bool = False,
    dead: Tensor | None = None, is_dead: Tensor | None = None, k_aux: int = 0, backend: str = "auto", room: int = 0,
) -> Autoencoded:  # fmt: skip
    """x, target: [N, D]; weight, w_dec: [F, D]; bias, threshold: [F]; b_dec: [D]; of one dtype and on one device.

    rule: relu, topk, jumprelu or batchtopk; k: of topk and batchtopk. most: entries of a row beyond which
    relu and jumprelu take the dense path, F by default. dead: [S] latents for aux, those of them that is_dead [F]
    names. room: a number of the caller's own (`capacity.new_room`).

    Raises DataError (a ValueError) for an unknown rule, and for shapes, dtypes, devices and k that do not fit.
    """
    if rule not in RULES:
        raise DataError(f"expected a rule of {', '.join(RULES)}, got {rule!r}")
    check_encode(x, weight, bias, b_dec, False)
    if w_dec.shape != weight.shape or (target is not None and target.shape != x.shape):
        got = tuple(w_dec.shape), None if target is None else tuple(target.shape)
        raise DataError(f"expected w_dec {tuple(weight.shape)} and target {tuple(x.shape)}, got {got[0]} and {got[1]}")
    if rule in ("topk", "batchtopk"):
        check_k(k, weight.shape[0])
    if rule == "jumprelu":
        if threshold is None:
            raise DataError(f"jumprelu needs a threshold [{weight.shape[0]}], got None; relu has none")
        check_threshold(threshold, bias, bandwidth)
    most = weight.shape[0] if most is None else most
    x, target, weight, bias, w_dec, b_dec, threshold = cast_for_autocast(
        x, target, weight, bias, w_dec, b_dec, threshold
    )
    out = _autoencode(
        x, target, weight, bias, w_dec, b_dec, threshold, dead, is_dead,
        rule, k, most, bandwidth, centred, weighted, k_aux, backend, room,
    )  # fmt: skip
    return Autoencoded(*out)


# --- forward --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastsae::autoencode", mutates_args=())
def _autoencode(
    x: Tensor, target: Tensor | None, weight: Tensor, bias: Tensor, w_dec: Tensor, b_dec: Tensor,
    threshold: Tensor | None, dead: Tensor | None, is_dead: Tensor | None,
    rule: str, k: int, most: int, bandwidth: float, centred: bool, weighted: bool, k_aux: int, backend: str, room: int,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """The fields of Autoencoded."""
    with torch.autocast(x.device.type, enabled=False):
        rows = x - b_dec if centred else x
        N, F = x.shape[0], weight.shape[0]
        capacity = room_of(room)
        may_leave_open = room != 0  # without a room of its own a caller has no memory of what there is to leave
        selected = selection.select(
            rows, weight, bias, threshold, rule, k, most, bandwidth, backend, capacity, may_leave_open
        )
        values, indices, counts = selection.as_tensors(selected, x)
        is_open = torch.zeros(0, dtype=torch.bool, device=x.device)
        cut = torch.zeros(0, dtype=torch.int64, device=x.device)
        norms = w_dec.norm(dim=1) if weighted else None
        if selected is None:
            made = dense.forward(rows, weight, bias, w_dec, threshold, norms)
            total, l1, l0, fired = made
            x_hat = (total + b_dec).to(x.dtype)
            residual, error = _compare(x_hat, target)
            if room and use_triton(backend, weight) and N:
                capacity.send(l0.max(), None)
        else:
            x_hat, residual, error = _decode(selected, w_dec, b_dec, target, backend)
            active = values > 0
            l0 = widened(x.new_empty(0)).new_zeros(N) + active.sum(-1)
            l1 = widened(values if norms is None else values * norms[indices.long()]).sum(-1)
            fired = _fired(indices, active, F)
            if selected.is_open is not None:
                from fastsae.kernels import dense_rows

                is_open = selected.is_open
                cut = cut if selected.cut is None else selected.cut
                dense_rows.forward(
                    dense_rows.listed(is_open), rows, weight, bias, threshold, selected.cut, w_dec, b_dec, target,
                    norms, x_hat, residual, l1, l0, fired,
                )  # fmt: skip
                if target is not None:
                    error = torch.where(is_open, widened(residual).square().sum(-1), error)
        aux = l1.new_empty(0)
        if dead is not None and is_dead is not None:
            aux = auxk.errors(rows, -residual, auxk.take(dead, is_dead, weight, bias, w_dec), k_aux)
        norms = w_dec.new_empty(0) if norms is None else norms
        return x_hat, error, l1, l0, aux, values, indices, counts, fired, is_open, cut, residual, norms


def _decode(
    selected: selection.Selected, w_dec: Tensor, b_dec: Tensor, target: Tensor | None, backend: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂, x̂ − target and its squared error."""
    values, indices, counts = selected[:3]
    if use_triton(backend, w_dec):
        from fastsae.kernels import decode as kernel

        if target is not None:
            return kernel.decode_error(indices, values, w_dec, b_dec, target, counts)
        x_hat = kernel.decode(indices, values, w_dec, counts) + b_dec
    else:
        flat = cpu.by_token(indices, counts)
        x_hat = cpu.weighted_rows(w_dec, flat.feature, flat.of(values), flat.offsets) + b_dec
    return x_hat, *_compare(x_hat, target)


def _compare(x_hat: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_hat.dtype, torch.float32)
    if target is None:
        return x_hat.new_empty(0), x_hat.new_empty(0, dtype=wide)
    residual = x_hat - target
    return residual, widened(residual).square().sum(-1)


def _fired(indices: Tensor, active: Tensor, F: int) -> Tensor:
    """[F] int32; integers, so that the order of the sum does not matter."""
    if indices.device.type == "cpu":
        return torch.bincount(indices[active], minlength=F).int()
    fired = torch.zeros(F, dtype=torch.int32, device=indices.device)
    return fired.scatter_add_(0, indices.reshape(-1).long(), active.reshape(-1).int())


@_autoencode.register_fake
def _(x, target, weight, bias, w_dec, b_dec, threshold, dead, is_dead,
      rule, k, most, bandwidth, centred, weighted, k_aux, backend, room):  # fmt: skip
    N, F = x.shape[0], weight.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    values, indices, counts = selection.fake(x, weight, rule, k, backend)
    no_target, open_rows, cut = target is None, 0, 0
    if rule != "topk" and room and use_triton(backend, weight, product=True):
        open_rows, cut = (N, 2) if rule == "batchtopk" else (torch.library.get_ctx().new_dynamic_size(), 0)
    return (
        torch.empty_like(x), x.new_empty(0 if no_target else N, dtype=wide), x.new_empty(N, dtype=wide),
        x.new_empty(N, dtype=wide), x.new_empty(0 if dead is None else N, dtype=wide),
        values, indices, counts, x.new_empty(F, dtype=torch.int32), x.new_empty(open_rows, dtype=torch.bool),
        x.new_empty(cut, dtype=torch.int64), x.new_empty(0) if no_target else torch.empty_like(x),
        w_dec.new_empty(F if weighted else 0),
    )  # fmt: skip


# --- backward -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastsae::autoencode_backward", mutates_args=())
def _backward(
    d_x_hat: Tensor | None, d_error: Tensor | None, d_l1: Tensor | None, d_l0: Tensor | None, d_aux: Tensor | None,
    d_values: Tensor | None,
    x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, b_dec: Tensor, threshold: Tensor | None,
    dead: Tensor | None, is_dead: Tensor | None,
    values: Tensor, indices: Tensor, counts: Tensor, is_open: Tensor, cut: Tensor, residual: Tensor,
    norms: Tensor, want_x: bool, bandwidth: float, centred: bool, k_aux: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dL/d of x, target, weight, bias, w_dec, b_dec, threshold; empty where there is no such thing."""
    with torch.autocast(x.device.type, enabled=False):
        rows = x - b_dec if centred else x
        of_error = None if d_error is None else (2 * d_error)[:, None].to(residual.dtype) * residual
        d_out = of_error if d_x_hat is None else (d_x_hat if of_error is None else d_x_hat + of_error)
        d_out = torch.zeros_like(x) if d_out is None else d_out.contiguous()
        pull = Pull(d_out, d_l1, d_l0 if threshold is not None else None, d_values)
        of_norms = norms if norms.numel() else None
        if values.shape[0] == x.shape[0]:
            made, d_rows = gradients.of_code(
                rows, values, indices, counts, weight, bias, w_dec, threshold, bandwidth, of_norms, pull, want_x,
                use_triton(backend, weight),
            )
            if is_open.numel():
                from fastsae.kernels import dense_rows

                dense_rows.backward(
                    dense_rows.listed(is_open), rows, weight, bias, threshold, cut if cut.numel() else None, bandwidth,
                    w_dec, of_norms, pull, made, d_rows,
                )  # fmt: skip
        else:
            made, d_rows = dense.backward(
                rows, weight, bias, w_dec, threshold, bandwidth, of_norms, pull, want_x
            )
        if dead is not None and is_dead is not None and d_aux is not None:
            given = auxk.take(dead, is_dead, weight, bias, w_dec)
            of_dead = auxk.gradients(rows, -residual, given, k_aux, d_aux, want_x)
            for whole, part in ((made.weight, of_dead.weight), (made.bias, of_dead.bias), (made.w_dec, of_dead.w_dec)):
                whole.index_add_(0, dead, part.to(whole.dtype))
            if d_rows is not None and of_dead.rows is not None:
                d_rows = d_rows + of_dead.rows
        d_b_dec = d_out.sum(0)
        if centred:
            # Σ_n d_rows[n] = Σ_f (Σ_n d_pre[n, f]) · weight[f]: one product with a vector, not a gather for each row.
            d_b_dec = d_b_dec - made.bias @ weight
        return (
            x.new_empty(0) if d_rows is None else d_rows.to(x.dtype), x.new_empty(0) if of_error is None else -of_error,
            made.weight, made.bias, made.w_dec, d_b_dec, x.new_empty(0) if made.threshold is None else made.threshold,
        )  # fmt: skip


@_backward.register_fake
def _(d_x_hat, d_error, d_l1, d_l0, d_aux, d_values, x, weight, bias, w_dec, b_dec, threshold, dead, is_dead,
      values, indices, counts, is_open, cut, residual, norms, want_x, bandwidth, centred, k_aux, backend):  # fmt: skip
    none = x.new_empty(0)
    return (
        torch.empty_like(x) if want_x else none, none if d_error is None else torch.empty_like(x),
        torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(w_dec), torch.empty_like(b_dec),
        none if threshold is None else torch.empty_like(threshold),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, target, weight, bias, w_dec, b_dec, threshold, dead, is_dead, *options = inputs
    _, _, _, bandwidth, centred, _, k_aux, backend, _ = options
    _, _, _, l0, _, values, indices, counts, fired, is_open, cut, residual, norms = output
    ctx.set_materialize_grads(False)
    fixed = indices, counts, fired, is_open, cut, residual, norms
    ctx.mark_non_differentiable(*fixed, *([l0] if threshold is None else []))
    ctx.save_for_backward(
        x, weight, bias, w_dec, b_dec, threshold, dead, is_dead, values, indices, counts, is_open, cut, residual,
        norms,
    )  # fmt: skip
    ctx.options = bandwidth, centred, k_aux, backend


def _pull_back(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    d_x_hat, d_error, d_l1, d_l0, d_aux, d_values, *_ = grads
    want = ctx.needs_input_grad
    bandwidth, centred, k_aux, backend = ctx.options
    found = _backward(d_x_hat, d_error, d_l1, d_l0, d_aux, d_values, *ctx.saved_tensors,
                      want[0], bandwidth, centred, k_aux, backend)  # fmt: skip
    d_x, d_target, d_weight, d_bias, d_w, d_b_dec, d_threshold = found
    of_target = d_target if want[1] and d_error is not None else None
    of_threshold = d_threshold if want[6] else None
    return (d_x if want[0] else None, of_target, d_weight, d_bias, d_w, d_b_dec, of_threshold) + (None,) * 11


_autoencode.register_autograd(_pull_back, setup_context=_setup)
_backward.register_autograd(no_second_gradient, setup_context=lambda ctx, inputs, output: None)
