"""Sections of the report that compare: with neurons and controls, with another run, across widths, by explanations.

Every text is escaped. Figures of the paper: Bricken et al. 2023 and the published data of its run A/1.
"""

from __future__ import annotations

from html import escape
from typing import Any

Row = dict[str, Any]

# What the paper says of the same categories; "": it does not say.
PAPER: dict[str, dict[str, str]] = {
    "Arabic": {"base": "0.13 %", "specificity": "81 %", "upper": "98 % (above 5)", "pearson": "0.74", "match": "0.91",
               "ablation": "+6.1 (top 20)"},
    "Hebrew": {"pearson": "0.55"},
    "base64": {"pearson": "0.38"},
    "DNA": {"pearson": "0.80"},
}  # fmt: skip
PAPERS_OWN = ("Arabic", "Hebrew", "Cyrillic", "base64", "DNA")
PAPER_MEDIANS = {"features": "0.72", "neurons": "0.46"}


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """An HTML table of escaped cells, in a frame that scrolls."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def beside_paper(results: Row) -> str:
    """The categories that the paper looks at, measure by measure, each beside the paper's figure and the controls."""
    rows = [row for row in results["categories"] if row["name"] in PAPERS_OWN and "controls" in row]
    if not rows:
        return ""
    names = list(rows[0]["controls"])
    body = []
    for row in rows:
        paper, neuron = PAPER.get(row["name"], {}), row["neuron_scores"]
        top = row["ablation"]["top"] if row["ablation"] else None
        match = row["match"] or {}
        body.append([
            row["name"], f"{row['base_rate']:.2%}", paper.get("base", ""),
            f"{row['specificity']:.0%}", paper.get("specificity", ""), f"{row['specificity_upper']:.0%}",
            paper.get("upper", ""), f"{row['expected']:.0%}", number(row["pearson"]), number(row["pearson_clipped"]),
            number(row.get("pearson_paper")), number(row.get("pearson_paper_clipped")), paper.get("pearson", ""),
            number(row["average_precision"]), *(number(row["controls"][n]) for n in names),
            f"{neuron['specificity_upper']:.0%}", number(top, "+.2f"), paper.get("ablation", ""),
            number(match.get("held_out")), number(match.get("pearson")), paper.get("match", ""),
        ])  # fmt: skip
    head = ("", "base rate", "paper", "specificity", "paper", "upper half", "paper", "expected value", "Pearson",
            "graded", "by the paper’s proxy", "graded", "paper", "average precision", *names,
            "best neuron, upper half", "ΔNLL, top 20", "paper", "match", "match, in-sample", "paper")  # fmt: skip
    return (
        "<h2>The paper’s analyses, beside the paper’s figures</h2>"
        "<p>Every figure but one is of the documents that did not choose the feature, nor its match. The one is “match, "
        "in-sample”, the paper’s measure: the largest correlation with a feature of the other run, over the tokens that it "
        "is chosen on. The columns named after controls hold the Pearson correlation of their best feature, chosen and "
        f"scored on separate halves: {escape(', '.join(names))}. Our labels chose the features; by the paper’s proxy, a "
        "token that holds part of a character counts as often as it is part of the script, and any legal character as "
        "base64.</p>" + table(head, body)
    )


