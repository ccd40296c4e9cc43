"""Decode: a weighted sum of rows of the dictionary, gathered by the code's indices.

N tokens, K slots of the code per token, F dictionary size, D model width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 elements a thread: one 16-byte load in bf16. Four rows in flight hide some of the wait for index, then row; the
# other programs on the SM hide the rest.
BLOCK_D = 1024
NUM_WARPS = 4
UNROLL = 4
# Codes with this many slots may have rows so much longer than others that the order in which they start matters.
LONG_ROW = 256


@triton.jit
def decode_kernel(
    indices_ptr, values_ptr, counts_ptr, order_ptr, w_ptr,  # [N, K], [N, K], [N] or anything, the same, [F, D]
    bias_ptr, target_ptr,  # [D], [N, D], or anything
    out_ptr, residual_ptr, error_ptr,  # [N, D], [N, D] or anything, [N, blocks of D] or anything
    K, D,
    stride_in, stride_ik, stride_vn, stride_vk, stride_wf, stride_tn, stride_on,
    HAS_COUNTS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_TARGET: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # N * D and N * K overflow int32 at harvest sizes
    if HAS_ORDER:
        n = tl.load(order_ptr + n).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    used = K
    if HAS_COUNTS:
        # A row that overflowed its slots may count more entries than it has slots; it must not read its neighbour's.
        used = tl.minimum(tl.load(counts_ptr + n).to(tl.int32), K)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    k = 0
    while k < used:
        # UNROLL independent pairs of loads, index then row, are in flight at a time; the last round is masked.
        for j in tl.static_range(UNROLL):
            valid = k + j < used
            slot = (k + j).to(tl.int64)
            f = tl.load(indices_ptr + n * stride_in + slot * stride_ik, mask=valid, other=0).to(tl.int64)
            value = tl.load(values_ptr + n * stride_vn + slot * stride_vk, mask=valid, other=0.0).to(tl.float32)
            width = tl.where(valid, D, 0)  # not `inside & valid`: the interpreter of Triton 3.9 makes bytes of it
            row = tl.load(w_ptr + f * stride_wf + d, mask=d < width, other=0.0).to(tl.float32)
            acc += value * row
        k += UNROLL
    # Each output is written once, by one program that adds in the order of the slots: no atomics, the same bits always.
    if HAS_TARGET:
        acc += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + n * stride_tn + d, mask=d < D, other=0.0).to(tl.float32)
        residual = tl.where(d < D, acc - target, 0.0)
        tl.store(residual_ptr + n * stride_on + d, residual.to(residual_ptr.dtype.element_ty), mask=d < D)
        at = n * tl.num_programs(1) + tl.program_id(1)
        tl.store(error_ptr + at, tl.sum(residual * residual, axis=0))
    tl.store(out_ptr + n * stride_on + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


def decode(indices: Tensor, values: Tensor, w_dec: Tensor, counts: Tensor | None = None) -> Tensor:
    """out[n] = Σ_{k < counts[n]} values[n, k] · w_dec[indices[n, k]], summed in fp32: [N, D] in w_dec's dtype.

    indices: [N, K] integers in [0, F), unchecked. values: [N, K] floats. w_dec: [F, D] in float32, bfloat16 or
    float16, with contiguous rows; indices and values may have any strides. counts: [N] integers, the slots of each
    row that are used; without it all K are. Slots past the count are never read.
    Reads about N·K·D + 2·N·K, writes N·D elements; no gradient.

    Raises ValueError if shapes, dtypes or devices do not fit each other.
    """
    _check(indices, values, w_dec, counts)
    return _launch(indices, values, w_dec, counts, None, None)[0]


class Decoded(NamedTuple):
    """out, residual = out − target [N, D] in w_dec's dtype, and error = Σ_d residual² [N] in fp32."""

    out: Tensor
    residual: Tensor
    error: Tensor


