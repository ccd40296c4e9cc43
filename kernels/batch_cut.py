"""Batch_cut: where BatchTopK's choice ends, the N · K largest entries of a batch, exactly and without the host.

All positive entries stand in one order: larger values first, of equal ones those of earlier positions n · F + f. `find`
looks for the last that is chosen, digit by digit from the top: of the entries that agree with the digits found so far
it counts how many have which next digit, and the digit is that of the bin in which the last chosen one falls. First
three digits of the value's bits (positive floats order as those do), then the position's, for which there is nothing to
do unless some of the entries that equal the last value are left out.

    cut = (bits, position) of the last:  an entry is chosen if bits(z) > cut[0], or = cut[0] and its position ≤ cut[1]

Entries come from the slots of `select`, 8 N C bytes a digit; of rows that did not fit there from all features, made
as in `dense_rows`, with the same bits. Atomics on integers only: the same cut always.

N tokens, F dictionary size, D model width, C slots of a row, J rows without slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels import dense_rows
from fastsae.kernels.dense_rows import Listed, tile_of_code
from fastsae.kernels.select import is_chosen

DIGIT_BITS = 11  # three digits hold the 31 bits of a positive float, or 8 G positions
VALUE_DIGITS = 3
SLOTS_BLOCK, SLOTS_BLOCKS, SLOTS_WARPS = 1024, 4, 8  # one program counts that many blocks of slots
KEEP_BLOCK, KEEP_WARPS = 256, 2
NARROW_WARPS = 8
# state [4] int64: value's and position's digits so far, entries that are certainly chosen, and whether all those are
# chosen that equal the value.
TAKEN = tl.constexpr(2)
SETTLED = tl.constexpr(3)
ANYWHERE = tl.constexpr((1 << 63) - 1)  # the position where all are chosen that equal the value


@triton.jit
def next_digit(value, position, valid, state_ptr, level, shift, BITS: tl.constexpr):
    """The bin of each entry in the order of the choice, and whether it agrees with the digits so far.

    level: 0 for digits of the value, 1 for digits of the position.
    """
    bits = value.to(tl.int32, bitcast=True).to(tl.int64)
    last = tl.load(state_ptr)
    same = tl.where(level > 0, bits, last) == last
    key = tl.where(level > 0, position, bits)
    digit = ((key >> shift) & (2**BITS - 1)).to(tl.int32)
    agrees = (key >> (shift + BITS)) == tl.load(state_ptr + level)
    return tl.where(level > 0, digit, 2**BITS - 1 - digit), valid & same & agrees


@triton.jit
def is_settled(state_ptr, level):
    return tl.where(level > 0, tl.load(state_ptr + SETTLED), 0) > 0


@triton.jit(do_not_specialize=["level", "shift"])
def count_slots_kernel(
    values_ptr, indices_ptr, state_ptr, histogram_ptr,  # [N, C] flat, [N, C] flat, [4], [2 ** BITS]: added to
    M, C, F, level, shift,  # M = N · C
    BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    if not is_settled(state_ptr, level):
        counts = tl.zeros([2**BITS], dtype=tl.int32)
        at = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS + tl.arange(0, BLOCK)
        for _ in range(BLOCKS):
            value = tl.load(values_ptr + at, mask=at < M, other=0.0)
            feature = tl.load(indices_ptr + at, mask=at < tl.where(level > 0, M, 0), other=0)
            position = (at // C) * F + feature
            digit, agrees = next_digit(value, position, value > 0, state_ptr, level, shift, BITS)
            counts += tl.histogram(digit, 2**BITS, mask=agrees)
            at += BLOCK
        tl.atomic_add(histogram_ptr + tl.arange(0, 2**BITS), counts.to(tl.int64), mask=counts > 0)


@triton.jit(do_not_specialize=["level", "shift"])
def count_rows_kernel(
    list_ptr, n_list_ptr, x_ptr, w_ptr, bias_ptr, bound_ptr,  # as in dense_rows and select
    state_ptr, histogram_ptr,  # [4], [2 ** BITS]: added to
    F, tiles, level, shift, stride_xn, stride_wf,
    BITS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):
    n_list = tl.load(n_list_ptr)
    n_list = tl.where(is_settled(state_ptr, level), 0, n_list)
    bound = tl.load(bound_ptr)
    blocks_f = tl.cdiv(F, BLOCK_F)
    tile = tl.program_id(0)
    while (tile < tiles) & ((tile // blocks_f) * BLOCK_N < n_list):
        at = (tile // blocks_f) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = tl.load(list_ptr + tl.where(at < n_list, at, 0))
        f = (tile % blocks_f) * BLOCK_F + tl.arange(0, BLOCK_F)
        features = tl.where(f < F, f, 0)
        z, _ = tile_of_code(x_ptr, w_ptr, bias_ptr, bias_ptr, state_ptr, rows, features,
                            (at < n_list)[:, None] & (f < F)[None, :], F, stride_xn, stride_wf, False, False,
                            D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
        position = rows.to(tl.int64)[:, None] * F + features[None, :]
        # What slots hold is no less than the bound either.
        digit, agrees = next_digit(z, position, (z > 0) & (z >= bound), state_ptr, level, shift, BITS)
        tl.atomic_add(histogram_ptr + digit, agrees.to(tl.int64), mask=agrees)
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["level"])
def narrow_kernel(histogram_ptr, state_ptr, total, level, BITS: tl.constexpr):  # [2 ** BITS], [4]
    """Finds the digit, adds it to the state, and empties the histogram."""
    bins = tl.arange(0, 2**BITS)
    counts = tl.load(histogram_ptr + bins)
    taken = tl.load(state_ptr + TAKEN)
    settled = is_settled(state_ptr, level)
    wanted = tl.minimum(total - taken, tl.sum(counts, axis=0))  # where there are fewer, the last of all is the last
    digit = tl.sum((tl.cumsum(counts, axis=0) < wanted).to(tl.int32), axis=0)
    before = tl.sum(tl.where(bins < digit, counts, 0), axis=0)
    within = tl.sum(tl.where(bins == digit, counts, 0), axis=0)
    digit = tl.where(level > 0, digit, 2**BITS - 1 - digit).to(tl.int64)
    number = (tl.load(state_ptr + level) << BITS) | digit
    # Where there is nothing positive, all digits are the highest: no value is above that.
    number = tl.where(level > 0, tl.where(settled, ANYWHERE, number), tl.minimum(number, 0x7FFFFFFF))
    tl.store(state_ptr + level, number)
    tl.store(state_ptr + TAKEN, taken + before)
    tl.store(state_ptr + SETTLED, tl.where(level > 0, settled, within == wanted - before).to(tl.int64))
    tl.store(histogram_ptr + bins, tl.zeros([2**BITS], dtype=tl.int64))  # after the sums, for which all threads wait


@triton.jit
def keep_kernel(
    found_ptr, features_ptr, n_found_ptr, cut_ptr,  # [N, C], [N, C], [N], [2]
    values_ptr, indices_ptr, counts_ptr,  # [N, C], [N, C], [N]
    C, F,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    number = tl.load(n_found_ptr + n)
    kept, start = 0, 0
    while start < number:
        slot = start + tl.arange(0, BLOCK)
        value = tl.load(found_ptr + n * C + slot, mask=slot < number, other=0.0)
        feature = tl.load(features_ptr + n * C + slot, mask=slot < number, other=0)
        chosen = (value > 0) & is_chosen(value, n * F + feature, cut_ptr)
        take = chosen.to(tl.int32)
        at = n * C + kept + tl.cumsum(take, axis=0) - take
        tl.store(values_ptr + at, value, mask=chosen)
        tl.store(indices_ptr + at, feature, mask=chosen)
        kept += tl.sum(take, axis=0)
        start += BLOCK
    tl.store(counts_ptr + n, kept)


class Rows(NamedTuple):
    """Rows without slots: which, what their entries are made of (as for `encode`), and the bound [N] of what counts."""

    these: Listed
    x: Tensor
    weight: Tensor
    bias: Tensor
    bound: Tensor


def nothing(device: torch.device) -> Tensor:
    """The cut of a batch without positive entries, whose value is a NaN."""
    return torch.full((2,), 0x7FFFFFFF, dtype=torch.int64, device=device)


def find(values: Tensor, indices: Tensor, total: int, d_sae: int, rest: Rows | None = None) -> Tensor:
    """cut [2] int64 of the `total` largest positive entries; where there are fewer, of all of them.

    values, indices: [N, C], unused slots and the rows of rest 0. cut[0] is the least chosen value's bits, a NaN's
    where nothing is positive. Does not wait for the device.
    """
    N, C = values.shape
    state = torch.zeros(4, dtype=torch.int64, device=values.device)
    histogram = torch.zeros(2**DIGIT_BITS, dtype=torch.int64, device=values.device)
    position_digits = triton.cdiv((N * d_sae - 1).bit_length(), DIGIT_BITS)
    digits = [(0, i) for i in range(VALUE_DIGITS)] + [(1, i) for i in range(position_digits)]
    programs = triton.cdiv(N * C, SLOTS_BLOCK * SLOTS_BLOCKS)
    with torch.cuda.device_of(values):
        for level, i in digits:
            shift = DIGIT_BITS * ((position_digits if level else VALUE_DIGITS) - 1 - i)
            count_slots_kernel[(programs,)](
                values, indices, state, histogram, N * C, C, d_sae, level, shift,
                BITS=DIGIT_BITS, BLOCK=SLOTS_BLOCK, BLOCKS=SLOTS_BLOCKS, num_warps=SLOTS_WARPS,
            )
            if rest is not None:
                _count_rows(rest, state, histogram, level, shift)
            narrow_kernel[(1,)](histogram, state, total, level, BITS=DIGIT_BITS, num_warps=NARROW_WARPS)
    return state[:2]


def _count_rows(rest: Rows, state: Tensor, histogram: Tensor, level: int, shift: int) -> None:
    N, F = rest.x.shape[0], rest.weight.shape[0]
    tiles = triton.cdiv(N, dense_rows.BLOCK_N) * triton.cdiv(F, dense_rows.BLOCK_F)
    grid, options = dense_rows.options(rest.x, tiles)
    del options["SLICE"]
    count_rows_kernel[grid](
        *rest.these, rest.x, rest.weight, rest.bias, rest.bound, state, histogram,
        F, tiles, level, shift, rest.x.stride(0), rest.weight.stride(0), BITS=DIGIT_BITS, **options,
    )


def keep(values: Tensor, indices: Tensor, counts: Tensor, cut: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is chosen of values, indices [N, C] and counts [N], in the same order; unused slots hold 0."""
    N, C = values.shape
    kept = torch.zeros_like(values), torch.zeros_like(indices), torch.empty_like(counts)
    with torch.cuda.device_of(values):
        keep_kernel[(N,)](
            values, indices, counts, cut, *kept, C, d_sae, BLOCK=KEEP_BLOCK, num_warps=KEEP_WARPS
        )
    return kept
