"""Quality of dictionaries: a planted ultra-low cluster, cosines of all pairs by numpy, known features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_lm
import torch

import fastsae
from fastsae import SAE, FastSAEError
from fastsae.analysis import quality as module
from fastsae.analysis.quality import alignment_of, geometry, quality, ultra_low

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def features(rare: int, seed: int = 0, apart: float = 3.0, alike: bool = False) -> Columns:
    """(density, bias, enc·dec) of 400 healthy features, 10 dead ones and `rare` others, `apart` decades below.

    alike: these have the healthy ones' bias and cosine.
    """
    generator = torch.Generator().manual_seed(seed)
    logs = [-3.5 + 0.5 * torch.randn(400, generator=generator), torch.full((10,), -torch.inf)]
    bias = [-0.3 + 0.1 * torch.randn(410, generator=generator)]
    cosine = [(0.95 - 0.03 * torch.randn(410, generator=generator).abs())]
    logs.append(-3.5 - apart + 0.3 * torch.randn(rare, generator=generator))
    bias.append((-0.3 if alike else -1.2) + 0.1 * torch.randn(rare, generator=generator))
    cosine.append((0.95 if alike else 0.3) - 0.03 * torch.randn(rare, generator=generator).abs())
    return 10 ** torch.cat(logs), torch.cat(bias), torch.cat(cosine)


@pytest.mark.parametrize("rare", [20, 150, 600])
def test_a_planted_cluster_is_split_off(rare):
    found = ultra_low(*features(rare))
    assert found.found and found.means is not None
    assert torch.equal(found.members, torch.arange(410 + rare) >= 410)
    low, healthy = found.means
    assert low[0] == pytest.approx(-6.5, abs=0.3) and healthy[0] == pytest.approx(-3.5, abs=0.1)
    assert low[2] == pytest.approx(0.28, abs=0.05) and "decades" in found.why


def test_where_there_is_none_nothing_is_split_off():
    d, b, c = features(0)
    cases = {
        "no better than one|decades|fewer than 3": features(0),
        "decades of density apart": features(150, apart=0.5),
        "rare, not ultra-low": features(150, alike=True, seed=1),
        "5 live features are too few": (d[:5], b[:5], c[:5]),
        "fires on 0.003 of the tokens": (features(150)[0] * 1e4, *features(150)[1:]),
    }
    for why, columns in cases.items():
        found = ultra_low(*columns)
        assert not found.found and not found.members.any() and found.means is None
        assert any(part in found.why for part in why.split("|")), found.why
    for seed in range(5):
        assert not ultra_low(*features(0, seed)).found


def test_alike_but_rare_is_not_called_ultra_low_by_noise():
    """Bias and cosine of the rare features equal the others' in distribution; sampling noise must not decide."""
    called = [ultra_low(*features(150, alike=True, seed=seed)).found for seed in range(10)]
    assert sum(called) == 0, called


def test_geometry_is_that_of_all_pairs(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    w = torch.randn(25, 6, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    keep = torch.arange(25) != 11
    found = geometry(w, keep)
    rows = w[keep].double().numpy()
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    counts, edges = np.histogram(cosine[np.triu_indices(24, 1)], bins=np.linspace(-1, 1, 41))
    assert found.histogram == counts.tolist() and sum(found.histogram) == 24 * 23 // 2
    np.testing.assert_allclose(found.edges, edges)
    np.fill_diagonal(cosine, -2)
    numbers = np.arange(25)[keep.numpy()]
    np.testing.assert_array_equal(found.features, numbers)
    np.testing.assert_array_equal(found.nearest, numbers[cosine.argmax(1)])
    np.testing.assert_allclose(found.cosine, cosine.max(1), atol=1e-6)
    assert geometry(w[:1]).histogram == [0] * 40 and geometry(w[:0]).nearest.tolist() == []


def test_alignment_is_the_cosine_of_encoder_and_decoder():
    sae = SAE(d_in=5, d_sae=9, k=2, seed=1)
    with torch.no_grad():
        sae.W_dec.add_(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    e, d = sae.encoder.weight.detach().double().numpy(), sae.W_dec.detach().double().numpy()
    wanted = (e * d).sum(1) / np.linalg.norm(e, axis=1) / np.linalg.norm(d, axis=1)
    np.testing.assert_allclose(alignment_of(sae), wanted, atol=1e-6)


def test_quality_of_a_dictionary_with_known_features():
    """Half of the latents are true features: found; those that never fire count neither way."""
    network, words = tiny_lm.model(), tiny_lm.tokenizer()
    sae = SAE(d_in=16, d_sae=32, activation="relu")
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc[16:] = -1e6
    result = fastsae.evaluate(
        sae, network, words, tiny_lm.documents(8), "transformer.h.0.mlp", context=32, show_progress=False
    )
    assert (result.density[:16] > 0).all() and (result.density[16:] == 0).all()
    found = quality(
        sae, result, features=torch.cat([torch.eye(16)[:12], torch.nn.functional.normalize(torch.ones(4, 16))])
    )
    assert found.truth is not None and found.truth.precision == 12 / 16 == found.truth.recall
    assert found.geometry.histogram[20] == 16 * 15 // 2 == sum(found.geometry.histogram)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["histogram_healthy"] == values["histogram"] and sum(values["histogram_ultra_low"]) == 0
    assert values["ultra_low"] == 0 and "too few" in values["ultra_low_why"] and values["kl"] == result.kl
    with pytest.raises(FastSAEError, match="evaluate this SAE"):
        quality(SAE(d_in=16, d_sae=8, k=2), result)
