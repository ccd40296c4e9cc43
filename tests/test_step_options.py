"""Options of TrainStep that cannot be meant are told when they are given."""

import pytest

from fastsae import SAE, FastSAEError, TrainStep


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "sgd"}, "sae.loss"),
        ({"state": "4bit"}, "'8bit'"),
        ({"master": "bf16-sr"}, "dtype='bfloat16'"),
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"weight_decay": 0.1}, "adamw"),
        ({"optimizer": "adamw", "weight_decay": 0.1, "lazy": True}, "lazy"),
        ({"clip": float("nan")}, "clip"),
        ({"clip_by": "row"}, "'previous'"),
    ],
)
def test_options_that_cannot_be_meant(options, said):
    with pytest.raises(FastSAEError, match=said):
        TrainStep(SAE(d_in=12, d_sae=80, k=5), **options)
