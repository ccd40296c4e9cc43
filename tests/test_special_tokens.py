"""Text that holds special tokens, as dumps do: a window ends at them, live and from a store, and every verb works."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import fastsae
from fastsae.analysis import AnalyzeConfig, Cards, Source, Survey, SurveyConfig, analyze, survey_of_store, take_survey
from fastsae.analysis.evidence import explain_dictionary
from fastsae.analysis.examples import Example
from fastsae.analysis.explain import protocol
from fastsae.errors import FastSAEError
from tests import analysis_case
from tests.survey_case import OPTIONS

AROUND = OPTIONS["around"]


@pytest.fixture(scope="module")
def case() -> tuple[Source, Any, list[str]]:
    sae, model, tokenizer = analysis_case.case()
    end = tokenizer.eos_token
    texts = [text.replace(" ", end, 2).replace("end", f"{end}{end}end{end}") for text in analysis_case.documents(40)]
    return Source(sae.eval(), model, analysis_case.HOOK), tokenizer, texts


def live(case: tuple[Source, Any, list[str]], **options: Any) -> Survey:
    return take_survey(*case, show_progress=False, **OPTIONS | options)[0]


def stored(case: tuple[Source, Any, list[str]], folder: Any) -> Survey:
    source, tokenizer, texts = case
    store = fastsae.harvest(source.model, tokenizer, texts, source.hook, folder, packing="cut", context=32,
                            dtype="float32", show_progress=False)  # fmt: skip
    return survey_of_store(source.sae, store, tokenizer, texts, show_progress=False, **OPTIONS)


def shown(cards: Cards) -> list[tuple[int, Example]]:
    return [
        (k, example) for k in range(cards.survey.d_sae) if cards.density()[k] > 0
        for example in [*cards.top(k), *cards.bottom(k), *sum(cards.intervals(k), []), *cards.random(k),
                        *cards.elsewhere(k, 20), *cards.random(k, silent=True)]
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["live", "stored"])
def test_a_window_ends_at_a_special_token(case, tmp_path, kind):
    _, tokenizer, texts = case
    cards = Cards(live(case) if kind == "live" else stored(case, tmp_path / "store"))
    rows = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    examples, cut = shown(cards), 0
    for _, example in examples:
        ids, at = rows[example.document], example.position
        context = range(at - at % 31, min(at - at % 31 + 31, len(ids)))
        low = high = at
        while low - 1 in context and ids[low - 1] != tokenizer.eos_token_id:
            low -= 1
        while high + 1 in context and ids[high + 1] != tokenizer.eos_token_id:
            high += 1
        # `elsewhere` shows windows of which the token is not the middle: they reach less far on one side.
        begin, end = at - example.at, at - example.at + len(example.token_ids)
        assert low <= begin <= at < end <= high + 1 and max(at - begin, end - 1 - at) <= 2 * AROUND
        np.testing.assert_array_equal(example.token_ids, ids[begin:end])
        assert np.isfinite(example.activations).all()
        cut += begin == low > at - AROUND or end == high + 1 <= at + AROUND
    assert cut > 100 and len(examples) > 500


def test_a_store_shows_what_the_model_shows(case, tmp_path):
    of_model, of_store = shown(Cards(live(case))), shown(Cards(stored(case, tmp_path / "store")))
    assert len(of_model) == len(of_store)
    for (k, one), (other_k, other) in zip(of_model, of_store, strict=True):
        assert (k, one.document, one.position, one.at) == (other_k, other.document, other.position, other.at)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.activations, other.activations, atol=1e-4)


def test_silent_windows_are_silent_up_to_where_they_are_cut(case):
    cards = Cards(live(case))
    for k in range(40):
        silent = {(e.document, e.position) for e in cards.random(k, 999, silent=True)}
        everything = cards.random(k, 999)
        assert silent == {(e.document, e.position) for e in everything if not (e.activations > 0).any()}


def test_levels_of_what_is_not_finite_are_refused():
    with pytest.raises(FastSAEError, match=r"activations must be finite, got \[1.0, nan\]"):
        protocol.quantised(np.array([1.0, np.nan], dtype=np.float32), 2.0)


@pytest.mark.parametrize("explained", [0, 2])
def test_an_analysis_goes_through(case, tmp_path, explained):
    (sae, model, hook), tokenizer, texts = case
    config = AnalyzeConfig(
        categories=("Arabic", "letters=regex:[a-z]"), context=24, batch_size=8, contexts_per_effect=8, sample_tokens=2,
        samples=1, explain_features=explained, explain_up_to=explained, effects_up_to=4, features=(7,),
    )  # fmt: skip
    found = analyze(sae, model, tokenizer, texts, hook, tmp_path, config, show_progress=False)
    assert len(found["categories"]) == 2 and bool(found["explain"]) == bool(explained)
    assert "NaN" not in (tmp_path / "results.json").read_text(encoding="utf-8")
    for path in (tmp_path / "data").glob("*.js"):
        assert "NaN" not in path.read_text(encoding="utf-8"), path


def test_explanations_go_through(case, tmp_path):
    source, tokenizer, texts = case
    how = SurveyConfig(categories=(), context=32, batch_size=8)
    explain_dictionary(source, tokenizer, texts, survey_config=how, count=3, out=tmp_path, show_progress=False)
    found = json.loads((tmp_path / "explain.json").read_text(encoding="utf-8"))
    assert found["summary"]["features"]["spearman"]["n"] == 3
