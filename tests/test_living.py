"""Steps without dead latents: the order of the latents, and what of training stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import SAE, FastSAEError, TrainStep, living
from tests.encode_case import DEVICE
from tests.test_step import D, F, N, batches, make

OPTIONS: dict[str, Any] = {"activation": "topk", "k": 5, "dead_after_tokens": 3 * N, "k_aux": 4}


def test_the_living_come_first_and_go_back():
    gen = torch.Generator().manual_seed(0)
    order, matrix, vector = torch.arange(50), torch.randn(50, 3, generator=gen), torch.randn(50, generator=gen)
    start = matrix.clone(), vector.clone()
    dead = torch.rand(50, generator=gen) < 0.4
    count = living.living_first(order, dead, [matrix, vector])
    assert count == int((~dead).sum())
    assert not dead[order[:count]].any() and dead[order[count:]].all()
    assert torch.equal(matrix, start[0][order]) and torch.equal(vector, start[1][order])
    living.restore(order, [matrix, vector])
    assert torch.equal(matrix, start[0]) and torch.equal(vector, start[1]) and torch.equal(order, torch.arange(50))


def dying(**more: Any) -> SAE:
    """An SAE of which every third latent cannot fire."""
    # Late enough that nothing but these is ever taken for dead.
    sae = make(OPTIONS, **{"aux_coefficient": 0.0, "dtype": "float64", "k": 10, "dead_after_tokens": 11 * N, **more})
    with torch.no_grad():
        sae.encoder.bias[::3] = -1e3
    return sae


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu", "batchtopk"])
def test_the_living_are_trained_as_without_it(activation, betas):
    """Dead latents without momentum and gradient rest anyway, so leaving them out changes nothing at all."""
    saes = [dying(activation=activation, l1_coefficient=0.3, init_threshold=0.1, bandwidth=0.5) for _ in range(2)]
    steps = [TrainStep(saes[0], lr=1e-2, betas=betas, eps=1e-3, dead_every=4),
             TrainStep(saes[1], lr=1e-2, betas=betas, eps=1e-3)]  # fmt: skip
    seen = set()
    for x in batches(24, dtype=torch.float64):
        got, want = (step(x) for step in steps)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-9)
        seen.add(steps[0].living)
    assert seen == {F, F - len(range(0, F, 3))}
    steps[0].restore_order()
    assert steps[0].order is not None and torch.equal(steps[0].order, torch.arange(F))
    for (name, p), q in zip(saes[0].named_parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(saes[0].tokens_since_fired, saes[1].tokens_since_fired)


def test_the_dead_come_back():
    sae = make(OPTIONS, aux_coefficient=1.0)
    with torch.no_grad():
        sae.encoder.bias[::3] = -1.0
    step = TrainStep(sae, lr=3e-2, dead_every=3)
    counts = []
    for x in batches(90):
        step(x)
        counts.append(step.living)
    assert min(counts) < F and counts[-1] > min(counts)  # AuxK in every third step brings some back


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_resumed_run_is_the_uninterrupted_one(state):
    def start() -> tuple[SAE, TrainStep]:
        sae = dying() if state == "fp32" else make(OPTIONS)
        return sae, TrainStep(sae, lr=1e-2, state=state, dead_every=4)

    xs = batches(20, dtype=torch.float64 if state == "fp32" else torch.float32)
    whole, step = start()
    for x in xs:
        step(x)
    first, half = start()
    for x in xs[:14]:
        half(x)
    second, rest = start()
    second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    rest.load_state_dict({k: v.clone() if isinstance(v, Tensor) else v for k, v in half.state_dict().items()})
    for x in xs[14:]:
        rest(x)
    for name, t in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], t), name
    assert rest.living == step.living


def test_in_kernels(monkeypatch):
    pytest.importorskip("triton")
    from fastsae import gpu

    monkeypatch.setattr(gpu, "slots_for", lambda k: 16)
    options: dict[str, Any] = {"d_in": D, "d_sae": 24, "k": 3, "dead_after_tokens": 8, "k_aux": 4, "device": DEVICE}
    saes = [SAE(**options, backend=backend) for backend in ("triton", "torch")]
    for sae in saes:
        sae.encoder.bias.data[::3] = -2.0
    steps = [TrainStep(sae, lr=1e-3, dead_every=3) for sae in saes]
    for x in batches(9, n=4):
        got, want = (step(x.to(DEVICE)) for step in steps)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-3, atol=1e-4)
    assert steps[0].living == steps[1].living < 24


def test_bad_input():
    with pytest.raises(FastSAEError, match="dead_every"):
        TrainStep(make(OPTIONS), dead_every=0)
