"""The one pass over all features, against dense activations computed by the model's own parts and plain numpy."""

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import fastsae
from fastsae.analysis.cards import Cards
from fastsae.analysis.kept import Kept, uniform
from fastsae.analysis.passes import survey_of_store, take_survey
from fastsae.analysis.specificity import specificity
from fastsae.analysis.stream import Source
from fastsae.analysis.survey import Survey
from fastsae.analysis.text import Text, scoring_half
from fastsae.errors import FastSAEError
from tests import analysis_case, tiny_lm
from tests.survey_case import OPTIONS, Dense, but


@pytest.fixture(scope="module")
def case():
    sae, model, tokenizer = analysis_case.case()
    texts = analysis_case.documents()
    return Source(sae.eval(), model, analysis_case.HOOK), tokenizer, texts


@pytest.fixture(scope="module")
def truth(case) -> Dense:
    source, tokenizer, texts = case
    return Dense(source.sae, source.model, tokenizer, texts)


@pytest.fixture(scope="module")
def survey(case) -> Survey:
    source, tokenizer, texts = case
    (found,) = take_survey(source, tokenizer, texts, show_progress=False, **OPTIONS)
    return found


def halves(survey: Survey, truth: Dense) -> np.ndarray:
    """[n] bool: which half each token is in."""
    return np.array(scoring_half(analysis_case.documents()))[truth.document]


def test_counts_sums_and_correlations(survey, truth) -> None:
    cards, half = Cards(survey), halves(survey, truth)
    for which in (None, 0, 1):
        rows = np.ones(len(half), bool) if which is None else half == bool(which)
        f, x = truth.f[rows], truth.x[rows]
        assert cards.tokens(which) == rows.sum()
        np.testing.assert_allclose(cards.density(which), (f > 0).mean(0))
        np.testing.assert_allclose(cards.maximum(which), f.max(0), rtol=1e-5)
        mean = f.sum(0) / np.maximum((f > 0).sum(0), 1)
        np.testing.assert_allclose(cards.mean_active(which), mean, rtol=1e-4)
        for p, label in enumerate((truth.arabic[rows], truth.letter[rows])):
            for k in np.flatnonzero(f.any(0)):
                want = scipy.stats.pearsonr(f[:, k], label.astype(float))[0]
                assert cards.pearson(which)[k, p] == pytest.approx(want, abs=1e-4)
            for d in np.flatnonzero(x.std(0) > 0):
                want = scipy.stats.pearsonr(x[:, d], label.astype(float))[0]
                assert cards.neuron_pearson(which)[d, p] == pytest.approx(want, abs=1e-4)
            assert cards.base_rate(which)[p] == pytest.approx(label.mean())
    closest = cards.closest_neurons(1)
    assert closest is not None
    both = np.corrcoef(truth.f.T, truth.x.T)[: truth.f.shape[1], truth.f.shape[1] :]
    for k in np.flatnonzero(truth.f.any(0)).tolist():
        assert closest.pearson[k, 0] == pytest.approx(np.nanmax(both[k]), abs=1e-4)


def test_histograms_and_overlap_are_exact(survey, truth) -> None:
    cards, half = Cards(survey), halves(survey, truth)
    for k in range(truth.f.shape[1]):
        edges, counts = cards.histogram(k, 1)
        active = truth.f[half, k][truth.f[half, k] > 0]
        if not truth.f[:, k].any():
            assert len(counts) == 0
            continue
        assert edges[-2] < truth.f[:, k].max() <= edges[-1]
        want = np.histogram(np.searchsorted(edges, active.astype(np.float32)), np.arange(1, len(edges) + 1))[0]
        np.testing.assert_array_equal(counts, want)
        overlap = cards.overlap(k, "Arabic", 1)
        inside = truth.arabic[half] & (truth.f[half, k] > 0)
        assert overlap.inside.sum() == inside.sum() and overlap.members == truth.arabic[half].sum()
        np.testing.assert_allclose(overlap.inside_sum.sum(), truth.f[half, k][inside].sum(), rtol=1e-5)
        if len(active):
            assert specificity(overlap).total == pytest.approx(inside.sum() / len(active))


def window(truth: Dense, n: Any, around: int, k: int) -> tuple[np.ndarray, np.ndarray, int]:
    rows = [r for r in range(n - around, n + around + 1)
            if 0 <= r < len(truth.ids) and truth.context[r] == truth.context[n]]  # fmt: skip
    return truth.ids[rows], truth.f[rows, k], rows.index(n)


def check_example(truth: Dense, example, k: int, around: int = 3) -> int:
    (n,) = np.flatnonzero((truth.document == example.document) & (truth.position == example.position))
    ids, values, at = window(truth, n, around, k)
    np.testing.assert_array_equal(example.token_ids, ids)
    np.testing.assert_allclose(example.activations, values, rtol=1e-4, atol=1e-5)
    assert example.at == at
    return int(n)


def test_the_strongest_and_weakest_examples(survey, truth) -> None:
    cards, half = Cards(survey), halves(survey, truth)
    near = 0
    for k in np.flatnonzero(truth.f.any(0)).tolist():
        for which in (0, 1):
            on = np.flatnonzero((truth.f[:, k] > 0) & (half == bool(which)))
            ordered = on[np.argsort(truth.f[on, k], kind="stable")]
            for found, order, limit in ((cards.top(k, 9, which), ordered[::-1], 3),
                                        (cards.bottom(k, 9, which), ordered, 2)):  # fmt: skip
                want, places = [], set()
                for n in order:
                    if n // 6 not in places:  # two from the same few words would say the same
                        places.add(n // 6)
                        want.append((n, truth.f[n, k]))
                apart: list[tuple[int, float]] = []
                for n, value in want[:limit]:
                    same = [m for m, _ in apart if truth.document[n] == truth.document[m] and abs(n - m) <= 3]
                    near += bool(same)
                    apart += [] if same else [(n, value)]
                np.testing.assert_allclose([e.value for e in found], [v for _, v in apart], rtol=1e-4, atol=1e-5)
                for example in found:
                    check_example(truth, example, k)
    assert near  # two stretches of text meet, and what stands at either side of the border is near the other


def test_intervals_hold_what_they_say(survey, truth) -> None:
    k = int((truth.f > 0).sum(0).argmax())
    highest = truth.f[:, k].max()
    found = Cards(survey).intervals(k, 4, 3)
    assert [len(examples) for examples in found] == [3, 3, 3, 3]
    for i, examples in enumerate(found):
        for example in examples:
            assert i * highest / 4 - 1e-5 < example.value <= (i + 1) * highest / 4 + 1e-5
            check_example(truth, example, k)


def test_samples_are_uniform_and_do_not_depend_on_the_batches() -> None:
    where, zeros = np.arange(50), np.zeros(50, np.int64)
    half, value = np.zeros(50, bool), np.linspace(0.1, 1, 50, dtype=np.float32)

    def sample(seed: int, batch: int) -> list[int]:
        table = Kept(5, 0, lambda feature, half, value: feature, 1)
        key = uniform(seed, where, zeros)
        for start in range(0, 50, batch):
            rows = np.arange(start, min(start + batch, 50))
            rows = rows[table.wanted(zeros[rows], half[rows], value[rows], key[rows])]
            columns = (zeros, half, value, key, where, value[:, None], where[:, None].astype(np.int32))
            table.add(*(column[rows] for column in columns))
            table.trim()
        return table.where.rows.tolist()

    assert sample(3, 7) == sample(3, 50) == sample(3, 1)
    seen = np.bincount([n for seed in range(400) for n in sample(seed, 50)], minlength=50)
    # A binomial of 400 draws with 1/10: 40 ± 6. χ² of 49 degrees of freedom is below 94 but once in 10,000 times.
    assert ((seen - 40) ** 2 / 36).sum() < 94


def test_random_windows_know_every_feature(survey, truth) -> None:
    cards = Cards(survey)
    for k in (0, int(truth.f.any(0).argmax()), 39):
        found = cards.random(k, 30, 0)
        assert len(found) == 30
        for example in found:
            check_example(truth, example, k)
        assert all(not e.activations.any() for e in cards.random(k, 30, 0, silent=True))
    k = int((truth.f > 0).sum(0).argmax())
    tokens = {int(e.token_ids[e.at]) for e in cards.top(k, 99)}
    for example in cards.elsewhere(k, 10):
        assert int(example.token_ids[example.at]) in tokens


def test_cofiring_counts(survey, truth) -> None:
    on = (truth.f > 0).astype(float)
    np.testing.assert_array_equal(survey.sums["together"], on.T @ on)
    k = int(on.sum(0).argmax())
    partners = Cards(survey).cofiring(k, 3)
    assert partners and partners[0].feature != k
    both = (on[:, k] * on[:, partners[0].feature]).sum()
    either = np.maximum(on[:, k], on[:, partners[0].feature]).sum()
    assert partners[0].count == both and partners[0].jaccard == pytest.approx(both / either)
    assert partners[0].lift == pytest.approx(both * len(on) / on[:, k].sum() / on[:, partners[0].feature].sum())


def equal(a: Survey, b: Survey) -> None:
    sums = copy.deepcopy(a.sums)
    assert a.shift is not None and b.shift is not None
    sums.move(a.shift.astype(float) - b.shift)
    for name, array in sums.arrays.items():
        size = np.abs(array).max(initial=0)
        np.testing.assert_allclose(array, b.sums[name], rtol=1e-5, atol=1e-6 * size, err_msg=name)
    np.testing.assert_array_equal(a.maximum, b.maximum)
    for table in ("top", "bottom", "sampled", "random"):
        left, right = getattr(a, table).arrays(), getattr(b, table).arrays()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=f"{table} {name}")


def test_ranks_merge_into_the_same(case, survey) -> None:
    source, tokenizer, texts = case
    parts = [
        take_survey(source, tokenizer, texts, show_progress=False, rank=r, world=3, **OPTIONS)[0] for r in range(3)
    ]
    assert all(0 < part.sums["tokens"].sum() < survey.sums["tokens"].sum() for part in parts)
    parts[1].merge(parts[0])
    parts[1].merge(parts[2])
    equal(parts[1], survey)


def test_an_interrupted_pass_goes_on(case, survey, tmp_path, monkeypatch) -> None:
    from fastsae.analysis import checkpoint

    source, tokenizer, texts = case
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    add, calls = Survey.add, []

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(Survey, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        take_survey(source, tokenizer, texts, show_progress=False, out=tmp_path, **OPTIONS)
    with pytest.raises(FastSAEError, match="resume"):
        take_survey(source, tokenizer, texts, show_progress=False, out=tmp_path, **OPTIONS)
    other: dict[str, Any] = OPTIONS | {"top": 4}
    with pytest.raises(FastSAEError, match="top is 3, and 4 here"):
        take_survey(source, tokenizer, texts, show_progress=False, out=tmp_path, resume=True, **other)
    (found,) = take_survey(source, tokenizer, texts, show_progress=False, out=tmp_path, resume=True, **OPTIONS)
    equal(found, survey)
    equal(Survey.load(tmp_path / "survey-0.npz"), survey)
    assert len(calls) < 2 * survey.batches


def test_a_store_gives_the_same_sums(case, truth, tmp_path) -> None:
    source, tokenizer, texts = case
    store = fastsae.harvest(source.model, tokenizer, texts, source.hook, tmp_path / "s", packing="cut", context=32,
                            dtype="float32", show_progress=False)  # fmt: skip
    found = survey_of_store(source.sae, store, tokenizer, texts, show_progress=False, **OPTIONS)
    cards = Cards(found)
    assert cards.tokens() == len(truth.ids)
    np.testing.assert_allclose(cards.density(), (truth.f > 0).mean(0))
    k = int((truth.f > 0).sum(0).argmax())
    assert cards.pearson()[k, 0] == pytest.approx(np.corrcoef(truth.f[:, k], truth.arabic)[0, 1], abs=1e-4)
    for some in (cards.top, cards.bottom):
        for example in some(k, 9):
            check_example(truth, example, k)
    for example in sum(cards.intervals(k, 4), []):
        check_example(truth, example, k)
    for f in (k, 39):
        assert cards.random(f, 9) and all(check_example(truth, e, f) >= 0 for e in cards.random(f, 9))
    alone = Cards(survey_of_store(source.sae, store, tokenizer, texts, show_progress=False, **but(around=0)))
    check_example(truth, alone.top(k)[0], k, around=0)
    with pytest.raises(FastSAEError, match="the text and the tokenizer"):
        survey_of_store(source.sae, store, tokenizer, texts[::-1], show_progress=False, **OPTIONS)


def test_neurons_are_surveyed_beside_features(case, truth) -> None:
    source, tokenizer, texts = case
    sae = fastsae.SAE(d_in=24, d_sae=24, activation="relu", max_l0=24, apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(24))
        sae.W_dec.copy_(torch.eye(24))
    sources = [source, Source(sae, source.model, source.hook)]
    of_features, of_neurons = take_survey(sources, tokenizer, texts, show_progress=False, **OPTIONS)
    np.testing.assert_allclose(Cards(of_neurons).maximum(), truth.x.max(0), rtol=1e-5)
    np.testing.assert_allclose(Cards(of_features).maximum(), truth.f.max(0), rtol=1e-5)


def test_what_cannot_be_is_said(survey, tmp_path) -> None:
    cards = Cards(survey)
    with pytest.raises(FastSAEError, match="numbers from 0 to 39, got 40"):
        cards.top(40)
    with pytest.raises(FastSAEError, match="no proxy 'Thai'"):
        cards.overlap(0, "Thai")
    for number in (99, -1):
        with pytest.raises(FastSAEError, match=f"numbers below 2, got {number}"):
            cards.overlap(0, number)
    for ask in (cards.density, cards.maximum, cards.tokens, lambda half: cards.top(0, 1, half),
                lambda half: cards.random(0, 1, half), lambda half: cards.elsewhere(0, 1, half)):  # fmt: skip
        with pytest.raises(FastSAEError, match="half must be 0 .* got 2"):
            ask(2)
    with pytest.raises(FastSAEError, match="from 0 to 39, got 99"):
        cards.evidence(99, 0)
    (tmp_path / "x.npz").write_bytes(b"no")
    (tmp_path / "z.npz").touch()
    np.save(tmp_path / "w.npy", np.zeros(3))
    for name in ("x.npz", "y.npz", "z.npz", "w.npy"):
        with pytest.raises(FastSAEError, match="survey"):
            Survey.load(tmp_path / name)
    other = Survey(41, 24, survey.proxies, survey.config)
    with pytest.raises(FastSAEError, match="d_sae is 40 here and 41 there"):
        survey.merge(other)


def test_ranges_join_bins_exactly() -> None:
    from fastsae.analysis.histogram import Ranges, exponents, widened

    ranges = Ranges(1)
    values = np.array([0.03, 0.2, 0.5, 0.500001, 7.9, 8.0], dtype=np.float32)
    np.testing.assert_array_equal(exponents(values), [-5, -2, -1, 0, 3, 3])
    bins = np.zeros((1, 64))
    for value in values:
        new = np.maximum(ranges.exponent, exponents(np.array([value])))
        widened(bins, new.astype(np.int64) - ranges.exponent)
        ranges.exponent = new
        bins[0, ranges.place(np.array([0]), np.array([value]), 64)[0]] += 1
    want = np.histogram(np.ceil(values / 8 * 64) - 1, np.arange(65))[0]
    np.testing.assert_array_equal(bins[0], want)


def test_text_is_read_in_one_row() -> None:

    text = Text(tiny_lm.tokenizer(), ["ab", "", "c"])
    assert len(text) == 3 and text.first.tolist() == [0, 2, 2, 3] and text.document_of(2) == 2
    with pytest.raises(FastSAEError, match="every document is empty"):
        Text(tiny_lm.tokenizer(), ["", ""])
    with pytest.raises(FastSAEError, match="list of documents, got generator: read them into a list"):
        Text(tiny_lm.tokenizer(), (word for word in ["a"]))  # type: ignore[arg-type]
    with pytest.raises(FastSAEError, match="got str: put it into a list"):
        Text(tiny_lm.tokenizer(), "one text")
    halves = Text(tiny_lm.tokenizer(), ["a", "bc"]), Text(tiny_lm.tokenizer(), ["ab", "c"])
    assert halves[0].digest != halves[1].digest == Text(tiny_lm.tokenizer(), ["ab", "c"]).digest


def test_the_package_is_light_and_has_what_it_names() -> None:
    code = (
        "import sys, fastsae.analysis as a; assert all(hasattr(a, name) for name in a.__all__); "
        "heavy = {'scipy', 'sklearn', 'transformers', 'regex', 'matplotlib', 'plotly', 'umap', 'rich', 'tyro', "
        "'fastapi', 'openai', 'datasets'}; found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
