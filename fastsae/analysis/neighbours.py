"""What features do around the examples that a survey of a store has kept: a second sweep over the store.

Its rows come in no order, so the neighbours of a token are known only when all of it has been read, and the examples
that stay only then as well. Axes: M examples, W tokens of a window, m entries of a sparse code, n tokens of a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.stream import Read
from fastsae.analysis.survey import Survey, active
from fastsae.analysis.text import Text
from fastsae.store import Batch


class Filling:
    """`add` every Read of the rows that are `wanted`, then `finish`.

    The windows of examples get the activations of their features; those drawn at random, everything that is active.
    Tokens that were not harvested stay at 0. Memory: 16 bytes an example, 8 for each token that has one near, and the
    entries of the random windows.
    """

    def __init__(self, survey: Survey, text: Text, first_document: int = 0) -> None:
        self._survey, self._text, self._first = survey, text, first_document
        self._around = around = survey.config.around
        self._stride = len(text) + 2 * around + 1  # of features, in a row of all features' tokens
        self._tables = []
        for table in (survey.top, survey.bottom, survey.sampled):
            table.trim()
            keys = self._key(table.feature.rows, table.where.rows)
            order = np.argsort(keys, kind="stable")
            self._tables.append((table, keys[order], order))
        windows = survey.random.places()
        near = text.around(windows, around)
        self._window, self._at = np.nonzero(near >= 0)
        cells = near[self._window, self._at]
        order = np.argsort(cells, kind="stable")
        self._cells, self._window, self._at = cells[order], self._window[order], self._at[order]
        self._centres = np.unique(np.concatenate([windows, *(table.where.rows for table, _, _ in self._tables)]))
        self._found: list[tuple[np.ndarray, ...]] = []

    def _key(self, feature: np.ndarray, where: np.ndarray) -> np.ndarray:
        return feature.astype(np.int64) * self._stride + where + self._around

    def wanted(self, batch: Batch) -> Tensor:
        """[n] bool: which rows stand near an example."""
        where = self._text.first[batch.documents.numpy() + self._first] + batch.positions.numpy()
        low, high = _between(self._centres, where, self._around)
        return torch.from_numpy(high > low)

    def add(self, some: Read) -> None:
        """One batch."""
        where = self._text.first[some.documents.numpy()] + some.positions.numpy()
        row, feature, value = active(some.codes[0])
        place = where[row]
        for table, keys, order in self._tables:
            entry, which = _pairs(*_between(keys, self._key(feature, place), self._around))
            example = order[which]
            at = place[entry] - table.where[example] + self._around
            there = (table.ids.rows[example, at] >= 0) & (at != self._around)  # not of another document
            table.window.rows[example[there], at[there]] = value[entry[there]]
        tokens, cells = _pairs(*_between(self._cells, where, 0))
        begin = np.searchsorted(row, tokens)
        entry, which = _pairs(begin, np.searchsorted(row, tokens, side="right"))
        cell = cells[entry]
        self._found.append((self._window[cell], self._at[cell], feature[which], value[which]))

    def finish(self) -> None:
        """Writes what was found into the random windows."""
        if self._found:
            self._survey.random.fill(*(np.concatenate(part) for part in zip(*self._found, strict=True)))


def _between(ordered: np.ndarray, values: np.ndarray, around: int) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of what lies at most `around` from each value."""
    return np.searchsorted(ordered, values - around), np.searchsorted(ordered, values + around, side="right")


def _pairs(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, j) for every j in begin[i] … end[i] − 1."""
    counts = end - begin
    i = np.repeat(np.arange(len(counts)), counts)
    return i, np.arange(len(i)) + np.repeat(begin - (np.cumsum(counts) - counts), counts)