def universality(results: Row) -> str:
    """Medians over live features, neurons and a control."""
    found = results.get("universality")
    if not found:
        return ""

    def row(name: str, *keys: str, paper: str = "") -> list[str]:
        best, *rest = (number(found.get(key)) for key in keys)
        return [name, best, paper, *rest]

    rows = [
        row("features", "features", "held_out", "logits", "best_logits", paper=PAPER_MEDIANS["features"]),
        row("neurons", "neurons", "neurons_held_out", "neurons_logit_pearson", "neurons_best_logit_pearson",
            paper=PAPER_MEDIANS["neurons"]),
    ]  # fmt: skip
    if found.get("control") is not None:
        kind = found.get("control_kind") or "a model with shuffled weights"
        rows.append(row(f"control: {kind}", "control", "control_held_out", "control_logit_pearson",
                        "control_best_logit_pearson"))  # fmt: skip
    more = [
        ("paired one to one (Hungarian), held out", "one_to_one_held_out"), ("the same in-sample", "one_to_one"),
        ("decoder rows of the pairs (cosine; says something in one space only)", "decoder_cosine"),
        ("most alike decoder rows (cosine, in-sample)", "best_decoder_cosine"),
    ]  # fmt: skip
    extra = "; ".join(f"{name} {number(found[key])}" for name, key in more if found.get(key) is not None)
    return (
        "<h2>Does another run find the same features?</h2>"
        f"<p>Median over {found['count']:,} live features of the best Pearson correlation with a feature of the other "
        "run, chosen and scored on the same tokens, as in the paper; held out, the pair is chosen on one half of the "
        "documents and scored on the other. Logit weights: their correlation over the vocabulary with the match that "
        "activations chose, and with whatever in the other run is most alike in them, which is a maximum too."
        f"{' Medians as well: ' + escape(extra) + '.' if extra else ''}</p>"
        + table(("", "best match, in-sample", "paper", "held out", "its logit weights", "best logit weights, in-sample"),
                rows)
    )  # fmt: skip


def splitting(results: Row) -> str:
    """The graph over widths: its steps, and where the categories' features come from and go to."""
    found = results.get("splitting")
    if not found:
        return ""
    widths = found["widths"]
    steps = [
        [f"{a:,} → {b:,}", f"{step['edges']:,}", f"{step['parents']:,}", number(step["mean_children"], ".1f"),
         f"{step['most']:.0f}"]
        for a, b, step in zip(widths, widths[1:], found["steps"], strict=False)
    ]  # fmt: skip
    rows = [
        [row["name"], _linked(row["parents"]), str(row["feature"]), _linked(row["children"])]
        for row in found["categories"]
    ]
    here = results["d_sae"]
    return (
        "<h2>Features split as the dictionary grows</h2>"
        f"<p>Dictionaries of {', '.join(f'{w:,}' for w in widths)} features on the same activations. Two features of "
        "neighbouring widths are joined where the cosine of their activations is above 0.4, as in the paper, where base64 "
        "is one feature, then three, then many.</p>"
        + table(("widths", "edges", "features with children", "children of those, mean", "most"), steps)
        + "<p>The categories’ features, with the cosine of each relative:</p>"
        + table(("", "in the narrower one", f"of {here:,}", "in the wider one"), rows)
    )


def _linked(relatives: list) -> str:
    return ", ".join(f"{feature} ({number(cosine)})" for feature, cosine in relatives[:6]) or "–"


def explained(results: Row) -> str:
    """Scores of the offline explainer on features and controls, and some of what it said."""
    found = results.get("explain")
    if not found:
        return ""
    rows = []
    for name, row in found["summary"].items():
        scores = row["spearman"]
        interval = scores["mean_interval"]
        spread = "–" if interval is None else f"{number(interval[0])} to {number(interval[1])}"
        rows.append([
            name, str(scores["n"]), number(scores["mean"]), spread, number(scores["median"]),
            number(row["spearman_weighted"]["mean"]), number(row["detection"]["mean"]), number(row["fuzzing"]["mean"]),
        ])  # fmt: skip
    said = [
        [str(feature), text, number(score), number(detection)]
        for feature, text, score, detection in found["features"]
        if score is not None
    ]
    details = (
        "<details><summary>What it said of each feature</summary>"
        + table(("feature", "fires on", "score", "detection"), said)
        + "</details>"
        if said
        else ""
    )
    return (
        "<h2>Can they be explained?</h2>"
        "<p>No language model was asked: a search for the smallest pattern of tokens and contexts reads examples from one "
        "half of the documents, and predicts activations on the other. Score: Spearman correlation over all tokens of 60 "
        "windows, as in the paper; detection and fuzzing are balanced accuracies, of which chance gets 0.5. A score is "
        "worth what it is above the controls’. Misplaced features, which keep their activations and fire on other tokens, "
        "test the score itself: with nothing to explain it should be about 0. Random directions are no such zero, as a "
        "projection of activations still follows tokens: they test what training the dictionary adds, neurons what "
        "leaving the neuron basis adds.</p>"
        + table(("", "n", "score, mean", "95 %", "median", "weighted", "detection", "fuzzing"), rows)
        + details
    )
