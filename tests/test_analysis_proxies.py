"""Proxies against the formulas written out."""

import base64
import math
import random
import time

import numpy as np
import pytest

from fastsae.analysis.labels import Spelling, TokenBytes
from fastsae.analysis.proxies import BASE64, DEFAULT, DNA, Charset, Script, proxies, score_all
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
        for begin in range(max(0, end - proxy.max_tokens + 1), end - proxy.min_tokens + 2):
            s, ids = "".join(pieces[begin : end + 1]), text.token_ids[begin : end + 1]
            legal = all(piece and set(piece) <= set(proxy.alphabet) for piece in pieces[begin : end + 1])
            whole = all(set(s) & set(part) for part in proxy.classes)
            if legal and whole and text.documents[begin] == text.documents[end]:
                gain = -len(s) * math.log(len(proxy.alphabet)) - sum(math.log(p[i]) for i in ids)
                best = max(best, gain)
        result.append(best)
    return result


@pytest.mark.parametrize("proxy", [DNA, Charset("x", "ACGTac", ("AC", "ac"), 2, 4), Charset("one", "ACGT", (), 1, 3)])
def test_a_charset_is_the_best_string_that_ends_at_the_token(proxy: Charset):
    rng = random.Random(0)
    tokens = [rng.choice([b"A", b"CG", b"T", b" x", b"ac", b"GAT", b"\n"]) for _ in range(60)]
    text = spelling(*tokens, documents=[n // 25 for n in range(60)])
    np.testing.assert_allclose(proxy.score(text), directly(proxy, text), rtol=1e-5)


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
