"""One function for each question the site and the server answer; plain dictionaries, ready for JSON.

    overview(facts), feature_rows(facts), feature_card(facts, 7)
    comparison(facts), splitting(facts), feature_map(facts)

Text is as a reader should see it (`Spelling`), not yet escaped: who puts it into a page does that. Axes: F features,
W tokens of a window, P proxies.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from fastsae.analysis.examples import Example
from fastsae.dashboard.facts import SCORE, Facts
from fastsae.dashboard.spelling import Spelling
from fastsae.report import QUALITY
from fastsae.visible import visible

TOP, INTERVALS, PER_INTERVAL, BOTTOM = 20, 11, 5, 20  # the card of Bricken et al. 2023
# Tokens of context on each side of the strongest, and of the other, examples. The paper shows 4; there is room for more
# until a site of so many features would take hundreds of megabytes.
WIDE, NARROW, WIDE_UP_TO = (12, 8), (10, 4), 8192
_CATEGORY = ("name", "feature", "pearson", "neuron_pearson", "specificity", "base_rate")  # of a row of the results
_MEASURES = ("pearson", "held_out", "logit_pearson", "control", "neurons")  # of a Match, with a number a feature
_EXPLANATION = 300  # characters of an explanation in the list
_EDGES = 40_000  # of the splitting graph that are shown at most, of each step


def short(value: Any, digits: int = 3) -> float | None:
    """A number with so many digits, None where it is not finite."""
    number = float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None


# --- one feature ----------------------------------------------------------------------------------------------------


def feature_card(facts: Facts, f: int, spelling: Spelling | None = None) -> dict[str, Any]:
    """Everything about one feature. Raises FastSAEError for one that the survey does not have."""
    cards, spell = facts.cards, spelling or Spelling(facts.bytes_of)
    edges, counts = cards.histogram(f)
    fires = int(cards.survey.sums["fires"][:, f].sum())
    return {
        "feature": f,
        "fires": fires,
        "tokens": cards.tokens(),
        "density": short(fires / max(cards.tokens(), 1)),
        "max": short(cards.maximum()[f], 4),
        "mean": short(cards.survey.sums["f"][:, f].sum() / max(fires, 1)),
        "ultra_low": bool(facts.ultra_low is not None and facts.ultra_low.members[f]),
        "cluster": facts.clusters.get(f),
        "explanation": _explanation(facts, f),
        "histogram": {"width": short(edges[1] - edges[0], 6) if len(edges) > 1 else 0, "counts": counts.tolist()},
        "top": _top(facts, f, spell),
        "intervals": _intervals(facts, f, spell),
        "bottom": [_window(example.cut(_around(facts)[1]), spell) for example in cards.bottom(f, BOTTOM)],
        "logits": _logits(facts, f, spell),
        "proxies": _proxies(facts, f),
        "follows": _follows(facts, f),
        "neurons": _pairs(facts.neurons.neurons[f], facts.neurons.pearson[f]) if facts.neurons is not None else None,
        "similar": _pairs(facts.neighbours.features[f], facts.neighbours.cosine[f]) if facts.neighbours else None,
        "cofiring": _cofiring(facts, f),
        "notes": cards.notes(f),
        "match": _match(facts, f),
        "splitting": _family(facts, f),
    }


def _around(facts: Facts) -> tuple[int, int]:
    return WIDE if facts.d_sae <= WIDE_UP_TO else NARROW


def _window(example: Example, spell: Spelling, effects: np.ndarray | None = None) -> dict[str, Any]:
    tokens, parts = spell.window(example.token_ids)
    found: dict[str, Any] = {
        "tokens": tokens,
        "parts": parts,
        "activations": [short(a) if a else 0.0 for a in example.activations.tolist()],
        "at": example.at,
    }
    if effects is not None:
        found["effects"] = [round(float(e), 3) for e in effects]
    return found


def _top(facts: Facts, f: int, spell: Spelling) -> list[dict[str, Any]]:
    examples, around = facts.cards.top(f, TOP), _around(facts)[0]
    effects = facts.effects.get(f)
    if effects is None or len(effects) != len(examples):
        return [_window(example.cut(around), spell) for example in examples]
    found = []
    for example, change in zip(examples, effects, strict=True):
        low = max(0, example.at - around)
        kept = example.cut(around)
        found.append(_window(kept, spell, change[low : low + len(kept.token_ids)]))
    return found


def _intervals(facts: Facts, f: int, spell: Spelling) -> list[dict[str, Any]]:
    """Weakest first."""
    highest = float(facts.cards.maximum()[f])
    if not highest:
        return []
    edges = np.linspace(0, highest, INTERVALS + 1)
    return [
        {"low": short(edges[i]), "high": short(edges[i + 1]),
         "windows": [_window(example.cut(_around(facts)[1]), spell) for example in examples]}
        for i, examples in enumerate(facts.cards.intervals(f, INTERVALS, PER_INTERVAL))
    ]  # fmt: skip


def _pairs(numbers: np.ndarray, values: np.ndarray) -> list[list[Any]]:
    return [[int(n), short(v)] for n, v in zip(numbers, values, strict=True)]


def _logits(facts: Facts, f: int, spell: Spelling) -> dict[str, Any] | None:
    found = facts.logits
    if found is None:
        return None

    def named(ids: np.ndarray, values: np.ndarray) -> list[list[Any]]:
        return [[spell.one(int(i)), short(v)] for i, v in zip(ids, values, strict=True)]

    return {
        "top": named(found.top[f], found.top_values[f]),
        "bottom": named(found.bottom[f], found.bottom_values[f]),
        "low": short(found.low[f]), "high": short(found.high[f]), "counts": found.counts[f].tolist(),
    }  # fmt: skip


def _proxies(facts: Facts, f: int) -> list[list[Any]]:
    """[name, Pearson's r on the half where features are scored], in the order of r on the other half."""
    names, (chosen, r) = facts.cards.survey.proxies, (half[f] for half in facts.pearson)
    return [[names[p], short(r[p])] for p in np.argsort(-chosen, kind="stable").tolist()]  # NaN comes last


def _follows(facts: Facts, f: int) -> list[Any] | None:
    """[name, r], as in the list of features; None of one that follows no category."""
    p = int(facts.best_proxy[f])
    return None if p < 0 else [facts.cards.survey.proxies[p], short(facts.pearson[SCORE][f, p])]


def _cofiring(facts: Facts, f: int) -> list[list[Any]] | None:
    found = facts.cards.cofiring(f)
    return None if found is None else [[p.feature, p.count, short(p.jaccard), short(p.lift)] for p in found]


def _match(facts: Facts, f: int) -> dict[str, Any] | None:
    """The feature of the other run that is most alike."""
    row, found = facts.place_in_match.get(f), facts.match
    if row is None or found is None or int(found.best[row]) < 0:
        return None
    measures = ("pearson", "held_out", "logit_pearson", "decoder_cosine", "control")
    columns = {name: getattr(found, name) for name in measures}
    return {"feature": int(found.best[row])} | {
        name: None if column is None else short(column[row]) for name, column in columns.items()
    }


def _family(facts: Facts, f: int) -> dict[str, Any] | None:
    """Features of the next narrower and the next wider dictionary that belong to it."""
    split, layer = facts.split, facts.layer
    if split is None:
        return None
    return {
        "narrower": split.widths[layer - 1] if layer else None,
        "parents": [[g, short(r)] for g, r in split.parents(layer, f)],
        "wider": split.widths[layer + 1] if layer + 1 < len(split.widths) else None,
        "children": [[g, short(r)] for g, r in split.children(layer, f)],
    }


def _explanation(facts: Facts, f: int) -> dict[str, Any] | None:
    found = facts.explanations.get(f)
    if found is None:
        return None
    scores = {name: None if (v := getattr(found, name)) is None else short(v) for name in ("spearman", "detection")}
    return {"text": visible(found.text), **scores}


# --- all features ---------------------------------------------------------------------------------------------------


def feature_rows(facts: Facts, low: int = 0, high: int | None = None) -> dict[str, list[Any]]:
    """Columns of the list, of features low … high − 1: number, density, maximum, the proxy it follows best (its number,
    −1 for none) with r on the other half, the best match's r held
    out, explanation with its score, the likeliest token with its
    logit weight, cluster (−1), ultra_low."""
    high = facts.d_sae if high is None else high
    numbers = range(low, high)
    part, spell = slice(low, high), Spelling(facts.bytes_of)
    best = facts.best_proxy[part]
    score = facts.pearson[SCORE][np.arange(low, high), best] if facts.cards.survey.proxies else np.zeros(high - low)
    score = np.where(best < 0, np.nan, score)
    tokens, weights = facts.logits and facts.logits.top[part, 0], facts.logits and facts.logits.top_values[part, 0]
    said = [facts.explanations.get(f) for f in numbers]
    low_density = np.zeros(high - low) if facts.ultra_low is None else facts.ultra_low.members[part].numpy()
    return {
        "feature": list(numbers),
        "density": [short(d) for d in facts.cards.density()[part]],
        "max": [short(m) for m in facts.cards.maximum()[part]],
        "proxy": best.tolist(),
        "score": [short(s) for s in score],
        "match": [_matched(facts, f) for f in numbers],
        "explanation": ["" if e is None else visible(e.text)[:_EXPLANATION] for e in said],
        "explained": [None if e is None or e.spearman is None else short(e.spearman) for e in said],
        "token": [""] * len(numbers) if tokens is None else [spell.one(int(i)) for i in tokens],
        "logit": [None] * len(numbers) if weights is None else [short(w) for w in weights],
        "cluster": [facts.clusters.get(f, -1) for f in numbers],
        "ultra_low": low_density.astype(int).tolist(),
    }


def _matched(facts: Facts, f: int) -> float | None:
    """r of the best match, chosen on one half of the documents and scored on the other."""
    row = facts.place_in_match.get(f)
    return None if row is None or facts.match is None else short(facts.match.held_out[row])


def overview(facts: Facts) -> dict[str, Any]:
    """What the first page tells."""
    cards, results = facts.cards, facts.results
    density = cards.density()
    return {
        "hook": facts.hook,
        "tokenizer": facts.bytes_of.digest,
        "d_in": cards.survey.d_in,
        "d_sae": facts.d_sae,
        "tokens": cards.tokens(),
        "documents": cards.documents(),
        "of_store": bool(results.get("of_store")),
        "proxies": list(cards.survey.proxies),
        "dead": int((density == 0).sum()),
        "density": density_histogram(facts),
        "quality": _quality(results.get("quality") or {}),
        "categories": [
            {name: row.get(name) for name in _CATEGORY} for row in results.get("categories") or []
        ],
        "left_out": results.get("left_out") or [],
        "goals": results.get("goals") or [],
        "has": {
            "logits": facts.logits is not None, "match": facts.match is not None, "split": facts.split is not None,
            "map": facts.map is not None, "explanations": bool(facts.explanations),
        },
    }  # fmt: skip


def density_histogram(facts: Facts) -> dict[str, Any]:
    """Features by log10 of their density, in quarters of a decade; those of the ultra-low cluster apart."""
    density = facts.cards.density()
    live = density > 0
    lowest = math.floor(math.log10(density[live].min())) if live.any() else -6
    edges = np.arange(lowest, 0.01, 0.25)
    low = np.zeros(len(density), bool) if facts.ultra_low is None else facts.ultra_low.members.numpy()
    counts = [np.histogram(np.log10(density[part]), edges)[0].tolist() for part in (live & ~low, live & low)]
    return {
        "edges": edges.tolist(), "healthy": counts[0], "ultra_low": counts[1],
        "why": "" if facts.ultra_low is None else facts.ultra_low.why,
    }  # fmt: skip


def _quality(quality: dict[str, Any]) -> dict[str, Any] | None:
    """The table of the report, as text: head and rows."""
    runs = [(name, quality[name]) for name in ("a", "b") if quality.get(name)]
    if not runs:
        return None
    rows = []
    for label, part, key, form, paper in QUALITY:
        values = [run.get(part, {}).get(key) for _, run in runs]
        if any(value is not None for value in values):
            rows.append([label, *("–" if value is None else format(value, form) for value in values), paper])
    return {"head": ["", *(f"run {name.upper()}" for name, _ in runs), "paper"], "rows": rows}


# --- several dictionaries -------------------------------------------------------------------------------------------


def comparison(facts: Facts) -> dict[str, Any] | None:
    """Every feature's best match in the other run, and what chance and neurons give; None without another run."""
    found = facts.match
    if found is None:
        return None

    def column(values: Any) -> list[float | None] | None:
        return None if values is None else [short(v) for v in values.tolist()]

    return {
        "tokens": found.tokens,
        "sampled": found.sampled,
        "control_kind": found.control_kind,
        "medians": {name: None if v is None else short(v) for name, v in found.medians().items()},
        "feature": found.features.tolist(),
        "best": found.best.tolist(),
        **{name: column(getattr(found, name)) for name in _MEASURES},
    }  # fmt: skip


def splitting(facts: Facts) -> dict[str, Any] | None:
    """The layered graph: edges of each step as columns, strongest first where some are left out."""
    split = facts.split
    if split is None:
        return None
    steps = []
    for edges in split.edges:
        kept = edges.cosines.argsort(descending=True)[:_EDGES]
        steps.append({
            "parents": edges.parents[kept].tolist(),
            "children": edges.children[kept].tolist(),
            "cosines": [short(c) for c in edges.cosines[kept].tolist()],
            "left_out": len(edges.cosines) - len(kept),
        })  # fmt: skip
    return {"widths": list(split.widths), "layer": facts.layer, "threshold": split.threshold, "steps": steps}


def feature_map(facts: Facts) -> dict[str, Any] | None:
    """Features in the plane, as columns."""
    found = facts.map
    if found is None:
        return None
    return {
        "x": [short(x, 5) for x in found.points[:, 0]],
        "y": [short(y, 5) for y in found.points[:, 1]],
        "layer": found.layer.tolist(),
        "feature": found.feature.tolist(),
        "cluster": found.clusters.tolist(),
        "names": _cluster_names(facts),
        "here": facts.layer_of_map,
        "categories": {str(p): name for p, name in enumerate(facts.cards.survey.proxies)},
        **_map_colours(facts),
    }


def _map_colours(facts: Facts) -> dict[str, list[Any]]:
    """Of every point its density, the category it follows best and r with it; None where not known: of the other
    dictionaries only densities are."""
    assert facts.map is not None
    densities: dict[int, np.ndarray] = {facts.layer_of_map: facts.cards.density()}
    if facts.split is not None:
        densities = {n: part.numpy() for n, part in enumerate(facts.split.density)} | densities
    names, density, category, r = facts.cards.survey.proxies, [], [], []
    for layer, f in zip(facts.map.layer.tolist(), facts.map.feature.tolist(), strict=True):
        density.append(short(densities[layer][f]) if layer in densities else None)
        known = bool(names) and layer == facts.layer_of_map
        p = int(facts.best_proxy[f]) if known else -1
        score = math.nan if p < 0 else float(facts.pearson[SCORE][f, p])
        category.append(p if math.isfinite(score) else None)
        r.append(short(score) if math.isfinite(score) else None)
    return {"density": density, "category": category, "r": r}


def _cluster_names(facts: Facts) -> dict[str, str]:
    """Cluster → the proxy that at least half of its features follow best, with r above 0.2."""
    sizes, votes = Counter(facts.clusters.values()), Counter()
    names = facts.cards.survey.proxies
    if not names:
        return {}
    for feature, cluster in facts.clusters.items():
        p = int(facts.best_proxy[feature])
        if p >= 0 and facts.pearson[SCORE][feature, p] > 0.2:
            votes[cluster, p] += 1
    return {str(cluster): names[p] for (cluster, p), n in votes.items() if 2 * n > sizes[cluster]}
