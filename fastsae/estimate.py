"""Will it fit, and how long will it take: a run's memory and time before anything is allocated.

    print(fastsae.estimate(TrainConfig(d_in=4096, d_sae=2**20), gpu="h200"))

Memory is counted from the code (`fastsae.footprint`), time from what the machine does at best (`fastsae.machines`):
products by operations, everything else by bytes.

Axes: N tokens, K active latents per token, F dictionary size, D width, M = N · K.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastsae import machines
from fastsae.device import choose_device
from fastsae.errors import ConfigError, FastSAEError
from fastsae.footprint import (
    SIZES,
    Footprint,
    active,
    blocks_of,
    dead_bytes,
    footprint,
    kept_per_group,
    randoms,
    waits,
)
from fastsae.machines import GIB, Machine
from fastsae.recipe import TrainConfig

__all__ = ["Estimate", "Switch", "check_fits", "estimate"]

LEAST_BATCH = 256
# A random number on the CPU, where torch draws them one by one; on a GPU they cost nothing beside memory. Roughly.
RANDOM_SECONDS = 4e-9
# Operations of a step beside, and of each block of rows, by how the moments are kept: about.
STEP_OPERATIONS = 200
OPERATIONS = {"fp32": 40, "bf16": 80, "8bit": 140, "rowwise": 70}
DAY = 86_400


@dataclass(frozen=True)
class Switch:
    """options, on top of the config: what they make of the peak in bytes, and whether that fits."""

    options: dict[str, Any]
    bytes: int
    fits: bool

    @property
    def text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options.items())


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a run.

    memory: the parts that are there at the peak of a step, in `phase` of it. making: the peak before, while the
    initial weights are made. total: the larger of the two. available: what can be had, fits: whether that is enough;
    None where it is not known. time: seconds of a step by part; None where the machine's speed is not known. days: of
    the whole run, None without `tokens`. largest_d_sae: that still fits with all else as it is. switches: what helps,
    each on top of those before it, if it does not fit.
    """

    machine: str
    about: str
    sizes: dict[str, int]
    memory: dict[str, int]
    phase: str
    making: int
    total: int
    available: int | None
    fits: bool | None
    time: dict[str, float] | None
    seconds_per_step: float | None
    tokens_per_second: float | None
    days: float | None
    largest_d_sae: int | None
    switches: tuple[Switch, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dictionaries."""
        return asdict(self) | {"switches": [asdict(s) for s in self.switches], "notes": list(self.notes)}

    def __str__(self) -> str:
        from fastsae.estimate_table import table

        return table(self)


def estimate(
    config: TrainConfig, *, gpu: str | None = None, device: torch.device | str | None = None
) -> Estimate:
    """Memory and time of training with config on a GPU of the table, or on the machine at hand.

    config: needs d_in, the width of the activations, as there is no store to ask; d_sae is 8 · d_in by default; tokens
    tells the days. gpu: a name of `machines.GPUS`. device: without gpu, where it would run; config.device by default.
    On a CPU its speed is measured, which takes about a second.

    Raises ConfigError for a config without d_in, an unknown GPU, and a device that cannot be used here.
    """
    config = _complete(config)
    if gpu is not None:
        machine = machines.by_name(gpu, config.dtype)
    else:
        machine = machines.at_hand(choose_device(str(device or config.device)), config.dtype)
    return _estimate(config, machine)


def check_fits(config: TrainConfig, device: torch.device) -> None:
    """Raises FastSAEError, with what would help, if training with config needs more memory than there is."""
    machine = machines.at_hand(device, config.dtype, measure=False)
    found = footprint(config, machine.kind)
    if machine.memory is not None and found.total > machine.memory:
        switches = tuple(_switches(config, machine.kind, machine.memory))
        raise FastSAEError(
            f"this run needs about {gigabytes(found.total)} and {machine.name} has {gigabytes(machine.memory)} free; "
            + _advice(switches, largest(config, machine.kind, machine.memory))
        )


def _complete(config: TrainConfig) -> TrainConfig:
    if not config.d_in:
        raise ConfigError("an estimate needs d_in, the width of the activations (of the model's residual stream, say)")
    return dataclasses.replace(config, d_sae=config.d_sae or 8 * config.d_in)


def _estimate(config: TrainConfig, machine: Machine) -> Estimate:
    found = footprint(config, machine.kind)
    time = step_time(config, machine, found) if machine.product else None
    seconds = None if time is None else sum(time.values())
    memory, fits = machine.memory, None if machine.memory is None else found.total <= machine.memory
    rate = None if seconds is None else config.batch_size / seconds
    return Estimate(
        machine=machine.name,
        about=machine.about,
        sizes={"tokens_per_step": config.batch_size, "d_in": config.d_in, "d_sae": config.d_sae,
               "active": active(config)},
        memory={**found.resident._asdict(), "batch": found.phase.batch, "codes": found.phase.codes,
                "workspace": found.phase.workspace + found.outside},
        phase=found.phase.name,
        making=found.making,
        total=found.total,
        available=memory,
        fits=fits,
        time=time,
        seconds_per_step=seconds,
        tokens_per_second=rate,
        days=config.tokens / rate / DAY if config.tokens and rate else None,
        largest_d_sae=None if memory is None else largest(config, machine.kind, memory),
        switches=() if memory is None or fits else tuple(_switches(config, machine.kind, memory)),
        notes=tuple(_notes(config, machine, found)),
    )  # fmt: skip


# --- what would fit -------------------------------------------------------------------------------------------------


def largest(config: TrainConfig, kind: str, memory: int) -> int | None:
    """The largest multiple of 256 for d_sae that fits into `memory` bytes with all else as it is; None for none."""

    def fits(blocks: int) -> bool:
        return footprint(dataclasses.replace(config, d_sae=256 * blocks), kind).total <= memory

    low = max(1, -(-max(config.k, config.k_start) // 256))
    if not fits(low):
        return None
    high = low
    while fits(2 * high):
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 256 * low


def _switches(config: TrainConfig, kind: str, memory: int) -> Iterator[Switch]:
    """What takes less memory, cheapest in quality first, each on top of those before, until it fits.

    Stochastic rounding and 8 bits cost next to nothing; without momentum, or with one second moment a latent, training
    is another one; a smaller batch costs none but changes the recipe, and comes first if it is enough by itself.
    """
    smaller = _batch_that_fits(config, kind, memory)
    if smaller is not None:
        yield Switch({"batch_size": smaller.batch_size}, footprint(smaller, kind).total, True)
    steps: list[dict[str, Any]] = [
        {"dtype": "bfloat16", "master": "bf16-sr"}, {"state": "8bit"}, {"beta1": 0.0}, {"state": "rowwise"},
    ]  # fmt: skip
    now, total = config, footprint(config, kind).total
    for wanted in steps:
        options = {name: value for name, value in wanted.items() if getattr(now, name) != value}
        new = dataclasses.replace(now, **options)
        needs = footprint(new, kind).total
        if needs >= total:
            continue
        now, total = new, needs
        yield Switch(options, needs, needs <= memory)
        if needs <= memory:
            return
    last = _batch_that_fits(now, kind, memory)
    if last is not None and smaller is None:
        yield Switch({"batch_size": last.batch_size}, footprint(last, kind).total, True)


def _batch_that_fits(config: TrainConfig, kind: str, memory: int) -> TrainConfig | None:
    size = config.batch_size // 2
    while size >= LEAST_BATCH:
        smaller = dataclasses.replace(config, batch_size=size)
        if footprint(smaller, kind).total <= memory:
            return smaller
        size //= 2
    return None


def _advice(switches: tuple[Switch, ...], d_sae: int | None) -> str:
    steps = "; then ".join(
        f"{s.text} makes it {gigabytes(s.bytes)}" + (", which fits" if s.fits else "") for s in switches
    )
    least = "nothing smaller fits" if d_sae is None else f"as it is, d_sae up to {d_sae} fits"
    if not any(s.fits for s in switches):
        steps = f"{steps}; no switch makes it fit" if steps else "no switch makes it fit"
    return f"{steps}; {least}"


def _notes(config: TrainConfig, machine: Machine, found: Footprint) -> Iterator[str]:
    if config.activation in ("relu", "jumprelu"):
        text = "half of all latents, in dense algebra" if found.dense else f"{active(config)} latents a token"
        yield f"{config.activation} is taken to have {text}, as at the start; a code that becomes sparser takes less"
    if dead_bytes(config):
        yield f"AuxK: each dead latent adds {dead_bytes(config)} bytes and its share of products; none are counted"
    if not config.tokens:
        yield "the length of the run is not known: give tokens"
    if machine.kind == "cuda":
        yield "no GPU has been measured yet: the time is what the chip permits at these shares of its data sheet"


def gigabytes(count: int) -> str:
    """Bytes as people read them: GiB from one on, else MiB."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"


# --- time -----------------------------------------------------------------------------------------------------------


def step_time(config: TrainConfig, machine: Machine, found: Footprint) -> dict[str, float]:
    """Seconds of a step by part: 2NDF operations for the encoder (ten times NDF for a dense code), bytes elsewhere."""
    N, D, F = config.batch_size, config.d_in, config.d_sae
    e, M = SIZES[config.dtype], 0 if found.dense else config.batch_size * active(config)
    product = 2 * N * D * F / machine.product
    passes = 2 if config.clip and config.clip_by == "exact" else 1
    traffic = {
        "selection": _selection(config, machine.kind, M),
        "decode": (M + 5 * N) * D * e,
        "sort": 4 * 2 * 12 * M,  # four passes of a radix sort over 12 bytes, read and written
        "backward": (1 + 2 * passes) * M * D * max(e, 4),
        "optimizer": _optimizer(config, M, found),
    }
    time = {"encoder": product}
    if found.dense:
        traffic |= {"selection": 0, "sort": 0}
        time["dense code"] = (1 + 4 * passes) * product
    time |= {name: count / machine.bandwidth for name, count in traffic.items()}
    if machine.kind == "cpu":
        time["optimizer"] += randoms(config) * RANDOM_SECONDS
    operations = STEP_OPERATIONS + passes * blocks_of(config, machine.kind) * OPERATIONS[config.state]
    time["launches"] = operations * machine.launch
    return time


def _selection(config: TrainConfig, kind: str, M: int) -> float:
    """Bytes. A GPU writes the best of each group and reads them twice; a CPU writes and reads pre-activations."""
    N, F = config.batch_size, config.d_sae
    if kind == "cpu":
        return 2 * N * F * SIZES[config.dtype]
    groups = -(-F // 32)
    r = 4 if config.activation in ("relu", "jumprelu") else kept_per_group(active(config), groups)
    return N * groups * (5 * r + 4 + 4 * r) + 6 * 8 * M


def _optimizer(config: TrainConfig, M: int, found: Footprint) -> float:
    """Bytes of the two matrices: weights and moments read and written, of the rows that have a gradient where others
    wait."""
    touched = -math.expm1(-M / config.d_sae) if waits(config) and not found.dense else 1.0
    stays = found.resident
    return 2 * touched * (stays.parameters + stays.master + stays.state)
