"""From what was learnt to pages: explanations in words, the map, effects under examples; the site's data.

Axes: F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.analysis.cards import Cards
from fastsae.analysis.evidence import evidence_of, live_features
from fastsae.analysis.explain import ExplainConfig, explain_features
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.logit_map import LogitMap
from fastsae.analysis.matches import Match
from fastsae.analysis.splitting import FeatureMap, Split, map_of
from fastsae.analysis.stream import Source
from fastsae.analysis.survey import Survey
from fastsae.analysis.text import Text
from fastsae.errors import FastSAEError
from fastsae.sae import SAE


@dataclass(frozen=True)
class Pages:
    """What all pages are made from. seed: of the features drawn, and of the map."""

    sae: SAE
    hook: str
    cards: Cards
    bytes_of: TokenBytes
    seed: int = 0
    show_progress: bool = True

    def sizes(self) -> dict[str, Any]:
        """What the results of every report begin with."""
        return {
            "hook": self.hook, "d_in": self.sae.cfg.d_in, "d_sae": self.sae.cfg.d_sae,
            "tokens": self.cards.tokens(), "documents": self.cards.documents(),
        }  # fmt: skip

    def drawn(self, first: Sequence[int], up_to: int) -> list[int]:
        """The features `first`, then others that fire often, at random, up to so many in all."""
        others = live_features(self.cards.survey, self.sae.cfg.d_sae, self.seed)
        first = list(dict.fromkeys(first))
        return [*first, *(f for f in others if f not in set(first))][: max(len(first), up_to)]

    def explained(self, surveys: dict[str, Survey], shown: Sequence[int], count: int, up_to: int) -> dict | None:
        """Scores of the offline explainer on `count` features and as many of each control, from the same tokens, and
        what it said; of up_to features in all what it said alone, those `shown` first."""
        drawn = {name: live_features(survey, count, self.seed) for name, survey in surveys.items()}
        groups = {name: evidence_of(Cards(survey), drawn[name]) for name, survey in surveys.items() if drawn[name]}
        summary, said = self._explained(groups)
        known = {one[0] for one in said}
        live = live_features(self.cards.survey, self.sae.cfg.d_sae, self.seed)
        rest = [f for f in dict.fromkeys([*(f for f in shown if f in set(live)), *live]) if f not in known]
        rest = rest[: max(0, up_to - len(known))]
        others = self._explained({"features": evidence_of(self.cards, rest)})[1] if rest else []
        if not said and not others:
            return None
        return {"summary": summary, "features": said, "others": others}

    def _explained(self, groups: dict[str, list]) -> tuple[dict, list[list]]:
        """Means by group, and [feature, explanation, score, detection] of the features, best first."""
        if not groups:
            return {}, []
        found = explain_features(groups, self.bytes_of, ExplainConfig(seed=self.seed), show_progress=self.show_progress)
        said = sorted(found["results"].get("features", []), key=lambda one: -(one.spearman or 0))
        return (
            {name: {k: asdict(s) for k, s in row.items()} for name, row in found["summary"].items()},
            [[one.feature, one.explanation, one.spearman, one.detection] for one in said],
        )

    def effects(
        self, model: Any, tokenizer: Any, text: Text, features: Sequence[int], batch_size: int
    ) -> dict[int, list[np.ndarray]]:
        """ΔNLL under the strongest examples of these features; see facts.window_effects."""
        from fastsae.dashboard import facts

        return facts.window_effects(
            Source(self.sae, model, self.hook), tokenizer, text, self.cards, sorted(features), batch_size=batch_size,
            show_progress=self.show_progress,
        )  # fmt: skip

    def write(
        self, out: Path, results: dict, *, logits: LogitMap | None = None, match: Match | None = None,
        split: Split | None = None, layers: Sequence[SAE] = (), effects: dict[int, list[np.ndarray]] | None = None,
    ) -> None:  # fmt: skip
        """out/index.html and what it shows of all features. layers: the dictionaries of `split`, narrowest first."""
        from fastsae.dashboard import facts, site

        about = facts.Facts(
            self.cards, self.bytes_of, self.hook, results,
            logits=None if logits is None else facts.logits_of(logits, self.sae, len(self.bytes_of)),
            neighbours=facts.neighbours_of(self.sae),
            match=match,
            split=split,
            map=self._map(layers if split is not None else [self.sae], split),
            layer=0 if split is None else split.widths.index(self.sae.cfg.d_sae),
            ultra_low=facts.ultra_low_of(self.sae, self.cards),
            explanations=facts.explanations_of(results),
            effects=effects or {},
        )  # fmt: skip
        site.write_site(out, about, show_progress=self.show_progress)

    def _map(self, layers: Sequence[SAE], split: Split | None) -> FeatureMap | None:
        """None where too few features fire to be mapped, or umap is not installed."""
        try:
            keep = None if split is None else [part > 0 for part in split.density]
            return map_of([one.W_dec for one in layers], keep, seed=self.seed)
        except FastSAEError:
            return None
