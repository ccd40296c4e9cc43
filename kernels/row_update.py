"""Row_update: one step of Adam for the rows of a feature, whose gradients stand in the registers of `weight_grad`.

A program sums value · g and dL/dpre · x over its feature's tokens, as in `weight_grad`, which has made dL/dpre before,
and goes on to the update at once. So the [F, D] gradients are never written: of a row, weight and moments are read and
written once. The formulas are those of `fastsae.row_adam`, the formats those of `fastsae.moments`. With UPDATE
off it makes the squared norms of each feature's gradients and no more, for a limit on the norm of all of them.

Random rounding takes its bits from a hash of seed, feature and place (the finaliser of MurmurHash3, a dozen operations,
where Philox takes a hundred): the same for the same step, whatever program comes first.

F dictionary size, D model width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels import weight_grad
from fastsae.kernels.weight_grad import TOGETHER, WIDEST, Pieces

QUANTISED = tl.constexpr(256)  # neighbours that share a scale


@triton.jit
def noise(seed, f, which: tl.constexpr, d):
    """32 random bits for every place d [BLOCK_D] of a row: uint32."""
    key = (f.to(tl.uint32) * 0x9E3779B1) ^ (seed.to(tl.uint32) + ((which * 0x7F4A7C15) & 0xFFFFFFFF))
    h = (d.to(tl.uint32) * 0x85EBCA6B) ^ key
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def to_bfloat16(value, bits):
    """fp32 rounded to one of its neighbours in bfloat16, by the low 16 of random bits; still fp32."""
    rounded = value.to(tl.int32, bitcast=True) + (bits & 0xFFFF).to(tl.int32)
    return (rounded & -65536).to(tl.float32, bitcast=True)


@triton.jit
def share_of(c, SIGNED: tl.constexpr):
    share = c * ((1.0 / 127.0) if SIGNED else (1.0 / 255.0))
    share = share * share
    if not SIGNED:
        share = share * share
    return share


@triton.jit
def read_moment(ptr, scales_ptr, f, d, D, STATE: tl.constexpr, SIGNED: tl.constexpr):
    """A row of a moment [BLOCK_D] in fp32."""
    value = tl.load(ptr + f * D + d, mask=d < D, other=0).to(tl.float32)
    if STATE == "8bit":
        blocks = (D + QUANTISED - 1) // QUANTISED
        scale = tl.load(scales_ptr + f * blocks + d // QUANTISED, mask=d < D, other=0.0)
        if SIGNED:
            value = tl.where(value < 0, -1.0, 1.0) * share_of(tl.abs(value), SIGNED) * scale
        else:
            value = share_of(value, SIGNED) * scale
    return value


@triton.jit
def write_moment(ptr, scales_ptr, value, bits, f, d, D, STATE: tl.constexpr, SIGNED: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    at = ptr + f * D + d
    if STATE == "8bit":
        WIDTH: tl.constexpr = min(BLOCK_D, QUANTISED)
        GROUPS: tl.constexpr = BLOCK_D // WIDTH
        magnitude = tl.where(d < D, tl.abs(value), 0.0)
        scale = tl.max(tl.reshape(magnitude, [GROUPS, WIDTH]), axis=1)  # [GROUPS]
        group = tl.arange(0, GROUPS)
        blocks = (D + QUANTISED - 1) // QUANTISED
        tl.store(scales_ptr + f * blocks + group, scale, mask=group < blocks)
        # Of each group, not of each element: with a division for each Triton 3.6 spills.
        inverse = tl.where(scale > 1e-37, 1.0 / scale, 0.0)
        each = tl.reshape(tl.broadcast_to(inverse[:, None], [GROUPS, WIDTH]), [BLOCK_D])
        share = tl.minimum(magnitude * each, 1.0)
        most = 127.0 if SIGNED else 255.0
        root = tl.sqrt(share)
        c = tl.floor((root if SIGNED else tl.sqrt(root)) * most)
        low = share_of(c, SIGNED)
        random = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
        c = tl.minimum(c + tl.where(random * (share_of(c + 1.0, SIGNED) - low) < share - low, 1.0, 0.0), most)
        if SIGNED:
            c = tl.where(value < 0, -c, c)
        else:
            c = tl.maximum(c, 1.0)  # see EightBit: no second moment is rounded to 0
        tl.store(at, c.to(ptr.dtype.element_ty), mask=d < D)
    elif STATE == "fp32":
        tl.store(at, value, mask=d < D)
    else:
        tl.store(at, to_bfloat16(value, bits).to(ptr.dtype.element_ty), mask=d < D)


@triton.jit
def project(g, w_ptr, copy_ptr, f, d, D, HAS_COPY: tl.constexpr):
    """g without the part that is parallel to its row of w, of unit norm."""
    w = read_weight(w_ptr, copy_ptr, f, d, D, HAS_COPY)
    return g - tl.sum(g * w, axis=0) * w


@triton.jit
def read_weight(w_ptr, copy_ptr, f, d, D, HAS_COPY: tl.constexpr):
    if HAS_COPY:
        return tl.load(copy_ptr + f * D + d, mask=d < D, other=0.0)
    return tl.load(w_ptr + f * D + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def update_row(
    g, f, d, D, silent, which: tl.constexpr, seed,
    w_ptr, copy_ptr, m_ptr, m_scales_ptr, v_ptr, v_scales_ptr,  # [F, D], …, scales [F, ⌈D / 256⌉], or v [F]
    factor_ptr, lr, beta1, beta2, eps, decay, first, second,
    STATE: tl.constexpr, HAS_M: tl.constexpr, HAS_COPY: tl.constexpr, STOCHASTIC: tl.constexpr, UNIT: tl.constexpr,
    HAS_LAST: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One row g [BLOCK_D] of a gradient, already projected, into its row of w. first, second: 1 − βᵗ. Returns the
    row's new squared norm."""
    # Each row is finished before the next is read: what is alive at one time has to fit the registers.
    g = tl.where(d < D, g * tl.load(factor_ptr), 0.0)
    old = tl.exp2(silent * tl.log2(beta2)) if HAS_LAST else 1.0
    if STATE == "rowwise":
        v = tl.load(v_ptr + f)
        v = beta2 * (v * old) + (1 - beta2) * (tl.sum(g * g, axis=0) / D)
        tl.store(v_ptr + f, v)
    else:
        v = read_moment(v_ptr, v_scales_ptr, f, d, D, STATE, False)
        v = beta2 * (v * old) + (1 - beta2) * g * g
        write_moment(v_ptr, v_scales_ptr, v, noise(seed, f, which + 1, d), f, d, D, STATE, False, BLOCK_D)
    spread = tl.sqrt(v * (1.0 / second)) + eps
    m = g
    if HAS_M:
        MOMENT: tl.constexpr = "bf16" if STATE == "rowwise" else STATE
        m = read_moment(m_ptr, m_scales_ptr, f, d, D, MOMENT, True)
        if HAS_LAST:
            m = m * tl.exp2(silent * tl.log2(beta1))
        m = beta1 * m + (1 - beta1) * g
        write_moment(m_ptr, m_scales_ptr, m, noise(seed, f, which, d), f, d, D, MOMENT, True, BLOCK_D)
    w = read_weight(w_ptr, copy_ptr, f, d, D, HAS_COPY) * decay - (lr / first) * m / spread
    w = tl.where(d < D, w, 0.0)
    square = tl.sum(w * w, axis=0)
    if UNIT:
        w = w / tl.maximum(tl.sqrt(square), 1e-12)
        square = tl.sum(w * w, axis=0)
    if HAS_COPY:
        tl.store(copy_ptr + f * D + d, w, mask=d < D)
    if STOCHASTIC:
        w = to_bfloat16(w, noise(seed, f, which + 2, d))
    tl.store(w_ptr + f * D + d, w.to(w_ptr.dtype.element_ty), mask=d < D)
    return square


