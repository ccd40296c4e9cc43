"""The same feature in another run: best match by activations on the same tokens, and by what both do to the output.

Axes: n tokens, A and B features of the two dictionaries, S features of A that are matched, D neurons, K active features
per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.analysis.alike import Alike, LogitLikeness, by_decoder
from fastsae.analysis.checkpoint import Arrays, Part
from fastsae.analysis.cross import (
    Best,
    FeatureCross,
    FeatureSums,
    NeuronCross,
    entries,
    joined,
    load_joined,
    rows_of,
    sample_of,
    selected,
)
from fastsae.analysis.logit_map import ContextSample, logit_map, unembedding
from fastsae.analysis.matches import SHUFFLED, TRAINED, Match, MatchConfig
from fastsae.analysis.parts import Parted
from fastsae.analysis.reading import pass_file, read_into
from fastsae.analysis.stream import Read, Source, check_rank
from fastsae.analysis.text import scoring_half
from fastsae.errors import FastSAEError, MissingDependencyError
from fastsae.harvest import check_options


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
    out: str | Path | None = None,
    resume: bool = False,
    show_progress: bool = True,
    **options: Any,
) -> Match:
    """Looks for each feature of A among the features of B, in one pass over the documents.

    a, b: two dictionaries with the model and the module each reads: of another seed, width, layer or model, as long as
    the models share the tokenizer; a model that both share runs once. control: a dictionary trained on a shuffled model
    with that model; without one, and unless config.shuffled_control is False, B's dictionary reads shuffled(b.model).
    out: a folder for match.json; while the pass runs, match.pass.npz is kept there, once a minute and on Ctrl-C.
    resume: go on from such a file; the result is the same, bit for bit. A part of the text each by several processes:
    `read_match`.

    Memory: 16 · S · B bytes of sums, as much again for the control (see MatchConfig.memory), 16 · D² for the neurons of
    two models, and a batch. Time beside the models': the pairs of features that are active on the same token.
    Raises FastSAEError: what `read` raises; less text than two documents; a model without an unembedding, unless
    logit_contexts is 0; a file of an unfinished pass without resume, or of another pass.
    """
    found = read_match(
        a, b, tokenizer, documents, config, control=control, out=out, resume=resume, show_progress=show_progress,
        **options,
    ).result()  # fmt: skip
    if out is not None:
        found.save(Path(out) / "match.json")
        pass_file(out, "match").unlink(missing_ok=True)
    return found


def read_match(
    a: Source,
    b: Source,
    tokenizer: Any,
    documents: Sequence[Any],
    config: MatchConfig | None = None,
    *,
    control: Source | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    rank: int = 0,
    world: int = 1,
    show_progress: bool = True,
    **options: Any,
) -> Matching:
    """The pass of `match` by one of several processes, over every world-th context; the sums, to merge.

        part = read_match(a, b, tokenizer, documents, rank=rank, world=4, out="both")  # in each of 4 processes
        # when all are done, in one:
        parts = [read_match(a, b, tokenizer, documents, rank=r, world=4, out="both", resume=True) for r in range(4)]
        whole = parts[0]
        for part in parts[1:]:
            whole.merge(part)
        whole.result().save("both/match.json")

    out: every rank keeps its sums there (see reading.pass_file), also when it is done: with resume they are taken up
    and nothing is read again. The merged result is that of one process but for the order in which floats are added.
    Raises as `match`; a rank that is not from 0 to world − 1.
    """
    config = replace(config or MatchConfig(), **check_options(MatchConfig, options))
    check_rank(rank, world)
    _require_scipy()
    if len(documents) < 2:
        raise FastSAEError(f"expected at least 2 documents, half of them to score on, got {len(documents)}")
    kind = TRAINED
    if control is None and config.shuffled_control:
        control, kind = Source(b.sae, shuffled(b.model, config.seed), b.hook), SHUFFLED
    sources = (a, b) if control is None else (a, b, control)
    matching = Matching(a, b, control, scoring_half(documents), config, kind)
    read_into(
        matching, sources, tokenizer, documents, config, "match", out=out, resume=resume, rank=rank, world=world,
        show_progress=show_progress,
    )  # fmt: skip
    return matching


def _require_scipy() -> None:
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise MissingDependencyError("match needs scipy: pip install 'fastsae[all]'") from None


class Matching(Parted):
    """The sums of one comparison: `add` every Read of (a, b[, control]), `merge` those of other tokens, then `result`.

    scoring: for each document whether it is in the half on which a match is scored, else chosen. control_kind: what the
    result is to call the control. of, parts: as of a Survey; missing() tells which ranks are not in.
    """

    def __init__(
        self, a: Source, b: Source, control: Source | None, scoring: Sequence[bool], config: MatchConfig,
        control_kind: str = TRAINED,
    ) -> None:  # fmt: skip
        super().__init__()
        self.a, self.b, self.control, self.config = a, b, control, config
        self.control_kind = None if control is None else control_kind
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
        for source in (a, b, control) if config.logit_contexts else ():
            if source is not None:
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

    def _sums_by_name(self) -> Mapping[str, Part]:
        parts: dict[str, Part] = {f"sums{half}": sums for half, sums in enumerate(self._sums)}
        parts |= {f"cross{i}": cross for i, cross in enumerate(self._crosses)} | {"contexts": self._contexts}
        return parts if self._neurons is None else parts | {"neurons": self._neurons}

    def arrays(self) -> Arrays:
        """The whole state, to be saved."""
        return joined(self._sums_by_name()) | self._parted_arrays()

    def load(self, arrays: Arrays) -> None:
        """What `arrays` gave to a Matching of the same."""
        load_joined(self._sums_by_name(), arrays)
        self._load_parted(arrays)

    def merge(self, other: Matching) -> None:
        """Takes in the sums of other tokens.

        Raises FastSAEError for a comparison of something else, or of a part of the text that is in already.
        """
        mine, theirs = (
            (m.config, m.features.tolist(), sorted(m._sums_by_name()), [c.xy.shape for c in m._crosses])
            for m in (self, other)
        )
        if mine != theirs:
            raise FastSAEError("comparisons to merge must be of the same dictionaries with the same configuration")
        self._join(other, "comparisons", empty=not sum(sums.n for sums in self._sums))
        for sums, more in zip(self._sums, other._sums, strict=True):
            sums.merge(more)
        for cross, more in zip(self._crosses, other._crosses, strict=True):
            cross.merge(more)
        self._contexts.merge(other._contexts)
        if self._neurons is not None and other._neurons is not None:
            self._neurons.merge(other._neurons)

    def result(self, partial: bool = False) -> Match:
        """The matches. Raises FastSAEError where ranks are missing, unless partial: of what is in."""
        if not partial:
            self._check_whole("the sums of a match")
        sums, least = self._sums[0] + self._sums[1], self.config.min_fires
        live = (sums.fires >= least).cpu()
        best = _only(live, self._crosses[0].best(self._sums, least))
        control = None if self.control is None else _only(live, self._crosses[1].best(self._sums, least))
        neurons = None if self._neurons is None else self._neurons.best()
        return Match(
            tokens=sums.n,
            min_fires=least,
            sampled=len(self.features) < self.a.sae.cfg.d_sae,
            features=self.features,
            fires=sums.fires.long().cpu(),
            best=best.partner,
            pearson=best.r,
            held_out=best.held_out,
            control_kind=self.control_kind,
            control=None if control is None else control.r,
            control_held_out=None if control is None else control.held_out,
            neurons=None if neurons is None else neurons.r,
            neurons_held_out=None if neurons is None else neurons.held_out,
            **{
                "assigned": None, "assigned_pearson": None, "logit_pearson": None, "decoder_cosine": None,
                **self._assigned(live), **self._decoders(best), **self._logits(best, control, neurons),
            },
        )  # fmt: skip

    def _assigned(self, live: Tensor) -> dict[str, Tensor]:
        """The one-to-one assignment over all tokens, and r on one half of what is assigned on the other."""
        cross, least = self._crosses[0], self.config.min_fires
        if max(cross.xy.shape[1:]) > self.config.assign_up_to:
            return {}
        candidates = cross.candidates(least)

        def assign(half: int | None) -> Tensor:
            table = torch.cat([r.float().cpu() for _, r in cross.pearsons(self._sums, least, half)])
            return _assign(table, live, candidates)

        partner, chosen = assign(None), assign(0)
        both = self._sums[0].varies.cpu() & self._sums[1].varies.cpu()
        return {
            "assigned": partner,
            "assigned_pearson": cross.of(partner, self._sums),
            "assigned_held_out": cross.of(chosen, self._sums, 1).masked_fill(~both, torch.nan),
        }

    def _decoders(self, best: Best) -> dict[str, Tensor]:
        if self.a.sae.cfg.d_in != self.b.sae.cfg.d_in:
            return {}
        pairs = by_decoder(self.a.sae, self.features, self.b.sae)
        partner, value = _nearest(pairs, best.partner >= 0, self._crosses[0].candidates(self.config.min_fires))
        return {
            "decoder_cosine": pairs.of(best.partner), "best_by_decoder": partner, "best_decoder_cosine": value
        }  # fmt: skip

    def _logits(self, best: Best, control: Best | None, neurons: Best | None) -> dict[str, Tensor]:
        """Pearson of logit weights with the partner that activations chose, and the largest, by fields of a Match."""
        ids, mask = self._contexts.contexts()
        if not len(ids):
            return {}
        of_a = logit_map(self.a.model, self.a.hook, ids, mask)
        of_b = of_a if self._neurons is None else logit_map(self.b.model, self.b.hook, ids, mask)
        x = self.a.sae.W_dec[self.features.to(self.a.sae.device)]
        least, like = self.config.min_fires, LogitLikeness(of_a, of_b)
        pairs = like.of(x, _decoder_rows(self.b))
        found = {"logit_pearson": pairs.of(best.partner)}
        found["best_by_logits"], found["best_logit_pearson"] = _nearest(
            pairs, best.partner >= 0, self._crosses[0].candidates(least)
        )
        if self._neurons is not None and neurons is not None:
            D, others = self.a.sae.cfg.d_in, self.b.sae.cfg.d_in
            pairs = like.of(torch.eye(D), lambda numbers: torch.nn.functional.one_hot(numbers, others))
            found["neurons_logit_pearson"] = pairs.of(neurons.partner)
            _, found["neurons_best_logit_pearson"] = _nearest(pairs, neurons.partner >= 0, self._neurons.candidates())
        if self.control is not None and control is not None:
            of_control = logit_map(self.control.model, self.control.hook, ids, mask)
            pairs = LogitLikeness(of_a, of_control).of(x, _decoder_rows(self.control))
            found["control_logit_pearson"] = pairs.of(control.partner)
            _, found["control_best_logit_pearson"] = _nearest(
                pairs, control.partner >= 0, self._crosses[1].candidates(least)
            )
        return found


def _only(live: Tensor, best: Best) -> Best:
    return Best(best.partner.masked_fill(~live, -1), *(r.masked_fill(~live, torch.nan) for r in best[1:]))


def _nearest(pairs: Alike, rows: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """pairs.best of these rows (mask) alone; −1 and NaN elsewhere."""
    partner, value = pairs.best(candidates)
    return partner.masked_fill(~rows, -1), value.masked_fill(~rows, torch.nan)


def _decoder_rows(source: Source) -> Callable[[Tensor], Tensor]:
    rows = source.sae.W_dec
    return lambda numbers: rows[numbers.to(rows.device)]


def _assign(r: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Partners [S], one to one, of the rows among the columns (masks) of r [S, B], largest sum of r; else −1."""
    from scipy.optimize import linear_sum_assignment

    left, right = rows.nonzero().flatten(), columns.nonzero().flatten()
    partner = torch.full((len(r),), -1)
    i, j = (torch.as_tensor(part) for part in linear_sum_assignment(r[left][:, right].numpy(), maximize=True))
    partner[left[i]] = right[j]
    return partner
