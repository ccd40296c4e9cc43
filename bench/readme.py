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
        return mark[1] + "\n".join(TABLES[kind](result) for result in found) + mark[3]

    return MARKED.sub(tables, text)


def _caption(machine: Row) -> str:
    """One line: on what, with what, when."""
    threads = machine.get("threads")
    on = machine.get("gpu") or f"{machine['processor']}, {threads} thread{'' if threads == 1 else 's'}"
    versions = [f"torch {machine['torch']}"]
    if machine.get("gpu") and machine.get("triton"):
        versions.append(f"Triton {machine['triton']}")
    if machine.get("chromium"):
        versions = [f"Chromium {machine['chromium']}"]
    commit = f"commit {machine['commit']}, " if machine.get("commit") else ""
    return f"{on}; {', '.join(versions)}; {commit}{machine['date'].split()[0]}:"


def _step_table(result: Row) -> str:
    rows = result["rows"]
    body = [[row["variant"], _time(row), _number(row, "gemms", 2), _number(row, "extra", 2)] for row in rows]
    table = _table(["", "ms (p20 to p80)", "encoder products", "allocated beyond gradients, of one [N, F]"], body)
    sizes = {f"N {row['N']}, D {row['D']}, F {row['F']}, K {row['K']}, {row['dtype']}" for row in rows}
    return f"{_caption(result['machine'])}\n\n{table}\n{'; '.join(sorted(sizes))}.\n"


def _wide_table(result: Row) -> str:
    """TrainStep against the width, on a CPU."""
    from bench.wide import BACKWARD, UPDATE

    body = []
    for row in result["rows"]:
        ratio = row[f"{BACKWARD} ms"] / row[f"{UPDATE} ms"] if f"{UPDATE} ms" in row else None
        body.append([row["F"], row["N"], f"{row['step ms']:.0f}", f"{row['products']:.2f}", f"{row['kept_mb']:.0f}",
                     f"{row['extra_mb']:.0f}", f"{8 * row['F'] * row['D'] / 1e6:.0f}",
                     "" if ratio is None else f"{ratio:.2f} ×"])  # fmt: skip
    table = _table(["latents F", "tokens N", "step, ms", "encoder products", "MB of parameters and state",
                    "MB beyond, at the peak", "MB that gradients would take", f"{BACKWARD} instead of {UPDATE}"],
                   body)  # fmt: skip
    row = result["rows"][0]
    return f"{_caption(result['machine'])}\n\n{table}\nD {row['D']}, K {row['K']}, float32.\n"


def _quality_table(result: Row) -> str:
    """What small states cost."""
    body = [[row["data"], row["variant"], f"{sum(row['fve']) / len(row['fve']):.4f}",
             f"{min(row['fve']):.4f} to {max(row['fve']):.4f}", f"{sum(row['l0']) / len(row['l0']):.1f}"]
            for row in result["rows"]]  # fmt: skip
    head = ["data", "state", "explained variance, held out", f"of {len(result['rows'][0]['fve'])} seeds", "L0"]
    row = result["rows"][0]
    sizes = f"F {row['F']}, K {row['K']}, {row['steps']} steps of 1024 tokens."
    return f"{_caption(result['machine'])}\n\n{_table(head, body)}\n{sizes}\n"


def _dead_table(result: Row) -> str:
    """What dead_every saves and costs."""
    body = [[row["every"], "yes" if row["aux"] else "no", f"{row['mean_ms']:.1f}", f"{row['time']:.2f}",
             f"{row['dead']:.1%}", row["revived"], f"{row['fve']:.4f}"] for row in result["rows"]]  # fmt: skip
    head = ["`dead_every`", "AuxK", "ms a step", "of that with 1", "dead at the end", "came back to life",
            "explained variance, held out"]  # fmt: skip
    row = result["rows"][0]
    sizes = f"N {row['N']}, D {row['D']}, F {row['F']}, K {row['K']}, {row['steps']} steps; times of the last quarter."
    return f"{_caption(result['machine'])}\n\n{_table(head, body)}\n{sizes}\n"


def _survey_table(result: Row) -> str:
    """Time and memory of the pass over all features."""
    times = [row for row in result["rows"] if row["op"] == "survey"]
    peaks = [row for row in result["rows"] if row["op"] == "memory"]
    body = [[f"{row['tokens']:,}", row["features"], f"{row['harvest']:.1f}", f"{row['encode']:.1f}",
             f"{row['survey']:.1f}", f"{row['ratio']:.2f}"] for row in times]  # fmt: skip
    head = ["tokens", "features", "harvest, s", "encode, s", "the pass, s", "of both"]
    grows = "; ".join(f"{row['tokens']:,} tokens {row['peak_mb']:.0f} MB" for row in peaks)
    memory = f"Peak memory of the pass, models and the 20 first documents not counted: {grows}.\n" if peaks else ""
    return f"{_caption(result['machine'])}\n\n{_table(head, body)}\n{memory}"


