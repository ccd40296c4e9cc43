"""Exact histograms of F features whose ranges are not known beforehand.

A feature's range is a power of two, and its bins are equal parts of it. When an activation lies beyond, the range is
doubled and neighbouring bins are joined, which is exact: counts are those of the final bins, whatever came first.

Axes: F features, H halves of the documents, P proxies, B bins, m entries.
"""

from __future__ import annotations

import numpy as np

NOTHING = -(2**14)  # the exponent of a feature that has not fired


class Ranges:
    """Range of feature f: (0, 2^exponent[f]]. exponent: [F] int32."""

    def __init__(self, d_sae: int) -> None:
        self.exponent = np.full(d_sae, NOTHING, dtype=np.int32)

    def place(self, feature: np.ndarray, value: np.ndarray, parts: int) -> np.ndarray:
        """[m]: which of so many equal parts (low, high] of its feature's range each value > 0 is in."""
        share = np.ldexp(value.astype(np.float64), -self.exponent[feature])
        return np.clip(np.ceil(share * parts).astype(np.int64) - 1, 0, parts - 1)

    def top(self, feature: int) -> float:
        """The end of a feature's range, 0 for one that never fired."""
        exponent = int(self.exponent[feature])
        return 0.0 if exponent == NOTHING else float(np.ldexp(1.0, exponent))


def exponents(values: np.ndarray) -> np.ndarray:
    """The smallest e with value ≤ 2^e, NOTHING for 0: int32."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.where(values > 0, exponent - (mantissa == 0.5), NOTHING).astype(np.int32)


def widened(bins: np.ndarray, by: np.ndarray) -> np.ndarray:
    """bins [..., F, B] with feature f's range doubled by[f] times: neighbours joined, zeros after them."""
    B = bins.shape[-1]
    for _ in range(int(min(by.max(initial=0), B.bit_length()))):
        grows = np.flatnonzero(by > 0)
        some = bins[..., grows, :]
        joined = np.zeros_like(some)
        joined[..., : B // 2] = some.reshape(*some.shape[:-1], B // 2, 2).sum(-1)
        bins[..., grows, :] = joined
        by = by - 1
    return bins
