"""Where the activations around a token are found, and windows drawn at random with everything that is active in them.

Axes: n tokens of a batch, m entries of a sparse code, M windows, W = 2 · around + 1 tokens of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastsae.analysis.kept import uniform
from fastsae.analysis.stream import Read


class Entries(NamedTuple):
    """The active entries of a code in the order of its tokens: row (of the batch), feature, value, [m] each."""

    row: np.ndarray
    feature: np.ndarray
    value: np.ndarray


class Surroundings:
    """Of a batch of text: which tokens stand around which, and what a feature does there.

    A window ends where its context does: what the model did not see is not shown. From a store, whose rows are not in
    the order of the text, a window is the token alone.
    """

    def __init__(self, some: Read, entries: Entries, around: int) -> None:
        self.around, self._entries = around, entries
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
        near = self.rows(self._entries.row[chosen])
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
        return np.where(near >= 0, values, np.float32(np.nan)), self.ids(near)

    def span(self, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the entries of rows [M, W] begin and end; of no use where there is no row."""
        return self._begin[np.maximum(near, 0)], self._end[np.maximum(near, 0)]

    def ids(self, near: np.ndarray) -> np.ndarray:
        """Token ids of rows [M, W], −1 where none is: int32."""
        return np.where(near >= 0, self._ids[np.maximum(near, 0)], np.int32(-1))


class RandomWindows:
    """`limit` tokens of each half drawn at random, with their surroundings and all that is active in these.

    For what is wanted of a feature on text that was not chosen for it: silence, and its tokens elsewhere.
    """

    def __init__(self, limit: int, around: int, seed: int) -> None:
        self.limit, self.around, self.seed = limit, around, seed
        # where → (key, half, ids [W], place in the window, feature, value of every active entry)
        self.kept: dict[int, tuple[float, bool, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        self._worst = [np.inf, np.inf]
        self._by_feature: tuple[np.ndarray, ...] | None = None

    def add(self, surroundings: Surroundings, entries: Entries, where: np.ndarray, half: np.ndarray) -> None:
        """where, half: [n]. entries: in the order of rows."""
        key = uniform(self.seed, where)
        row = np.flatnonzero(key < np.where(half, self._worst[1], self._worst[0]))
        if not len(row):
            return
        if len(row) > 4 * self.limit:  # a first batch larger than what can stay
            row = np.sort(row[np.argsort(key[row], kind="stable")[: 4 * self.limit]])
        near = surroundings.rows(row)
        ids = surroundings.ids(near)
        begin, end = surroundings.span(near)
        counts = np.where(near >= 0, end - begin, 0)  # [M, W] entries of every token
        flat = counts.reshape(-1)
        which = np.arange(flat.sum()) + np.repeat(begin.reshape(-1) - (np.cumsum(flat) - flat), flat)
        at = np.repeat(np.tile(np.arange(near.shape[1], dtype=np.int16), len(row)), flat)
        feature, value = entries.feature[which].astype(np.int32), entries.value[which].astype(np.float32)
        ends = np.cumsum(counts.sum(1))
        for i, token in enumerate(where[row].tolist()):
            span = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
            self.kept[token] = (
                float(key[row[i]]), bool(half[row[i]]), ids[i],
                at[span].copy(), feature[span].copy(), value[span].copy(),
            )  # fmt: skip
        self._by_feature = None
        if len(self.kept) > 3 * self.limit:
            self._trim()

    def _trim(self) -> None:
        """Only the windows that stay."""
        for half in (False, True):
            mine = sorted((kept[0], token) for token, kept in self.kept.items() if kept[1] == half)
            for _, token in mine[self.limit :]:
                del self.kept[token]
                self._by_feature = None
            if len(mine) >= self.limit:
                self._worst[half] = mine[self.limit - 1][0]

    def merge(self, other: RandomWindows) -> None:
        """Takes over another's windows."""
        other._trim()
        self.kept |= other.kept
        self._by_feature = None
        self._trim()

    def numbers(self, half: bool | None = None) -> np.ndarray:
        """`where` of all windows [M], in the order of their keys: a random one."""
        self._trim()
        tokens = [token for token, kept in self.kept.items() if half is None or kept[1] == half]
        return np.array(sorted(tokens, key=lambda token: self.kept[token][0]), dtype=np.int64)

    def of(self, feature: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Activations [M, W], NaN where no token is, and ids [M, W] of the windows at `tokens` [M]."""
        if self._by_feature is None:
            self._by_feature = self._indexed()
        order, features, owner, at, value = self._by_feature
        low, high = np.searchsorted(features, [feature, feature + 1])
        ids = np.stack([self.kept[int(token)][2] for token in tokens]) if len(tokens) else np.zeros((0, 0), np.int32)
        active = np.where(ids >= 0, np.float32(0), np.float32(np.nan))
        place = np.searchsorted(tokens, owner[low:high], sorter=(by := np.argsort(tokens)))
        place = np.minimum(place, max(len(tokens) - 1, 0))
        mine = tokens[by[place]] == owner[low:high] if len(tokens) else np.zeros(high - low, bool)
        active[by[place[mine]], at[low:high][mine]] = value[low:high][mine]
        return active, ids

    def _indexed(self) -> tuple[np.ndarray, ...]:
        """Entries of all windows by feature."""
        tokens = sorted(self.kept)
        parts = [self.kept[token] for token in tokens]
        owner = np.repeat(np.array(tokens, dtype=np.int64), [len(part[4]) for part in parts])
        at, features, value = (
            np.concatenate([part[i] for part in parts]) if parts else np.zeros(0) for i in (3, 4, 5)
        )
        order = np.argsort(features, kind="stable")
        return order, features[order], owner[order], at[order].astype(np.int64), value[order]

    def arrays(self) -> dict[str, np.ndarray]:
        """All windows, to be saved."""
        self._trim()
        tokens = sorted(self.kept)
        parts = [self.kept[token] for token in tokens]
        width = 2 * self.around + 1

        def joined(i: int, dtype: type) -> np.ndarray:
            return np.concatenate([part[i] for part in parts]).astype(dtype) if parts else np.zeros(0, dtype)

        return {
            "where": np.array(tokens, dtype=np.int64),
            "key": np.array([part[0] for part in parts], dtype=np.float64),
            "half": np.array([part[1] for part in parts], dtype=bool),
            "ids": np.stack([part[2] for part in parts]) if parts else np.zeros((0, width), np.int32),
            "entries": np.array([len(part[4]) for part in parts], dtype=np.int64),
            "at": joined(3, np.int16), "feature": joined(4, np.int32), "value": joined(5, np.float32),
        }  # fmt: skip

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """What `arrays` gave."""
        ends = np.cumsum(arrays["entries"])
        for i, token in enumerate(arrays["where"].tolist()):
            span = slice(int(ends[i] - arrays["entries"][i]), int(ends[i]))
            self.kept[token] = (
                float(arrays["key"][i]), bool(arrays["half"][i]), arrays["ids"][i],
                arrays["at"][span], arrays["feature"][span], arrays["value"][span],
            )  # fmt: skip
        self._trim()
