"""What is reported of a feature beside a category: whether it detects it, whether the model uses it, who else has it.

Chosen on one half of the documents, scored on the other. Formulas: Bricken et al. 2023, "Towards Monosemanticity".
Axes: F features, D neurons, P categories, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis import attribution, effects, specificity
from fastsae.analysis.ablation import ablation
from fastsae.analysis.cards import Cards
from fastsae.analysis.evidence import CHOOSE, SCORE
from fastsae.analysis.examples import Example
from fastsae.analysis.gaps import Gaps
from fastsae.analysis.held_out import HeldOut
from fastsae.analysis.labels import TokenBytes, readable
from fastsae.analysis.logit_map import LogitMap
from fastsae.analysis.neurons import NeuronBasis
from fastsae.analysis.paper_forms import PaperForm
from fastsae.analysis.steering import sample
from fastsae.analysis.stream import Source, evaluating
from fastsae.analysis.universality import Match
from fastsae.hooks import activations

PREFIXES = ("", "\n", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,")  # neutral: nothing, a new line, and the paper's count to ten
LEAST = 20  # tokens of a category in each half, for it to be reported
AGREEMENT = 64  # places at which attribution is held against ablation, a forward pass each


class Known(NamedTuple):
    """What the passes have found. controls: cards, on a part of the text, of other dictionaries: the neurons as if each
    were a feature ("neurons"), random directions, a shuffled model. papers: by category, where the paper has one.
    closest: of features that are shown, the held-out Pearson of the closest neuron (neurons.ClosestHeldOut)."""

    source: Source
    tokenizer: Any
    cards: Cards
    controls: dict[str, Cards]
    held_out: HeldOut
    logits: LogitMap | None
    basis: NeuronBasis
    match: Match | None
    gaps: dict[int, Gaps]
    bytes_of: TokenBytes
    papers: dict[str, PaperForm]
    closest: Mapping[int, float | None] = {}


class Effects(NamedTuple):
    """How long effects are looked at. See AnalyzeConfig."""

    batch_size: int
    sample_tokens: int
    samples: int
    seed: int


def chosen_features(cards: Cards) -> dict[int, int]:
    """Category → its best feature, for the categories that occur in both halves of the text."""
    members = [cards.base_rate(half) * cards.tokens(half) for half in (CHOOSE, SCORE)]
    r = cards.pearson(CHOOSE)
    return {
        p: int(r[:, p].argmax())
        for p in range(len(cards.survey.proxies))
        if min(members[CHOOSE][p], members[SCORE][p]) >= LEAST - 0.5
    }


def left_out(cards: Cards) -> list[dict]:
    """Categories that chosen_features leaves out, with their tokens in either half."""
    chosen = chosen_features(cards)
    members = [(cards.base_rate(half) * cards.tokens(half)).round().astype(int) for half in (CHOOSE, SCORE)]
    return [
        {"name": name, "tokens": [int(members[CHOOSE][p]), int(members[SCORE][p])]}
        for p, name in enumerate(cards.survey.proxies)
        if p not in chosen
    ]


def not_measured(held_out: HeldOut, rows: Sequence[dict], no_logits: str | None = None) -> list[dict[str, str]]:
    """What rows lack and why, {"name", "reason"} each. no_logits: why there are no logit weights, if there are none."""
    context = held_out.ids.shape[1]
    full = f"fills a context of {context} tokens without special tokens: a smaller context may help"
    found = {} if no_logits is None else {"logit weights": no_logits}
    for row in rows:
        if row["max"] <= 0:
            found[f"effects of feature {row['feature']}"] = "it never fires on this text"
        elif not len(held_out.ids):
            found["ablation"] = f"no document of the half on which features are scored {full}"
        elif row["ablation"] is None:
            found[f"ablation beside {row['name']}"] = f"no stretch of a document in which it is to be predicted {full}"
    return [{"name": name, "reason": reason} for name, reason in found.items()]


class Study:
    """Rows of the report."""

    def __init__(self, known: Known, how: Effects) -> None:
        self.known, self.how = known, how
        self.cards = known.cards
        self.pearson = [self.cards.pearson(half) for half in (CHOOSE, SCORE)]
        self.clipped = self.cards.pearson(SCORE, clipped=True)
        self.of_neurons = [self.cards.neuron_pearson(half) for half in (CHOOSE, SCORE)]

    def closest_category(self, feature: int) -> int:
        """The category that a feature follows best on the half where features are chosen."""
        return int(np.nan_to_num(self.pearson[CHOOSE][feature], nan=-1.0).argmax())

    def row(self, p: int, feature: int) -> dict:
        """A feature beside category p."""
        cards = self.cards
        neuron = int(self.of_neurons[CHOOSE][:, p].argmax())
        r, neuron_r = float(self.pearson[SCORE][feature, p]), float(self.of_neurons[SCORE][neuron, p])
        highest, name = float(cards.maximum()[feature]), cards.survey.proxies[p]
        paper = self.known.papers.get(name)
        result = {
            "name": name,
            "base_rate": float(cards.base_rate(SCORE)[p]),
            "feature": feature,
            "pearson": r,
            "pearson_clipped": float(self.clipped[feature, p]),
            "pearson_paper": None if paper is None else float(paper.binary[feature]),
            "pearson_paper_clipped": None if paper is None else float(paper.clipped[feature]),
            "neuron": neuron,
            "neuron_pearson": neuron_r,
            "advantage": r - neuron_r,
            "density": float(cards.density()[feature]),
            "max": highest,
            **scores(cards, feature, p),
            "neuron_scores": scores(self.known.controls["neurons"], neuron, p),
            "controls": self._controls(p),
            "neurons": self._neurons(feature),
            "closest_neuron": self._closest(feature),
            "contexts": [self._shown(example) for example in cards.top(feature, 20)],
            "cofiring": [partner._asdict() for partner in cards.cofiring(feature, 5) or []],
            "gaps": self._gaps(p),
            "match": self._match(feature),
            "ablation": None,
            "pinning": None,
            "logits": None,
        }
        if highest > 0:
            result["ablation"] = self._ablation(feature, p)
            result["pinning"] = self._pinning(feature, neuron, highest, p)
            result["logits"] = self._logits(feature, p)
        return result

    # --- what it is -------------------------------------------------------------------------------------------------

    def _neurons(self, feature: int) -> list[list[float]]:
        basis = self.known.basis
        pairs = zip(basis.neurons[feature].tolist(), basis.coefficients[feature].tolist(), strict=True)
        return [[n, c] for n, c in pairs][:5]

    def _controls(self, p: int) -> dict[str, float]:
        """Pearson of the best feature of every control, chosen and scored as ours is."""
        found = {}
        for name, cards in self.known.controls.items():
            best = int(cards.pearson(CHOOSE)[:, p].argmax())
            found[name] = float(cards.pearson(SCORE)[best, p])
        return found

    def _closest(self, feature: int) -> dict | None:
        """neuron, pearson: in-sample, the largest over all tokens. held_out: of the neuron chosen on the other half."""
        found = self.cards.closest_neurons(1)
        if found is None:
            return None
        return {
            "neuron": int(found.neurons[feature, 0]), "pearson": float(found.pearson[feature, 0]),
            "held_out": self.known.closest.get(feature),
            "large_coefficients": int(self.known.basis.large[feature]),
            "neurons_used": float(self.known.basis.neurons_used[feature]),
        }  # fmt: skip

    def _shown(self, example: Example) -> dict:
        pieces = [self.known.bytes_of[int(i)] for i in example.token_ids]
        return {"tokens": readable(pieces), "activations": example.activations.tolist(), "at": example.at}

    def _gaps(self, p: int) -> dict | None:
        found = self.known.gaps.get(p)
        if found is None:
            return None
        return {
            "members": found.members,
            "missed": found.missed,
            "strings": [
                [readable([self.known.bytes_of[s.token_id]])[0], s.members, s.missed] for s in found.strings[:8]
            ],
            "others": [other.__dict__ for other in found.others[:3]],
        }

    def _match(self, feature: int) -> dict | None:
        """feature, pearson: in-sample, the paper's maximum over all tokens. held_out: of the feature chosen on the
        other half; None where this one is constant on a half."""
        match = self.known.match
        if match is None:
            return None
        row = (match.features == feature).nonzero().flatten()
        if not len(row) or int(match.best[row[0]]) < 0:
            return None
        i = int(row[0])
        measures = ("logit_pearson", "best_logit_pearson", "decoder_cosine", "best_decoder_cosine")
        columns = {name: getattr(match, name) for name in measures}
        return {
            "feature": int(match.best[i]), "pearson": float(match.pearson[i]), "held_out": _finite(match.held_out[i]),
            **{name: None if column is None else _finite(column[i]) for name, column in columns.items()},
        }  # fmt: skip

    # --- what it does -----------------------------------------------------------------------------------------------

    def _ablation(self, feature: int, p: int) -> dict | None:
        """ΔNLL in nats per token when the feature is set to 0 over whole contexts; None if none has the category.

        inside: on tokens of the category; beside: on the others of the contexts that hold such tokens; outside: on
        contexts that hold none; top: after the 20 strongest activations. Special tokens are neither edited nor counted.
        agreement: of attribution with ablation at single tokens (`attribution.agreement`); None where too few fire.
        """
        sae, model, hook = self.known.source
        with_it, without = self.known.held_out.split(p)
        if not len(with_it):
            return None
        special = effects.special_ids(model, self.known.tokenizer)
        chosen = torch.cat([with_it, without])
        ids, batch = self.known.held_out.ids[chosen], self.how.batch_size
        change = ablation(sae, model, hook, list(ids), [feature] * len(ids), batch_size=batch, special=special)
        with torch.no_grad(), evaluating(model):
            strength = [
                effects.feature_values(sae, activations(model, hook, part), feature)[:, :-1].cpu()
                for part in ids.split(batch)
            ]
        delta, member = torch.from_numpy(np.stack(change))[:, 1:], self.known.held_out.inside[chosen][:, 1:, p]
        keep = effects.ordinary(model, ids, special)
        near = torch.arange(len(chosen))[:, None].expand_as(member) < len(with_it)
        counted, before = keep[:, 1:], keep[:, :-1] & keep[:, 1:]  # before: an ordinary token, and one behind it
        member = member & counted
        place = torch.cat(strength).masked_fill(~before, -1.0).flatten()
        top = place.topk(min(20, int(before.sum()))).indices
        return {
            "inside": float(delta[member].mean()),
            "beside": _mean(delta[near & counted & ~member]),
            "outside": _mean(delta[~near & counted]),
            "top": _mean(delta.flatten()[top]),
            "tokens_inside": int(member.sum()),
            "tokens_beside": int((near & counted & ~member).sum()),
            "tokens_outside": int((~near & counted).sum()),
            "agreement": self._agreement(feature, self.known.held_out.ids[with_it], special),
        }

    def _agreement(self, feature: int, ids: Tensor, special: tuple[int, ...]) -> dict | None:
        """Attribution against ablation at tokens of contexts [B, T], drawn at random where the feature fires."""
        sae, model, hook = self.known.source
        try:
            found = attribution.agreement(
                sae, model, hook, ids, feature=feature, count=AGREEMENT, batch_size=self.how.batch_size,
                seed=self.how.seed, special=special,
            )  # fmt: skip
        except attribution.TooFewError:
            return None
        numbers = {name: _finite(getattr(found, name)) for name in ("pearson", "spearman", "same_sign")}
        return {**numbers, "places": len(found.measured)}

    def _pinning(self, feature: int, neuron: int, highest: float, p: int) -> dict:
        """Share of probability on the category while sampling from neutral prefixes, untouched and pinned; special
        tokens stay untouched. The share is of the tokenizer's entries, to which a wider head is cut."""
        sae, model, hook = self.known.source
        members, tokenizer = self.known.held_out.members[:, p], self.known.tokenizer
        neuron_max = float(self.cards.survey.neuron_max[neuron])
        edits = {
            "unpinned": None,
            "pinned": effects.set_feature(sae, feature, highest),
            "neuron": effects.set_neuron(neuron, neuron_max),
        }
        result: dict[str, Any] = {"value": highest, "neuron_value": neuron_max, "prefix": list(PREFIXES), "samples": {}}
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        special = effects.special_ids(model, tokenizer)
        for name, edit in edits.items():
            shares, texts = [], []
            for number, prefix in enumerate(PREFIXES):
                ids = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
                begin = torch.tensor([*start, *ids], dtype=torch.int64)
                if not len(begin):  # nothing to begin with: no prefix, and no begin-of-text token in the vocabulary
                    continue
                share, sampled = sample(
                    model, hook, begin, edit, tokens=self.how.sample_tokens, count=self.how.samples,
                    members=members, seed=self.how.seed + number, special=special,
                )  # fmt: skip
                shares.append(share)
                texts.append("".join(readable([self.known.bytes_of[i] for i in sampled[0].tolist()])))
            result[name] = sum(shares) / len(shares)
            result["samples"][name] = texts
        return result

    def _logits(self, feature: int, p: int) -> dict | None:
        if self.known.logits is None:
            return None
        V = len(self.known.bytes_of)
        weights = self.known.logits.of_features(self.known.source.sae, torch.tensor([feature]))[0, :V].cpu()
        member = self.known.held_out.members[: len(weights), p] > 0.5
        edges = torch.linspace(float(weights.min()), float(weights.max()), 41)
        counts = [torch.histogram(part, edges).hist.int().tolist() for part in (weights[member], weights[~member])]
        order = weights.argsort(descending=True)

        def named(indices: Tensor) -> list[list]:
            return [[readable([self.known.bytes_of[i]])[0], float(weights[i])] for i in indices.tolist()]

        return {
            "top": named(order[:10]),
            "bottom": named(order[-10:].flip(0)),
            "edges": edges.tolist(),
            "inside": counts[0],
            "outside": counts[1],
        }


