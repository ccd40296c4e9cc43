"""Evidence of features for explainers, from surveys, and the whole way from a dictionary to scored explanations.

Axes: F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsae.analysis.cards import Cards
from fastsae.analysis.controls import Misplaced, neurons_as_features, random_features
from fastsae.analysis.examples import Evidence
from fastsae.analysis.explain import ExplainConfig, cache_in, explain_features, explainer_of
from fastsae.analysis.labels import TokenBytes, readable
from fastsae.analysis.logit_map import LogitMap, TopLogits, logit_map
from fastsae.analysis.passes import take_survey
from fastsae.analysis.stream import Source
from fastsae.analysis.survey import Survey, SurveyConfig
from fastsae.analysis.text import Text
from fastsae.errors import FastSAEError

CHOOSE, SCORE = 0, 1  # halves of the documents: explained from one, scored on the other
LEAST_FIRES = 50  # in either half, of a feature drawn to be explained
_LOGIT_CONTEXTS = 8


def live_features(survey: Survey, count: int, seed: int = 0, least: int = LEAST_FIRES) -> list[int]:
    """`count` features drawn at random from those that fire on enough tokens of both halves, or all of these; 0: none.

    Raises FastSAEError for a count below 0.
    """
    if count < 0:
        raise FastSAEError(f"count must be at least 0 features, got {count}")
    fires = np.minimum(*(survey.sums["fires"][half] for half in (CHOOSE, SCORE)))
    live = np.flatnonzero(fires >= least)
    return np.random.default_rng(seed).permutation(live)[:count].tolist()


def evidence_of(
    cards: Cards, features: Sequence[int], logits: TopLogits | None = None, bytes_of: TokenBytes | None = None
) -> list[tuple[Evidence, Evidence]]:
    """Of each feature what is shown to an explainer, and what it is scored on. logits: of all features."""
    pairs = []
    for f in features:
        named: dict[str, Any] = {}
        if logits is not None and bytes_of is not None:
            named = {
                name: [readable([bytes_of[int(i)]])[0] for i in ids[f]]
                for name, ids in (("top_logits", logits.top), ("bottom_logits", logits.bottom))
            }
        pairs.append((cards.evidence(f, CHOOSE, **named), cards.evidence(f, SCORE)))
    return pairs


def explain_dictionary(
    source: Source,
    tokenizer: Any,
    documents: Sequence[Any],
    features: Sequence[int] = (),
    config: ExplainConfig | None = None,
    survey_config: SurveyConfig | None = None,
    *,
    count: int = 50,
    controls: bool = False,
    control: Source | None = None,
    out: Path | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Reads the text, explains features from one half of the documents and scores the explanations on the other.

    features: their numbers; none: `count` of the live ones, drawn at random. controls: the same tokens are read once
    more, and as many live "neurons", "random directions" and "misplaced features" are explained by the same explainer.
    control: a dictionary trained on a model with shuffled weights (`universality.shuffled`) and that model, with the
    same tokenizer: a group "shuffled model". out: as for `explain_features`, whose result this returns; what is there
    is not done again.

    Raises FastSAEError for features that there are not, or that never fire on one half of the text, for a count below
    1, and what `explainer_of`, `take_survey` and `explain_features` raise.
    """
    if count < 1:
        raise FastSAEError(f"count must be at least 1 feature, got {count}")
    survey_config = survey_config or SurveyConfig(categories=())
    if bad := [f for f in features if not 0 <= f < source.sae.cfg.d_sae]:
        raise FastSAEError(f"features must be numbers from 0 to {source.sae.cfg.d_sae - 1}, got {bad[0]}")
    config = config or ExplainConfig()
    explainer = explainer_of(config, cache_in(out))  # what it lacks is told before the text is read
    text = Text(tokenizer, documents)

    def surveys(sources: Sequence[Source], how: SurveyConfig) -> list[Survey]:
        return take_survey(sources, tokenizer, documents, how, text=text, show_progress=show_progress)

    def pairs(survey: Survey, of: Source, features: Sequence[int]) -> list[tuple[Evidence, Evidence]]:
        logits = _top_logits(of, text, tokenizer, survey_config.context)
        return evidence_of(Cards(survey), features, logits, text.bytes_of)

    (survey,) = surveys([source], survey_config)
    chosen = list(features) or live_features(survey, count, config.seed)
    silent = [f for f in chosen if not survey.sums["fires"][:, f].all()]
    if silent or not chosen:
        which = f"feature {silent[0]} never fires on one half of it" if silent else "no feature fires often enough"
        raise FastSAEError(f"expected text on which the features fire, but {which}: give more text, or other features")
    groups = {"features": pairs(survey, source, chosen)}
    beside = control_sources(source, survey.l0(), config.seed) if controls else {}
    if control is not None:
        beside["shuffled model"] = control
    if beside:
        # Neurons are dense: none of the weakest examples, which nobody is shown, and no pairs.
        found = surveys(list(beside.values()), replace(survey_config, bottom=0, cofiring_up_to=0))
        for (name, of), other in zip(beside.items(), found, strict=True):
            # What features are shown besides examples, controls are shown too; misplaced ones have the features' own.
            directions = source if name == "misplaced features" else of
            groups[name] = pairs(other, directions, live_features(other, len(chosen), config.seed))
    return explain_features(groups, text.bytes_of, config, out, explainer=explainer, show_progress=show_progress)


def control_sources(source: Source, l0: float, seed: int = 0) -> dict[str, Source]:
    """What features are compared with, by name, on the same model and hook. l0: of the dictionary, measured."""
    misplaced: Any = Misplaced(source.sae, seed)
    made: Mapping[str, Any] = {
        "neurons": neurons_as_features(source.sae),
        "random directions": random_features(source.sae, l0, seed),
        "misplaced features": misplaced,
    }
    return {name: Source(sae, source.model, source.hook) for name, sae in made.items()}


def _top_logits(source: Source, text: Text, tokenizer: Any, context: int) -> TopLogits | None:
    """None for a model without an unembedding."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = context - len(bos)
    starts = [int(first) for first, end in zip(text.first[:-1], text.first[1:], strict=True) if end - first >= body]
    if not starts:
        return None
    rows = [[*bos, *text.ids[start : start + body].tolist()] for start in starts[:_LOGIT_CONTEXTS]]
    found = contexts_map(source, torch.tensor(rows), bool(bos))
    return None if found is None else found.top(source.sae, entries=len(text.bytes_of))


def contexts_map(source: Source, ids: torch.Tensor, with_bos: bool) -> LogitMap | None:
    """The logit map over contexts [B, T]; None for a model without an unembedding."""
    keep = torch.ones(ids.shape, dtype=torch.bool)
    keep[:, 0] = not with_bos
    try:
        return logit_map(source.model, source.hook, ids, keep)
    except FastSAEError:
        return None
