"""`python -m bench survey`: the one pass over all features, beside harvesting and encoding the same tokens; and its
memory as the text grows.

Times are of one process, in turns. Memory is the peak of a process of its own for every length of text.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.wide import reset_peak, resident

GOAL = 1.5  # times harvesting and encoding that the pass may take
LENGTHS = (1_000_000, 4_000_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--demo", type=Path, default=Path("out/demo"), help="folder of a finished demo (out/demo)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each takes its turn (3)")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of the timed passes (400,000)")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), help="tokens of text for the memory")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--out", type=Path, help="folder for the results file (bench/results)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the memory of one pass, in a process of its own


def main(args: argparse.Namespace) -> int:
    """0 if the goal is kept, 1 if not, 2 where there is no demo."""
    if not (args.demo / "sae-a" / "sae").is_dir():
        print(f"{args.demo} holds no finished demo: run make demo first, or name its folder with --demo")
        return 2
    torch.set_num_threads(args.threads)
    if args.one is not None:
        print(json.dumps(memory(args.demo, args.one)))
        return 0
    about, rows = results.machine(), [timed(args)]
    print(line(rows[0]), flush=True)
    for tokens in args.lengths:
        command = [sys.executable, "-m", "bench", "survey", "--demo", str(args.demo), "--threads", str(args.threads)]
        found = subprocess.run(
            [*command, "--one", str(tokens)], capture_output=True, text=True, cwd=Path(__file__).parent.parent
        )
        if found.returncode:
            raise SystemExit(f"bench survey: {tokens} tokens failed:\n{found.stderr}")
        rows.append(json.loads(found.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    path = results.save("survey", about, rows, results.path_for("survey", about, args.out or results.FOLDER))
    print(f"written: {path}")
    return 0 if rows[0]["ratio"] <= GOAL else 1


def loaded(demo: Path) -> tuple[Any, Any]:
    import fastsae
    from fastsae import lm
    from fastsae.analysis import Source

    model, tokenizer = lm.load(demo / "lm-a")
    return Source(fastsae.SAE.from_pretrained(demo / "sae-a" / "sae").eval(), model, lm.MLP_HOOK), tokenizer


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of harvesting, of encoding, and of the pass."""
    import fastsae
    from fastsae import corpus
    from fastsae.analysis import take_survey
    from fastsae.analysis.stream import encoded

    source, tokenizer = loaded(args.demo)
    documents = shortened(corpus.builtin("heldout"), tokenizer, args.tokens)
    spent: dict[str, list[float]] = {"harvest": [], "encode": [], "survey": []}
    count = 0
    for turn in range(args.rounds + 1):
        folder = Path(tempfile.mkdtemp())
        start = time.perf_counter()
        store = fastsae.harvest(source.model, tokenizer, documents, source.hook, folder / "store", packing="cut",
                                dtype="bfloat16", show_progress=False)  # fmt: skip
        harvested = time.perf_counter()
        with torch.no_grad():
            for batch in store.batches(4096, epochs=1, drop_last=False):
                encoded(source.sae, batch.x, "the store")
        done = time.perf_counter()
        count = store.count
        del store
        shutil.rmtree(folder)
        again = time.perf_counter()
        take_survey(source, tokenizer, documents, show_progress=False)
        end = time.perf_counter()
        if turn:  # the first warms up
            for name, seconds in zip(spent, (harvested - start, done - harvested, end - again), strict=True):
                spent[name].append(seconds)
    row: dict[str, Any] = {name: statistics.median(times) for name, times in spent.items()}
    row["ratio"] = statistics.median(
        s / (h + e) for h, e, s in zip(spent["harvest"], spent["encode"], spent["survey"], strict=True)
    )
    return {"op": "survey", "tokens": count, "features": source.sae.cfg.d_sae, **row}


def shortened(documents: list[Any], tokenizer: Any, tokens: int) -> list[Any]:
    """Documents of every kind with about so many tokens together."""
    total = sum(len(document.text) for document in documents)
    some = documents[:: max(1, len(documents) // 50)]
    rate = sum(len(ids) for ids in tokenizer([d.text for d in some], verbose=False)["input_ids"])
    rate /= sum(len(d.text) for d in some)
    return documents[:: max(1, round(total * rate / tokens))]


def memory(demo: Path, tokens: int) -> dict[str, Any]:
    """Peak of resident memory during a pass over so many tokens, beyond the models and the text itself."""
    from fastsae import corpus
    from fastsae.analysis import take_survey

    source, tokenizer = loaded(demo)
    documents: list[Any] = []
    while sum(len(document.text) for document in documents) < 3.2 * tokens:  # 2.4 characters a token, roughly
        documents += corpus.builtin("train")
    take_survey(source, tokenizer, documents[:20], tokens=20_000, show_progress=False)
    give_back()
    before = resident("VmRSS")
    reset_peak()
    (found,) = take_survey(source, tokenizer, documents, tokens=tokens, show_progress=False)
    read = int(found.sums["tokens"].sum())
    return {"op": "memory", "tokens": read, "peak_mb": resident("VmHWM") - before}


def give_back() -> None:
    """Free heap to the system, so that what is measured after it starts from what is in use (glibc; else nothing)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def line(row: dict[str, Any]) -> str:
    if row["op"] == "memory":
        return f"{row['tokens']:>9,} tokens  {row['peak_mb']:.0f} MB at the peak"
    return (
        f"{row['tokens']:>9,} tokens  harvest {row['harvest']:.1f} s, encode {row['encode']:.1f} s, "
        f"all features' cards {row['survey']:.1f} s: {row['ratio']:.2f} × (goal {GOAL})"
    )
