"""The smallest pattern that tells where a feature is on: a search over the evidence, without any language model.

Every rule has to save more than it costs to say (minimum description length). With c the counts of tokens by class of
activation (silent, weak, medium, strong) and L(c) the length in nats of a message that names the class of every token
(Krichevsky–Trofimov), a rule that holds at tokens with counts a out of t saves L(t) − L(a) − L(t − a), and costs the
log of the number of rules of its kind that could be said. So a random feature gets no rule.

Axes: M tokens of the evidence, A candidate atoms, C classes, U distinct tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lgamma, log
from typing import Any, NamedTuple

import numpy as np

from fastsae.analysis.examples import Evidence, Example
from fastsae.analysis.explain.pattern import CLASSES, KINDS, Atom, Pattern, Rule, Text
from fastsae.analysis.explain.protocol import quantised
from fastsae.analysis.labels import Spelling, TokenBytes
from fastsae.analysis.scripts import SCRIPTS
from fastsae.errors import FastSAEError

_CLASS_OF_LEVEL = np.array([0, 1, 1, 1, 2, 2, 2, 3, 3, 3])  # silent, weak, medium, strong
_C = 4


@dataclass(frozen=True)
class SearchConfig:
    """How far the search goes. max_rules of a pattern, max_atoms of a rule, max_values of a set of tokens; reach: how
    many tokens before the token a rule may look at; beam: how many rules are made longer at each step."""

    max_rules: int = 4
    max_atoms: int = 3
    max_values: int = 32
    reach: int = 4
    beam: int = 5

    def __post_init__(self) -> None:
        for name in ("max_rules", "max_atoms", "max_values", "reach", "beam"):
            if getattr(self, name) < 1:
                raise FastSAEError(f"{name} must be at least 1, got {getattr(self, name)}")


class _Found(NamedTuple):
    saved: float  # nats, less the cost
    cost: float
    atoms: tuple[Atom, ...]
    mask: np.ndarray  # [M] bool


def find_pattern(evidence: Evidence, bytes_of: TokenBytes, config: SearchConfig | None = None) -> Pattern:
    """Rules, most telling first, as long as each saves more than it costs. About a second for 3,000 tokens."""
    config = config or SearchConfig()
    sample = _Sample(evidence, bytes_of)
    if not (sample.levels > 0).any():
        return Pattern()
    pool = _Pool(sample, config)
    free = np.ones(len(sample.levels), dtype=bool)
    rules: list[Rule] = []
    while len(rules) < config.max_rules:
        best = _best_rule(sample, pool, free, config)
        if best is None:
            break
        on = free & best.mask
        rules.append(_rule(sample, best.atoms, on))
        free &= ~on
    return Pattern(tuple(rules))


def _rule(sample: _Sample, atoms: tuple[Atom, ...], on: np.ndarray) -> Rule:
    level = float(sample.levels[on].mean())
    first = atoms[0]
    if len(first.values) < 2:
        return Rule(atoms, round(level, 3))
    own = []
    for value in first.values:
        here = on & sample.text.holds(Atom(first.kind, (value,), first.offset))
        # One pseudo-count of the rule's mean: a token seen once says little about its own level.
        own.append(round(float((sample.levels[here].sum() + level) / (here.sum() + 1)), 3))
    return Rule(atoms, round(level, 3), tuple(own))


class _Sample:
    """Every place of the evidence once: its text, windows standing as documents, and its levels [M]."""

    def __init__(self, evidence: Evidence, bytes_of: TokenBytes) -> None:
        seen: set[tuple[int, int]] = set()
        ids, windows, keep, values = [], [], [], []
        for number, example in enumerate(_examples(evidence)):
            first = example.position - example.at
            places = [(example.document, first + k) for k in range(len(example.token_ids))]
            keep.append([place not in seen for place in places])
            seen.update(places)
            ids.append(example.token_ids)
            windows.append(np.full(len(example.token_ids), number))
            values.append(example.activations)
        if not ids:
            raise FastSAEError(f"expected examples of feature {evidence.feature}, got none")
        self.text = Text(Spelling.of(np.concatenate(ids), np.concatenate(windows), bytes_of))
        self.levels = quantised(np.concatenate(values), evidence.maximum)
        # Places that stand in two windows are read in both (they are context there) and counted once.
        self.counted = np.concatenate([np.asarray(k, dtype=bool) for k in keep])
        self.classes = _CLASS_OF_LEVEL[self.levels]
        self.onehot = np.eye(_C, dtype=np.float32)[self.classes] * self.counted[:, None]  # [M, C]
        self._values: dict[tuple[str, int], tuple[np.ndarray, list[Any]]] = {}
        self.table = np.array([lgamma(k + 0.5) for k in range(len(self.levels) + 1)])
        self.total = np.array([lgamma(k + _C / 2) for k in range(len(self.levels) + 1)])

    def values(self, kind: str, offset: int) -> tuple[np.ndarray, list[Any]]:
        """See _values."""
        if (kind, offset) not in self._values:
            self._values[kind, offset] = _values(self.text, kind, offset)
        return self._values[kind, offset]

    def length(self, counts: np.ndarray) -> np.ndarray:
        """L of counts [..., C], nats: −log ∫ Π p_c^counts_c dDirichlet(½)."""
        counts = np.rint(counts).astype(np.int64)
        empty = _C * self.table[0] - self.total[0]
        return self.total[counts.sum(-1)] - self.table[counts].sum(-1) + empty

    def saved(self, counts: np.ndarray, total: np.ndarray) -> np.ndarray:
        """[...] nats saved by telling tokens of counts [..., C] from the rest of total [C]; −∞ where they are not the
        stronger ones: a rule says where a feature is on."""
        rest = total - counts
        weight = np.array([0, 2, 5, 8])
        inside, outside = np.maximum(counts.sum(-1), 1), np.maximum(rest.sum(-1), 1)
        stronger = (counts @ weight) * outside > (rest @ weight) * inside
        return np.where(stronger, self.length(total) - self.length(counts) - self.length(rest), -np.inf)


def _examples(evidence: Evidence) -> Iterator[Example]:
    yield from evidence.top
    for examples in evidence.intervals:
        yield from examples
    yield from evidence.random
    yield from evidence.elsewhere


class _Pool:
    """The candidate atoms of an evidence: masks [A, M] float32 and costs [A] in nats."""

    def __init__(self, sample: _Sample, config: SearchConfig) -> None:
        self.atoms: list[Atom] = []
        masks: list[np.ndarray] = []
        active = (sample.levels > 0) & sample.counted
        kinds: dict[tuple[str, int], int] = {}
        for atom, mask in _candidates(sample, active, config.reach):
            if (mask & active).sum() >= 2:
                self.atoms.append(atom)
                masks.append(mask)
            kinds[atom.kind, atom.offset] = kinds.get((atom.kind, atom.offset), 0) + 1
        self.masks = np.array(masks, dtype=np.float32).reshape(len(masks), len(sample.levels))
        self.sort_cost = log(len(KINDS) * (config.reach + 1))  # which kind of atom, at which offset
        self.costs = np.array([self.sort_cost + log(kinds[a.kind, a.offset]) for a in self.atoms])


def _candidates(sample: _Sample, active: np.ndarray, reach: int) -> Iterator[tuple[Atom, np.ndarray]]:
    """Atoms of one value that hold at some active token."""
    text = sample.text
    for offset in range(0, -reach - 1, -1):
        for kind in ("token", "word"):
            numbers, values = sample.values(kind, offset)
            for number in np.unique(numbers[active & (numbers >= 0)]):
                yield Atom(kind, (values[number],), offset), numbers == number
        if offset >= -2:
            for name in CLASSES:
                atom = Atom("class", (name,), offset)
                yield atom, text.holds(atom)
        if offset >= -1:
            for number in np.unique(text.spelling.scripts[text.spelling.scripts >= 0]):
                atom = Atom("script", (list(SCRIPTS)[number],), offset)
                yield atom, text.holds(atom)
    for piece in sorted({text.pieces[u] for step in range(1, reach + 1) for u in _before(text, active, step)}):
        atom = Atom("near", (piece,), -reach)
        yield atom, text.holds(atom)
    for kind, value in _affixes([text.texts[u] for u in np.unique(text.which[active])]):
        yield Atom(kind, (value,)), text.holds(Atom(kind, (value,)))


def _values(text: Text, kind: str, offset: int) -> tuple[np.ndarray, list[Any]]:
    """[M] the number of each token's value at an offset, −1 where there is none, and the values.

    A word that only one token spells has none: it is said as a token.
    """
    if kind == "token":
        values: list[Any] = text.pieces
        numbers, usable = text.which, np.array([value != b"" for value in values])
    else:
        unique, which, spelt = np.unique(np.array(text.words), return_inverse=True, return_counts=True)
        values, numbers = [str(value) for value in unique], which[text.which]
        usable = (spelt > 1) & (unique != "")
    return text.shifted(np.where(usable[numbers], numbers + 1, 0), -offset) - 1, values


def _before(text: Text, active: np.ndarray, step: int) -> np.ndarray:
    """Numbers of the tokens that stand `step` places before an active one."""
    moved = text.shifted(text.which + 1, step)[active] - 1
    return np.unique(moved[moved >= 0])


def _affixes(texts: list[str]) -> list[tuple[str, str]]:
    """Beginnings and ends of 1 to 4 characters that at least two of the texts share."""
    counts: dict[tuple[str, str], int] = {}
    for text in texts:
        body = text.lstrip(" ")
        for size in range(1, 5):
            if len(body) > size and "\ufffd" not in body:
                for key in (("prefix", body[:size]), ("suffix", body[-size:])):
                    counts[key] = counts.get(key, 0) + 1
    return sorted(key for key, count in counts.items() if count > 1)


def _best_rule(sample: _Sample, pool: _Pool, free: np.ndarray, config: SearchConfig) -> _Found | None:
    """The rule that saves most among the free tokens, found by making the best rules longer; None if none pays."""
    total = (sample.onehot * free[:, None]).sum(0)
    beam = [_Found(0.0, 0.0, (), free)]
    best: _Found | None = None
    for size in range(config.max_atoms):
        longer: list[_Found] = []
        for start in beam:
            longer += _extended(sample, pool, start, total, config)
            longer += _with_set(sample, pool, start, total, config)
        longer.sort(key=lambda found: -found.saved)
        beam = _distinct(longer, config.beam)
        if beam and beam[0].saved > (best.saved if best else 0.0):
            best = beam[0]
        elif size and best:
            break
    return best


def _extended(
    sample: _Sample, pool: _Pool, start: _Found, total: np.ndarray, config: SearchConfig
) -> list[_Found]:
    """`start` with one atom more."""
    if not pool.atoms:
        return []
    counts = pool.masks @ (sample.onehot * start.mask[:, None])  # [A, C]
    saved = sample.saved(counts, total) - start.cost - pool.costs
    found = []
    for a in np.argsort(-saved, kind="stable")[: 2 * config.beam]:
        if np.isfinite(saved[a]):
            mask = start.mask & (pool.masks[a] > 0)
            cost = start.cost + float(pool.costs[a])
            found.append(_Found(float(saved[a]), cost, _joined(start.atoms, pool.atoms[a]), mask))
    return found


def _with_set(
    sample: _Sample, pool: _Pool, start: _Found, total: np.ndarray, config: SearchConfig
) -> list[_Found]:
    """`start` with a set of tokens or words: for two classes the best set is the k values that are most often on
    (Breiman et al. 1984, theorem 4.5), so only k is searched."""
    found = []
    for offset in range(0, -min(config.reach, 2) - 1, -1):
        for kind in ("token", "word"):
            numbers, values = sample.values(kind, offset)
            on = start.mask & (numbers >= 0) & sample.counted
            cells = numbers[on] * _C + sample.classes[on]
            counts = np.bincount(cells, minlength=len(values) * _C).reshape(-1, _C)
            rate = (counts @ np.array([0, 2, 5, 8])) / (counts.sum(1) + 1)
            order = np.argsort(-rate, kind="stable")[: config.max_values]
            order = order[rate[order] > 0]
            if len(order) < 2:
                continue
            sizes = np.arange(1, len(order) + 1)
            cost = pool.sort_cost + sizes * log(max(len(values), 2)) - np.array([lgamma(k + 1) for k in sizes])
            saved = sample.saved(np.cumsum(counts[order], axis=0), total) - start.cost - cost
            k = int(np.argmax(saved[1:])) + 2
            if np.isfinite(saved[k - 1]):
                atom = Atom(kind, tuple(values[i] for i in order[:k]), offset)
                mask = start.mask & np.isin(numbers, order[:k])
                found.append(_Found(float(saved[k - 1]), start.cost + cost[k - 1], _joined(start.atoms, atom), mask))
    return found


def _joined(atoms: tuple[Atom, ...], atom: Atom) -> tuple[Atom, ...]:
    """Sets first, as a rule may have a level for each of the first atom's values; then by place."""
    return tuple(sorted({*atoms, atom}, key=lambda a: (len(a.values) < 2, -a.offset, a.kind, str(a.values))))


def _distinct(found: list[_Found], n: int) -> list[_Found]:
    """The first n that hold at different tokens."""
    kept: dict[bytes, _Found] = {}
    for one in found:
        kept.setdefault(np.packbits(one.mask).tobytes(), one)
        if len(kept) == n:
            break
    return list(kept.values())


def predicted(pattern: Pattern, token_ids: list[np.ndarray], bytes_of: TokenBytes) -> list[np.ndarray]:
    """The pattern's levels, float32, on windows that stand alone."""
    if not token_ids:
        return []
    sizes = [len(ids) for ids in token_ids]
    spelling = Spelling.of(np.concatenate(token_ids), np.repeat(np.arange(len(sizes)), sizes), bytes_of)
    return np.split(pattern.level(spelling), np.cumsum(sizes)[:-1])
