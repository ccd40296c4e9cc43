"""Is a feature what a proxy says it is? From the sums that one pass keeps; no token is looked at again.

Numpy throughout, with leading axes for as many features and categories as wanted. Axes: B bins of activation, n tokens.
Formulas: Bricken et al. 2023, "Towards Monosemanticity"; intervals: Wilson 1927.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fastsae.errors import FastSAEError


@dataclass(frozen=True, eq=False)
class Overlap:
    """A feature's active tokens by bin of activation, and those of them that belong to a category.

    edges: [B + 1], ascending; bin b holds edges[b] < activation ≤ edges[b + 1]. active, inside: [..., B], numbers of
    tokens. active_sum, inside_sum: [..., B], sums of their activations. tokens: all tokens read. members: [...] or a
    number, tokens of the category.
    """

    edges: np.ndarray
    active: np.ndarray
    inside: np.ndarray
    active_sum: np.ndarray
    inside_sum: np.ndarray
    tokens: int
    members: np.ndarray | int

    def __post_init__(self) -> None:
        B = np.shape(self.active)[-1]
        if np.shape(self.edges)[-1] != B + 1 or np.shape(self.inside)[-1] != B:
            raise FastSAEError(
                f"bins need one edge more than counts, got {np.shape(self.edges)[-1]} edges, {B} counts of active "
                f"tokens and {np.shape(self.inside)[-1]} of those inside"
            )
        if self.tokens < 1:
            raise FastSAEError("expected sums over at least one token, got none: read some text first")

    @property
    def base_rate(self) -> np.ndarray:
        """The category's share of all tokens: [...]."""
        return np.asarray(self.members, dtype=np.float64) / self.tokens


class OverlapCounter:
    """Adds up an Overlap of one feature, neuron or whatever has a value per token, batch by batch."""

    def __init__(self, edges: np.ndarray) -> None:
        B = len(edges) - 1
        self.edges = np.asarray(edges, dtype=np.float64)
        self._sums = np.zeros((4, B))  # active, inside, active_sum, inside_sum
        self.tokens = self.members = 0

    def add(self, values: np.ndarray, inside: np.ndarray) -> None:
        """values, inside: [n]. Values ≤ edges[0] are silent; one above the last edge goes to the last bin."""
        on = values > self.edges[0]
        B = len(self.edges) - 1
        place = np.clip(np.searchsorted(self.edges, values[on], side="left") - 1, 0, B - 1)
        hit = inside[on].astype(np.float64)
        for row, weights in enumerate((None, hit, values[on], values[on] * hit)):
            self._sums[row] += np.bincount(place, weights=weights, minlength=B)
        self.tokens += len(values)
        self.members += int(inside.sum())

    def overlap(self) -> Overlap:
        """What was added up so far."""
        active, inside, active_sum, inside_sum = self._sums.copy()
        return Overlap(self.edges, active, inside, active_sum, inside_sum, self.tokens, self.members)


@dataclass(frozen=True, eq=False)
class Specificity:
    """Share of active tokens that belong to the category.

    share, lift: [..., B], by bin, NaN in empty bins; lift = share / base rate. low, high: [..., B], the Wilson interval
    of share. total, total_lift: [...], over all active tokens. upper: [...], over those above half the highest edge.
    expected: [...], the histogram weighted by activation, Σ activation inside / Σ activation. expected_lift: [...].
    """

    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lift: np.ndarray
    base_rate: np.ndarray
    total: np.ndarray
    total_lift: np.ndarray
    upper: np.ndarray
    expected: np.ndarray
    expected_lift: np.ndarray


def specificity(overlap: Overlap, confidence: float = 0.95) -> Specificity:
    """Specificity by bin with base rate, lift and interval, and its activation-weighted form."""
    base = overlap.base_rate
    share = _ratio(overlap.inside, overlap.active)
    low, high = wilson(overlap.inside, overlap.active, confidence)
    total = _ratio(overlap.inside.sum(-1), overlap.active.sum(-1))
    above = overlap.edges[..., :-1] >= overlap.edges[..., -1:] / 2 - 1e-12
    upper = _ratio((overlap.inside * above).sum(-1), (overlap.active * above).sum(-1))
    expected = _ratio(overlap.inside_sum.sum(-1), overlap.active_sum.sum(-1))
    return Specificity(
        share=share,
        low=low,
        high=high,
        lift=_ratio(share, np.expand_dims(base, -1)),
        base_rate=base,
        total=total,
        total_lift=_ratio(total, base),
        upper=upper,
        expected=expected,
        expected_lift=_ratio(expected, base),
    )


