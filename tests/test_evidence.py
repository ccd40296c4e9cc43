"""From a dictionary to scored explanations, and the verb that does it."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.analysis import Source, SurveyConfig, shuffled
from fastsae.analysis.evidence import explain_dictionary, live_features
from fastsae.analysis.explain import ExplainConfig
from fastsae.analysis.passes import take_survey
from fastsae.errors import FastSAEError
from fastsae.hooks import activations
from tests import analysis_case
from tests.chat_server import serving
from tests.endpoint_case import config, without_keys

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
    assert live_features(survey, 0) == []
    with pytest.raises(FastSAEError, match="count must be at least 0 features, got -3"):
        live_features(survey, -3)


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


GROUPS = ["features", "neurons", "random directions", "misplaced features", "shuffled model"]


def test_a_model_explains_controls_too_and_goes_on_over_groups(case, tmp_path, monkeypatch) -> None:
    """Features first, then a run with controls that its budget ends, then the rest: nothing is paid for twice."""
    pytest.importorskip("openai")
    without_keys(monkeypatch)
    source, tokenizer, texts = case
    sae, model, _ = analysis_case.case(seed=3)
    control = Source(sae.eval(), shuffled(model), analysis_case.HOOK)

    def run(url: str, **options: Any) -> dict[str, Any]:
        limit = {"max_requests": options.pop("max_requests", None)}
        settings = config(url, windows=10, judged=4, concurrency=1, prompt_price=1.0, **limit)
        return explain_dictionary(
            source, tokenizer, texts, (), settings, SurveyConfig(**SURVEY), count=2, out=tmp_path, show_progress=False,
            **options,
        )

    with serving() as server:
        alone = run(server.url)
        assert list(alone["results"]) == ["features"]
        sent = len(server.seen)
        cut = run(server.url, controls=True, control=control, max_requests=sent)
        assert len(server.seen) == 2 * sent, "the features were there already"
        assert cut["results"]["features"] == alone["results"]["features"]
        assert any(result.failed and "budget" in result.failed for result in cut["results"]["shuffled model"])
        whole = run(server.url, controls=True, control=control)
        paid = len(server.seen)
        again = run(server.url, controls=True, control=control)
        assert len(server.seen) == paid == whole["accounting"].requests == again["accounting"].requests
    assert again["results"] == whole["results"] and list(whole["results"]) == GROUPS
    for name, results in whole["results"].items():
        assert len(results) == 2 and all(result.failed is None and result.group == name for result in results)
    saved = json.loads((tmp_path / "explain.json").read_text(encoding="utf-8"))
    for name in GROUPS:
        low, high = saved["summary"][name]["spearman"]["mean_interval"]
        assert low <= saved["summary"][name]["spearman"]["mean"] <= high
    with_logits = [body for body in server.seen if "these next tokens" in str(body["messages"])]
    assert len(with_logits) == 2 * len(GROUPS), "controls are shown all that features are shown"


def test_neurons_are_scored_as_neurons(case) -> None:
    """The control's evidence is the neuron's own activations: what the offline explainer predicts follows them."""
    source, tokenizer, texts = case
    found = explain_dictionary(
        source, tokenizer, texts, (), ExplainConfig(), SurveyConfig(**SURVEY), count=6, controls=True,
        show_progress=False,
    )  # fmt: skip
    x = []
    model, ids = source.model, [tokenizer(text, add_special_tokens=False)["input_ids"][:31] for text in texts]
    for row in ids:
        x.append(activations(model, source.hook, torch.tensor([[tokenizer.bos_token_id, *row]]))[0, 1:])
    live = (torch.cat(x) > 0).float().mean(0)
    for result in found["results"]["neurons"]:
        assert result.feature < 24 and live[result.feature] > 0
    assert list(found["summary"]) == GROUPS[:4] and all(len(group) <= 6 for group in found["results"].values())
    assert found["summary"]["misplaced features"]["spearman"].mean < found["summary"]["features"]["spearman"].mean


def test_an_explainer_that_cannot_be_had_is_told_before_the_text_is_read(case, monkeypatch) -> None:
    pytest.importorskip("openai")
    without_keys(monkeypatch)
    source, tokenizer, _ = case
    with pytest.raises(FastSAEError, match="endpoint must be a URL"):
        explain_dictionary(source, tokenizer, (), (), config("http://[bad"), show_progress=False)


def test_features_that_cannot_be_explained_are_told(case) -> None:
    source, tokenizer, texts = case
    with pytest.raises(FastSAEError, match="from 0 to 39, got 40"):
        explain_dictionary(source, tokenizer, texts, [40], show_progress=False)
    for count in (0, -3):
        with pytest.raises(FastSAEError, match=f"count must be at least 1 feature, got {count}"):
            explain_dictionary(source, tokenizer, texts, count=count, show_progress=False)
    silent = int(np.flatnonzero(take_survey(source, tokenizer, texts[:1], show_progress=False, **SURVEY)[0]
                                .sums["fires"].min(0) == 0)[0])  # fmt: skip
    with pytest.raises(FastSAEError, match=f"feature {silent} never fires on one half"):
        explain_dictionary(source, tokenizer, texts[:1], [silent], None, SurveyConfig(**SURVEY), show_progress=False)
