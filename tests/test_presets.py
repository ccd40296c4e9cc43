"""The presets: the published figures, and whether training by them finds the features that data were made of."""

from typing import Any

import pytest
import torch

import fastsae
from fastsae import FastSAEError, TrainConfig
from fastsae.synthetic import SyntheticData, recovery


def test_preset_monosemanticity_is_the_papers_recipe():
    config = TrainConfig.preset("monosemanticity", d_in=512, d_sae=4096, tokens=8192 * 10**6).complete(512, 10**7)
    assert config.steps == 10**6
    assert [round(a * config.steps) for a in config.resample_at] == [25_000, 50_000, 75_000, 100_000]
    assert config.dead_after_tokens == 12_500 * 8192
    assert config.resample_inputs == 819_200
    assert config.l1_coefficient == pytest.approx(2.048)
    assert (config.decoder_norm, config.init_encoder, config.init_b_dec) == ("unit", "random", "geometric_median")
    with pytest.raises(FastSAEError, match="needs d_in"):
        TrainConfig.preset("monosemanticity")


# April's learning rate is meant for 200,000 steps; the paper's penalty goes with the scale of its data.
APRIL: dict[str, Any] = {"l1_coefficient": 2.0, "lr": 4e-3}
PAPER: dict[str, Any] = {"l1_coefficient": 0.3, "lr": 4e-3}


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("relu", {}),
        ("topk", {"k": 5}),
        pytest.param("april2024", APRIL, marks=pytest.mark.slow),
        pytest.param("monosemanticity", PAPER, marks=pytest.mark.slow),
    ],
)
def test_presets_find_the_features_that_are_there(preset, options):
    data = SyntheticData(dim=256, n_features=512, active=5.0)  # the rarest is 170 times rarer than the commonest
    x = data.sample(250_000, torch.Generator().manual_seed(0))
    sae = fastsae.train(x, preset=preset, show_progress=False, **{"d_sae": 512, "batch_size": 1024} | options)
    found = recovery(sae.W_dec, data.features)
    assert found.mean_max_cosine >= 0.9
    assert found.f1 >= 0.9
