"""What the site tells of a dictionary beside its survey, and how to get it from the dictionary and its model.

    facts = Facts(cards, TokenBytes.of(tokenizer), logits=logits_of(…), neighbours=neighbours_of(sae))
    fastsae.dashboard.site.write_site("report", facts)

Everything but the cards may be missing; the site leaves out what is not known. Axes: F features, V vocabulary, k best.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.ablation import ablation
from fastsae.analysis.cards import Cards
from fastsae.analysis.evidence import CHOOSE, SCORE
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.logit_map import LogitMap
from fastsae.analysis.neurons import ClosestNeurons
from fastsae.analysis.quality import UltraLow, alignment_of, ultra_low
from fastsae.analysis.splitting import FeatureMap, Split
from fastsae.analysis.stream import Source
from fastsae.analysis.text import Text
from fastsae.analysis.universality import Match
from fastsae.errors import FastSAEError
from fastsae.progress import progress
from fastsae.sae import SAE

LOGIT_BINS = 40
FOLLOWS = 0.1  # Pearson's r, on the half where features are chosen, below which a feature follows no category
_BLOCK = 1024  # decoder rows compared at once
_AT_ONCE = 16  # features whose effects are measured together: some share contexts


class Logits(NamedTuple):
    """top, bottom: [F, k] token ids; top_values, bottom_values: [F, k], change of the logit per unit of activation,
    median-shifted. low, high: [F], ends of the histogram; counts: [F, 40], tokens of the vocabulary in its bins."""

    top: np.ndarray
    top_values: np.ndarray
    bottom: np.ndarray
    bottom_values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray


class Neighbours(NamedTuple):
    """features, cosine: [F, k], those whose decoder rows point the same way, closest first."""

    features: np.ndarray
    cosine: np.ndarray


class Explained(NamedTuple):
    """An explanation and its scores on held-out windows; None where there is none."""

    text: str
    spearman: float | None = None
    detection: float | None = None


@dataclass(frozen=True, eq=False)
class Facts:
    """cards: of the survey. bytes_of: of the tokenizer's vocabulary. hook: the module that the dictionary reads.

    results: what `analysis.analyze` returns, of which the site shows quality, categories, universality, splitting.
    match: the other run. split: dictionaries of several widths; layer: which of these this one is. map: of the same
    ones, or of this one alone. explanations: see explanations_of. effects: feature → ΔNLL of the tokens of each of its
    top windows, in the order of `cards.top` (see window_effects).
    Raises FastSAEError where parts are of dictionaries of different sizes.
    """

    cards: Cards
    bytes_of: TokenBytes
    hook: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    logits: Logits | None = None
    neighbours: Neighbours | None = None
    match: Match | None = None
    split: Split | None = None
    map: FeatureMap | None = None
    layer: int = 0
    ultra_low: UltraLow | None = None
    explanations: dict[int, Explained] = field(default_factory=dict)
    effects: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        F = self.d_sae
        sizes = {
            "logits": None if self.logits is None else len(self.logits.top),
            "neighbours": None if self.neighbours is None else len(self.neighbours.features),
            "ultra_low": None if self.ultra_low is None else len(self.ultra_low.members),
            "split": None if self.split is None else self.split.widths[self.layer],
        }
        for name, size in sizes.items():
            if size not in (None, F):
                raise FastSAEError(f"the survey is of {F} features, {name} of {size}: give those of one dictionary")

    @property
    def d_sae(self) -> int:
        return self.cards.survey.d_sae

    @cached_property
    def pearson(self) -> tuple[np.ndarray, np.ndarray]:
        """r with every proxy on the half where features are chosen and on the one where they are scored, [F, P]; NaN
        where one of both does not vary."""
        return self.cards.pearson(CHOOSE), self.cards.pearson(SCORE)

    @cached_property
    def best_proxy(self) -> np.ndarray:
        """[F], the proxy that each feature follows best on the half where features are chosen; −1 where it follows
        none (r below FOLLOWS)."""
        if not self.cards.survey.proxies:
            return np.full(self.d_sae, -1)
        r = np.nan_to_num(self.pearson[CHOOSE], nan=-1.0)
        return np.where(r.max(1) >= FOLLOWS, r.argmax(1), -1)

    @cached_property
    def neurons(self) -> ClosestNeurons | None:
        return self.cards.closest_neurons(3)

    @property
    def layer_of_map(self) -> int:
        """Which of the dictionaries of the map this one is: the only one, or the one that it is in `split`."""
        layers = [] if self.map is None else np.unique(self.map.layer).tolist()
        return int(layers[0]) if len(layers) == 1 else self.layer

    @cached_property
    def clusters(self) -> dict[int, int]:
        """Feature → its cluster on the map, of those that are in one."""
        if self.map is None:
            return {}
        mine = (self.map.layer == self.layer_of_map) & (self.map.clusters >= 0)
        return dict(zip(self.map.feature[mine].tolist(), self.map.clusters[mine].tolist(), strict=True))

    @cached_property
    def place_in_match(self) -> dict[int, int]:
        """Feature → its row in `match`."""
        return {} if self.match is None else {int(f): i for i, f in enumerate(self.match.features.tolist())}


def explanations_of(results: dict[str, Any]) -> dict[int, Explained]:
    """Feature → its explanation, from what `analysis.analyze` returns."""
    explain = results.get("explain") or {}
    found = [*(explain.get("features") or []), *(explain.get("others") or [])]
    return {int(f): Explained(str(text), spearman, detection) for f, text, spearman, detection in found}


@torch.no_grad()
def neighbours_of(sae: SAE, k: int = 10) -> Neighbours:
    """Cosines of decoder rows, in blocks: never [F, F]."""
    w = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1)
    F = len(w)
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, F, _BLOCK):
        block = w[start : start + _BLOCK] @ w.T
        rows = torch.arange(len(block), device=w.device)
        block[rows, rows + start] = -2.0
        best = block.topk(min(k, F - 1), dim=1)
        found.append((best.indices, best.values))
    return Neighbours(*(torch.cat(column).cpu().numpy() for column in zip(*found, strict=True)))


@torch.no_grad()
def logits_of(weights: LogitMap, sae: SAE, entries: int, k: int = 10, chunk: int = 64) -> Logits:
    """Of every feature, `chunk` features at a time, so that memory is chunk · V. entries: of the tokenizer's vocabulary
    (an unembedding may be padded beyond it)."""
    parts: list[tuple[Tensor, ...]] = []
    for begin in range(0, sae.cfg.d_sae, chunk):
        rows = weights.of_features(sae, slice(begin, begin + chunk))[:, :entries]
        high, low = (rows.topk(min(k, rows.shape[1]), largest=largest) for largest in (True, False))
        ends = (low.values[:, 0], high.values[:, 0])
        width = (ends[1] - ends[0]).clamp(min=1e-12)[:, None]
        place = ((rows - ends[0][:, None]) / width * LOGIT_BINS).long().clamp(max=LOGIT_BINS - 1)
        counts = torch.zeros(len(rows), LOGIT_BINS, dtype=torch.int64, device=rows.device)
        counts.scatter_add_(1, place, torch.ones_like(place))
        parts.append((high.indices, high.values, low.indices, low.values, *ends, counts))
    return Logits(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def ultra_low_of(sae: SAE, cards: Cards) -> UltraLow:
    """The ultra-low cluster from the survey's densities. Raises MissingDependencyError without scikit-learn."""
    return ultra_low(torch.from_numpy(cards.density()), sae.encoder.bias.detach().float().cpu(), alignment_of(sae))


