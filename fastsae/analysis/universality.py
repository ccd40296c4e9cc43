"""The same feature in another run: best match by activations on the same tokens, and by what both do to the output.

Axes: n tokens, A and B features of the two dictionaries, S features of A that are matched, D neurons, K active features
per token.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.analysis.cross import (
    FeatureCross,
    FeatureSums,
    NeuronCross,
    entries,
    rows_of,
    sample_of,
    selected,
)
from fastsae.analysis.logit_map import ContextSample, logit_map, unembedding
from fastsae.analysis.stream import Read, Source, read, watched
from fastsae.analysis.text import scoring_half
from fastsae.errors import FastSAEError, MissingDependencyError
from fastsae.files import write_json
from fastsae.harvest import check_options


@dataclass(frozen=True)
class MatchConfig:
    """How to compare two runs. Raises FastSAEError for values that cannot be meant."""

    tokens: int | None = None
    """Held-out tokens to read; default: all."""
    context: int = 128
    """Tokens in a context, the begin-of-text token included."""
    batch_size: int = 32
    """Contexts in a forward pass."""
    min_fires: int = 10
    """A feature that is active on fewer tokens than this is neither matched nor a match: chance alone would do."""
    memory: float = 2.0
    """GiB for the sums of products, 8 bytes for every pair of features, half of the text and control. Where all pairs
    do not fit, a sample of the first dictionary's features is matched, drawn by the seed."""
    shuffled_control: bool = True
    """Run the second dictionary also on its model with the weights shuffled within each matrix."""
    logit_contexts: int = 8
    """Contexts on which logit weights are taken; 0 leaves them out."""
    assign_up_to: int = 8192
    """Features up to which the one-to-one assignment is made: its time grows with the cube."""
    seed: int = 0
    """Seeds the sample of features, the contexts and the shuffled weights."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise FastSAEError(f"tokens must be at least 1, got {self.tokens}; leave it out to read all")
        for name, least in (("context", 2), ("batch_size", 1), ("min_fires", 1), ("logit_contexts", 0)):
            if getattr(self, name) < least:
                raise FastSAEError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.memory > 0:
            raise FastSAEError(f"memory must be more than 0 GiB, got {self.memory}")


@dataclass(frozen=True, eq=False)
class Match:
    """Features of A with their likeness in B, one entry per feature in `features` [S], ascending.

    tokens: n. sampled: whether `features` is a sample, all pairs having been too many for the memory. fires: [S],
    tokens on which each is active; live: [S] bool, at least min_fires of them. What follows is NaN (−1 for numbers of
    features) where a feature is not live.

    best, pearson: the feature of B with the largest Pearson's r of activations over all tokens, and that r: the
    paper's measure. A maximum over B features, so partly luck; held_out: r on one half of the documents with the
    feature that is best on the other half. assigned, assigned_pearson: partner and r in the one-to-one assignment with
    the largest sum of r (Hungarian method), −1 for those that are left over; None where it was not made.
    logit_pearson: Pearson's r over the vocabulary of the logit weights of the feature and of its best match; None
    without logit weights. decoder_cosine: cosine of the two decoder rows; None where the widths differ. It says
    something only where both dictionaries read the same module of the same model.

    control, control_held_out: as pearson and held_out, with the control in the place of B; None without one. neurons,
    neurons_held_out: [D], the same for the coordinates of the module that A reads against those that B reads; None
    where that is the same module of the same model, for each would match itself.
    """

    tokens: int
    min_fires: int
    sampled: bool
    features: Tensor
    fires: Tensor
    best: Tensor
    pearson: Tensor
    held_out: Tensor
    assigned: Tensor | None
    assigned_pearson: Tensor | None
    logit_pearson: Tensor | None
    decoder_cosine: Tensor | None
    control: Tensor | None
    control_held_out: Tensor | None
    neurons: Tensor | None
    neurons_held_out: Tensor | None

    @property
    def live(self) -> Tensor:
        return self.fires >= self.min_fires

    def medians(self) -> dict[str, float | None]:
        """Over live features (neurons: over all that vary), by the name of the measure; None where there is none."""
        names = ("pearson", "held_out", "assigned_pearson", "logit_pearson", "decoder_cosine")
        names += ("control", "control_held_out", "neurons", "neurons_held_out")
        return {name: _median(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; numbers that are not finite become None."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {**values, "live": int(self.live.sum()), "medians": self.medians()}

    def save(self, path: str | Path) -> None:
        """Writes to_dict() as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Match:
        """What save wrote. Raises FastSAEError for another file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{f.name: _tensor(f.name, values[f.name]) for f in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            raise FastSAEError(f"expected a file that `fastsae match` wrote, got {path}: run match again") from None


_NUMBERS = ("features", "fires", "best", "assigned")  # columns of whole numbers


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return [None if x != x else x for x in value.tolist()]


def _tensor(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if name in _NUMBERS:
        return torch.tensor(value, dtype=torch.int64)
    return torch.tensor([float("nan") if x is None else x for x in value], dtype=torch.float64)


def _median(values: Tensor | None) -> float | None:
    """Of the finite values, the mean of the two middle ones where their number is even (as numpy's)."""
    values = values[values.isfinite()] if values is not None else None
    return float(values.double().quantile(0.5)) if values is not None and len(values) else None


def shuffled(model: Any, seed: int = 0) -> Any:
    """A copy of the model in which the entries of every weight matrix change places within it.

    Matrices are parameters of two axes and more, embeddings among them; biases and norms stay. Tied weights stay tied.
    Each matrix keeps its distribution of entries, so what is left of a score owes nothing to what the model learned.
    """
    control = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in control.parameters():  # each shared tensor comes once
            if parameter.ndim >= 2:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return control


def match(
    a: Source,
    b: Source,
    tokenizer: Any,
    documents: Sequence[Any],
    config: MatchConfig | None = None,
    *,
    control: Source | None = None,
    show_progress: bool = True,
    **options: Any,
) -> Match:
    """Looks for each feature of A among the features of B, in one pass over the documents.

    a, b: two dictionaries with the model and the module each reads: of another seed, width, layer or model, as long as
    the models share the tokenizer; a model that both share runs once. control: a dictionary trained on a shuffled model
    with that model; without one, and unless config.shuffled_control is False, B's dictionary reads shuffled(b.model).

    Memory: 16 · S · B bytes of sums, as much again for the control (see MatchConfig.memory), 16 · D² for the neurons of
    two models, and a batch. Time beside
    the models': the pairs of features that are active on the same token.
    Raises FastSAEError: what `read` raises; less text than two documents; a model without an unembedding, unless
    logit_contexts is 0.
    """
    config = replace(config or MatchConfig(), **check_options(MatchConfig, options))
    _require_scipy()
    if len(documents) < 2:
        raise FastSAEError(f"expected at least 2 documents, half of them to score on, got {len(documents)}")
    if control is None and config.shuffled_control:
        control = Source(b.sae, shuffled(b.model, config.seed), b.hook)
    sources = (a, b) if control is None else (a, b, control)
    matching = Matching(a, b, control, scoring_half(documents), config)
    stream = read(
        sources, tokenizer, documents, context=config.context, batch_size=config.batch_size, max_tokens=config.tokens
    )
    for some in watched(stream, "match", documents, config.tokens, show_progress):
        matching.add(some)
    return matching.result()


def _require_scipy() -> None:
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise MissingDependencyError("match needs scipy: pip install 'fastsae[all]'") from None


class Matching:
    """The sums of one comparison: `add` every Read of (a, b[, control]), then `result`.

    scoring: for each document whether it is in the half on which a match is scored, else chosen.
    """

    def __init__(
        self, a: Source, b: Source, control: Source | None, scoring: Sequence[bool], config: MatchConfig
    ) -> None:
        self.a, self.b, self.control, self.config = a, b, control, config
        self._scoring = torch.tensor(list(scoring), dtype=torch.bool)
        size, device = a.sae.cfg.d_sae, a.sae.device
        others = [source.sae.cfg.d_sae for source in (b, control) if source is not None]
        self.features = sample_of(size, 16 * sum(others), config.memory, config.seed)
        self._row = rows_of(self.features, size).to(device)
        self._sums = [FeatureSums(len(self.features), device) for _ in range(2)]
        self._crosses = [FeatureCross(len(self.features), other, device) for other in others]
        same = a.model is b.model and a.hook == b.hook
        self._neurons = None if same else NeuronCross(a.sae.cfg.d_in, b.sae.cfg.d_in, device)
        self._contexts = ContextSample(config.logit_contexts, config.seed)
        for source in (a, b) if config.logit_contexts else ():
            unembedding(source.model)  # a model without one is told before its hours of text, not after

    def add(self, some: Read) -> None:
        scoring = self._scoring[some.documents]
        if self.config.logit_contexts and some.context_ids is not None and some.grid is not None:
            self._contexts.add(some.context_ids, some.grid)
        for half in range(2):
            rows = (scoring == bool(half)).nonzero().flatten()
            if not len(rows):
                continue
            device = self.a.sae.device
            kept = selected(entries(some.codes[0], device, rows), self._row)
            self._sums[half].add(kept)
            for cross, code in zip(self._crosses, some.codes[1:], strict=True):
                cross.add(half, kept, entries(code, device, rows))
            if self._neurons is not None:
                x, y = (each[rows.to(each.device)] for each in some.xs[:2])
                self._neurons.add(half, x, y)

    def result(self) -> Match:
        sums, least = self._sums[0] + self._sums[1], self.config.min_fires
        dead = (sums.fires < least).cpu()
        shape = self._crosses[0].xy.shape[1:]
        table = torch.zeros(shape) if max(shape) <= self.config.assign_up_to else None
        best, r, held_out = self._crosses[0].best(self._sums, least, table)
        candidates = (self._crosses[0].sums[0].fires + self._crosses[0].sums[1].fires >= least).cpu()
        assigned = assigned_r = control = control_held_out = None
        if table is not None:
            assigned, assigned_r = _assign(table, ~dead, candidates)
        if self.control is not None:
            _, control, control_held_out = self._crosses[1].best(self._sums, least)
        neurons, neurons_held_out = (None, None) if self._neurons is None else self._neurons.best()
        best = best.masked_fill(dead | ~candidates.any(), -1)

        def alive(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.double().masked_fill(dead, torch.nan)

        return Match(
            tokens=sums.n,
            min_fires=least,
            sampled=len(self.features) < self.a.sae.cfg.d_sae,
            features=self.features,
            fires=sums.fires.long().cpu(),
            best=best,
            pearson=r.double().masked_fill(best < 0, torch.nan),
            held_out=held_out.double().masked_fill(best < 0, torch.nan),
            assigned=assigned,
            assigned_pearson=assigned_r,
            logit_pearson=self._logit_pearson(best),
            decoder_cosine=self._decoder_cosine(best),
            control=alive(control),
            control_held_out=alive(control_held_out),
            neurons=neurons,
            neurons_held_out=neurons_held_out,
        )

    def _pairs(self, best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(places in `features`, features of A, features of B) of what has a match."""
        places = (best >= 0).nonzero().flatten()
        return places, self.features[places], best[places]

    def _logit_pearson(self, best: Tensor) -> Tensor | None:
        ids, mask = self._contexts.contexts()
        if not len(ids):
            return None
        places, left, right = self._pairs(best)
        found = torch.full((len(best),), torch.nan, dtype=torch.float64)
        of_a = logit_map(self.a.model, self.a.hook, ids, mask)
        of_b = of_a if self._neurons is None else logit_map(self.b.model, self.b.hook, ids, mask)
        for rows in torch.arange(len(places)).split(256):  # [256, V] of each, and never [S, V]
            x = of_a.of_features(self.a.sae, left[rows]).cpu().double()
            y = of_b.of_features(self.b.sae, right[rows]).cpu().double()
            V = min(x.shape[1], y.shape[1])  # models of one tokenizer may pad the vocabulary differently
            found[places[rows]] = _row_pearson(x[:, :V], y[:, :V])
        return found

    def _decoder_cosine(self, best: Tensor) -> Tensor | None:
        if self.a.sae.cfg.d_in != self.b.sae.cfg.d_in:
            return None
        places, left, right = self._pairs(best)
        found = torch.full((len(best),), torch.nan, dtype=torch.float64)
        rows = [s.sae.W_dec.detach().cpu()[n].double() for s, n in ((self.a, left), (self.b, right))]
        found[places] = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=1)
        return found


def _row_pearson(x: Tensor, y: Tensor) -> Tensor:
    """r of every row of x [M, V] with the same row of y, NaN where one is constant."""
    x, y = (part - part.mean(1, keepdim=True) for part in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))


def _assign(r: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Partners, one to one, of the rows among the columns (masks) of r [S, B], largest sum of r; and their r: [S]."""
    from scipy.optimize import linear_sum_assignment

    left, right = rows.nonzero().flatten(), columns.nonzero().flatten()
    partner, value = torch.full((len(r),), -1), torch.full((len(r),), torch.nan, dtype=torch.float64)
    i, j = (torch.as_tensor(part) for part in linear_sum_assignment(r[left][:, right].numpy(), maximize=True))
    partner[left[i]] = right[j]
    value[left[i]] = r[left[i], right[j]].double()
    return partner, value