def _site_table(result: Row) -> str:
    """Size, memory and times of the site, beside their goals."""
    from bench.site import title, verdict

    def figures(row: Row | None) -> str:
        if row is None:
            return ""
        digits = 1 if row["unit"] != "ms" else 0
        slowest = f" ({row['worst']:,.{digits}f})" if row["n"] > 1 else ""
        return f"{row['median']:,.{digits}f}{slowest} {row['unit']}"

    def judged(some: list[Row]) -> list[str]:
        goals = {f"{row['goal']:,.0f} {row['unit']}" for row in some if "goal" in row}
        said = max((verdict(row) for row in some), key=["", "met", "missed by the slowest", "missed"].index)
        return ["".join(goals), f"**{said}**" if said.startswith("missed") else said]

    sizes = [row for row in result["rows"] if "origin" not in row]
    of = {(row["op"], row["origin"]): row for row in result["rows"] if "origin" in row}
    ops = list(dict.fromkeys(op for op, _ in of if not op.startswith("API")))
    both = {op: [row for row in (of.get((op, "server")), of.get((op, "disk"))) if row] for op in ops}
    head = [f"{result['features']:,} features of random numbers", "measured", "goal", ""]
    whole = _table(head, [[title(row), figures(row), *judged([row])] for row in sizes])
    waited = _table(
        ["until painted: median (slowest)", "from the server", "from the disk", "goal", ""],
        [[title(some[0]), *(figures(of.get((op, origin))) for origin in ("server", "disk")), *judged(some)]
         for op, some in both.items()],
    )  # fmt: skip
    answers = ", ".join(f"{op[5:]} {figures(row)}" for (op, _), row in of.items() if op.startswith("API"))
    plotly = next(row["plotly"] for row in sizes if "plotly" in row)
    note = f"Plotly, the same in every site, is a file of {plotly:.1f} MB. The API's answers: {answers}.\n"
    return f"{_caption(result['machine'])}\n\n{whole}\n{waited}\n{note}"


def _gpu_table(result: Row) -> str:
    rows = result["rows"]
    kernels = [
        [row["op"], row["variant"], row["shape"], row["dtype"], _time(row),
         _number(row, "tflop_per_s"), _number(row, "gb_per_s", 0), _number(row, "gemms", 2),
         _number(row, "peak_mib", 0), f"{row['rows_failed']:.2%}" if "rows_failed" in row else ""]
        for row in rows
    ]
    sizes = {row["shape"]: f"{row['shape']}: N {row['N']}, D {row['D']}, F {row['F']}, K {row['K']}"
             for row in rows if row["shape"] != "-"}
    table = _table(["op", "by", "size", "dtype", "ms (p20 to p80)", "TFLOP/s", "GB/s", "encoder products",
                    "MiB beyond its operands", "rows that failed their certificate"], kernels)  # fmt: skip
    return f"{_caption(result['machine'])}\n\n{table}\n{'; '.join(sizes.values())}.\n"


def _compile_table(result: Row) -> str:
    """What the compiler says of the kernels; nothing here has run."""
    rows = result["rows"]
    body = [[row["op"], row["compiled"], row["problems"], row["registers"], row["stack_bytes"],
             f"{row['shared_bytes'] / 1024:.0f}"] for row in rows]  # fmt: skip
    table = _table(["op", "compiled", "with a problem", "registers, at most", "bytes of stack, at most",
                    "KiB of shared memory, at most"], body)  # fmt: skip
    chips = ", ".join(f"sm_{c}" for c in rows[0]["capabilities"])
    about = result["machine"]
    commit = f"commit {about['commit']}, " if about.get("commit") else ""
    return f"Compiled, not run, by Triton {about['triton']} for {chips}; {commit}{about['date'].split()[0]}:\n\n{table}"


# Bricken et al. 2023, run A/1 (4,096 features): the same quantity, where the paper or its published data has it.
PAPER_GOALS = {
    "L0": "4.9",
    "CE recovered against zero ablation": "79 %",
    "Arabic feature, Pearson with the proxy": "0.74",
    "Arabic specificity, upper half of the range": "98 % (above activation 5)",
    "best match in the other run, Pearson": "0.91",
    "best match in the other run, Pearson, held out": "0.91 in-sample",
}
PAPER_PEARSON = {"Arabic": "0.74", "DNA": "0.80", "base64": "0.38", "Hebrew": "0.55"}


def _by_paper(row: Row) -> str:
    """Pearson with the paper's own proxy, as yes or no and graded."""
    graded = _number(row, "pearson_paper_clipped", 2)
    return _number(row, "pearson_paper", 2) + (f" ({graded})" if graded else "")


