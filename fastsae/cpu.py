"""The fast path in torch operations: what runs on a CPU, and on any device that has no kernels of ours.

Nothing here is [N, F]: the encoder's product is made in chunks of features, into one buffer that is used again and
stays in the cache, and what may be active is picked out of each chunk before the next overwrites it. Nothing here has a
gradient; `fastsae.ops` puts forward and backward together.

Axes: N tokens, K active latents per token, F dictionary size, D width, C features of a chunk, M entries of a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastsae.codes import pack_rows

# The buffer for a chunk of pre-activations: 16 MB in fp32. Half and double of it time the same; at a quarter the
# product itself slows down.
CHUNK_ELEMENTS = 1 << 22
CHUNK_ROWS = 8192
# A chunk is less than a quarter of the dictionary, whatever the sizes, so that no tensor comes near [N, F].
MIN_CHUNKS = 5


class Chunk(NamedTuple):
    """Columns start : stop of the pre-activations of some rows: pre [N, C], bias not added where it is returned."""

    start: int
    stop: int
    pre: Tensor
    bias: Tensor


def chunks(x: Tensor, weight: Tensor, bias: Tensor, add_bias: bool) -> Iterator[Chunk]:
    """The product x · weightᵀ [N, F], a chunk of columns at a time. The buffer is overwritten by the next chunk."""
    N, F = x.shape[0], weight.shape[0]
    C = chunk_width(N, F)
    buffer = x.new_empty(N * C)
    for start in range(0, F, C):
        stop = min(start + C, F)
        pre = buffer[: N * (stop - start)].view(N, stop - start)
        # The out= forms are not autocast, so the product is made in the dtype of the parameters under autocast too.
        if add_bias:
            torch.addmm(bias[start:stop], x, weight[start:stop].T, out=pre)
        else:
            torch.mm(x, weight[start:stop].T, out=pre)
        yield Chunk(start, stop, pre, bias[start:stop])


def chunk_width(n_rows: int, d_sae: int) -> int:
    """Features per chunk for n_rows: about CHUNK_ELEMENTS of pre-activations, a multiple of 8.

    256 or more, as narrower products are slow, unless that were a quarter of the dictionary; 64 at the very least.
    """
    width = max(CHUNK_ELEMENTS // max(n_rows, 1), 256)
    width = max(min(width, -(-d_sae // MIN_CHUNKS)), 64)
    return min(-(-width // 8) * 8, d_sae)


class Entries(NamedTuple):
    """Entries of a code: token and feature [M] int64, value [M]; ordered by token within a chunk."""

    token: Tensor
    feature: Tensor
    value: Tensor


def _above(chunk: Chunk, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of the entries of chunk.pre that are > threshold ([N, 1] or [C]), in row-major order."""
    pre = chunk.pre
    mask = pre > threshold
    if mask.shape[1] % 8:
        row, column = mask.nonzero(as_tuple=True)
        return row, column, pre[row, column]
    # Hardly any are: eight flags at a time, read as one integer, are searched far faster than one by one.
    row, word = mask.view(torch.int64).nonzero(as_tuple=True)
    hit, within = mask.view(mask.shape[0], -1, 8)[row, word].nonzero(as_tuple=True)
    row, column = row[hit], word[hit] * 8 + within
    return row, column, pre[row, column]


# --- TopK -----------------------------------------------------------------------------------------------------------


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest positive entries of each row of x · weightᵀ + bias: values and indices [N, k].

    Values in descending order, of equal ones the lower feature is chosen; rows with fewer than k positive entries end
    in slots of value 0 and index 0. x: [N, D], weight: [F, D], bias: [F]; 1 ≤ k ≤ F. Exact for the product as computed.
    """
    N = x.shape[0]
    values, indices = x.new_zeros(N, k), torch.zeros(N, k, dtype=torch.int64, device=x.device)
    for first in range(0, N, CHUNK_ROWS):
        rows = slice(first, min(first + CHUNK_ROWS, N))
        values[rows], indices[rows] = _topk_of_rows(x[rows], weight, bias, k)
    return values, indices


def _topk_of_rows(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Chunk after chunk, what exceeds the k-th largest entry known so far is kept; now and then it is boiled down to k.

    An entry equal to the known k-th is rightly dropped: k entries at least as large have lower features.
    """
    N, F = x.shape[0], weight.shape[0]
    kept = x.new_zeros(N, k), torch.zeros(N, k, dtype=torch.int64, device=x.device)
    threshold = x.new_zeros(N, 1)
    pending: list[Entries] = []
    n_pending = seen = 0
    for chunk in chunks(x, weight, bias, add_bias=True):
        if chunk.start == 0:
            threshold = _lower_bound(chunk.pre, k)
        row, column, value = _above(chunk, threshold)
        pending.append(Entries(row, column.add_(chunk.start), value))
        n_pending += row.numel()
        # Boiling down when twice as many columns have been seen keeps both the candidates and these passes few.
        if chunk.stop >= 2 * seen or n_pending > 4 * k * N or chunk.stop == F:
            kept = _best(*_with(kept, pending), k)
            threshold = kept[0][:, -1:]
            pending, n_pending, seen = [], 0, chunk.stop
    return kept


