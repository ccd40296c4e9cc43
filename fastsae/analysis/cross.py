"""Sums of products of sparse codes, from a stream: correlations and cosines of features, and who is whose best match.

Axes: n tokens, K active features per token, A and B features of the two dictionaries, S those of A that are kept,
D and D′ neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.checkpoint import Arrays, Part
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
    """out[i, j] += Σ_n a_i[n] · b_j[n]; out: [A, B] float64, or integers where a and b hold whole numbers.

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
        out.view(-1).index_add_(0, flat, (a.values[part].repeat_interleave(n) * b.values[at]).to(out.dtype))
        start = stop


def joined(parts: Mapping[str, Part]) -> Arrays:
    """The state of several parts as that of one."""
    return {f"{name}.{key}": array for name, part in parts.items() for key, array in part.arrays().items()}


def load_joined(parts: Mapping[str, Part], arrays: Arrays) -> None:
    """What `joined` gave, back into the parts."""
    for name, part in parts.items():
        head = name + "."
        part.load({key.removeprefix(head): array for key, array in arrays.items() if key.startswith(head)})


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

    @property
    def varies(self) -> Tensor:
        """[F] bool: which are not constant, as far as rounding tells."""
        return _inverse_deviation(self, max(self.n, 1)) > 0

    def merge(self, other: FeatureSums) -> None:
        """Takes in the sums of other tokens."""
        self.n += other.n
        for mine, theirs in zip(self._columns().values(), other._columns().values(), strict=True):
            mine += theirs.to(mine.device)

    def _columns(self) -> dict[str, Tensor]:
        return {"total": self.total, "squares": self.squares, "fires": self.fires}

    def arrays(self) -> Arrays:
        return {"n": np.array(self.n)} | {name: column.cpu().numpy() for name, column in self._columns().items()}

    def load(self, arrays: Arrays) -> None:
        self.n = int(arrays["n"])
        for name, column in self._columns().items():
            column.copy_(torch.from_numpy(arrays[name]))


def row_blocks(count: int, size: int = 1024) -> Iterator[slice]:
    """[0, count) in parts: what is made of a whole [A, B] table takes several times its memory at once."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def pearson(xy: Tensor, x: FeatureSums, y: FeatureSums) -> Tensor:
    """r of every x with every y from Σ xy [A, B]: [A, B] float64, 0 where one of both is constant.

    r = (Σxy/n − x̄ ȳ) / √(var x · var y). Constant means a variance below 1e-12 of the mean square, which is what
    rounding leaves of it: no fixed bound, for a rare and weak feature has a tiny variance and is real.
    Of all pairs, on the device of the sums; `specificity.pearson` is the same of numpy arrays that broadcast.
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


class Best(NamedTuple):
    """Of every row: its best partner, −1 where it has none; r with it over all tokens; held-out r: that of the partner
    chosen on half 0 of the documents, on half 1. NaN: no partner, or a row that is constant on tokens that count."""

    partner: Tensor
    r: Tensor
    held_out: Tensor


