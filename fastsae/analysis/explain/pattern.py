"""Patterns: rules on a token and the few before it, which say where a feature is on and how strongly.

A pattern is a list of rules; the first that holds at a token gives its level. It is stated in words, saved as JSON, and
run on any text and any tokenizer, as it knows tokens by their bytes. It is a Proxy (fastsae.analysis.proxies).

Axes: N tokens, U distinct tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastsae.analysis.labels import Spelling, readable
from fastsae.analysis.membership import Membership
from fastsae.analysis.scripts import NUMBER
from fastsae.errors import FastSAEError


def _letters(text: str) -> str:
    return "".join(char for char in text if char.isalpha())


# name → (test of a token's text, in words). U+FFFD stands for bytes that make no whole character.
CLASSES: dict[str, tuple[Callable[[str], bool], str]] = {
    "number": (lambda t: t.strip().isdigit(), "numbers"),
    "digit": (lambda t: any(char.isdigit() for char in t), "tokens with a digit"),
    "capital": (lambda t: t.strip()[:1].isupper(), "capitalised tokens"),
    "capitals": (lambda t: len(_letters(t)) > 1 and _letters(t).isupper(), "tokens in capital letters"),
    "lower": (lambda t: _letters(t).islower(), "tokens in small letters"),
    "mixed": (
        lambda t: any(a.islower() and b.isupper() or a.isalpha() != b.isalpha() for a, b in _pairs(t)),
        "tokens that mix capitals, small letters and digits",
    ),
    "mark": (lambda t: bool(t.strip()) and not any(c.isalnum() or c == "\ufffd" for c in t), "punctuation and symbols"),
    "space": (lambda t: t != "" and not t.strip(), "white space"),
    "newline": (lambda t: "\n" in t, "tokens with a line break"),
    "start": (lambda t: t[:1] == " " and t[1:2].isalpha(), "beginnings of words"),
    "inside": (lambda t: t[:1].isalpha(), "tokens that begin with a letter, without a space"),
    "letter": (lambda t: len(t.strip()) == 1 and t.strip().isalpha(), "single letters"),
    "foreign": (lambda t: any(ord(char) > 127 for char in t), "tokens beyond ASCII"),
    "part": (lambda t: "\ufffd" in t, "parts of characters"),
}


def _pairs(text: str) -> list[tuple[str, str]]:
    joined = [char for char in text.strip() if char.isalnum()]
    return list(zip(joined, joined[1:], strict=False))


@dataclass(frozen=True)
class Atom:
    """One condition on the token `offset` places away (0 the token itself, −1 the one before).

    kind: "token", its bytes are one of values; "word", its text without spaces and case is; "near", any of the −offset
    tokens before has bytes in values; "script", values[0] in fastsae.analysis.scripts; "class", values[0] in CLASSES;
    "prefix" and "suffix", of its text without the space before it.
    """

    kind: str
    values: tuple[Any, ...]
    offset: int = 0

    def describe(self) -> str:
        """In words: what the token is."""
        if self.kind in ("token", "near"):
            texts = ["".join(readable([value])) for value in self.values]
            shown = [f"`{_escaped(text)}`" for text in texts]
            return f"the token{'s' if len(shown) > 1 else ''} {_listed(shown)}"
        if self.kind == "word":
            shown = [f"“{_escaped(value)}”" for value in self.values]
            return f"the word{'s' if len(shown) > 1 else ''} {_listed(shown)} in any case"
        if self.kind == "script":
            return f"tokens in {self.values[0]} script"
        if self.kind == "class":
            return CLASSES[self.values[0]][1]
        return f"tokens that {'begin' if self.kind == 'prefix' else 'end'} with “{_escaped(self.values[0])}”"

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON; bytes that are no text are written as {"hex": …}."""
        return {"kind": self.kind, "offset": self.offset, "values": [_value_to_json(v) for v in self.values]}

    @classmethod
    def from_json(cls, data: Any) -> Atom:
        """What to_json wrote. Raises FastSAEError for anything else."""
        try:
            kind, offset = str(data["kind"]), int(data["offset"])
            values = tuple(_value_from_json(value, kind in ("token", "near")) for value in data["values"])
        except (LookupError, TypeError, ValueError):
            raise FastSAEError(f"expected a condition of a pattern, got {str(data)[:80]!r}") from None
        known = {"script": NUMBER, "class": CLASSES}.get(kind, values)
        if kind not in KINDS or offset > 0 or not values or any(value not in known for value in values):
            raise FastSAEError(f"expected a condition of a pattern, got {str(data)[:80]!r}")
        return cls(kind, values, offset)


KINDS = ("token", "word", "near", "script", "class", "prefix", "suffix")


