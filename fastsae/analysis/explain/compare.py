"""Groups of explained features side by side: features, and the controls without which no score can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCORES = ("spearman", "spearman_weighted", "detection", "fuzzing")
_SAMPLES = 2000


@dataclass(frozen=True)
class Summary:
    """Of a score over a group. n: features with a score; failed: features without one. median_interval, mean_interval:
    95 % bootstrap intervals over features (percentiles); None, like median and mean, where n is 0."""

    n: int
    failed: int
    median: float | None
    mean: float | None
    median_interval: tuple[float, float] | None
    mean_interval: tuple[float, float] | None


def compare(groups: Mapping[str, Sequence[Any]], seed: int = 0) -> dict[str, dict[str, Summary]]:
    """{group: {score: Summary}} of groups of ExplainResult. Features that failed are counted, not scored as 0."""
    return {
        name: {score: _summary([getattr(result, score) for result in results], seed) for score in SCORES}
        for name, results in groups.items()
    }


def _summary(scores: list[float | None], seed: int) -> Summary:
    values = np.array([score for score in scores if score is not None], dtype=np.float64)
    failed = len(scores) - len(values)
    if not len(values):
        return Summary(0, failed, None, None, None, None)
    generator = np.random.default_rng(seed)
    medians, means = np.empty(_SAMPLES), np.empty(_SAMPLES)
    for k in range(_SAMPLES):  # one sample at a time: thousands of features would make a large table
        drawn = values[generator.integers(len(values), size=len(values))]
        medians[k], means[k] = np.median(drawn), drawn.mean()
    return Summary(
        len(values), failed, float(np.median(values)), float(values.mean()), _interval(medians), _interval(means)
    )


def _interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
