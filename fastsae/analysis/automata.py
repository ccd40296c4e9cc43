"""Features that follow one another: what a feature makes likely next, and which feature fires on that.

Bricken et al. 2023 read features as states of a finite-state automaton: a feature raises the logits of a token, that
token sets off another feature, and so on (HTML tags, names in capitals and underscores).

Of many pairs some follow one another by chance: transitions are chosen on one half of the documents, and what they are
worth is measured on the other.

Axes: n tokens, F features, S features that are states, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.analysis.cross import add_products, entries, fired, rows_of, sample_of, selected
from fastsae.analysis.evidence import CHOOSE, SCORE
from fastsae.analysis.logit_map import ContextSample, logit_map, unembedding
from fastsae.analysis.stream import Read, Source, check_features, read, watched
from fastsae.analysis.text import scoring_half
from fastsae.errors import FastSAEError
from fastsae.files import write_json
from fastsae.harvest import check_options


@dataclass(frozen=True)
class AutomataConfig:
    """What counts as a transition. Raises FastSAEError for values that cannot be meant."""

    tokens: int | None = None
    """Held-out tokens to read; default: all."""
    context: int = 128
    """Tokens in a context, the begin-of-text token included."""
    batch_size: int = 32
    """Contexts in a forward pass."""
    min_fires: int = 10
    """Features that are active on fewer tokens than this are no states."""
    min_pairs: int = 10
    """A transition needs j right behind i at least so often in the half of the documents where it is chosen."""
    min_excess: float = 0.1
    """… and P(j next | i now) − P(j) of at least this there, …"""
    min_logit: float = 0.5
    """and a mean logit weight of i on the tokens of j of at least so many standard deviations."""
    max_edges: int = 10
    """Transitions kept from a feature, the strongest."""
    logit_contexts: int = 8
    """Contexts on which logit weights are taken."""
    memory: float = 2.0
    """GiB for counts: 8 bytes for every pair of states, and for every state and token of the vocabulary. Where more
    features are live than fit, a sample is taken, drawn by the seed."""
    seed: int = 0
    """Seeds that sample and the contexts."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise FastSAEError(f"tokens must be at least 1, got {self.tokens}; leave it out to read all")
        for name, least in (
            ("context", 2),
            ("batch_size", 1),
            ("min_fires", 1),
            ("min_pairs", 1),
            ("max_edges", 1),
            ("logit_contexts", 1),
        ):
            if getattr(self, name) < least:
                raise FastSAEError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.memory > 0:
            raise FastSAEError(f"memory must be more than 0 GiB, got {self.memory}")


class Edge(NamedTuple):
    """A transition from `source` to `target`, numbers of features.

    pairs: how often target fires right behind source. probability: P(target fires on the next token | source fires on
    this one). excess: that less P(target fires), over tokens that have one before them. logit: the source's mean logit
    weight on the tokens on which the target fires, in standard deviations of its logit weights over the vocabulary.
    strength: excess · logit. token: the id that stands between them, the one with the largest part in logit. All of
    this is in-sample, of the half of the documents on which the transition was chosen; excess_held_out is of the other
    half, None where no token there follows one on which source fires.
    """

    source: int
    target: int
    probability: float
    excess: float
    logit: float
    strength: float
    token: int
    pairs: int
    excess_held_out: float | None


class Step(NamedTuple):
    """The paper's way on from a feature: `token`, its top logit token, with that logit weight; `target`, the feature
    that fires on that token, with `f1`: the harmonic mean of P(token | fires) and P(fires | token). None and 0 where
    the token does not occur or no state fires on it. The best of all states over all tokens, so in-sample."""

    token: int
    weight: float
    target: int | None
    f1: float