def _escaped(text: str) -> str:
    """On one line: what cannot be seen as its escape, but for spaces and the joiners of Persian and emoji."""
    shown = (c if c.isprintable() or c in "\u200c\u200d" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def _value_to_json(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"hex": value.hex()}


def _value_from_json(value: Any, is_bytes: bool) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    if not isinstance(value, str):
        raise TypeError("a value of a condition is text")
    return value.encode() if is_bytes else value


def _listed(shown: list[str], most: int = 8) -> str:
    if len(shown) > most:
        return ", ".join(shown[:most]) + f" and {len(shown) - most} more"
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


@dataclass(frozen=True)
class Rule:
    """All atoms hold → level (0–9). by_value: a level for each value of the first atom, or none."""

    atoms: tuple[Atom, ...]
    level: float
    by_value: tuple[float, ...] = ()

    def describe(self) -> str:
        """In words: `the token ` of` after the token ` one``."""
        here = [atom.describe() for atom in self.atoms if atom.offset == 0]
        text = ", which are ".join(here) if here else "any token"
        for atom in sorted((a for a in self.atoms if a.offset < 0), key=lambda a: (a.kind == "near", -a.offset)):
            if atom.kind == "near":
                text += f" at most {-atom.offset} tokens after {atom.describe()}"
            else:
                text += f" {'' if atom.offset == -1 else f'{-atom.offset} places '}after {atom.describe()}"
        return text


class Text:
    """A Spelling as the atoms read it; what depends on a token alone is worked out once for each distinct token."""

    def __init__(self, spelling: Spelling) -> None:
        self.spelling = spelling
        self.ids, self.which = np.unique(spelling.token_ids, return_inverse=True)  # [U], [N]
        self.pieces = [spelling.bytes_of[int(i)] for i in self.ids]

    @cached_property
    def texts(self) -> list[str]:
        """[U] each token's text; bytes that make no whole character are U+FFFD."""
        return [piece.decode("utf-8", "replace") for piece in self.pieces]

    @cached_property
    def words(self) -> list[str]:
        """[U] each token's text without spaces and case; empty where it is no whole characters."""
        return ["" if "\ufffd" in text else text.strip().casefold() for text in self.texts]

    def here(self, atom: Atom) -> np.ndarray:
        """[N] bool: whether the token itself is as the atom says, whatever its offset."""
        if atom.kind == "script":
            return self.spelling.scripts == NUMBER[atom.values[0]]
        if atom.kind in ("token", "near"):
            wanted = set(atom.values)
            found = [piece in wanted and piece != b"" for piece in self.pieces]
        elif atom.kind == "word":
            wanted = set(atom.values)
            found = [word in wanted and word != "" for word in self.words]
        elif atom.kind == "class":
            test = CLASSES[atom.values[0]][0]
            found = [test(text) for text in self.texts]
        elif atom.kind == "prefix":
            found = [text.lstrip(" ").startswith(atom.values[0]) for text in self.texts]
        else:
            found = [text.endswith(atom.values[0]) for text in self.texts]
        return np.asarray(found, dtype=bool)[self.which]

    def holds(self, atom: Atom) -> np.ndarray:
        """[N] bool: the atom holds; never across the edge of a document."""
        return self.moved(self.here(atom), atom)

    def moved(self, here: np.ndarray, atom: Atom) -> np.ndarray:
        """[N] bool: `here` [N] seen from the tokens that the atom is about."""
        if atom.kind != "near":
            return self.shifted(here, -atom.offset)
        return np.logical_or.reduce([self.shifted(here, step) for step in range(1, 1 - atom.offset)])

    def shifted(self, values: np.ndarray, step: int) -> np.ndarray:
        """[N] values of the token `step` places before, False (0) where the document has none."""
        if step == 0:
            return values
        moved, documents = np.zeros_like(values), self.spelling.documents
        same = documents[step:] == documents[:-step]
        moved[step:] = np.where(same, values[:-step], np.zeros((), values.dtype))
        return moved


@dataclass(frozen=True)
class Pattern(Membership):
    """Where a feature is on and how strongly, by the first rule that holds. No rules: nowhere."""

    rules: tuple[Rule, ...] = ()

    @property
    def name(self) -> str:
        """In words."""
        return "; or ".join(rule.describe() for rule in self.rules) or "no pattern found"

    def level(self, spelling: Spelling) -> np.ndarray:
        """[N] float32 in 0–9: the expected level of activation."""
        return self.level_of(Text(spelling))

    def level_of(self, text: Text) -> np.ndarray:
        """See level."""
        level = np.zeros(len(text.spelling), dtype=np.float32)
        free = np.ones(len(level), dtype=bool)
        for rule in self.rules:
            on = free & matched(text, rule.atoms)
            level[on] = rule.level
            first = rule.atoms[0]
            for value, own in zip(first.values, rule.by_value, strict=False):
                level[on & text.holds(Atom(first.kind, (value,), first.offset))] = own
            free &= ~on
        return level

    def members(self, spelling: Spelling) -> np.ndarray:
        """[N] bool: where a rule holds. See Membership, which makes a proxy of it."""
        text = Text(spelling)
        inside = np.zeros(len(spelling), dtype=bool)
        for rule in self.rules:
            inside |= matched(text, rule.atoms)
        return inside

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON."""
        return {
            "rules": [
                {"atoms": [a.to_json() for a in rule.atoms], "level": rule.level, "by_value": list(rule.by_value)}
                for rule in self.rules
            ]
        }

    @classmethod
    def from_json(cls, data: Any) -> Pattern:
        """What to_json wrote. Raises FastSAEError for anything else."""
        try:
            return cls(
                tuple(
                    Rule(
                        tuple(Atom.from_json(atom) for atom in rule["atoms"]),
                        float(rule["level"]),
                        tuple(float(level) for level in rule["by_value"]),
                    )
                    for rule in data["rules"]
                )
            )
        except (LookupError, TypeError):
            raise FastSAEError(f"expected a pattern, got {str(data)[:80]!r}") from None


def matched(text: Text, atoms: Iterable[Atom]) -> np.ndarray:
    """[N] bool: all atoms hold."""
    return np.logical_and.reduce([text.holds(atom) for atom in atoms])
