"""`python -m bench memory`: the peak of a training run on the CPU, measured, beside what `fastsae.estimate` says.

Each case is a process of its own that trains three steps as `fastsae.train` does (`recipe.start`, then TrainStep).
Two numbers come of it: the peak of the resident set above what it was before, and the allocator's own count, by
torch's profiler. The first is what a user sees, and moves by up to 50 MB from run to run: glibc serves up to 32 MiB
from a heap, which fragments, and gives it back late, if at all. With a limit of 1 MiB (MALLOC_MMAP_THRESHOLD_) the
two agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import results

COMMON: dict[str, Any] = {"activation": "topk", "k": 32, "d_in": 256, "d_sae": 65536, "batch_size": 1024, "clip": 0.0}
SR = {"dtype": "bfloat16", "master": "bf16-sr"}
CASES: list[dict[str, Any]] = [
    {"batch_size": 64},
    {"batch_size": 4096},
    {"activation": "relu", "batch_size": 4096},
    {"activation": "batchtopk", "batch_size": 2048},
    {"activation": "jumprelu", "batch_size": 2048},
    {"state": "8bit"},
    {"state": "rowwise"},
    {"state": "bf16"},
    {"beta1": 0.0},
    {"state": "8bit", "beta1": 0.0},
    {"d_sae": 131072, "state": "8bit", **SR, "batch_size": 256},
    {"d_sae": 131072, "state": "rowwise", "beta1": 0.0, **SR, "batch_size": 256},
    {"d_sae": 65536, "dtype": "bfloat16", "batch_size": 256},
    {"d_in": 64, "d_sae": 131072, "batch_size": 4096},
    {"d_in": 512, "d_sae": 32768},
    {"d_in": 512, "d_sae": 32768, "clip": 1.0, "state": "8bit"},
    # Mostly workspace:
    {"d_in": 64, "d_sae": 8192, "batch_size": 4096},
    {"d_in": 64, "d_sae": 8192, "batch_size": 4096, "activation": "relu"},
    {"d_in": 128, "d_sae": 16384, "batch_size": 2048, "activation": "relu", "init_l0": 0},
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", type=int, help="one of the cases, from 0 (all)")
    parser.add_argument("--out", type=Path, help="folder for the results file (none)")


def main(args: argparse.Namespace) -> int:
    """0 if every estimate lies within 5 % of one of the two, 1 if not, 2 where the system does not tell peaks."""
    if not Path("/proc/self/clear_refs").exists():
        print("bench memory reads peaks from /proc, which only Linux has")
        return 2
    rows = []
    for case in CASES if args.case is None else CASES[args.case :][:1]:
        rows.append(run(COMMON | case))
        print(line(case, rows[-1]), flush=True)
    if args.out is not None:
        about = results.machine()
        results.save("memory", about, rows, results.path_for("memory", about, args.out))
    return 1 if any(min(abs(error) for error in errors(row).values()) > 0.05 for row in rows) else 0


def run(options: dict[str, Any], steps: int = 3, how: tuple[str, ...] = ("resident", "allocated")) -> dict[str, Any]:
    """Bytes: estimate, tensors (those of them that torch allocates), and of what is in `how`: resident, allocated."""
    from fastsae.footprint import footprint

    found = footprint(config_of(options))
    row: dict[str, Any] = options | {"estimate": found.total, "tensors": found.allocated}
    for name in how:
        argv = [sys.executable, "-m", "bench.memory", json.dumps(options), name, str(steps)]
        done = subprocess.run(argv, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring {options} failed: {done.stderr[-2000:]}")
        row[name] = int(done.stdout)
    return row


def errors(row: dict[str, Any]) -> dict[str, float]:
    """Of the estimate, relative, by what was measured."""
    said = {"resident": row["estimate"], "allocated": row["tensors"]}
    return {name: count / row[name] - 1 for name, count in said.items() if name in row}


def config_of(options: dict[str, Any]) -> Any:
    from fastsae.recipe import TrainConfig

    return TrainConfig(**{"lr": 1e-6, "dead_after_tokens": 10**7, **options})


def line(case: dict[str, Any], row: dict[str, Any]) -> str:
    text = " ".join(f"{key}={value}" for key, value in case.items())
    numbers = f"estimate {row['estimate'] / 1e6:6.1f} MB, tensors {row['tensors'] / 1e6:6.1f}"
    for name, error in errors(row).items():
        numbers += f"  {name} {row[name] / 1e6:6.1f} ({error:+.1%})"
    return f"{text:<78} {numbers}"


# --- the process that is measured -----------------------------------------------------------------------------------


def child(options: dict[str, Any], name: str, steps: int) -> int:
    """Bytes of the peak, by the name of how it is measured."""
    import torch

    from bench.allocations import Watch
    from fastsae.recipe import START_ROWS
    from fastsae.store import MemoryStore

    config = config_of(options)
    # What a first step loads of torch is not the run's.
    small = {"d_in": 32, "d_sae": 256, "k": 8, "batch_size": 64, "init_l0": min(config.init_l0, 8)}
    train(dataclasses.replace(config, **small), MemoryStore(torch.randn(256, 32)), 2)
    generator = torch.Generator().manual_seed(0)
    store = MemoryStore(torch.randn(START_ROWS, config.d_in, generator=generator))  # the caller's
    gc.collect()
    if name == "allocated":
        with Watch() as watch:
            train(config, store, steps)
        return watch.peak
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    train(config, store, steps)
    return _status("VmHWM") - before


def train(config: Any, store: Any, steps: int) -> None:
    """As fastsae.train, without its log and checkpoints."""
    from fastsae.recipe import start
    from fastsae.step import TrainStep

    sae = start(config, store)
    step = TrainStep(
        sae, lr=config.lr, betas=(config.beta1, config.beta2), state=config.state, master=config.master,
        clip=config.clip, clip_by=config.clip_by, lazy=config.lazy,
    )  # fmt: skip
    batches = store.batches(config.batch_size, seed=0)
    for _ in range(steps):
        step(next(batches).x)


def _status(name: str) -> int:
    for text in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if text.startswith(f"{name}:"):
            return int(text.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    print(child(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
