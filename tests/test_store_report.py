"""A site from a store: what its survey says, without the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsae
from fastsae import cli
from fastsae.analysis import AnalyzeConfig, Cards, Survey, analyze_store, survey_of_store
from fastsae.dashboard import run, site
from fastsae.dashboard.stored import Stored
from fastsae.errors import FastSAEError
from tests.analysis_case import HOOK, case, documents

TEXTS = documents(60)
CONFIG = AnalyzeConfig(categories=("Arabic", "Thai"), context=24, explain_features=4, explain_up_to=6)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sae, model, tokenizer = case()
    store = fastsae.harvest(
        model, tokenizer, TEXTS, HOOK, tmp_path_factory.mktemp("harvest") / "store", context=24, packing="cut",
        show_progress=False,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("site") / "report"
    results = analyze_store(sae, store, tokenizer, TEXTS, out, CONFIG, show_progress=False)
    return {"sae": sae, "model": model, "tokenizer": tokenizer, "store": store, "out": out, "results": results}


def test_the_pages_show_what_the_survey_of_the_store_says(given: dict[str, Any]):
    survey = survey_of_store(
        given["sae"], given["store"], given["tokenizer"], TEXTS, categories=CONFIG.categories, show_progress=False
    )
    cards, overview = Cards(survey), site.read_overview(given["out"])
    assert overview["tokens"] == cards.tokens() == given["store"].count and overview["documents"] == len(TEXTS)
    assert overview["of_store"] and overview["hook"] == HOOK and not overview["has"]["logits"]
    for feature in range(40):
        card = site.read_card(given["out"], feature)
        assert card["fires"] == survey.sums["fires"][:, feature].sum()
        strongest = [window["activations"][window["at"]] for window in card["top"]]
        np.testing.assert_allclose(strongest, [e.value for e in cards.top(feature, 20)], rtol=5e-3)
    assert np.array_equal(Survey.load(given["out"] / "survey.npz").maximum, survey.maximum)
    assert not (given["out"] / "unfinished").exists()


def test_categories_are_chosen_on_one_half_and_scored_on_the_other(given: dict[str, Any]):
    cards = Cards(Survey.load(given["out"] / "survey.npz"))
    (row,) = given["results"]["categories"]
    assert row["feature"] == np.nan_to_num(cards.pearson(0)[:, 0]).argmax()
    assert row["pearson"] == cards.pearson(1)[row["feature"], 0]
    assert row["neuron_pearson"] == cards.neuron_pearson(1)[row["neuron"], 0]
    assert [one["name"] for one in given["results"]["left_out"]] == ["Thai"]
    assert json.loads((given["out"] / "results.json").read_text())["explain"]["features"]
    assert site.read_overview(given["out"])["categories"][0]["specificity"] == row["specificity"]


def test_with_the_model_there_are_logit_weights(given: dict[str, Any], tmp_path: Path):
    sae, tokenizer, store = (given[name] for name in ("sae", "tokenizer", "store"))
    analyze_store(sae, store, tokenizer, TEXTS, tmp_path, CONFIG, model=given["model"], show_progress=False)
    assert site.read_overview(tmp_path)["has"]["logits"]
    assert len(site.read_card(tmp_path, 3)["logits"]["top"]) == 10


def test_other_text_and_features_are_refused(given: dict[str, Any], tmp_path: Path):
    sae, tokenizer, store = (given[name] for name in ("sae", "tokenizer", "store"))
    with pytest.raises(FastSAEError, match="not those of these documents|documents"):
        analyze_store(sae, store, tokenizer, TEXTS[::-1], tmp_path / "a", CONFIG, show_progress=False)
    with pytest.raises(FastSAEError, match="every feature has a page"):
        analyze_store(sae, store, tokenizer, TEXTS, tmp_path / "b", AnalyzeConfig(features=(3,)), show_progress=False)


def test_from_the_command_line(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model, tokenizer = given["model"], given["tokenizer"]
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    given["sae"].save_pretrained(tmp_path / "sae")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(120)))
    options = {"model": "lm", "hook": HOOK, "text": "text.jsonl", "out": "store"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert cli.main(["harvest", *words, "--context", "24"]) == 0
    argv = ["analyze", "--sae", "sae", "--store", "store", "-o", "out"]
    argv += ["--categories", "Arabic", "Thai", "--explain-features", "2", "--explain-up-to", "3"]
    capsys.readouterr()
    assert cli.main([*argv, "--text", "text.jsonl"]) == 0
    assert "left out: Thai" in capsys.readouterr().out
    overview = site.read_overview(tmp_path / "out")
    assert overview["of_store"] and overview["tokens"] == fastsae.ActivationStore(tmp_path / "store").count
    # The server finds the model that the store was harvested from, wherever it is started.
    monkeypatch.chdir("/")
    live, note = run.open_live(Stored(tmp_path / "out"), run.Inputs.of_report(tmp_path / "out"))
    assert live is not None and note is None and live.source.hook == HOOK
    monkeypatch.chdir(tmp_path)
    assert cli.main([*argv, "--widths", "sae"]) == 2
    assert "widths needs the model to be run" in capsys.readouterr().err
    argv[argv.index("-o") + 1] = "other"
    assert cli.main(argv) == 2  # not the text that was harvested
    assert "give the text and the tokenizer" in capsys.readouterr().err or "given" in capsys.readouterr().err
