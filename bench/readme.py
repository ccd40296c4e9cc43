"""`python -m bench readme`: the tables of README.md from bench/results, between `<!-- bench: KIND -->` marks.

Nobody types a figure into a table: what stands there is what the results files hold.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import results

README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- bench: (?P<kind>\w+) -->\n).*?(<!-- end bench -->)", re.DOTALL)
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", type=Path, default=README, help="the file to write (README.md)")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of results (bench/results)")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the file is not up to date")


def main(args: argparse.Namespace) -> int:
    """0 if the file is, or has become, up to date; 1 if not; 2 if it has no marks."""
    before = args.file.read_text(encoding="utf-8")
    if not MARKED.search(before):
        print(f"{args.file} has no '<!-- bench: step -->' … '<!-- end bench -->'; put them where the tables go")
        return 2
    after = fill(before, args.results)
    if after == before:
        print(f"{args.file} is up to date")
        return 0
    if args.check:
        print(f"{args.file} differs from {args.results}; run python -m bench readme")
        return 1
    args.file.write_text(after, encoding="utf-8")
    print(f"{args.file} written")
    return 0


def fill(text: str, folder: Path) -> str:
    """text with what stands between the marks replaced. Raises ValueError for a kind that has no table."""

    def tables(mark: re.Match[str]) -> str:
        kind = mark["kind"]
        if kind not in TABLES:
            raise ValueError(f"no table for results of kind {kind!r}; there are {', '.join(TABLES)}")
        found = results.load(kind, folder)
        if not found:
            return f"{mark[1]}Not measured yet: `python -m bench {kind}` does it.\n{mark[3]}"
        parts = [f"{_caption(result['machine'])}\n\n{TABLES[kind](result['rows'])}" for result in found]
        return mark[1] + "\n".join(parts) + mark[3]

    return MARKED.sub(tables, text)


def _caption(machine: Row) -> str:
    """One line: on what, with what, when."""
    on = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    versions = [f"torch {machine['torch']}"]
    if machine.get("gpu") and machine.get("triton"):
        versions.append(f"Triton {machine['triton']}")
    commit = f"commit {machine['commit']}, " if machine.get("commit") else ""
    return f"{on}; {', '.join(versions)}; {commit}{machine['date'].split()[0]}:"


def _step_table(rows: list[Row]) -> str:
    body = [[row["variant"], _time(row), _number(row, "gemms", 2), _number(row, "extra", 2)] for row in rows]
    table = _table(["", "ms (p20 to p80)", "encoder products", "allocated beyond gradients, of one [N, F]"], body)
    sizes = {f"N {row['N']}, D {row['D']}, F {row['F']}, K {row['K']}, {row['dtype']}" for row in rows}
    return f"{table}\n{'; '.join(sorted(sizes))}.\n"


def _gpu_table(rows: list[Row]) -> str:
    kernels = [
        [row["op"], row["variant"], row["shape"], row["dtype"], _time(row),
         _number(row, "tflop_per_s"), _number(row, "gb_per_s", 0), _number(row, "gemms")]
        for row in rows
    ]
    sizes = {row["shape"]: f"{row['shape']}: N {row['N']}, D {row['D']}, F {row['F']}, K {row['K']}"
             for row in rows if row["shape"] != "-"}
    table = _table(["op", "by", "size", "dtype", "ms (p20 to p80)", "TFLOP/s", "GB/s", "encoder products"], kernels)
    return f"{table}\n{'; '.join(sizes.values())}.\n"


TABLES: dict[str, Callable[[list[Row]], str]] = {"step": _step_table, "gpu": _gpu_table}


def _time(row: Row) -> str:
    if "median_ms" not in row:
        return row.get("note", "")
    digits = 1 if row["median_ms"] >= 10 else 3
    return f"{row['median_ms']:.{digits}f} ({row['p20_ms']:.{digits}f} to {row['p80_ms']:.{digits}f})"


def _number(row: Row, key: str, digits: int = 1) -> str:
    return f"{row[key]:.{digits}f}" if row.get(key) is not None else ""


def _table(head: list[str], body: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
