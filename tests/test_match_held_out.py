"""What a match chooses on one half and scores on the other, what it cannot know, and likeness by weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fastsae.analysis import goals
from fastsae.analysis.alike import LogitLikeness
from fastsae.analysis.logit_map import LogitMap
from fastsae.analysis.neurons import ClosestHeldOut
from fastsae.analysis.stream import Source
from fastsae.analysis.universality import match, shuffled
from fastsae.codes import SparseCode
from fastsae.report_comparisons import beside_paper, universality
from fastsae.sae import SAE
from tests import analysis_case as case
from tests.test_match import HOOK, TEXTS, correlations, dense, paper_weights, run, text_contexts
from tests.test_report import results


def test_the_assignment_is_scored_on_the_other_half():
    sae_a, model_a, tokenizer = case.case(0)
    sae_b, model_b, _ = case.case(1)
    found = run(Source(sae_a, model_a, HOOK), Source(sae_b, model_b, HOOK), tokenizer, logit_contexts=0)
    (f, _, scoring), (g, _, _) = dense(sae_a, model_a, tokenizer), dense(sae_b, model_b, tokenizer)
    live, alive = (np.flatnonzero((part > 0).sum(0) >= 5) for part in (f, g))
    chosen, scored = (correlations(f[half], g[half]) for half in (~scoring, scoring))
    rows, columns = linear_sum_assignment(-chosen[live][:, alive])
    wanted = np.full(40, np.nan)
    wanted[live[rows]] = scored[live[rows], alive[columns]]
    wanted[(f[scoring].std(0) == 0) | (f[~scoring].std(0) == 0)] = np.nan
    assert found.assigned_held_out is not None and found.assigned_pearson is not None
    np.testing.assert_allclose(found.assigned_held_out, wanted, atol=1e-6)
    assert found.assigned_held_out.nanmean() < found.assigned_pearson.nanmean()


def test_a_dead_control_has_no_correlation():
    sae, model, tokenizer = case.case()
    source, dead = Source(sae, model, HOOK), SAE(d_in=24, d_sae=30, activation="relu")
    with torch.no_grad():
        dead.encoder.bias.fill_(-1e4)
    control = Source(dead, shuffled(model), HOOK)
    how: dict[str, Any] = {"context": 33, "min_fires": 5, "logit_contexts": 2, "show_progress": False}
    medians = match(source, source, tokenizer, TEXTS, control=control, **how).medians()
    assert medians["pearson"] == pytest.approx(1, abs=1e-6)
    assert [value for name, value in medians.items() if name.startswith("control")] == [None] * 4
    medians = match(source, control, tokenizer, TEXTS, shuffled_control=False, **how).medians()
    assert all(value is None for name, value in medians.items() if not name.startswith("neurons"))


def test_a_half_without_text_scores_nothing():
    """Equal documents fall into the same half."""
    sae_a, model_a, tokenizer = case.case(0)
    sae_b, model_b, _ = case.case(1)
    sources = Source(sae_a, model_a, HOOK), Source(sae_b, model_b, HOOK)
    text = " ".join(TEXTS[:4])
    found = match(*sources, tokenizer, [text, text], context=33, min_fires=3, logit_contexts=0, show_progress=False)
    for held_out in (found.held_out, found.assigned_held_out, found.control_held_out, found.neurons_held_out):
        assert held_out is not None and held_out.isnan().all()
    medians = found.medians()
    assert medians["pearson"] is not None and medians["held_out"] is None and medians["neurons_held_out"] is None


def nearest(a: np.ndarray, b: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(r of all pairs of rows [S, B], the largest among some)."""
    r = np.corrcoef(a, b)[: len(a), len(a) :]
    return r, np.where(among, r, -2).max(1)


