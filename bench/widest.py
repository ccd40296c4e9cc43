"""The widest dictionary that one GPU trains: 50 steps of TrainStep with the cheapest state, the loss falling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.shapes import Call, Case, Shape, TooLarge

WIDEST = Shape("widest", 4096, 4096, 4_194_304, 64)
CHEAPEST: dict[str, Any] = {"state": "rowwise", "master": "bf16-sr", "betas": (0.0, 0.999)}
STEPS = 50
FEATURES, ACTIVE = 8192, 32  # what the data are made of


@dataclass(frozen=True)
class Trained:
    """A step to be timed. about: what was found before, for the case's row."""

    step: Any
    x: Tensor
    about: dict[str, Any]

    def __call__(self) -> Tensor:
        return self.step(self.x).loss


def widest_cases(shape: Shape, dtype: torch.dtype, steps: int) -> Iterator[Case]:
    yield Case("step", "TrainStep topk, rowwise, bf16-sr, no momentum", shape, dtype,
               lambda device: _trained(shape, dtype, device, steps))  # fmt: skip


def _trained(shape: Shape, dtype: torch.dtype, device: torch.device, steps: int) -> Call:
    """A step to be timed, after `steps` of them whose loss must fall. Raises TooLarge where it does not fit."""
    from bench.checks import WrongResult
    from bench.steps import drawn
    from fastsae.step import TrainStep

    fits(shape, dtype, device)
    options: dict[str, Any] = CHEAPEST if dtype == torch.bfloat16 else CHEAPEST | {"master": "fp32"}
    step = TrainStep(drawn(shape, dtype, device), lr=1e-3, **options)
    batches = [sample(shape, dtype, device, seed) for seed in range(4 if device.type == "cuda" else 1)]
    losses = torch.stack([step(batches[i % len(batches)]).loss for i in range(steps)]).double()
    edge = max(1, steps // 10)
    first, last = float(losses[:edge].mean()), float(losses[-edge:].mean())
    if not last < first:
        raise WrongResult(f"the loss does not fall: {first:.4g} in the first and {last:.4g} in the last steps")
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None

    return Trained(step, batches[0], {"loss_first": first, "loss_last": last, "steps": steps, "peak_gib": peak})


def fits(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Raises TooLarge where the estimate says that the device has too little memory."""
    from fastsae.footprint import footprint
    from fastsae.recipe import TrainConfig

    name: Any = str(dtype).removeprefix("torch.")
    config = TrainConfig(d_in=shape.D, d_sae=shape.F, k=shape.K, batch_size=shape.N, dtype=name, normalise="none",
                         state="rowwise", master="bf16-sr" if name == "bfloat16" else "fp32", beta1=0.0)  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        wanted, free = footprint(config, "cuda").total, torch.cuda.mem_get_info(device)[0]
        if wanted > free:
            raise TooLarge(f"not tried: needs {wanted / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def sample(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """[N, D], sums of a few of FEATURES directions, the same ones for every seed."""
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(FEATURES, shape.D, device=device, generator=generator) / shape.D**0.5
    generator.manual_seed(seed + 1)
    which = torch.randint(0, FEATURES, (shape.N, ACTIVE), device=device, generator=generator)
    weights = torch.rand(shape.N, ACTIVE, device=device, generator=generator) + 0.5
    return torch.nn.functional.embedding_bag(which, features, per_sample_weights=weights, mode="sum").to(dtype)
