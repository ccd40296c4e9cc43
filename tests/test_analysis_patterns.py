"""Proxies that users make, and counts over chunks, against Python's own strings and regular expressions."""

import re
import unicodedata

import numpy as np
import pytest

from fastsae.analysis.labels import Spelling
from fastsae.analysis.proxies import (
    DEFAULT,
    HEX,
    Function,
    Regex,
    Script,
    TokenCounts,
    TokenSet,
    proxies,
    score_all,
)
from fastsae.errors import FastSAEError
from tests.test_analysis_labels import BYTES, spelling
from tests.test_analysis_proxies import ENGLISH, of_bytes


def test_a_regex_marks_the_tokens_inside_its_matches():
    text = spelling(b"in", b" 19", b"84", b"", b" or", b" 1", b"x", b"9", b" ", documents=[0] * 9)
    found = Regex("years", r"\d+").members(text)
    assert found.tolist() == [False, True, True, False, False, True, False, True, False]
    assert Regex("long", r"\d{4}").members(text).tolist() == [False, True, True] + [False] * 6


def test_a_match_does_not_cross_documents():
    text = spelling(b"1", b"2", b"3", documents=[0, 0, 1])
    assert Regex("three", r"123").members(text).tolist() == [False] * 3
    assert Regex("two", r"12$").members(text).tolist() == [True, True, False]
    assert Regex("begin", r"^3").members(text).tolist() == [False, False, True]


def test_part_of_a_matched_character_is_inside():
    han = "漢字".encode()
    text = spelling(b"a", han[:2], han[2:4], han[4:], b"b")
    assert Regex("han", "漢").members(text).tolist() == [False, True, False, False, False]
    assert Regex("both", "漢字").members(text).tolist() == [False, True, True, True, False]


def test_a_regex_agrees_with_python_on_bytes():
    document = "The 12 cats, born 1999, ate ½ of 3000 mice — naïve café 42"
    text = of_bytes(document.encode())
    inside = [False] * len(document)
    for match in re.finditer(r"\d+", document):
        inside[match.start() : match.end()] = [True] * len(match[0])
    wanted = [on for char, on in zip(document, inside, strict=True) for _ in char.encode()]
    assert Regex("digits", r"\d+").members(text).tolist() == wanted


def test_a_regex_that_cannot_be_meant():
    with pytest.raises(FastSAEError, match="regular expression, got '\\(a'"):
        Regex("bad", "(a")


def test_token_sets():
    text = spelling(b"the", b" the", b"The", b" of", b"other", b"the")
    assert TokenSet("x", ["the"]).members(text).tolist() == [True, True, False, False, False, True]
    assert TokenSet("x", [" the"]).members(text).tolist() == [False, True, False, False, False, False]
    number = int(text.token_ids[3])
    assert TokenSet("x", [number, "other"]).members(text).tolist() == [False, False, False, True, True, False]
    with pytest.raises(FastSAEError, match="'x'.*vocabulary of 5 has no entry 'them'"):
        TokenSet("x", ["them"]).members(text)
    with pytest.raises(FastSAEError, match="no entry 5;"):
        TokenSet("x", [5]).members(text)
    with pytest.raises(FastSAEError, match="at least one"):
        TokenSet("x", [])


def test_a_function_gives_spans_or_scores():
    text = spelling(b"aB", b"CD", b"e", b"FG", documents=[0, 0, 0, 1])
    spans = Function("capitals", lambda s: [(m.start(), m.end()) for m in re.finditer("[A-Z]+", s)])
    assert (spans.score(text) > 0).tolist() == [False, True, False, True]
    scores = Function("levels", lambda s: np.array([float(ord(c) - ord("C")) for c in s]))
    assert scores.score(text).tolist() == [ord("a") - ord("C"), 1, ord("e") - ord("C"), 4]
    assert TokenCounts.of([spans], text).members == {"capitals": 2}
    far = Function("far", lambda s: [(0, 10**6)] if "a" in s else [])
    assert (far.score(text) > 0).tolist() == [True, True, True, False]  # spans end with their document
    with pytest.raises(FastSAEError, match="each of 5 characters, got 1"):
        Function("short", lambda s: np.ones(1)).score(text)
    with pytest.raises(FastSAEError, match="spans or an array of scores, got bool"):
        Function("yes", lambda s: True).score(text)


