"""How long a call takes, on the CPU or on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

L2_FLUSH_BYTES = 256 * 2**20  # more than the L2 of any GPU so far (126 MB on sm_100)


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and the 20th and 80th percentile of `repeats` calls after the warm-up.

    peak_mib: the most device memory that was allocated during a call beyond what was there before it, in MiB; None on
    the CPU, where torch does not count it.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    peak_mib: float | None = None

    def row(self) -> dict[str, Any]:
        return asdict(self)


def summarise(times_ms: list[float], peak_mib: float | None = None) -> Timing:
    ordered = sorted(times_ms)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, len(ordered), peak_mib)


def measure(
    call: Callable[[], object], device: torch.device, *, seconds: float = 2.0, least: int = 3, most: int = 100
) -> Timing:
    """Times `call`: twice to warm up, then for about `seconds`, at least `least` and at most `most` times.

    On a GPU each call stands between two events, with the L2 cache overwritten before it.
    """
    one = _one_cuda_call if device.type == "cuda" else _one_cpu_call
    peak = _peak_mib(call, device)
    second = one(call, device)
    repeats = min(max(int(seconds * 1000 / max(second, 1e-3)), least), most)
    return summarise([one(call, device) for _ in range(repeats)], peak)


def _one_cpu_call(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def _one_cuda_call(call: Callable[[], object], device: torch.device) -> float:
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """The warm-up call, with its memory counted."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