def window_effects(
    source: Source, tokenizer: Any, text: Text, cards: Cards, features: Iterable[int], *, n: int = 20,
    batch_size: int = 16, show_progress: bool = False,
) -> dict[int, list[np.ndarray]]:  # fmt: skip
    """ΔNLL, nats, of every token of each feature's top n windows when the feature is set to 0 over their contexts.
    The tokenizer's special tokens are not edited, and 0 is told of them.

    text: what the survey was made from. The cost is that of a forward pass for every window.
    """
    body = cards.survey.config.context - (tokenizer.bos_token_id is not None)
    lead = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found: dict[int, list[np.ndarray]] = {}
    features = list(features)
    with progress("effects", len(features), "features", show=show_progress) as meter:
        for begin in range(0, len(features), _AT_ONCE):
            some = features[begin : begin + _AT_ONCE]
            contexts, owners, places = [], [], []
            for feature in some:
                for example in cards.top(feature, n):
                    first, end = (int(text.first[example.document + step]) for step in (0, 1))
                    start = example.position // body * body  # a document's contexts begin at multiples of the body
                    ids = text.ids[first + start : min(first + start + body, end)]
                    contexts.append(np.concatenate([lead, ids]).astype(np.int64))
                    owners.append(feature)
                    low = len(lead) + example.position - start - example.at
                    places.append(slice(low, low + len(example.token_ids)))
            changes = ablation(
                source.sae, source.model, source.hook, contexts, owners, batch_size=batch_size,
                special=tokenizer.all_special_ids,
            )  # fmt: skip
            found |= {feature: [] for feature in some}
            for feature, place, change in zip(owners, places, changes, strict=True):
                found[feature].append(change[place])
            meter.advance(len(some))
    return found
