"""Chains of features: a model and text in which a planted automaton runs, and counts by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.analysis.automata import Automaton, automata
from fastsae.analysis.stream import Source
from fastsae.analysis.text import scoring_half
from fastsae.errors import FastSAEError
from fastsae.sae import SAE
from tests import tiny_lm

TOKENIZER = tiny_lm.tokenizer()
LETTERS = "abcdxy"
IDS = [TOKENIZER(letter).input_ids[0] for letter in LETTERS]


class Bigrams(torch.nn.Module):
    """One-hot of the token at `state`, and behind it the planted logits: a → b → c → a, d → d, x → y."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.head = torch.nn.Identity(), torch.nn.Linear(257, 257, bias=False)
        with torch.no_grad():
            self.head.weight.zero_()
            for now, then in ("ab", "bc", "ca", "dd", "xy"):
                self.head.weight[IDS[LETTERS.index(then)], IDS[LETTERS.index(now)]] = 5.0

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.state(torch.nn.functional.one_hot(input_ids, 257).float())))


def dictionary() -> SAE:
    """Feature j fires on LETTERS[j]; 6 on every letter; 7 on nothing."""
    sae = SAE(d_in=257, d_sae=8, activation="relu")
    with torch.no_grad():
        sae.encoder.weight.zero_()
        sae.encoder.bias.fill_(-0.5)
        sae.W_dec.zero_()
        for j, i in enumerate(IDS):
            sae.encoder.weight[j, i] = sae.W_dec[j, i] = 1.0
            sae.encoder.weight[6, i] = 1.0
        sae.W_dec[6:, 200] = 1.0
    return sae


def texts() -> list[str]:
    """Runs of the automaton, mixed with other letters; y comes alone more often than behind x."""
    rng = np.random.default_rng(0)
    words = ["abcabcabc", "dddd", "xy", "y", "y", "qrs", "ax"]
    return ["".join(rng.choice(words, 12)) for _ in range(60)]


SOURCE = Source(dictionary(), Bigrams(), "state")


def run(**options: Any) -> Automaton:
    return automata(SOURCE, TOKENIZER, texts(), **({"context": 40, "batch_size": 7, "show_progress": False} | options))


def test_the_planted_automaton_is_found():
    found = run()
    assert found.features.tolist() == [0, 1, 2, 3, 4, 5, 6] and not found.sampled
    assert {(e.source, e.target) for e in found.edges if 6 not in (e.source, e.target)} == {
        *((0, 1), (1, 2), (2, 0), (3, 3), (4, 5))
    }
    assert sorted(found.cycles(), key=str) == [[0, 1, 2], [3]]
    assert found.cycles(length=2) == [[3]]
    chain = found.chains(0, length=3)[0]
    assert [edge.target for edge in chain] == [1, 2, 0]
    assert [[edge.target for edge in path] for path in found.chains(4)] == [[5]]
    assert found.chains(5) == []


def test_the_papers_step_goes_by_the_top_logit_token():
    found = run()
    for now, then in ((0, 1), (1, 2), (2, 0), (3, 3), (4, 5)):
        step = found.steps[now]
        assert (step.token, step.target) == (IDS[then], then) and step.f1 == 1.0
        assert step.weight == pytest.approx(5.0, rel=1e-3)


def test_numbers_are_those_counted_by_hand():
    found = run(context=30)  # documents are cut: a pair across the cut is no pair
    edge = {(e.source, e.target): e for e in found.edges}[4, 5]
    follow, now, before, links = torch.zeros(4, 2)
    for text, half in zip(texts(), scoring_half(texts()), strict=True):
        for start in range(0, len(text), 29):  # the begin-of-text token takes one place
            piece = text[start : start + 29]
            pairs = list(zip(piece, piece[1:], strict=False))
            links[int(half)] += len(pairs)
            follow[int(half)] += sum(p == ("x", "y") for p in pairs)
            now[int(half)] += sum(p[0] == "x" for p in pairs)
            before[int(half)] += sum(p[1] == "y" for p in pairs)
    assert found.tokens == sum(map(len, texts()))
    assert edge.probability == pytest.approx(float(follow[0] / now[0])) and 0 < edge.probability < 1
    excess = follow / now - before / links
    assert (edge.excess, edge.excess_held_out) == pytest.approx(tuple(excess.tolist())) and edge.pairs == follow[0]
    # x's logit weights over the tokenizer's vocabulary, and y fires on y only
    w = torch.zeros(257, dtype=torch.float64)
    w[IDS[5]] = 5.0
    assert edge.logit == pytest.approx(float(w[IDS[5]] / w.std()), rel=1e-3)
    assert edge.strength == pytest.approx(edge.excess * edge.logit)
    assert found.fires[found.features == 4].item() == sum(text.count("x") for text in texts())


