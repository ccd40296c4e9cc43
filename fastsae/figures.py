"""The report's figures, as PNG files. Matplotlib without its global state; colours that stay apart for everybody."""

from pathlib import Path
from typing import Any

from fastsae.errors import FastSAEError

INSIDE, OUTSIDE, LINE = "#d55e00", "#9aa7b3", "#33424f"  # Okabe–Ito vermilion, greys


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FastSAEError("the report's figures need matplotlib: pip install 'fastsae[all]'") from None
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def features_and_neurons(categories: list[dict], path: Path) -> None:
    """Pearson with the proxy: the best feature against the best neuron, a line per category."""
    figure, axes = _figure(7, 0.45 * len(categories) + 1.1)
    rows = sorted(categories, key=lambda row: row["pearson"])
    for y, row in enumerate(rows):
        axes.plot([row["neuron_pearson"], row["pearson"]], [y, y], color="#c5ced6", lw=3, zorder=1)
    axes.scatter(
        [row["neuron_pearson"] for row in rows], range(len(rows)), color=OUTSIDE, s=60, label="best neuron", zorder=2
    )
    axes.scatter([row["pearson"] for row in rows], range(len(rows)), color=INSIDE, s=60, label="best feature", zorder=3)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlim(0, 1)
    axes.set_xlabel("Pearson's r with the proxy, on documents that did not choose the feature or the neuron")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.savefig(path)


def density(histogram: list[int], edges: list[float], path: Path) -> None:
    """How many features fire how often."""
    figure, axes = _figure(7, 2.8)
    axes.stairs(histogram, edges, fill=True, color=INSIDE, alpha=0.85)
    axes.set_xlabel("log₁₀ of the share of tokens on which a feature fires")
    axes.set_ylabel("features")
    figure.savefig(path)


def activations(bins: dict, name: str, path: Path) -> None:
    """The paper's figure: per interval of activation, how many tokens are inside the category and how many outside."""
    figure, axes = _figure(7, 3.0)
    edges, inside, outside = bins["edges"], bins["inside"], bins["outside"]
    width = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    axes.bar(edges[:-1], inside, width, align="edge", color=INSIDE, label=name, edgecolor="white")
    axes.bar(edges[:-1], outside, width, bottom=inside, align="edge", color=OUTSIDE, label="other", edgecolor="white")
    for left, w, a, b in zip(edges, width, inside, outside, strict=False):
        if a + b:
            axes.annotate(f"{a / (a + b):.0%}", (left + w / 2, a + b), ha="center", va="bottom", fontsize=8, color=LINE)
    axes.set_xlabel("activation of the feature")
    axes.set_ylabel("tokens")
    axes.set_yscale("symlog", linthresh=10)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    figure.savefig(path)


def expected_value(bins: dict, name: str, path: Path) -> None:
    """The same weighted by the activation: what carries the feature's effect."""
    middles = [(a + b) / 2 for a, b in zip(bins["edges"], bins["edges"][1:], strict=False)]
    weighted = dict(bins) | {
        part: [round(n * m) for n, m in zip(bins[part], middles, strict=True)] for part in ("inside", "outside")
    }
    figure, axes = _figure(7, 2.6)
    width = [b - a for a, b in zip(bins["edges"], bins["edges"][1:], strict=False)]
    axes.bar(bins["edges"][:-1], weighted["inside"], width, align="edge", color=INSIDE, label=name, edgecolor="white")
    axes.bar(
        bins["edges"][:-1], weighted["outside"], width, bottom=weighted["inside"], align="edge", color=OUTSIDE,
        label="other", edgecolor="white",
    )  # fmt: skip
    axes.set_xlabel("activation of the feature")
    axes.set_ylabel("tokens × activation")
    axes.legend(frameon=False)
    figure.savefig(path)


def logits(weights: dict, name: str, path: Path) -> None:
    """Distribution of the feature's logit weights over the vocabulary, the category's tokens apart."""
    figure, axes = _figure(7, 2.6)
    axes.stairs(weights["outside"], weights["edges"], fill=True, color=OUTSIDE, label="other tokens")
    axes.stairs(weights["inside"], weights["edges"], fill=True, color=INSIDE, alpha=0.85, label=f"{name} tokens")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("logit weight, per unit of activation")
    axes.set_ylabel("vocabulary entries")
    axes.legend(frameon=False)
    figure.savefig(path)
