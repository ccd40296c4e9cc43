"""Weight_grad: the gradients of both weight matrices in one pass over what fired, feature by feature.

The code is sorted by feature (stably, so that tokens ascend). A program loads its feature's decoder row once, and for
each of the feature's tokens the rows of g, the gradient of the output, and of x: it makes dL/dpre = ⟨g, w_dec[f]⟩ +
penalties, and adds value · g to the decoder's gradient and dL/dpre · x to the encoder's, in registers, in the order of
the tokens. No atomics: the same bits always. Features that fired nowhere have a program too, which writes their zeros.

Rows wider than WIDEST do not fit the registers of a program: then the dots ⟨g, w_dec[f]⟩ are made first, by token
(`dots_kernel`), and a feature's row is shared among programs. The bench times this way at all widths too.

A feature with more than SPLIT tokens is shared among programs, longest first, so that none is left over when the others
are done; their sums meet in `reduce_kernel`, in the order of the pieces.

N tokens, K slots of the code per token, M = N · K, F dictionary size, D model width, P pieces.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.gradients import Pull, WeightGradients
from fastsae.kernels.decode import decode

SPLIT = 256  # tokens of a piece
TOGETHER = 2  # tokens whose rows are under way at a time
WIDEST = 4096  # a row of W_dec, two sums and rows of g and x stand in the registers of one program
SLICE = 2048  # of a row, where it is shared
# Told so, the assembler neither spills a few bytes, as it does left to itself, nor takes so many that few programs fit.
REGISTERS = 168
DOTS_K, DOTS_D, DOTS_WARPS = 16, 256, 4


@triton.jit
def finish_row(
    acc_w, acc_weight, sum_bias, sum_theta, sum_l1, f, out, d, first, D,
    w_ptr, norms_ptr, d_w_ptr, d_weight_ptr, d_bias_ptr, d_theta_ptr,
    stride_wf, HAS_NORMS: tl.constexpr, HAS_THETA: tl.constexpr, HAS_ROWS: tl.constexpr,
):
    """Adds the gradient of ‖w_dec[f]‖ and writes row `out` of all gradients; without rows, the factor of w_dec[f] in
    that gradient to d_w [F]."""
    if HAS_NORMS:
        norm = tl.load(norms_ptr + f).to(tl.float32)
        of_norm = tl.where(norm > 0, sum_l1 / norm, 0.0)
        if HAS_ROWS:
            w = tl.load(w_ptr + f * stride_wf + d, mask=d < D, other=0.0).to(tl.float32)
            acc_w += of_norm * w
        else:
            tl.store(d_w_ptr + out, of_norm, mask=first)
    if HAS_ROWS:
        tl.store(d_w_ptr + out * D + d, acc_w.to(d_w_ptr.dtype.element_ty), mask=d < D)
        tl.store(d_weight_ptr + out * D + d, acc_weight.to(d_weight_ptr.dtype.element_ty), mask=d < D)
    tl.store(d_bias_ptr + out, sum_bias, mask=first)
    if HAS_THETA:
        tl.store(d_theta_ptr + out, sum_theta, mask=first)


@triton.jit
def weight_grad_kernel(
    pieces_ptr, order_ptr,  # [P, 5]: feature, row of the output, start, stop, slot of partial sums or -1; [M]
    values_ptr, d_values_ptr, dots_ptr, g_ptr, x_ptr, w_ptr,  # [M], [M], [M] or anything, [N, D], [N, D], [F, D]
    l1_ptr, l0_ptr, norms_ptr, theta_ptr,  # [N], [N], [F], [F]; or anything
    d_pre_ptr, d_w_ptr, d_weight_ptr, d_bias_ptr, d_theta_ptr,  # [M], [F, D], [F, D], [F], [F] or anything
    partial_ptr, scalars_ptr,  # [slots, 2, D], [slots, 3]
    F, K, D, bandwidth,
    stride_gn, stride_xn, stride_wf,
    HAS_DOTS: tl.constexpr, HAS_D_VALUES: tl.constexpr, HAS_L1: tl.constexpr, HAS_L0: tl.constexpr,
    HAS_NORMS: tl.constexpr, HAS_THETA: tl.constexpr, HAS_ROWS: tl.constexpr,
    TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr,
):
    piece = pieces_ptr + tl.program_id(0).to(tl.int64) * 5
    f = tl.load(piece)
    if f < F:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.program_id(1) == 0  # of the programs that share a row, this one writes what is no row
        i, stop, slot = tl.load(piece + 2), tl.load(piece + 3), tl.load(piece + 4)
        if not HAS_DOTS:
            w = tl.load(w_ptr + f * stride_wf + d, mask=d < D, other=0.0).to(tl.float32)
        acc_w = tl.zeros([BLOCK_D], dtype=tl.float32)
        acc_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
        sum_bias, sum_theta, sum_l1 = 0.0, 0.0, 0.0
        while i < stop:
            at = i + tl.arange(0, TOGETHER)
            entry = tl.load(order_ptr + at, mask=at < stop, other=0)
            n = entry // K
            value = tl.load(values_ptr + entry, mask=at < stop, other=0.0).to(tl.float32)  # 0 adds nothing
            inside = d[None, :] < tl.where(at < stop, D, 0)[:, None]
            if HAS_ROWS:
                g = tl.load(g_ptr + n[:, None] * stride_gn + d[None, :], mask=inside, other=0.0).to(tl.float32)
            if HAS_DOTS:
                d_value = tl.load(dots_ptr + entry, mask=at < stop, other=0.0)
            else:
                d_value = tl.sum(g * w[None, :], axis=1)
            if HAS_L1:
                l1 = tl.load(l1_ptr + n, mask=at < stop, other=0.0).to(tl.float32)
                if HAS_NORMS:
                    sum_l1 += tl.sum(l1 * value, axis=0)
                    d_value += l1 * tl.load(norms_ptr + f).to(tl.float32)
                else:
                    d_value += l1
            if HAS_D_VALUES:
                d_value += tl.load(d_values_ptr + entry, mask=at < stop, other=0.0).to(tl.float32)
            if HAS_THETA:
                theta = tl.load(theta_ptr + f).to(tl.float32)
                slope = d_value * theta
                if HAS_L0:
                    slope += tl.load(l0_ptr + n, mask=at < stop, other=0.0).to(tl.float32)
                band = (at < stop) & ((value == 0) | (value - theta < bandwidth / 2))
                sum_theta -= tl.sum(tl.where(band, slope, 0.0), axis=0) / bandwidth
            d_pre = tl.where(value > 0, d_value, 0.0)
            tl.store(d_pre_ptr + entry, d_pre, mask=at < tl.where(first, stop, 0))
            sum_bias += tl.sum(d_pre, axis=0)
            if HAS_ROWS:
                x = tl.load(x_ptr + n[:, None] * stride_xn + d[None, :], mask=inside, other=0.0).to(tl.float32)
                acc_w += tl.sum(value[:, None] * g, axis=0)
                acc_weight += tl.sum(d_pre[:, None] * x, axis=0)
            i += TOGETHER
        if slot < 0:
            finish_row(acc_w, acc_weight, sum_bias, sum_theta, sum_l1, f, tl.load(piece + 1), d, first, D,
                       w_ptr, norms_ptr, d_w_ptr, d_weight_ptr, d_bias_ptr, d_theta_ptr,
                       stride_wf, HAS_NORMS, HAS_THETA, HAS_ROWS)
        else:
            if HAS_ROWS:
                tl.store(partial_ptr + slot * 2 * D + d, acc_w, mask=d < D)
                tl.store(partial_ptr + (slot * 2 + 1) * D + d, acc_weight, mask=d < D)
            tl.store(scalars_ptr + slot * 3, sum_bias, mask=first)
            tl.store(scalars_ptr + slot * 3 + 1, sum_theta, mask=first)
            tl.store(scalars_ptr + slot * 3 + 2, sum_l1, mask=first)


@triton.jit
def reduce_kernel(
    split_ptr, partial_ptr, scalars_ptr,  # [Q, 4]: feature, row of the output, first slot, slots; as above
    w_ptr, norms_ptr, d_w_ptr, d_weight_ptr, d_bias_ptr, d_theta_ptr,  # as above
    D, stride_wf,
    HAS_NORMS: tl.constexpr, HAS_THETA: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):
    split = split_ptr + tl.program_id(0).to(tl.int64) * 4
    slots = tl.load(split + 3)
    if slots > 1:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        slot = tl.load(split + 2)
        acc_w = tl.zeros([BLOCK_D], dtype=tl.float32)
        acc_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
        sum_bias, sum_theta, sum_l1 = 0.0, 0.0, 0.0
        stop = slot + slots
        while slot < stop:
            if HAS_ROWS:
                acc_w += tl.load(partial_ptr + slot * 2 * D + d, mask=d < D, other=0.0)
                acc_weight += tl.load(partial_ptr + (slot * 2 + 1) * D + d, mask=d < D, other=0.0)
            sum_bias += tl.load(scalars_ptr + slot * 3)
            sum_theta += tl.load(scalars_ptr + slot * 3 + 1)
            sum_l1 += tl.load(scalars_ptr + slot * 3 + 2)
            slot += 1
        finish_row(acc_w, acc_weight, sum_bias, sum_theta, sum_l1, tl.load(split), tl.load(split + 1), d,
                   tl.program_id(1) == 0, D, w_ptr, norms_ptr, d_w_ptr, d_weight_ptr, d_bias_ptr, d_theta_ptr,
                   stride_wf, HAS_NORMS, HAS_THETA, HAS_ROWS)


@triton.jit
def dots_kernel(
    indices_ptr, counts_ptr, g_ptr, w_ptr, dots_ptr,  # [N, K], [N] or anything, [N, D], [F, D], [N, K]
    K, D, stride_gn, stride_wf,
    HAS_COUNTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    used = K
    if HAS_COUNTS:
        used = tl.minimum(tl.load(counts_ptr + n).to(tl.int32), K)
    f = tl.load(indices_ptr + n * K + k, mask=k < used, other=0).to(tl.int64)
    dots = tl.zeros([BLOCK_K], dtype=tl.float32)
    start = 0
    while start < D:
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(g_ptr + n * stride_gn + d, mask=d < D, other=0.0).to(tl.float32)
        inside = d[None, :] < tl.where(k < used, D, 0)[:, None]
        w = tl.load(w_ptr + f[:, None] * stride_wf + d[None, :], mask=inside, other=0.0).to(tl.float32)
        dots += tl.sum(w * g[None, :], axis=1)
        start += BLOCK_D
    tl.store(dots_ptr + n * K + k, dots, mask=k < used)


def dots(indices: Tensor, counts: Tensor | None, g: Tensor, w_dec: Tensor) -> Tensor:
    """out[n, k] = ⟨g[n], w_dec[indices[n, k]]⟩ [N, K] in fp32, written in used slots. Reads N·K·D elements of w_dec."""
    (N, K), D = indices.shape, w_dec.shape[1]
    out = torch.empty(N, K, dtype=torch.float32, device=g.device)
    if out.numel():
        with torch.cuda.device_of(g):
            dots_kernel[(N, triton.cdiv(K, DOTS_K))](
                indices.contiguous(), indices if counts is None else counts.contiguous(), g, w_dec, out,
                K, D, g.stride(0), w_dec.stride(0),
                HAS_COUNTS=counts is not None, BLOCK_K=DOTS_K, BLOCK_D=DOTS_D, num_warps=DOTS_WARPS,
            )
    return out


class Pieces(NamedTuple):
    """order [M]: slots of the code, sorted by feature, then token. pieces [P, 5] and split [Q, 4]: the tables that the
    kernels read. features [U]: which feature each row of the gradients belongs to, F for rows that belong to none."""

    order: Tensor
    pieces: Tensor
    split: Tensor
    features: Tensor


def by_feature(
    indices: Tensor, counts: Tensor | None, F: int, rows: bool = False, also: Tensor | None = None
) -> Pieces:
    """Sorts a code [N, K] by feature and cuts it into pieces of at most SPLIT tokens. Does not wait for the device.

    rows: whether only features that fired have a row of the gradients, and those among also [S] int64, U = min(M + S,
    F) of them; else all F, in order.
    """
    (N, K), device = indices.shape, indices.device
    M = N * K
    feature = indices.to(torch.int32)
    if counts is not None:
        feature = torch.where(torch.arange(K, device=device) < counts[:, None], feature, F)
    feature, order = torch.sort(feature.reshape(-1), stable=True)
    offsets = torch.searchsorted(feature, torch.arange(F + 1, device=device, dtype=torch.int32))
    length = offsets.diff()  # [F]
    number = ((length + SPLIT - 1) // SPLIT).clamp_min(0 if rows else 1)
    if also is not None:
        number[also] = number[also].clamp_min(1)
    last = number.cumsum(0)
    out = (number > 0).cumsum(0) - 1 if rows else torch.arange(F, device=device)
    U = min(M + (0 if also is None else also.numel()), F) if rows else F
    features = torch.full((U + 1,), F, device=device)
    features = features.scatter_(0, torch.where(number > 0, out, U), torch.arange(F, device=device))[:U]
    # As many pieces as there can be: what is beyond the last is marked with feature F.
    piece = torch.arange(U + M // SPLIT, device=device)
    f = torch.searchsorted(last, piece, right=True)
    real = f < F
    at = f.clamp_max(F - 1)
    start = offsets[at] + (piece - (last[at] - number[at])) * SPLIT
    stop = torch.minimum(start + SPLIT, offsets[at + 1])
    shared = real & (number[at] > 1)
    slot = torch.where(shared, shared.cumsum(0) - 1, -1)
    table = torch.stack([f, out[at], start, stop, slot], 1)
    longest_first = torch.where(real, stop - start, -1).argsort(descending=True, stable=True)
    # Features of several pieces: their first slots are where the pieces of those before them end.
    several = number > 1
    first_slot = torch.where(several, number, 0).cumsum(0) - number
    chosen = (~several).to(torch.int8).argsort(stable=True)[: M // SPLIT]
    split = torch.stack([chosen, out[chosen], first_slot[chosen], number[chosen]], 1)
    return Pieces(order, table[longest_first].contiguous(), split.contiguous(), features)


def warps(block_d: int, share: int) -> int:
    """`share` elements of a row a thread: 16 where a program makes the dots, else 8. With others the assembler
    spills."""
    return max(1, min(32, block_d // (32 * share)))


class ByFeature(NamedTuple):
    """What one pass makes: the gradients, d_pre [N, K], written in used slots, and the code by feature."""

    made: WeightGradients
    d_pre: Tensor
    code: Pieces


def weight_grad(
    rows: Tensor, values: Tensor, indices: Tensor, counts: Tensor | None, bias: Tensor, w_dec: Tensor,
    threshold: Tensor | None, bandwidth: float, norms: Tensor | None, pull: Pull, compact: bool = False,
    with_dots: bool | None = None, with_rows: bool = True, also: Tensor | None = None,
) -> ByFeature:  # fmt: skip
    """The gradients of `gradients.of_code`, from rows = x − centre [N, D]; in the parameters' dtypes, summed in fp32.

    compact: whether only features that fired, and those of also, have rows (`by_feature`), which need not be dense.
    with_dots: whether the dots are made first, which they are for widths beyond WIDEST. with_rows: without, w_dec and
    weight are not made, and w_dec is [F], what the rows of w_dec are multiplied with in the gradient of their norms.
    Reads 2·M·D + F·D elements and writes 2·F·D; with the dots first it reads 3·M·D.
    """
    (N, K), (F, D) = indices.shape, w_dec.shape
    with_dots = (D > WIDEST or not with_rows) if with_dots is None else with_dots
    code = by_feature(indices, counts, F, compact, also)
    U, block_d = code.features.numel(), max(triton.next_power_of_2(D), 16)
    block_d = 16 if not with_rows else min(block_d, SLICE) if with_dots else block_d
    slices = triton.cdiv(D, block_d) if with_rows else 1
    d_w, d_weight = (w_dec.new_empty(U, D) for _ in range(2)) if with_rows else (bias.new_zeros(U), bias.new_empty(0))
    d_bias = bias.new_empty(U)
    d_theta = None if threshold is None else threshold.new_empty(U)
    d_pre = torch.empty(N, K, dtype=torch.float32, device=rows.device)
    slots = 2 * (N * K // SPLIT)
    partial = torch.empty(max(slots, 1), 2, D if with_rows else 0, dtype=torch.float32, device=rows.device)
    scalars = torch.empty(max(slots, 1), 3, dtype=torch.float32, device=rows.device)
    if compact:  # rows that belong to no feature
        d_bias.zero_()
    g, x, w = (t if t.stride(1) == 1 or D == 1 else t.contiguous() for t in (pull.out, rows, w_dec))
    first = dots(indices, counts, g, w) if with_dots else None
    none = code.order  # a pointer that is not read
    of = [none if t is None else t.contiguous() for t in (pull.values, pull.l1, pull.l0, norms, threshold)]
    d_values, l1, l0, norm, theta = of
    outputs = d_w, d_weight, d_bias, none if d_theta is None else d_theta
    of_norms = norms is not None and pull.l1 is not None
    options = {"HAS_NORMS": of_norms, "HAS_THETA": threshold is not None, "HAS_ROWS": with_rows, "BLOCK_D": block_d}
    with torch.cuda.device_of(rows):
        weight_grad_kernel[(code.pieces.shape[0], slices)](
            code.pieces, code.order, values.contiguous(), d_values, none if first is None else first, g, x, w,
            l1, l0, norm, theta, d_pre, *outputs, partial, scalars,
            F, max(K, 1), D, float(bandwidth) or 1.0, g.stride(0), x.stride(0), w.stride(0),
            HAS_DOTS=with_dots, HAS_D_VALUES=pull.values is not None, HAS_L1=pull.l1 is not None,
            HAS_L0=pull.l0 is not None, TOGETHER=TOGETHER, num_warps=warps(block_d, 8 if with_dots else 16),
            maxnreg=REGISTERS,
            **options,
        )
        if code.split.shape[0]:
            reduce_kernel[(code.split.shape[0], slices)](
                code.split, partial, scalars, w, norm, *outputs, D, w.stride(0), num_warps=warps(block_d, 8), **options
            )
    features = code.features if compact else None
    return ByFeature(WeightGradients(d_w, d_weight, d_bias, d_theta, features), d_pre, code)


def of_code(
    rows: Tensor, values: Tensor, indices: Tensor, counts: Tensor | None, weight: Tensor, bias: Tensor, w_dec: Tensor,
    threshold: Tensor | None, bandwidth: float, norms: Tensor | None, pull: Pull, want_x: bool,
    compact: bool = False,
) -> tuple[WeightGradients, Tensor | None]:  # fmt: skip
    """As `gradients.of_code`. dx is a gather like decode, of the encoder's rows with dL/dpre for weights."""
    found = weight_grad(rows, values, indices, counts, bias, w_dec, threshold, bandwidth, norms, pull, compact)
    return found.made, decode(indices, found.d_pre, weight, counts) if want_x else None
