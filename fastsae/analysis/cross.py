"""Sums of products of sparse codes, from a stream: what correlations and cosines of features are made of.

Axes: n tokens, K active features per token, A and B features of the two dictionaries, S those of A that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCode
from fastsae.errors import FastSAEError

_PAIRS = 2**22  # pairs of entries multiplied at once: 100 MB of indices and products


class Entries(NamedTuple):
    """The active entries of n tokens in the order of the tokens. counts: [n]; features, values: [m], float64 values."""

    counts: Tensor
    features: Tensor
    values: Tensor


def entries(code: SparseCode, device: torch.device | str | None = None, rows: Tensor | None = None) -> Entries:
    """Of the code, or of its rows [n] in that order."""
    values, indices = code.values.detach(), code.indices
    if rows is not None:
        rows = rows.to(values.device)
        values, indices = values[rows], indices[rows]
    on = values > 0  # unused slots hold 0
    found = Entries(on.sum(1), indices[on].long(), values[on].double())
    return found if device is None else Entries(*(column.to(device) for column in found))


def fired(code: Entries) -> Entries:
    """The same with 1 for every value."""
    return code._replace(values=torch.ones_like(code.values))


def selected(code: Entries, row_of: Tensor) -> Entries:
    """The entries of features f with row_of[f] ≥ 0, which are then numbered row_of[f]."""
    to = row_of[code.features]
    keep = to >= 0
    row = torch.repeat_interleave(torch.arange(len(code.counts), device=to.device), code.counts)[keep]
    return Entries(torch.bincount(row, minlength=len(code.counts)), to[keep], code.values[keep])


def add_products(out: Tensor, a: Entries, b: Entries) -> None:
    """out[i, j] += Σ_n a_i[n] · b_j[n]; out: [A, B] float64.

    Costs Σ_n K_a[n] · K_b[n] products: those pairs of features that are active on the same token, and no others.
    """
    if not len(a.features) or not len(b.features):
        return
    token = torch.repeat_interleave(torch.arange(len(a.counts), device=out.device), a.counts)
    times = b.counts[token]  # [m_a]: how many entries of b each entry of a meets
    first = (b.counts.cumsum(0) - b.counts)[token]
    ends = times.cumsum(0)
    cuts = torch.searchsorted(ends, torch.arange(_PAIRS, int(ends[-1]) + _PAIRS, _PAIRS, device=out.device), right=True)
    start = 0
    for stop in [*cuts.tolist(), len(times)]:
        stop = min(max(stop, start + 1), len(times))  # an entry alone may meet more than _PAIRS in theory
        if stop <= start:
            continue
        part = slice(start, stop)
        n = times[part]
        within = torch.arange(int(n.sum()), device=out.device) - (n.cumsum(0) - n).repeat_interleave(n)
        at = first[part].repeat_interleave(n) + within
        flat = a.features[part].repeat_interleave(n) * out.shape[1] + b.features[at]
        out.view(-1).index_add_(0, flat, a.values[part].repeat_interleave(n) * b.values[at])
        start = stop


class FeatureSums:
    """Σ f, Σ f² and on how many of n tokens f is active, of F features: [F] float64 each."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.total, self.squares, self.fires = torch.zeros(3, size, dtype=torch.float64, device=device)

    def add(self, code: Entries) -> None:
        self.n += len(code.counts)
        self.total.index_add_(0, code.features, code.values)
        self.squares.index_add_(0, code.features, code.values.square())
        self.fires.index_add_(0, code.features, torch.ones_like(code.values))

    def rows(self, part: slice) -> FeatureSums:
        """Those of some of the features."""
        some = FeatureSums(0)
        some.n = self.n
        some.total, some.squares, some.fires = self.total[part], self.squares[part], self.fires[part]
        return some

    def __add__(self, other: FeatureSums) -> FeatureSums:
        both = FeatureSums(len(self.total), self.total.device)
        both.n = self.n + other.n
        both.total, both.squares = self.total + other.total, self.squares + other.squares
        both.fires = self.fires + other.fires
        return both


def row_blocks(count: int, size: int = 1024) -> Iterator[slice]:
    """[0, count) in parts: what is made of a whole [A, B] table takes several times its memory at once."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def pearson(xy: Tensor, x: FeatureSums, y: FeatureSums) -> Tensor:
    """r of every x with every y from Σ xy [A, B]: [A, B] float64, 0 where one of both is constant.

    r = (Σxy/n − x̄ ȳ) / √(var x · var y). Constant means a variance below 1e-12 of the mean square, which is what
    rounding leaves of it: no fixed bound, for a rare and weak feature has a tiny variance and is real.
    """
    n = max(x.n, 1)
    cov = xy / n - (x.total / n)[:, None] * (y.total / n)
    scale_x, scale_y = (_inverse_deviation(part, n) for part in (x, y))
    return (cov * scale_x[:, None] * scale_y).clamp(-1, 1)


def _inverse_deviation(sums: FeatureSums, n: int) -> Tensor:
    square = sums.squares / n
    variance = square - (sums.total / n).square()
    varies = variance > 1e-12 * square
    return torch.where(varies, variance.clamp(min=1e-300).rsqrt(), torch.zeros_like(variance))


def cosine(xy: Tensor, x: FeatureSums, y: FeatureSums) -> Tensor:
    """Σxy / √(Σx² Σy²): [A, B] float64, 0 where one of both never fires."""
    scale_x, scale_y = (
        torch.where(part.squares > 0, part.squares.clamp(min=1e-300).rsqrt(), torch.zeros_like(part.squares))
        for part in (x, y)
    )
    return xy * scale_x[:, None] * scale_y


def sample_of(size: int, row_bytes: int, gibibytes: float, seed: int) -> Tensor:
    """Numbers of the features to keep, ascending: all of `size` where size · row_bytes fits into the memory, else as
    many as fit, drawn at random by the seed.

    Raises FastSAEError where not even one fits.
    """
    fits = int(gibibytes * 2**30 // max(row_bytes, 1))
    if fits < 1:
        raise FastSAEError(
            f"memory must be at least {row_bytes / 2**30:.3g} GiB, the products of one feature, got {gibibytes:g}: "
            "raise memory"
        )
    if fits >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:fits].sort().values


def rows_of(features: Tensor, size: int) -> Tensor:
    """[size] int64: the place of every feature in `features`, −1 where it is not in."""
    place = torch.full((size,), -1)
    place[features] = torch.arange(len(features))
    return place
