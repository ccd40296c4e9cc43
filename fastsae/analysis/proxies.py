"""Proxies: how much a token belongs to a hypothesis ("this is Arabic", "this is base64"), without any model.

A proxy's value is log P(s | hypothesis) / P(s), the largest over the strings s that end at the token (Bricken et al.
2023). Positive values mean that the token belongs to the category; the yes-or-no label is value > 0.

A proxy is anything with a `name` and `score(spelling) → [N]`. Axes: N tokens.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastsae.analysis.labels import Spelling
from fastsae.analysis.membership import ELSEWHERE, Membership, Proxy, TokenCounts
from fastsae.analysis.patterns import Function, PatternError, Regex, TokenSet, compiled
from fastsae.analysis.scripts import NUMBER
from fastsae.errors import FastSAEError

__all__ = [
    "BASE64", "DEFAULT", "DNA", "HEX", "Charset", "Either", "Function", "Proxy", "Regex", "Script", "TokenCounts",
    "TokenSet", "proxies", "score_all",
]  # fmt: skip


@dataclass(frozen=True)
class Script(Membership):
    """All characters of the token are in the script's blocks (`scripts.SCRIPTS`, the paper's for Arabic).

    A script that is not in that table goes by Unicode's own property: characters whose Script_Extensions hold it.
    Spaces around are neutral. Raises PatternError for a name that Unicode does not have.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in NUMBER:
            self._pattern()

    def _pattern(self):
        try:
            if re.fullmatch(r"[A-Za-z][A-Za-z _'-]*", self.name):  # nothing that could close the braces around it
                return compiled(rf"\p{{Script_Extensions={self.name}}}")
        except PatternError:
            pass
        raise PatternError(f"expected a script of Unicode, got {self.name!r}; a few: {', '.join(list(NUMBER)[:8])}")

    def members(self, spelling: Spelling) -> np.ndarray:
        """See Membership."""
        if self.name in NUMBER:
            return spelling.scripts == NUMBER[self.name]
        matches = self._pattern().match
        points, back = np.unique(spelling.points, return_inverse=True)
        inside = np.array([matches(chr(point)) is not None for point in points.tolist()], dtype=bool)
        return spelling.within(inside[back])


@dataclass(frozen=True)
class Charset:
    """The token ends a run of characters that were drawn evenly from an alphabet.

    log P(s | h) / P(s) = Σ over the tokens of s (−characters · log |alphabet| − log p(token)), p being unigram
    probabilities in the whole text; −∞ once a token has any other character.

    classes: parts of the alphabet that s must all have a character of. Unigrams make every rare name of a program
    look drawn at random; a name rarely has capitals, small letters and digits together, a run of base64 hardly ever
    has not. min_tokens, max_tokens: length of s; one token proves nothing, and far ones stop mattering.
    """

    name: str
    alphabet: str
    classes: tuple[str, ...] = ()
    min_tokens: int = 2
    max_tokens: int = 16

    def score(self, spelling: Spelling, counts: TokenCounts | None = None) -> np.ndarray:
        """See Proxy."""
        legal = spelling.all_bytes(_members(self.alphabet)[spelling.data])
        counts = TokenCounts.of([], spelling) if counts is None else counts
        log_p = counts.log_p()[spelling.token_ids]
        gain = np.where(legal, -np.diff(spelling.starts) * np.log(len(self.alphabet)) - log_p, -np.inf)
        has = [spelling.any_byte(_members(part)[spelling.data]) for part in self.classes]
        best = np.full(len(gain), -np.inf)
        total, seen = gain.copy(), [part.copy() for part in has]  # of the run of `length` tokens that ends at n
        for length in range(1, min(self.max_tokens, len(gain)) + 1):
            if length > 1:  # the same run, one token longer at its left end
                step = length - 1
                same = spelling.documents[:-step] == spelling.documents[step:]
                total[step:] = np.where(same, total[step:] + gain[:-step], -np.inf)
                total[:step] = -np.inf
                for now, part in zip(seen, has, strict=True):
                    now[step:] |= part[:-step]
            if length >= self.min_tokens:
                complete = np.logical_and.reduce(seen) if seen else True
                best = np.maximum(best, np.where(complete, total, -np.inf))
        return np.maximum(best, np.log(ELSEWHERE)).astype(np.float32)