class FeatureCross:
    """Products of A's kept features with those of one other dictionary, by half of the documents: [2, S, B] float64.

    Half 0 chooses a match that half 1 scores: a largest r of B is partly luck on the tokens that it was chosen on.
    """

    def __init__(self, kept: int, size: int, device: torch.device) -> None:
        self.xy = torch.zeros(2, kept, size, dtype=torch.float64, device=device)
        self.sums = [FeatureSums(size, device) for _ in range(2)]

    def add(self, half: int, a: Entries, b: Entries) -> None:
        add_products(self.xy[half], a, b)
        self.sums[half].add(b)

    def candidates(self, min_fires: int) -> Tensor:
        """[B] bool, on the CPU: which features are active on so many tokens that they can be a match."""
        return (self.sums[0].fires + self.sums[1].fires >= min_fires).cpu()

    def pearsons(self, a: list[FeatureSums], min_fires: int, half: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(rows, r [rows, B]) block by block over one half of the documents, or over all; −1 for what is no candidate.

        a: the sums of A's kept features, of each half.
        """
        x, y = (s[0] + s[1] if half is None else s[half] for s in (a, self.sums))
        few = ~self.candidates(min_fires).to(self.xy.device)
        for rows in row_blocks(self.xy.shape[1]):
            xy = self.xy[0, rows] + self.xy[1, rows] if half is None else self.xy[half, rows]
            yield rows, pearson(xy, x.rows(rows), y).masked_fill_(few, -1.0)

    def of(self, partners: Tensor, a: list[FeatureSums], half: int | None = None) -> Tensor:
        """r [S] of every row with its partner [S] on one half or on all; NaN where the partner is −1."""
        found = [
            r.gather(1, partners[rows, None].clamp(min=0).to(r.device))[:, 0].cpu()
            for rows, r in self.pearsons(a, 0, half)
        ]
        return torch.cat(found).masked_fill(partners < 0, torch.nan)

    def best(self, a: list[FeatureSums], min_fires: int) -> Best:
        """All on the CPU, [S] each."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for (_, everywhere), (_, chosen) in zip(
            self.pearsons(a, min_fires), self.pearsons(a, min_fires, 0), strict=True
        ):
            r, best = everywhere.max(1)
            found.append((best.cpu(), r.cpu(), chosen.argmax(1).cpu()))
        partner, r, chosen = (torch.cat(column) for column in zip(*found, strict=True))
        return _known(partner, r, self.of(chosen, a, 1), a, bool(self.candidates(min_fires).any()))

    def merge(self, other: FeatureCross) -> None:
        """Takes in the sums of other tokens."""
        self.xy += other.xy.to(self.xy.device)
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine.merge(theirs)

    def arrays(self) -> Arrays:
        return {"xy": self.xy.cpu().numpy()} | joined({f"sums{half}": sums for half, sums in enumerate(self.sums)})

    def load(self, arrays: Arrays) -> None:
        self.xy.copy_(torch.from_numpy(arrays["xy"]))
        load_joined({f"sums{half}": sums for half, sums in enumerate(self.sums)}, arrays)


def _known(partner: Tensor, r: Tensor, held_out: Tensor, x: list[FeatureSums], any_partner: bool) -> Best:
    """NaN instead of numbers that say nothing: of a row that is constant over all tokens or, held out, on one half."""
    varies = (x[0] + x[1]).varies.cpu() & any_partner
    both = varies & x[0].varies.cpu() & x[1].varies.cpu()
    return Best(
        partner.masked_fill(~varies, -1), r.masked_fill(~varies, torch.nan), held_out.masked_fill(~both, torch.nan)
    )


class NeuronCross:
    """The same of dense columns x [n, D] with y [n, D′]."""

    def __init__(self, d: int, d_other: int, device: torch.device) -> None:
        self.xy = torch.zeros(2, d, d_other, dtype=torch.float64, device=device)
        self.x = [FeatureSums(d, device) for _ in range(2)]
        self.y = [FeatureSums(d_other, device) for _ in range(2)]

    def add(self, half: int, x: Tensor, y: Tensor) -> None:
        x, y = x.to(self.xy.device).double(), y.to(self.xy.device).double()
        self.xy[half] += x.T @ y
        for sums, columns in ((self.x[half], x), (self.y[half], y)):
            sums.n += len(columns)
            sums.total += columns.sum(0)
            sums.squares += columns.square().sum(0)

    def candidates(self) -> Tensor:
        """[D′] bool, on the CPU: which vary."""
        return (self.y[0] + self.y[1]).varies.cpu()

    def best(self) -> Best:
        """All on the CPU, [D] each."""
        x, y = self.x[0] + self.x[1], self.y[0] + self.y[1]
        r, partner = pearson(self.xy.sum(0), x, y).max(1)
        chosen = pearson(self.xy[0], self.x[0], self.y[0]).argmax(1, keepdim=True)
        scored = pearson(self.xy[1], self.x[1], self.y[1]).gather(1, chosen)[:, 0]
        return _known(partner.cpu(), r.cpu(), scored.cpu(), self.x, bool(self.candidates().any()))

    def merge(self, other: NeuronCross) -> None:
        """Takes in the sums of other tokens."""
        self.xy += other.xy.to(self.xy.device)
        for mine, theirs in zip([*self.x, *self.y], [*other.x, *other.y], strict=True):
            mine.merge(theirs)

    def _sums(self) -> dict[str, FeatureSums]:
        return {f"{name}{half}": s for name, both in (("x", self.x), ("y", self.y)) for half, s in enumerate(both)}

    def arrays(self) -> Arrays:
        return {"xy": self.xy.cpu().numpy()} | joined(self._sums())

    def load(self, arrays: Arrays) -> None:
        self.xy.copy_(torch.from_numpy(arrays["xy"]))
        load_joined(self._sums(), arrays)


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
