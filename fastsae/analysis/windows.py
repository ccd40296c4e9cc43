"""Where the activations around a token are found, and windows drawn at random with everything that is active in them.

Axes: n tokens of a batch, m entries of a sparse code, M windows, W = 2 · around + 1 tokens of a window.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fastsae.analysis.kept import Column, uniform
from fastsae.analysis.stream import Read
from fastsae.analysis.text import Text

# What is kept of a window drawn at random, and of each of its active entries.
_OF_WINDOW, _OF_ENTRY = ("where", "key", "half", "ids", "entries"), ("at", "feature", "value")


class Entries(NamedTuple):
    """The active entries of a code in the order of its tokens: row (of the batch), feature, value, [m] each."""

    row: np.ndarray
    feature: np.ndarray
    value: np.ndarray


class Surroundings:
    """Of a batch of text: which tokens stand around which, and what a feature does there.

    A window ends where its context does: what the model did not see is not shown. From a store, whose rows are not in
    the order of the text, the tokens around are the document's (of its context, where Text.stretch tells that), and of
    activations there is the token's own; `neighbours.Filling` has the others.
    text, where: of the tokens of the batch, where they stand [n]; for a store.
    """

    def __init__(self, some: Read, entries: Entries, around: int, text: Text, where: np.ndarray) -> None:
        self.around, self._entries, self._text, self._where = around, entries, text, where
        n = len(some.token_ids)
        self._ids = some.token_ids.numpy().astype(np.int32)
        if some.grid is None:
            self._neighbours = None
            place = np.arange(n) * (around + 1)  # nobody is near
        else:
            grid = some.grid.numpy()
            self._padded = np.pad(grid, ((0, 0), (around, around)), constant_values=-1)
            self._neighbours = np.empty((n, 2), dtype=np.int64)
            rows, columns = np.nonzero(grid >= 0)
            self._neighbours[grid[rows, columns]] = np.stack([rows, columns], axis=1)
            place = self._neighbours @ np.array([self._padded.shape[1], 1])
        counts = np.bincount(entries.row, minlength=n)
        self._end = np.cumsum(counts)
        self._begin = self._end - counts
        # By feature, and within a feature in the order of the text: what a feature does around stands around.
        order = np.argsort(entries.feature, kind="stable")
        self._position = np.empty_like(order)
        self._position[order] = np.arange(len(order))
        self._feature, self._value = entries.feature[order], entries.value[order]
        self._place = place[entries.row[order]]

    def alone(self) -> Surroundings:
        """The same of a width of one token."""
        found = copy.copy(self)
        found.around, found._neighbours = 0, None
        return found

    def rows(self, row: np.ndarray) -> np.ndarray:
        """The rows of the batch around each of `row` [M], −1 where none is: [M, W]."""
        offsets = np.arange(2 * self.around + 1)
        if self._neighbours is None:
            alone = np.full((len(row), len(offsets)), -1, dtype=np.int64)
            alone[:, self.around] = row
            return alone
        place = self._neighbours[row]
        return self._padded[place[:, :1], place[:, 1:] + offsets]

    def window(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the features of the entries [M] do around them: activations [M, W] float32, NaN where no token is, and
        ids [M, W]."""
        row = self._entries.row[chosen]
        near = self.rows(row)
        values = np.zeros(near.shape, dtype=np.float32)
        position = self._position[chosen]
        mine, here = self._feature[position], self._place[position]
        for step in range(-self.around, self.around + 1):  # a feature has at most an entry a token
            at = position + step
            inside = (at >= 0) & (at < len(self._feature))
            at = np.where(inside, at, 0)
            offset = self._place[at] - here
            found = np.flatnonzero(inside & (self._feature[at] == mine) & (np.abs(offset) <= self.around))
            values[found, offset[found] + self.around] = self._value[at[found]]
        ids = self.ids(row, near)
        return np.where(ids >= 0, values, np.float32(np.nan)), ids

    def span(self, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the entries of rows [M, W] begin and end; of no use where there is no row."""
        return self._begin[np.maximum(near, 0)], self._end[np.maximum(near, 0)]

    def ids(self, row: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Token ids around rows [M], which have rows [M, W] around, −1 where no token is: [M, W] int32."""
        if self._neighbours is None:
            return self._text.ids_at(self._text.around(self._where[row], self.around))
        return np.where(near >= 0, self._ids[np.maximum(near, 0)], np.int32(-1))


class RandomWindows:
    """`limit` tokens of each half drawn at random, with their surroundings and all that is active in these.

    For what is wanted of a feature on text that was not chosen for it: silence, and its tokens elsewhere.
    """

    def __init__(self, limit: int, around: int, seed: int) -> None:
        self.limit, self.around, self.seed = limit, around, seed
        self.where, self.key, self.half = Column(np.int64), Column(np.float64), Column(bool)
        self.ids, self.entries = Column(np.int32, 2 * around + 1), Column(np.int64)
        # Of the active entries, window by window: place in the window, feature, activation.
        self.at, self.feature, self.value = Column(np.int16), Column(np.int32), Column(np.float32)
        self._worst, self._trimmed = np.array([np.inf, np.inf]), True
        self._by_feature: tuple[np.ndarray, ...] | None = None

    def _columns(self) -> dict[str, Column]:
        return {name: getattr(self, name) for name in (*_OF_WINDOW, *_OF_ENTRY)}

    def add(self, surroundings: Surroundings, entries: Entries, where: np.ndarray, half: np.ndarray) -> None:
        """where, half: [n]. entries: in the order of rows."""
        key = uniform(self.seed, where)
        row = np.flatnonzero(key < self._worst[half.astype(np.int64)])
        if not len(row):
            return
        if len(row) > 2 * self.limit:  # a first batch: more than can stay
            order = row[np.lexsort((key[row], half[row]))]
            row = np.sort(order[np.arange(len(order)) - np.searchsorted(half[order], half[order]) < self.limit])
        near = surroundings.rows(row)
        ids = surroundings.ids(row, near)
        begin, end = surroundings.span(near)
        counts = np.where(near >= 0, end - begin, 0)  # [M, W] entries of every token
        flat = counts.reshape(-1)
        which = np.arange(flat.sum()) + np.repeat(begin.reshape(-1) - _starts(flat), flat)
        at = np.repeat(np.tile(np.arange(near.shape[1], dtype=np.int16), len(row)), flat)
        new = (where[row], key[row], half[row], ids, counts.sum(1), at, entries.feature[which], entries.value[which])
        self._append(new)

    def _append(self, new: Iterable[np.ndarray]) -> None:
        for column, rows in zip(self._columns().values(), new, strict=True):
            column.append(rows)
        self._by_feature, self._trimmed = None, False
        if len(self.where) > 3 * self.limit:
            self._trim()

    def _trim(self) -> None:
        """Only the windows that stay, in the order of the text."""
        if self._trimmed:
            return
        self._trimmed = True
        where, key, half = self.where.rows, self.key.rows, self.half.rows
        order = np.lexsort((where, key, half))
        rank = np.arange(len(order)) - np.searchsorted(half[order], half[order])
        for side in (0, 1):
            last = order[(half[order] == bool(side)) & (rank == self.limit - 1)]
            self._worst[side] = key[last[0]] if len(last) else np.inf
        _, stay = np.unique(where, return_index=True)  # in the order of the text
        stay = stay[np.isin(stay, order[rank < self.limit])]
        if len(stay) == len(where) and (stay[1:] > stay[:-1]).all():
            return
        counts = self.entries.rows
        begin = _starts(counts)
        which = np.arange(counts[stay].sum()) + np.repeat(begin[stay] - _starts(counts[stay]), counts[stay])
        for name in _OF_ENTRY:
            getattr(self, name).keep(which)
        for name in _OF_WINDOW:
            getattr(self, name).keep(stay)
        self._by_feature = None

    def merge(self, other: RandomWindows) -> None:
        """Takes over another's windows."""
        other._trim()
        self._append(column.rows for column in other._columns().values())
        self._trim()

    def places(self) -> np.ndarray:
        """`where` of all windows, in the order of the text."""
        self._trim()
        return self.where.rows

    def numbers(self, half: bool | None = None) -> np.ndarray:
        """`where` of all windows [M], in the order of their keys: a random one."""
        self._trim()
        mine = np.arange(len(self.where)) if half is None else np.flatnonzero(self.half.rows == half)
        return self.where[mine[np.argsort(self.key[mine], kind="stable")]]

    def of(self, feature: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Activations [M, W], NaN where no token is, and ids [M, W] of the windows at `tokens` [M]."""
        self._trim()
        features, owner, at, value = self._sorted()
        low, high = np.searchsorted(features, [feature, feature + 1])
        window = np.searchsorted(self.where.rows, tokens)
        ids = self.ids[window]
        active = np.where(ids >= 0, np.float32(0), np.float32(np.nan))
        row = np.full(len(self.where), -1)
        row[window] = np.arange(len(tokens))
        mine = row[owner[low:high]]
        active[mine[mine >= 0], at[low:high][mine >= 0]] = value[low:high][mine >= 0]
        return active, ids

    def _sorted(self) -> tuple[np.ndarray, ...]:
        """Feature, window, place and activation of the entries, by feature."""
        if self._by_feature is None:
            order = np.argsort(self.feature.rows, kind="stable")
            owner = np.repeat(np.arange(len(self.where)), self.entries.rows)
            self._by_feature = (self.feature[order], owner[order], self.at[order].astype(np.int64), self.value[order])
        return self._by_feature

    def arrays(self) -> dict[str, np.ndarray]:
        """All windows, to be saved."""
        self._trim()
        return {name: column.rows for name, column in self._columns().items()}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """What `arrays` gave."""
        for column in self._columns().values():
            column.keep(np.zeros(0, np.int64))
        self._append(arrays[name] for name in self._columns())
        self._trim()

    def fill(self, window: np.ndarray, at: np.ndarray, feature: np.ndarray, value: np.ndarray) -> None:
        """All that is active in the windows [m], in the place of what was known. window: numbers in the order of
        `where`; at: places in them."""
        order = np.lexsort((at, window))
        new = (np.bincount(window, minlength=len(self.where)), at[order], feature[order], value[order])
        for name, rows in zip(("entries", *_OF_ENTRY), new, strict=True):
            column = getattr(self, name)
            column.keep(np.zeros(0, np.int64))
            column.append(rows)
        self._by_feature = None

    def beside(self, feature: int) -> tuple[int, np.ndarray]:
        """On how many of the windows a feature is active, and the features of all entries of these."""
        self._trim()
        features, owner, _, _ = self._sorted()
        low, high = np.searchsorted(features, [feature, feature + 1])
        mine = np.unique(owner[low:high])
        counts = self.entries.rows
        begin, flat = _starts(counts)[mine], counts[mine]
        which = np.arange(flat.sum()) + np.repeat(begin - _starts(flat), flat)
        return len(mine), self.feature[which]


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where parts of so many entries begin, one after another."""
    return np.cumsum(counts) - counts
