"""Gaps: what a category covers and a feature skips, and which features have it.

In the paper words with ال go to a second Arabic feature, first bytes of characters to a third (Bricken et al. 2023).
One pass, memory O(F + V). Axes: n tokens of a batch, F features, V vocabulary, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.examples import Example
from fastsae.analysis.specificity import pearson
from fastsae.analysis.stream import Read, check_features
from fastsae.errors import FastSAEError


@dataclass(frozen=True)
class MissedToken:
    """A vocabulary entry: how often it belongs to the category, and how often of these the feature is silent."""

    token_id: int
    members: int
    missed: int


@dataclass(frozen=True)
class GapFeature:
    """Another feature on the gap, in figures of the tokens that are scored.

    share: part of the gap's tokens on which it fires. lift: share / its density over the tokens. precision: part of its
    firing that is in the gap. phi: Pearson's r of "fires" with "is in the gap"; by that of the tokens where features
    are chosen they are ranked.
    """

    feature: int
    share: float
    lift: float
    precision: float
    phi: float


@dataclass(frozen=True, eq=False)
class Gaps:
    """tokens scored, members of the category among them, missed: members on which the feature is silent.

    strings: entries most often missed. examples: windows drawn at random, each around a missed token (`at`); empty
    where the tokens came from a store. others: the features that have the gap, best first on the tokens where they are
    chosen; empty where these hold no gap, or the scored ones do not.
    """

    feature: int
    tokens: int
    members: int
    missed: int
    strings: list[MissedToken]
    examples: list[Example]
    others: list[GapFeature]

    @property
    def recall(self) -> float:
        """Share of the category that the feature covers; NaN for an empty category."""
        return 1 - self.missed / self.members if self.members else float("nan")


class GapCounter:
    """Adds up the gaps of one feature with one category; several run side by side over the same reads.

    source: which dictionary of a Read. examples: windows kept, of `around` tokens on each side. seed: of their choice.
    Raises FastSAEError for a feature that the dictionary does not have.
    """

    def __init__(
        self, feature: int, d_sae: int, *, source: int = 0, examples: int = 20, around: int = 8, seed: int = 0
    ) -> None:
        check_features([feature], d_sae)
        self.feature, self.source, self.around = feature, source, around
        self.tokens = self.members = self.missed = 0
        # Where others are chosen and where they are scored: firing on all tokens and on the gap; tokens and gap.
        self._fires = torch.zeros(2, 2, d_sae, dtype=torch.int64)
        self._sizes = np.zeros((2, 2), dtype=np.int64)
        self._seen = np.zeros((2, 0), dtype=np.int64)  # [2, V]: members, missed
        self._limit, self._rng = examples, np.random.default_rng([seed, feature])
        self._kept: list[tuple[float, Example]] = []

    def add(self, read: Read, inside: Tensor, scored: Tensor | None = None) -> None:
        """inside: [n] bool, the tokens of the category. scored: [n] bool, the tokens that everything is told of; on the
        others the features that have the gap are chosen, and nothing else. None: the same tokens for both, which
        flatters the features found."""
        code = read.codes[self.source]
        for given in (inside, inside if scored is None else scored):
            if given.shape != (code.n_tokens,):
                raise FastSAEError(
                    f"expected a label for each of {code.n_tokens} tokens, got shape {tuple(given.shape)}"
                )
        on = (code.valid() & (code.values > 0)).cpu()
        indices = code.indices.cpu().long()
        mine = on & (indices == self.feature)
        inside = inside.cpu().bool()
        gap = inside & ~mine.any(1)
        whole = torch.ones_like(inside)
        halves = (whole, whole) if scored is None else (~scored.cpu().bool(), scored.cpu().bool())
        for side, half in enumerate(halves):
            for row, tokens in enumerate((half, half & gap)):
                self._fires[side, row] += torch.bincount(indices[tokens][on[tokens]], minlength=self._fires.shape[2])
                self._sizes[side, row] += int(tokens.sum())
        inside, gap = inside & halves[1], gap & halves[1]
        self._count_strings(read.token_ids.cpu()[inside].numpy(), read.token_ids.cpu()[gap].numpy())
        self.tokens += int(halves[1].sum())
        self.members += int(inside.sum())
        self.missed += int(gap.sum())
        if read.grid is not None:
            activation = torch.where(mine, code.values.detach().float().cpu(), torch.zeros(())).sum(1)
            self._keep(read, gap, activation)

    def _count_strings(self, members: np.ndarray, missed: np.ndarray) -> None:
        size = max(self._seen.shape[1], int(members.max(initial=-1)) + 1)
        self._seen = np.pad(self._seen, ((0, 0), (0, size - self._seen.shape[1])))
        for row, ids in enumerate((members, missed)):
            self._seen[row] += np.bincount(ids, minlength=size)

    def _keep(self, read: Read, gap: Tensor, activation: Tensor) -> None:
        """Every missed token draws a number; the smallest `examples` numbers stay: a uniform sample, in one pass."""
        assert read.grid is not None and read.context_ids is not None
        place = torch.full((len(gap), 2), -1)
        rows, columns = (read.grid >= 0).nonzero(as_tuple=True)
        place[read.grid[rows, columns]] = torch.stack([rows, columns], dim=1)
        chosen = gap.nonzero().flatten().tolist()
        drawn: list[float] = self._rng.random(len(chosen)).tolist()
        worst = self._kept[-1][0] if len(self._kept) >= self._limit else np.inf
        best = [i for i in np.argsort(drawn)[: self._limit].tolist() if drawn[i] < worst]
        self._kept += [(drawn[i], self._window(read, chosen[i], place[chosen[i]].tolist(), activation)) for i in best]
        self._kept = sorted(self._kept, key=lambda pair: pair[0])[: self._limit]

    def _window(self, read: Read, n: int, place: list[int], activation: Tensor) -> Example:
        assert read.grid is not None and read.context_ids is not None
        row, column = place
        span = slice(max(0, column - self.around), column + self.around + 1)
        # Begin-of-text tokens and padding have no row: a window is cut at them.
        known = read.grid[row, span]
        at = column - span.start
        begin = max((i + 1 for i in range(at) if known[i] < 0), default=0)
        end = min((i for i in range(at, len(known)) if known[i] < 0), default=len(known))
        rows = known[begin:end]
        ids = read.context_ids[row, span][begin:end]
        return Example(
            ids.numpy().copy(), activation[rows].numpy().copy(), at - begin,
            int(read.documents[n]), int(read.positions[n]),
        )  # fmt: skip

    def result(self, strings: int = 20, others: int = 10) -> Gaps:
        """The gaps so far: the `strings` entries most often missed, the best `others` features."""
        members, missed = self._seen
        order = np.argsort(-missed, kind="stable")[:strings]
        return Gaps(
            feature=self.feature,
            tokens=self.tokens,
            members=self.members,
            missed=self.missed,
            strings=[MissedToken(int(i), int(members[i]), int(missed[i])) for i in order if missed[i]],
            examples=[example for _, example in self._kept],
            others=self._others(others),
        )

    def _others(self, count: int) -> list[GapFeature]:
        if not self._sizes[:, 1].all():
            return []
        fires = self._fires.double().numpy()
        chosen, phi = (
            pearson(n, all_, all_, missed, missed, gap)
            for (n, missed), (all_, gap) in zip(self._sizes.tolist(), fires, strict=True)
        )
        chosen[self.feature] = -1
        found = [int(i) for i in np.argsort(-chosen, kind="stable")[:count] if fires[0, 1, i] > 0]
        all_, gap = fires[1]
        share, often = gap / self.missed, np.maximum(all_, 1)
        return [
            GapFeature(
                i, float(share[i]), float(share[i] * self.tokens / often[i]), float(gap[i] / often[i]), float(phi[i])
            )
            for i in found
        ]


def gaps(
    reads: Iterable[tuple[Read, Tensor] | tuple[Read, Tensor, Tensor]],
    feature: int,
    d_sae: int,
    *,
    strings: int = 20,
    others: int = 10,
    **options: int,
) -> Gaps:
    """The gaps of a feature over reads, each with its labels, [n] bool, and, to be asked for, which of the tokens are
    scored, [n] bool, while the others choose (`GapCounter.add`). options: as GapCounter.

    Raises FastSAEError for a feature that the dictionary does not have, and when there is nothing to read.
    """
    counter = GapCounter(feature, d_sae, **options)
    for read, *labels in reads:
        counter.add(read, *labels)
    if not counter.tokens:
        raise FastSAEError("expected tokens to look for gaps in, got none: give it some text")
    return counter.result(strings, others)
