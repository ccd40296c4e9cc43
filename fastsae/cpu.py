"""The fast path in torch operations: what runs on a CPU, and on any device that has no kernels of ours.

Nothing here is [N, F]: the encoder's product is made in chunks of features, into one buffer that is used again and
stays in the cache, and what may be active is picked out of each chunk before the next overwrites it. Nothing here has a
gradient; `fastsae.ops` puts forward and backward together.

Axes: N tokens, K active latents per token, F dictionary size, D width; R rows and C features of a chunk, M entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastsae.codes import pack_rows

# Pre-activations in the buffer, where columns are cut: 16 MB in fp32. Half and double of it time the same.
CHUNK_ELEMENTS = 1 << 22
# Where rows are cut, all weights are brought into the cache for every chunk, which larger ones make rarer.
ROW_CHUNK_ELEMENTS = 1 << 23
CHUNK_ROWS = 8192
# A chunk is a sixth of all pre-activations at most, so that no tensor comes near [N, F], however small N · F is.
CHUNKS = 6
# Fewer rows than this, and the product spends its time on bringing the weights into the cache.
LEAST_ROWS = 256
# Features whose largest entry stands for them all when entries above a threshold are searched.
GROUP = 16


class Chunk(NamedTuple):
    """Pre-activations of columns start : stop, for some rows: pre [R, C], which the next chunk overwrites."""

    start: int
    stop: int
    pre: Tensor


def chunks(x: Tensor, weight: Tensor, bias: Tensor, width: int) -> Iterator[Chunk]:
    """x · weightᵀ + bias [R, F], `width` columns at a time, always in the same buffer."""
    R, F = x.shape[0], weight.shape[0]
    buffer = x.new_empty(R * min(width, F))
    for start in range(0, F, width):
        stop = min(start + width, F)
        pre = buffer[: R * (stop - start)].view(R, stop - start)
        # The out= form is not autocast, so the product is made in the dtype of the parameters under autocast too.
        torch.addmm(bias[start:stop], x, weight[start:stop].T, out=pre)
        yield Chunk(start, stop, pre)


def by_columns(n_rows: int, d_sae: int) -> tuple[int, int]:
    """Rows and columns of a chunk where columns are cheap to cut: all rows, up to CHUNK_ROWS, and the columns that fit.

    This makes the product fastest: a slice of the weights is brought into the cache once for many rows.
    """
    rows = max(1, min(n_rows, CHUNK_ROWS))
    columns = min(CHUNK_ELEMENTS // rows, -(-d_sae // CHUNKS))
    return rows, min(max(-(-columns // GROUP) * GROUP, 64), d_sae)


def by_rows(n_rows: int, d_sae: int) -> tuple[int, int]:
    """Rows and columns of a chunk where columns are costly to cut: all columns, if enough rows of them fit."""
    rows = max(1, min(ROW_CHUNK_ELEMENTS // d_sae, -(-n_rows // CHUNKS)))
    return (rows, d_sae) if rows >= LEAST_ROWS else by_columns(n_rows, d_sae)


class Entries(NamedTuple):
    """Entries of a chunk: row, feature [M] int64 and value [M], ordered by row."""

    row: Tensor
    feature: Tensor
    value: Tensor


def _grouped(chunk: Chunk, least_groups: int = 1) -> Tensor:
    """chunk.pre as [R, G, C / G]: G ≤ GROUP columns that lie C / G apart are a group; at least least_groups of them.

    Apart, not side by side: the largest of each group is then a maximum of whole rows, which vector units do.
    """
    C = chunk.pre.shape[1]
    size = GROUP
    while C % size or (size > 1 and C // size < least_groups):
        size //= 2
    return chunk.pre.view(chunk.pre.shape[0], size, C // size)


def _maxima(grouped: Tensor) -> Tensor:
    """The largest of each group of grouped [R, G, S], NaN aside: [R, S]. NaN is nobody's value and hides no neighbour:
    it is overwritten."""
    largest = grouped.amax(1)
    if bool(torch.isnan(largest.sum())):
        largest = grouped.masked_fill_(torch.isnan(grouped), float("-inf")).amax(1)
    return largest


def _above(grouped: Tensor, largest: Tensor, threshold: Tensor | None, start: int) -> Entries:
    """The entries > threshold [R, 1], or > 0, of grouped [R, G, S]; largest [R, S] is its maximum over G."""
    _, G, S = grouped.shape
    row, group = (largest > (0 if threshold is None else threshold)).nonzero(as_tuple=True)
    among = grouped[row, :, group]  # [groups, G]
    hit, member = (among > (0 if threshold is None else threshold[row])).nonzero(as_tuple=True)
    return Entries(row[hit], group[hit] + (member * S + start), among[hit, member])


# --- TopK -----------------------------------------------------------------------------------------------------------


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest positive entries of each row of (x − centre) · weightᵀ + bias: values and indices [N, k].

    Values in descending order, of equal ones the lower feature is chosen; rows with fewer than k positive entries end
    in slots of value 0 and index 0. x: [N, D], weight: [F, D], bias: [F], centre: [D]; 1 ≤ k ≤ F. Exact for the product
    as computed.
    """
    N = x.shape[0]
    values, indices = x.new_zeros(N, k), torch.zeros(N, k, dtype=torch.int64, device=x.device)
    rows, columns = by_rows(N, weight.shape[0])
    for first in range(0, N, rows):
        part = slice(first, min(first + rows, N))
        block = x[part] if centre is None else x[part] - centre
        values[part], indices[part] = _topk_of_rows(chunks(block, weight, bias, columns), k, weight.shape[0])
    return values, indices


