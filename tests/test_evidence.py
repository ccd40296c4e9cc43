"""From a dictionary to scored explanations, and the verb that does it."""

import json
from typing import Any

import numpy as np
import pytest

from fastsae.analysis import Source, SurveyConfig
from fastsae.analysis.evidence import explain_dictionary, live_features
from fastsae.analysis.explain import ExplainConfig
from fastsae.analysis.passes import take_survey
from fastsae.errors import FastSAEError
from tests import analysis_case

SURVEY: dict[str, Any] = {"categories": (), "context": 32, "batch_size": 8}


@pytest.fixture(scope="module")
def case():
    sae, model, tokenizer = analysis_case.case()
    return Source(sae.eval(), model, analysis_case.HOOK), tokenizer, analysis_case.documents(40)


def test_live_features_fire_in_both_halves(case) -> None:
    source, tokenizer, texts = case
    (survey,) = take_survey(source, tokenizer, texts, show_progress=False, **SURVEY)
    fires = survey.sums["fires"].min(0)
    drawn = live_features(survey, 5, seed=1)
    assert len(drawn) == 5 and (fires[drawn] >= 50).all() and drawn == live_features(survey, 5, seed=1)
    assert sorted(live_features(survey, 1000)) == np.flatnonzero(fires >= 50).tolist()


def test_features_are_explained_from_one_half_and_scored_on_the_other(case, tmp_path) -> None:
    source, tokenizer, texts = case
    (survey,) = take_survey(source, tokenizer, texts, show_progress=False, **SURVEY)
    feature = live_features(survey, 1)[0]
    found = explain_dictionary(
        source, tokenizer, texts, [feature], ExplainConfig(), SurveyConfig(**SURVEY), out=tmp_path, show_progress=False
    )
    (result,) = found["results"]["features"]
    assert result.feature == feature and result.explanation and -1 <= result.spearman <= 1
    written = json.loads((tmp_path / "explain.json").read_text(encoding="utf-8"))
    assert written["results"]["features"][0]["explanation"] == result.explanation


def test_features_that_cannot_be_explained_are_told(case) -> None:
    source, tokenizer, texts = case
    with pytest.raises(FastSAEError, match="from 0 to 39, got 40"):
        explain_dictionary(source, tokenizer, texts, [40], show_progress=False)
    silent = int(np.flatnonzero(take_survey(source, tokenizer, texts[:1], show_progress=False, **SURVEY)[0]
                                .sums["fires"].min(0) == 0)[0])  # fmt: skip
    with pytest.raises(FastSAEError, match=f"feature {silent} never fires on one half"):
        explain_dictionary(source, tokenizer, texts[:1], [silent], None, SurveyConfig(**SURVEY), show_progress=False)
