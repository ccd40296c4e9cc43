"""Every kernel compiles for every GPU it is meant for, without spilling and within the chip's shared memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import compile as bench_compile

ROOT = Path(__file__).parent.parent
CAPABILITY = 90


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """`python -m bench compile` for one GPU, in a process of its own: in this one kernels are interpreted.

    The other GPUs take minutes: make compile, which the CI runs.
    """
    path = tmp_path_factory.mktemp("compile") / "matrix.json"
    program = (
        "import os, sys; os.environ.pop('TRITON_INTERPRET', None); "
        "from bench.__main__ import main; "
        f"sys.exit(main(['compile', '--capability', '{CAPABILITY}', '--json', {str(path)!r}]))"
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
def test_every_kernel_is_in_the_matrix(capability):
    """Kernels by their names in the files, so that a new one cannot be forgotten."""
    shipped = [item for item in bench_compile.shipped() if not item.capabilities or capability in item.capabilities]
    name = re.compile(r"^def (\w+_kernel)\(", re.M)
    files = {path: name.findall(path.read_text()) for path in (ROOT / "kernels").glob("*.py")}
    assert {item.kernel.__name__ for item in shipped} == {name for names in files.values() for name in names}
    assert {item.op for item in shipped} == {path.stem for path in files}


def test_every_tile_fits_the_shared_memory_it_is_meant_for():
    """What a tile of operands takes, times its stages: less than the chip has, whatever the compiler adds."""
    from fastsae.kernels.encode import TILES

    for generation, tiles in TILES.items():
        for kind, tile in tiles.items():
            size = 2 if kind == "half" else 4
            needed = (tile.BLOCK_N + tile.BLOCK_F) * tile.BLOCK_D * size * tile.num_stages
            assert needed <= bench_compile.SHARED_LIMIT[generation], (generation, kind)


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