def test_the_most_alike_by_weights_is_looked_for_among_all():
    sae_a, model_a, tokenizer = case.case(0)
    sae_b, model_b, _ = case.case(1)
    found = run(
        Source(sae_a, model_a, HOOK), Source(sae_b, model_b, HOOK), tokenizer, logit_contexts=10_000,
        shuffled_control=True, seed=4, min_fires=300,
    )  # fmt: skip
    ids, mask = text_contexts(tokenizer, TEXTS, 33, 32)
    control = shuffled(model_b, 4)
    dense_b = [dense(sae_b, model, tokenizer)[0] for model in (model_b, control)]
    alive = [(g > 0).sum(0) >= 300 for g in dense_b]
    a, b, c = (
        paper_weights(sae, model, ids, mask).numpy()
        for sae, model in ((sae_a, model_a), (sae_b, model_b), (sae_b, control))
    )
    live = found.live.numpy()
    assert 3 < live.sum() < 40 and 3 < alive[0].sum() < 40
    r, best = nearest(a, b, alive[0])
    assert found.best_by_logits is not None and found.best_logit_pearson is not None
    np.testing.assert_allclose(found.best_logit_pearson, np.where(live, best, np.nan), atol=1e-4)
    chosen = found.best_by_logits.numpy()
    assert alive[0][chosen[live]].all() and (chosen[~live] == -1).all()
    np.testing.assert_allclose(r[live, chosen[live]], best[live], atol=1e-4)
    _, best = nearest(a, c, alive[1])
    assert found.control_best_logit_pearson is not None and found.control_logit_pearson is not None
    np.testing.assert_allclose(found.control_best_logit_pearson, np.where(live, best, np.nan), atol=1e-4)
    assert (found.control_logit_pearson <= found.control_best_logit_pearson + 1e-9)[found.live].all()
    rows = [sae.W_dec.detach().double().numpy() for sae in (sae_a, sae_b)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows]
    cosine = np.where(alive[0], unit[0] @ unit[1].T, -2)
    assert found.best_by_decoder is not None and found.best_decoder_cosine is not None
    np.testing.assert_allclose(found.best_decoder_cosine, np.where(live, cosine.max(1), np.nan), atol=1e-6)
    np.testing.assert_array_equal(found.best_by_decoder, np.where(live, cosine.argmax(1), -1))


def test_neurons_are_compared_by_their_logit_weights_too():
    sae_a, model_a, tokenizer = case.case(0)
    sae_b, model_b, _ = case.case(1)
    found = run(Source(sae_a, model_a, HOOK), Source(sae_b, model_b, HOOK), tokenizer, logit_contexts=10_000)
    ids, mask = text_contexts(tokenizer, TEXTS, 33, 32)
    identity = SAE(d_in=24, d_sae=24, activation="relu")
    with torch.no_grad():
        identity.W_dec.copy_(torch.eye(24))
    a, b = (paper_weights(identity, model, ids, mask).numpy() for model in (model_a, model_b))
    x, y = (dense(sae, model, tokenizer)[1] for sae, model in ((sae_a, model_a), (sae_b, model_b)))
    varies = x.std(0) > 0
    r, best = nearest(a, b, y.std(0) > 0)
    assert found.neurons_best_logit_pearson is not None and found.neurons_logit_pearson is not None
    np.testing.assert_allclose(found.neurons_best_logit_pearson, np.where(varies, best, np.nan), atol=1e-4)
    paired = r[np.arange(24), correlations(x, y).argmax(1)]
    np.testing.assert_allclose(found.neurons_logit_pearson, np.where(varies, paired, np.nan), atol=1e-4)
    medians = found.medians()
    assert medians["neurons_logit_pearson"] == pytest.approx(np.median(paired[varies]), abs=1e-4)


