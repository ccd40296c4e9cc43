"""What an explainer is shown, what it has to predict, and how its predictions are scored.

Three protocols: the simulation of Bricken et al. 2023 ("Towards Monosemanticity", automated interpretability), and
detection and fuzzing (Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models").
An explanation is made from one half of the documents and scored on windows of the other half.

Axes: W windows, N tokens of all windows, m intervals of activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastsae.analysis.examples import Evidence, Example
from fastsae.errors import FastSAEError

AROUND = 4  # tokens on each side of the chosen one: windows of 9 tokens (Bricken et al. 2023)
LEVELS = 9  # activations are shown and predicted as 0 (silent) to 9


@dataclass(frozen=True)
class Mix:
    """How many windows are drawn from each part of an Evidence; the intervals share theirs evenly."""

    top: int
    intervals: int
    random: int
    elsewhere: int

    def scaled(self, total: int) -> Mix:
        """About `total` windows in the same proportions, at least one of each part that has any."""
        parts = (self.top, self.intervals, self.random, self.elsewhere)
        return Mix(*(max(1, round(part * total / sum(parts))) if part else 0 for part in parts))


# Bricken et al. 2023: 49 windows to explain from, 60 to predict. The 49 are 10 top, 2 from each of 12 intervals, 5
# random, 10 of the top tokens elsewhere. The parts of the 60 are our reading of the paper.
TO_EXPLAIN = Mix(top=10, intervals=24, random=5, elsewhere=10)
TO_PREDICT = Mix(top=6, intervals=24, random=10, elsewhere=20)


@dataclass(frozen=True, eq=False)
class Window:
    """At most 9 tokens. token_ids: [n] int64. activations: [n]. levels: [n] int64, 0–9. part: of the Evidence."""

    token_ids: np.ndarray
    activations: np.ndarray
    levels: np.ndarray
    part: str

    @property
    def active(self) -> np.ndarray:
        """[n] bool: where the feature is on."""
        return self.activations > 0


def quantised(activations: np.ndarray, maximum: float) -> np.ndarray:
    """⌈9 · activation / maximum⌉ in 0–9, int64: 0 is silent and nothing else, 9 the top ninth.

    Raises FastSAEError for activations that are not finite: they would be the smallest of all integers.
    """
    if not np.isfinite(activations).all():
        raise FastSAEError(f"activations must be finite, got {activations.tolist()}: cut the window where tokens end")
    if maximum <= 0:
        return np.zeros(len(activations), dtype=np.int64)
    return np.clip(np.ceil(LEVELS * activations.astype(np.float64) / maximum), 0, LEVELS).astype(np.int64)


def windows(evidence: Evidence, mix: Mix, seed: int, around: int = AROUND) -> list[Window]:
    """The windows of a mix, each place of the text once; fewer where the evidence has fewer.

    Top windows are the strongest; the others are drawn. The order is shuffled: it says nothing about activations.
    """
    generator = np.random.default_rng((seed, evidence.feature))
    taken: set[tuple[int, int]] = set()
    chosen: list[Window] = []

    def take(pool: Iterator[Example], n: int, part: str) -> int:
        before = len(chosen)
        while len(chosen) - before < n and (example := next(pool, None)) is not None:
            if (example.document, example.position) not in taken:
                taken.add((example.document, example.position))
                chosen.append(_window(example.cut(around), evidence.maximum, part))
        return len(chosen) - before

    take(iter(evidence.top), mix.top, "top")
    pools = [iter(_shuffled(pool, generator)) for pool in evidence.intervals]
    wanted = mix.intervals
    while wanted:  # one from each in turn, strongest first, until there are enough or none is left
        before = wanted
        for pool in reversed(pools):
            wanted -= take(pool, min(1, wanted), "interval")
        if wanted == before:
            break
    take(iter(_shuffled(evidence.random, generator)), mix.random, "random")
    take(iter(_shuffled(evidence.elsewhere, generator)), mix.elsewhere, "elsewhere")
    return _shuffled(chosen, generator)


def _window(example: Example, maximum: float, part: str) -> Window:
    return Window(example.token_ids, example.activations, quantised(example.activations, maximum), part)


def _shuffled(items: Sequence, generator: np.random.Generator) -> list:
    return [items[i] for i in generator.permutation(len(items))]


# --- scores --------------------------------------------------------------------------------------------------------


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Pearson's r of the ranks, in [−1, 1]; 0 where x or y is constant. x, y, weights: [N].

    The rank of x_n with weights w is Σ_{x_k < x_n} w_k + ½ Σ_{x_k = x_n} w_k, and means and variances are weighted;
    equal weights give the usual coefficient, and a token of weight 2 counts as the same token twice.
    """
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    on = w > 0
    if not on.any():
        return 0.0
    w = w[on] / w[on].sum()
    a, b = _ranks(np.asarray(x)[on], w), _ranks(np.asarray(y)[on], w)
    a, b = a - w @ a, b - w @ b
    scale = np.sqrt((w @ a**2) * (w @ b**2))
    return float((w * a) @ b / scale) if scale > 1e-15 else 0.0


