"""The one pass over text, or over a store: a survey of every feature, which goes on where it was interrupted.

Axes: n tokens, F features, D neurons.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsae.analysis.proxies import Proxy, proxies
from fastsae.analysis.stream import Read, Source, read, read_store
from fastsae.analysis.survey import Survey, SurveyConfig
from fastsae.analysis.text import Text
from fastsae.errors import FastSAEError
from fastsae.harvest import check_options
from fastsae.progress import progress
from fastsae.sae import SAE
from fastsae.store import ActivationStore

CHECKPOINT_SECONDS = 60.0


def take_survey(
    sources: Source | Sequence[Source],
    tokenizer: Any,
    documents: Sequence[Any],
    config: SurveyConfig | None = None,
    *,
    more_proxies: Sequence[Proxy] = (),
    beside: Sequence[Source] = (),
    watch: Callable[[Read], None] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    rank: int = 0,
    world: int = 1,
    text: Text | None = None,
    show_progress: bool = True,
    **options: Any,
) -> list[Survey]:
    """Reads the documents once with models that run now; a survey for every source.

    config, or its fields as options: see SurveyConfig. more_proxies: beside config.categories, such as a
    `proxies.Function`. beside: further dictionaries that are read but not surveyed. watch: called with every Read, of
    the sources and those beside, in this order. out: folder; survey-0.npz, … are written there every minute and at the
    end. resume: go on where the surveys in out stopped, or take the finished ones (what watch was shown before, it is
    not shown again). rank, world: this process reads every world-th context; merge the surveys of all ranks afterwards.
    text: of the same documents and proxies, if it is there already.

    Raises FastSAEError: what `read` raises; a folder that holds surveys, without resume; ones of something else.
    """
    config = replace(config or SurveyConfig(), **check_options(SurveyConfig, options))
    sources = [sources] if isinstance(sources, Source) else list(sources)
    chosen = proxies([*config.categories, *more_proxies])
    text = text or Text(tokenizer, documents, chosen)
    names = tuple(proxy.name for proxy in chosen)
    surveys = [Survey(s.sae.cfg.d_sae, s.sae.cfg.d_in, names, config) for s in sources]
    files = [] if out is None else [Path(out) / f"survey-{i}.npz" for i in range(len(sources))]
    if files and _begin(files, surveys, resume):
        surveys = [Survey.load(file) for file in files]
    limit = min(len(text), config.tokens or len(text))
    stream = read(
        [*sources, *beside], tokenizer, documents, context=config.context, batch_size=config.batch_size,
        max_tokens=config.tokens, start=surveys[0].batches, rank=rank, world=world,
    )  # fmt: skip
    done = int(surveys[0].sums["tokens"].sum())
    saved = time.monotonic()
    with progress("analyze", max(limit // world, 1), "tokens", done, show_progress) as meter:
        for some in stream:
            for which, survey in enumerate(surveys):
                survey.add(some, text, which)
            if watch is not None:
                watch(some)
            meter.advance(len(some.token_ids))
            if files and time.monotonic() - saved > CHECKPOINT_SECONDS:
                _save(surveys, files)
                saved = time.monotonic()
    if files:
        _save(surveys, files)
    return surveys


def _begin(files: list[Path], surveys: list[Survey], resume: bool) -> bool:
    """Whether there are surveys to go on with."""
    there = [file for file in files if file.exists()]
    if there and not resume:
        raise FastSAEError(f"{there[0]} exists: resume, or choose another folder")
    files[0].parent.mkdir(parents=True, exist_ok=True)
    if len(there) < len(files):
        return False
    found = [Survey.load(file) for file in files]
    for mine, theirs in zip(surveys, found, strict=True):
        mine.check_like(theirs)
    if len({survey.batches for survey in found}) > 1:  # cut off between two files: begin again
        for file in files:
            file.unlink()
        return False
    return True


def _save(surveys: list[Survey], files: list[Path]) -> None:
    for survey, file in zip(surveys, files, strict=True):
        survey.save(file)


def survey_of_store(
    sae: SAE,
    store: ActivationStore,
    tokenizer: Any,
    documents: Sequence[Any],
    config: SurveyConfig | None = None,
    *,
    more_proxies: Sequence[Proxy] = (),
    show_progress: bool = True,
    **options: Any,
) -> Survey:
    """Reads a store instead of running a model. Its rows are not in the order of the text, and hold only the tokens
    that were harvested, so an example is its token alone: all counts, correlations and histograms, and no contexts.

    documents: those that were harvested, in the same order.
    Raises FastSAEError: an SAE of another width; documents or a tokenizer that are not those of the store.
    """
    config = replace(config or SurveyConfig(), **check_options(SurveyConfig, options) | {"around": 0})
    chosen = proxies([*config.categories, *more_proxies])
    text = Text(tokenizer, documents, chosen, keep_scores=True)
    survey = Survey(sae.cfg.d_sae, sae.cfg.d_in, tuple(proxy.name for proxy in chosen), config)
    limit = min(store.count, config.tokens or store.count)
    with progress("analyze", limit, "tokens", show=show_progress) as meter:
        for some in read_store([sae], store, max_tokens=config.tokens):
            _same_text(text, some.token_ids, some.documents, some.positions)
            survey.add(some, text)
            meter.advance(len(some.token_ids))
    return survey


def _same_text(text: Text, token_ids: torch.Tensor, documents: torch.Tensor, positions: torch.Tensor) -> None:
    """Raises FastSAEError where a store's tokens are not those of the text."""
    numbers = documents.numpy()
    if len(numbers) and numbers.max() < text.documents:
        where = text.first[numbers] + positions.numpy()
        if (where < text.first[numbers + 1]).all() and np.array_equal(text.ids[where], token_ids.numpy()):
            return
    raise FastSAEError(
        "the store's tokens are not those of these documents with this tokenizer: give the text and the tokenizer that "
        "were harvested"
    )
