"""Operands whose rows do not lie one after the other are as good as tidy ones; NaN spoils what it is in, no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsae import SAE, ops
from tests.encode_case import DEVICE

RULES: list[dict[str, Any]] = [
    {"activation": "topk", "k": 4},
    {"activation": "batchtopk", "k": 4},
    {"activation": "relu", "l1_coefficient": 0.3},
    {"activation": "jumprelu", "bandwidth": 0.5, "init_threshold": 0.3},
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", RULES)
def test_column_major_rows_open_rows_included(options, backend):
    """The code becomes denser all at once, so that the kernels leave rows open."""
    pytest.importorskip("triton")
    gen = torch.Generator().manual_seed(0)
    x, target = (torch.randn(16, 6, generator=gen).to(DEVICE).T for _ in range(2))
    found = []
    for tidy in (False, True):
        sae = SAE(d_in=16, d_sae=64, **options, backend=backend, device=DEVICE)
        given = (x.contiguous(), target.contiguous()) if tidy else (x, target)
        for bias in (-2.0, -2.0, -2.0, 2.0):
            with torch.no_grad():
                sae.encoder.bias.fill_(bias)
            sae.zero_grad()
            out = sae.loss(given[0], target=given[1])
        out.loss.backward()
        found.append([out.loss, *(p.grad for p in sae.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", RULES)
def test_a_row_of_nan_leaves_the_others_alone(options):
    gen = torch.Generator().manual_seed(1)
    x, sae = torch.randn(64, 32, generator=gen), SAE(d_in=32, d_sae=512, **options)
    broken = torch.cat([x, torch.full((1, 32), float("nan"))])
    broken[64, 1:] = 0
    weights = sae.encoder.weight, sae.encoder.bias - 2.5
    if options["activation"] == "batchtopk":
        code, whole = ops.encode_batchtopk(broken, *weights, 4), ops.encode_batchtopk(x, *weights, 4)
        assert int((code.to_dense()[:64] > 0).sum()) >= int((whole.to_dense() > 0).sum()) > 0
    else:
        code, whole = ops.encode_relu(broken, *weights, 512), ops.encode_relu(x, *weights, 512)
        assert code is not None and whole is not None
        assert torch.equal(code.to_dense()[:64], whole.to_dense())
    assert not code.to_dense()[64].any()


def test_a_feature_of_nan_hides_no_neighbour():
    gen = torch.Generator().manual_seed(2)
    x, sae = torch.randn(64, 32, generator=gen), SAE(d_in=32, d_sae=512, k=4)
    weight = sae.encoder.weight.detach().clone()
    whole = ops.encode_relu(x, weight, sae.encoder.bias, 512)
    weight[37] = float("nan")
    code = ops.encode_relu(x, weight, sae.encoder.bias, 512)
    assert code is not None and whole is not None
    rest = torch.arange(512) != 37
    assert torch.equal(code.to_dense()[:, rest], whole.to_dense()[:, rest])
    assert not code.to_dense()[:, 37].any()