def _demo_table(result: Row) -> str:
    """The goals, met or missed, and the categories."""
    a = result["quality"]["a"]
    lm, scores = a["lm"], a["eval"]
    goals = [
        [row["name"], row["value"], row["goal"], "met" if row["met"] else "**missed**",
         PAPER_GOALS.get(row["name"], "")]
        for row in result["goals"]
    ]
    by_paper = any("pearson_paper" in row for row in result["rows"])
    found = _table(
        ["", "base rate", "Pearson, best feature", "best neuron",
         *(["by the paper's proxy (graded)"] if by_paper else []), "paper's feature", "specificity",
         "upper half of the range", "lift there"],
        [[row["name"], f"{row['base_rate']:.2%}", _number(row, "pearson", 2), _number(row, "neuron_pearson", 2),
          *([_by_paper(row)] if by_paper else []), PAPER_PEARSON.get(row["name"], ""),
          f"{row['specificity']:.0%}", f"{row['specificity_upper']:.0%}",
          _number(row, "lift_upper", 0)] for row in result["rows"]],
    )  # fmt: skip
    used = _table(
        ["", "ΔNLL inside", "elsewhere", "pinned", "unpinned", "best neuron pinned", "match, held out"],
        [[row["name"], *_effects(row), _number(row, "match", 2)] for row in result["rows"]],
    )
    universal = result.get("universality")
    median = (
        f"The median best match of {universal['count']} features is {universal['features']:.2f}, that of the neurons "
        f"{universal['neurons']:.2f}{_controlled(universal)} (paper: 0.72 and 0.46).\n"
        if universal else ""
    )  # fmt: skip
    return (
        f"Scale {result['scale']}, {result['minutes']:.0f} minutes. {_caption(result['machine'])}\n\n"
        f"{_table(['on held-out text', 'measured', 'goal', '', 'paper'], goals)}\n"
        f"The language model ({lm['parameters']:,} parameters, {lm['tokens']:,} tokens seen) has a loss of "
        f"{lm['val_loss']:.2f} nats per token; an interpolated bigram has {lm['bigram']:.2f}, a unigram "
        f"{lm['unigram']:.2f}. With the MLP as it is, through the dictionary, at zero and at its mean the loss is "
        f"{scores['ce_raw']:.2f}, {scores['ce_spliced']:.2f}, {scores['ce_zero']:.2f} and {scores['ce_mean']:.2f}; "
        f"{scores['recovered_zero']:.0%} is recovered against zero and {scores['recovered_mean']:.0%} against mean "
        f"ablation. The dictionary explains {scores['fve']:.0%} of the variance.\n\n"
        f"{found}\n{used}\n{median}{_explained(result.get('explain'))}{_split(result.get('splitting'))}"
    )


def _controlled(universal: Row) -> str:
    """What a run says of its control, which older ones did not have."""
    if universal.get("control") is None:
        return ""
    return (
        f", that of a dictionary trained on a model with shuffled weights {universal['control']:.2f}; chosen on one "
        f"half of the documents and scored on the other, the features' is {universal['held_out']:.2f}"
    )


def _explained(found: Row | None) -> str:
    """The offline explainer on features and controls."""
    if not found:
        return ""
    rows = []
    for name, row in found.items():
        low, high = row["spearman"]["mean_interval"] or (0, 0)
        cells = [f"{row[score]['mean']:.2f}" for score in ("spearman_weighted", "detection", "fuzzing")]
        mean = row["spearman"]["mean"]
        rows.append([name, row["spearman"]["n"], f"{mean:.2f} ({low:.2f} to {high:.2f})", *cells])
    head = ["explained without a language model", "n", "mean score (95 %)", "weighted", "detection", "fuzzing"]
    return f"\n{_table(head, rows)}"


def _split(found: Row | None) -> str:
    """Children of features from width to width."""
    if not found:
        return ""
    steps = zip(found["widths"], found["widths"][1:], found["steps"], strict=False)
    said = [f"{step['mean_children']:.1f} from {a} to {b} features" for a, b, step in steps]
    return (
        "\nFeatures that have a child in the next wider dictionary (cosine above 0.4) have on average "
        f"{', '.join(said)}.\n"
    )


def _effects(row: Row) -> list[str]:
    ablation, pinning = row.get("ablation"), row.get("pinning")
    outside = ablation["outside"] if ablation else None
    cells = [f"{ablation['inside']:+.2f}" if ablation else "", "" if outside is None else f"{outside:+.4f}"]
    return cells + [f"{pinning[name]:.1%}" if pinning else "" for name in ("pinned", "unpinned", "neuron")]


TABLES: dict[str, Callable[[Row], str]] = {
    "step": _step_table, "wide": _wide_table, "quality": _quality_table, "dead": _dead_table, "gpu": _gpu_table,
    "survey": _survey_table, "site": _site_table,
    "demo": _demo_table, "compile": _compile_table,
}  # fmt: skip


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