def _topk_of_rows(parts: Iterator[Chunk], k: int, d_sae: int) -> tuple[Tensor, Tensor]:
    """Chunk after chunk, what exceeds the k-th largest entry known so far is kept; now and then it is boiled down to k.

    An entry equal to the known k-th is rightly dropped: k entries at least as large have lower features.
    """
    kept: tuple[Tensor, Tensor] | None = None
    threshold = torch.empty(0)
    pending: list[Entries] = []
    n_pending = seen = 0
    for chunk in parts:
        grouped = _grouped(chunk, least_groups=2 * k)
        largest = _maxima(grouped)
        if chunk.start == 0:
            threshold = _lower_bound(largest, k)
        pending.append(_above(grouped, largest, threshold, chunk.start))
        n_pending += pending[-1].row.numel()
        # Boiling down when twice as many columns have been seen keeps both the candidates and these passes few.
        if chunk.stop >= 2 * seen or n_pending > 4 * k * chunk.pre.shape[0] or chunk.stop == d_sae:
            kept = _best(*_in_slots(kept, pending, chunk.pre.shape[0], k), k)
            threshold = kept[0][:, -1:]
            pending, n_pending, seen = [], 0, chunk.stop
    assert kept is not None
    return kept


def _lower_bound(largest: Tensor, k: int) -> Tensor:
    """[R, 1]: something below the k-th largest entry of each row, and ≥ 0, from the maxima of groups [R, S].

    The k-th largest maximum of any disjoint groups is such a bound; of 4 k groups it lets few entries too many through.
    """
    R, S = largest.shape
    if S < k:
        return largest.new_zeros(R, 1)
    together = S // (4 * k)
    if together > 1:
        largest = largest[:, : together * 4 * k].unflatten(1, (together, 4 * k)).amax(1)
    kth = largest.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    # Below, not equal: entries that equal the bound may have to be chosen, and only what is greater is kept.
    return torch.nextafter(kth, kth.new_tensor(float("-inf"))).clamp_min_(0)


def _in_slots(kept: tuple[Tensor, Tensor] | None, pending: list[Entries], n_rows: int, k: int) -> tuple[Tensor, Tensor]:
    """kept [R, k] and pending entries side by side, as values and indices [R, S ≥ k]."""
    row, feature, value = _together(pending)
    indices, _, slots = pack_rows(row, feature, n_rows, least=0 if kept is not None else k)
    values = value.new_zeros(indices.numel())
    values[slots] = value
    if kept is None:
        return values.view_as(indices), indices
    return torch.cat([kept[0], values.view_as(indices)], 1), torch.cat([kept[1], indices], 1)


