"""`analyze` beside its controls, the paper's own proxies and thresholds that other documents chose."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae.analysis import AnalyzeConfig, Cards, Survey, analyze, effects, paper_forms
from fastsae.analysis.controls import Misplaced, neurons_as_features, random_features
from fastsae.analysis.held_out import HeldOut
from fastsae.analysis.proxies import Function, proxies
from fastsae.analysis.stream import encoded
from fastsae.analysis.text import Text, scoring_half
from fastsae.errors import FastSAEError
from fastsae.hooks import activations
from tests.analysis_case import HOOK, case, contexts, documents, neurons

TEXTS = documents(60)
CONFIG = AnalyzeConfig(
    categories=("Arabic", "base64", "letters=regex:[a-z]"), context=24, batch_size=8, contexts_per_effect=20,
    sample_tokens=2, samples=1, features=(3,), explain_features=0,
)  # fmt: skip


def one_for_begin_of_text():
    """The case with latent 3 strongest by far on begin-of-text tokens, where the neurons are the same every time."""
    sae, model, tokenizer = case()
    first = activations(model, HOOK, torch.tensor([[tokenizer.bos_token_id]]))[0, 0]
    rest = neurons(model, contexts(tokenizer, TEXTS, CONFIG.context))
    w = torch.linalg.solve(rest.T.cov() + 0.01 * torch.eye(24), first - rest.mean(0))
    with torch.no_grad():
        sae.encoder.weight[3] = w / 1.7
        sae.encoder.bias[3] = -float((rest @ w).median())
    return sae, model, tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict:
    sae, model, tokenizer = one_for_begin_of_text()
    module = importlib.import_module("fastsae.analysis.evidence")  # makes the controls
    asked: list[float] = []

    def watched(sae, l0, seed):
        asked.append(l0)
        return random_features(sae, l0, seed)

    out = tmp_path_factory.mktemp("controls") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "random_features", watched)
        results = analyze(sae, model, tokenizer, TEXTS, HOOK, out, CONFIG, show_progress=False)
    x = neurons(model, contexts(tokenizer, TEXTS, CONFIG.context))
    halves = zip(TEXTS, scoring_half(TEXTS), strict=True)
    scored = np.array([half for text, half in halves for _ in text.encode()])
    return {"results": results, "out": out, "f": sae.encode(x).detach().numpy().astype(float), "scored": scored,
            "case": (sae, model, tokenizer), "l0": asked}  # fmt: skip


def row_of(run: dict, name: str) -> dict:
    return next(row for row in run["results"]["categories"] if row["name"] == name)


def test_random_directions_are_as_sparse_as_the_dictionary_was_measured_to_be(run):
    assert run["l0"] == [pytest.approx((run["f"] > 0).sum(1).mean(), rel=1e-3)]
    for activation in ("relu", "topk"):
        sae, *_ = case(activation=activation, k=4)
        made = random_features(sae, 7.4)
        assert (made.cfg.k, made.cfg.activation, made.cfg.d_sae) == (7, "topk", 40)
        assert random_features(sae, 0.1).cfg.k == 1 and random_features(sae, 99.0).cfg.k == 40


def test_the_papers_proxy_stands_beside_ours(run):
    row, scored = row_of(run, "Arabic"), run["scored"]
    data = np.array([byte for text in TEXTS for byte in text.encode()])
    label = np.array([c > "\u0590" for text in TEXTS for c in text for _ in c.encode()])
    prior = (label.sum() + 1) / (len(label) + 2)
    given = np.where(label, 1.0, 1e-10)
    for byte in range(128, 256):  # the tokens are bytes: all of Arabic is parts of characters
        given[data == byte] = max(label[data == byte].mean(), 1e-10) if (data == byte).any() else 0
    score = np.log(given / prior)
    f = run["f"][scored, row["feature"]]
    assert row["pearson_paper"] == pytest.approx(np.corrcoef(f, score[scored] > 0)[0, 1], abs=1e-4)
    assert row["pearson_paper_clipped"] == pytest.approx(np.corrcoef(f, score[scored].clip(0))[0, 1], abs=1e-4)
    names = [row["name"] for row in run["results"]["categories"]]
    assert names == ["Arabic", "letters"]  # the paper's forms are no categories of their own
    assert row_of(run, "letters")["pearson_paper"] is None
    survey = Survey.load(run["out"] / "survey.npz")
    assert survey.proxies == ("Arabic", "base64", "letters")
    assert Cards(survey).pearson(1).shape == (40, 3) and survey.sums["inside"].shape[0] == 3
    page = (run["out"] / "report.html").read_text(encoding="utf-8")
    assert "by the paper’s proxy" in page and f"<td>{row['pearson_paper']:.2f}</td>" in page


def test_which_categories_have_a_form_of_the_paper():
    forms = paper_forms.beside(proxies(["Thai", "Arabic", "DNA", "hex"]))
    assert [form.name for form in forms] == ["Arabic/paper", "DNA/paper"]
    assert [form.name for form in paper_forms.beside(proxies(["Arabic", "Arabic/paper", "base64"]))] == ["base64/paper"]


def test_f1_is_scored_at_a_threshold_that_the_other_half_chose(run):
    row = row_of(run, "Arabic")
    label = np.array([c > "\u0590" for text in TEXTS for c in text for _ in c.encode()])
    f, edges = run["f"][:, row["feature"]], np.array(row["bins"]["edges"])

    def f1(half: np.ndarray, threshold: float) -> float:
        above = f[half] > threshold
        return 2 * (above & label[half]).sum() / (above.sum() + label[half].sum())

    best = max(edges[:-1], key=lambda edge: f1(~run["scored"], edge))
    assert row["f1_threshold"] == pytest.approx(best)
    assert row["f1"] == pytest.approx(f1(run["scored"], best), abs=2e-3)


def test_the_20_strongest_activations_are_none_of_begin_of_text_tokens(run):
    sae, model, tokenizer = run["case"]
    chosen = proxies(CONFIG.categories)
    text = Text(tokenizer, TEXTS, [*chosen, *paper_forms.beside(chosen)])
    held = HeldOut(text, tokenizer, CONFIG.context, CONFIG.contexts_per_effect, None, CONFIG.seed)
    (row,) = run["results"]["features"]
    p = [proxy.name for proxy in chosen].index(row["name"])
    ids = held.ids[torch.cat(held.split(p))]
    f = sae.encode(activations(model, HOOK, ids))[:, :-1, 3].detach()
    assert int((f.flatten().topk(20).indices % f.shape[1] == 0).sum()) > 15  # if they are let in
    edit, bos = effects.set_feature(sae, 3, 0.0), [tokenizer.bos_token_id]
    delta = effects.token_losses(model, HOOK, ids, edit, bos) - effects.token_losses(model, HOOK, ids)

    def bounds(f: torch.Tensor, delta: torch.Tensor) -> tuple[float, float]:
        """Of the mean over the 20 strongest, as those that are as strong as the 20th may be any of them."""
        last = f.flatten().topk(20).values[-1]
        sure, tied = delta[f > last + 1e-4], delta[(f - last).abs() <= 1e-4].sort().values
        n = 20 - len(sure)
        return tuple(float(sure.sum() + part.sum()) / 20 for part in (tied[:n], tied[len(tied) - n :]))  # type: ignore

    low, high = bounds(f[:, 1:], delta[:, 1:])
    assert low - 1e-4 <= row["ablation"]["top"] <= high + 1e-4
    low, high = bounds(f, delta)
    assert not low - 1e-4 <= row["ablation"]["top"] <= high + 1e-4


def test_a_dictionary_denser_than_its_slots_is_analyzed(tmp_path: Path):
    sae, model, tokenizer = case(max_l0=2)
    config = AnalyzeConfig(categories=("Arabic",), context=24, sample_tokens=2, samples=1, contexts_per_effect=4,
                           explain_features=2)  # fmt: skip
    results = analyze(sae, model, tokenizer, TEXTS, HOOK, tmp_path / "dense", config, show_progress=False)
    assert set(results["categories"][0]["controls"]) == {"neurons", "random directions", "misplaced features"}
    x = neurons(model, contexts(tokenizer, TEXTS, 24))
    for control in (Misplaced(sae, 0), neurons_as_features(sae), random_features(sae, 20.0)):
        code = encoded(control, x, "here")  # type: ignore[arg-type]
        assert code.n_tokens == len(x)
    assert Misplaced(sae, 0).eval().encode_sparse(x).l0().max() > 2


def test_categories_are_names():
    with pytest.raises(FastSAEError, match="categories are names, got Function.*more_proxies"):
        AnalyzeConfig(categories=("Arabic", Function("f", str.split)))  # type: ignore[arg-type]
