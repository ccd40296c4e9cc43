"""Proxies against the formulas written out."""

import base64
import math
import random
import time

import numpy as np
import pytest

from fastsae.analysis.labels import Spelling, TokenBytes
from fastsae.analysis.proxies import BASE64, DEFAULT, DNA, PAPER, Charset, Script, TokenCounts, proxies, score_all
from fastsae.analysis.scripts import SCRIPTS
from fastsae.errors import FastSAEError
from tests.test_analysis_labels import BYTES, spelling


def of_bytes(*documents: bytes) -> Spelling:
    """Texts whose tokens are single bytes."""
    ids = np.frombuffer(b"".join(documents), dtype=np.uint8).astype(np.int64)
    return Spelling.of(ids, np.repeat(np.arange(len(documents)), [len(d) for d in documents]), BYTES)


def directly(proxy: Charset, text: Spelling) -> list[float]:
    """max over strings that end at n of Σ −characters · log |alphabet| − log p, written as loops."""
    counts = np.bincount(text.token_ids, minlength=len(text.bytes_of)) + 1
    p = counts / counts.sum()
    pieces = [text.bytes_of[i].decode("latin-1") for i in text.token_ids]
    result = []
    for end in range(len(text)):
        best = math.log(1e-10)
        for begin in range(max(0, end - (proxy.max_tokens or len(text)) + 1), end - proxy.min_tokens + 2):
            s, ids = "".join(pieces[begin : end + 1]), text.token_ids[begin : end + 1]
            legal = all(piece and set(piece) <= set(proxy.alphabet) for piece in pieces[begin : end + 1])
            whole = all(set(s) & set(part) for part in proxy.classes)
            if legal and whole and text.documents[begin] == text.documents[end]:
                gain = -len(s) * math.log(len(proxy.alphabet)) - sum(math.log(p[i]) for i in ids)
                best = max(best, gain)
        result.append(best)
    return result


CHARSETS = [
    DNA, *PAPER, Charset("x", "ACGTac", ("AC", "ac"), 2, 4), Charset("one", "ACGT", (), 1, 3),
    Charset("three", "ACGT", (), 3, None),
]  # fmt: skip


