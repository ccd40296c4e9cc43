"""Select: from the best of every group (`encode`) to the code, row by row.

A row's entries are those ≥ its bound and > 0. The bound is, by rule: for TopK, the K-th largest maximum of disjoint
sets of groups, which the K-th largest entry cannot lie below; for BatchTopK the same over the batch, from a histogram;
for ReLU and JumpReLU, 0.

The certificate. A group of which all R kept entries reach the bound may hide a further one, because what is hidden is
no larger than the last that was kept; any other group hides nothing that counts. Such groups are listed, and `repair`
computes all their 32 entries. A row with more of them than the list takes, or with more entries than the buffer, is
left to `exact`.

N tokens, F dictionary size, K active per token, G groups, R entries kept of each, C slots of the buffer.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.encode import Groups, feature_of

MOST_SETS = 4096  # maxima of a row that one program holds: 16 registers a thread with 8 warps
BOUND_BITS = 20  # of 31, from the top: the bound is at most 2⁻¹² below what it could be
COLLECT_BLOCK = 1024
HISTOGRAM_BITS = 12  # exponent and four bits of the mantissa: 4096 bins
HISTOGRAM_BLOCK = 1024
HISTOGRAM_WARPS = 8
HISTOGRAM_BLOCKS = 64  # one program counts this many blocks before it adds to the common histogram
COLLECT_WARPS = 4


@triton.jit
def bound_kernel(
    best_ptr, bound_ptr,  # [N, G], [N]
    G, K, stride_bn,
    SETS: tl.constexpr, BITS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, SETS)
    largest = tl.zeros([SETS], dtype=tl.float32)
    start = 0
    while start < G:  # not `for`: Triton's interpreter takes only constants for its bounds
        at = start + offset
        largest = tl.maximum(largest, tl.load(best_ptr + n * stride_bn + at, mask=at < G, other=0.0))
        start += SETS
    # Positive floats order as their bits do: find the K-th largest bit by bit, from the top.
    bits = largest.to(tl.int32, bitcast=True)
    bound = 0
    for i in tl.static_range(BITS):
        trial = bound | (1 << (30 - i))
        enough = tl.sum((bits >= trial).to(tl.int32), axis=0) >= K
        bound = tl.where(enough, trial, bound)
    tl.store(bound_ptr + n, bound.to(tl.float32, bitcast=True))


@triton.jit
def histogram_kernel(
    best_ptr, histogram_ptr,  # [M] flat, [2 ** BITS]
    M,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    counts = tl.zeros([2**BITS], dtype=tl.int32)
    at = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS + tl.arange(0, BLOCK)
    for _ in range(BLOCKS):
        value = tl.load(best_ptr + at, mask=at < M, other=0.0)
        counts += tl.histogram(value.to(tl.int32, bitcast=True) >> (31 - BITS), 2**BITS)
        at += BLOCK
    # Integers: the order in which programs add changes nothing.
    tl.atomic_add(histogram_ptr + tl.arange(0, 2**BITS), counts, mask=counts > 0)


@triton.jit
def collect_kernel(
    best_ptr, place_ptr, bound_ptr,  # [R, N, G], [R, N, G], [N]
    values_ptr, indices_ptr, counts_ptr, failed_ptr, n_failed_ptr,  # [N, C], [N, C], [N], [N, MOST_FAILED], [N]
    G, SPAN, C, MOST_FAILED,
    stride_br, stride_bn,
    R: tl.constexpr, BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    bound = tl.load(bound_ptr + n)
    found, n_failed, start = 0, 0, 0
    while start < G:
        group = start + tl.arange(0, BLOCK)
        at = n * stride_bn + group
        number = tl.zeros([BLOCK], dtype=tl.int32)
        for _ in tl.static_range(R - 1):
            value = tl.load(best_ptr + at, mask=group < G, other=0.0)
            number += ((value >= bound) & (value > 0)).to(tl.int32)
            at += stride_br  # not r * stride_br, a product in 32 bits where the stride alone fits
        last = tl.load(best_ptr + at, mask=group < G, other=0.0)
        failed = ((last >= bound) & (last > 0)).to(tl.int32)
        number = tl.where(failed > 0, 0, number)
        # One scan for both: a block has at most BLOCK · R < 2¹⁶ entries.
        both = number + (failed << 16)
        before = tl.cumsum(both, axis=0) - both
        slot = found + (before & 0xFFFF)
        at = n * stride_bn + group
        for r in tl.static_range(R - 1):
            # Entries of a group descend, so those that count come first.
            take = (r < number) & (slot + r < C)
            value = tl.load(best_ptr + at, mask=take, other=0.0)
            place = tl.load(place_ptr + at, mask=take, other=0).to(tl.int32)
            tl.store(values_ptr + n * C + slot + r, value, mask=take)
            tl.store(indices_ptr + n * C + slot + r, feature_of(group, place, SPAN), mask=take)
            at += stride_br
        list_slot = n_failed + (before >> 16)
        tl.store(failed_ptr + n * MOST_FAILED + list_slot, group, mask=(failed > 0) & (list_slot < MOST_FAILED))
        total = tl.sum(both, axis=0)
        found += total & 0xFFFF
        n_failed += total >> 16
        start += BLOCK
    tl.store(counts_ptr + n, found)
    tl.store(n_failed_ptr + n, n_failed)


@triton.jit
def is_open(n, n_found_ptr, n_failed_ptr, C, MOST_FAILED):
    """Whether row n has more entries or more failed groups than there is room for, and is left to `exact`."""
    return (tl.load(n_found_ptr + n) > C) | (tl.load(n_failed_ptr + n) > MOST_FAILED)


@triton.jit
def order_key(value, feature):
    """int64 that orders entries by value, then by lower feature; 0 for what is not positive."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(value > 0, (bits << 32) | (0x7FFFFFFF - feature.to(tl.int64)), 0)


