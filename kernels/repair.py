"""Repair: all 32 entries of the groups that failed their certificate, added to what `select` has collected.

One program a row, in the order of its list: no atomics, the same bits always. Most rows have nothing to repair and end
at once. The sum over D runs in another order than in `encode`, so an entry that is within rounding of the bound may
fall on its other side.

N tokens, F dictionary size, D model width, C slots of the buffer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.encode import Groups, feature_of, input_precision
from fastsae.kernels.select import Found

BLOCK_D = 64
NUM_WARPS = 4
NUM_STAGES = 3


@triton.jit
def one_group(x_ptr, w_ptr, bias_ptr, features, valid, stride_wf,
              D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """max(⟨x, w_f⟩ + bias_f, 0) of one row x [D] for features [32]."""
    d = tl.arange(0, BLOCK_D)
    w_rows = tl.where(valid, features, 0).to(tl.int64)
    if PRECISION == "ieee":
        z = tl.zeros([32], dtype=tl.float32)
    else:
        acc = tl.zeros([16, 32], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = d < D - start
        x = tl.load(x_ptr + start + d, mask=inside, other=0.0)
        w = tl.load(w_ptr + w_rows[:, None] * stride_wf + start + d[None, :], mask=inside[None, :], other=0.0)
        if PRECISION == "ieee":
            z += tl.sum(w * x[None, :], axis=1)
        else:
            # Tensor cores, so that factors are rounded as in `encode`. They take 16 rows: these are all the same one.
            acc = tl.dot(tl.broadcast_to(x[None, :], [16, BLOCK_D]), w.T, acc, input_precision=PRECISION)
    if PRECISION != "ieee":
        z = tl.max(acc, axis=0)
    z += tl.load(bias_ptr + features, mask=valid, other=0.0)
    return tl.where(valid & (z > 0), z, 0.0)


@triton.jit
def repair_kernel(
    x_ptr, w_ptr, bias_ptr, bound_ptr, failed_ptr, n_failed_ptr,  # as in encode and select
    values_ptr, indices_ptr, counts_ptr,  # [N, C], [N, C], [N]: read and written
    F, SPAN, C, MOST_FAILED,
    stride_xn, stride_wf,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    n_failed = tl.load(n_failed_ptr + n)
    if (n_failed > 0) & (n_failed <= MOST_FAILED):
        bound = tl.load(bound_ptr + n)
        found = tl.load(counts_ptr + n)
        i = 0
        while i < n_failed:
            group = tl.load(failed_ptr + n * MOST_FAILED + i)
            features = feature_of(group, tl.arange(0, 32), SPAN)
            z = one_group(x_ptr + n * stride_xn, w_ptr, bias_ptr, features, features < F, stride_wf,
                          D, PRECISION, BLOCK_D)
            take = ((z >= bound) & (z > 0)).to(tl.int32)
            slot = found + tl.cumsum(take, axis=0) - take
            fits = (take > 0) & (slot < C)
            tl.store(values_ptr + n * C + slot, z, mask=fits)
            tl.store(indices_ptr + n * C + slot, features, mask=fits)
            found += tl.sum(take, axis=0)
            i += 1
        tl.store(counts_ptr + n, found)


def repair(x: Tensor, weight: Tensor, bias: Tensor, groups: Groups, bound: Tensor, found: Found) -> None:
    """Adds the entries ≥ bound of all failed groups to found, in place. Reads 32 D elements of weight for each."""
    (N, D), F = x.shape, weight.shape[0]
    with torch.cuda.device_of(x):
        repair_kernel[(N,)](
            x, weight, bias, bound, found.failed, found.n_failed,
            found.values, found.indices, found.counts,
            F, groups.span, found.values.shape[1], found.failed.shape[1], x.stride(0), weight.stride(0),
            D=D, PRECISION=input_precision(x.dtype), BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )
