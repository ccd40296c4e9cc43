"""`python -m bench wide`: TrainStep on the CPU against the width: time, memory, and what autograd and Adam take.

Each width runs in a process of its own, whose peak of resident memory the system counts; its times are taken in turns
with the encoder's matrix product and, at few tokens, with backward + torch's fused Adam.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import results, timing
from bench.step import LEARNING_RATE, in_turns
from fastsae.optim import DecoderNorm

D, K = 256, 32
WIDTHS = [2**power for power in range(13, 19)]
TOKENS = (64, 4096)
# Megabytes beyond parameters and state that a step at the largest width may take, by tokens.
MEMORY_GOAL = {64: 200, 4096: 400}
# Encoder products that a whole step may take at the largest width and 4096 tokens.
PRODUCT_GOAL = 1.4
# How many times as long backward and torch's fused Adam may take, at the least, as TrainStep's update, at few tokens.
ADAM_GOAL = 2.0
UPDATE, BACKWARD = "update", "backward + fused Adam"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each variant takes its turn (5)")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="dictionary sizes F (2^13 … 2^18)")
    parser.add_argument("--out", type=Path, help="folder for the results file (bench/results)")
    parser.add_argument("--plot", type=Path, help="also draw time and memory against the width into this PNG")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one measurement, in a process of its own


def main(args: argparse.Namespace) -> int:
    """0 if the goals at the largest width are met or it was not measured, 1 if not."""
    if args.one:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(**json.loads(args.one), rounds=args.rounds)))
        return 0
    about, rows = results.machine() | {"threads": args.threads}, []
    for f in args.widths:
        for n in TOKENS:
            rows += run({"n": n, "f": f}, args)
            print(line(rows[-1]), flush=True)
    path = results.save("wide", about, rows, results.path_for("wide", about, args.out or results.FOLDER))
    print(f"written: {path}")
    if args.plot:
        draw(rows, args.plot)
    return 0 if all(met(row) for row in rows) else 1


def run(sizes: dict[str, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "bench", "wide", "--threads", str(args.threads), "--rounds", str(args.rounds)]
    found = subprocess.run(
        [*command, "--one", json.dumps(sizes)], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    if found.returncode:
        raise SystemExit(f"bench wide: {sizes} failed:\n{found.stderr}")
    return [json.loads(found.stdout.splitlines()[-1])]


def measure(n: int, f: int, rounds: int) -> dict[str, Any]:
    """Of one width: memory first, while nothing else has been made, then times."""
    from fastsae import SAE, TrainStep

    x = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    small = TrainStep(SAE(d_in=D, d_sae=512, k=4), lr=LEARNING_RATE)
    small(x)  # libraries load, threads start
    before = resident("VmRSS")
    sae = SAE(d_in=D, d_sae=f, k=K)
    ours = TrainStep(sae, lr=LEARNING_RATE)
    kept = sum(t.nbytes for t in (*sae.state_dict().values(), *ours.tensors.values()))
    reset_peak()
    for _ in range(3):
        ours(x)
    row = {"op": "wide", "N": n, "D": D, "F": f, "K": K, "kept_mb": kept / 1e6}
    row["extra_mb"] = resident("VmHWM") - before - kept / 1e6
    weight, out = sae.encoder.weight.detach(), torch.empty(n, f)  # made once: a fresh one costs page faults
    calls: dict[str, Any] = {"product": lambda: torch.mm(x, weight.T, out=out), "step": lambda: ours(x)}
    times = in_turns(calls, rounds)
    if n == TOKENS[0]:
        times |= backward_times(ours, SAE(d_in=D, d_sae=f, k=K), x, rounds)
    for name, spent in times.items():
        timed = timing.summarise(spent)
        row |= {f"{name} ms": timed.median_ms, f"{name} p20": timed.p20_ms, f"{name} p80": timed.p80_ms}
    return row | {"products": row["step ms"] / row["product ms"]}


def backward_times(ours: Any, theirs: Any, x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of what follows the forward pass: TrainStep's update; and backward, projected gradient, fused Adam,
    renormalised rows. In turns, the forward passes not counted."""
    optimizer = torch.optim.Adam(theirs.parameters(), lr=LEARNING_RATE, fused=True)
    norm = DecoderNorm(theirs)
    found: dict[str, list[float]] = {UPDATE: [], BACKWARD: []}
    for turn in range(rounds + 1):
        ours.accumulate(x)
        start = time.perf_counter()
        ours.update()
        between = time.perf_counter()
        loss = theirs.loss(x).loss
        again = time.perf_counter()
        loss.backward()
        norm.project_gradient_()
        optimizer.step()
        norm.renormalise_()
        end = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        if turn:
            found[UPDATE].append((between - start) * 1000)
            found[BACKWARD].append((end - again) * 1000)
    return found


