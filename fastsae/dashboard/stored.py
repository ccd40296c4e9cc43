"""What a report's folder knows, question by question. Axes: F features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.analysis.cards import Cards
from fastsae.analysis.examples import Example
from fastsae.analysis.labels import TokenBytes, readable
from fastsae.analysis.survey import Survey
from fastsae.analysis.universality import Match
from fastsae.dashboard.plain import plain
from fastsae.errors import FastSAEError

SURVEY, RESULTS, MATCH = "survey.npz", "results.json", "match.json"


class UnknownFeatureError(FastSAEError):
    """A feature that the report does not have."""


class Stored:
    """bytes_of: of the tokenizer's vocabulary; without it tokens are shown by their numbers.

    Raises FastSAEError for a folder that holds no report.
    """

    def __init__(self, folder: Path, bytes_of: TokenBytes | None = None) -> None:
        self.folder, self.bytes_of = Path(folder), bytes_of
        if not self.folder.is_dir():
            raise FastSAEError(f"expected a report's folder, got {folder}: make one with fastsae analyze")
        self.cards = Cards(Survey.load(self.folder / SURVEY))

    @property
    def d_sae(self) -> int:
        return self.cards.survey.d_sae

    @property
    def proxies(self) -> Sequence[str]:
        return self.cards.survey.proxies

    @cached_property
    def match(self) -> Match | None:
        """None where no other dictionary was read."""
        path = self.folder / MATCH
        return Match.load(path) if path.exists() else None

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json; empty where there is none."""
        try:
            found = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def overview(self) -> dict[str, Any]:
        density = self.cards.density()
        edges = np.linspace(-8, 0, 41)
        return plain({
            "features": self.d_sae,
            "tokens": self.cards.tokens(),
            "dead": int((density == 0).sum()),
            "quality": self.results.get("quality", {}),
            "proxies": list(self.proxies),
            "density": {"edges": edges, "counts": np.histogram(np.log10(density[density > 0]), edges)[0]},
        })  # fmt: skip

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """One entry per feature, [F] each."""
        cards = self.cards
        pearson = cards.pearson()
        best = pearson.argmax(1) if pearson.shape[1] else np.zeros(self.d_sae, np.int64)
        names = np.array([*self.proxies, ""], dtype=object)
        score = pearson[np.arange(self.d_sae), best] if pearson.shape[1] else np.zeros(self.d_sae)
        return {
            "feature": np.arange(self.d_sae),
            "density": cards.density(),
            "maximum": cards.maximum(),
            "proxy": names[np.where(score > 0, best, -1)],
            "pearson": score,
        }

    def card(self, feature: int) -> dict[str, Any]:
        """Raises UnknownFeatureError."""
        if not 0 <= feature < self.d_sae:
            raise UnknownFeatureError(f"features are numbers from 0 to {self.d_sae - 1}, got {feature}")
        cards = self.cards
        edges, counts = cards.histogram(feature)
        pearson = cards.pearson()[feature]
        return plain({
            **{name: column[feature] for name, column in self.columns.items()},
            "mean_active": cards.mean_active()[feature],
            "histogram": {"edges": edges, "counts": counts},
            "top": [self._example(e) for e in cards.top(feature)],
            "intervals": [[self._example(e) for e in part] for part in cards.intervals(feature)],
            "bottom": [self._example(e) for e in cards.bottom(feature)],
            "cofiring": [p._asdict() for p in cards.cofiring(feature) or []],
            "proxies": [{"name": n, "pearson": r} for n, r in zip(self.proxies, pearson, strict=True)],
        })  # fmt: skip

    def _example(self, example: Example) -> dict[str, Any]:
        ids = example.token_ids.tolist()
        if self.bytes_of is None:
            texts = [f"‹{i}›" for i in ids]
        else:
            texts = readable([self.bytes_of[i] for i in ids])
        return {"tokens": texts, "values": np.round(example.activations, 4), "at": example.at,
                "document": example.document, "position": example.position}  # fmt: skip


def selected(
    columns: dict[str, np.ndarray], *, sort: str, descending: bool, search: str, offset: int, limit: int
) -> dict[str, Any]:
    """{"total", "offset", "rows"}: rows of columns [F] that hold the search text, sorted by a column. A search for a
    number finds that feature too. What is unknown (NaN) comes last. Raises FastSAEError for no such column."""
    if sort not in columns:
        raise FastSAEError(f"expected a column to sort by, one of {', '.join(columns)}, got {sort!r}")
    F = len(columns["feature"])
    rows = np.arange(F)
    wanted = search.strip().casefold()
    if wanted:
        keep = np.zeros(F, dtype=bool)
        for column in columns.values():
            if column.dtype == object:
                keep |= np.array([wanted in str(value or "").casefold() for value in column], dtype=bool)
        if wanted.isascii() and wanted.isdecimal() and len(wanted) < 12:
            keep |= columns["feature"] == int(wanted)
        rows = rows[keep]
    column = columns[sort][rows]
    if column.dtype == object:
        text = [str(value or "").casefold() for value in column]
        order = np.array(sorted(range(len(text)), key=text.__getitem__, reverse=descending), dtype=np.int64)
    else:
        value = column.astype(np.float64)
        order = np.argsort(np.where(np.isnan(value), np.inf, -value if descending else value), kind="stable")
    rows = rows[order]
    shown = [{name: column[row] for name, column in columns.items()} for row in rows[offset : offset + limit]]
    return {"total": len(rows), "offset": offset, "rows": plain(shown)}


def matched(match: Match) -> dict[str, np.ndarray]:
    """The columns of a comparison, one entry for every feature that was looked for."""
    names = ("features", "fires", "best", "pearson", "held_out", "assigned", "logit_pearson", "decoder_cosine")
    columns = {name: getattr(match, name) for name in names}
    found = {name: part.double().numpy() for name, part in columns.items() if part is not None}
    found["feature"] = found.pop("features").astype(np.int64)
    for name in ("fires", "best", "assigned"):
        if name in found:
            found[name] = found[name].astype(np.int64)
    return found
