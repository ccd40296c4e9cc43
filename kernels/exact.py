"""Exact: the K largest entries of single rows, from all F features, for rows that `select` could not certify.

Rows with many equal entries, or with most of their largest in a few groups, end here. Each row's features are shared
among SPLITS programs, which keep the best K of theirs; a second kernel takes the best of those. Programs of all other
rows end at once, so the host need not know whether there is anything to do.

N tokens, F dictionary size, D model width, K active per token, B the power of two that holds K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.select import Found, is_open, order_key, write_best

MOST_K = 512
NUM_STAGES = 2
# Left to itself the assembler takes fewer registers, for more programs at a time, and spills a few bytes for it.
REGISTERS = 255
MOST_SPLITS = 8
PARTIAL_BYTES = 64 << 20  # of what splits pass on; fewer splits where N and K are large


@triton.jit
def row_dots(x_ptr, w_ptr, bias_ptr, features, valid, stride_wf,
             D: tl.constexpr, B: tl.constexpr, BLOCK_D: tl.constexpr):
    """max(⟨x, w_f⟩ + bias_f, 0) of one row x [D] for features [B], in fp32."""
    d = tl.arange(0, BLOCK_D)
    w_rows = tl.where(valid, features, 0).to(tl.int64)
    z = tl.zeros([B], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = d < D - start
        x = tl.load(x_ptr + start + d, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + w_rows[:, None] * stride_wf + start + d[None, :], mask=inside[None, :], other=0.0)
        z += tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    z += tl.load(bias_ptr + features, mask=valid, other=0.0)
    return tl.where(valid & (z > 0), z, 0.0)


@triton.jit
def best_of_both(a, b, B: tl.constexpr):
    """The B largest of a and b [B], descending."""
    both = tl.sort(tl.reshape(tl.join(a, b), [2 * B]), descending=True)
    first = tl.arange(0, 2)[:, None] == 0
    return tl.max(tl.where(first, tl.reshape(both, [2, B]), 0), axis=0)


@triton.jit
def exact_kernel(
    x_ptr, w_ptr, bias_ptr, n_found_ptr, n_failed_ptr,  # as in encode and select
    partial_ptr,  # [N, SPLITS, B] int64
    F, C, MOST_FAILED, PER_SPLIT,
    stride_xn, stride_wf,
    D: tl.constexpr, B: tl.constexpr, BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if is_open(n, n_found_ptr, n_failed_ptr, C, MOST_FAILED):
        best = tl.zeros([B], dtype=tl.int64)
        start = split * PER_SPLIT
        stop = tl.minimum(start + PER_SPLIT, F)
        while start < stop:
            features = start + tl.arange(0, B)
            valid = features < stop
            z = row_dots(x_ptr + n * stride_xn, w_ptr, bias_ptr, features, valid, stride_wf, D, B, BLOCK_D)
            keys = order_key(z, features)
            if tl.max(keys, axis=0) > tl.min(best, axis=0):
                best = best_of_both(best, keys, B)
            start += B
        tl.store(partial_ptr + (n * tl.num_programs(1) + split) * B + tl.arange(0, B), best)


@triton.jit
def exact_merge_kernel(
    partial_ptr, n_found_ptr, n_failed_ptr,  # [N, SPLITS, B], [N], [N]
    values_ptr, indices_ptr, counts_ptr, fired_ptr,  # [N, K], [N, K], [N], [F] or anything
    C, MOST_FAILED, K, SPLITS,
    HAS_FIRED: tl.constexpr, B: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if is_open(n, n_found_ptr, n_failed_ptr, C, MOST_FAILED):
        slot = tl.arange(0, B)
        best = tl.load(partial_ptr + n * SPLITS * B + slot)
        split = 1
        while split < SPLITS:
            best = best_of_both(best, tl.load(partial_ptr + (n * SPLITS + split) * B + slot), B)
            split += 1
        keep = tl.minimum(tl.sum((best > 0).to(tl.int32), axis=0), K)
        write_best(best, keep, n, values_ptr, indices_ptr, fired_ptr, K, HAS_FIRED, B)
        tl.store(counts_ptr + n, keep)


def shape(block: int, half: bool, aligned: bool) -> tuple[int, int]:
    """BLOCK_D and warps for B = block; aligned: rows start at multiples of 16 elements. With others the assembler
    spills a few bytes: see bench compile."""
    if half:
        return (16, 4 if block < 512 else 2 if aligned else 8)
    return {64: (16, 8), 128: (32, 4), 256: (32, 8) if aligned else (8, 8), 512: (16, 8)}[block]


def exact_topk(
    x: Tensor, weight: Tensor, bias: Tensor, found: Found,
    values: Tensor, indices: Tensor, counts: Tensor, fired: Tensor | None = None,
) -> None:
    """Writes values, indices [N, K] and counts [N] of the rows that `finish` has left, in place; adds to fired [F].

    Reads F·D elements of weight for each such row, from L2 where several rows do at once.
    """
    (N, D), F, K = x.shape, weight.shape[0], values.shape[1]
    B = max(triton.next_power_of_2(K), 64)
    splits = max(1, min(MOST_SPLITS, PARTIAL_BYTES // (8 * B * max(N, 1)), triton.cdiv(F, B)))
    partial = torch.empty(N, splits, B, dtype=torch.int64, device=x.device)
    C, most_failed = found.values.shape[1], found.failed.shape[1]
    aligned = x.stride(0) % 16 == 0 and weight.stride(0) % 16 == 0
    block_d, num_warps = shape(B, x.element_size() == 2, aligned)
    with torch.cuda.device_of(x):
        exact_kernel[(N, splits)](
            x, weight, bias, found.counts, found.n_failed, partial,
            F, C, most_failed, triton.cdiv(F, splits), x.stride(0), weight.stride(0),
            D=D, B=B, BLOCK_D=block_d, num_warps=num_warps, num_stages=NUM_STAGES,
            maxnreg=REGISTERS,
        )
        exact_merge_kernel[(N,)](
            partial, found.counts, found.n_failed, values, indices, counts, counts if fired is None else fired,
            C, most_failed, K, splits, HAS_FIRED=fired is not None, B=B, num_warps=num_warps,
        )