def _together(parts: list[Entries]) -> Entries:
    """The entries of several chunks, ordered by row."""
    if len(parts) == 1:
        return parts[0]
    row, feature, value = (torch.cat(column) for column in zip(*parts, strict=True))
    row, order = torch.sort(row.to(torch.int32), stable=True)
    return Entries(row.long(), feature[order], value[order])


def _best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of values [R, S ≥ k] in descending order and their indices; of equal ones the lower index."""
    best, slots = values.topk(k, dim=-1)
    chosen = indices.gather(1, slots)
    # topk breaks ties as it likes. It matters only where more than k entries reach the k-th.
    last = best[:, -1:]
    tied = (((values >= last).sum(-1) > k) & (last[:, 0] > 0)).nonzero().squeeze(1)
    if tied.numel():
        by_feature = indices[tied].argsort(dim=-1)
        v, i = values[tied].gather(1, by_feature), indices[tied].gather(1, by_feature)
        v, order = v.sort(dim=-1, descending=True, stable=True)
        best[tied], chosen[tied] = v[:, :k], i.gather(1, order)[:, :k]
    return best, chosen


# --- ReLU -----------------------------------------------------------------------------------------------------------


def encode_relu(
    x: Tensor, weight: Tensor, bias: Tensor, max_l0: int, centre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Positive entries of (x − centre) · weightᵀ + bias: values, indices [N, K], counts [N]; K is the most of a row.

    None as soon as a row is known to have more than max_l0 of them.
    """
    N = x.shape[0]
    rows, columns = by_columns(N, weight.shape[0])
    found: list[Entries] = []
    for first in range(0, N, rows):
        block = x[first : first + rows] if centre is None else x[first : first + rows] - centre
        counts = torch.zeros(block.shape[0], dtype=torch.int64, device=x.device)
        for chunk in chunks(block, weight, bias, columns):
            grouped = _grouped(chunk)
            entries = _above(grouped, _maxima(grouped), None, chunk.start)
            counts += torch.bincount(entries.row, minlength=block.shape[0])
            if int(counts.max()) > max_l0:
                return None
            found.append(entries._replace(row=entries.row + first))
    if not found:
        return x.new_zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64, device=x.device), x.new_zeros(0).long()
    row, feature, value = _together(found)
    indices, counts, slots = pack_rows(row, feature, N)
    values = x.new_zeros(indices.numel())
    values[slots] = value
    return values.view_as(indices), indices, counts


# --- BatchTopK --------------------------------------------------------------------------------------------------------


