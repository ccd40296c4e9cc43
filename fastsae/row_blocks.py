"""The gradients of one update, some rows at a time, so that [F, D] of them never exist.

A batch may be several micro-batches; each has come down to its rows x − centre, what pulls at its output and its code
(or none, where that was too dense for slots), and perhaps what pulls at dead latents.

Axes: N tokens, F dictionary size, D width, B rows of a block, S dead latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import auxk, cpu, dense
from fastsae.gradients import ByFeature, Pull, WeightGradients, widened
from fastsae.moments import Rows

# Elements of a block: some megabytes for gradient, weight and moments together, which stay in the cache.
BLOCK_ELEMENTS = 1 << 19
# Where latents are this many times as many as entries, only the gradients of those that were touched are made.
SPARSE = 4


class Weights(NamedTuple):
    """What the gradients are of. weight, w_dec: [F, D]; bias, threshold, norms: [F]."""

    weight: Tensor
    bias: Tensor
    w_dec: Tensor
    threshold: Tensor | None
    bandwidth: float
    norms: Tensor | None


class Part(NamedTuple):
    """One micro-batch: rows, out [N, D]; values, indices [N, K] and counts [N], or shape [0, 0] where there are no
    slots; l1, l0 [N] or None: what pulls at those."""

    rows: Tensor
    out: Tensor
    values: Tensor
    indices: Tensor
    counts: Tensor
    l1: Tensor | None
    l0: Tensor | None

    @property
    def pull(self) -> Pull:
        return Pull(self.out, self.l1, self.l0)

    @property
    def has_code(self) -> bool:
        return self.values.shape[0] == self.rows.shape[0]


class Dead(NamedTuple):
    """AuxK of one micro-batch: its pull, the latents [S] ascending, and which of F are dead."""

    pull: auxk.AuxPull
    which: Tensor
    is_dead: Tensor


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """The gradients of some micro-batches. touched: None for all rows in order; or [U] ascending, the only ones that
    have any. ranges: whether the others are to be updated too."""

    given: Weights
    code: ByFeature | None
    without: list[Part]
    dead: list[Dead]
    touched: Tensor | None
    ranges: bool

    @classmethod
    def of(cls, given: Weights, parts: list[Part], dead: list[Dead], only_touched: bool) -> RowBlocks:
        """only_touched: whether rows without a gradient may be left alone, as far as they are known."""
        without = [part for part in parts if not part.has_code and part.rows.shape[0]]
        joined = join([part for part in parts if part.has_code])
        code = None
        if joined is not None:
            code = ByFeature.of(
                joined.rows, joined.values, joined.indices, joined.counts, given.bias, given.w_dec, given.threshold,
                given.bandwidth, given.norms, joined.pull,
            )  # fmt: skip
            # The sums are for an optimizer that works in fp32, whatever the dtype of the weights.
            wide = Pull(widened(joined.out), joined.l1, joined.l0)
            code = replace(code, rows=widened(joined.rows), pull=wide)
        few = code is None or SPARSE * code.used.numel() <= given.bias.numel()
        if (only_touched or few) and not without:
            also = torch.zeros(given.bias.shape, dtype=torch.bool, device=given.bias.device)
            for one in dead:
                also |= one.is_dead
            code = None if code is None else code.compact(also)
            touched = also.nonzero().squeeze(1) if code is None else code.features
            return cls(given, code, without, dead, touched, not only_touched)
        return cls(given, code, without, dead, None, True)

    def __iter__(self) -> Iterator[tuple[slice | None, Rows, WeightGradients]]:
        """A range of rows to be updated, or None for those alone that have gradients; which of them have, and these, in
        fp32 or more. A block's parameters may change once it has been used: the next ones do not need them."""
        F, D = self.given.w_dec.shape
        size = max(64, BLOCK_ELEMENTS // max(D, 1))
        if self.without:
            size = min(size, max(64, cpu.CHUNK_ELEMENTS // max(part.rows.shape[0] for part in self.without)))
        U = F if self.touched is None or self.ranges else self.touched.numel()
        starts = edges = [*range(0, U, size), U]
        if self.touched is not None and self.ranges:
            edges = torch.searchsorted(self.touched, torch.tensor(starts, device=self.touched.device)).tolist()
        offsets = None if self.code is None else self.code.offsets[torch.tensor(edges, device=self.code.offsets.device)]
        entries = None if offsets is None else offsets.tolist()
        for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            between = None if entries is None else (entries[i], entries[i + 1])
            block = slice(starts[i], starts[i + 1]) if self.ranges else None
            yield block, *self._block(start, stop, between)

    def _block(self, start: int, stop: int, between: tuple[int, int] | None) -> tuple[Rows, WeightGradients]:
        at: Rows = slice(start, stop) if self.touched is None else self.touched[start:stop]
        made = None
        if self.code is not None:
            made = self.code.gradients(start, stop, between)
            if self.without or self.dead:  # these add to it, and the sums of the code are needed again
                made = made._replace(bias=made.bias.clone(), threshold=_copied(made.threshold))
        for part in self.without:
            assert isinstance(at, slice)
            weight, bias, w_dec, threshold, bandwidth, norms = self.given
            more = dense.of_features(
                at, part.rows, weight, bias, w_dec, threshold, bandwidth, norms, part.pull
            )
            made = _added(made, more)
        if made is None:
            made = self._nothing(at)
        for one in self.dead:
            self._add_dead(at, start, stop, one, made)
        return at, made

    def _nothing(self, at: Rows) -> WeightGradients:
        given = self.given
        rows, bias = given.w_dec[at], given.bias[at]
        wide = widened(rows.new_empty(0))
        d_threshold = None if given.threshold is None else torch.zeros_like(bias)
        return WeightGradients(
            wide.new_zeros(rows.shape), wide.new_zeros(rows.shape), torch.zeros_like(bias), d_threshold
        )

    def _add_dead(self, at: Rows, start: int, stop: int, one: Dead, made: WeightGradients) -> None:
        which = one.which
        if isinstance(at, slice):
            which = which[(which >= start) & (which < stop)]
            where = which - start
        else:
            which = which[torch.isin(which, at)]
            where = torch.searchsorted(at, which)
        if not which.numel():
            return
        some = auxk.take(which, one.is_dead, self.given.weight, self.given.bias, self.given.w_dec)
        found = auxk.gradients_of(one.pull, some)
        for whole, part in ((made.weight, found.weight), (made.bias, found.bias), (made.w_dec, found.w_dec)):
            whole.index_add_(0, where, part.to(whole.dtype))


def join(parts: list[Part]) -> Part | None:
    """Micro-batches one after the other, as one; None of none."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    slots = max(part.values.shape[1] for part in parts)

    def whole(name: str) -> Tensor | None:
        given = [getattr(part, name) for part in parts]
        some = next((t for t in given if t is not None), None)
        if some is None:
            return None
        # Nothing pulls at l1 or l0 of those micro-batches that came while the penalty was 0.
        given = [some.new_zeros(part.rows.shape[0]) if t is None else t for part, t in zip(parts, given, strict=True)]
        if name in ("values", "indices"):
            given = [torch.nn.functional.pad(t, (0, slots - t.shape[1])) for t in given]
        return torch.cat(given)

    return Part(*(whole(name) for name in Part._fields))  # type: ignore[arg-type]


def _copied(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone()


def _added(a: WeightGradients | None, b: WeightGradients) -> WeightGradients:
    """a + b, in fp32 or more."""
    if a is None:
        return WeightGradients(widened(b.w_dec), widened(b.weight), b.bias, b.threshold)  # made anew for each block
    a.w_dec.add_(b.w_dec)
    a.weight.add_(b.weight)
    a.bias.add_(b.bias)
    if a.threshold is not None and b.threshold is not None:
        a.threshold.add_(b.threshold)
    return a