@triton.jit
def finish(
    acc_w, acc_weight, f, d, D,
    of_norms_ptr, extra_ptr, extra_w_ptr, extra_weight_ptr, square_ptr, last_ptr, factor_ptr,
    w_ptr, w_copy_ptr, w_m_ptr, w_m_scales_ptr, w_v_ptr, w_v_scales_ptr, norms_ptr,
    e_ptr, e_copy_ptr, e_m_ptr, e_m_scales_ptr, e_v_ptr, e_v_scales_ptr,
    t, seed, lr, beta1, beta2, eps, decay, first, second,
    HAS_NORMS: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LAST: tl.constexpr, HAS_SQUARE: tl.constexpr,
    UPDATE: tl.constexpr, STATE: tl.constexpr, HAS_M: tl.constexpr, HAS_COPY: tl.constexpr, STOCHASTIC: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The gradients of feature f, ready but for what does not come from its tokens, into its rows, and their squared
    norm, projected, into square [F]."""
    if HAS_NORMS:
        w = tl.load(w_ptr + f * D + d, mask=d < D, other=0.0).to(tl.float32)
        acc_w += tl.load(of_norms_ptr + f).to(tl.float32) * w
    if HAS_EXTRA:
        row = tl.load(extra_ptr + f).to(tl.int64)
        inside = d < tl.where(row >= 0, D, 0)
        at = tl.where(row >= 0, row, 0) * D + d
        acc_w += tl.load(extra_w_ptr + at, mask=inside, other=0.0).to(tl.float32)
        acc_weight += tl.load(extra_weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if UNIT:
        acc_w = project(acc_w, w_ptr, w_copy_ptr, f, d, D, HAS_COPY)
    if HAS_SQUARE:
        square = tl.sum(tl.where(d < D, acc_w * acc_w + acc_weight * acc_weight, 0.0), axis=0)
        tl.store(square_ptr + f, square)
    if UPDATE:
        silent = 0.0
        if HAS_LAST:
            silent = (t - 1 - tl.load(last_ptr + f)).to(tl.float32)
            tl.store(last_ptr + f, t)
        square = update_row(acc_w, f, d, D, silent, 0, seed, w_ptr, w_copy_ptr, w_m_ptr, w_m_scales_ptr, w_v_ptr,
                            w_v_scales_ptr, factor_ptr, lr, beta1, beta2, eps, decay, first, second,
                            STATE, HAS_M, HAS_COPY, STOCHASTIC, UNIT, HAS_LAST, BLOCK_D)
        tl.store(norms_ptr + f, tl.sqrt(square))
        update_row(acc_weight, f, d, D, silent, 3, seed, e_ptr, e_copy_ptr, e_m_ptr, e_m_scales_ptr, e_v_ptr,
                   e_v_scales_ptr, factor_ptr, lr, beta1, beta2, eps, decay, first, second,
                   STATE, HAS_M, HAS_COPY, STOCHASTIC, False, HAS_LAST, BLOCK_D)


@triton.jit
def row_update_kernel(
    pieces_ptr, order_ptr, values_ptr, d_pre_ptr, g_ptr, x_ptr, partial_ptr,  # as in weight_grad
    of_norms_ptr, extra_ptr, extra_w_ptr, extra_weight_ptr, square_ptr, last_ptr, factor_ptr,  # as in finish
    w_ptr, w_copy_ptr, w_m_ptr, w_m_scales_ptr, w_v_ptr, w_v_scales_ptr, norms_ptr,
    e_ptr, e_copy_ptr, e_m_ptr, e_m_scales_ptr, e_v_ptr, e_v_scales_ptr,
    F, K, D, stride_gn, stride_xn, t, seed, lr, beta1, beta2, eps, decay, first, second,
    HAS_NORMS: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LAST: tl.constexpr, HAS_SQUARE: tl.constexpr,
    UPDATE: tl.constexpr, STATE: tl.constexpr, HAS_M: tl.constexpr, HAS_COPY: tl.constexpr, STOCHASTIC: tl.constexpr,
    UNIT: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr,
):
    piece = pieces_ptr + tl.program_id(0).to(tl.int64) * 5
    f = tl.load(piece)
    if f < F:
        d = tl.arange(0, BLOCK_D)
        i, stop, slot = tl.load(piece + 2), tl.load(piece + 3), tl.load(piece + 4)
        acc_w = tl.zeros([BLOCK_D], dtype=tl.float32)
        acc_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
        while i < stop:
            at = i + tl.arange(0, TOGETHER)
            entry = tl.load(order_ptr + at, mask=at < stop, other=0)
            n = entry // K
            value = tl.load(values_ptr + entry, mask=at < stop, other=0.0).to(tl.float32)
            d_pre = tl.load(d_pre_ptr + entry, mask=at < stop, other=0.0)
            inside = d[None, :] < tl.where(at < stop, D, 0)[:, None]
            g = tl.load(g_ptr + n[:, None] * stride_gn + d[None, :], mask=inside, other=0.0).to(tl.float32)
            acc_w += tl.sum(value[:, None] * g, axis=0)
            x = tl.load(x_ptr + n[:, None] * stride_xn + d[None, :], mask=inside, other=0.0).to(tl.float32)
            acc_weight += tl.sum(d_pre[:, None] * x, axis=0)
            i += TOGETHER
        if slot < 0:
            finish(acc_w, acc_weight, f, d, D,
                   of_norms_ptr, extra_ptr, extra_w_ptr, extra_weight_ptr, square_ptr, last_ptr, factor_ptr,
                   w_ptr, w_copy_ptr, w_m_ptr, w_m_scales_ptr, w_v_ptr, w_v_scales_ptr, norms_ptr,
                   e_ptr, e_copy_ptr, e_m_ptr, e_m_scales_ptr, e_v_ptr, e_v_scales_ptr,
                   t, seed, lr, beta1, beta2, eps, decay, first, second,
                   HAS_NORMS, HAS_EXTRA, HAS_LAST, HAS_SQUARE, UPDATE, STATE, HAS_M, HAS_COPY, STOCHASTIC, UNIT,
                   BLOCK_D)
        else:
            tl.store(partial_ptr + slot * 2 * D + d, acc_w, mask=d < D)
            tl.store(partial_ptr + (slot * 2 + 1) * D + d, acc_weight, mask=d < D)


@triton.jit
def row_update_reduce_kernel(
    split_ptr, partial_ptr,  # as in weight_grad
    of_norms_ptr, extra_ptr, extra_w_ptr, extra_weight_ptr, square_ptr, last_ptr, factor_ptr,  # as in finish
    w_ptr, w_copy_ptr, w_m_ptr, w_m_scales_ptr, w_v_ptr, w_v_scales_ptr, norms_ptr,
    e_ptr, e_copy_ptr, e_m_ptr, e_m_scales_ptr, e_v_ptr, e_v_scales_ptr,
    D, t, seed, lr, beta1, beta2, eps, decay, first, second,
    HAS_NORMS: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LAST: tl.constexpr, HAS_SQUARE: tl.constexpr,
    UPDATE: tl.constexpr, STATE: tl.constexpr, HAS_M: tl.constexpr, HAS_COPY: tl.constexpr, STOCHASTIC: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
):
    split = split_ptr + tl.program_id(0).to(tl.int64) * 4
    slots = tl.load(split + 3)
    if slots > 1:
        d = tl.arange(0, BLOCK_D)
        slot = tl.load(split + 2)
        acc_w = tl.zeros([BLOCK_D], dtype=tl.float32)
        acc_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
        stop = slot + slots
        while slot < stop:
            acc_w += tl.load(partial_ptr + slot * 2 * D + d, mask=d < D, other=0.0)
            acc_weight += tl.load(partial_ptr + (slot * 2 + 1) * D + d, mask=d < D, other=0.0)
            slot += 1
        finish(acc_w, acc_weight, tl.load(split), d, D,
               of_norms_ptr, extra_ptr, extra_w_ptr, extra_weight_ptr, square_ptr, last_ptr, factor_ptr,
               w_ptr, w_copy_ptr, w_m_ptr, w_m_scales_ptr, w_v_ptr, w_v_scales_ptr, norms_ptr,
               e_ptr, e_copy_ptr, e_m_ptr, e_m_scales_ptr, e_v_ptr, e_v_scales_ptr,
               t, seed, lr, beta1, beta2, eps, decay, first, second,
               HAS_NORMS, HAS_EXTRA, HAS_LAST, HAS_SQUARE, UPDATE, STATE, HAS_M, HAS_COPY, STOCHASTIC, UNIT,
               BLOCK_D)


class Matrix(NamedTuple):
    """weight [F, D]; copy [F, D] fp32 or None; m, v [F, D] (v [F] if rowwise), with scales [F, ⌈D / 256⌉] in 8 bits;
    m None without momentum."""

    weight: Tensor
    copy: Tensor | None
    m: Tensor | None
    m_scales: Tensor | None
    v: Tensor
    v_scales: Tensor | None


class Extra(NamedTuple):
    """Gradients beside those of the code: rows of w_dec and weight [S, D] fp32; of [F] int32 which each feature has, −1
    for none."""

    row: Tensor
    w_dec: Tensor
    weight: Tensor


class Adam(NamedTuple):
    """Numbers of one step; factor: a scalar on the device, what gradients are multiplied with."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    t: int
    seed: int
    factor: Tensor


def warps(block_d: int) -> int:
    """8 elements of a row a thread: with 16 the assembler spills in 8 bits where rows are narrow."""
    return max(1, min(16, block_d // 256))


def registers(block_d: int) -> int:
    """That a thread may use: as many as 16 warps can have, or what odd widths need not to spill."""
    return 128 if warps(block_d) == 16 else 255


def row_update(
    code: Pieces, values: Tensor, d_pre: Tensor, g: Tensor, x: Tensor, w_dec: Matrix, weight: Matrix, adam: Adam, *,
    state: str, stochastic: bool, unit: bool, norms: Tensor, of_norms: Tensor | None = None, extra: Extra | None = None,
    last: Tensor | None = None, square: Tensor | None = None, update: bool = True,
) -> None:  # fmt: skip
    """One step of Adam on the rows of every feature in code, in place; norms [F] of w_dec's rows are written too.

    square [F] fp32: where to write the squared norm of each feature's two rows of gradients, projected; without update
    that is all that is done.
    values, d_pre: [N, K]; g, x: [N, D] with contiguous rows. of_norms [F]: what w_dec's rows are multiplied with in
    the gradient of their norms. last [F] int32: the step in which a feature was touched last, where those that are not
    in code wait. Reads 2·M·D elements, and weights and moments of the features once; D ≤ WIDEST.
    """
    N, K = values.shape
    F, D = w_dec.weight.shape
    if D > WIDEST:
        raise ValueError(f"expected rows of at most {WIDEST}, got {D}")
    none = code.order  # a pointer that is not read
    partial = torch.empty(max(2 * (N * K // weight_grad.SPLIT), 1), 2, D, dtype=torch.float32, device=x.device)
    pointers = [
        none if t is None else t
        for t in (of_norms, *(extra or (None, None, None)), square, last, adam.factor, *w_dec, norms, *weight)
    ]
    numbers = (adam.t, adam.seed, adam.lr, adam.beta1, adam.beta2, adam.eps, adam.decay,
               1 - adam.beta1**adam.t, 1 - adam.beta2**adam.t)  # fmt: skip
    block_d = max(triton.next_power_of_2(D), 16)
    options = {
        "HAS_NORMS": of_norms is not None, "HAS_EXTRA": extra is not None, "HAS_LAST": last is not None,
        "HAS_SQUARE": square is not None, "UPDATE": update, "STATE": state, "HAS_M": w_dec.m is not None,
        "HAS_COPY": w_dec.copy is not None, "STOCHASTIC": stochastic, "UNIT": unit, "BLOCK_D": block_d,
        "num_warps": warps(block_d), "maxnreg": registers(block_d),
    }  # fmt: skip
    with torch.cuda.device_of(x):
        row_update_kernel[(code.pieces.shape[0],)](
            code.pieces, code.order, values, d_pre, g, x, partial, *pointers, F, max(K, 1), D, g.stride(0), x.stride(0),
            *numbers, TOGETHER=TOGETHER, **options,
        )
        if code.split.shape[0]:
            row_update_reduce_kernel[(code.split.shape[0],)](code.split, partial, *pointers, D, *numbers, **options)
