"""Numbers that are hard to add up, batches with nothing in them, and what a survey leaves out or only estimates."""

from typing import Any

import numpy as np
import pytest
import torch

from fastsae.analysis import Cards, Source, Survey, SurveyConfig, Text, proxies, read, take_survey
from fastsae.analysis.windows import Entries
from tests import analysis_case
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


def test_neurons_far_from_zero_keep_their_digits(case) -> None:
    """A neuron with mean 1000 and standard deviation 1: sums of squares in float32 have no digit left of that."""
    source, tokenizer, texts = case
    rng = np.random.default_rng(0)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    reads = list(read([source], tokenizer, texts, context=32, batch_size=4))
    text = Text(tokenizer, texts, proxies(("Arabic",)))
    parts = [Survey(40, 24, ("Arabic",)) for _ in range(2)]
    for number, some in enumerate(reads):
        documents = some.documents.numpy()
        label = text.scores(documents, text.first[documents] + some.positions.numpy())[:, 0] > 0
        x = some.xs[0].numpy().copy()
        x[:, 0] = 1000 + rng.normal(0.4 * label, 1)
        x[:, 1] = -3e4 + 5 * x[:, 1]
        seen.append((x, label))
        parts[number % 2].add(some._replace(xs=(torch.from_numpy(x),)), text)
    parts[0].merge(parts[1])  # of different shifts
    x, label = (np.concatenate(part).astype(np.float64) for part in zip(*seen, strict=True))
    cards = Cards(parts[0])
    for d in (0, 1):
        want = np.corrcoef(x[:, d], label)[0, 1]
        assert cards.neuron_pearson()[d, 0] == pytest.approx(want, abs=2e-5)
    f = np.concatenate([some.codes[0].to_dense().numpy() for some in reads]).astype(np.float64)
    closest = cards.closest_neurons(24)
    assert closest is not None
    for k in np.flatnonzero(f.std(0) > 0):
        for d in (0, 1):
            (at,) = np.flatnonzero(closest.neurons[k] == d)
            assert closest.pearson[k, at] == pytest.approx(np.corrcoef(f[:, k], x[:, d])[0, 1], abs=2e-5)


def test_activations_add_up_beyond_what_float32_counts() -> None:
    survey = Survey(1, 1, (), SurveyConfig(categories=()))
    survey.ranges.exponent[:] = 0
    survey.sums["weight"][0, 0, -1] = 2**24
    zero = np.array([0])
    survey._count(Entries(zero, zero, np.ones(1, np.float32)), np.zeros(1, bool), np.zeros((1, 0), np.float32))
    assert survey.sums["weight"][0, 0, -1] == 2**24 + 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_batch_of_nothing_but_special_tokens(case, survey, batch_size: int) -> None:
    source, tokenizer, texts = case
    special = tokenizer.eos_token * 2
    some = [special, *texts[:4], special, special]
    options = but(batch_size=batch_size)
    (found,) = take_survey(source, tokenizer, some, show_progress=False, **options)
    (wanted,) = take_survey(source, tokenizer, texts[:4], show_progress=False, **options)
    np.testing.assert_array_equal(found.sums["fires"].sum(0), wanted.sums["fires"].sum(0))
    empty = next(iter(read([source], tokenizer, texts, context=32, batch_size=1)))
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = empty._replace(token_ids=nothing, documents=nothing, positions=nothing, xs=(torch.zeros(0, 24),))
    by_hand = Survey(40, 24, survey.proxies, survey.config)
    by_hand.add(empty, Text(tokenizer, texts, proxies(OPTIONS["categories"])))
    assert by_hand.batches == 1 and by_hand.sums["tokens"].sum() == 0


def test_pairs_of_a_wide_dictionary_are_estimated_from_a_sample(case, truth) -> None:
    source, tokenizer, texts = case

    def taken(**options: Any) -> Cards:
        return Cards(take_survey(source, tokenizer, texts, show_progress=False, **but(**options))[0])

    on = (truth.f > 0).astype(float)
    k = int(on.sum(0).argmax())
    everything = taken(cofiring_up_to=10)  # the sample holds all of so small a text
    assert everything.survey.sums["together"].size == 0
    exact = taken().cofiring(k, 40) or []
    wanted = {p.feature: p for p in exact if p.count > 1}
    assert {p.feature: p for p in everything.cofiring(k, 40) or []} == wanted
    few = taken(cofiring_up_to=10, cofiring_tokens=100)
    assert len(few.survey.pairs.places()) == 200
    first = (few.cofiring(k, 1) or [])[0]
    assert first.jaccard == pytest.approx(
        next(p.jaccard for p in exact if p.feature == first.feature), abs=0.15
    )
    rare = int(np.where(on.sum(0) > 0, on.sum(0), np.inf).argmin())
    assert on[:, rare].sum() > 200 or few.cofiring(rare) is not None
    halves = [
        take_survey(source, tokenizer, texts, show_progress=False, rank=r, world=2,
                    **but(cofiring_up_to=10, cofiring_tokens=100))[0] for r in range(2)
    ]  # fmt: skip
    halves[0].merge(halves[1])
    assert Cards(halves[0]).cofiring(k, 5) == few.cofiring(k, 5)
    assert taken(cofiring_up_to=0).cofiring(k) is None


def test_what_is_left_out_is_said(case, truth) -> None:
    source, tokenizer, texts = case
    (left,) = take_survey(source, tokenizer, texts, show_progress=False, **OPTIONS, cofiring_up_to=0, neuron_memory=0.0)
    cards = Cards(left)
    assert cards.closest_neurons() is None
    neurons, pairs = cards.notes()
    assert "more than neuron_memory = 0" in neurons and "not counted" in pairs
    (sampled,) = take_survey(source, tokenizer, texts, show_progress=False, **OPTIONS, cofiring_up_to=3)
    assert f"estimated from {len(truth.ids):,} tokens" in Cards(sampled).notes()[0]
    k = int((truth.f > 0).sum(0).argmax())
    dense = Cards(take_survey(source, tokenizer, texts, show_progress=False, **but(around=15))[0])
    assert dense.notes() == []
    assert not dense.random(k, 1, silent=True) and "there are no silent ones" in dense.notes(k)[0]
