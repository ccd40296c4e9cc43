"""Compiles every kernel, as it is shipped, for every GPU it is meant for, on a machine without one.

Triton's own compiler and assembler do that; the assembler's report tells registers, stack and shared memory. A
kernel that spills has a stack; one that needs more shared memory than a chip has cannot be launched there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import results
from bench.shipped import Shipped, shipped

# Shared memory that one program may use, in bytes, by compute capability: CUDA C++ Programming Guide, table of
# technical specifications ("maximum amount of shared memory per thread block").
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int
    shared_bytes: int
    code_bytes: int  # of the whole object file
    seconds: float

    def problem(self, capability: int) -> str | None:
        """Why this must not be shipped for that chip, or None."""
        if self.stack_bytes:
            return f"uses {self.stack_bytes} bytes of stack (spills)"
        if self.shared_bytes > SHARED_LIMIT[capability]:
            return f"needs {self.shared_bytes} bytes of shared memory, sm_{capability} has {SHARED_LIMIT[capability]}"
        return None


def compile_for(item: Shipped, capability: int) -> Resources:
    """Compiles one variant for sm_<capability>, with the alignment that a launch would find."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = item.kernel.arg_names
    source = ASTSource(
        item.kernel,
        {name: item.signature.get(name, "constexpr") for name in names},
        constexprs=item.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in item.aligned},
    )
    start = time.perf_counter()
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
    options |= {} if item.maxnreg is None else {"maxnreg": item.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(
        registers, stack, compiled.metadata.shared, len(compiled.asm["cubin"]), time.perf_counter() - start
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread, from the cuobjdump that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {report.stdout!r} {report.stderr!r}")
    return int(found[1]), int(found[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--capability", type=int, action="append", choices=sorted(SHARED_LIMIT),
                        help="only this compute capability, e.g. 90; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (one per core)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--out", type=Path, help="write a summary by op to this folder, for the README (bench/results)")


def main(args: argparse.Namespace) -> int:
    """Prints registers and shared memory of all variants; 1 if one does not compile, spills or does not fit."""
    import triton

    capabilities = args.capability or sorted(SHARED_LIMIT)
    print(f"Triton {triton.__version__}; registers, KiB of shared memory, KiB of code")
    print(f"{'kernel':<32}" + "".join(f"{'sm_' + str(c):>16}" for c in capabilities))
    rows, problems = [], []
    # Processes, as the compiler holds the interpreter; spawned, as torch's threads do not survive a fork.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(_compile_item, range(len(list(shipped()))), itertools.repeat(capabilities)):
            cells = {row["capability"]: _cell(row) for row in found}
            problems += [
                f"{row['op']} {row['variant']} on sm_{row['capability']}: {row['problem']}"
                for row in found if row["problem"]
            ]  # fmt: skip
            rows += [row | {"triton": triton.__version__} for row in found]
            if found:
                name = f"{found[0]['op']} {found[0]['variant']}"
                print(f"{name:<32}" + "".join(f"{cells.get(c, ''):>16}" for c in capabilities), flush=True)
    seconds = sum(row.get("seconds", 0) for row in rows)
    print(f"{len(rows)} kernels compiled in {seconds:.0f} s of processor time, {len(problems)} problems")
    for problem in problems:
        print(problem)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.out:
        about = results.machine() | {"triton": triton.__version__}  # which may not be the one that is installed
        results.save("compile", about, summary(rows), args.out / f"compile-triton-{triton.__version__}.json")
    return 1 if problems else 0


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By op: how many variants × GPUs, how many of them have a problem, and the most that one of them uses."""
    found = []
    for op in dict.fromkeys(row["op"] for row in rows):
        these = [row for row in rows if row["op"] == op]
        most = {name: max(row.get(name, 0) for row in these) for name in ("registers", "stack_bytes", "shared_bytes")}
        capabilities = sorted({row["capability"] for row in these})
        problems = sum(row["problem"] is not None for row in these)
        found.append({"op": op, "compiled": len(these), "capabilities": capabilities, "problems": problems} | most)
    return found


def _compile_item(number: int, capabilities: list[int]) -> list[dict[str, Any]]:
    """The rows of one variant, one for each capability where it is used."""
    item = list(shipped())[number]
    rows = []
    for capability in capabilities:
        if item.capabilities and capability not in item.capabilities:
            continue
        row: dict[str, Any] = {"op": item.op, "variant": item.variant, "capability": capability}
        try:
            used = compile_for(item, capability)
            row |= used.__dict__ | {"problem": used.problem(capability)}
        except Exception as error:  # the compiler fails in many ways, and the others are still wanted
            row["problem"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows


def _cell(row: dict[str, Any]) -> str:
    if "registers" not in row:
        return "failed"
    return f"{row['registers']}, {row['shared_bytes'] / 1024:.0f}, {row['code_bytes'] / 1024:.0f}"
