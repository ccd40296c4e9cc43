"""Proxies: how much a token belongs to a hypothesis ("this is Arabic", "this is base64"), without any model.

A proxy's value is log P(s | hypothesis) / P(s), the largest over the strings s that end at the token (Bricken et al.
2023). Positive values mean that the token belongs to the category; the yes-or-no label is value > 0.

A proxy is anything with a `name` and `score(spelling) → [N]`. Axes: N tokens, V vocabulary.

"Arabic", "base64" and their like label what a reader would. "Arabic/paper", "base64/paper", "DNA/paper" are the forms
of the paper, from which they differ in two points: a token that holds a part of a character belongs where the whole
character does, in the paper as often as that entry does; base64 asks for four tokens with capitals, small letters and
digits, in the paper for one legal character.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastsae.analysis.labels import Spelling
from fastsae.analysis.membership import ELSEWHERE, Membership, Proxy, TokenCounts
from fastsae.analysis.patterns import Function, PatternError, Regex, TokenSet, compiled
from fastsae.analysis.scripts import NUMBER
from fastsae.errors import FastSAEError

__all__ = [
    "BASE64", "DEFAULT", "DNA", "HEX", "PAPER", "Charset", "Either", "Function", "Proxy", "Regex", "Script",
    "TokenCounts", "TokenSet", "proxies", "score_all",
]  # fmt: skip


@dataclass(frozen=True)
class Script(Membership):
    """All characters of the token are in the script's blocks (`scripts.SCRIPTS`, the paper's for Arabic).

    A script that is not in that table goes by Unicode's own property: characters whose Script_Extensions hold it.
    Spaces around are neutral.

    partial: what a token is that holds only a part of a character. "character": what the character is that it belongs
    to, where it stands. "fraction", as in the paper: P(h | s) is the share of the entry's occurrences in the whole text
    that belong to the script, the same wherever it stands; the score is log(P(h | s) / P(h)). Keeps [V] counts.
    script: of Unicode; left out, the name. Raises PatternError for one that Unicode does not have.
    """

    name: str
    partial: Literal["character", "fraction"] = "character"
    script: str = ""

    def __post_init__(self) -> None:
        if self.partial not in ("character", "fraction"):
            raise FastSAEError(f"partial must be character or fraction, got {self.partial!r}")
        if not self.script:
            object.__setattr__(self, "script", self.name)
        if self.script not in NUMBER:
            self._pattern()

    @property
    def by_token(self) -> bool:
        """Whether TokenCounts must count members token by token."""
        return self.partial == "fraction"

    def _pattern(self):
        try:
            if re.fullmatch(r"[A-Za-z][A-Za-z _'-]*", self.script):  # nothing that could close the braces around it
                return compiled(rf"\p{{Script_Extensions={self.script}}}")
        except PatternError:
            pass
        raise PatternError(f"expected a script of Unicode, got {self.script!r}; a few: {', '.join(list(NUMBER)[:8])}")

    def members(self, spelling: Spelling) -> np.ndarray:
        """[N] bool, a part of a character being what the whole is, whatever `partial` says."""
        if self.script in NUMBER:
            return spelling.scripts == NUMBER[self.script]
        matches = self._pattern().match
        points, back = np.unique(spelling.points, return_inverse=True)
        inside = np.array([matches(chr(point)) is not None for point in points.tolist()], dtype=bool)
        return spelling.within(inside[back])

    def score(self, spelling: Spelling, counts: TokenCounts | None = None) -> np.ndarray:
        """See Proxy."""
        if not self.by_token:
            return super().score(spelling, counts)
        counts = TokenCounts.of([self], spelling) if counts is None else counts
        given = np.where(self.members(spelling), 1.0, ELSEWHERE)  # P(h | s)
        parts = spelling.bytes_of.partial[spelling.token_ids]
        given[parts] = np.maximum(counts.fraction(self.name)[spelling.token_ids[parts]], ELSEWHERE)
        return np.log(given / counts.prior(self.name)).astype(np.float32)


@dataclass(frozen=True)
class Charset:
    """The token ends a run of characters that were drawn evenly from an alphabet.

    log P(s | h) / P(s) = Σ over the tokens of s (−characters · log |alphabet| − log p(token)), p being unigram
    probabilities in the whole text; −∞ once a token has any other character.

    classes: parts of the alphabet that s must all have a character of. Unigrams make every rare name of a program
    look drawn at random; a name rarely has capitals, small letters and digits together, a run of base64 hardly ever
    has not. min_tokens, max_tokens: length of s; one token proves nothing, and far ones stop mattering. max_tokens
    None: any length, which goes without classes. Raises FastSAEError for lengths that cannot be meant.
    """

    name: str
    alphabet: str
    classes: tuple[str, ...] = ()
    min_tokens: int = 2
    max_tokens: int | None = 16

    def __post_init__(self) -> None:
        if self.min_tokens < 1 or (self.max_tokens is not None and self.max_tokens < self.min_tokens):
            raise FastSAEError(f"expected 1 ≤ min_tokens ≤ max_tokens, got {self.min_tokens} and {self.max_tokens}")
        if self.max_tokens is None and self.classes:
            raise FastSAEError("a charset with classes needs max_tokens, got None; 24 is usual")

    def score(self, spelling: Spelling, counts: TokenCounts | None = None) -> np.ndarray:
        """See Proxy."""
        legal = spelling.all_bytes(_members(self.alphabet)[spelling.data])
        counts = TokenCounts.of([], spelling) if counts is None else counts
        log_p = counts.log_p()[spelling.token_ids]
        gain = np.where(legal, -np.diff(spelling.starts) * np.log(len(self.alphabet)) - log_p, -np.inf)
        has = [spelling.any_byte(_members(part)[spelling.data]) for part in self.classes]
        best = np.full(len(gain), -np.inf)
        total, seen = gain.copy(), [part.copy() for part in has]  # of the run of `length` tokens that ends at n
        for length in range(1, min(self.max_tokens or self.min_tokens, len(gain)) + 1):
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
        if self.max_tokens is None:
            best[self.min_tokens :] += self._before(gain, spelling.documents)[: -self.min_tokens]
        return np.maximum(best, np.log(ELSEWHERE)).astype(np.float32)

    def _before(self, gain: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """[N]: what the best string that ends at a token adds to one that begins behind it, 0 if it is better without
        (Kadane's recursion). Where the token min_tokens on is of another document, it adds 0."""
        new = np.diff(documents, prepend=-1) != 0
        run, found = -np.inf, np.zeros(len(gain))
        for n, (more, begins) in enumerate(zip(gain.tolist(), new.tolist(), strict=True)):
            run = more + run if run > 0 and not begins else more
            found[n] = run
        step = self.min_tokens
        found[:-step][documents[:-step] != documents[step:]] = 0
        return np.maximum(found, 0)


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
PAPER = (Charset("base64/paper", BASE64.alphabet, (), 1, None), Charset("DNA/paper", DNA.alphabet, (), 2, None))
HEX = Either(
    "hex",  # in small letters or in capitals, hardly ever in both
    tuple(
        Charset("hex", string.digits + letters, (string.digits, letters), min_tokens=4, max_tokens=24)
        for letters in ("abcdef", "ABCDEF")
    ),
)
DEFAULT = ("Arabic", "Hebrew", "Cyrillic", "Greek", "Han", "Kana", "Hangul", "Devanagari", "Thai", "base64", "DNA")
_NAMED: dict[str, Proxy] = {proxy.name.lower(): proxy for proxy in (BASE64, DNA, HEX, *PAPER)}
_SCRIPTS = {name.lower(): name for name in NUMBER}


def proxies(names: Iterable[str | Proxy | Callable[[str], Any]] = DEFAULT) -> list[Proxy]:
    """The proxies of those names; Proxy objects pass through, and a Python function becomes a `Function` of its name.

    A name is a script ("Arabic"; any of Unicode's), "base64", "DNA", "hex", "regex:PATTERN", "tokens:the,of" (strings)
    or "ids:5,17". The last three may be given a name: "years=regex:[12]\\d{3}". "/paper" behind a script, base64 or DNA
    means the paper's form of it (see above). Capitals do not matter.
    Raises FastSAEError for a name that is none of these, or one that comes twice, and for other objects.
    """
    result = [_proxy(one) for one in names]
    seen = [proxy.name for proxy in result]
    if len(set(seen)) < len(seen):
        raise FastSAEError(f"each proxy may be given once, got {', '.join(seen)}")
    return result


def _proxy(given: Any) -> Proxy:
    if isinstance(given, str):
        return _named(given)
    if callable(getattr(given, "score", None)) and isinstance(getattr(given, "name", None), str):
        return given
    if callable(given) and not isinstance(given, type):
        return Function(getattr(given, "__name__", type(given).__name__), given)
    raise FastSAEError(
        f"a proxy is a name, a function of the text or an object with name and score, got {given!r}: see "
        "fastsae.analysis.proxies"
    )


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
    script, slash, form = text.rpartition("/")
    try:
        if form.lower() == "paper" and slash:
            script = _SCRIPTS.get(script.lower(), script)
            return Script(f"{script}/paper", "fraction", script)
        return Script(_SCRIPTS.get(text.lower(), text))
    except PatternError:
        pass
    known = ", ".join(["base64", "DNA", *NUMBER, "hex"])
    raise FastSAEError(
        "proxies are scripts, base64, DNA (in the paper's form: Arabic/paper, base64/paper), hex, regex:…, tokens:… "
        f"or ids:…, got {text!r}; choose from {known}"
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
