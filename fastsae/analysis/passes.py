"""The one pass over text, or over a store: a survey of every feature, which goes on where it was interrupted.

Axes: n tokens, F features, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fastsae.analysis.checkpoint import Arrays, Checkpoint, dictionary_digest, model_digest
from fastsae.analysis.neighbours import Filling
from fastsae.analysis.proxies import Proxy, proxies
from fastsae.analysis.stream import Read, Source, check_rank, read, read_store
from fastsae.analysis.survey import Survey, SurveyConfig
from fastsae.analysis.text import Text
from fastsae.contexts import documents_digest
from fastsae.errors import FastSAEError
from fastsae.harvest import check_options
from fastsae.interrupt import uninterrupted
from fastsae.progress import Meter, progress
from fastsae.sae import SAE
from fastsae.store import ActivationStore

PASS, ALSO = "pass.npz", "also.npz"  # an unfinished pass; what was given as `also`, of a finished one


class Watcher(Protocol):
    """What is shown every Read of a pass, and kept with it: arrays() is its whole state, load() puts that back."""

    def add(self, some: Read) -> None: ...

    def arrays(self) -> Arrays: ...

    def load(self, arrays: Arrays) -> None: ...


def take_survey(
    sources: Source | Sequence[Source],
    tokenizer: Any,
    documents: Sequence[Any],
    config: SurveyConfig | None = None,
    *,
    more_proxies: Sequence[Proxy] = (),
    beside: Sequence[Source] = (),
    watch: Callable[[Read], None] | None = None,
    also: Mapping[str, Watcher] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    rank: int = 0,
    world: int = 1,
    text: Text | None = None,
    show_progress: bool = True,
    **options: Any,
) -> list[Survey]:
    """Reads the documents once with models that run now; a survey for every source.

    config, or its fields as options: see SurveyConfig. more_proxies: beside config.categories, such as a `Function`.
    beside: further dictionaries that are read but not surveyed. watch: called with every Read, of the sources and those
    beside, in this order; it keeps what it learns to itself, so a pass with one cannot go on. also: the same for
    objects with add(Read), by name, whose arrays() are kept beside the surveys and given to load(arrays) when the pass
    goes on.

    out: folder of this pass, and with ranks of this rank. survey-0.npz, … are written there at the end, what is in
    `also` to also.npz; every minute and at Ctrl-C all of it to pass.npz, one file, with digests of what it belongs to.
    resume: go on from there, or take the finished surveys; the result is that of an undisturbed pass, bit for bit.
    rank, world: this process reads every world-th context; merge the surveys of all ranks afterwards. config.tokens
    counts the tokens that all ranks read together. text: of the same documents and proxies, if it is there already.

    Raises FastSAEError: what `read` raises; a folder that holds surveys, without resume; ones of another dictionary,
    model, text, rank or setting.
    """
    config = replace(config or SurveyConfig(), **check_options(SurveyConfig, options))
    sources = [sources] if isinstance(sources, Source) else list(sources)
    check_rank(rank, world)
    if not sources:
        raise FastSAEError("expected at least one dictionary with its model, got none")
    chosen = proxies([*config.categories, *more_proxies])
    names = tuple(proxy.name for proxy in chosen)
    text = text or Text(tokenizer, documents, chosen)
    if text.documents != len(documents) or tuple(proxy.name for proxy in text.proxies) != names:
        raise FastSAEError("the text must be of these documents with these proxies: make it anew, or leave it out")
    surveys = [Survey(s.sae.cfg.d_sae, s.sae.cfg.d_in, names, config) for s in sources]
    models = {id(s.model): model_digest(s.model) for s in [*sources, *beside]}
    of_text = {"documents": documents_digest(documents), "text": text.digest}
    each = [
        {"dictionary": dictionary_digest(s.sae), "model": models[id(s.model)], "hook": s.hook}
        for s in [*sources, *beside]
    ]
    for survey, of in zip(surveys, each, strict=False):
        survey.of, survey.parts = of | of_text, [(rank, world, 0, text.documents)]
    about = {name: [of[name] for of in each] for name in each[0]} | of_text | {"surveys": len(surveys)}
    running = Running(surveys, also, watch, out, resume, about)
    limit = min(len(text), config.tokens or len(text))
    with progress("analyze", max(limit // world, 1), "tokens", running.tokens, show_progress) as meter:
        if not running.finished:
            stream = read(
                [*sources, *beside], tokenizer, documents, context=config.context, batch_size=config.batch_size,
                max_tokens=config.tokens, start=running.batches, rank=rank, world=world,
            )  # fmt: skip
            running.run(stream, text, meter)
    return running.finish()


class _Kept:
    """A survey as a part of a checkpoint."""

    def __init__(self, survey: Survey) -> None:
        self.arrays, self.load = survey.arrays, survey.load_arrays


class Running:
    """A pass and its place on disk. finished: its surveys were there. batches: how many have been read.

    Raises FastSAEError where the folder holds something that this pass may not take or write over.
    """

    def __init__(
        self, surveys: list[Survey], also: Mapping[str, Watcher] | None, watch: Callable[[Read], None] | None,
        out: str | Path | None, resume: bool, about: dict[str, Any],
    ) -> None:  # fmt: skip
        self.surveys, self.finished, self.batches = surveys, False, 0
        self._also, self._watch, self._whole = dict(also or {}), watch, True
        if bad := [name for name in self._also if "/" in name]:
            raise FastSAEError(f"names in `also` must be without a slash, got {bad[0]!r}")
        self._watchers = {f"also/{name}": part for name, part in self._also.items()}
        self._parts = {f"survey-{i}": _Kept(survey) for i, survey in enumerate(surveys)} | self._watchers
        self._folder = None if out is None else Path(out)
        if self._folder is not None:
            self._files = [self._folder / f"survey-{i}.npz" for i in range(len(surveys))]
            rank, world, *covered = surveys[0].parts[0]
            asked = {**vars(surveys[0].config), "rank": rank, "world": world, "covered": covered}
            about = asked | {"proxies": surveys[0].proxies, "also": sorted(self._also)} | about  # names before digests
            self._place = Checkpoint(self._folder / PASS, about, self._folder)
            self._place_also = Checkpoint(self._folder / ALSO, about, self._folder)
            self._begin(resume)

    @property
    def tokens(self) -> int:
        """How many have been read."""
        return int(self.surveys[0].sums["tokens"].sum())

    def _begin(self, resume: bool) -> None:
        self.batches = self._place.resume(self._parts, resume)
        if not self.batches:
            self._take_finished(resume)
        if (self.batches or self.finished) and self._watch is not None:
            raise FastSAEError(
                f"{self._folder} holds a pass that goes on, of which watch would miss what has been read: give it as "
                f"also= with arrays() and load(), choose another folder, or remove {self._folder}"
            )

    def _take_finished(self, resume: bool) -> None:
        there = [file for file in [*self._files, self._place_also.path] if file.exists()]
        remedy = f"choose another folder, or remove {self._folder}"  # all of it: its files are those of one pass
        if not there:
            return
        if not resume:
            raise FastSAEError(f"{there[0]} exists: resume, {remedy}")
        wanted = [*self._files, *([self._place_also.path] if self._also else [])]
        if missing := [file.name for file in wanted if not file.exists()]:
            raise FastSAEError(f"{there[0]} is of another pass, which made no {missing[0]}: {remedy}")
        found = [Survey.load(file, remedy) for file in self._files]
        for mine, theirs in zip(self.surveys, found, strict=True):
            mine.check_like(theirs, remedy)
            if mine.parts != theirs.parts:
                raise FastSAEError(
                    f"the surveys in {self._folder} are of another part of the text, rank and world "
                    f"{[part[:2] for part in theirs.parts]}: give every rank a folder of its own, or remove "
                    f"{self._folder}"
                )
        self._place_also.resume(self._watchers, True)
        self.surveys, self.finished = found, True

    def run(self, stream: Iterator[Read], text: Text, meter: Meter) -> None:
        """Shows everyone the Reads; what was done is saved when it stops."""
        try:
            for some in stream:
                with uninterrupted():
                    self._whole = False
                    for which, survey in enumerate(self.surveys):
                        survey.add(some, text, which)
                    for part in self._also.values():
                        part.add(some)
                    if self._watch is not None:
                        self._watch(some)
                    self.batches, self._whole = some.number + 1, True
                    if self._folder is not None:
                        self._place.save_if_due(self._parts, self.batches)
                meter.advance(len(some.token_ids))
        except KeyboardInterrupt:
            self.save()
            raise

    def save(self) -> None:
        """Where the pass stands now, unless it was stopped in the middle of a batch."""
        if self._folder is not None and self.batches and self._whole:
            with uninterrupted():
                self._place.save(self._parts, self.batches)

    def finish(self) -> list[Survey]:
        """Writes the surveys, after which the unfinished pass is no longer needed."""
        if self._folder is not None and not self.finished:
            if self._also:
                self._place_also.save(self._watchers, self.batches)
            for survey, file in zip(self.surveys, self._files, strict=True):
                survey.save(file)
            self._place.remove()
        return self.surveys


def survey_of_store(
    sae: SAE,
    store: ActivationStore | str | Path,
    tokenizer: Any,
    documents: Sequence[Any],
    config: SurveyConfig | None = None,
    *,
    first_document: int = 0,
    more_proxies: Sequence[Proxy] = (),
    out: str | Path | None = None,
    resume: bool = False,
    rank: int = 0,
    world: int = 1,
    show_progress: bool = True,
    **options: Any,
) -> Survey:
    """Reads a store, or the one in a folder, instead of running a model.

    Its rows are in no order, so they are read twice: once for counts and for which examples stay, and then those near
    an example once more, for what features do around it (with around = 0 once). An example has the tokens of its
    document around it, of its context if the harvest was one with packing="cut"; those that were not harvested, or not
    read, are shown with activation 0. config.context is the harvest's.

    documents: those that were harvested, in the same order; or all of a text of which the store holds some, from number
    first_document on: surveys of such stores merge, as every feature's halves are those of the whole text.
    rank, world: this process surveys every world-th document, and reads all rows. out, resume, config.tokens (rows, the
    first in the reader's random order): as for `take_survey`. Memory beside the survey's: 4 N P bytes of scores, 16 for
    each example, 8 for each token that has one near.

    Raises FastSAEError: an SAE of another width; documents or a tokenizer that are not those of the store; what
    `take_survey` raises of out.
    """
    store = ActivationStore(store) if isinstance(store, str | Path) else store
    config = replace(config or SurveyConfig(), **check_options(SurveyConfig, options))
    config = replace(config, context=store.meta.get("context", config.context))
    check_rank(rank, world)
    chosen = proxies([*config.categories, *more_proxies])
    stretch = None
    if store.meta.get("packing") == "cut":
        stretch = config.context - (bool(store.meta.get("bos")) and tokenizer.bos_token_id is not None)
    text = Text(tokenizer, documents, chosen, keep_scores=True, stretch=stretch)
    low, high = (first_document + number for number in store.document_range())
    if not 0 <= low <= high <= text.documents:
        raise FastSAEError(
            f"the store has documents {low} to {high - 1}, and {text.documents} were given: give all that were "
            "harvested, and first_document, the number of the store's first among them"
        )
    survey = Survey(sae.cfg.d_sae, sae.cfg.d_in, tuple(proxy.name for proxy in chosen), config)
    survey.of = {"dictionary": dictionary_digest(sae), "model": store.meta.get("model"), "hook": store.meta.get("hook")}
    survey.of |= {"documents": documents_digest(documents), "text": text.digest, "rows": "in random order"}
    survey.parts = [(rank, world, low, high)]
    running = Running([survey], None, None, out, resume, survey.of | {"store": store.identity})
    if running.finished:
        return running.surveys[0]
    limit = min(store.count, config.tokens or store.count)

    def rows(**more: Any) -> Iterator[Read]:
        for some in read_store([sae], store, max_tokens=config.tokens, rank=rank, world=world, **more):
            some = some._replace(documents=some.documents + first_document)
            _same_text(text, some.token_ids, some.documents, some.positions)
            yield some

    with progress("analyze", max(limit // world, 1), "tokens", running.tokens, show_progress) as meter:
        running.run(rows(start=running.batches), text, meter)
    if config.around:
        with progress("examples", None, "tokens", show=show_progress) as meter:
            try:
                filling = Filling(survey, text, first_document)
                for some in rows(wanted=filling.wanted):
                    filling.add(some)
                    meter.advance(len(some.token_ids))
                filling.finish()
            except KeyboardInterrupt:  # what it has written already it would write again
                running.save()
                raise
    return running.finish()[0]


def _same_text(text: Text, token_ids: torch.Tensor, documents: torch.Tensor, positions: torch.Tensor) -> None:
    """Raises FastSAEError where a store's tokens are not those of the text."""
    numbers = documents.numpy()
    if len(numbers) and numbers.max() < text.documents:
        where = text.first[numbers] + positions.numpy()
        if (where < text.first[numbers + 1]).all() and (text.ids[where] == token_ids.numpy()).all():
            return
    raise FastSAEError(
        "the store's tokens are not those of these documents with this tokenizer: give the text and the tokenizer that "
        "were harvested"
    )
