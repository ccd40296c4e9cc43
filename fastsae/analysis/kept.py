"""Examples that a pass keeps for every feature: the n best of each group by a key, whatever the order they come in.

The key makes the choice. −activation: the strongest. A number that is a hash of feature and token: a uniform sample
(bottom-k sampling: the n smallest of independent uniform numbers), the same for every cut of the text into batches,
ranks and sessions, so that tables merge exactly.

Axes: M examples, W = 2 · around + 1 tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastsae.errors import FastSAEError

_BUFFER = 1 << 16  # examples that wait before the table is trimmed
COLUMNS = ("feature", "half", "value", "key", "where", "window", "ids")


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
        self.feature, self.where = np.zeros(0, np.int32), np.zeros(0, np.int64)
        self.half = np.zeros(0, bool)
        self.value, self.key = np.zeros(0, np.float32), np.zeros(0, np.float64)
        self.window = np.zeros((0, 2 * around + 1), np.float32)
        self.ids = np.zeros((0, 2 * around + 1), np.int32)
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._waits = 0
        self._worst = np.full(groups, np.inf)

    def wanted(self, feature: np.ndarray, half: np.ndarray, value: np.ndarray, key: np.ndarray) -> np.ndarray:
        """[m] bool: which of these may be among the best of their group."""
        return key < self._worst[self._group(feature, half, value)]

    def add(self, *columns: np.ndarray) -> None:
        """Examples, in the order of COLUMNS."""
        if len(columns[0]):
            self._waiting.append(columns)
            self._waits += len(columns[0])
        if self._waits >= max(_BUFFER, len(self.feature) // 4):
            self.trim()

    def trim(self) -> None:
        """Only the best of every group stay, in the order of group, key and place. Also after groups have changed."""
        parts = [tuple(getattr(self, name) for name in COLUMNS), *self._waiting]
        self._waiting, self._waits = [], 0
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        feature, half, value, key, where = columns[:5]
        group = self._group(feature, half, value)
        order = np.lexsort((where, key, group))
        if self.apart:
            order = order[self._first_of_place(group[order], where[order])]
        group = group[order]
        begins = np.searchsorted(group, group, side="left")
        rank = np.arange(len(group)) - begins
        order, group = order[rank < self.limit], group[rank < self.limit]
        for name, column in zip(COLUMNS, columns, strict=True):
            setattr(self, name, column[order])
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
        self._waiting.append(tuple(getattr(other, name) for name in COLUMNS))
        self.trim()

    def of(self, feature: int) -> np.ndarray:
        """Rows of the table with that feature, best first within a group. Trim first."""
        low, high = np.searchsorted(self.feature, [feature, feature + 1])
        return np.arange(low, high)

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole table, to be saved."""
        self.trim()
        return {name: getattr(self, name) for name in COLUMNS}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """What `arrays` gave."""
        for name in COLUMNS:
            setattr(self, name, arrays[name])
        self.trim()
