"""`python -m bench site`: the site of a wide dictionary and its server: size on disk, times in a browser, memory.

The dictionary is made of random numbers (site_case), the site is the real one, and `fastsae serve` is a process of its
own, without a model. Times are of a browser on the same machine; the site's files, just written, are in the system's
memory.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import browse, results
from bench.survey import give_back
from bench.wide import resident

ROOT = Path(__file__).parent.parent
PLOTLY = "assets/plotly-basic.min.js"  # the same in every site, and told apart
V = 50_000  # entries of the vocabulary
HEAP_PAGES = 50
# At most, by what is measured; the largest value counts, not the median.
GOALS = {"site": 400.0, "largest file": 2.0, "first paint": 1000.0, "feature page": 300.0, "server": 1000.0}  # MB, ms
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", type=int, default=32_768, help="features of the dictionary (32,768)")
    parser.add_argument("--rounds", type=int, default=5, help="new browser contexts for each measurement (5)")
    parser.add_argument("--pages", type=int, default=10, help="feature pages that are opened in each of them (10)")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder, of 2 GB (the system's place)")
    parser.add_argument("--keep", action="store_true", help="leave the site where it was written, and say where")
    parser.add_argument("--out", type=Path, help="folder for the results file (bench/results)")


def main(args: argparse.Namespace) -> int:
    """0 if all goals are kept, 1 if not, 2 where something to measure with is missing or nothing could be measured."""
    problem = _missing() or _too_few(args)
    if problem:
        print(f"bench site: {problem}")
        return 2
    about = results.machine()
    if args.keep:
        folder = Path(tempfile.mkdtemp(prefix="fastsae-site-", dir=args.folder))
        rows = measured(args, folder, about)
        print(f"the site stays in {folder}")
    else:
        with tempfile.TemporaryDirectory(prefix="fastsae-site-", dir=args.folder) as name:
            rows = measured(args, Path(name), about)
    path = results.path_for("site", about, args.out or results.FOLDER)
    results.save("site", about, rows, path, features=args.features)
    print(f"written: {path}")
    return 1 if any(row["worst"] > row["goal"] for row in rows if "goal" in row) else 0


def _missing() -> str | None:
    """What this machine lacks, in one line."""
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        return "fastapi and uvicorn are missing: pip install 'fastsae[all]'"
    if not Path("/proc/self/status").exists():
        return "there is no /proc, which tells the server's memory: Linux has it"
    return browse.missing()


def _too_few(args: argparse.Namespace) -> str | None:
    if args.features < 64:
        return f"expected at least 64 features, so that there are some to open, got {args.features}"
    if min(args.rounds, args.pages) < 1:
        return f"rounds and pages must be at least 1, got {args.rounds} and {args.pages}"
    return None


def measured(args: argparse.Namespace, folder: Path, about: Row) -> list[Row]:
    """All rows, told as they come. about gets the browser's version."""
    rows: list[Row] = []

    def tell(new: list[Row]) -> None:
        for row in new:
            rows.append(row)
            print(line(row), flush=True)

    tell(written(args.features, folder))
    with served(folder) as (address, process):
        with browse.started() as browser:
            about |= {"chromium": browser.version, "playwright": results.version("playwright")}
            for origin, where in (("server", address), ("disk", (folder / "index.html").as_uri())):
                tell(browsed(browser, origin, where, folder, args.rounds, args.pages))
        tell(asked(address))
        tell([_row("server", [resident("VmHWM", process)], "MB")])
    return rows


def written(F: int, folder: Path) -> list[Row]:
    """Writes what `fastsae analyze` leaves: site, survey.npz, match.json. Seconds, and sizes in MB."""
    from bench import site_case
    from fastsae.dashboard import site

    facts = site_case.facts(F, V)
    start = time.perf_counter()
    site.write_site(folder, facts, show_progress=False)
    seconds = time.perf_counter() - start
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size / 1e6 for path in files}
    largest = max((name for name in sizes if name != PLOTLY), key=sizes.__getitem__)
    start = time.perf_counter()
    facts.cards.survey.save(folder / "survey.npz")
    assert facts.match is not None
    facts.match.save(folder / "match.json")
    saved = time.perf_counter() - start
    survey = (folder / "survey.npz").stat().st_size / 1e6
    del facts
    give_back()  # a gigabyte or more, which browser and server may need
    return [
        _row("writing the site", [seconds], "s"),
        _row("site", [sum(sizes.values())], "MB", files=len(sizes)),
        _row("largest file", [sizes[largest]], "MB", name=largest, plotly=sizes[PLOTLY]),
        _row("writing survey.npz", [saved], "s", mb=survey),
    ]


# --- in the browser ---------------------------------------------------------------------------------------------------


def browsed(browser: Any, origin: str, address: str, folder: Path, rounds: int, pages: int) -> list[Row]:
    """What a reader waits for, from the server or from the disk."""
    from fastsae.dashboard import site

    rows = site.read_rows(folder)
    live = np.flatnonzero(np.array(rows["max"], dtype=np.float64) > 0)
    rng = np.random.default_rng(0)
    numbers = [rng.choice(live, min(pages, len(live)), replace=False).tolist() for _ in range(rounds)]
    times = browse.overview(browser, address, rounds) | browse.features(browser, address, numbers)
    times |= browse.lists(browser, address, rounds, _searches(folder, rows), _sorts(rows))
    found = [_row(op, values, "ms", origin=origin) for op, values in times.items()]
    opened = rng.choice(live, min(HEAP_PAGES, len(live)), replace=False).tolist()
    before, after = browse.heap(browser, address, opened)
    return [*found, _row("heap", [after], "MB", origin=origin, pages=len(opened), before=round(before, 1))]


