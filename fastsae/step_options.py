"""What `TrainStep` takes and gives: its options, which are checked when they are given, and its metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastsae.errors import ConfigError
from fastsae.moments import State
from fastsae.sae import SAE

Master = Literal["fp32", "bf16-sr"]
ClipBy = Literal["exact", "previous"]
OPTIMIZERS = ("adam", "adamw")


@dataclass(frozen=True, eq=False)
class StepMetrics:
    """Scalars on the SAE's device; asking for their numbers waits for it.

    loss = mse + penalty · sparsity + aux, mse, sparsity, aux: as in `SAE.loss`, over all rows of the update. l0: active
    latents per row. fve: of the last micro-batch. grad_norm: of all gradients together before clipping, None where
    nobody asked for it.
    """

    loss: Tensor
    mse: Tensor
    sparsity: Tensor
    aux: Tensor
    l0: Tensor
    fve: Tensor
    grad_norm: Tensor | None


@dataclass(eq=False)
class Sums:
    """Over the rows of the micro-batches so far."""

    rows: int
    mse: Tensor
    sparsity: Tensor
    aux: Tensor
    l0: Tensor
    fve: Tensor

    def plus(self, more: Sums) -> Sums:
        """With another micro-batch; fve is that of the last one."""
        return Sums(
            self.rows + more.rows, self.mse + more.mse, self.sparsity + more.sparsity, self.aux + more.aux,
            self.l0 + more.l0, more.fve,
        )  # fmt: skip


def check(
    sae: Any, optimizer: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, state: str,
    master: str, clip: float, clip_by: str, lazy: bool, dead_every: int,
) -> None:  # fmt: skip
    if not isinstance(sae, SAE):
        raise ConfigError(f"TrainStep takes a fastsae.SAE, got {type(sae).__name__}")
    choices = {"optimizer": (optimizer, OPTIMIZERS), "state": (state, get_args(State)),
               "master": (master, get_args(Master)), "clip_by": (clip_by, get_args(ClipBy))}  # fmt: skip
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
                + ("; for any other optimizer use sae.loss(x).loss.backward()" if name == "optimizer" else "")
            )
    frozen = [name for name, p in sae.named_parameters() if not p.requires_grad]
    if frozen:
        raise ConfigError(
            f"TrainStep updates all parameters, {', '.join(frozen)} should not change (requires_grad=False); "
            "call sae.requires_grad_(), or use sae.loss(x).loss.backward()"
        )
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "clip": clip}
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a finite number ≥ 0, got {value!r}")
    if isinstance(dead_every, bool) or not isinstance(dead_every, int) or dead_every < 1:
        raise ConfigError(f"dead_every must be a whole number ≥ 1, got {dead_every!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if weight_decay and optimizer == "adam":
        raise ConfigError(f"adam has no weight decay here, got weight_decay={weight_decay}; take optimizer='adamw'")
    if lazy and weight_decay:
        raise ConfigError("lazy leaves latents alone that weight decay would move; choose one of them")
    if master == "bf16-sr" and sae.dtype != torch.bfloat16:
        raise ConfigError(
            f"master='bf16-sr' updates bfloat16 weights, the SAE's are {sae.dtype}; make it with dtype='bfloat16'"
        )
    if sae.dtype == torch.float64 and state != "fp32":
        raise ConfigError(f"a float64 SAE keeps float64 moments, got state={state!r}; leave state at 'fp32'")


def check_state(there: dict[str, Tensor], numbers: dict[str, int], state: dict[str, Any]) -> None:
    """Raises ConfigError where state is not that of a TrainStep with tensors like those that are there."""
    missing, more = sorted(set(there) - set(state)), sorted(set(state) - set(there) - set(numbers))
    if missing or more or not set(numbers) <= set(state):
        raise ConfigError(
            f"the state of another kind of TrainStep: missing {missing or 'nothing'}, not known "
            f"{more or 'nothing'}; make the TrainStep with the same options"
        )
    for name, t in there.items():
        if state[name].shape != t.shape or state[name].dtype != t.dtype:
            raise ConfigError(
                f"expected {name} {tuple(t.shape)} in {t.dtype}, got {tuple(state[name].shape)} in "
                f"{state[name].dtype}; make the TrainStep with the same SAE, state and master"
            )