def wilson(hits: np.ndarray, trials: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n). NaN for no trials.

    Raises FastSAEError for a confidence outside (0, 1).
    """
    from statistics import NormalDist

    if not 0 < confidence < 1:
        raise FastSAEError(f"confidence must be between 0 and 1, got {confidence}; 0.95 is usual")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    n = np.where(np.asarray(trials) > 0, trials, np.nan)
    p = hits / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return np.clip((middle - half) / (1 + z * z / n), 0, 1), np.clip((middle + half) / (1 + z * z / n), 0, 1)


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over n tokens of a feature's activation f and a target p: [...] each, float64."""

    n: int
    f: np.ndarray
    ff: np.ndarray
    p: np.ndarray
    pp: np.ndarray
    fp: np.ndarray

    @property
    def pearson(self) -> np.ndarray:
        """Pearson's r of f and p: [...]; 0 where one of them is constant."""
        return pearson(self.n, self.f, self.ff, self.p, self.pp, self.fp)


def pearson(n: float, x: ArrayLike, xx: ArrayLike, y: ArrayLike, yy: ArrayLike, xy: ArrayLike) -> np.ndarray:
    """r = (n Σxy − Σx Σy) / √((n Σx² − (Σx)²)(n Σy² − (Σy)²)) from sums that broadcast, float64.

    0 where x or y is constant, to the rounding of the sums. `cross.pearson` is the same in torch, of all pairs.
    """
    x, xx, y, yy, xy = (np.asarray(part, dtype=np.float64) for part in (x, xx, y, yy, xy))
    var_x, var_y = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
    varies = (var_x > 1e-12 * xx / n) & (var_y > 1e-12 * yy / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (xy / n - (x / n) * (y / n)) / np.sqrt(var_x * var_y)
    return np.where(varies, np.clip(np.nan_to_num(r), -1, 1), 0.0)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Pearson's r of activation and proxy, the proxy as yes or no (> 0) and as max(proxy, 0): [...] each.

    recall: share of the category's tokens on which the feature is active at all; NaN for an empty category.
    """

    binary: np.ndarray
    clipped: np.ndarray
    recall: np.ndarray


def sensitivity(overlap: Overlap, binary: Moments, clipped: Moments) -> Sensitivity:
    """Both of the paper's thresholdings, with recall."""
    recall = _ratio(overlap.inside.sum(-1), np.asarray(overlap.members, dtype=np.float64))
    return Sensitivity(binary.pearson, clipped.pearson, recall)


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """"The feature is above a threshold" as a classifier of the category.

    thresholds: [B], edges of bins, highest first. precision, recall: [..., B]; precision is NaN where nothing is above
    the threshold. average_precision: [...], Σ (R_k − R_{k−1}) P_k over the thresholds and a last one below silence,
    where recall is 1 and precision the base rate: a feature that is always silent scores the base rate. best_f1,
    best_threshold: [...], the threshold that is best on these very tokens; `f1` scores it on others.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    average_precision: np.ndarray
    best_f1: np.ndarray
    best_threshold: np.ndarray


def precision_recall(overlap: Overlap) -> PrecisionRecall:
    """From the bins: activations within one are taken as tied."""
    inside = np.cumsum(overlap.inside[..., ::-1], -1)
    active = np.cumsum(overlap.active[..., ::-1], -1)
    members = np.expand_dims(np.asarray(overlap.members, dtype=np.float64), -1)
    precision, recall = _ratio(inside, active), _ratio(inside, np.broadcast_to(members, inside.shape))
    steps = np.diff(recall, prepend=0.0)
    rest = (1 - recall[..., -1]) * overlap.base_rate
    average = np.where(steps > 0, steps * np.nan_to_num(precision), 0.0).sum(-1) + rest
    f1 = np.nan_to_num(_ratio(2 * inside, active + members))
    best = f1.argmax(-1)
    thresholds = overlap.edges[..., :-1][..., ::-1]
    shown = np.broadcast_to(thresholds, f1.shape)
    return PrecisionRecall(
        thresholds=thresholds,
        precision=precision,
        recall=recall,
        average_precision=average,
        best_f1=np.take_along_axis(f1, best[..., None], -1)[..., 0],
        best_threshold=np.take_along_axis(shown, best[..., None], -1)[..., 0],
    )


def f1(overlap: Overlap, threshold: ArrayLike) -> np.ndarray:
    """F1 of "the feature is above the threshold", an edge of a bin: [...]. 0 where nothing is above it."""
    above = overlap.edges[..., :-1] >= np.expand_dims(np.asarray(threshold, dtype=np.float64), -1)
    inside, active = (overlap.inside * above).sum(-1), (overlap.active * above).sum(-1)
    return np.nan_to_num(_ratio(2 * inside, active + np.asarray(overlap.members, dtype=np.float64)))


def _ratio(above: ArrayLike, below: ArrayLike) -> np.ndarray:
    """above / below in float64, NaN where below is 0."""
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)