def _searches(folder: Path, rows: dict[str, list[Any]]) -> dict[str, int]:
    """Text → how many features the list finds with it: all words in number, token, category or explanation."""
    from fastsae.dashboard import site

    names = site.read_overview(folder)["proxies"]
    columns = (rows[name] for name in ("feature", "token", "proxy", "explanation"))
    cells = zip(*columns, strict=True)
    texts = [f"{f} {token} {names[p] if p >= 0 else ''} {said}".lower() for f, token, p, said in cells]
    wanted = ("27", "cat", "cat number 5", "no such words", "base64")
    return {text: sum(all(word in whole for word in text.split()) for whole in texts) for text in wanted}


def _sorts(rows: dict[str, list[Any]]) -> dict[str, list[int]]:
    """Column → the features with the largest value, which come first."""
    found: dict[str, list[int]] = {}
    for name in ("density", "max", "match", "logit"):
        column = np.array(rows[name], dtype=np.float64)  # None becomes NaN
        found[name] = np.flatnonzero(column == np.nanmax(column)).tolist()
    return found | {"token": [], "feature": [0]}


# --- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """Address and process number of `fastsae serve`. Raises RuntimeError with what it said where it does not start."""
    command = [sys.executable, "-m", "fastsae", "serve", str(folder), "--port", "0"]
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stderr=said, cwd=ROOT) as process:
        try:
            yield _address(process, said), process.pid
        finally:
            process.terminate()


def _address(process: subprocess.Popen[Any], said: Any, seconds: float = 300) -> str:
    end = time.monotonic() + seconds
    while True:
        ended = process.poll() is not None
        said.seek(0)
        text = said.read()
        if found := re.search(r"http://\S+/", text):
            return found[0]
        if ended or time.monotonic() > end:
            raise RuntimeError(f"fastsae serve did not start:\n{text}")
        time.sleep(0.05)


def asked(address: str, cards: int = 100) -> list[Row]:
    """What the API takes for cards, a comparison, all proxies of the report, and the list sorted by every column."""
    overview = _answer(address, "overview")
    F, names = overview["d_sae"], overview["proxies"]
    columns = _answer(address, "features", limit=1)["rows"][0]
    times: dict[str, list[float]] = {"list": [], "card": [], "comparison": [], "proxy": []}

    def timed(op: str, path: str, post: Row | None = None, **query: Any) -> Row:
        start = time.perf_counter()
        answer = _answer(address, path, post, **query)
        times[op].append(1e3 * (time.perf_counter() - start))
        return answer

    for f in np.random.default_rng(1).integers(0, F, cards).tolist():
        assert timed("card", f"features/{f}")["feature"] == f
    assert timed("comparison", "compare", limit=1000)["total"] == F
    for name in names:
        job = timed("proxy", "proxies", {"name": name})
        assert job["state"] == "done", job
    for name in (*columns, *(f"proxy:{name}" for name in names)):
        assert timed("list", "features", sort=name, descending=True, limit=1000, offset=F // 2)["total"] == F
    return [_row(f"API, {op}", values, "ms", origin="server") for op, values in times.items()]


def _answer(address: str, path: str, post: Row | None = None, **query: Any) -> Row:
    """Of the API. A proxy's job is a dictionary as well."""
    body = None if post is None else json.dumps(post).encode()
    request = urllib.request.Request(
        f"{address}api/{path}?{urllib.parse.urlencode(query)}", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(op: str, values: list[float], unit: str, **more: Any) -> Row:
    """Median and largest of what was measured, and the goal if there is one."""
    goal = {"goal": GOALS[op]} if op in GOALS else {}
    median, worst = (round(value, 3) for value in (statistics.median(values), max(values)))
    return {"op": op, "unit": unit, "n": len(values), "median": median, "worst": worst, **goal, **more}


def verdict(row: Row) -> str:
    """Beside its goal; nothing where there is none."""
    if "goal" not in row:
        return ""
    if row["worst"] <= row["goal"]:
        return "met"
    return "missed by the slowest" if row["median"] <= row["goal"] else "missed"


def line(row: Row) -> str:
    figures = f"{row['median']:>9,.1f}" if row["n"] == 1 else f"{row['median']:>9,.1f}, at most {row['worst']:,.1f}"
    goal = f"  (goal {row['goal']:,.0f}: {verdict(row)})" if "goal" in row else ""
    return f"{named(row):<54}{figures} {row['unit']}{goal}"


def named(row: Row) -> str:
    """What was measured, where from included."""
    origin = f", from the {row['origin']}" if "origin" in row and not row["op"].startswith("API") else ""
    return title(row) + origin


def title(row: Row) -> str:
    """What was measured, in words."""
    words: dict[str, str] = {
        "site": f"the site, {row.get('files')} files",
        "largest file": f"its largest file, {row.get('name')}",
        "writing survey.npz": "writing its survey.npz",
        "server": "the server's memory, at its peak",
        "overview": "the overview's heading",
        "feature page": "a feature page",
        "feature page, opened first": "a feature page as the first page",
        "list": "the list of all features",
        "search": "a search in the list",
        "sort": "sorting the list",
        "heap": f"JavaScript's heap after {row.get('pages')} feature pages",
    }
    return words.get(row["op"], str(row["op"]))
