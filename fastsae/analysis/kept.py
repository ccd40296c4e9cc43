"""Examples that a pass keeps for every feature: the n best of each group by a key, whatever the order they come in.

The key makes the choice. −activation: the strongest. A number that is a hash of feature and token: a uniform sample
(bottom-k sampling: the n smallest of independent uniform numbers), the same for every cut of the text into batches,
ranks and sessions, so that tables merge exactly.

Axes: M examples, W = 2 · around + 1 tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastsae.errors import FastSAEError

_BUFFER = 1 << 15  # examples that wait before the table is trimmed
COLUMNS = ("feature", "half", "value", "key", "where", "window", "ids")


class Column:
    """An array that rows are appended to and chosen from, in one piece of memory for all of a pass.

    What lives as long as the pass must not be allocated anew with every batch: the heap between it and a batch's
    temporaries falls to pieces that nothing fits into, and grows with the text (measured on 4 M tokens: 630 MB, of
    which 60 were in use).
    """

    def __init__(self, dtype: Any, *shape: int) -> None:
        self._data, self._rows = np.zeros((0, *shape), dtype), 0

    def __len__(self) -> int:
        return self._rows

    @property
    def rows(self) -> np.ndarray:
        """A view, until the next append or keep."""
        return self._data[: self._rows]

    def __getitem__(self, which: Any) -> Any:
        return self.rows[which]

    def append(self, rows: np.ndarray) -> None:
        end = self._rows + len(rows)
        if end > len(self._data):
            grown = np.empty((max(end, len(self._data) * 3 // 2), *self._data.shape[1:]), self._data.dtype)
            grown[: self._rows] = self.rows
            self._data = grown
        self._data[self._rows : end] = rows
        self._rows = end

    def keep(self, which: np.ndarray) -> None:
        """Only these rows, numbers in their new order."""
        self._data[: len(which)] = self.rows[which]
        self._rows = len(which)


def uniform(seed: int, *numbers: np.ndarray) -> np.ndarray:
    """[M] float64 in [0, 1): a hash of the integers, [M] each, and the seed (splitmix64, Steele et al. 2014)."""
    state = np.full(np.broadcast(*numbers).shape, (seed * 0x9E3779B97F4A7C15 + 0x1234567) % 2**64, dtype=np.uint64)
    for part in numbers:
        state = _mixed(state ^ np.asarray(part).astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Kept:
    """A table of examples: feature, half (of the documents), value (activation), key, where (number of the token in the
    text), window [M, W] float32 (the feature's activations around; NaN where no token is), ids [M, W] int32 (−1 there).

    limit: examples of a group. group: numbers the group, [M], of feature, half and value, from 0 to groups() − 1.
    apart: at most one example of a group in so many neighbouring tokens, the best one; 0 for no such rule.
    """

    def __init__(
        self, limit: int, around: int, group: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
        groups: int, apart: int = 0,
    ) -> None:  # fmt: skip
        self.limit, self.around, self.apart = limit, around, apart
        self._group, self._groups = group, groups
        width = 2 * around + 1
        self.feature, self.half, self.value = Column(np.int32), Column(bool), Column(np.float32)
        self.key, self.where = Column(np.float64), Column(np.int64)
        self.window, self.ids = Column(np.float32, width), Column(np.int32, width)
        self._trimmed = 0  # rows that were there at the last trim
        self._worst = np.full(groups, np.inf)

    def wanted(self, feature: np.ndarray, half: np.ndarray, value: np.ndarray, key: np.ndarray) -> np.ndarray:
        """[m] bool: which of these may be among the best of their group."""
        return key <= self._worst[self._group(feature, half, value)]  # of equal keys the first in the text stays

    def __len__(self) -> int:
        return len(self.feature)

    def _columns(self) -> dict[str, Column]:
        return {name: getattr(self, name) for name in COLUMNS}

    def add(self, *columns: np.ndarray) -> None:
        """Examples, in the order of COLUMNS."""
        for column, rows in zip(self._columns().values(), columns, strict=True):
            column.append(rows)
        if len(self) - self._trimmed >= max(_BUFFER, self._trimmed // 4):
            self.trim()

    def trim(self) -> None:
        """Only the best of every group stay, in the order of group, key and place. Also after groups have changed."""
        where, key = self.where.rows, self.key.rows
        group = self._group(self.feature.rows, self.half.rows, self.value.rows)
        order = np.lexsort((where, key, group))
        if self.apart:
            order = order[self._first_of_place(group[order], where[order])]
        group = group[order]
        begins = np.searchsorted(group, group, side="left")
        rank = np.arange(len(group)) - begins
        order, group = order[rank < self.limit], group[rank < self.limit]
        for column in self._columns().values():
            column.keep(order)
        self._trimmed = len(order)
        self._worst = np.full(self._groups, np.inf)
        sizes = np.bincount(group, minlength=self._groups)
        full = np.flatnonzero(sizes >= self.limit)
        self._worst[full] = self.key[np.cumsum(sizes)[full] - 1] if self.limit else -np.inf

    def _first_of_place(self, group: np.ndarray, where: np.ndarray) -> np.ndarray:
        """[M] bool of examples in the order of group and key: the first of its group in its stretch of text."""
        place = where // self.apart
        first = np.zeros(len(group), dtype=bool)
        order = np.lexsort((np.arange(len(group)), place, group))
        new = np.ones(len(group), dtype=bool)
        new[1:] = (group[order][1:] != group[order][:-1]) | (place[order][1:] != place[order][:-1])
        first[order[new]] = True
        return first

    def forget(self, groups: np.ndarray) -> None:
        """These groups, numbers or mask, mean something else now: whatever comes is wanted until the next trim."""
        self._worst[groups] = np.inf

    def merge(self, other: Kept) -> None:
        """Takes over another table's examples. Raises FastSAEError for a table of another kind."""
        if (other.limit, other.around, other.apart) != (self.limit, self.around, self.apart):
            raise FastSAEError("tables of examples to merge must keep as many, with windows as wide")
        other.trim()
        self.add(*(column.rows for column in other._columns().values()))
        self.trim()

    def of(self, feature: int) -> np.ndarray:
        """Rows of the table with that feature, best first within a group. Trim first."""
        low, high = np.searchsorted(self.feature.rows, [feature, feature + 1])
        return np.arange(low, high)

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole table, to be saved."""
        self.trim()
        return {name: column.rows for name, column in self._columns().items()}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """What `arrays` gave."""
        for name, column in self._columns().items():
            column.keep(np.zeros(0, np.int64))
            column.append(arrays[name])
        self.trim()