@triton.jit
def is_chosen(value, position, cut_ptr):
    """Whether positive entries come no later in BatchTopK's order than its last one (`batch_cut`)."""
    bits, last = value.to(tl.int32, bitcast=True), tl.load(cut_ptr).to(tl.int32)
    return (bits > last) | ((bits == last) & (position <= tl.load(cut_ptr + 1)))


@triton.jit
def write_best(keys, keep, n, values_ptr, indices_ptr, fired_ptr, SLOTS, HAS_FIRED: tl.constexpr, C: tl.constexpr):
    """The first `keep` of descending keys [C] into row n of [N, SLOTS]; the rest of the row becomes 0."""
    slot = tl.arange(0, C)
    used = (slot < keep) & (slot < SLOTS)
    value = tl.where(used, (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    feature = tl.where(used, (0x7FFFFFFF - (keys & 0x7FFFFFFF)).to(tl.int32), 0)
    tl.store(values_ptr + n * SLOTS + slot, value, mask=slot < SLOTS)
    tl.store(indices_ptr + n * SLOTS + slot, feature, mask=slot < SLOTS)
    if HAS_FIRED:
        tl.atomic_add(fired_ptr + feature, 1, mask=used)


@triton.jit
def finish_kernel(
    found_ptr, features_ptr, n_found_ptr, n_failed_ptr,  # [N, C], [N, C], [N], [N]
    values_ptr, indices_ptr, counts_ptr, fired_ptr,  # [N, K], [N, K], [N], [F] or anything
    K, MOST_FAILED,
    HAS_FIRED: tl.constexpr, C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if not is_open(n, n_found_ptr, n_failed_ptr, C, MOST_FAILED):
        number = tl.load(n_found_ptr + n)
        slot = tl.arange(0, C)
        value = tl.load(found_ptr + n * C + slot, mask=slot < number, other=0.0)
        feature = tl.load(features_ptr + n * C + slot, mask=slot < number, other=0)
        keys = tl.sort(order_key(value, feature), descending=True)
        keep = tl.minimum(K, number)
        write_best(keys, keep, n, values_ptr, indices_ptr, fired_ptr, K, HAS_FIRED, C)
        tl.store(counts_ptr + n, keep)


def bound_warps(sets: int) -> int:
    return max(1, min(8, sets // 512))


def finish_warps(slots: int) -> int:
    return max(1, min(8, slots // 128))


class Found(NamedTuple):
    """Entries ≥ bound of each row, in no order: values, indices [N, C]; counts [N], how many there are, which may be
    more than C; failed [N, MOST_FAILED] groups that hide entries, n_failed [N], how many, which may be more."""

    values: Tensor
    indices: Tensor
    counts: Tensor
    failed: Tensor
    n_failed: Tensor


def row_bound(groups: Groups, k: int) -> Tensor:
    """[N] fp32: at most the k-th largest entry of each row, and close to it where groups are many."""
    _, N, G = groups.best.shape
    bound = torch.empty(N, dtype=torch.float32, device=groups.best.device)
    sets = min(triton.next_power_of_2(G), MOST_SETS)
    if sets < k:
        return bound.zero_()
    with torch.cuda.device_of(bound):
        bound_kernel[(N,)](
            groups.best, bound, G, k, groups.best.stride(1),
            SETS=sets, BITS=BOUND_BITS, num_warps=bound_warps(sets),
        )
    return bound


def batch_bound(groups: Groups, total: int) -> Tensor:
    """[N] fp32, all equal: at most the total-th largest entry of the batch, and within 1/16 of it if R suffices."""
    best = groups.best
    histogram = torch.zeros(2**HISTOGRAM_BITS, dtype=torch.int32, device=best.device)
    programs = triton.cdiv(best.numel(), HISTOGRAM_BLOCK * HISTOGRAM_BLOCKS)
    with torch.cuda.device_of(best):
        histogram_kernel[(programs,)](
            best, histogram, best.numel(),
            BITS=HISTOGRAM_BITS, BLOCK=HISTOGRAM_BLOCK, BLOCKS=HISTOGRAM_BLOCKS, num_warps=HISTOGRAM_WARPS,
        )
    from_top = histogram.flip(0).cumsum(0)
    # The highest bin at whose lower edge there are enough entries; 0, all that is positive, where there never are.
    bins = (2**HISTOGRAM_BITS - 1 - (from_top < total).sum()).clamp_min(0)
    bound = (bins << (31 - HISTOGRAM_BITS)).to(torch.int32).view(torch.float32)
    return bound.expand(best.shape[1]).contiguous()


def collect(groups: Groups, bound: Tensor, slots: int, most_failed: int) -> Found:
    """The entries ≥ bound of groups that hide none, and a list of those that may. Buffers start at 0."""
    R, N, G = groups.best.shape
    device = groups.best.device
    found = Found(
        torch.zeros(N, slots, dtype=torch.float32, device=device),
        torch.zeros(N, slots, dtype=torch.int32, device=device),
        torch.empty(N, dtype=torch.int32, device=device),
        torch.empty(N, most_failed, dtype=torch.int32, device=device),
        torch.empty(N, dtype=torch.int32, device=device),
    )
    block = min(triton.next_power_of_2(G), COLLECT_BLOCK)
    with torch.cuda.device_of(bound):
        collect_kernel[(N,)](
            groups.best, groups.place, bound, *found, G, groups.span, slots, most_failed,
            groups.best.stride(0), groups.best.stride(1),
            R=R, BLOCK=block, num_warps=COLLECT_WARPS,
        )
    return found


def finish(found: Found, k: int, fired: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of each row: values, indices [N, k] descending, and counts [N]; of equal ones the lower features.

    Adds to fired [F] int32. Rows that are left to `exact` are not written. C must be a power of two, C ≥ k.
    """
    N, C = found.values.shape
    values, indices = found.values.new_empty(N, k), found.indices.new_empty(N, k)
    counts = torch.empty_like(found.counts)
    with torch.cuda.device_of(values):
        finish_kernel[(N,)](
            found.values, found.indices, found.counts, found.n_failed,
            values, indices, counts, counts if fired is None else fired,
            k, found.failed.shape[1],
            HAS_FIRED=fired is not None, C=C, num_warps=finish_warps(C),
        )
    return values, indices, counts
