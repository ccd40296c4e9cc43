"""A survey of as many features as wanted, made of random numbers: for the site's tests and measurements.

    facts = site_case.facts(32_768)

Vectorised, so that tens of thousands of features take seconds; the shapes and amounts are those of a real survey that
kept as much as it may: 20 strongest, 20 weakest, 64 from all of the range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastsae.analysis.cards import Cards
from fastsae.analysis.histogram import exponents
from fastsae.analysis.kept import Kept
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.quality import UltraLow
from fastsae.analysis.splitting import Edges, FeatureMap, Split
from fastsae.analysis.survey import BINS, STRATA, Survey, SurveyConfig
from fastsae.analysis.universality import Match
from fastsae.dashboard.facts import LOGIT_BINS, Explained, Facts, Logits, Neighbours

HOSTILE = [
    "<script>alert(1)</script>", "</script>", "<img src=x onerror=alert(1)>", "\"'><b>", "&lt;", "javascript:alert(1)",
    "\u202egnp.exe", "\u2028", "\x00\x1b[31m", "\x7f", "\x80", "');fastsae.put('x", "${1}", "\\u003c", "__proto__",
    "\ufeff",
]  # fmt: skip
WORDS = "the cat sat on a mat قطة على سجادة и собака бежит в город שלום עולם 猫 が 座 る".split()
PARTS = [bytes([byte]) for byte in "ق".encode()]  # a character in two tokens
TOKENS = 2_000_000
PROXIES = ("Arabic", "Hebrew", "Cyrillic", "Greek", "Han", "Kana", "Hangul", "Devanagari", "Thai", "base64", "DNA")


def vocabulary(size: int = 2000) -> TokenBytes:
    """Two halves of an Arabic letter, then the hostile tokens, then words with
    numbers, of six bytes in the mean: somewhat more than tokens of English have, and less than Arabic ones."""
    pieces = [*PARTS, *(text.encode() for text in HOSTILE)]
    pieces += [f" {WORDS[i % len(WORDS)][:3]}{i // len(WORDS):x}".encode() for i in range(size - len(pieces))]
    return TokenBytes(np.frombuffer(b"".join(pieces), dtype=np.uint8), np.cumsum([0, *map(len, pieces)]))


def survey(F: int, V: int = 2000, D: int = 64, seed: int = 0, proxies: tuple[str, ...] = PROXIES) -> Survey:
    """Every tenth feature is ultra-low, every fiftieth dead."""
    rng = np.random.default_rng(seed)
    made = Survey(F, D, proxies, SurveyConfig())
    sums = made.sums
    live = np.arange(F) % 50 != 49
    density = np.where(np.arange(F) % 10 == 3, 10 ** rng.normal(-5.6, 0.2, F), 10 ** rng.normal(-3.2, 0.5, F))
    fires = np.maximum(1, (np.minimum(density, 0.5) * TOKENS).astype(np.int64)) * live
    sums["tokens"][:] = TOKENS // 2
    sums["fires"][0], sums["fires"][1] = fires - fires // 2, fires // 2
    maximum = (rng.uniform(2, 30, F) * live).astype(np.float32)
    made.maximum[:] = maximum, 0.9 * maximum
    made.ranges.exponent = exponents(maximum)
    bins = np.exp(-np.linspace(0, 6, BINS // 2))
    sums["histogram"][0, :, : BINS // 2] = (bins / bins.sum() * fires[:, None]).astype(np.int32)
    sums["f"][:] = fires / 2 * maximum / 4
    sums["ff"][:] = sums["f"] * maximum / 3
    sums["p"][:] = rng.integers(100, TOKENS // 100, (2, len(proxies)))
    sums["fp"][:] = sums["f"][:, :, None] * rng.uniform(0, 1, (2, F, len(proxies))) ** 4
    sums["x"][:], sums["xx"][:] = TOKENS / 4, TOKENS
    if sums["fx"].size:
        sums["fx"][:] = rng.uniform(0, 1, sums["fx"].shape) * sums["f"].sum(0)[:, None]
    if sums["together"].size:
        sums["together"][:] = rng.integers(0, 5, (F, F)) * np.outer(live, live)
    made.first = np.arange(0, TOKENS + 1, 1000)
    made.batches = 1
    numbers = np.flatnonzero(live).astype(np.int32)
    kept = {"top": (20, 0.8, 1.0), "bottom": (20, 1e-3, 0.05), "sampled": (4 * STRATA, 1e-3, 1.0)}
    for name, (count, low, high) in kept.items():
        _fill(getattr(made, name), rng, numbers, count, maximum, (low, high), V, name)
    if made.pairs_sampled:
        _fill_pairs(made, rng, numbers)
    return made


def _fill(
    table: Kept, rng: np.random.Generator, features: np.ndarray, count: int, maximum: np.ndarray,
    share: tuple[float, float], V: int, name: str,
) -> None:  # fmt: skip
    M, W = len(features) * count, 2 * table.around + 1
    feature = np.repeat(features, count)
    place = np.tile(np.arange(count), len(features))
    value = (maximum[feature] * rng.uniform(*share, M)).astype(np.float32)
    window = (rng.uniform(0, 1, (M, W)) * (rng.uniform(0, 1, (M, W)) < 0.12) * value[:, None]).astype(np.float32)
    window[:, table.around] = value
    keys = {"top": -value, "bottom": value, "sampled": rng.uniform(0, 1, M)}
    ids = (V ** rng.uniform(0, 1, (M, W)) - 1).astype(np.int32)  # Zipf's law
    table.load({
        "feature": feature, "half": place % 2 == 1, "value": value, "key": keys[name].astype(np.float64),
        "where": rng.integers(0, TOKENS, M), "window": window, "ids": ids,
    })  # fmt: skip


def _fill_pairs(made: Survey, rng: np.random.Generator, features: np.ndarray, active: int = 12) -> None:
    """On each token of the sample that many of 32 features that lie together, so that features have partners."""
    M = 2 * made.config.cofiring_tokens
    begin = 32 * rng.integers(0, len(features) // 32, M)
    first = rng.integers(0, 32, M)
    of_token = (first[:, None] + 5 * np.arange(active)) % 32  # different ones, as 5 and 32 have no common factor
    made.pairs.load({
        "where": np.arange(M), "key": rng.uniform(0, 1, M), "half": np.arange(M) % 2 == 1,
        "ids": np.zeros((M, 1), np.int32), "entries": np.full(M, active), "at": np.zeros(M * active, np.int16),
        "feature": features[begin[:, None] + of_token].reshape(-1), "value": np.ones(M * active, np.float32),
    })  # fmt: skip


def facts(F: int = 100, V: int = 2000, seed: int = 0, **changes: Any) -> Facts:
    """Everything the site can show, of a dictionary of F features beside one of F / 4."""
    rng = np.random.default_rng(seed + 1)
    made = survey(F, V, seed=seed)
    cards, bytes_of, k = Cards(made), vocabulary(V), 10
    low = torch.from_numpy((np.arange(F) % 10 == 3) & (np.arange(F) % 50 != 49))
    values = np.sort(rng.uniform(0, 3, (F, k)))[:, ::-1]
    counts = rng.multinomial(V, np.full(LOGIT_BINS, 1 / LOGIT_BINS), F)
    parents = torch.arange(F) // 4
    given: dict[str, Any] = {
        "cards": cards,
        "bytes_of": bytes_of,
        "hook": "model.layers.3.mlp",
        "results": {"quality": {"a": {"eval": {"l0": 12.0, "fve": 0.8}}}, "categories": [
            {"name": name, "feature": p, "pearson": 0.7, "neuron_pearson": 0.3, "specificity": 0.8, "base_rate": 0.01}
            for p, name in enumerate(PROXIES)
        ], "left_out": [{"name": "hex <b>", "tokens": [3, 1200]}]},
        "logits": Logits(rng.integers(0, V, (F, k)), values, rng.integers(0, V, (F, k)), -values, -values[:, 0],
                         values[:, 0], counts),
        "neighbours": Neighbours(rng.integers(0, F, (F, k)), values / 3),
        "match": _match(F, rng),
        "split": Split(TOKENS, 0.4, (torch.full((F // 4,), 0.01), torch.full((F,), 0.001)), (
            Edges(parents[: F // 4 * 4], torch.arange(F // 4 * 4), torch.linspace(0.99, 0.41, F // 4 * 4)),
        )),
        "layer": 1,
        "map": FeatureMap(np.ones(F, np.int64), np.arange(F), rng.normal(0, 3, (F, 2)).astype(np.float32),
                          rng.integers(-1, 40, F)),
        "ultra_low": UltraLow(low, True, "two clusters", None),
        "explanations": {
            f: Explained(f"words about the {WORDS[f % len(WORDS)]} number {f}, at the start of <b>lines</b>", 0.4, 0.8)
            for f in range(F)
        },
    }  # fmt: skip
    return Facts(**{**given, **changes})


def _match(F: int, rng: np.random.Generator) -> Match:
    r = torch.from_numpy(rng.uniform(-0.1, 1, (4, F)))
    numbers = torch.arange(F)
    return Match(
        tokens=TOKENS, min_fires=10, sampled=False, features=numbers, fires=numbers + 10, best=numbers.flip(0),
        pearson=r[0], held_out=r[1], assigned=None, assigned_pearson=None, logit_pearson=r[2], decoder_cosine=None,
        control=r[3] / 3, control_held_out=None, neurons=r[3][:64], neurons_held_out=None,
    )  # fmt: skip
