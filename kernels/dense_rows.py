"""Dense_rows: rows of a variable code that need more slots than there are, exactly and without them.

How many rows those are only the device knows, and mostly there are none: the kernels are launched all the same, read
the number, and end. Where there are some, f = z · 1[z > θ] (JumpReLU; θ = 0 for ReLU), or z where it is positive and no
later than the cut of `batch_cut` (BatchTopK), is made in tiles of rows and features, used, and forgotten;
programs that need the same tile for another slice of the width make it again. Slow for many rows, so a code that goes
on needing more slots gets them (`capacity`), or the dense path of `fastsae.dense`.

No atomics but for the integers of `fired`: the same bits always.

N tokens, F dictionary size, D model width, J rows of the list.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.gradients import Pull, WeightGradients
from fastsae.kernels.encode import input_precision, product
from fastsae.kernels.select import is_chosen

BLOCK_N, BLOCK_F, BLOCK_D, SLICE = 16, 32, 32, 64
NUM_STAGES = 1
# Left to itself the assembler takes fewer registers, for more programs at a time, and spills a few bytes for it.
REGISTERS = 255
MOST_PROGRAMS = 1024  # each takes every MOST_PROGRAMSth tile


@triton.jit
def tile_of_code(
    x_ptr, w_ptr, bias_ptr, theta_ptr, cut_ptr, rows, features, valid,  # valid [BLOCK_N, BLOCK_F]
    F, stride_xn, stride_wf, HAS_THETA: tl.constexpr, HAS_CUT: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """z where it is valid and no later than the cut, else −∞; and θ, 0 where there is none."""
    z = product(x_ptr, w_ptr, rows, features, stride_xn, stride_wf, D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
    z += tl.load(bias_ptr + features).to(tl.float32)[None, :]
    theta = tl.zeros([BLOCK_F], dtype=tl.float32)
    if HAS_THETA:
        theta = tl.load(theta_ptr + features).to(tl.float32)
    if HAS_CUT:
        valid = valid & is_chosen(z, rows.to(tl.int64)[:, None] * F + features[None, :], cut_ptr)
    return tl.where(valid, z, float("-inf")), theta


@triton.jit
def forward_kernel(
    list_ptr, n_list_ptr, x_ptr, w_ptr, bias_ptr, theta_ptr, cut_ptr, w_dec_ptr, b_dec_ptr, target_ptr, norms_ptr,
    out_ptr, residual_ptr, l1_ptr, l0_ptr, fired_ptr,  # [N, D], [N, D], [N], [N], [F]: written for the rows of the list
    F, tiles, stride_xn, stride_wf, stride_vf, stride_tn,
    HAS_THETA: tl.constexpr, HAS_CUT: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_TARGET: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):
    SLICES: tl.constexpr = (D + SLICE - 1) // SLICE
    n_list = tl.load(n_list_ptr)
    tile = tl.program_id(0)
    while (tile < tiles) & ((tile // SLICES) * BLOCK_N < n_list):
        at = (tile // SLICES) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = tl.load(list_ptr + tl.where(at < n_list, at, 0))
        d = (tile % SLICES) * SLICE + tl.arange(0, SLICE)
        first = tile % SLICES == 0
        acc = tl.zeros([BLOCK_N, SLICE], dtype=tl.float32)
        l1 = tl.zeros([BLOCK_N], dtype=tl.float32)
        l0 = tl.zeros([BLOCK_N], dtype=tl.float32)
        start = 0
        while start < F:
            f = start + tl.arange(0, BLOCK_F)
            features = tl.where(f < F, f, 0)
            z, theta = tile_of_code(x_ptr, w_ptr, bias_ptr, theta_ptr, cut_ptr, rows, features,
                                    (at < n_list)[:, None] & (f < F)[None, :], F, stride_xn, stride_wf,
                                    HAS_THETA, HAS_CUT, D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
            active = z > theta[None, :]
            value = tl.where(active, z, 0.0)
            w_at = w_dec_ptr + features.to(tl.int64)[:, None] * stride_vf + d[None, :]
            w = tl.load(w_at, mask=d[None, :] < D, other=0.0)
            acc = tl.dot(value, w.to(tl.float32), acc, input_precision=PRECISION)
            weight = value
            if HAS_NORMS:
                weight = value * tl.load(norms_ptr + features).to(tl.float32)[None, :]
            l1 += tl.sum(weight, axis=1)
            l0 += tl.sum(active.to(tl.float32), axis=1)
            tl.atomic_add(fired_ptr + features, tl.sum(active.to(tl.int32), axis=0), mask=f < tl.where(first, F, 0))
            start += BLOCK_F
        inside = (at < n_list)[:, None] & (d < D)[None, :]
        acc += tl.load(b_dec_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        where = rows.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=inside)
        if HAS_TARGET:
            target = tl.load(target_ptr + rows.to(tl.int64)[:, None] * stride_tn + d[None, :], mask=inside, other=0.0)
            acc -= target.to(tl.float32)
            tl.store(residual_ptr + where, acc.to(residual_ptr.dtype.element_ty), mask=inside)
        tl.store(l1_ptr + rows, l1, mask=at < tl.where(first, n_list, 0))
        tl.store(l0_ptr + rows, l0, mask=at < tl.where(first, n_list, 0))
        tile += tl.num_programs(0)


@triton.jit
def pull_at(
    z, theta, rows, features, row_valid, g_ptr, w_dec_ptr, l1_ptr, l0_ptr, norms_ptr, stride_gn, stride_vf, bandwidth,
    HAS_L1: tl.constexpr, HAS_L0: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_THETA: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dL/dz and, by entry, dL/dθ [BLOCK_N, BLOCK_F]; and dL/d l1 [BLOCK_N]."""
    d_value = product(g_ptr, w_dec_ptr, rows, features, stride_gn, stride_vf, D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
    l1 = tl.zeros([BLOCK_N], dtype=tl.float32)
    if HAS_L1:
        l1 = tl.load(l1_ptr + rows, mask=row_valid, other=0.0).to(tl.float32)
        if HAS_NORMS:
            d_value += l1[:, None] * tl.load(norms_ptr + features).to(tl.float32)[None, :]
        else:
            d_value += l1[:, None]
    d_theta = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
    if HAS_THETA:
        d_theta = d_value * theta[None, :]
        if HAS_L0:
            d_theta += tl.load(l0_ptr + rows, mask=row_valid, other=0.0).to(tl.float32)[:, None]
        d_theta = tl.where(tl.abs(z - theta[None, :]) < bandwidth / 2, -d_theta / bandwidth, 0.0)
    return tl.where(z > theta[None, :], d_value, 0.0), d_theta, l1


@triton.jit
def weights_kernel(
    list_ptr, n_list_ptr, x_ptr, g_ptr, w_ptr, bias_ptr, theta_ptr, cut_ptr, w_dec_ptr, norms_ptr, l1_ptr, l0_ptr,
    d_w_dec_ptr, d_w_ptr, d_bias_ptr, d_theta_ptr,  # [F, D], [F, D], [F], [F]: added to
    F, tiles, bandwidth, stride_xn, stride_gn, stride_wf, stride_vf,
    HAS_L1: tl.constexpr, HAS_L0: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_THETA: tl.constexpr, HAS_CUT: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):
    SLICES: tl.constexpr = (D + SLICE - 1) // SLICE
    n_list = tl.load(n_list_ptr)
    tile = tl.program_id(0)
    while (tile < tiles) & (n_list > 0):
        f = (tile // SLICES) * BLOCK_F + tl.arange(0, BLOCK_F)
        features = tl.where(f < F, f, 0)
        d = (tile % SLICES) * SLICE + tl.arange(0, SLICE)
        first = tile % SLICES == 0
        acc_dec = tl.zeros([BLOCK_F, SLICE], dtype=tl.float32)
        acc_enc = tl.zeros([BLOCK_F, SLICE], dtype=tl.float32)
        sum_bias = tl.zeros([BLOCK_F], dtype=tl.float32)
        sum_theta = tl.zeros([BLOCK_F], dtype=tl.float32)
        sum_l1 = tl.zeros([BLOCK_F], dtype=tl.float32)
        start = 0
        while start < n_list:
            at = start + tl.arange(0, BLOCK_N)
            rows = tl.load(list_ptr + tl.where(at < n_list, at, 0))
            z, theta = tile_of_code(x_ptr, w_ptr, bias_ptr, theta_ptr, cut_ptr, rows, features,
                                    (at < n_list)[:, None] & (f < F)[None, :], F, stride_xn, stride_wf,
                                    HAS_THETA, HAS_CUT, D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
            d_pre, d_theta, l1 = pull_at(z, theta, rows, features, at < n_list, g_ptr, w_dec_ptr, l1_ptr, l0_ptr,
                                         norms_ptr, stride_gn, stride_vf, bandwidth, HAS_L1, HAS_L0, HAS_NORMS,
                                         HAS_THETA, D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
            value = tl.where(z > theta[None, :], z, 0.0)
            inside = (at < n_list)[:, None] & (d < D)[None, :]
            at_row = rows.to(tl.int64)[:, None]
            g = tl.load(g_ptr + at_row * stride_gn + d[None, :], mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at_row * stride_xn + d[None, :], mask=inside, other=0.0).to(tl.float32)
            acc_dec = tl.dot(value.T, g, acc_dec, input_precision=PRECISION)
            acc_enc = tl.dot(d_pre.T, x, acc_enc, input_precision=PRECISION)
            sum_bias += tl.sum(d_pre, axis=0)
            sum_theta += tl.sum(d_theta, axis=0)
            sum_l1 += tl.sum(value * l1[:, None], axis=0)
            start += BLOCK_N
        where = features.to(tl.int64)[:, None] * D + d[None, :]
        mask = (f < F)[:, None] & (d < D)[None, :]
        if HAS_NORMS:
            norm = tl.load(norms_ptr + features).to(tl.float32)
            w = tl.load(w_dec_ptr + features.to(tl.int64)[:, None] * stride_vf + d[None, :], mask=mask, other=0.0)
            acc_dec += tl.where(norm > 0, sum_l1 / norm, 0.0)[:, None] * w.to(tl.float32)
        acc_dec += tl.load(d_w_dec_ptr + where, mask=mask, other=0.0).to(tl.float32)
        acc_enc += tl.load(d_w_ptr + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_w_dec_ptr + where, acc_dec.to(d_w_dec_ptr.dtype.element_ty), mask=mask)
        tl.store(d_w_ptr + where, acc_enc.to(d_w_ptr.dtype.element_ty), mask=mask)
        one = f < tl.where(first, F, 0)  # not `& first`, which Triton 3.9's interpreter makes bytes of
        sum_bias += tl.load(d_bias_ptr + features, mask=one, other=0.0).to(tl.float32)
        tl.store(d_bias_ptr + features, sum_bias.to(d_bias_ptr.dtype.element_ty), mask=one)
        if HAS_THETA:
            sum_theta += tl.load(d_theta_ptr + features, mask=one, other=0.0).to(tl.float32)
            tl.store(d_theta_ptr + features, sum_theta.to(d_theta_ptr.dtype.element_ty), mask=one)
        tile += tl.num_programs(0)


@triton.jit
def inputs_kernel(
    list_ptr, n_list_ptr, x_ptr, g_ptr, w_ptr, bias_ptr, theta_ptr, cut_ptr, w_dec_ptr, norms_ptr, l1_ptr, l0_ptr,
    d_x_ptr,  # [N, D]: written for the rows of the list
    F, tiles, bandwidth, stride_xn, stride_gn, stride_wf, stride_vf,
    HAS_L1: tl.constexpr, HAS_L0: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_THETA: tl.constexpr, HAS_CUT: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):
    SLICES: tl.constexpr = (D + SLICE - 1) // SLICE
    n_list = tl.load(n_list_ptr)
    tile = tl.program_id(0)
    while (tile < tiles) & ((tile // SLICES) * BLOCK_N < n_list):
        at = (tile // SLICES) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = tl.load(list_ptr + tl.where(at < n_list, at, 0))
        d = (tile % SLICES) * SLICE + tl.arange(0, SLICE)
        acc = tl.zeros([BLOCK_N, SLICE], dtype=tl.float32)
        start = 0
        while start < F:
            f = start + tl.arange(0, BLOCK_F)
            features = tl.where(f < F, f, 0)
            z, theta = tile_of_code(x_ptr, w_ptr, bias_ptr, theta_ptr, cut_ptr, rows, features,
                                    (at < n_list)[:, None] & (f < F)[None, :], F, stride_xn, stride_wf,
                                    HAS_THETA, HAS_CUT, D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
            d_pre, _, _ = pull_at(z, theta, rows, features, at < n_list, g_ptr, w_dec_ptr, l1_ptr, l0_ptr,
                                  norms_ptr, stride_gn, stride_vf, bandwidth, HAS_L1, HAS_L0, HAS_NORMS,
                                  HAS_THETA, D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
            w_at = w_ptr + features.to(tl.int64)[:, None] * stride_wf + d[None, :]
            w = tl.load(w_at, mask=d[None, :] < D, other=0.0)
            acc = tl.dot(d_pre, w.to(tl.float32), acc, input_precision=PRECISION)
            start += BLOCK_F
        inside = (at < n_list)[:, None] & (d < D)[None, :]
        where = rows.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(d_x_ptr + where, acc.to(d_x_ptr.dtype.element_ty), mask=inside)
        tile += tl.num_programs(0)


def warps(precision: str, half: bool) -> int:
    """What compiles without a stack for that kind of product."""
    return 4 if precision == "tf32" and not half else 8


class Listed(NamedTuple):
    """rows [N] int32, those that need this path first; number [1] int32 of them, on the device."""

    rows: Tensor
    number: Tensor


def listed(is_open: Tensor) -> Listed:
    """The rows of is_open [N] bool. Does not wait for the device."""
    rows = (~is_open).to(torch.int8).argsort(stable=True).to(torch.int32)
    return Listed(rows, is_open.sum(dtype=torch.int32)[None])


def options(x: Tensor, n_tiles: int) -> tuple[tuple[int], dict[str, object]]:
    """Grid and constants of a launch, here and in `batch_cut`, whose z has to have the same bits."""
    precision = input_precision(x.dtype)
    return (min(n_tiles, MOST_PROGRAMS),), {
        "D": x.shape[1], "PRECISION": precision, "BLOCK_N": BLOCK_N, "BLOCK_F": BLOCK_F, "BLOCK_D": BLOCK_D,
        "SLICE": SLICE, "num_warps": warps(precision, x.element_size() == 2), "num_stages": NUM_STAGES,
        "maxnreg": REGISTERS,
    }  # fmt: skip


def forward(
    these: Listed, x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, cut: Tensor | None,
    w_dec: Tensor, b_dec: Tensor, target: Tensor | None, norms: Tensor | None,
    out: Tensor, residual: Tensor, l1: Tensor, l0: Tensor, fired: Tensor,
) -> None:  # fmt: skip
    """Writes the rows of the list in out and, with a target, residual [N, D], l1 and l0 [N] fp32; adds to fired [F].

    x = rows − centre [N, D]; all with contiguous rows, as for `encode`. Reads 2·F·D elements for 16 rows of the list
    and 64 columns, mostly from L2.
    """
    (N, D), F = x.shape, weight.shape[0]
    tiles = triton.cdiv(N, BLOCK_N) * triton.cdiv(D, SLICE)
    grid, how = options(x, tiles)
    none = these.rows
    with torch.cuda.device_of(x):
        forward_kernel[grid](
            *these, x, weight, bias, none if threshold is None else threshold, none if cut is None else cut,
            w_dec, b_dec.contiguous(), none if target is None else target, none if norms is None else norms,
            out, residual, l1, l0, fired,
            F, tiles, x.stride(0), weight.stride(0), w_dec.stride(0), 0 if target is None else target.stride(0),
            HAS_THETA=threshold is not None, HAS_CUT=cut is not None, HAS_NORMS=norms is not None,
            HAS_TARGET=target is not None, **how,
        )


def backward(
    these: Listed, x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, cut: Tensor | None,
    bandwidth: float, w_dec: Tensor, norms: Tensor | None, pull: Pull, made: WeightGradients, d_x: Tensor | None,
) -> None:  # fmt: skip
    """Adds what the rows of the list give to the gradients in made, and writes their rows of d_x [N, D]."""
    (N, D), F = x.shape, weight.shape[0]
    none = these.rows
    g = pull.out.contiguous()
    l1, l0, norm, theta = (none if t is None else t.contiguous() for t in (pull.l1, pull.l0, norms, threshold))
    given = (*these, x, g, weight, bias, theta, none if cut is None else cut, w_dec, norm, l1, l0)
    strides = x.stride(0), g.stride(0), weight.stride(0), w_dec.stride(0)
    has = {"HAS_L1": pull.l1 is not None, "HAS_L0": pull.l0 is not None, "HAS_THETA": threshold is not None,
           "HAS_CUT": cut is not None, "HAS_NORMS": norms is not None and pull.l1 is not None}  # fmt: skip
    width = float(bandwidth) or 1e-30  # without a band nothing is inside
    tiles = triton.cdiv(F, BLOCK_F) * triton.cdiv(D, SLICE)
    grid, how = options(x, tiles)
    d_theta = none if made.threshold is None else made.threshold
    with torch.cuda.device_of(x):
        weights_kernel[grid](
            *given, made.w_dec, made.weight, made.bias, d_theta, F, tiles, width, *strides, **has, **how
        )
        if d_x is not None:
            tiles = triton.cdiv(N, BLOCK_N) * triton.cdiv(D, SLICE)
            grid, how = options(x, tiles)
            inputs_kernel[grid](*given, d_x, F, tiles, width, *strides, **has, **how)
