"""Every kernel compiles for every GPU it is meant for, without spilling and within the chip's shared memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import compile as bench_compile

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The table of `python -m bench compile`, in a process of its own: in this one kernels are interpreted."""
    path = tmp_path_factory.mktemp("compile") / "matrix.json"
    program = (
        "import os, sys; os.environ.pop('TRITON_INTERPRET', None); "
        f"from bench.__main__ import main; sys.exit(main(['compile', '--json', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), done.stdout + done.stderr
    rows = json.loads(path.read_text())
    assert (done.returncode == 0) == all(row["problem"] is None for row in rows)
    return rows


def test_nothing_fails_spills_or_overflows(matrix):
    problems = [f"{r['op']} {r['variant']} sm_{r['capability']}: {r['problem']}" for r in matrix if r["problem"]]
    assert problems == []


@pytest.mark.parametrize("capability", sorted(bench_compile.SHARED_LIMIT))
def test_every_kernel_is_in_the_matrix(matrix, capability):
    ops = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    assert {row["op"] for row in matrix if row["capability"] == capability} == ops


def test_full_rows_need_few_registers(matrix):
    """At 64 registers a thread half of an SM's threads are resident, enough for a gather to hide its waits."""
    rows = [row for row in matrix if row["op"] == "decode" and "odd" not in row["variant"]]
    assert rows and all(row["registers"] <= 64 for row in rows)


@pytest.mark.parametrize(
    ("stack", "shared", "capability", "problem"),
    [(0, 99 << 10, 86, None), (0, (99 << 10) + 16, 86, "101376"), (0, 227 << 10, 90, None), (8, 0, 90, "spills")],
)
def test_what_counts_as_a_problem(stack, shared, capability, problem):
    found = bench_compile.Resources(32, stack, shared, 1000, 1.0).problem(capability)
    assert found is None if problem is None else problem in str(found)