def test_a_python_function_is_a_proxy_of_its_name():
    def capitals(text: str) -> list[tuple[int, int]]:
        return [(m.start(), m.end()) for m in re.finditer("[A-Z]+", text)]

    assert proxies([capitals, "Thai"]) == [Function("capitals", capitals), Script("Thai")]
    text = of_bytes(b"aBc")
    assert proxies([capitals])[0].score(text).tolist() == Function("capitals", capitals).score(text).tolist()
    for other in (5, Regex):
        with pytest.raises(FastSAEError, match="a function of the text or an object with name and score, got"):
            proxies([other])  # type: ignore[list-item]


def test_rare_scripts_are_unicodes_own():
    names = {"Linear B": "LINEAR B SYLLABLE", "Vithkuqi": "VITHKUQI", "Old Italic": "OLD ITALIC LETTER"}
    for name, word in names.items():
        letters = [chr(p) for p in range(0x10000, 0x10600) if unicodedata.name(chr(p), "").startswith(word)]
        assert letters
        text = spelling(*(letter.encode() for letter in letters), b"a", b" ")
        assert Script(name).members(text).tolist() == [True] * len(letters) + [False, False]


def test_hex():
    digest = b"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    text = of_bytes(ENGLISH, digest, digest.upper(), ENGLISH)
    found = HEX.score(text) > 0
    assert found[text.documents == 1].mean() > 0.9 and found[text.documents == 2].mean() > 0.9
    assert found[(text.documents == 0) | (text.documents == 3)].mean() < 0.005


def chunks() -> tuple[Spelling, list[Spelling]]:
    rng = np.random.default_rng(0)
    documents = [bytes(rng.integers(32, 127, size=50, dtype=np.uint8)) + "قطة 漢字 12 deadbeef42".encode()] * 3
    documents += [b"ACGTACGATCTTA and ABC", bytes(rng.integers(48, 123, size=80, dtype=np.uint8))]
    return of_bytes(*documents), [of_bytes(*documents[:2]), of_bytes(*documents[2:4]), of_bytes(*documents[4:])]


def test_scores_of_chunks_are_those_of_the_whole():
    whole, parts = chunks()
    papers = ("Arabic/paper", "base64/paper", "DNA/paper")
    chosen = proxies([*DEFAULT, "hex", *papers, r"digits=regex:\d+", "ids:65,66", "Vithkuqi"])
    chosen.append(Function("spaces", lambda s: [(m.start(), m.end()) for m in re.finditer(" +", s)]))
    counts, rest = (TokenCounts(chosen, len(BYTES)) for _ in range(2))
    counts.add(parts[0])
    for part in parts[1:]:
        rest.add(part)
    counts.merge(rest)
    assert counts.total == len(whole)
    found = np.concatenate([score_all(chosen, part, counts) for part in parts], axis=1)
    np.testing.assert_allclose(found, score_all(chosen, whole), rtol=1e-6)
    assert not np.allclose(found, np.concatenate([score_all(chosen, part) for part in parts], axis=1), rtol=1e-3)
    with pytest.raises(FastSAEError, match="'Thai' was not counted"):
        Script("Thai").score(whole, TokenCounts.of([], whole))
    with pytest.raises(FastSAEError, match="same proxies"):
        counts.merge(TokenCounts.of([], whole))


def test_names_on_the_command_line():
    years, tokens, ids = proxies([r"years=regex:[12]\d{3}", "tokens:the,of", "ids:5,17"])
    assert years == Regex("years", r"[12]\d{3}")
    assert (tokens.name, tokens.entries) == ("tokens:the,of", ("the", "of"))  # type: ignore[attr-defined]
    assert (ids.name, ids.entries) == ("ids:5,17", (5, 17))  # type: ignore[attr-defined]
    assert proxies(["regex:a=b:c"]) == [Regex("regex:a=b:c", "a=b:c")]
    assert [proxy.name for proxy in proxies(["HEX", "dna", "arabic", "Old Italic"])] == [
        "hex", "DNA", "Arabic", "Old Italic",
    ]  # fmt: skip
    with pytest.raises(FastSAEError, match="after regex:"):
        proxies(["regex:"])
    with pytest.raises(FastSAEError, match="numbers with commas.*tokens:a,b"):
        proxies(["ids:a,b"])
    with pytest.raises(FastSAEError, match="choose from base64"):
        proxies(["Latin}|a{"])