def test_what_the_text_does_but_the_model_does_not_is_no_edge():
    """a is often followed by x here ("ax"), but a's logit weights say nothing of x."""
    assert all((e.source, e.target) != (0, 4) for e in run(min_excess=0.01).edges)
    assert run(min_excess=0.99).edges == () == run(min_logit=100.0).edges
    assert {(e.source, e.target) for e in run(min_excess=0.7).edges} < {(e.source, e.target) for e in run().edges}


def test_chance_does_not_pass_for_a_transition():
    """ "xy" only where transitions are chosen: the other half tells; and a pair seen too seldom is none."""
    documents = [SimpleNamespace(text=text, kind=str(number)) for number, text in enumerate(texts())]
    for document, half in zip(documents, scoring_half(documents), strict=True):  # by kind first: the halves stay
        document.text = document.text.replace("xy", "xc") if half else document.text
    options: dict = {"context": 40, "show_progress": False}
    found = automata(SOURCE, TOKENIZER, documents, **options)
    edges = {(e.source, e.target): e for e in found.edges}
    edge, sure = edges[4, 5], edges[0, 1]
    assert edge.excess > 0.3 and edge.excess_held_out is not None and edge.excess_held_out < 0 < 10 <= edge.pairs
    assert sure.excess_held_out == pytest.approx(sure.excess, abs=0.1)
    assert 0 < found.held_out()["kept"] < 1
    more = automata(SOURCE, TOKENIZER, documents, min_pairs=edge.pairs + 1, **options)
    assert (4, 5) not in {(e.source, e.target) for e in more.edges} and found.to_dict()["held_out"]["kept"] < 1
    alone = automata(SOURCE, TOKENIZER, ["abcabc" * 20], **options)  # one document: there is no other half
    assert alone.edges and {edge.excess_held_out for edge in alone.edges} == {None} and alone.held_out() == {}


def test_states_can_be_chosen_or_sampled():
    assert run(features=[0, 1, 4]).features.tolist() == [0, 1, 4]
    assert {(e.source, e.target) for e in run(features=[0, 1, 4]).edges} == {(0, 1)}
    few = run(memory=4 * 8 * (8 + 257) / 2**30)
    assert few.sampled and len(few.features) <= 4


def test_an_automaton_is_json(tmp_path):
    run().save(tmp_path / "automaton.json")
    values = json.loads((tmp_path / "automaton.json").read_text())
    assert [0, 1, 2] in values["cycles"] and len(values["nodes"]) == 7
    names = {"source", "target", "probability", "excess", "logit", "strength", "token", "pairs", "excess_held_out"}
    assert names == set(values["edges"][0])
    held_out = values["held_out"]
    assert held_out["transitions"] == len(values["edges"]) and held_out["kept"] == 1
    assert held_out["excess_held_out"] == pytest.approx(np.median([e["excess_held_out"] for e in values["edges"]]))


def test_bad_input_is_one_line():
    cases: list[tuple[str, Any]] = [
        ("numbers from 0 to 7, got 8", lambda: run(features=[8])),
        ("min_fires must be at least 1", lambda: run(min_fires=0)),
        ("min_pairs must be at least 1", lambda: run(min_pairs=0)),
        ("did you mean min_excess", lambda: run(min_exces=0)),
        ("feature 7 is no state", lambda: run().chains(7)),
        ("raise memory", lambda: run(memory=1e-9)),
    ]
    for message, action in cases:
        with pytest.raises(FastSAEError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)


def test_the_token_between_two_features():
    """The one that the first makes likelier and on which the second fires; it is spelt where that is asked for."""
    found = run()
    between = {(e.source, e.target): e.token for e in found.edges}
    for source, target in ((0, 1), (1, 2), (2, 0), (3, 3), (4, 5)):
        assert between[source, target] == IDS[target]
    written = found.to_dict(spelled=lambda token: f"<{token}>")
    assert all(edge["text"] == f"<{edge['token']}>" for edge in written["edges"])
    assert written["nodes"][0]["step"]["text"] == f"<{IDS[1]}>"
