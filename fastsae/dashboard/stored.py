"""What a report's folder knows, question by question, read from the files of its site: what the pages show is what the
API answers. Nothing is in memory but the list of features. Axes: F features, P proxies.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.analysis.universality import Match
from fastsae.dashboard import site
from fastsae.dashboard.plain import plain
from fastsae.dashboard.proxy_scores import ProxySums
from fastsae.errors import FastSAEError

SURVEY, MATCH = "survey.npz", "match.json"
_TEXT = ("proxy", "explanation", "token")  # columns of the list; the others are numbers


class UnknownFeatureError(FastSAEError):
    """A feature that the report does not have."""


class Stored:
    """A report. Raises FastSAEError for a folder that holds none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.overview = site.read_overview(self.folder)
        self.d_sae = int(self.overview["d_sae"])
        self.proxies: list[str] = list(self.overview["proxies"])
        rows = site.read_rows(self.folder)
        rows["proxy"] = [self.proxies[p] if 0 <= p < len(self.proxies) else "" for p in rows.get("proxy", [])]
        self.columns = {name: _column(name, values) for name, values in rows.items()}

    @property
    def tokenizer(self) -> str | None:
        """TokenBytes.digest of the tokenizer; None in reports that do not say."""
        return self.overview.get("tokenizer")

    @cached_property
    def match(self) -> Match | None:
        """None where no other dictionary was read."""
        path = self.folder / MATCH
        with _readable(path):
            return Match.load(path) if path.exists() else None

    def card(self, feature: int) -> dict[str, Any]:
        """Raises UnknownFeatureError."""
        if not 0 <= feature < self.d_sae:
            raise UnknownFeatureError(f"features are numbers from 0 to {self.d_sae - 1}, got {feature}")
        return site.read_card(self.folder, feature)

    @cached_property
    def maximum(self) -> np.ndarray:
        """[F], the largest activation of each: of the survey, or to the digits of the list where that is gone."""
        with _readable(self.folder / SURVEY), self._survey() as file:
            return self.columns["max"] if file is None else file["maximum"].max(0)

    @property
    def context(self) -> int | None:
        """Tokens in a context of the survey; None where that is gone."""
        return self._about().get("config", {}).get("context")

    @property
    def of(self) -> dict[str, Any]:
        """Digests of the dictionary and the model that were read, and the hook; empty where the survey is gone."""
        return self._about().get("of", {})

    def _about(self) -> dict[str, Any]:
        with _readable(self.folder / SURVEY), self._survey() as file:
            return {} if file is None else json.loads(file["about"].tobytes())

    def proxy_sums(self, p: int) -> ProxySums | None:
        """Of proxy number p; None where the survey is gone."""
        with _readable(self.folder / SURVEY), self._survey() as file:
            return None if file is None else ProxySums.of_file(file, self.folder / SURVEY, p)

    def _survey(self) -> _Arrays:
        return _Arrays(self.folder / SURVEY)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes go wrong, as one clear error."""
    try:
        yield
    except FastSAEError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        raise FastSAEError(f"{path} is damaged: make the report again, or remove the file") from None


class _Arrays:
    """`with` it: the survey's arrays, each read when it is asked for; None where there is no survey.

    A whole survey of 32,768 features takes gigabytes; a server wants some megabytes of it now and then.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, None

    def __enter__(self) -> Any:
        if self._path.exists():
            self._file = np.load(self._path, allow_pickle=False)
        return self._file

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()


def _column(name: str, values: list[Any]) -> np.ndarray:
    if name in _TEXT:
        return np.array(["" if value is None else str(value) for value in values], dtype=object)
    if any(value is None or isinstance(value, float) for value in values):
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.array(values, dtype=np.int64)


def selected(
    columns: dict[str, np.ndarray], *, sort: str, descending: bool, search: str, offset: int, limit: int
) -> dict[str, Any]:
    """{"total", "offset", "rows"}: rows of columns [F] that a search finds, sorted by a column; what is unknown (NaN,
    empty) comes last. Found is what holds all words of the search in its texts, and the feature of a number that stands
    alone, which comes first; static/list.js has the same rule. Raises FastSAEError for no such column."""
    if sort not in columns:
        raise FastSAEError(f"expected a column to sort by, one of {', '.join(columns)}, got {sort!r}")
    words = search.lower().split()
    alone = len(words) == 1 and words[0].isascii() and words[0].isdecimal()
    asked = min(int(words[0]), 2**31 - 1) if alone else -1  # no more than numpy can compare
    rows = np.arange(len(columns["feature"]))
    if words:
        rows = rows[_holds(columns, words) | (columns["feature"] == asked)]
    column = columns[sort][rows]
    if column.dtype == object:
        text = [value.casefold() for value in column]
        _, column = np.unique(np.array(text, dtype=object).astype(str), return_inverse=True)
        column = np.where([bool(value) for value in text], column, np.nan)
    value = column.astype(np.float64)
    rows = rows[np.argsort(np.where(np.isnan(value), np.inf, -value if descending else value), kind="stable")]
    rows = rows[np.argsort(columns["feature"][rows] != asked, kind="stable")]
    shown = [{name: column[row] for name, column in columns.items()} for row in rows[offset : offset + limit]]
    return {"total": len(rows), "offset": offset, "rows": plain(shown)}


def _holds(columns: dict[str, np.ndarray], words: list[str]) -> np.ndarray:
    """[F] bool: which rows hold all words in their columns of text."""
    text = [column for column in columns.values() if column.dtype == object]
    if not text:
        return np.zeros(len(columns["feature"]), dtype=bool)
    joined = (" ".join(row).lower() for row in zip(*text, strict=True))
    return np.array([all(word in row for word in words) for row in joined], dtype=bool)


def matched(match: Match) -> dict[str, np.ndarray]:
    """The columns of a comparison, one entry for every feature that was looked for; NaN where there is no match."""
    whole = ("feature", "fires")
    names = ("fires", "best", "pearson", "held_out", "assigned", "assigned_pearson", "logit_pearson", "decoder_cosine")
    columns = {"feature": match.features} | {name: getattr(match, name) for name in names}
    found = {name: part.double().numpy().copy() for name, part in columns.items() if part is not None}
    for name in ("best", "assigned"):
        if name in found:
            found[name][found[name] < 0] = np.nan
    return {name: part.astype(np.int64) if name in whole else part for name, part in found.items()}