def resident(field: str, process: int | str = "self") -> float:
    """MB of a process, by its number, from /proc: VmRSS now, VmHWM at most."""
    status = Path(f"/proc/{process}/status")
    for text in status.read_text(encoding="ascii").splitlines():
        if text.startswith(field + ":"):
            return int(text.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{status} has no {field}")


def reset_peak() -> None:
    """VmHWM begins again at what is resident now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def met(row: dict[str, Any]) -> bool:
    """Whether a row keeps the goals, which there are for the largest width."""
    if row["F"] != WIDTHS[-1]:
        return True
    fits = row["extra_mb"] <= MEMORY_GOAL[row["N"]]
    if row["N"] == TOKENS[0]:
        return fits and row[f"{BACKWARD} ms"] >= ADAM_GOAL * row[f"{UPDATE} ms"]
    return fits and row["products"] <= PRODUCT_GOAL


def line(row: dict[str, Any]) -> str:
    text = f"F {row['F']:>7}  N {row['N']:>5}  {row['step ms']:9.1f} ms  {row['products']:5.2f} encoder products"
    text += f"  {row['kept_mb']:7.0f} MB kept, {row['extra_mb']:6.0f} MB beyond"
    if f"{UPDATE} ms" in row:
        text += f"  {BACKWARD} {row[f'{BACKWARD} ms'] / row[f'{UPDATE} ms']:.2f} × the update"
    return text + ("" if met(row) else "  (goal missed)")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of a step against the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n, colour in zip(TOKENS, ("#b3541e", "#1f5a7a"), strict=True):
        some = [row for row in rows if row["N"] == n]
        widths = [row["F"] for row in some]
        left.plot(widths, [row["step ms"] for row in some], "o-", color=colour, label=f"TrainStep, N {n}")
        left.plot(widths, [row["product ms"] for row in some], ":", color=colour, label=f"encoder product, N {n}")
        if n == TOKENS[0]:
            for name, style in ((UPDATE, "^-"), (BACKWARD, "s--")):
                left.plot(widths, [row[f"{name} ms"] for row in some], style, color="#777777", label=f"{name}, N {n}")
        right.plot(widths, [row["extra_mb"] for row in some], "o-", color=colour, label=f"beyond those, N {n}")
    some = [row for row in rows if row["N"] == TOKENS[-1]]
    right.plot([row["F"] for row in some], [row["kept_mb"] for row in some], "-", color="#777777",
               label="parameters and state")  # fmt: skip
    gradient = [8 * row["F"] * row["D"] / 1e6 for row in some]
    right.plot([row["F"] for row in some], gradient, ":", color="#777777", label="[F, D] gradients, which are not made")
    for axes, name in ((left, "ms"), (right, "MB")):
        axes.set(xscale="log", yscale="log", xlabel="latents F", ylabel=name)
        axes.set_ylim(axes.get_ylim()[0], axes.get_ylim()[1] * 30)  # room for the legend above the lines
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
