"""The fast path in Triton kernels: the encoder of `cpu`, for CUDA tensors, and for CPU tensors in Triton's interpreter.

Each rule runs the same kernels: `encode` leaves the best of every group of 32 features, `select` keeps what reaches a
row's bound and lists the groups that may hide more, `repair` computes those; for BatchTopK `batch_cut` finds where the
choice ends. Nothing here is [N, F], nothing has a gradient; `fastsae.ops` and `fastsae.autoencode` put forward and
backward together.

Axes: N tokens, K active latents per token, F dictionary size, D width, G = ⌈F / 32⌉ groups, C slots of a row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsae.capacity import Capacity
from fastsae.errors import DataError
from fastsae.kernels import batch_cut, dense_rows, encode, exact, repair, select

Encoder = Literal["auto", "fused", "chunked"]

# A row's k largest are sorted in one program; the sort of more would not fit its registers.
MOST_K = exact.MOST_K
# Failed groups of a row that are repaired. A row of more takes `exact` (TopK) or a longer list (the other rules).
MOST_FAILED = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Effort(NamedTuple):
    """What the exactness of a TopK code cost: failed [N], groups of each row that failed their certificate; and
    open [N] bool, rows that were computed from all features. For measurements."""

    failed: Tensor
    open: Tensor


class TopK(NamedTuple):
    """values [N, k] fp32 descending, indices [N, k] int32, counts [N] int32: the slots in use; the others hold 0."""

    values: Tensor
    indices: Tensor
    counts: Tensor
    effort: Effort


class Above(NamedTuple):
    """values [N, C] fp32, indices [N, C] int32, counts [N] int32, of which C is the largest; unused slots hold 0."""

    values: Tensor
    indices: Tensor
    counts: Tensor


def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels take CPU tensors."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(encode.encode_kernel, InterpretedFunction)


def kept_per_group(k: int, d_sae: int) -> int:
    """r: how many entries of each group the encoder keeps, so that few groups fail their certificate.

    k entries fall into G groups; that r or more meet in one is rare where G is much more than k. At N tokens a further
    one costs 5 N G bytes written and read, a failed group 32 D elements of the weights.
    """
    groups = -(-d_sae // encode.GROUP)
    return 2 if groups >= 256 * k else 3 if groups >= 32 * k else 4


def slots_for(k: int) -> int:
    """C: a power of two with room for k entries, those between the bound and the k-th, and some ties."""
    return 1 << max(2 * k + 63, 127).bit_length()


def encode_topk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None,
    *, encoder: Encoder = "auto", fired: Tensor | None = None,
) -> TopK:
    """The k largest positive entries of each row of (x − centre) · weightᵀ + bias; of equal ones the lower features.

    x: [N, D], weight: [F, D], bias: [F], centre: [D], of one dtype; 1 ≤ k ≤ min(F, MOST_K). fired: [F] int32, to which
    the number of rows in which each latent was chosen is added. Does not wait for the device.
    """
    x, weight, bias = _operands(x, weight, bias, centre)
    if x.shape[0] == 0:
        nothing = _nothing(x.device, k)
        return TopK(*nothing, Effort(nothing.counts, nothing.counts.bool()))
    groups = _groups(x, weight, bias, kept_per_group(k, weight.shape[0]), encoder)
    bound = select.row_bound(groups, k)
    slots = slots_for(k)
    found = select.collect(groups, bound, slots, MOST_FAILED)
    repair.repair(x, weight, bias, groups, bound, found)
    values, indices, counts = select.finish(found, k, fired)
    exact.exact_topk(x, weight, bias, found, values, indices, counts, fired)
    is_open = (found.counts > slots) | (found.n_failed > MOST_FAILED)
    return TopK(values, indices, counts, Effort(found.n_failed, is_open))


def encode_above(
    x: Tensor, weight: Tensor, bias: Tensor, most: int, centre: Tensor | None = None,
    *, encoder: Encoder = "auto", capacity: Capacity | None = None,
) -> Above | None:
    """All positive entries of (x − centre) · weightᵀ + bias; None where a row has more than `most` of them.

    For ReLU; for JumpReLU with −θ + bandwidth / 2 in the bias, when values are margins. Waits for the device, to learn
    whether there were slots enough: where not, the groups, which are kept, are collected again. capacity: where it
    starts from, and where it leaves what it needed. Entries of a row are in no order.
    """
    x, weight, bias = _operands(x, weight, bias, centre)
    if x.shape[0] == 0:
        return _nothing(x.device, 0)
    groups = _groups(x, weight, bias, 4, encoder)
    bound = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    return _all_above(x, weight, bias, groups, bound, capacity or Capacity(), most)


class Open(NamedTuple):
    """As Above, for the rows that fitted into the slots; and is_open [N] bool, the others, of which counts are 0.

    cut [2] int64: of BatchTopK, where its choice ends, in rows of either kind (`kernels.batch_cut`).
    """

    values: Tensor
    indices: Tensor
    counts: Tensor
    is_open: Tensor
    cut: Tensor | None = None


def encode_open(
    x: Tensor, weight: Tensor, bias: Tensor, most: int, capacity: Capacity, *, encoder: Encoder = "auto"
) -> Open | None:
    """As encode_above, but does not wait for the device: rows that need more room than there is are left open.

    The room is what calls before this one needed, so there are such rows where the code suddenly becomes denser; the
    next calls have more. None where calls before this one needed more than `most`. The very first call waits, to learn
    what there is to know, unless a CUDA graph is being captured.
    """
    capacity.update()
    if capacity.needed is not None and capacity.needed > most:
        return None
    x, weight, bias = _operands(x, weight, bias, None)
    if x.shape[0] == 0:
        nothing = _nothing(x.device, 0)
        return Open(*nothing, nothing.counts.bool())
    groups = _groups(x, weight, bias, 4, encoder)
    bound = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    if _may_learn(capacity, x) and _all_above(x, weight, bias, groups, bound, capacity, most) is None:
        capacity.needed = most + 1
        return None
    return _leaving_open(x, weight, bias, groups, bound, capacity, most)


def encode_batchtopk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None,
    *, encoder: Encoder = "auto", capacity: Capacity | None = None,
) -> Above:
    """The N · k largest positive entries of (x − centre) · weightᵀ + bias, however many a row has of them.

    Of equal ones those of the first row, then of the lower feature. Entries of a row are in no order. Waits for the
    device, and uses capacity, as encode_above does.
    """
    x, weight, bias = _operands(x, weight, bias, centre)
    N, F = x.shape[0], weight.shape[0]
    if N == 0:
        return _nothing(x.device, 0)
    groups = _groups(x, weight, bias, kept_per_group(k, F), encoder)
    bound = select.batch_bound(groups, N * k)
    above = _all_above(x, weight, bias, groups, bound, capacity or Capacity(4 * k), F)
    assert above is not None
    cut = batch_cut.find(above.values, above.indices, N * k, F)
    values, indices, counts = batch_cut.keep(*above, cut, F)
    slots = int(counts.max())
    return Above(values[:, :slots].contiguous(), indices[:, :slots].contiguous(), counts)


def encode_batchtopk_open(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, capacity: Capacity, *, encoder: Encoder = "auto"
) -> Open:
    """As encode_batchtopk, but does not wait for the device: rows that need more room than there is are left open.

    As in encode_open. A row never gets more than F / 8 slots, or 8 k where that is more: among N rows at most about
    8 k / F · N need that many, and stay open.
    """
    capacity.update()
    x, weight, bias = _operands(x, weight, bias, None)
    N, F = x.shape[0], weight.shape[0]
    if N == 0:
        nothing = _nothing(x.device, 0)
        return Open(*nothing, nothing.counts.bool(), batch_cut.nothing(x.device))
    most = min(F, max(8 * k, F // 8))
    groups = _groups(x, weight, bias, kept_per_group(k, F), encoder)
    bound = select.batch_bound(groups, N * k)
    if _may_learn(capacity, x) and _all_above(x, weight, bias, groups, bound, capacity, most) is None:
        capacity.fit(most, None)
    found = _leaving_open(x, weight, bias, groups, bound, capacity, most)
    rest = batch_cut.Rows(dense_rows.listed(found.is_open), x, weight, bias, bound)
    cut = batch_cut.find(found.values, found.indices, N * k, F, rest)
    return Open(*batch_cut.keep(found.values, found.indices, found.counts, cut, F), found.is_open, cut)


def _operands(
    x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x − centre and weight with contiguous rows, which kernels take for granted, and the bias in fp32."""
    x = x if centre is None else x - centre
    x, weight = (t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in (x, weight))
    return x, weight, bias.float().contiguous()


