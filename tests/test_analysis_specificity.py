"""Specificity, sensitivity and neurons against loops, scipy and scikit-learn on the raw activations."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, precision_recall_curve

from fastsae.analysis import neurons
from fastsae.analysis.specificity import (
    Moments,
    Overlap,
    OverlapCounter,
    f1,
    pearson,
    precision_recall,
    sensitivity,
    specificity,
    wilson,
)
from fastsae.errors import FastSAEError

EDGES = np.linspace(0, 5, 11)
N = 4000


def raw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A feature that fires on 6 % of tokens, mostly on a category of 3 %; the proxy's score; membership."""
    rng = np.random.default_rng(seed)
    inside = rng.random(N) < 0.03
    f = np.where(rng.random(N) < np.where(inside, 0.8, 0.035), rng.gamma(2.0, np.where(inside, 1.0, 0.3)), 0.0)
    score = np.where(inside, rng.uniform(0.1, 9, N), rng.uniform(-23, 0, N))
    return np.minimum(f, 5.0), score, inside


def overlap_of(f: np.ndarray, inside: np.ndarray) -> Overlap:
    """By loops, one token at a time."""
    sums = np.zeros((4, 10))
    for value, hit in zip(f, inside, strict=True):
        for b in range(10):
            if EDGES[b] < value <= EDGES[b + 1]:
                sums[:, b] += [1, hit, value, value * hit]
    return Overlap(EDGES, *sums, tokens=len(f), members=int(inside.sum()))


def test_specificity_by_bin():
    f, _, inside = raw()
    found = specificity(overlap_of(f, inside))
    on = f > 0
    base = inside.mean()
    assert found.base_rate == base
    assert found.total == pytest.approx(inside[on].mean())
    assert found.total_lift == pytest.approx(inside[on].mean() / base)
    assert found.upper == pytest.approx(inside[f > 2.5].mean())
    assert found.expected == pytest.approx((f * inside).sum() / f.sum())
    for b in range(10):
        chosen = (f > EDGES[b]) & (f <= EDGES[b + 1])
        if chosen.any():
            test = stats.binomtest(int(inside[chosen].sum()), int(chosen.sum()))
            interval = test.proportion_ci(0.95, method="wilson")
            assert found.share[b] == pytest.approx(inside[chosen].mean())
            assert found.lift[b] == pytest.approx(inside[chosen].mean() / base)
            assert (found.low[b], found.high[b]) == pytest.approx((interval.low, interval.high))
        else:
            assert np.isnan([found.share[b], found.lift[b], found.low[b], found.high[b]]).all()


def test_the_counter_agrees_with_loops_in_any_batches():
    f, _, inside = raw()
    f[:2] = EDGES[[3, 10]]  # on an edge
    counter = OverlapCounter(EDGES)
    for rows in np.array_split(np.arange(N), 7):
        counter.add(f[rows], inside[rows])
    found, wanted = counter.overlap(), overlap_of(f, inside)
    for name in ("active", "inside", "active_sum", "inside_sum", "tokens", "members"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), err_msg=name)
    counter.add(np.array([7.0]), np.array([True]))
    assert counter.overlap().active[-1] == wanted.active[-1] + 1


def test_sensitivity_is_pearson_over_all_tokens():
    f, score, inside = raw()
    clipped = score.clip(0)

    def moments(p: np.ndarray) -> Moments:
        return Moments(N, *(np.array(part.sum()) for part in (f, f * f, p, p * p, f * p)))

    found = sensitivity(overlap_of(f, inside), moments(inside.astype(float)), moments(clipped))
    assert found.binary == pytest.approx(np.corrcoef(f, inside)[0, 1])
    assert found.clipped == pytest.approx(np.corrcoef(f, clipped)[0, 1])
    assert found.recall == pytest.approx((f[inside] > 0).mean())
    assert abs(float(found.binary) - float(found.clipped)) > 0.01


def test_constant_columns_have_no_correlation():
    n, x = 5, np.array([0.1] * 5)
    assert pearson(n, x.sum(), (x * x).sum(), x.sum(), (x * x).sum(), (x * x).sum()) == 0
    assert pearson(3, *map(np.array, (0.0, 0.0, 2.0, 4.0, 0.0))) == 0


def test_precision_and_recall_are_scikit_learns():
    f, _, inside = raw()
    binned = np.ceil(f / 0.5)  # ties within bins, 0 for silence
    found = precision_recall(overlap_of(f, inside))
    assert found.average_precision == pytest.approx(average_precision_score(inside, binned))
    precision, recall, thresholds = precision_recall_curve(inside, binned)
    for t, p, r in zip(thresholds, precision, recall, strict=False):
        if t > 0:
            at = int(np.flatnonzero(np.isclose(found.thresholds, (t - 1) * 0.5))[0])
            assert (found.precision[at], found.recall[at]) == pytest.approx((p, r))
    curve = [2 * p * r / (p + r) for t, p, r in zip(thresholds, precision, recall, strict=False) if t > 0]
    assert found.best_f1 == pytest.approx(max(curve))
    above = f > found.best_threshold
    assert found.best_f1 == pytest.approx(2 * (above & inside).sum() / (above.sum() + inside.sum()))


