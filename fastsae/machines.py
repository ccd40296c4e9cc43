"""What a training step runs on: how much memory there is, how fast products are and how fast memory.

A GPU by its name from a table, or the machine at hand: a CUDA device by its own properties, the CPU by two short
measurements. Nothing here is kept between calls.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastsae.errors import ConfigError

GIB = 2**30
# Of what the data sheets promise, what was achieved: 790 of 989 TFLOP/s (bfloat16) and 4.3 of 4.8 TB/s on an H200. For
# every other GPU this is an assumption, until `python -m bench gpu` has been run there.
PRODUCT_SHARE, BANDWIDTH_SHARE = 790 / 989, 4.3 / 4.8
# The CUDA context and its libraries take this much before torch allocates anything: an assumption, 0.3 to 0.6 GiB are
# usual.
CONTEXT_BYTES = GIB // 2
LAUNCH_SECONDS = 5e-6  # from one small operation to the next on a GPU, which Python cannot go below
_SECONDS = 0.4  # of each measurement on the CPU


class Sheet(NamedTuple):
    """Of a vendor's public data sheet: GiB, TFLOP/s of dense products that sum in fp32, TB/s.

    gib is what torch sees of it (`total_memory`), which is a little less than what is on the sheet.
    """

    gib: float
    bf16: float
    tf32: float
    terabytes: float


GPUS = {
    "a10": Sheet(22.0, 125, 62.5, 0.6),
    "a100-40": Sheet(39.4, 312, 156, 1.555),
    "a100-80": Sheet(79.2, 312, 156, 2.039),
    "b200": Sheet(178, 2250, 1125, 8.0),
    "h100": Sheet(79.1, 989, 494.7, 3.35),  # SXM
    "h100-pcie": Sheet(79.1, 756, 378, 2.0),
    "h200": Sheet(139.8, 989, 494.7, 4.8),
    "l4": Sheet(22.0, 121, 60, 0.3),
    "l40s": Sheet(44.4, 362, 183, 0.864),
    "rtx3090": Sheet(23.6, 71, 35.6, 0.936),
    "rtx4090": Sheet(23.5, 165.2, 82.6, 1.008),
    "rtx5090": Sheet(31.4, 209.5, 104.8, 1.792),
}


@dataclass(frozen=True)
class Machine:
    """memory: bytes that can be had, None where that is not known. product: operations per second of a matrix product
    in the dtype asked for. bandwidth: bytes read or written per second. launch: seconds that an operation takes however
    small it is. about: where the figures are from."""

    name: str
    kind: str
    """cuda or cpu."""
    memory: int | None
    product: float
    bandwidth: float
    launch: float
    about: str


def by_name(name: str, dtype: str) -> Machine:
    """A GPU of the table. Raises ConfigError for others."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in GPUS:
        raise ConfigError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}; leave it out for the machine at hand")
    about = f"data sheet, {PRODUCT_SHARE:.0%} of its TFLOP/s and {BANDWIDTH_SHARE:.0%} of its TB/s assumed"
    return _of_sheet(key, GPUS[key], int(GPUS[key].gib * GIB) - CONTEXT_BYTES, dtype, about)


def at_hand(device: torch.device, dtype: str, measure: bool = True) -> Machine:
    """The machine we run on. measure: whether the CPU's speed is measured, which takes about a second, or left at 0."""
    if device.type == "cuda":
        return _cuda(device, dtype)
    if not measure:
        return Machine("this machine", "cpu", available_memory(device), 0.0, 0.0, 0.0, "not measured")
    threads = torch.get_num_threads()
    return Machine(
        f"this machine, {threads} thread{'s' if threads > 1 else ''}", "cpu", available_memory(device),
        _product_of_cpu(getattr(torch, dtype)), _bandwidth_of_cpu(), _launch_of_cpu(), "measured just now",
    )  # fmt: skip


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated now, None where the system does not say. What Linux holds as a cache of files
    counts as available."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has taken from the device and does not use is ours too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, macOS not these names
        return None


def _cuda(device: torch.device, dtype: str) -> Machine:
    properties = torch.cuda.get_device_properties(device)
    memory, words = available_memory(device), properties.name.lower()
    gib = properties.total_memory / GIB
    for name in sorted(GPUS, key=len, reverse=True):
        model, _, variant = name.partition("-")
        named = model.replace("rtx", "rtx ") in words and (variant != "pcie" or "pcie" in words)
        if named and abs(GPUS[name].gib - gib) < 0.1 * gib:
            about = f"data sheet of {name}, {PRODUCT_SHARE:.0%} of its TFLOP/s and {BANDWIDTH_SHARE:.0%} of its TB/s"
            return _of_sheet(properties.name, GPUS[name], memory, dtype, f"{about} assumed")
    return Machine(properties.name, "cuda", memory, 0.0, 0.0, LAUNCH_SECONDS, "a GPU that the table does not have")


def _of_sheet(name: str, sheet: Sheet, memory: int | None, dtype: str, about: str) -> Machine:
    # float32 products use TF32 (torch.set_float32_matmul_precision("high")); without it they take several times as
    # long. float64 is not on these sheets' tensor cores; a fifteenth of TF32 stands for it.
    rate = {"float32": sheet.tf32, "float64": sheet.tf32 / 15}.get(dtype, sheet.bf16)
    return Machine(
        name, "cuda", memory, rate * 1e12 * PRODUCT_SHARE, sheet.terabytes * 1e12 * BANDWIDTH_SHARE, LAUNCH_SECONDS,
        about,
    )  # fmt: skip


def _product_of_cpu(dtype: torch.dtype) -> float:
    """Operations per second of a product as the encoder makes it: 2 · 256 · 256 · 2048 of them a call."""
    x, weight = torch.zeros(256, 256, dtype=dtype), torch.zeros(2048, 256, dtype=dtype)
    out = torch.empty(256, 2048, dtype=dtype)
    return 2 * 256 * 256 * 2048 / _fastest(lambda: torch.mm(x, weight.T, out=out))


def _bandwidth_of_cpu() -> float:
    """Bytes per second of a copy of 64 MiB, more than a cache holds: as much is read as is written."""
    source = torch.zeros(16 * 2**20)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def _launch_of_cpu() -> float:
    small = torch.zeros(1)
    return _fastest(lambda: small.add_(1))


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest call in _SECONDS of them: what the machine can do while others leave it alone."""
    call()
    best, end = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