@dataclass(frozen=True, eq=False)
class Automaton:
    """The graph. features: [S] states; fires: [S] tokens on which each is active; edges: strongest first, by the half
    of the documents that chose them; steps: of every state. tokens: n. sampled: whether live features were left out for
    want of memory. min_excess: what transitions were chosen by."""

    tokens: int
    sampled: bool
    features: Tensor
    fires: Tensor
    edges: tuple[Edge, ...]
    steps: dict[int, Step]
    min_excess: float

    def held_out(self) -> dict[str, float]:
        """Over the transitions that the other half of the documents can tell of: median excess where they were chosen,
        and there, and the share that has min_excess there too. Empty where there are none."""
        both = [(e.excess, e.excess_held_out) for e in self.edges if e.excess_held_out is not None]
        if not both:
            return {}
        chosen, scored = torch.tensor(both, dtype=torch.float64).T
        return {
            "transitions": len(both), "excess": float(chosen.quantile(0.5)),
            "excess_held_out": float(scored.quantile(0.5)), "kept": float((scored >= self.min_excess).double().mean()),
        }  # fmt: skip

    def next(self, feature: int) -> list[Edge]:
        """Transitions from a feature, strongest first. Raises FastSAEError for one that is no state."""
        if feature not in self.steps:
            raise FastSAEError(
                f"feature {feature} is no state of this automaton: it is dead, rare or not among the "
                f"{len(self.steps)} sampled; take one of Automaton.features"
            )
        return [edge for edge in self.edges if edge.source == feature]

    def chains(self, start: int, length: int = 4, count: int = 10, width: int = 3) -> list[list[Edge]]:
        """Up to `count` paths of at most `length` transitions from a feature, by falling geometric mean of strength.

        From each state the `width` strongest transitions are followed. No path passes a state twice, but its last
        transition may lead back to one it has passed: a cycle. Paths that go on are given whole, not their beginnings.
        """
        self.next(start)
        out = self._by_source()
        found: list[list[Edge]] = []
        open_paths: list[list[Edge]] = [[edge] for edge in out.get(start, [])[:width]]
        while open_paths:
            path = open_paths.pop()
            passed = {start, *(edge.target for edge in path[:-1])}
            more = out.get(path[-1].target, [])[:width]
            if len(path) == length or path[-1].target in passed or not more:
                found.append(path)
            else:
                open_paths += [[*path, edge] for edge in more]
        return sorted(found, key=_mean_strength, reverse=True)[:count]

    def cycles(self, length: int = 4, width: int = 3) -> list[list[int]]:
        """Closed paths of up to `length` states, each once, beginning at its smallest number; a state that follows
        itself is a cycle of one. Strongest first; the `width` strongest transitions of each state are followed."""
        out = self._by_source()
        found: list[list[Edge]] = []
        for start in out:
            paths = [[edge] for edge in out[start][:width] if edge.target >= start]
            while paths:
                path = paths.pop()
                last = path[-1].target
                if last == start:
                    found.append(path)
                elif len(path) < length and last not in {edge.source for edge in path}:
                    paths += [[*path, edge] for edge in out.get(last, [])[:width] if edge.target >= start]
        return [[edge.source for edge in path] for path in sorted(found, key=_mean_strength, reverse=True)]

    def _by_source(self) -> dict[int, list[Edge]]:
        out: dict[int, list[Edge]] = {}
        for edge in self.edges:
            out.setdefault(edge.source, []).append(edge)
        return out

    def to_dict(self, cycle_length: int = 4, spelled: Callable[[int], str] | None = None) -> dict[str, Any]:
        """Ready for JSON: nodes with their steps, edges, held_out and cycles. spelled: token id → its text, to stand
        beside the ids."""

        def spelt(token: int) -> dict[str, str]:
            return {} if spelled is None or token < 0 else {"text": spelled(token)}

        return {
            "tokens": self.tokens,
            "sampled": self.sampled,
            "nodes": [
                {"feature": f, "fires": n, "step": self.steps[f]._asdict() | spelt(self.steps[f].token)}
                for f, n in zip(self.features.tolist(), self.fires.tolist(), strict=True)
            ],
            "edges": [edge._asdict() | spelt(edge.token) for edge in self.edges],
            "held_out": self.held_out(),
            "cycles": self.cycles(cycle_length),
        }

    def save(self, path: str | Path, spelled: Callable[[int], str] | None = None) -> None:
        """Writes to_dict() as JSON."""
        write_json(Path(path), self.to_dict(spelled=spelled))


def _mean_strength(path: Sequence[Edge]) -> float:
    product = 1.0
    for edge in path:
        product *= max(edge.strength, 0.0)
    return product ** (1 / len(path))


