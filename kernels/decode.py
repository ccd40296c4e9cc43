"""Decode: a weighted sum of rows of the dictionary, gathered by the code's indices.

N tokens, K slots of the code per token, F dictionary size, D model width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 elements a thread: one 16-byte load in bf16. Four rows in flight hide some of the wait for index, then row; the
# other programs on the SM hide the rest.
BLOCK_D = 1024
NUM_WARPS = 4
UNROLL = 4


@triton.jit
def decode_kernel(
    indices_ptr, values_ptr, counts_ptr, w_ptr,  # [N, K], [N, K], [N] or anything, [F, D]
    out_ptr,  # [N, D]
    K, D,
    stride_in, stride_ik, stride_vn, stride_vk, stride_wf, stride_on,
    HAS_COUNTS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # N * D and N * K overflow int32 at harvest sizes
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
    (N, K), D = indices.shape, w_dec.shape[1]
    out = w_dec.new_empty(N, D)
    if out.numel() == 0:
        return out
    block_d = min(triton.next_power_of_2(D), BLOCK_D)
    counts_or_any = indices if counts is None else counts.contiguous()
    with torch.cuda.device_of(w_dec):  # Triton launches on the current device, not the tensor's
        decode_kernel[(N, triton.cdiv(D, block_d))](
            indices, values, counts_or_any, w_dec, out,
            K, D, *indices.stride(), *values.stride(), w_dec.stride(0), out.stride(0),
            HAS_COUNTS=counts is not None, BLOCK_D=block_d, UNROLL=UNROLL, num_warps=NUM_WARPS,
        )
    return out


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