def _lower_bound(pre: Tensor, k: int) -> Tensor:
    """[N, 1]: something below the k-th largest entry of each row, and ≥ 0. Any k maxima of disjoint groups bound it."""
    N, C = pre.shape
    groups = 2 * k
    size = C // groups
    if size < 2:
        return pre.new_zeros(N, 1)
    largest = pre[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    kth = largest.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    # Below, not equal: entries that equal the bound may have to be chosen, and only what is greater is kept.
    return torch.nextafter(kth, kth.new_tensor(float("-inf"))).clamp_min_(0)


def _with(kept: tuple[Tensor, Tensor], pending: list[Entries]) -> tuple[Tensor, Tensor]:
    """kept and pending entries side by side in rows of slots: values and indices [N, k + most pending of a row]."""
    N = kept[0].shape[0]
    row = torch.cat([entries.token for entries in pending])
    feature = torch.cat([entries.feature for entries in pending])
    value = torch.cat([entries.value for entries in pending])
    if len(pending) > 1:
        row, order = torch.sort(row.to(torch.int32), stable=True)
        row, feature, value = row.long(), feature[order], value[order]
    indices, _, slots = pack_rows(row, feature, N)
    values = value.new_zeros(indices.numel())
    values[slots] = value
    return torch.cat([kept[0], values.view_as(indices)], 1), torch.cat([kept[1], indices], 1)


def _best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of values [N, S ≥ k] in descending order and their indices; of equal ones the lower index."""
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


def encode_relu(x: Tensor, weight: Tensor, bias: Tensor, max_l0: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """All positive entries of x · weightᵀ + bias: values, indices [N, K] and counts [N]; K is the most of any row.

    Features ascend within a row. None as soon as a row is known to have more than max_l0 of them.
    """
    N = x.shape[0]
    found: list[Entries] = []
    for first in range(0, N, CHUNK_ROWS):
        counts = torch.zeros(min(CHUNK_ROWS, N - first), dtype=torch.int64, device=x.device)
        for chunk in chunks(x[first : first + CHUNK_ROWS], weight, bias, add_bias=False):
            # pre + bias > 0 just when pre > −bias, rounding included, which spares a pass that adds the bias.
            row, column, value = _above(chunk, -chunk.bias)
            counts += torch.bincount(row, minlength=counts.shape[0])
            if int(counts.max()) > max_l0:
                return None
            found.append(Entries(row.add_(first), column + chunk.start, value + chunk.bias[column]))
    if not found:
        return x.new_zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64, device=x.device), x.new_zeros(0).long()
    row, order = torch.sort(torch.cat([entries.token for entries in found]).to(torch.int32), stable=True)
    feature = torch.cat([entries.feature for entries in found])[order]
    indices, counts, slots = pack_rows(row.long(), feature, N)
    values = x.new_zeros(indices.numel())
    values[slots] = torch.cat([entries.value for entries in found])[order]
    return values.view_as(indices), indices, counts


# --- what a code does with matrices -----------------------------------------------------------------------------------


class Flat(NamedTuple):
    """The used slots of a code: token, feature, slot [M] int64 (slot counts through [N·K]) and offsets [N + 1]."""

    token: Tensor
    feature: Tensor
    slot: Tensor
    offsets: Tensor


def flatten(indices: Tensor, counts: Tensor | None) -> Flat:
    """The used slots of indices [N, K], row by row."""
    N, K = indices.shape
    if counts is None:
        slot = torch.arange(N * K, device=indices.device)
        offsets = torch.arange(0, N * K + 1, K, device=indices.device) if K else slot.new_zeros(N + 1)
        return Flat(slot // max(K, 1), indices.reshape(-1), slot, offsets)
    used = torch.arange(K, device=indices.device) < counts[:, None]
    slot = used.reshape(-1).nonzero().squeeze(1)
    return Flat(slot // max(K, 1), indices.reshape(-1)[slot], slot, nnf.pad(counts.cumsum(0), (1, 0)))


class ByFeature(NamedTuple):
    """The entries of a Flat, sorted by feature, then token: order [M] into it, feature, token [M], offsets [F + 1]."""

    order: Tensor
    feature: Tensor
    token: Tensor
    offsets: Tensor


def by_feature(flat: Flat, d_sae: int) -> ByFeature:
    """A stable sort of the entries by feature."""
    feature, order = torch.sort(flat.feature.to(torch.int32), stable=True)
    offsets = nnf.pad(torch.bincount(flat.feature, minlength=d_sae).cumsum(0), (1, 0))
    return ByFeature(order, feature.long(), flat.token[order], offsets)


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