def automata(
    source: Source,
    tokenizer: Any,
    documents: Sequence[Any],
    config: AutomataConfig | None = None,
    *,
    features: Sequence[int] | None = None,
    show_progress: bool = True,
    **options: Any,
) -> Automaton:
    """Which feature follows which, on text, in one pass; and through which token.

    features: the states to look at; default: all that fire often enough, as many as the memory holds.
    Raises FastSAEError: what `read` raises, features that the dictionary does not have, a model without an unembedding.
    """
    config = replace(config or AutomataConfig(), **check_options(AutomataConfig, options))
    check_features(features or (), source.sae.cfg.d_sae)
    transitions = Transitions(source, len(tokenizer), scoring_half(documents), config, features)
    stream = read(
        [source], tokenizer, documents, context=config.context, batch_size=config.batch_size, max_tokens=config.tokens
    )
    for some in watched(stream, "automata", documents, config.tokens, show_progress):
        transitions.add(some)
    return transitions.result()


class Transitions:
    """The counts of one automaton: `add` every Read with the grid of its text, then `result`.

    scoring: for each document whether it is in the half on which transitions are scored, else chosen. Counts are int32,
    good for 2 · 10⁹ tokens: memory is 8 · S · (S + V) bytes, V being the vocabulary, and up to three times that for a
    moment in `result`. Only neighbours in one context count: both tokens kept, the later one right behind.
    """

    def __init__(
        self,
        source: Source,
        vocabulary: int,
        scoring: Sequence[bool],
        config: AutomataConfig,
        features: Sequence[int] | None = None,
    ) -> None:
        self.source, self.config = source, config
        self._scoring = torch.tensor(list(scoring), dtype=torch.bool)
        size, device = source.sae.cfg.d_sae, source.sae.device
        wanted = torch.arange(size) if features is None else torch.tensor(sorted(set(features)), dtype=torch.int64)
        row = 8 * (len(wanted) + vocabulary)
        self.states = wanted[sample_of(len(wanted), row, config.memory, config.seed)]
        self.sampled = len(self.states) < len(wanted)
        self._row = rows_of(self.states, size).to(device)
        S = len(self.states)
        self.n = 0

        def zeros(*shape: int) -> Tensor:  # of either half of the documents
            return torch.zeros(2, *shape, dtype=torch.int32, device=device)

        self.links = zeros()
        self.followed, self.preceded = zeros(S), zeros(S)  # fires with a token behind, with one before
        self.pairs, self.on_token, self.token_counts = zeros(S, S), zeros(S, vocabulary), zeros(vocabulary)
        self._contexts = ContextSample(config.logit_contexts, config.seed)
        unembedding(source.model)  # a model without one is told before its hours of text, not after

    def add(self, some: Read) -> None:
        if some.grid is None or some.context_ids is None:
            raise FastSAEError("automata need text in its order, a store has its rows shuffled: read the documents")
        self._contexts.add(some.context_ids, some.grid)
        self.n += len(some.token_ids)
        linked = (some.grid[:, :-1] >= 0) & (some.grid[:, 1:] >= 0)
        rows, now, then = torch.arange(len(some.token_ids)), some.grid[:, :-1][linked], some.grid[:, 1:][linked]
        scoring = self._scoring[some.documents]  # a context is of one document
        for half in (CHOOSE, SCORE):
            of_half = scoring == bool(half)
            self._add(half, some, rows[of_half], now[of_half[now]], then[of_half[now]])

    def _add(self, half: int, some: Read, rows: Tensor, now: Tensor, then: Tensor) -> None:
        """rows: tokens of one half; now, then: those of them that are neighbours."""
        device, V = self._row.device, self.on_token.shape[-1]
        here, first, second = (
            fired(selected(entries(some.codes[0], device, part), self._row)) for part in (rows, now, then)
        )
        token = some.token_ids[rows].to(device)
        self.token_counts[half] += torch.bincount(token, minlength=V)
        at = here.features * V + token.repeat_interleave(here.counts)
        self.on_token[half].view(-1).index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
        self.links[half] += len(now)
        self.followed[half] += torch.bincount(first.features, minlength=len(self.states))
        self.preceded[half] += torch.bincount(second.features, minlength=len(self.states))
        add_products(self.pairs[half], first, second)

    def result(self) -> Automaton:
        fires = self.on_token.sum((0, 2))
        live = (fires >= self.config.min_fires).nonzero().flatten()
        states = self.states[live.cpu()]
        model, hook = self.source.model, self.source.hook
        weights = logit_map(model, hook, *self._contexts.contexts()) if len(states) else None
        # P(token | j fires): [V, S], what the mean logit weight on the tokens of j is a product with
        on_token = self.on_token[CHOOSE, live].double()
        shares = (on_token / on_token.sum(1, keepdim=True).clamp(min=1)).T.cpu()
        on_token = self.on_token[:, live].sum(0).double().cpu()
        edges: list[Edge] = []
        steps: dict[int, Step] = {}
        for rows in torch.arange(len(states)).split(256):  # [256, V] logit weights at once
            assert weights is not None
            w = weights.of_features(self.source.sae, states[rows]).cpu().double()
            w = _of_vocabulary(w, len(shares))
            spread = w.std(1, keepdim=True).clamp(min=1e-12)
            edges += self._edges(rows, live, states, w / spread, shares)
            steps |= self._steps(rows, states, w, on_token)
        edges.sort(key=lambda edge: -edge.strength)
        return Automaton(
            self.n, self.sampled, states, fires[live].cpu(), tuple(edges), steps, self.config.min_excess
        )

    def _edges(self, rows: Tensor, live: Tensor, states: Tensor, w: Tensor, shares: Tensor) -> list[Edge]:
        """Of the states at `rows`; w: [rows, V], their logit weights in standard deviations; shares: [V, S]."""
        logit = w @ shares  # [rows, S]
        pairs = self.pairs[:, live[rows.to(live.device)]][:, :, live].cpu()  # [2, rows, S]
        followed = self.followed[:, live].cpu()[:, rows]
        probability = pairs / followed.clamp(min=1)[..., None].double()
        excess = probability - (self.preceded[:, live] / self.links.clamp(min=1)[:, None].double()).cpu()[:, None]
        how = self.config
        real = (pairs[CHOOSE] >= how.min_pairs) & (excess[CHOOSE] >= how.min_excess) & (logit >= how.min_logit)
        held_out = excess[SCORE].masked_fill((followed[SCORE] == 0)[:, None], torch.nan)
        probability, excess, pairs = probability[CHOOSE], excess[CHOOSE], pairs[CHOOSE]
        strength = torch.where(real, excess * logit, torch.zeros_like(excess))
        best = strength.topk(min(self.config.max_edges, strength.shape[1]), dim=1)
        found = []
        for i in range(len(rows)):
            for value, j in zip(best.values[i].tolist(), best.indices[i].tolist(), strict=True):
                if value > 0:
                    numbers = (float(probability[i, j]), float(excess[i, j]), float(logit[i, j]), value)
                    between, scored = int((w[i] * shares[:, j]).argmax()), float(held_out[i, j])
                    held = None if math.isnan(scored) else scored
                    found.append(Edge(int(states[rows[i]]), int(states[j]), *numbers, between, int(pairs[i, j]), held))
        return found

    def _steps(self, rows: Tensor, states: Tensor, w: Tensor, on_token: Tensor) -> dict[int, Step]:
        """The top logit token of the states at `rows` and the state that stands for that token best."""
        top = w.max(1)
        counts, fires = self.token_counts.sum(0).cpu()[top.indices], on_token.sum(1)
        f1 = 2 * on_token[:, top.indices] / (fires[:, None] + counts).clamp(min=1)  # [S, rows]
        best = f1.max(0)
        return {
            int(states[row]): Step(int(token), float(weight), int(states[j]) if value > 0 else None, float(value))
            for row, token, weight, j, value in zip(
                rows, top.indices, top.values, best.indices, best.values, strict=True
            )
        }


def _of_vocabulary(w: Tensor, size: int) -> Tensor:
    """Logit weights [M, V′] of a model that pads its vocabulary, or does not know all of it, as [M, size]."""
    if w.shape[1] >= size:
        return w[:, :size]
    return torch.cat([w, w.new_zeros(len(w), size - w.shape[1])], 1)
