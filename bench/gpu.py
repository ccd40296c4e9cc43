"""`python -m bench gpu`: is every kernel right on this GPU, and how fast are kernels and whole steps on it?

One call of a few minutes: checks, ceilings of the chip, then the cases, cheap ones first; the results file is written
after every case, so that a run cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any

import torch

from bench import cases, checks, encoders, results, shapes, steps, timing

# On a GPU float32 products use TF32, as training does; the results say so.
PRECISION = "high"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=480, help="no case is started after this time (480)")
    parser.add_argument("--out", type=Path, help="the results file (….json), or a folder for it (bench/results)")
    parser.add_argument("--commit", help="the commit that is measured, where the checkout's history is not at hand")
    parser.add_argument("--dry-run", action="store_true",
                        help="the same on the CPU with tiny sizes and Triton's interpreter: does the program run?")


def main(args: argparse.Namespace) -> int:
    """0 if all checks passed, 1 if one failed, 2 without a GPU."""
    if args.dry_run:
        device = torch.device("cpu")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which is in the first check
    elif torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        print("bench gpu needs an NVIDIA GPU that torch can use; --dry-run tries the program without one")
        return 2
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(PRECISION)
    return _Run(args, device).all()


class _Run:
    """One run: what has been measured so far, and the file it goes to."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.device, self.dry = device, args.dry_run
        self.deadline = time.monotonic() + args.seconds
        self.about = results.machine(device)
        if args.commit:
            self.about["commit"] = args.commit
        kind = "dry-run" if self.dry else "gpu"
        # A dry run says nothing about speed, so it leaves no file unless it is asked to.
        self.path = None if self.dry and args.out is None else args.out
        if not self.dry and args.out is None:
            self.path = results.path_for(kind, self.about)
        elif args.out is not None and args.out.suffix != ".json":
            self.path = results.path_for(kind, self.about, args.out)
        self.kind = kind
        self.checks: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def all(self) -> int:
        print(" · ".join(f"{key} {value}" for key, value in self.about.items() if value is not None), flush=True)
        self.check()
        sizes = shapes.TINY if self.dry else shapes.SHAPES
        dtypes = (torch.float32,) if self.dry else (torch.bfloat16, torch.float32)
        for case in (*cases.ceilings(), *cases.all_cases(sizes, dtypes)):
            if time.monotonic() > self.deadline:
                self.rows.append(case.row() | {"note": "not started: out of time"})
            else:
                self.rows.append(self.one(case))
            print(self.line(self.rows[-1]), flush=True)
            self.save()
        if self.path is not None:
            print(f"written: {self.path}")
        wrong = [row for row in (*self.checks, *self.rows) if row.get("passed") is False]
        print(f"{len(self.checks)} checks, {len(wrong)} wrong")
        return 1 if wrong else 0

    def check(self) -> None:
        for op, ask, unit in (("decode", checks.decode_checks, "of what rounding allows"),
                              ("encode", checks.encode_checks, "of what rounding allows"),
                              ("step", checks.step_checks, "relative, float32"),
                              ("TrainStep", checks.train_step_checks, "relative, of the loss"),
                              ("no wait", checks.no_wait_checks, "difference of a graph's replay")):
            try:
                rows = ask(self.device)
            except Exception as error:  # a kernel that does not even run is one wrong check, not the end
                rows = [{"op": op, "case": f"{type(error).__name__}: {error}", "error": float("nan"), "passed": False}]
            for row in rows:
                if not row["passed"]:
                    print(f"WRONG  {row['op']} {row['case']}: error {row['error']:.3g}")
            worst = max((row["error"] for row in rows), default=0.0)
            if not rows:
                print(f"checks of {op}: none without a GPU", flush=True)
                continue
            print(f"{len(rows)} checks of {op}: error at most {worst:.2g} ({unit})", flush=True)
            self.checks += rows
        self.save()

    def one(self, case: cases.Case) -> dict[str, Any]:
        """Builds, checks and times one case; what goes wrong becomes a note in its row."""
        row = case.row()
        try:
            call = case.build(self.device)
            seconds, least = (0.05, 1) if self.dry else (0.5, 3)
            timed = timing.measure(call, self.device, seconds=seconds, least=least, most=50)
            row |= timed.row() | self.derived(case, timed.median_ms) | getattr(call, "about", {})
            if self.device.type == "cuda":
                row["allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            if case.memory and timed.peak_mib:
                row["estimate_of_peak"] = case.memory / 2**20 / timed.peak_mib
            if (case.op, case.variant) == ("part", "topk repair"):
                call = None
                row |= encoders.effort(case.shape, case.dtype, self.device)
        except shapes.TooLarge as error:
            row["note"] = str(error)
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
        except Exception as error:  # a case that fails must not cost the rest of the run
            row |= {"note": f"{type(error).__name__}: {error}", "passed": False}
        call = None  # frees the case's tensors
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def derived(self, case: cases.Case, ms: float) -> dict[str, float]:
        """Rates, and for a step how many encoder products of its shape and dtype it takes."""
        found: dict[str, float] = {}
        if case.operations and not self.dry:
            found["tflop_per_s"] = case.operations / ms / 1e9
        if case.traffic and not self.dry:
            found["gb_per_s"] = case.traffic / ms / 1e6
            copies = [row["gb_per_s"] for row in self.rows if row["op"] == "copy" and "gb_per_s" in row]
            if copies:
                found["share_of_copy"] = found["gb_per_s"] / max(copies)
        if case.op not in ("copy", "matmul", "encoder"):
            key = case.row()
            for row in self.rows:
                same = all(row[name] == key[name] for name in ("shape", "dtype"))
                if row["op"] == "encoder" and same and "median_ms" in row:
                    found["gemms"] = ms / row["median_ms"]
        return found

    def line(self, row: dict[str, Any]) -> str:
        head = f"{row['op']:<15} {row['variant']:<21} {row['shape']:<10} {row['dtype']:<9}"
        if "median_ms" not in row:
            return f"{head} {row['note']}"
        rates = {"tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s", "gemms": "encoder products"}
        derived = "".join(f"  {row[key]:,.1f} {unit}" for key, unit in rates.items() if key in row)
        if "share_of_copy" in row:
            derived += f" ({row['share_of_copy']:.0%} of a copy's)"
        if "rows_failed" in row:
            derived += f"  {row['rows_failed']:.2%} of rows failed, {row['rows_exact']:.0f} exact"
        if "loss_last" in row:
            derived += f"  loss {row['loss_first']:.3g} → {row['loss_last']:.3g} in {row['steps']} steps"
        memory = "" if row["peak_mib"] is None else f"  {row['peak_mib']:,.0f} MiB"
        if "estimate_of_peak" in row:
            memory += f" (estimate: {row['estimate_of_peak']:.2f} of it)"
        memory += "".join(f"  MISSED: {goal}" for goal in steps.missed(row))
        return f"{head} {row['median_ms']:9.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f}){derived}{memory}"

    def save(self) -> None:
        if self.path is not None:
            results.save(self.kind, self.about, self.rows, self.path,
                         float32_matmul_precision=PRECISION, checks=self.checks)
