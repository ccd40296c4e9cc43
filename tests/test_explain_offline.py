"""The offline explainer finds what was planted, and nothing where nothing was."""

import json

import numpy as np
import pytest

from fastsae.analysis.explain import OfflineExplainer, Pattern, explain, find_pattern
from fastsae.analysis.explain.pattern import Atom, Rule
from fastsae.analysis.labels import Spelling
from fastsae.analysis.proxies import proxies
from fastsae.errors import FastSAEError
from tests import explain_case
from tests.explain_case import RULES

WORDS = {
    "token": "the token ` which`",
    "bigram": "the token ` of` after the tokens ` the`, ` it` or ` that`",
    "script": "tokens in Arabic script",
    "capital": "capitalised tokens",
    "after": "any token after the token `,`",
    "suffix": "tokens that end with “e”",
}


@pytest.fixture(scope="module")
def bytes_of():
    return explain_case.bytes_of()


@pytest.mark.parametrize("name", list(RULES))
def test_a_planted_feature_is_found(name, bytes_of):
    """On a third text, which nobody has seen, the pattern is on where the rule is."""
    pattern = find_pattern(explain_case.halves(RULES[name])[0], bytes_of)
    ids = explain_case.text(40, seed=77)
    documents = np.repeat(np.arange(len(ids)), ids.shape[1])
    spelling = Spelling.of(ids.ravel(), documents, bytes_of)
    true = explain_case.activations(ids, RULES[name], noise=0.0).ravel() > 0
    found = pattern.score(spelling) > 0
    assert (found & true).sum() > 0.9 * true.sum() and (found & ~true).sum() < 0.08 * true.sum()
    assert (found == (pattern.level(spelling) > 0)).all()
    if name in WORDS:
        assert pattern.name == WORDS[name]


def test_levels_follow_the_token(bytes_of):
    """`set` is three times as strong on ` two` as on ` one`."""
    pattern = find_pattern(explain_case.halves(RULES["set"])[0], bytes_of)
    ids = np.array([explain_case.PIECES.index(p) for p in (" one", " first", " two", " the")])
    one, first, two, the = pattern.level(Spelling.of(ids, np.zeros(4, dtype=int), bytes_of))
    assert the == 0 < one < first < two


def test_random_features_have_no_pattern(bytes_of):
    pairs = [explain_case.random_halves(k, density) for k in range(20) for density in (0.003, 0.03)]
    results = explain(pairs, OfflineExplainer(), bytes_of, show_progress=False)
    scores = np.array([r.spearman for r in results], dtype=float)
    assert np.abs(scores).max() < 0.25 and abs(scores.mean()) < 0.02
    assert sum(r.explanation != "no pattern found" for r in results) <= 4


def test_planted_features_score_by_the_same_protocol(bytes_of):
    pairs = [explain_case.halves(rule, k) for k, rule in enumerate(RULES.values())]
    results = explain(pairs, OfflineExplainer(), bytes_of, show_progress=False)
    for result in results:
        assert result.spearman is not None and result.spearman > 0.85, result.explanation
        assert result.detection is not None and result.detection > 0.9
        assert result.fuzzing is not None and result.fuzzing > 0.9
        assert result.failed is None and result.accounting.requests == 0


def test_a_pattern_survives_json_and_other_tokenizers(bytes_of):
    half = explain_case.BYTES[-1]
    pattern = Pattern((
        Rule((Atom("token", (half, b" of", b"\n"), 0), Atom("near", (b",",), -3)), 4.0, (1.0, 2.0, 3.0)),
        Rule((Atom("script", ("Arabic",)), Atom("class", ("space",), -1)), 2.0),
        Rule((Atom("word", ("the",)),), 1.0),
    ))
    again = Pattern.from_json(json.loads(json.dumps(pattern.to_json())))
    assert again == pattern and again.name == pattern.name
    shuffled = np.random.default_rng(0).permutation(len(explain_case.BYTES))
    other = type(bytes_of)(
        np.frombuffer(b"".join(explain_case.BYTES[i] for i in shuffled), dtype=np.uint8),
        np.cumsum([0, *(len(explain_case.BYTES[i]) for i in shuffled)], dtype=np.int64),
    )
    ids = explain_case.text(10, seed=5)
    documents = np.repeat(np.arange(10), ids.shape[1])
    back = np.argsort(shuffled)
    here = pattern.level(Spelling.of(ids.ravel(), documents, bytes_of))
    there = again.level(Spelling.of(back[ids.ravel()], documents, other))
    assert (here == there).all() and len(np.unique(here)) >= 3


def test_a_pattern_is_a_proxy(bytes_of):
    pattern = Pattern((Rule((Atom("script", ("Arabic",)),), 9.0),))
    ids = explain_case.text(20, seed=6)
    spelling = Spelling.of(ids.ravel(), np.repeat(np.arange(20), ids.shape[1]), bytes_of)
    (proxy,) = proxies([pattern])
    (arabic,) = proxies(["Arabic"])
    np.testing.assert_allclose(proxy.score(spelling), arabic.score(spelling), rtol=1e-6)


def test_conditions_do_not_reach_into_the_document_before(bytes_of):
    comma, the = explain_case.PIECES.index(","), explain_case.PIECES.index(" the")
    pattern = Pattern((Rule((Atom("token", (b",",), -1),), 5.0),))
    spelling = Spelling.of(np.array([comma, the, comma, the]), np.array([0, 0, 0, 1]), bytes_of)
    assert pattern.level(spelling).tolist() == [0, 5, 0, 0]
    gap = Pattern((Rule((Atom("near", (b",",), -2),), 5.0),))
    same = Spelling.of(np.array([comma, the, the, the]), np.zeros(4, dtype=int), bytes_of)
    assert gap.level(same).tolist() == [0, 5, 5, 0]


@pytest.mark.parametrize("atom", [("eval", 0, "1"), ("class", 0, "no"), ("token", 2, "a"), None])
def test_what_is_no_pattern_is_one_line(atom):
    bad: dict = {"rules": None}
    if atom is not None:
        kind, offset, value = atom
        condition = {"kind": kind, "offset": offset, "values": [value]}
        bad = {"rules": [{"atoms": [condition], "level": 1, "by_value": []}]}
    with pytest.raises(FastSAEError) as caught:
        Pattern.from_json(bad)
    assert "\n" not in str(caught.value)


def test_a_description_is_one_line_without_controls():
    """Tokens hold line breaks and escapes; a description is shown on a terminal and in a table."""
    atoms = (
        Atom("token", (b"x\n", b"\x1b[31m", b"\n\n", "\u3000".encode())),
        Atom("near", (b"a\tb", b" \xc2\x9b"), -2),
        Atom("word", ("a\x00b",), -1),
    )
    said = Rule(atoms, 5.0).describe()
    for shown in ("`x\\n`", "`\\x1b[31m`", "`\\n\\n`", "`\\u3000`", "`a\\tb`", "` \\x9b`", "“a\\x00b”"):
        assert shown in said
    assert said.isprintable() and Atom("suffix", ("e\r",)).describe() == "tokens that end with “e\\r”"
    assert Atom("token", (" می\u200cروم".encode(),)).describe() == "the token ` می\u200cروم`"
