"""What a survey says of one feature, or of all, in the form in which people read it.

    cards = Cards(survey)
    cards.top(7), cards.intervals(7), cards.histogram(7), cards.overlap(7, "Arabic", half=1), cards.evidence(7, half=0)

half: 0 where features are chosen, 1 where they are scored, None for all text. Axes: F features, D neurons, P proxies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastsae.analysis import neurons, specificity
from fastsae.analysis.examples import Evidence, Example
from fastsae.analysis.histogram import NOTHING
from fastsae.analysis.kept import Kept
from fastsae.analysis.parts import ranks
from fastsae.analysis.specificity import Moments, Overlap
from fastsae.analysis.survey import BINS, Survey
from fastsae.errors import FastSAEError

Half = int | None

_LEAST_SAMPLED, _LEAST_BOTH = 5, 2  # tokens of a sample on which a feature must fire, and with a partner
_OFTEN = 0.01  # share of the tokens below which some window of thousands is silent


class Partner(NamedTuple):
    """A feature that fires together with another. count: tokens on which both do. jaccard: of those on which one does.
    lift: how many times as many as if they did not know of each other. All three are estimates where pairs were counted
    on a sample (Survey.pairs_sampled)."""

    feature: int
    count: int
    jaccard: float
    lift: float


class Cards:
    """Reads a survey. Raises FastSAEError for features, proxies and halves that it does not have."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        for table in (survey.top, survey.bottom, survey.sampled):
            table.trim()

    # --- of all features --------------------------------------------------------------------------------------------

    def tokens(self, half: Half = None) -> int:
        """How many were read."""
        return int(self._sum("tokens", half))

    def documents(self) -> int:
        """Of how many documents tokens were read; of a store read in part, how many are in it."""
        first, limit = self.survey.first, self.survey.config.tokens
        read = first[1:] > first[:-1]
        if self.survey.of.get("rows") == "in random order":
            here = np.zeros(len(read), dtype=bool)
            for _, _, low, high in self.survey.parts:
                here[low:high] = True
            return int((read & here).sum())
        return int((read & (first[:-1] < (limit or first[-1]))).sum())

    def density(self, half: Half = None) -> np.ndarray:
        """Share of the tokens on which each feature fires: [F]."""
        return self._sum("fires", half) / max(self.tokens(half), 1)

    def maximum(self, half: Half = None) -> np.ndarray:
        """Largest activation of each feature: [F]."""
        _check_half(half)
        return self.survey.maximum.max(0) if half is None else self.survey.maximum[half]

    def mean_active(self, half: Half = None) -> np.ndarray:
        """Mean activation of each feature where it fires, 0 where it never does: [F]."""
        return self._sum("f", half) / np.maximum(self._sum("fires", half), 1)

    def pearson(self, half: Half = None, clipped: bool = False) -> np.ndarray:
        """r of every feature with every proxy as yes or no, or with max(proxy, 0): [F, P]."""
        p, pp, fp = self._proxy_sums(half, clipped, "f")
        f, ff = self._sum("f", half)[:, None], self._sum("ff", half)[:, None]
        return specificity.pearson(max(self.tokens(half), 1), f, ff, p, pp, fp)

    def neuron_pearson(self, half: Half = None, clipped: bool = False) -> np.ndarray:
        """The same of every neuron: [D, P]."""
        p, pp, xp = self._proxy_sums(half, clipped, "x")
        x, xx = self._sum("x", half)[:, None], self._sum("xx", half)[:, None]
        return specificity.pearson(max(self.tokens(half), 1), x, xx, p, pp, xp)

    def closest_neurons(self, k: int = 3) -> neurons.ClosestNeurons | None:
        """The neurons whose activations follow each feature's best; None where the survey left that out."""
        fx = self.survey.sums["fx"]
        if not fx.size:
            return None
        total = {name: self._sum(name, None) for name in ("f", "ff", "x", "xx")}
        return neurons.closest_neurons(
            max(self.tokens(), 1), total["f"], total["ff"], total["x"], total["xx"], fx, k
        )

    def base_rate(self, half: Half = None) -> np.ndarray:
        """Each category's share of the tokens: [P]."""
        return self._sum("p", half) / max(self.tokens(half), 1)

    def notes(self, feature: int | None = None) -> list[str]:
        """What the survey left out, or only estimates, and why: a sentence each. feature: and of that one's card."""
        survey, found = self.survey, []
        F, D = survey.d_sae, survey.d_in
        if not survey.sums["fx"].size:
            found.append(
                f"Correlations of features with neurons were left out: they would take {8 * F * D / 2**30:.2g} GiB, "
                f"more than neuron_memory = {survey.config.neuron_memory:g}."
            )
        sampled = len(survey.pairs.places())
        if survey.pairs_sampled and sampled:
            found.append(
                f"What fires together is estimated from {sampled:,} tokens drawn at random, as the "
                f"dictionary has more than cofiring_up_to = {survey.config.cofiring_up_to} features."
            )
        elif not survey.sums["together"].size:
            found.append("What fires together was not counted.")
        if missing := survey.missing():
            found.append(f"A part of the text is left out: {ranks(missing)} missing.")
        if feature is None:
            return found
        self._check(feature)
        share = int(survey.sums["fires"][:, feature].sum()) / max(self.tokens(), 1)
        if share > _OFTEN and not self.random(feature, 1, silent=True):
            found.append(
                f"The feature fires on {share:.2g} of the tokens, and somewhere in every window drawn at random: there "
                "are no silent ones."
            )
        return found

    # --- of one feature ---------------------------------------------------------------------------------------------

    def histogram(self, feature: int, half: Half = None) -> tuple[np.ndarray, np.ndarray]:
        """(edges [B + 1], active tokens [B]): exact counts of edges[b] < activation ≤ edges[b + 1], up to the maximum.
        Empty for a feature that never fired."""
        self._check(feature)
        edges = self._edges(feature)
        return edges, self._sum("histogram", half)[feature, : len(edges) - 1]

    def overlap(self, feature: int, category: str | int, half: Half = None) -> Overlap:
        """The feature's histogram with what of it is inside the category: for `specificity` and its kin."""
        self._check(feature)
        p = self._proxy(category)
        edges = self._edges(feature)
        B = len(edges) - 1

        def binned(name: str) -> np.ndarray:
            array = self.survey.sums[name][p] if name.startswith("inside") else self.survey.sums[name]
            return (array.sum(0) if half is None else array[half])[feature, :B].astype(np.float64)

        return Overlap(
            edges, binned("histogram"), binned("inside"), binned("weight"), binned("inside_weight"),
            max(self.tokens(half), 1), int(self._sum("p", half)[p]),
        )  # fmt: skip

    def moments(self, feature: int, category: str | int, half: Half = None, clipped: bool = False) -> Moments:
        """Sums of the feature and the proxy as yes or no, or as max(proxy, 0)."""
        self._check(feature)
        q = self._proxy(category)
        p, pp, fp = self._proxy_sums(half, clipped, "f")
        f, ff = self._sum("f", half)[feature], self._sum("ff", half)[feature]
        return Moments(max(self.tokens(half), 1), f, ff, p[q], pp[q], fp[feature, q])

    def top(self, feature: int, n: int = 20, half: Half = None) -> list[Example]:
        """The strongest examples, strongest first: of each stretch of 2 · around tokens of the text (counted from its
        start) the strongest token, unless it stands at most `around` tokens from a stronger example. Fewer than were
        kept where some stand so near."""
        return self._best(self.survey.top, feature, n, half)

    def bottom(self, feature: int, n: int = 20, half: Half = None) -> list[Example]:
        """The weakest examples, weakest first, as far apart as those of `top`."""
        return self._best(self.survey.bottom, feature, n, half)

    def intervals(self, feature: int, m: int = 11, n: int = 5, half: Half = None) -> list[list[Example]]:
        """Up to n examples from each of m equal intervals of (0, maximum], weakest interval first, drawn at random.
        How many there can be: see SurveyConfig.per_interval.

        They come from samples of sixteenths of the feature's range, which is at most twice its maximum: where an
        interval holds a part of a sixteenth only, that part may be thinner in the sample than it is in the text.
        """
        self._check(feature)
        highest = float(self.maximum(half)[feature])
        found: list[list[Example]] = [[] for _ in range(m)]
        table = self.survey.sampled
        rows = self._rows(table, feature, half)
        rows = rows[(table.value[rows] > 0) & (table.value[rows] <= highest)]
        place = np.clip(np.ceil(table.value[rows] / max(highest, 1e-30) * m).astype(int) - 1, 0, m - 1)
        for row, i in sorted(zip(rows.tolist(), place.tolist(), strict=True), key=lambda pair: table.key[pair[0]]):
            if len(found[i]) < n:
                found[i].append(self._example(table.where[row], table.window[row], table.ids[row]))
        return found

    def random(self, feature: int, n: int = 20, half: Half = None, silent: bool = False) -> list[Example]:
        """Windows drawn without regard to the feature; silent: only those on which it is off throughout: few or none
        for a feature that fires often (see `notes`)."""
        self._check(feature)
        _check_half(half)
        windows = self.survey.random
        where = windows.numbers(None if half is None else bool(half))
        active, ids = windows.of(feature, where)
        rows = np.arange(len(where))
        if silent and len(rows):
            rows = rows[~((active > 0) & _around(ids, self.survey.config.around)).any(1)]
        return [self._example(where[i], active[i], ids[i]) for i in rows[:n]]

    def elsewhere(self, feature: int, n: int = 10, half: Half = None, tokens: int = 5) -> list[Example]:
        """Random windows that hold one of the tokens on which the feature is strongest, whether it is on there or not;
        those most often on top first, in turns."""
        self._check(feature)
        _check_half(half)
        centre = self.survey.config.around
        rows = self._rows(self.survey.top, feature, half)
        ids, counts = np.unique(self.survey.top.ids[rows, centre], return_counts=True)
        wanted = ids[np.argsort(-counts, kind="stable")][:tokens].tolist()
        windows = self.survey.random
        where = windows.numbers(None if half is None else bool(half))
        active, window_ids = windows.of(feature, where)
        turns: list[list[Example]] = [[] for _ in wanted]
        for i, token in enumerate(wanted):
            for row, at in zip(*np.nonzero(window_ids == token), strict=True):
                if len(turns[i]) < n:
                    turns[i].append(self._example(where[row] + at - centre, active[row], window_ids[row], int(at)))
        mixed = [turn[i] for i in range(n) for turn in turns if i < len(turn)]
        return mixed[:n]

    def evidence(
        self, feature: int, half: Half = None, *, intervals: int = 12, per_interval: int = 8, random: int = 60,
        top_logits: list[str] | None = None, bottom_logits: list[str] | None = None,
    ) -> Evidence:  # fmt: skip
        """What an explainer may see of the feature (half 0), or is asked about (half 1).

        A survey of per_interval = 4 has 3 to 5 examples of each of 12 intervals in each half; for 8, survey with
        per_interval = 12.
        """
        self._check(feature)
        highest = float(self.maximum(half)[feature])
        return Evidence(
            feature=feature,
            maximum=highest,
            top=self.top(feature, self.survey.config.top, half),
            intervals=self.intervals(feature, intervals, per_interval, half),
            random=self.random(feature, random, half),
            elsewhere=self.elsewhere(feature, 20, half),
            top_logits=top_logits or [],
            bottom_logits=bottom_logits or [],
            interval_counts=self._interval_counts(feature, intervals, highest, half),
            tokens=self.tokens(half),
        )

    def cofiring(self, feature: int, n: int = 10) -> list[Partner] | None:
        """The features that most often fire when this one does, by Jaccard; None where pairs were not counted.

        Of more than cofiring_up_to features, pairs are counted on a sample: a feature that fires on fewer than 5 of its
        tokens has no partners, and none that fires with it on only one of them is any.
        """
        self._check(feature)
        together, sample = self.survey.sums["together"], self.survey.pairs
        fires = self._sum("fires", None)
        if together.size:
            partners = np.flatnonzero(together[feature])
            both = together[feature, partners]
        elif self.survey.pairs_sampled and len(sample.where):
            on, entries = sample.beside(feature)
            partners, seen = np.unique(entries, return_counts=True)
            partners, seen = (part[(seen >= _LEAST_BOTH) & (on >= _LEAST_SAMPLED)] for part in (partners, seen))
            both = np.minimum(np.round(seen * (fires[feature] / max(on, 1))), fires[partners])
        else:
            return None
        others = partners != feature
        partners, both = partners[others], both[others]
        jaccard = both / np.maximum(fires[partners] + fires[feature] - both, 1)
        lift = both * max(self.tokens(), 1) / (fires[partners] * fires[feature])
        order = np.argsort(-jaccard, kind="stable")[:n]
        return [Partner(int(partners[i]), int(both[i]), float(jaccard[i]), float(lift[i])) for i in order]

    # --- within -----------------------------------------------------------------------------------------------------

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.survey.d_sae:
            raise FastSAEError(f"features must be numbers from 0 to {self.survey.d_sae - 1}, got {feature}")

    def _proxy(self, category: str | int) -> int:
        if isinstance(category, int | np.integer):
            if not 0 <= category < len(self.survey.proxies):
                raise FastSAEError(f"proxies must be numbers below {len(self.survey.proxies)}, got {category}")
            return int(category)
        if category not in self.survey.proxies:
            known = ", ".join(self.survey.proxies) or "none"
            raise FastSAEError(f"the survey has no proxy {category!r}; it has {known}")
        return self.survey.proxies.index(category)

    def _sum(self, name: str, half: Half) -> np.ndarray:
        _check_half(half)
        array = self.survey.sums[name]
        return array.sum(0) if half is None else array[half]

    def _proxy_sums(self, half: Half, clipped: bool, of: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Σp, Σp² [P] and Σf·p [F, P], or of neurons [D, P]."""
        if clipped:
            return self._sum("c", half), self._sum("cc", half), self._sum(of + "c", half)
        return self._sum("p", half), self._sum("p", half), self._sum(of + "p", half)

    def _edges(self, feature: int) -> np.ndarray:
        """Of the histogram's bins, up to the one with the maximum: [B + 1]."""
        exponent = int(self.survey.ranges.exponent[feature])
        if exponent == NOTHING:
            return np.zeros(1)
        width = float(np.ldexp(1.0, exponent)) / BINS
        count = min(BINS, max(1, int(np.ceil(float(self.maximum()[feature]) / width))))
        return np.arange(count + 1) * width

    def _interval_counts(self, feature: int, m: int, highest: float, half: Half) -> list[int]:
        """Active tokens in m equal intervals of (0, highest], from the bins; one that lies across an edge is split."""
        edges, counts = self.histogram(feature, half)
        if not highest or len(edges) < 2:
            return [0] * m
        below = np.interp(np.linspace(0, highest, m + 1), edges, np.concatenate([[0], np.cumsum(counts)]))
        below[-1] = counts.sum()
        return np.diff(np.round(below)).astype(int).tolist()

    def _rows(self, table: Kept, feature: int, half: Half) -> np.ndarray:
        _check_half(half)
        rows = table.of(feature)
        return rows if half is None else rows[table.half[rows] == bool(half)]

    def _best(self, table: Kept, feature: int, n: int, half: Half) -> list[Example]:
        self._check(feature)
        rows = self._rows(table, feature, half)
        rows = rows[np.lexsort((table.where[rows], table.key[rows]))]
        found: list[Example] = []
        for row in rows:
            if len(found) >= n:
                break
            example = self._example(table.where[row], table.window[row], table.ids[row])
            if not any(_near(example, better, table.around) for better in found):
                found.append(example)
        return found

    def _example(self, where: Any, window: np.ndarray, ids: np.ndarray, at: int | None = None) -> Example:
        """What stands around the token `where` of the text, at place `at` of the window (its middle), as far as to the
        edges of the context or a special token."""
        at = self.survey.config.around if at is None else at
        there = np.flatnonzero(_around(ids[None], at)[0])
        low, high = int(there[0]), int(there[-1]) + 1
        document = int(np.searchsorted(self.survey.first, where, side="right")) - 1
        return Example(
            ids[low:high].astype(np.int64), window[low:high].astype(np.float32), at - low, document,
            int(where - self.survey.first[document]),
        )  # fmt: skip


def _check_half(half: Half) -> None:
    if half not in (None, 0, 1):
        raise FastSAEError(f"half must be 0 (where features are chosen), 1 (where they are scored) or None, got {half}")


def _near(one: Example, other: Example, around: int) -> bool:
    return one.document == other.document and abs(one.position - other.position) <= around


def _around(ids: np.ndarray, at: int) -> np.ndarray:
    """[M, W] bool: which places of windows with these ids are joined to place `at` by tokens alone. Special tokens, of
    which nothing was read, are −1 as is what lies outside of the context."""
    there = ids >= 0
    before = np.logical_and.accumulate(there[:, at::-1], axis=1)[:, ::-1]
    return np.concatenate([before[:, :-1], np.logical_and.accumulate(there[:, at:], axis=1)], axis=1)
