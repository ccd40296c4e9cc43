"""Proxies that a user makes: regular expressions, sets of tokens, functions of the text.

Characters, not bytes: a token that holds only part of a character belongs where the whole character does, and spaces
at a token's edge are neutral, so that " 1999" matches \\d+. Axes: N tokens, C characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsae.analysis.labels import Spelling
from fastsae.analysis.membership import ELSEWHERE, Membership, TokenCounts
from fastsae.errors import FastSAEError

_TIMEOUT = 20.0  # seconds for one document: a pattern that backtracks without end is reported, not waited for


class PatternError(FastSAEError):
    """A regular expression, or the name of a script, that means nothing."""


def compiled(pattern: str) -> Any:
    """A pattern of the `regex` package: Python's syntax, and \\p{…} for Unicode properties.

    Raises PatternError for one that is not well formed, FastSAEError when the package is missing.
    """
    try:
        import regex
    except ImportError:
        raise FastSAEError(
            "regular expressions and Unicode's rarer scripts need the regex package: pip install 'fastsae[all]'"
        ) from None
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise PatternError(f"expected a regular expression, got {pattern!r}: {error}") from None
    except (RecursionError, OverflowError, MemoryError):
        raise PatternError(f"expected a shorter regular expression, got one of {len(pattern)} characters") from None


@dataclass(frozen=True)
class Regex(Membership):
    """Tokens all of whose characters lie in a match of the pattern in their document; spaces around are neutral.

    Raises FastSAEError for a pattern that is not well formed or takes longer than 20 s on a document.
    """

    name: str
    pattern: str

    def __post_init__(self) -> None:
        compiled(self.pattern)

    def members(self, spelling: Spelling) -> np.ndarray:
        """See Membership."""
        pattern = compiled(self.pattern)
        marked = np.zeros(len(spelling.points), dtype=bool)
        for text, first in spelling.texts():
            try:
                for match in pattern.finditer(text, timeout=_TIMEOUT):
                    marked[first + match.start() : first + match.end()] = True
            except TimeoutError:
                raise FastSAEError(
                    f"the pattern {self.pattern!r} took over {_TIMEOUT:.0f} s on a document of {len(text)} characters: "
                    "write it without nested repeats"
                ) from None
        return spelling.within(marked)


@dataclass(frozen=True, init=False)
class TokenSet(Membership):
    """Tokens of the vocabulary, by id or by string.

    A string without spaces means every entry that is it, with or without spaces around; one with spaces is exact.
    Raises FastSAEError, when scoring, for a string or an id that is no entry of the vocabulary.
    """

    name: str
    entries: tuple[int | str, ...]

    def __init__(self, name: str, entries: Iterable[int | str]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "entries", tuple(entries))
        if not self.entries or isinstance(entries, str):
            raise FastSAEError(f"a token set takes a list of ids or strings, got {entries!r}: put at least one in it")

    def members(self, spelling: Spelling) -> np.ndarray:
        """See Membership."""
        return self._chosen(spelling)[spelling.token_ids]

    def _chosen(self, spelling: Spelling) -> np.ndarray:
        """[V] bool."""
        vocabulary = spelling.bytes_of
        chosen = np.zeros(len(vocabulary), dtype=bool)
        for entry in self.entries:
            if isinstance(entry, str):
                exact, stripped = vocabulary.entries
                found = (exact if entry.strip() != entry else stripped).get(entry.encode(), []) if entry else []
            else:
                found = [entry] if 0 <= entry < len(vocabulary) else []
            if not found:
                raise FastSAEError(
                    f"token set {self.name!r}: the vocabulary of {len(vocabulary)} has no entry {entry!r}; "
                    "give tokens as the tokenizer cuts them"
                )
            chosen[found] = True
        return chosen


@dataclass(frozen=True)
class Function:
    """Whatever a Python function finds in a document's text.

    function(text: str) returns either spans, an iterable of (start, end) in characters, end not included: tokens all
    of whose characters lie in spans are members, as for Regex; or a float array [len(text)], nats for each character:
    a token's score is the largest over its characters, > 0 meaning that it belongs to the category. A function that
    wants tokens rather than text is a Proxy itself: an object with `name` and `score(spelling, counts)`.
    Raises FastSAEError when the function returns something else.
    """

    name: str
    function: Callable[[str], Any]

    def score(self, spelling: Spelling, counts: TokenCounts | None = None) -> np.ndarray:
        """See Proxy."""
        values, marked = np.full(len(spelling.points), -np.inf), np.zeros(len(spelling.points), dtype=bool)
        scored = False
        for text, first in spelling.texts():
            found = self.function(text)
            if isinstance(found, np.ndarray) and found.ndim == 1 and found.dtype.kind in "fiub":
                scored = True
                values[first : first + len(text)] = self._checked(found, text)
            else:
                for start, end in self._spans(found, len(text)):
                    marked[first + start : first + end] = True
        if scored and marked.any():
            raise FastSAEError(f"the function of proxy {self.name!r} must return spans always or never, got both")
        if scored:
            best = spelling.largest(values)
            return np.maximum(np.nan_to_num(best, nan=-np.inf), np.log(ELSEWHERE)).astype(np.float32)
        return _Marked(self.name, spelling.within(marked)).score(spelling, counts)

    def members(self, spelling: Spelling) -> np.ndarray:
        """[N] bool, what TokenCounts counts: score > 0."""
        return self.score(spelling) > 0

    def _checked(self, found: np.ndarray, text: str) -> np.ndarray:
        if len(found) != len(text):
            raise FastSAEError(
                f"the function of proxy {self.name!r} must return a score for each of {len(text)} characters, "
                f"got {len(found)}"
            )
        return found

    def _spans(self, found: Any, length: int) -> list[tuple[int, int]]:
        try:
            return [(min(max(int(start), 0), length), min(max(int(end), 0), length)) for start, end in found]
        except (TypeError, ValueError):
            raise FastSAEError(
                f"the function of proxy {self.name!r} must return (start, end) spans or an array of scores, got "
                f"{type(found).__name__}"
            ) from None


@dataclass(frozen=True, eq=False)
class _Marked(Membership):
    name: str
    inside: np.ndarray

    def members(self, spelling: Spelling) -> np.ndarray:
        return self.inside