def test_f1_at_a_threshold_that_other_tokens_chose():
    chosen = precision_recall(overlap_of(*raw(5)[::2])).best_threshold
    f, _, inside = raw(6)
    above = f > chosen
    wanted = 2 * (above & inside).sum() / (above.sum() + inside.sum())
    assert f1(overlap_of(f, inside), chosen) == pytest.approx(wanted)
    assert f1(overlap_of(f, inside), 99.0) == 0
    assert f1(overlap_of(f, np.zeros(N, dtype=bool)), 0.0) == 0


def test_many_features_and_categories_at_once():
    pairs = [[raw(s) for s in (1, 2)], [raw(3), (np.zeros(N), *raw(4)[1:])]]  # the last feature never fires
    single = [[overlap_of(f, inside) for f, _, inside in row] for row in pairs]

    def stacked(name: str) -> np.ndarray:
        return np.array([[getattr(o, name) for o in row] for row in single])

    sums = {name: stacked(name) for name in ("active", "inside", "active_sum", "inside_sum", "members")}
    all_ = Overlap(EDGES, tokens=N, **sums)
    for function in (specificity, precision_recall):
        together = function(all_)
        for a in range(2):
            for b in range(2):
                alone = function(single[a][b])
                for name, value in vars(alone).items():
                    if name != "thresholds":
                        np.testing.assert_allclose(getattr(together, name)[a, b], value, err_msg=name)
    assert np.isnan(specificity(all_).total[1, 1])
    assert precision_recall(all_).average_precision[1, 1] == pytest.approx(all_.base_rate[1, 1])


def test_bad_input():
    with pytest.raises(FastSAEError, match="one edge more"):
        Overlap(np.arange(3), *np.zeros((4, 3)), tokens=1, members=0)
    with pytest.raises(FastSAEError, match="at least one token"):
        Overlap(np.arange(4), *np.zeros((4, 3)), tokens=0, members=0)
    with pytest.raises(FastSAEError, match="between 0 and 1"):
        wilson(np.ones(1), np.ones(1), 95)


def test_decoder_coefficients_over_neurons():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 50)) * rng.uniform(0.1, 9, (6, 1))
    rows[0] = 0
    rows[0, 7] = -3.0  # a neuron, upside down
    rows[1] = 2.0  # all alike
    found = neurons.neuron_basis(torch.from_numpy(rows), k=4)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert found.neurons[0, 0] == 7 and found.coefficients[0, 0] == -1 and bool(found.negative[0])
    assert found.large.tolist() == [(abs(row) >= 0.1).sum() for row in unit]
    np.testing.assert_allclose(found.neurons_used[:2], [1, 50])
    np.testing.assert_allclose(found.largest, abs(unit).max(1))
    np.testing.assert_allclose(found.kurtosis[2:], stats.kurtosis(unit[2:], axis=1))
    np.testing.assert_allclose(found.neurons_used[2:], [np.exp(stats.entropy(row**2)) for row in unit[2:]])
    for f in range(2, 6):
        order = sorted(range(50), key=lambda d, f=f: -abs(unit[f, d]))[:4]
        assert found.neurons[f].tolist() == order
        np.testing.assert_allclose(found.coefficients[f], unit[f, order])


def test_closest_neurons():
    rng = np.random.default_rng(1)
    x = rng.gamma(1.0, size=(500, 9)) * 3
    x[:, 4] = 0  # a dead neuron
    f = np.maximum(x @ rng.standard_normal((9, 5)), 0)
    sums = (f.sum(0), (f * f).sum(0), x.sum(0), (x * x).sum(0), f.T @ x)
    found = neurons.closest_neurons(500, *sums, k=2)
    alive = [d for d in range(9) if d != 4]
    for i in range(5):
        r = {d: np.corrcoef(f[:, i], x[:, d])[0, 1] for d in alive}
        best = sorted(alive, key=lambda d, r=r: -r[d])[:2]
        assert found.neurons[i].tolist() == best
        np.testing.assert_allclose(found.pearson[i], [r[d] for d in best])
    p = (x[:, [2, 7]] > 4).astype(float)
    assert neurons.best_neurons(500, sums[2], sums[3], p.sum(0), p.sum(0), x.T @ p).tolist() == [2, 7]