def test_logit_likeness_is_exact_over_the_vocabulary_that_both_have(monkeypatch):
    from fastsae.analysis import alike

    monkeypatch.setattr(alike, "_VOCABULARY", 7)
    monkeypatch.setattr(alike, "_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator) for shape in ((6, 9), (50, 6), (5, 8), (43, 5), (4, 9), (11, 8))]
    map_a, map_b, x, y = LogitMap(*made[:2]), LogitMap(*made[2:4]), made[4], made[5]
    x[2] = 0.0  # changes nothing
    y[0] = 0.0
    pairs = LogitLikeness(map_a, map_b).of(x, lambda numbers: y[numbers])
    a, b = ((of.unembedding[:43] @ of.matrix @ rows.T).T.double() for of, rows in ((map_a, x), (map_b, y)))
    r = torch.from_numpy(np.corrcoef(a[[0, 1, 3]], b[1:])[:3, 3:])
    among = torch.arange(11) != 5
    partner, value = pairs.best(among)
    rest = r.masked_fill(~among[1:], -2)
    assert partner[[0, 1, 3]].tolist() == (rest.argmax(1) + 1).tolist() and partner[2] == -1 and value[2].isnan()
    torch.testing.assert_close(value[[0, 1, 3]], rest.amax(1), atol=1e-5, rtol=0)
    some = pairs.of(torch.tensor([4, 0, 3, -1]))
    assert float(some[0]) == pytest.approx(float(r[0, 3]), abs=1e-5) and some[1:].isnan().all()
    same = LogitLikeness(map_a, map_a).of(x, lambda numbers: x[numbers])
    torch.testing.assert_close(same.of(torch.tensor([0, 1, -1, 3]))[[0, 1, 3]], torch.ones(3).double())
    assert same.best(torch.zeros(4, dtype=torch.bool))[0].tolist() == [-1] * 4


def test_the_closest_neuron_is_scored_where_it_was_not_chosen():
    generator = torch.Generator().manual_seed(0)
    f = torch.relu(torch.randn(300, 6, generator=generator))
    x = torch.randn(300, 5, generator=generator) + f[:, :5] * 0.2
    scoring = torch.rand(300, generator=generator) < 0.5
    f[:, 3] *= scoring  # never fires where it is to be chosen
    counter = ClosestHeldOut([4, 1, 4, 3], 6, 5)
    for rows in torch.arange(300).split(70):
        counter.add(SparseCode.from_dense(f[rows]), x[rows], scoring[rows])
    found = counter.result()
    assert list(found) == [1, 3, 4] and found[3] is None
    for feature in (1, 4):
        part = [correlations(f[half].double().numpy(), x[half].double().numpy()) for half in (~scoring, scoring)]
        assert found[feature] == pytest.approx(part[1][feature, part[0][feature].argmax()], abs=1e-6)
    assert ClosestHeldOut([], 6, 5).result() == {}


def test_goals_and_report_tell_held_out_from_in_sample():
    found = results()
    found["categories"][0]["match"] |= {"pearson": 0.88, "held_out": 0.71}
    found["categories"][0]["ablation"] = found["categories"][0]["pinning"] = None
    (goal,) = (row for row in goals.table(found | {"quality": {}}) if "other run" in row["name"])
    assert not goal["met"] and goal["value"].startswith("0.71 (0.88 ") and "held out" in goal["name"]
    found["categories"][0] |= {
        "controls": {}, "neuron_scores": {"specificity_upper": 0.5}, "expected": 0.5, "average_precision": 0.5
    }  # fmt: skip
    page = beside_paper(found)
    head, cells = (page.split(f"<{tag}>")[1:] for tag in ("th", "td"))
    at = [text.split("<")[0] for text in head].index("match")
    assert [cells[at + i].split("<")[0] for i in range(3)] == ["0.71", "0.88", "0.91"]
    assert head[at + 1].startswith("match, in-sample<")
    found["universality"] |= {
        "held_out": 0.55, "control": 0.3, "control_kind": "a dictionary trained on a shuffled model", "logits": 0.44,
        "one_to_one": 0.5, "one_to_one_held_out": 0.41,
    }  # fmt: skip
    page = universality(found)
    assert "control: a dictionary trained on a shuffled model" in page and "best match, in-sample" in page
    assert "one to one (Hungarian), held out 0.41" in page and "the same in-sample 0.50" in page
