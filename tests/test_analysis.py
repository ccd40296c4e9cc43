"""`analyze` from a dictionary to its results, with a feature for Arabic planted in the dictionary."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae.analysis import AnalyzeConfig, analyze
from fastsae.analysis.text import scoring_half
from fastsae.errors import FastSAEError
from fastsae.sae import SAE
from tests.analysis_case import HOOK, case, contexts, documents, neurons

PLANTED = 11
CONFIG = AnalyzeConfig(
    categories=("Arabic", "Thai"), context=24, batch_size=8, contexts_per_effect=20, sample_tokens=6, samples=2
)


def planted() -> tuple[SAE, object, object]:
    """The case with latent PLANTED made a ridge regression of "this byte is Arabic" on the neurons."""
    sae, model, tokenizer = case()
    x = neurons(model, contexts(tokenizer, documents(60), CONFIG.context)).double()
    label = torch.tensor([c > "\u0590" for text in documents(60) for c in text for _ in c.encode()]).double()
    mean = x.mean(0)
    w = torch.linalg.solve((x - mean).T @ (x - mean) + torch.eye(24), (x - mean).T @ (label - label.mean()))
    with torch.no_grad():
        sae.encoder.weight[PLANTED] = w.float() / 1.7
        sae.encoder.bias[PLANTED] = float(label.mean() - mean @ w - 0.3)
    return sae, model, tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict:
    sae, model, tokenizer = planted()
    out = tmp_path_factory.mktemp("analysis") / "new"
    results = analyze(
        sae, model, tokenizer, documents(60), HOOK, out, CONFIG, other=(sae, copy.deepcopy(model)),
        quality={}, show_progress=False
    )
    x = neurons(model, contexts(tokenizer, documents(60), CONFIG.context))
    f = sae.encode(x).detach()
    label = np.array([c > "\u0590" for text in documents(60) for c in text for _ in c.encode()])
    halves = zip(documents(60), scoring_half(documents(60)), strict=True)
    scored = np.array([half for text, half in halves for _ in text.encode()])
    return {"results": results, "out": out, "x": x.numpy(), "f": f.numpy(), "label": label, "scored": scored}


def arabic(run: dict) -> dict:
    return run["results"]["categories"][0]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.astype(float), b.astype(float))[0, 1])


def test_a_category_that_is_not_in_the_text_is_left_out(run):
    assert [row["name"] for row in run["results"]["categories"]] == ["Arabic"]
    assert run["results"]["tokens"] == len(run["label"]) and run["results"]["documents"] == 60


def test_the_planted_feature_is_found_and_scored_on_the_other_half(run):
    row, scored, label = arabic(run), run["scored"], run["label"]
    chosen = np.nan_to_num([pearson(column[~scored], label[~scored]) for column in run["f"].T])
    assert row["feature"] == PLANTED == int(chosen.argmax())
    assert math.isclose(row["pearson"], pearson(run["f"][scored, PLANTED], label[scored]), abs_tol=1e-4)
    neuron = int(np.nan_to_num([pearson(column[~scored], label[~scored]) for column in run["x"].T]).argmax())
    assert row["neuron"] == neuron
    assert math.isclose(row["neuron_pearson"], pearson(run["x"][scored, neuron], label[scored]), abs_tol=1e-4)
    assert row["pearson"] > row["neuron_pearson"] + 0.05
    assert math.isclose(row["advantage"], row["pearson"] - row["neuron_pearson"], abs_tol=1e-9)


def test_specificity_base_rate_and_lift(run):
    row, scored, label = arabic(run), run["scored"], run["label"]
    f = run["f"][:, PLANTED]
    edges = np.array(row["bins"]["edges"])
    half = edges[edges >= edges[-1] / 2][0]  # the bins above half of the range
    assert len(edges) > 32 and f.max() / 2 - 1e-6 <= half <= f.max() / 2 + edges[1]
    on, upper = scored & (f > 0), scored & (f > half)
    assert math.isclose(row["base_rate"], label[scored].mean(), abs_tol=1e-6)
    assert math.isclose(row["specificity"], label[on].mean(), abs_tol=1e-4)
    assert math.isclose(row["specificity_upper"], label[upper].mean(), abs_tol=1e-4)
    assert math.isclose(row["lift"], row["specificity"] / row["base_rate"], rel_tol=1e-6)
    assert math.isclose(row["recall"], (on & label).sum() / (scored & label).sum(), abs_tol=1e-4)
    assert math.isclose(row["max"], f.max(), rel_tol=1e-4)
    assert math.isclose(row["density"], (f > 0).mean(), abs_tol=1e-4)
    bins = row["bins"]
    assert sum(bins["inside"]) == (on & label).sum() and sum(bins["outside"]) == (on & ~label).sum()
    counted = np.histogram(f[on & label], bins["edges"])[0]
    assert np.abs(counted - bins["inside"]).sum() <= 2  # one value may round over an edge


def test_another_run_that_is_this_run_matches_wholly(run):
    match = arabic(run)["match"]
    assert match["feature"] == PLANTED and math.isclose(match["pearson"], 1, abs_tol=1e-5)
    assert math.isclose(match["logit_pearson"], 1, abs_tol=1e-4)
    medians = run["results"]["universality"]
    assert math.isclose(medians["features"], 1, abs_tol=1e-5) and math.isclose(medians["neurons"], 1, abs_tol=1e-4)
    assert math.isclose(match["held_out"], 1, abs_tol=1e-5) and math.isclose(medians["held_out"], 1, abs_tol=1e-5)
    assert medians["control_kind"].startswith("the other run's dictionary") and medians["control"] < 1


def test_the_closest_neuron_is_scored_on_the_other_half(run):
    row, scored, f = arabic(run), run["scored"], run["f"][:, PLANTED]
    chosen, other = (
        np.nan_to_num([pearson(column[half], f[half]) for column in run["x"].T]) for half in (~scored, scored)
    )
    assert math.isclose(row["closest_neuron"]["held_out"], other[chosen.argmax()], abs_tol=1e-4)


def test_top_contexts_hold_their_activations(run):
    row = arabic(run)
    tops = [context["activations"][context["at"]] for context in row["contexts"]]
    assert tops == sorted(tops, reverse=True) and math.isclose(tops[0], run["f"][:, PLANTED].max(), rel_tol=1e-4)
    texts = documents(60)
    for context in row["contexts"]:
        assert len(context["tokens"]) == len(context["activations"]) <= 25
        shown = "".join(part for part in context["tokens"] if not part.startswith("‹"))
        assert any(shown in text for text in texts)


def test_effects_are_there_and_in_range(run):
    row = arabic(run)
    pinning, ablation, logits = row["pinning"], row["ablation"], row["logits"]
    assert all(0 <= pinning[name] <= 1 for name in ("unpinned", "pinned", "neuron"))
    assert math.isclose(pinning["value"], row["max"]) and len(pinning["samples"]["pinned"]) == len(pinning["prefix"])
    assert ablation["tokens_inside"] > 50 and ablation["tokens_outside"] > 50
    assert all(math.isfinite(ablation[name]) for name in ("inside", "beside", "outside")) and ablation["inside"] != 0
    assert abs(ablation["outside"]) < abs(ablation["inside"])
    assert run["results"]["notes"] == []
    weights = [weight for _, weight in logits["top"]]
    assert weights == sorted(weights, reverse=True) and weights[-1] > logits["bottom"][0][1]
    assert sum(logits["inside"]) + sum(logits["outside"]) == 257
    assert len(row["neurons"]) == 5 and abs(row["neurons"][0][1]) >= abs(row["neurons"][4][1])


def test_the_folder_holds_report_results_and_figures(run):
    out: Path = run["out"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((out / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert written["categories"][0]["feature"] == PLANTED
    assert "Arabic" in (out / "report.html").read_text(encoding="utf-8")
    assert all(goal["met"] in (True, False) for goal in written["goals"])


def test_a_category_in_short_documents_only_has_no_ablation(tmp_path: Path):
    sae, model, tokenizer = planted()
    config = AnalyzeConfig(categories=("Arabic",), context=24, sample_tokens=2, samples=1)
    texts = [text[:10] if text > "\u0590" else text for text in documents(60)]  # no full context holds Arabic
    results = analyze(sae, model, tokenizer, texts, HOOK, tmp_path / "short", config, show_progress=False)
    assert results["categories"][0]["ablation"] is None
    assert "NaN" not in (tmp_path / "short" / "results.json").read_text(encoding="utf-8")
    (note,) = results["notes"]
    assert note["name"] == "ablation beside Arabic" and "fills a context of 24 tokens" in note["reason"]


def test_what_needs_no_full_context_is_there_without_one(tmp_path: Path):
    """All documents are shorter than a context: only ablation has nothing to be measured on, and that is said."""
    sae, model, tokenizer = planted()
    config = AnalyzeConfig(categories=("Arabic",), features=(5, 6), context=48, sample_tokens=2, samples=1)
    with torch.no_grad():
        sae.encoder.bias[6] = -1e6  # never fires
    texts = [text[:20] for text in documents(60)]
    results = analyze(sae, model, tokenizer, texts, HOOK, tmp_path, config, quality={}, show_progress=False)
    for row in (results["categories"][0], results["features"][0]):
        assert row["ablation"] is None and 0 <= row["pinning"]["pinned"] <= 1 and len(row["logits"]["top"]) == 10
    reason = "no document of the half on which features are scored fills a context of 48 tokens without special tokens"
    assert results["notes"] == [
        {"name": "ablation", "reason": f"{reason}: a smaller context may help"},
        {"name": "effects of feature 6", "reason": "it never fires on this text"},
    ]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<p>Without ablation: {reason}" in page and "Without effects of feature 6: it never fires" in page
    overview = (tmp_path / "data" / "overview.js").read_text(encoding="utf-8")
    assert re.search(r'"logits": ?true', overview)


def test_a_context_of_two(tmp_path: Path):
    sae, model, tokenizer = planted()
    config = AnalyzeConfig(categories=("Arabic",), context=2, sample_tokens=2, samples=1, contexts_per_effect=4)
    texts = documents(12)
    results = analyze(sae, model, tokenizer, texts, HOOK, tmp_path, config, quality={}, show_progress=False)
    assert results["categories"][0]["ablation"]["tokens_inside"] == 4


def test_a_tokenizer_without_a_begin_of_text_token(tmp_path: Path):
    from tests import tiny_lm

    sae, model, _ = planted()
    config = AnalyzeConfig(categories=("Arabic",), context=24, sample_tokens=2, samples=1, contexts_per_effect=4)
    results = analyze(
        sae, model, tiny_lm.tokenizer(bos=False), documents(60), HOOK, tmp_path / "new", config, show_progress=False
    )
    assert results["categories"][0]["pinning"]["pinned"] >= 0


def test_analysis_leaves_the_random_state_and_the_model_alone(tmp_path: Path):
    sae, model, tokenizer = planted()
    config = AnalyzeConfig(categories=("Arabic",), context=24, sample_tokens=2, samples=1, contexts_per_effect=4)
    before = torch.random.get_rng_state(), {name: value.clone() for name, value in sae.state_dict().items()}
    first = analyze(sae, model, tokenizer, documents(60), HOOK, tmp_path / "a", config, show_progress=False)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in sae.state_dict().items())
    second = analyze(sae, model, tokenizer, documents(60), HOOK, tmp_path / "b", config, show_progress=False)
    assert json.dumps(first, default=str) == json.dumps(second, default=str)


def test_config_says_what_is_wrong():
    with pytest.raises(FastSAEError, match="Klingon"):
        AnalyzeConfig(categories=("Klingon",))
    with pytest.raises(FastSAEError, match="at least one category"):
        AnalyzeConfig(categories=())
    with pytest.raises(FastSAEError, match="samples must be at least 1, got 0"):
        AnalyzeConfig(samples=0)
    with pytest.raises(FastSAEError, match="context must be at least 2, got 1"):
        AnalyzeConfig(context=1)


def test_any_feature_can_be_asked_for(run, tmp_path: Path):
    sae, model, tokenizer = planted()
    with torch.no_grad():
        sae.encoder.bias[6] = -1e6  # never fires
    wanted = arabic(run)["feature"]
    config = dataclasses.replace(CONFIG, features=(wanted, 5, 6))
    results = analyze(sae, model, tokenizer, documents(60), HOOK, tmp_path, config, show_progress=False)
    same, other, dead = results["features"]
    assert same["pearson"] == pytest.approx(arabic(run)["pearson"], abs=1e-6)
    shown, wanted_contexts = ([c["tokens"] for c in row["contexts"]] for row in (same, arabic(run)))
    assert shown == wanted_contexts
    assert other["feature"] == 5 and other["bins"] and other["logits"]
    assert dead["max"] == dead["density"] == 0 and dead["ablation"] is None
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2 id='f-5'>Feature 5, beside Arabic</h2>" in page and (tmp_path / "f-5-activations.png").exists()
    with pytest.raises(FastSAEError, match=f"from 0 to {sae.cfg.d_sae - 1}, got -1"):
        analyze(
            sae, model, tokenizer, documents(60), HOOK, tmp_path, dataclasses.replace(CONFIG, features=(-1,)),
            show_progress=False,
        )  # fmt: skip


def test_misplaced_features_fire_as_often_and_know_nothing_of_the_text():
    from fastsae.analysis.controls import Misplaced

    sae = SAE(d_in=4, d_sae=4, k=1, decoder_norm="free").eval()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(4))
    misplaced = Misplaced(sae, seed=0)
    counts, same = torch.zeros(4), 0
    for batch in range(40):  # every batch is of one kind
        kind = batch % 4
        code = misplaced.encode_sparse(torch.eye(4)[kind].repeat(100, 1))
        counts += torch.bincount(code.indices.flatten(), minlength=4)
        same += int((code.indices == kind).sum()) if batch >= 8 else 0
    assert counts.min() > 700 and counts.sum() == 4000
    assert 600 < same < 1000  # a quarter of 3,200, as chance has it
