"""`python -m bench dead`: what evaluating dead latents in some steps only saves, and what it costs.

The same data, start and seed for every `dead_every`, one step of each in turn, so that all see the same machine. Data
are made of known features, far fewer than the dictionary has latents, of which most die; AuxK brings some back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import results

EVERY = (1, 4, 16, 64)
D, K, TRUE = 128, 12, 256
HELD_OUT = 16384  # rows
LAST = 4  # times are of the last quarter of the steps, when who dies has died


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d-sae", type=int, default=8192, help="F (8192)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens N of a step (1024)")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (600)")
    parser.add_argument("--dead-after", type=int, default=65536, help="tokens of silence that make dead (65536)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--out", type=Path, help="folder for the results file (bench/results)")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    about, rows = results.machine(), []
    for aux in (True, False):
        rows += compare(args, aux)
        for row in rows[-len(EVERY) :]:
            print(line(row), flush=True)
    path = results.save("dead", about, rows, results.path_for("dead", about, args.out or results.FOLDER))
    print(f"written: {path}")
    return 0


def compare(args: argparse.Namespace, aux: bool) -> list[dict[str, Any]]:
    """One run for every `dead_every`, side by side; aux: with AuxK."""
    from fastsae import SAE, TrainStep
    from fastsae.synthetic import SyntheticData

    data = SyntheticData(dim=D, n_features=TRUE, active=float(K), decay=0.98, noise=0.02)
    generator = torch.Generator().manual_seed(1)
    held_out = data.sample(HELD_OUT, generator)
    steps = []
    for every in EVERY:
        sae = SAE(d_in=D, d_sae=args.d_sae, k=K, seed=0, dead_after_tokens=args.dead_after,
                  aux_coefficient=1 / 32 if aux else 0.0)  # fmt: skip
        steps.append(TrainStep(sae, lr=3e-3, dead_every=every))
    spent: list[list[float]] = [[] for _ in EVERY]
    was = [torch.zeros(args.d_sae, dtype=torch.bool) for _ in EVERY]
    revived = [0 for _ in EVERY]
    for _ in range(args.steps):
        x = data.sample(args.tokens, generator)
        for i, step in enumerate(steps):
            start = time.perf_counter()
            step(x)
            spent[i].append((time.perf_counter() - start) * 1000)
            now = dead(step)
            revived[i] += int((was[i] & ~now).sum())
            was[i] = now
    found = []
    for every, step, times, again in zip(EVERY, steps, spent, revived, strict=True):
        of_end = times[-args.steps // LAST :]
        found.append({
            "op": "dead", "every": every, "aux": aux, "N": args.tokens, "D": D, "F": args.d_sae, "K": K,
            "steps": args.steps, "mean_ms": statistics.mean(of_end), "median_ms": statistics.median(of_end),
            "dead": float(dead(step).float().mean()), "revived": again, "fve": explained(step.sae, held_out),
        })  # fmt: skip
    for row in found:
        row["time"] = row["mean_ms"] / found[0]["mean_ms"]
    return found


def dead(step: Any) -> Tensor:
    """[F] bool by the latent's own number, wherever it stands now."""
    silent = step.sae.tokens_since_fired >= step.sae.cfg.dead_after_tokens
    if step.order is None:
        return silent.clone()
    return torch.zeros_like(silent).index_put_((step.order,), silent)


@torch.no_grad()
def explained(sae: Any, x: Tensor) -> float:
    error = sum(float((sae(part) - part).double().square().sum()) for part in x.split(2048))
    return 1 - error / float((x - x.mean(0)).double().square().sum())


def line(row: dict[str, Any]) -> str:
    return (
        f"dead_every {row['every']:>3} {'with AuxK' if row['aux'] else 'without  '}  {row['mean_ms']:7.1f} ms a step "
        f"({row['time']:.2f})  dead {row['dead']:.1%}  came back {row['revived']}  FVE {row['fve']:.4f}"
    )
