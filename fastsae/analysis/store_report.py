"""A site from a store: every feature of a dictionary, read from activations that were harvested once.

    analyze_store(sae, "store", tokenizer, documents, "report")

Axes: F features, P categories.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsae.analysis.analyze import UNFINISHED, AnalyzeConfig
from fastsae.analysis.cards import Cards
from fastsae.analysis.evidence import CHOOSE, SCORE
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.logit_map import ContextSample, LogitMap, logit_map
from fastsae.analysis.pages import Pages
from fastsae.analysis.passes import survey_of_store
from fastsae.analysis.stream import Source, read
from fastsae.analysis.study import chosen_features, left_out, scores
from fastsae.analysis.survey import SurveyConfig
from fastsae.errors import FastSAEError
from fastsae.files import write_json
from fastsae.sae import SAE
from fastsae.store import ActivationStore

_LOGIT_DOCUMENTS, _LOGIT_CONTEXTS = 32, 8  # from which, and over how many of which, logit weights are averaged


def analyze_store(
    sae: SAE,
    store: ActivationStore | str | Path,
    tokenizer: Any,
    documents: Sequence[Any],
    out: str | Path,
    config: AnalyzeConfig | None = None,
    *,
    model: Any = None,
    first_document: int = 0,
    resume: bool = True,
    show_progress: bool = True,
) -> dict:
    """Writes a site of all features (out/index.html), out/results.json and out/survey.npz; returns the results.

    The model is not run over the text: what needs it (effects, text with features pinned, other runs) is left to
    `analyze`. documents, first_document: as for `survey_of_store`. model: for logit weights alone, of which a few
    contexts are enough. config: of AnalyzeConfig what has to do with reading and explaining. The dictionary may have
    been trained on this very store: features are chosen on one half of the documents and scored on the other all the
    same. resume: go on with a pass that was stopped.

    Raises FastSAEError: what survey_of_store raises; an unfinished analysis there of other things, or any, without
    resume.
    """
    store = ActivationStore(store) if isinstance(store, str | Path) else store
    config, out = config or AnalyzeConfig(), Path(out)
    hook = str(store.meta.get("hook") or "")
    if config.features:
        raise FastSAEError("features are shown in the report of a model: leave them out, every feature has a page here")
    out.mkdir(parents=True, exist_ok=True)
    how = SurveyConfig(
        categories=config.categories, tokens=config.tokens, batch_size=config.batch_size, seed=config.seed
    )
    survey = survey_of_store(
        sae, store, tokenizer, documents, how, first_document=first_document, out=out / UNFINISHED, resume=resume,
        show_progress=show_progress,
    )  # fmt: skip
    cards, bytes_of = Cards(survey), TokenBytes.of(tokenizer)
    pages = Pages(sae, hook, cards, bytes_of, config.seed, show_progress)
    chosen = chosen_features(cards)
    results = {
        **pages.sizes(),
        "of_store": True,
        "quality": {},
        "categories": [_row(cards, p, feature) for p, feature in chosen.items()],
        "left_out": left_out(cards),
        "features": [],
        "explain": pages.explained(
            {"features": survey}, list(chosen.values()), config.explain_features, config.explain_up_to
        ),
        "goals": [],
    }
    logits = None if model is None else _logits(Source(sae, model, hook), tokenizer, documents, config)
    survey.save(out / "survey.npz")
    write_json(out / "results.json", json.loads(json.dumps(results, default=float)))
    pages.write(out, results, logits=logits)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return results


def _row(cards: Cards, p: int, feature: int) -> dict:
    """The feature that was chosen for category p, scored on the other half, beside the best neuron chosen there too."""
    neuron = int(cards.neuron_pearson(CHOOSE)[:, p].argmax())
    r, of_neuron = float(cards.pearson(SCORE)[feature, p]), float(cards.neuron_pearson(SCORE)[neuron, p])
    return {
        "name": cards.survey.proxies[p], "base_rate": float(cards.base_rate(SCORE)[p]), "feature": feature,
        "pearson": r, "neuron": neuron, "neuron_pearson": of_neuron, "advantage": r - of_neuron,
        "density": float(cards.density()[feature]), "max": float(cards.maximum()[feature]),
        **scores(cards, feature, p),
    }  # fmt: skip


def _logits(source: Source, tokenizer: Any, documents: Sequence[Any], config: AnalyzeConfig) -> LogitMap | None:
    """None for a model without an unembedding."""
    sample = ContextSample(_LOGIT_CONTEXTS, config.seed)
    some = list(itertools.islice(documents, _LOGIT_DOCUMENTS))
    for part in read([source], tokenizer, some, context=config.context, batch_size=config.batch_size):
        assert part.context_ids is not None and part.grid is not None
        sample.add(part.context_ids, part.grid)
    try:
        return logit_map(source.model, source.hook, *sample.contexts())
    except FastSAEError:
        return None
