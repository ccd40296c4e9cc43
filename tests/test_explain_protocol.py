"""The protocols' samples and scores, against scipy, scikit-learn and counting by hand."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from fastsae.analysis.examples import Evidence, Example
from fastsae.analysis.explain import compare, protocol
from fastsae.analysis.explain.run import ExplainResult
from tests import explain_case


@pytest.fixture(scope="module")
def halves() -> tuple[Evidence, Evidence]:
    return explain_case.halves(explain_case.RULES["capital"])


def test_levels_are_nine_equal_parts_and_zero_is_silent_alone():
    values = np.array([0.0, 1e-6, 1.0, 1.0001, 4.5, 8.0, 8.01, 9.0, 12.0], dtype=np.float64)
    assert protocol.quantised(values, 9.0).tolist() == [0, 1, 1, 2, 5, 8, 9, 9, 9]


def test_the_paper_s_numbers_of_windows(halves):
    shown = protocol.windows(halves[0], protocol.TO_EXPLAIN, seed=0)
    parts = [window.part for window in shown]
    assert len(shown) <= 49 and parts.count("top") == 10 and parts.count("random") == 5
    held_out = protocol.windows(halves[1], protocol.TO_PREDICT, seed=0)
    assert 55 <= len(held_out) <= 60  # a place that was drawn twice is used once
    assert max(len(window.token_ids) for window in held_out) == 9
    assert sum(dataclasses.astuple(protocol.TO_EXPLAIN)) == 49 and sum(dataclasses.astuple(protocol.TO_PREDICT)) == 60
    assert parts != sorted(parts), "the order says nothing"


def test_every_interval_gives_the_same_number(halves):
    evidence = halves[0]
    on_its_own = dataclasses.replace(evidence, top=[], random=[], elsewhere=[])
    drawn = protocol.windows(on_its_own, protocol.Mix(0, 24, 0, 0), seed=3)
    ids = [{(tuple(e.cut(4).token_ids), tuple(e.cut(4).activations)) for e in pool} for pool in evidence.intervals]
    counts = [sum((tuple(w.token_ids), tuple(w.activations)) in pool for w in drawn) for pool in ids]
    filled = [c for c, pool in zip(counts, evidence.intervals, strict=True) if len(pool) >= 6]
    assert len(drawn) == 24 and max(filled) - min(filled) <= 1


def _scipy(x: np.ndarray, y: np.ndarray) -> float:
    result: Any = stats.spearmanr(x, y)
    return float(result.statistic)


def test_spearman_is_scipy_s():
    generator = np.random.default_rng(0)
    for size, top in ((7, 3), (50, 2), (540, 10)):
        x, y = generator.integers(0, top, size), generator.integers(0, top, size) + generator.integers(0, 2, size)
        assert protocol.spearman(x, y) == pytest.approx(_scipy(x, y), abs=1e-12)
    assert protocol.spearman(np.zeros(9), np.arange(9)) == 0.0
    assert protocol.spearman(np.full(9, 0.1), np.arange(9)) == 0.0


def test_a_weight_of_three_is_the_token_three_times():
    generator = np.random.default_rng(1)
    x, y, w = generator.integers(0, 5, 60), generator.integers(0, 5, 60), generator.integers(0, 4, 60)
    repeated = _scipy(np.repeat(x, w), np.repeat(y, w))
    assert protocol.spearman(x, y, w) == pytest.approx(repeated, abs=1e-12)


def test_weights_add_up_to_the_text(halves):
    evidence = halves[1]
    held_out = protocol.windows(evidence, protocol.TO_PREDICT, seed=5)
    weights = protocol.token_weights(held_out, evidence)
    assert weights is not None
    values = np.concatenate([w.activations for w in held_out])
    edges = np.linspace(0, evidence.maximum, 13)
    counts = np.array(evidence.interval_counts)
    edges[-1] *= 1 + 1e-6  # float32
    inside = [(values > low) & (values <= high) for low, high in zip(edges, edges[1:], strict=False)]
    found, seen = [weights[part].sum() for part in inside], np.array([part.any() for part in inside])
    mass = np.where(seen, counts, 0)
    total = mass.sum() + evidence.tokens - counts.sum()
    np.testing.assert_allclose(found, mass / total, atol=1e-12)
    random = np.concatenate([np.full(len(w.levels), w.part == "random") for w in held_out])
    assert (weights[(values <= 0) & ~random] == 0).all() and (weights[(values <= 0) & random] > 0).all()
    assert weights.sum() == pytest.approx(1)


def test_weighted_score_estimates_the_population(halves):
    """Over many samples the weighted score of an explanation that is too wide comes near its score on the whole text;
    the plain one, from windows that are far too often active, does not see how often it is wrong."""
    ids = explain_case.text(seed=11)
    rule = explain_case.RULES["capital"]
    values = explain_case.activations(ids, rule, seed=21)
    truth = _scipy(_rough(ids.ravel()), protocol.quantised(values.ravel(), float(values.max())))
    weighted, plain = [], []
    for seed in range(60):
        evidence = explain_case.evidence(ids, values, seed, seed=seed)
        drawn = protocol.windows(evidence, protocol.Mix(6, 24, 30, 20), seed)
        predicted = np.concatenate([_rough(w.token_ids) for w in drawn])
        true = np.concatenate([w.levels for w in drawn])
        weighted.append(protocol.spearman(predicted, true, protocol.token_weights(drawn, evidence)))
        plain.append(protocol.spearman(predicted, true))
    assert abs(np.mean(weighted) - truth) < 0.05 < abs(np.mean(plain) - truth)


def _rough(token_ids: np.ndarray) -> np.ndarray:
    names = [i for i, piece in enumerate(explain_case.PIECES) if piece.strip()[:1].isupper() or piece == " that"]
    return np.isin(token_ids, names).astype(float)


def test_uncounted_evidence_has_no_weights(halves):
    evidence = dataclasses.replace(halves[1], interval_counts=[], tokens=0)
    assert protocol.token_weights(protocol.windows(evidence, protocol.TO_PREDICT, 0), evidence) is None


def test_balanced_accuracy_is_scikit_learn_s():
    generator = np.random.default_rng(2)
    for _ in range(5):
        truth, answers = generator.random(30) < 0.3, generator.random(30) < 0.5
        assert protocol.balanced_accuracy(truth.tolist(), answers.tolist()) == pytest.approx(
            balanced_accuracy_score(truth, answers)
        )
    assert protocol.balanced_accuracy([True, True], [True, False]) is None


def test_detection_is_half_active_and_truthful(halves):
    judged = protocol.detection(halves[1], 30, seed=0)
    assert len(judged.windows) == 30 and sum(judged.truth) == 15 and judged.marks is None
    assert [bool((w.activations > 0).any()) for w in judged.windows] == judged.truth
    assert judged.truth != sorted(judged.truth) and judged.truth != sorted(judged.truth, reverse=True)


def test_fuzzing_marks_the_right_tokens_or_as_many_others(halves):
    judged = protocol.fuzzing(halves[1], 30, seed=0)
    assert judged.marks is not None and sum(judged.truth) * 2 == len(judged.windows) > 20
    for window, mark, honest in zip(judged.windows, judged.marks, judged.truth, strict=True):
        on = window.activations > 0
        assert mark.any() and (mark == on).all() if honest else mark.any() and not (mark & on).any()
        if not honest:
            assert mark.sum() == min(on.sum(), (~on).sum())


def test_windows_at_the_edge_of_a_document_are_shorter():
    example = Example(np.arange(5), np.array([2.0, 0, 0, 0, 0], dtype=np.float32), 0, 3, 0)
    evidence = Evidence(7, 2.0, [example], [], [], [])
    (window,) = protocol.windows(evidence, protocol.Mix(4, 4, 4, 4), seed=0)
    assert window.token_ids.tolist() == [0, 1, 2, 3, 4] and window.levels.tolist() == [9, 0, 0, 0, 0]


def test_groups_are_compared_with_intervals_that_cover():
    generator = np.random.default_rng(3)
    results = [ExplainResult(k, "a", spearman=float(s)) for k, s in enumerate(generator.normal(0.5, 0.1, 80))]
    failed = [ExplainResult(99, "a", failed="malformed")]
    summary = compare({"a": results + failed, "none": failed})
    row = summary["a"]["spearman"]
    values = np.array([r.spearman for r in results], dtype=float)
    assert (row.n, row.failed) == (80, 1)
    assert row.mean == pytest.approx(np.mean(values)) and row.median == pytest.approx(np.median(values))
    low, high = stats.norm.interval(0.95, np.mean(values), stats.sem(values))
    assert row.mean_interval == pytest.approx((low, high), abs=0.005)
    assert summary["none"]["spearman"].n == 0 and summary["none"]["spearman"].median is None