def encode_batchtopk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The N · k largest positive entries of (x − centre) · weightᵀ + bias: values, indices [N, K], counts [N].

    Of equal ones those of earlier rows, then of lower features; features ascend within a row. K is the most of a row.
    """
    N, total = x.shape[0], x.shape[0] * k
    if N == 0:
        return x.new_zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64, device=x.device), x.new_zeros(0).long()
    rows, columns = by_columns(N, weight.shape[0])
    threshold = x.new_zeros(())
    pending: list[Entries] = []
    n_pending = 0
    for first in range(0, N, rows):
        block = x[first : first + rows] if centre is None else x[first : first + rows] - centre
        for chunk in chunks(block, weight, bias, columns):
            grouped = _grouped(chunk)
            largest = _maxima(grouped)
            if chunk.start == first == 0:
                threshold = _lower_bound(largest.reshape(1, -1), total)[0, 0]
            entries = _above(grouped, largest, threshold.expand(block.shape[0], 1), chunk.start)
            pending.append(entries._replace(row=entries.row + first))
            n_pending += entries.row.numel()
            if n_pending > 2 * total:
                pending = [_largest(pending, total)]
                # Below, not equal: an entry of a lower feature may yet come, and go before one that equals it.
                threshold = torch.nextafter(pending[0].value.min(), threshold.new_zeros(()))
                n_pending = total
    kept = _largest(pending, total)
    order = (kept.row * weight.shape[0] + kept.feature).argsort()
    row, feature, value = (column[order] for column in kept)
    indices, counts, slots = pack_rows(row, feature, N)
    values = x.new_zeros(indices.numel())
    values[slots] = value
    return values.view_as(indices), indices, counts


def _largest(parts: list[Entries], total: int) -> Entries:
    """The `total` largest of all entries; of equal ones those of earlier rows, then of lower features."""
    row, feature, value = (torch.cat(column) for column in zip(*parts, strict=True))
    if value.numel() <= total:
        return Entries(row, feature, value)
    last = value.topk(total, sorted=False).values.min()
    larger, ties = (value > last).nonzero().squeeze(1), (value == last).nonzero().squeeze(1)
    ties = ties[feature[ties].argsort(stable=True)]
    ties = ties[row[ties].argsort(stable=True)]
    chosen = torch.cat([larger, ties[: total - larger.numel()]])
    return Entries(row[chosen], feature[chosen], value[chosen])


# --- what a code does with matrices -----------------------------------------------------------------------------------


class ByToken(NamedTuple):
    """The used slots of a code, row by row: feature [M] and offsets [N + 1]; slot [M] in the [N·K] code, or None."""

    feature: Tensor
    offsets: Tensor
    slot: Tensor | None

    def of(self, values: Tensor) -> Tensor:
        """The used slots of values [N, K]: [M]."""
        return values.reshape(-1) if self.slot is None else values.reshape(-1)[self.slot]


def by_token(indices: Tensor, counts: Tensor | None) -> ByToken:
    """The used slots of indices [N, K]."""
    N, K = indices.shape
    if counts is None:
        return ByToken(indices.reshape(-1).long(), torch.arange(N + 1, device=indices.device) * K, None)
    slot = (torch.arange(K, device=indices.device) < counts[:, None]).reshape(-1).nonzero().squeeze(1)
    return ByToken(indices.reshape(-1)[slot].long(), nnf.pad(counts.cumsum(0), (1, 0)), slot)


class ByFeature(NamedTuple):
    """The used slots of a code, sorted by feature, then token: feature, token, slot [M] and offsets [F + 1]."""

    feature: Tensor
    token: Tensor
    slot: Tensor
    offsets: Tensor

    def of(self, values: Tensor) -> Tensor:
        """The used slots of values [N, K], in this order: [M]."""
        return values.reshape(-1)[self.slot]


def by_feature(indices: Tensor, counts: Tensor | None, d_sae: int) -> ByFeature:
    """A stable sort of the used slots of indices [N, K] by feature."""
    rows = by_token(indices, counts)
    # 32 bits sort in a third of the time; no dictionary has 2³¹ latents.
    feature, order = torch.sort(rows.feature.to(torch.int32), stable=True)
    slot = order if rows.slot is None else rows.slot[order]
    offsets = nnf.pad(torch.bincount(rows.feature, minlength=d_sae).cumsum(0), (1, 0))
    return ByFeature(feature.long(), slot // max(indices.shape[1], 1), slot, offsets)


def weighted_rows(rows: Tensor, which: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """out[b] = Σ_{offsets[b] ≤ m < offsets[b + 1]} weights[m] · rows[which[m]]: [B, D], rows gathered, summed in fp32.

    rows: [R, D]; which, weights: [M]; offsets: [B + 1].
    """
    if which.numel() == 0:
        return rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    return nnf.embedding_bag(
        which, rows, offsets, mode="sum", per_sample_weights=weights.to(rows.dtype), include_last_offset=True
    )


def paired_dots(left: Tensor, i: Tensor, right: Tensor, j: Tensor) -> Tensor:
    """out[m] = ⟨left[i[m]], right[j[m]]⟩: [M]. i ascends, so that a row of left stays in the cache.

    This is the gradient of an embedding bag for its weights. Torch has it as an operation only in that role, and a
    product of gathered rows moves six times the memory.
    """
    if i.numel() == 0:
        return left.new_zeros(0)
    starts = i.new_zeros(1)  # Read for its dtype only: the bag of each entry is i.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, j, starts, i, 0, -1)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """out[f] = ⟨a[f], b[f]⟩: [F], from a, b [F, D], without the [F, D] product that torch.linalg.vecdot makes."""
    rows = torch.arange(a.shape[0], device=a.device)
    return paired_dots(a, rows, b, rows)
