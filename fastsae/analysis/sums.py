"""Plain sums over tokens, by half of the documents: what counts, correlations and histograms are made of.

Axes: F features, D neurons (coordinates of the hooked output), P proxies, B bins.
"""

from __future__ import annotations

import numpy as np

BINS = 64  # equal parts of a feature's range
HALVES = 2
BINNED = ("histogram", "weight", "inside", "inside_weight")  # joined when a feature's range is doubled
_AT_ONCE = 4096  # features


class Sums:
    """Sums, [half, …] each, that add up over batches and ranks. Arrays by name, all of them numpy.

    tokens: [2]. fires [2, F]; f, ff [2, F]: Σf, Σf². fp, fc [2, F, P]: Σf·p with the proxy as yes or no, and as
    max(proxy, 0). p, c, cc [2, P]: of the proxies alone. histogram, weight [2, F, B]: active tokens by bin, and their
    activations. inside, inside_weight [P, 2, F, B]: of tokens of the category. x, xx [2, D], xp, xc [2, D, P]: neurons.
    fx [F, D]: Σ f·x, or [0, 0]. together [F, F]: tokens on which two features fire, or [0, 0].

    x here is what a neuron does beyond a constant of its own (Survey.shift), so that neurons far from 0 keep their
    digits; correlations do not depend on it. Sums are float64 and counts whole numbers. Histograms and their sums take
    12 · 2 (P + 1) F B bytes, at F = 131,072 and P = 11 2.4 GB; fx 8 F D, together 8 F².
    """

    def __init__(self, F: int, D: int, P: int, neurons: bool, cofiring: bool) -> None:
        double, whole = np.float64, np.int64
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "tokens": ((2,), whole), "fires": ((2, F), whole), "f": ((2, F), double), "ff": ((2, F), double),
            "fp": ((2, F, P), double), "fc": ((2, F, P), double), "p": ((2, P), double), "c": ((2, P), double),
            "cc": ((2, P), double), "histogram": ((2, F, BINS), np.int32), "weight": ((2, F, BINS), double),
            "inside": ((P, 2, F, BINS), np.int32), "inside_weight": ((P, 2, F, BINS), double),
            "x": ((2, D), double), "xx": ((2, D), double), "xp": ((2, D, P), double), "xc": ((2, D, P), double),
            "fx": ((F, D) if neurons else (0, 0), double), "together": ((F, F) if cofiring else (0, 0), double),
        }  # fmt: skip
        self.arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def move(self, by: np.ndarray) -> None:
        """The sums as they are with x + by in the place of x: [D] float64."""
        n, x = self["tokens"][:, None], self["x"]
        self["xx"][:] += 2 * by * x + n * by**2
        self["x"][:] += n * by
        self["xp"][:] += by[:, None] * self["p"][:, None, :]
        self["xc"][:] += by[:, None] * self["c"][:, None, :]
        f = self["f"].sum(0)
        for begin in range(0, len(self["fx"]), _AT_ONCE):  # no second [F, D]
            rows = slice(begin, begin + _AT_ONCE)
            self["fx"][rows] += f[rows, None] * by

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes over arrays by name; those of an earlier version have some of the sums in float32."""
        self.arrays = {name: arrays[name].astype(mine.dtype, copy=False) for name, mine in self.arrays.items()}