@dataclass(frozen=True)
class Either:
    """The token fits one of several hypotheses, each as likely: log Σ_i P(s | h_i) / P(s) by its largest term."""

    name: str
    parts: tuple[Charset, ...]

    def score(self, spelling: Spelling, counts: TokenCounts | None = None) -> np.ndarray:
        """See Proxy."""
        best = np.maximum.reduce([part.score(spelling, counts) for part in self.parts])
        return np.maximum(best - np.log(len(self.parts)), np.log(ELSEWHERE)).astype(np.float32)


_CLASSES = (string.ascii_uppercase, string.ascii_lowercase, string.digits + "+/")
BASE64 = Charset("base64", "".join(_CLASSES), _CLASSES, min_tokens=4, max_tokens=24)
DNA = Charset("DNA", "ACGT")
HEX = Either(
    "hex",  # in small letters or in capitals, hardly ever in both
    tuple(
        Charset("hex", string.digits + letters, (string.digits, letters), min_tokens=4, max_tokens=24)
        for letters in ("abcdef", "ABCDEF")
    ),
)
DEFAULT = ("Arabic", "Hebrew", "Cyrillic", "Greek", "Han", "Kana", "Hangul", "Devanagari", "Thai", "base64", "DNA")
_NAMED: dict[str, Proxy] = {proxy.name.lower(): proxy for proxy in (BASE64, DNA, HEX)}
_SCRIPTS = {name.lower(): name for name in NUMBER}


def proxies(names: Iterable[str | Proxy] = DEFAULT) -> list[Proxy]:
    """The proxies of those names; Proxy objects pass through.

    A name is a script ("Arabic"; any of Unicode's), "base64", "DNA", "hex", "regex:PATTERN", "tokens:the,of" (strings)
    or "ids:5,17". The last three may be given a name: "years=regex:[12]\\d{3}". Capitals do not matter.
    Raises FastSAEError for a name that is none of these, or one that comes twice.
    """
    result = [_named(name) if isinstance(name, str) else name for name in names]
    seen = [proxy.name for proxy in result]
    if len(set(seen)) < len(seen):
        raise FastSAEError(f"each proxy may be given once, got {', '.join(seen)}")
    return result


def _named(text: str) -> Proxy:
    made = re.fullmatch(r"(?:([^=:]+)=)?(regex|tokens|ids):(.*)", text, re.DOTALL)
    if made is not None:
        name, kind, rest = made[1] or text, made[2], made[3]
        if not rest:
            raise FastSAEError(f"expected something after {kind}:, got {text!r}; for example {_EXAMPLES[kind]}")
        if kind == "regex":
            return Regex(name, rest)
        entries = rest.split(",")
        if kind == "tokens":
            return TokenSet(name, entries)
        if not all(entry.strip().isdecimal() for entry in entries):
            raise FastSAEError(f"ids: takes numbers with commas between, got {rest!r}; for strings write tokens:{rest}")
        return TokenSet(name, [int(entry) for entry in entries])
    if text.lower() in _NAMED:
        return _NAMED[text.lower()]
    if text.lower() in _SCRIPTS:
        return Script(_SCRIPTS[text.lower()])
    try:
        return Script(text)
    except PatternError:
        pass
    known = ", ".join(["base64", "DNA", *NUMBER, "hex"])
    raise FastSAEError(
        f"proxies are scripts, base64, DNA, hex, regex:…, tokens:… or ids:…, got {text!r}; choose from {known}"
    )


_EXAMPLES = {"regex": r"regex:\d+", "tokens": "tokens:the,of", "ids": "ids:5,17"}


def score_all(chosen: Sequence[Proxy], spelling: Spelling, counts: TokenCounts | None = None) -> np.ndarray:
    """[P, N] float32: the value of each proxy at each token. counts: see Proxy."""
    if not chosen:
        return np.zeros((0, len(spelling)), np.float32)
    return np.stack([proxy.score(spelling, counts) for proxy in chosen])


def _members(alphabet: str) -> np.ndarray:
    """[256] bool: the bytes of an ASCII alphabet."""
    table = np.zeros(256, dtype=bool)
    table[list(alphabet.encode("ascii"))] = True
    return table