def scores(cards: Cards, feature: int, p: int) -> dict:
    """How well a feature tells the category, on the half where features are scored: specificity and lift over all of
    its activations and over the bins above half of its maximum, share of its output, recall, precision–recall; F1 of
    the threshold that is best where features are chosen."""
    overlap = cards.overlap(feature, p, SCORE)
    threshold = np.array(0.0)
    if overlap.active.shape[-1]:
        threshold = specificity.precision_recall(cards.overlap(feature, p, CHOOSE)).best_threshold
    else:  # never fired: one empty bin
        overlap = specificity.Overlap(
            np.array([0.0, 1.0]), *np.zeros((4, 1)), tokens=overlap.tokens, members=overlap.members
        )
    spec, curve = specificity.specificity(overlap), specificity.precision_recall(overlap)
    base = float(spec.base_rate)
    inside = overlap.inside.sum()
    return {
        "specificity": _or_zero(spec.total),
        "specificity_upper": _or_zero(spec.upper),
        "lift": _or_zero(spec.total) / max(base, 1e-12),
        "lift_upper": _or_zero(spec.upper) / max(base, 1e-12),
        "expected": _or_zero(spec.expected),
        "recall": float(inside) / max(1, int(overlap.members)),
        "average_precision": float(curve.average_precision),
        "f1": float(specificity.f1(overlap, threshold)),
        "f1_threshold": float(threshold),
        "bins": {
            "edges": overlap.edges.tolist(),
            "inside": overlap.inside.astype(int).tolist(),
            "outside": (overlap.active - overlap.inside).astype(int).tolist(),
        },
    }


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _or_zero(value: Any) -> float:
    return float(np.nan_to_num(value))