def decode_error(
    indices: Tensor, values: Tensor, w_dec: Tensor, bias: Tensor, target: Tensor, counts: Tensor | None = None
) -> Decoded:
    """decode plus bias [D], and how far it is from target [N, D]: one pass instead of four.

    The error is that of the fp32 sums, before they are rounded to w_dec's dtype; it is summed in a fixed order.
    Arguments and errors as for `decode`. Reads N·D + D elements more than it, writes N·D + N more.
    """
    _check(indices, values, w_dec, counts)
    N, D = indices.shape[0], w_dec.shape[1]
    if target.shape != (N, D) or bias.shape != (D,):
        raise ValueError(
            f"target must be [{N}, {D}] and bias [{D}], got {tuple(target.shape)} and {tuple(bias.shape)}"
        )
    if target.device != w_dec.device or bias.device != w_dec.device:
        raise ValueError(f"target and bias must be on {w_dec.device}, got {target.device} and {bias.device}")
    target = target if D == 1 or target.stride(1) == 1 else target.contiguous()
    return Decoded(*_launch(indices, values, w_dec, counts, bias.contiguous(), target))


def _launch(
    indices: Tensor, values: Tensor, w_dec: Tensor, counts: Tensor | None, bias: Tensor | None, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (N, K), D = indices.shape, w_dec.shape[1]
    out = w_dec.new_empty(N, D)
    block_d = min(triton.next_power_of_2(max(D, 1)), BLOCK_D)
    blocks = triton.cdiv(D, block_d)
    residual = out if target is None else torch.empty_like(out)
    error = out if target is None else torch.empty(N, blocks, dtype=torch.float32, device=out.device)
    if out.numel() == 0:
        return out, residual, error.sum(1)
    order = None
    if counts is not None:
        counts = counts.contiguous()
        if K >= LONG_ROW:
            # Longest rows first, so that none is left over when the others are done; equal ones in order.
            order = counts.argsort(descending=True, stable=True).to(torch.int32)
    unused = indices  # a pointer that is not read
    with torch.cuda.device_of(w_dec):  # Triton launches on the current device, not the tensor's
        decode_kernel[(N, blocks)](
            indices, values, unused if counts is None else counts, unused if order is None else order, w_dec,
            unused if bias is None else bias, unused if target is None else target, out, residual, error,
            K, D, *indices.stride(), *values.stride(), w_dec.stride(0),
            0 if target is None else target.stride(0), out.stride(0),
            HAS_COUNTS=counts is not None, HAS_ORDER=order is not None, HAS_TARGET=target is not None,
            BLOCK_D=block_d, UNROLL=UNROLL, num_warps=NUM_WARPS,
        )
    return out, residual, error if target is None else error.sum(1)


def _check(indices: Tensor, values: Tensor, w_dec: Tensor, counts: Tensor | None) -> None:
    if indices.ndim != 2 or values.shape != indices.shape:
        raise ValueError(
            f"indices and values must both be [N, K], got {tuple(indices.shape)} and {tuple(values.shape)}; "
            "flatten the leading dimensions first"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be int32 or int64, got {indices.dtype}; convert them with .int()")
    if w_dec.ndim != 2 or w_dec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"w_dec must be [F, D] in float32, bfloat16 or float16, got {tuple(w_dec.shape)} in {w_dec.dtype}; "
            "for another dtype use fastsae.reference.decode"
        )
    if w_dec.shape[1] > 1 and w_dec.stride(1) != 1:
        raise ValueError(f"w_dec must have contiguous rows, got strides {w_dec.stride()}; pass w_dec.contiguous()")
    if counts is not None and (counts.shape != indices.shape[:1] or counts.is_floating_point()):
        raise ValueError(
            f"counts must be {indices.shape[0]} integers, one for each row of indices, "
            f"got {tuple(counts.shape)} {counts.dtype}"
        )
    others = (indices, values) if counts is None else (indices, values, counts)
    if any(t.device != w_dec.device for t in others):
        raise ValueError(
            f"all tensors must be on w_dec's device {w_dec.device}, got {', '.join(str(t.device) for t in others)}"
        )