def _ranks(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    values, which = np.unique(x, return_inverse=True)
    mass = np.bincount(which, weights=w, minlength=len(values))
    return (np.cumsum(mass) - mass / 2)[which]


def token_weights(held_out: Sequence[Window], evidence: Evidence) -> np.ndarray | None:
    """[N], sums to 1: what each token of the windows stands for in its half of the documents; None if not counted.

    The windows hold far more of the strong intervals than the text does. An active token gets its interval's share of
    the text, divided by the tokens of that interval in the windows. The silent share goes to the silent tokens of the
    random windows alone: those beside an active token, and those chosen as the feature's usual tokens, are no fair
    sample of the text. Where no random window has any, all silent tokens share it. Intervals without a token in the
    windows are left out.
    """
    m, counts = len(evidence.interval_counts), np.asarray(evidence.interval_counts, dtype=np.float64)
    if not m or evidence.tokens <= 0 or evidence.maximum <= 0 or not held_out:
        return None
    values = np.concatenate([window.activations for window in held_out])
    fair = np.concatenate([np.full(len(window.levels), window.part == "random") for window in held_out])
    silent = values <= 0
    stratum = np.clip(np.ceil(m * values.astype(np.float64) / evidence.maximum), 1, m).astype(np.int64)
    stratum[silent] = 0
    mass = np.concatenate([[max(evidence.tokens - counts.sum(), 0.0)], counts])
    counted = ~silent | fair if (silent & fair).any() else np.ones(len(values), dtype=bool)
    members = np.bincount(stratum[counted], minlength=m + 1)
    weights = np.where(counted, (mass / np.maximum(members, 1))[stratum], 0.0)
    return weights / weights.sum() if weights.sum() > 0 else None


def balanced_accuracy(truth: Sequence[bool], answers: Sequence[bool]) -> float | None:
    """Mean of the shares of true and of false cases that are answered rightly; 0.5 is chance. None without both."""
    t, a = np.asarray(truth, dtype=bool), np.asarray(answers, dtype=bool)
    if not t.any() or t.all():
        return None
    return float((a[t].mean() + (~a[~t]).mean()) / 2)


# --- detection and fuzzing -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judged:
    """Windows to judge by yes or no. marks: of each window, [n] bool, the tokens that are shown «so»; None if none are.

    truth: [W], whether the feature is on in the window (detection), or on at the marked tokens (fuzzing).
    """

    windows: list[Window]
    marks: list[np.ndarray] | None
    truth: list[bool]


def detection(evidence: Evidence, n: int, seed: int) -> Judged:
    """n windows: one half has the feature somewhere, drawn evenly from the intervals; the other half, drawn at random,
    has not. Both halves shrink to the smaller one where the evidence has too few."""
    on = [w for w in windows(evidence, Mix(0, n // 2, 0, 0), seed) if w.active.any()]
    off = [w for w in windows(evidence, Mix(0, 0, len(evidence.random), 0), seed + 1) if not w.active.any()]
    size = min(len(on), len(off), n // 2)
    both = [*on[:size], *off[:size]]
    order = np.random.default_rng((seed, evidence.feature, 1)).permutation(len(both))
    return Judged([both[i] for i in order], None, [bool(i < size) for i in order])


def fuzzing(evidence: Evidence, n: int, seed: int) -> Judged:
    """n windows that have the feature, with tokens marked: in one half those where it is on, in the other as many
    others, drawn at random. Windows that are active all over are left out."""
    generator = np.random.default_rng((seed, evidence.feature, 2))
    pool = [w for w in windows(evidence, Mix(0, n, 0, 0), seed + 2) if w.active.any() and not w.active.all()]
    pool = pool[: len(pool) // 2 * 2]
    marks, truth = [], []
    for number, window in enumerate(pool):
        honest = number % 2 == 0
        mark = window.active.copy()
        if not honest:
            off = np.flatnonzero(~window.active)
            chosen = generator.permutation(off)[: int(window.active.sum())]
            mark = np.zeros_like(mark)
            mark[chosen] = True
        marks.append(mark)
        truth.append(honest)
    return Judged(pool, marks, truth)
