"""`python -m bench step`: a whole training step on the CPU, in units of the encoder product it cannot avoid.

A step is loss, backward, projected gradient, fused Adam and renormalised decoder rows. All variants are timed in turns
within one process, so that a busy machine slows all of them alike; what counts is their ratio to the encoder product
x [N, D] · W_encᵀ [D, F], timed in the same turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench import naive, results, timing
from bench.allocations import Watch
from fastsae.optim import DecoderNorm

# As in the goal that this bench measures: TopK ≤ 2.0, ReLU + L1 ≤ 2.5 encoder products, ≤ 1/4 of one dense [N, F].
N, D, F, K = 2048, 512, 16384, 32
GOALS = {"fastsae topk": 2.0, "fastsae relu + L1": 2.5}
# The same steps by TrainStep, whose optimizer is in the backward pass.
FUSED, FUSED_GOAL = ", TrainStep", 1.75
# The same without optimizer and projection.
GRADIENTS = ", loss + backward"
GRADIENT_GOAL = 1.6
PRODUCT = "encoder product"
# Small enough that no variant drifts away from the L0 it is timed at.
LEARNING_RATE = 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default in (("n", N), ("d", D), ("f", F), ("k", K)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{name.upper()} ({default})")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--rounds", type=int, default=9, help="times that each variant takes its turn (9)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="folder for the results file (bench/results)")


def main(args: argparse.Namespace) -> int:
    """0 if the goals are met or other sizes were asked for, 1 if not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        about = results.machine()
        rows = run(args.n, args.d, args.f, args.k, rounds=args.rounds, dtype=getattr(torch, args.dtype))["rows"]
    finally:
        torch.set_num_threads(threads)
    for row in rows:
        print(line(row), flush=True)
    path = results.save("step", about, rows, results.path_for("step", about, args.out or results.FOLDER))
    print(f"written: {path}")
    if (args.n, args.d, args.f, args.k, args.dtype) != (N, D, F, K, "float32"):
        return 0
    return 1 if any(row["gemms"] > (goal_of(row["variant"]) or row["gemms"]) for row in rows) else 0


def goal_of(variant: str) -> float | None:
    """Encoder products that a variant may take at the sizes above."""
    if variant.endswith(FUSED):
        return FUSED_GOAL
    return GRADIENT_GOAL if variant.endswith(GRADIENTS) else GOALS.get(variant)


def run(
    n: int = N, d: int = D, f: int = F, k: int = K, *, rounds: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """{"rows": one dict a variant}: median_ms, p20_ms, p80_ms, gemms (its median over that of the encoder product).

    Our own have l0, and extra: the peak of what loss and backward allocate beyond parameters and their gradients, as a
    fraction of one dense [N, F].
    """
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = {name: sae_for(name, x, f, k) for name in GOALS}
    dense = naive.NaiveSAE(d, f, dtype, torch.device("cpu"))
    weight = dense.W_enc.detach()
    calls: dict[str, Callable[[], object]] = {PRODUCT: lambda: x @ weight.T}
    calls |= {name: step(sae, x) for name, sae in ours.items()}
    calls |= {name + FUSED: train_step(sae_for(name, x, f, k), x) for name in GOALS}
    calls |= {name + GRADIENTS: gradients(sae, x) for name, sae in ours.items()}
    calls |= {"naive dense relu + L1": naive.step(dense, x), "naive dense topk": naive_topk_step(dense, x, k)}
    times = in_turns(calls, rounds)
    product = timing.summarise(times[PRODUCT]).median_ms
    rows = []
    for name, spent in times.items():
        timed = timing.summarise(spent)
        row = {
            "op": "step",
            "variant": name,
            "N": n,
            "D": d,
            "F": f,
            "K": k,
            "dtype": str(dtype).removeprefix("torch."),
        }
        row |= timed.row() | {"gemms": timed.median_ms / product}
        if name in ours:
            row |= {"l0": float(ours[name].loss(x).l0), "extra": extra_memory(ours[name], x)}
        rows.append(row)
    return {"rows": rows}


def sae_for(variant: str, x: Tensor, f: int, k: int) -> fastsae.SAE:
    """A fresh SAE; the ReLU one with biases that leave about k latents active."""
    dtype: Any = str(x.dtype).removeprefix("torch.")
    activation: Any = next((name for name in ("batchtopk", "topk", "jumprelu") if name in variant), "relu")
    sae = fastsae.SAE(d_in=x.shape[1], d_sae=f, activation=activation, k=k, dtype=dtype)
    if activation in ("relu", "jumprelu"):
        with torch.no_grad():
            pre = x[:256].float() @ sae.encoder.weight.float().T
            sae.encoder.bias.fill_(-pre.flatten().topk(k * pre.shape[0]).values[-1])
    return sae


def step(sae: fastsae.SAE, x: Tensor) -> Callable[[], None]:
    """A whole training step on x [N, D], as a call to be timed."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE, fused=True)
    norm = DecoderNorm(sae)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        sae.loss(x).loss.backward()
        norm.project_gradient_()
        optimizer.step()
        norm.renormalise_()

    return call


def train_step(sae: fastsae.SAE, x: Tensor) -> Callable[[], object]:
    """The same step without gradients in memory, as a call to be timed."""
    fused = fastsae.TrainStep(sae, lr=LEARNING_RATE)
    return lambda: fused(x)


def gradients(sae: fastsae.SAE, x: Tensor) -> Callable[[], None]:
    """Loss and backward on x [N, D], as a call to be timed."""

    def call() -> None:
        sae.zero_grad(set_to_none=True)
        sae.loss(x).loss.backward()

    return call


def naive_topk_step(sae: naive.NaiveSAE, x: Tensor, k: int) -> Callable[[], None]:
    """TopK written with torch.topk over a dense [N, F] and a dense decoder."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        pre = torch.nn.functional.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
        values, indices = pre.topk(k, dim=-1)
        f = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        (f @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean().backward()
        optimizer.step()

    return call


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, one after the other in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append((time.perf_counter() - start) * 1000)
    return times


def extra_memory(sae: fastsae.SAE, x: Tensor) -> float:
    """Peak of what loss and backward allocate beyond gradients, over the bytes of one dense [N, F] in x's dtype."""
    sae.zero_grad(set_to_none=True)
    with Watch(ignore=[sae.W_dec.nbytes]) as watch:
        sae.loss(x).loss.backward()
    return watch.peak / (x.shape[0] * sae.cfg.d_sae * x.element_size())


def line(row: dict[str, Any]) -> str:
    text = f"{row['variant']:<34} {row['median_ms']:9.1f} ms ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})"
    text += f"  {row['gemms']:5.2f} encoder products"
    if "extra" in row:
        text += f"  L0 {row['l0']:.1f}  {row['extra']:.2f} of [N, F] allocated beyond gradients"
    goal = goal_of(row["variant"])
    at_goal = (row["N"], row["D"], row["F"], row["K"], row["dtype"]) == (N, D, F, K, "float32")
    return f"{text}  (goal: {goal})" if goal is not None and at_goal else text
