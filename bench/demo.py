"""`python -m bench demo`: keeps the figures of a finished demo for the README, beside the paper's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import results

PAPERS = ("pearson_paper", "pearson_paper_clipped")  # where the paper has a proxy of its own
FIGURES = ("base_rate", "pearson", "neuron_pearson", "specificity", "specificity_upper", "lift_upper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=Path("out/demo"), help="the demo's folder (out/demo)")
    parser.add_argument("--out", type=Path, default=None, help="the file to write (under bench/results)")


def main(args: argparse.Namespace) -> int:
    """0, or 2 where no finished demo is found."""
    found, stages = args.run / "results.json", args.run / "stages"
    if not found.exists() or not stages.is_dir():
        print(f"{args.run} holds no finished demo (no results.json and stages/); run make demo first")
        return 2
    result = json.loads(found.read_text(encoding="utf-8"))
    seconds = {path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in stages.glob("*.json")}
    about = results.machine()
    scale = result["quality"]["scale"]
    path = results.save(
        "demo",
        about,
        [_short(row) for row in result["categories"]],
        args.out or results.FOLDER / f"demo-{scale}.json",
        scale=scale,
        minutes=round(_wall(seconds) / 60, 1),
        seconds={name: round(value, 1) for name, value in sorted(seconds.items())},
        goals=result["goals"],
        quality={name: _quality(result["quality"][name]) for name in ("a", "b")},
        universality=result["universality"],
        explain=(result.get("explain") or {}).get("summary"),
        splitting=_steps(result.get("splitting")),
    )
    print(f"{path} written; python -m bench readme puts it into README.md")
    return 0


def _steps(splitting: dict[str, Any] | None) -> dict[str, Any] | None:
    return splitting and {name: splitting[name] for name in ("widths", "steps")}


def _wall(seconds: dict[str, float]) -> float:
    """From start to end: the two branches run side by side."""
    branches = [sum(v for name, v in seconds.items() if name.endswith(f"-{branch}")) for branch in "ab"]
    beside = {"a": ("narrow", "wide"), "b": ("control",)}
    branches = [
        spent + sum(seconds.get(name, 0) for name in beside[b]) for b, spent in zip("ab", branches, strict=True)
    ]
    whole = ("tokenizer", "analysis")
    return max(branches) + sum(seconds.get(name, 0) for name in whole)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: round(row[name], 4) for name in ("density", *FIGURES)}
    kept |= {name: round(row[name], 4) for name in PAPERS if row.get(name) is not None}
    effects: dict[str, Any] = {"name": row["name"], "feature": row["feature"], "neuron": row["neuron"]}
    for part, names in (("ablation", ("inside", "beside", "outside")), ("pinning", ("unpinned", "pinned", "neuron"))):
        if row[part]:
            effects[part] = {name: row[part][name] for name in names}
    if row["match"]:
        effects["match"] = row["match"]["held_out"]
    return {**effects, **kept}


def _quality(branch: dict[str, Any]) -> dict[str, Any]:
    lm, scores = branch["lm"], branch["eval"]
    kept = {name: lm[name] for name in ("val_loss", "unigram", "bigram", "tokens", "parameters", "config")}
    names = ("l0", "fve", "dead", "ce_raw", "ce_spliced", "ce_zero", "ce_mean", "recovered_zero", "recovered_mean")
    return {"lm": kept, "eval": {name: scores[name] for name in names}}
