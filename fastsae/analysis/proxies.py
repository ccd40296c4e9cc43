"""Proxies: how much a token belongs to a hypothesis ("this is Arabic", "this is base64"), without any model.

A proxy's value is log P(s | hypothesis) / P(s), the largest over the strings s that end at the token (Bricken et al.
2023). Positive values mean that the token belongs to the category; the yes-or-no label is value > 0.

A proxy is anything with a `name` and `score(spelling) → [N]`. Axes: N tokens.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastsae.analysis.labels import Spelling
from fastsae.analysis.scripts import NUMBER
from fastsae.errors import FastSAEError

_ELSEWHERE = 1e-10  # P(hypothesis | s) where some character of s is of another script (Bricken et al. 2023)


class Proxy(Protocol):
    """A hypothesis about tokens."""

    @property
    def name(self) -> str: ...

    def score(self, spelling: Spelling) -> np.ndarray:
        """[N] float32, nats: > 0 where the token belongs to the category."""
        ...


@dataclass(frozen=True)
class Script:
    """All characters of the token are in the script's blocks.

    P(hypothesis | s) is 1 there and 1e-10 elsewhere, so log P(s | h) / P(s) = log P(h | s) / P(h) takes two values
    only, P(h) being the script's share of the tokens.
    """

    name: str

    def score(self, spelling: Spelling) -> np.ndarray:
        """See Proxy."""
        inside = spelling.scripts == NUMBER[self.name]
        prior = (inside.sum() + 1) / (len(inside) + 2)
        return np.where(inside, -np.log(prior), np.log(_ELSEWHERE / prior)).astype(np.float32)


@dataclass(frozen=True)
class Charset:
    """The token ends a run of characters that were drawn evenly from an alphabet.

    log P(s | h) / P(s) = Σ over the tokens of s (−characters · log |alphabet| − log p(token)), p being unigram
    probabilities in the text at hand; −∞ once a token has any other character.

    classes: parts of the alphabet that s must all have a character of. Unigrams make every rare name of a program
    look drawn at random; a name rarely has capitals, small letters and digits together, a run of base64 hardly ever
    has not. min_tokens, max_tokens: length of s; one token proves nothing, and far ones stop mattering.
    """

    name: str
    alphabet: str
    classes: tuple[str, ...] = ()
    min_tokens: int = 2
    max_tokens: int = 16

    def score(self, spelling: Spelling) -> np.ndarray:
        """See Proxy."""
        legal = spelling.all_bytes(_members(self.alphabet)[spelling.data])
        counts = np.bincount(spelling.token_ids, minlength=len(spelling.bytes_of))
        log_p = np.log((counts + 1) / (len(spelling) + len(counts)))[spelling.token_ids]
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
        return np.maximum(best, np.log(_ELSEWHERE)).astype(np.float32)


def _members(alphabet: str) -> np.ndarray:
    """[256] bool: the bytes of an ASCII alphabet."""
    table = np.zeros(256, dtype=bool)
    table[list(alphabet.encode("ascii"))] = True
    return table


_CLASSES = (string.ascii_uppercase, string.ascii_lowercase, string.digits + "+/")
BASE64 = Charset("base64", "".join(_CLASSES), _CLASSES, min_tokens=4, max_tokens=24)
DNA = Charset("DNA", "ACGT")
DEFAULT = ("Arabic", "Hebrew", "Cyrillic", "Greek", "Han", "Kana", "Hangul", "Devanagari", "Thai", "base64", "DNA")


def proxies(names: Iterable[str | Proxy] = DEFAULT) -> list[Proxy]:
    """The proxies of those names: any script of `scripts.SCRIPTS`, "base64", "DNA"; Proxy objects pass through.

    Raises FastSAEError for a name that is none of these, or one that comes twice.
    """
    charsets = {charset.name: charset for charset in (BASE64, DNA)}
    result: list[Proxy] = []
    for name in names:
        if not isinstance(name, str):
            result.append(name)
        elif name in charsets:
            result.append(charsets[name])
        elif name in NUMBER:
            result.append(Script(name))
        else:
            known = ", ".join([*charsets, *NUMBER])
            raise FastSAEError(f"proxies are scripts, base64 or DNA, got {name!r}; choose from {known}")
    seen = [proxy.name for proxy in result]
    if len(set(seen)) < len(seen):
        raise FastSAEError(f"each proxy may be given once, got {', '.join(seen)}")
    return result


def score_all(chosen: Sequence[Proxy], spelling: Spelling) -> np.ndarray:
    """[P, N] float32: the value of each proxy at each token."""
    return np.stack([proxy.score(spelling) for proxy in chosen]) if chosen else np.zeros((0, len(spelling)), np.float32)
