"""Data with known features, the measures of what was found, and that training finds it."""

from __future__ import annotations

import sys

import pytest
import torch

import fastsae
from fastsae.errors import ConfigError
from fastsae.synthetic import SyntheticConfig, SyntheticData, cosines, recovery


@pytest.fixture(scope="module")
def data() -> SyntheticData:
    return SyntheticData(dim=256, n_features=512, active=5.0, decay=0.99)


def test_features_and_frequencies_are_as_configured(data: SyntheticData) -> None:
    torch.testing.assert_close(data.features.norm(dim=1), torch.ones(512))
    p = data.probabilities
    assert abs(float(p.sum()) - 5) < 1e-3 and (p[1:] <= p[:-1]).all() and 0 < float(p[-1]) < float(p[0]) / 100
    codes = data.codes(20_000, torch.Generator().manual_seed(0))
    assert abs(float((codes > 0).sum(1).float().mean()) - 5) < 0.1
    torch.testing.assert_close((codes > 0).float().mean(0), p, rtol=0, atol=0.01)
    values = codes[codes > 0]
    assert values.min() >= 0.5 and values.max() <= 1.5 and abs(float(values.mean()) - 1) < 0.01


def test_samples_are_seeded_and_made_of_the_features(data: SyntheticData) -> None:
    x, same, other = (data.sample(50, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert x.shape == (50, 256) and torch.equal(x, same) and not torch.equal(x, other)
    torch.testing.assert_close(x, data.codes(50, torch.Generator().manual_seed(1)) @ data.features)
    noisy = SyntheticData(SyntheticConfig(noise=0.1)).sample(50, torch.Generator().manual_seed(1))
    assert abs(float((noisy - x).std()) - 0.1) < 0.01


def test_common_features_stay_at_one_half() -> None:
    p = SyntheticData(dim=4, n_features=10, active=4.0, decay=0.5).probabilities
    assert float(p.max()) == 0.5 and abs(float(p.sum()) - 4) < 1e-3


@pytest.mark.parametrize(
    "options,message",
    [
        ({"active": 0}, "active must be in"),
        ({"active": 600}, "active must be in"),
        ({"active": 300}, "above 1/2"),
        ({"decay": 1.5}, "decay"),
        ({"noise": -1}, "noise"),
        ({"dim": 0}, "dim must be"),
    ],
)
def test_data_that_cannot_be_made(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticData(**options)


def test_recovery_of_a_dictionary_known_in_advance(data: SyntheticData) -> None:
    gen = torch.Generator().manual_seed(4)
    shuffled = data.features[torch.randperm(512, generator=gen)] * torch.rand(512, 1, generator=gen).add(0.1)
    assert recovery(shuffled, data.features) == pytest.approx((1.0, 1.0, 1.0, 1.0), abs=1e-5)

    noise = torch.randn(512, 256, generator=gen)
    none = recovery(noise, data.features)
    assert none.f1 == 0 and 0.1 < none.mean_max_cosine < 0.4

    half = recovery(torch.cat([data.features[:256], noise]), data.features)
    assert half.recall == 0.5 and half.precision == 256 / 768 and half.f1 == pytest.approx(2 * 256 / (512 + 768))
    alone = recovery(torch.cat([data.features[:256], noise]), data.features, rows=torch.arange(256))
    assert alone.precision == 1.0 and alone.recall == 0.5
    assert recovery(noise, data.features, rows=torch.zeros(512, dtype=torch.bool)).f1 == 0


def test_one_row_counts_for_one_feature_only() -> None:
    features = torch.eye(3)
    twice = recovery(torch.tensor([[1.0, 0, 0], [0.99, 0.1, 0], [0, 0, 1.0]]), features)
    assert twice.recall == pytest.approx(2 / 3) and twice.precision == pytest.approx(2 / 3)


def test_without_scipy_the_matching_is_greedy(data: SyntheticData, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = data.features[torch.randperm(512, generator=torch.Generator().manual_seed(0))[:300]]
    want = recovery(rows, data.features)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert recovery(rows, data.features) == pytest.approx(want, abs=1e-6)


def test_rows_of_zeros_resemble_nothing() -> None:
    assert not cosines(torch.zeros(2, 3), torch.eye(3)).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset,options",
    [
        ("topk", {"k": 8}),
        ("monosemanticity", {"l1_coefficient": 0.2}),
        ("april2024", {"l1_coefficient": 1.0}),
    ],
)
def test_the_presets_find_the_features(data: SyntheticData, preset, options) -> None:
    """More latents than features, so that each finds one; seconds instead of hours, so a larger learning rate."""
    x = data.sample(100_000, torch.Generator().manual_seed(1))
    sae = fastsae.train(
        x, preset=preset, d_sae=768, tokens=300_000, batch_size=512, lr=2e-3, show_progress=False, **options
    )
    live = sae.tokens_since_fired < 100_000
    found = recovery(sae.W_dec, data.features, rows=live)
    assert found.mean_max_cosine >= 0.9, found
    assert found.recall >= 0.9, found
    fresh = data.sample(4000, torch.Generator().manual_seed(2))
    assert float(sae.eval().loss(fresh).fve) >= 0.9