def _nothing(device: torch.device, slots: int) -> Above:
    empty = torch.zeros(0, slots, device=device)
    return Above(empty, empty.int(), torch.zeros(0, dtype=torch.int32, device=device))


def _groups(x: Tensor, weight: Tensor, bias: Tensor, r: int, encoder: Encoder) -> encode.Groups:
    fits = encode.fits_fused(x, weight)
    if encoder == "fused" and not fits:
        raise DataError(
            f"encoder='fused' needs rows that lie multiples of 16 elements apart, and the first at one of 16 bytes; "
            f"got x with stride {x.stride(0)} and weight with {weight.stride(0)}; use encoder='auto' or 'chunked'"
        )
    # Without tensor cores (float32 at "highest" precision) cuBLAS is the better product by far.
    fused = fits and (x.device.type != "cuda" or encode.product_kind(x.dtype) != "ieee")
    if encoder == "fused" or (encoder == "auto" and fused):
        return encode.encode_fused(x, weight, bias, r)
    return encode.encode_chunked(x, weight, bias, r)


def _all_above(
    x: Tensor, weight: Tensor, bias: Tensor, groups: encode.Groups, bound: Tensor, capacity: Capacity, most: int
) -> Above | None:
    """The entries ≥ bound and > 0 in as many slots as the fullest row needs; None where one needs more than `most`."""
    r = groups.best.shape[0]
    while True:
        slots = min(capacity.slots, most)
        found = select.collect(groups, bound, slots, capacity.groups)
        # Two numbers are waited for before the repair, so that a dense code, of which nearly all groups fail, is not
        # computed group by group: a failed group has r entries at least.
        least, failed = torch.stack([(found.counts + r * found.n_failed).max(), found.n_failed.max()]).tolist()
        if least > most:
            return None
        if least > slots or failed > capacity.groups:
            capacity.fit(least, failed)
            continue
        repair.repair(x, weight, bias, groups, bound, found)
        needed = int(found.counts.max())
        if needed > most:
            return None
        capacity.fit(needed, failed)
        if needed <= slots:
            return Above(found.values[:, :needed].contiguous(), found.indices[:, :needed].contiguous(), found.counts)


def _may_learn(capacity: Capacity, x: Tensor) -> bool:
    """Whether nothing is known of a caller's codes yet, and the device may be waited for."""
    return capacity.needed is None and not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _leaving_open(
    x: Tensor, weight: Tensor, bias: Tensor, groups: encode.Groups, bound: Tensor, capacity: Capacity, most: int
) -> Open:
    """The entries ≥ bound and > 0 of the rows for which there is room, without waiting."""
    slots = min(capacity.slots, most)
    found = select.collect(groups, bound, slots, capacity.groups)
    repair.repair(x, weight, bias, groups, bound, found)
    many = found.n_failed > capacity.groups  # these are not repaired, and a failed group has r entries at least
    least = torch.where(many, found.counts + groups.best.shape[0] * found.n_failed, found.counts)
    is_open = least > slots
    capacity.send(least.max(), found.n_failed.max())
    is_open |= many
    values, indices = (t.masked_fill_(is_open[:, None], 0) for t in (found.values, found.indices))
    return Open(values, indices, found.counts.masked_fill(is_open, 0), is_open)