@pytest.mark.parametrize("proxy", CHARSETS)
def test_a_charset_is_the_best_string_that_ends_at_the_token(proxy: Charset):
    rng = random.Random(0)
    tokens = [rng.choice([b"A", b"CG", b"T", b" x", b"ac", b"GAT", b"\n"]) for _ in range(60)]
    text = spelling(*tokens, documents=[n // 25 for n in range(60)])
    np.testing.assert_allclose(proxy.score(text), directly(proxy, text), rtol=1e-5)
    assert proxy.score(spelling(b"A")).shape == (1,) and proxy.score(of_bytes(b"")).shape == (0,)


def test_a_run_does_not_cross_documents():
    proxy = Charset("x", "AB", (), 4, 8)
    noise = bytes(range(32, 60)) * 20
    assert (proxy.score(of_bytes(b"ABAB" + noise))[3:4] > 0).all()
    assert (proxy.score(of_bytes(b"AB", b"AB" + noise)) < 0).all()


def test_a_script_is_the_share_of_its_tokens_as_odds():
    text = spelling("ب".encode(), b"a", b"b", b" ")
    score = Script("Arabic").score(text)
    prior = 2 / 6  # one of four tokens, with one more seen of either kind
    np.testing.assert_allclose(score[0], -math.log(prior), rtol=1e-6)
    np.testing.assert_allclose(score[1:], math.log(1e-10 / prior), rtol=1e-6)


def test_in_the_papers_form_a_part_of_a_character_is_what_that_entry_is_elsewhere():
    ba, word = "ب".encode(), "كتاب".encode()  # D8 A8: Arabic letters; D5 A1: an Armenian one
    tokens = [ba[:1], ba[1:], "\u0561".encode()[:1], "\u0561".encode()[1:], ba[:1], b"\xa8", b" ", word, b" x", b"y"]
    tokens += [b"\xc2", b"\xa8", *[b"z"] * 8]  # ¨: the second byte is that of ba
    text = spelling(*tokens)
    ours, paper = Script("Arabic"), Script("Arabic/paper", "fraction", "Arabic")
    assert ours.members(text).tolist() == paper.members(text).tolist()
    prior = (5 + 1) / (20 + 2)
    given = [1, 2 / 3, 1e-10, 1e-10, 1, 2 / 3, 1e-10, 1, 1e-10, 1e-10, 1e-10, 2 / 3, *[1e-10] * 8]
    np.testing.assert_allclose(paper.score(text), np.log(np.array(given) / prior), rtol=1e-5)
    assert (paper.score(text) > 0)[11] and not (ours.score(text) > 0)[11]
    counts = TokenCounts([ours, paper], len(text.bytes_of))
    assert list(counts.by_token) == ["Arabic/paper"]
    half = Spelling.of(text.token_ids[10:], text.documents[10:], text.bytes_of)
    for part in (Spelling.of(text.token_ids[:10], text.documents[:10], text.bytes_of), half):
        other = TokenCounts([ours, paper], len(text.bytes_of))
        other.add(part)
        counts.merge(other)
    np.testing.assert_array_equal(paper.score(half, counts), paper.score(text)[10:])
    with pytest.raises(FastSAEError, match="was not counted"):
        paper.score(half, TokenCounts.of([ours], text))
    with pytest.raises(FastSAEError, match="same proxies"):
        counts.merge(TokenCounts.of([ours], text))


def test_base64_in_the_papers_form_takes_a_letter_alone():
    text = of_bytes(ENGLISH, _blob(1), ENGLISH)
    ours, paper = (proxy.score(text) > 0 for proxy in (BASE64, PAPER[0]))
    blob = text.documents == 1
    assert paper[blob].mean() > 0.9 and paper[~blob].mean() > 0.1 > 10 * ours[~blob].mean()


ENGLISH = (
    b"It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    b"wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    b"this truth is so well fixed in the minds of the surrounding families. def getElementById(self, MAX_SIZE_2): "
    b"return XMLHttpRequest().setRequestHeader(contentType) "
) * 8


def _blob(seed: int) -> bytes:
    return base64.b64encode(random.Random(seed).randbytes(300))[:400]


def test_base64_is_told_from_prose_and_names():
    text = of_bytes(ENGLISH, _blob(1), ENGLISH)
    found = BASE64.score(text) > 0
    blob = text.documents == 1
    assert found[blob].mean() > 0.9
    assert found[~blob].mean() < 0.01


def test_dna_is_told_from_prose_and_base64():
    letters = "".join(random.Random(2).choices("ACGT", k=400)).encode()
    text = of_bytes(ENGLISH, letters, _blob(3), ENGLISH)
    found = DNA.score(text) > 0
    assert found[text.documents == 1].mean() > 0.9
    assert found[text.documents == 2].mean() < 0.06  # two of A, C, G, T in a row: (4/64)² · 2
    assert found[(text.documents == 0) | (text.documents == 3)].mean() < 0.01


def test_names():
    assert [proxy.name for proxy in proxies()] == list(DEFAULT)
    assert [proxy.name for proxy in proxies(SCRIPTS)] == list(SCRIPTS)
    mine = Charset("hex", "0123456789abcdef")
    assert proxies([mine, "Thai"]) == [mine, Script("Thai")]
    assert proxies(["arabic/Paper", "BASE64/paper", "Vithkuqi/paper"]) == [
        Script("Arabic/paper", "fraction", "Arabic"), PAPER[0], Script("Vithkuqi/paper", "fraction", "Vithkuqi"),
    ]  # fmt: skip
    for name in ("hex/paper", "/paper", "Arabic/ours", "Klingon/paper"):
        with pytest.raises(FastSAEError, match=f"got '{name}'"):
            proxies([name])
    with pytest.raises(FastSAEError, match="got 'half'"):
        Script("Arabic", "half")  # type: ignore[arg-type]
    with pytest.raises(FastSAEError, match="needs max_tokens"):
        Charset("x", "AB", ("A", "B"), 2, None)
    with pytest.raises(FastSAEError, match="got 3 and 2"):
        Charset("x", "AB", (), 3, 2)
    with pytest.raises(FastSAEError, match="got 'Klingon'.*choose from base64, DNA, Arabic"):
        proxies(["Klingon"])
    with pytest.raises(FastSAEError, match="once, got Thai, Thai"):
        proxies(["Thai", "Thai"])


def test_half_a_million_tokens_in_seconds():
    rng = np.random.default_rng(0)
    table = TokenBytes(rng.integers(0, 256, 12_000, dtype=np.uint8), np.arange(0, 12_001, 4))
    ids = rng.integers(0, 3000, 500_000)
    begun = time.process_time()
    scores = score_all(proxies(), Spelling.of(ids, np.repeat(np.arange(500), 1000), table))
    assert scores.shape == (len(DEFAULT), 500_000) and scores.dtype == np.float32
    assert time.process_time() - begun < 10  # seconds; about 2 on a laptop's core
