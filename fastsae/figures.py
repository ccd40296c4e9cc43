"""The report's figures, as PNG files. Matplotlib without its global state; colours that stay apart for everybody."""

from pathlib import Path
from typing import Any

from fastsae.errors import MissingDependencyError

INSIDE, OUTSIDE, LINE = "#d55e00", "#9aa7b3", "#33424f"  # Okabe–Ito vermilion, greys
WIDTH = 5.8  # inches: ten-point labels stay legible when a telephone shrinks the image to its width
ABOVE: dict[str, Any] = {"frameon": False, "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}


def require_matplotlib() -> None:
    """Raises MissingDependencyError where the figures cannot be drawn: better before an hour of work than after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependencyError("the report's figures need matplotlib: pip install 'fastsae[report]'") from None


def _figure(height: float, rows: int = 1, **options: Any) -> Any:
    """(figure, axes), WIDTH × height inches; axes is an array where there are several rows."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=160, layout="constrained", facecolor="white")
    axes: Any = figure.subplots(rows, **options)
    for each in axes if rows > 1 else [axes]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def features_and_neurons(categories: list[dict], path: Path) -> None:
    """Pearson with the proxy: the best feature against the best neuron, a line per category."""
    figure, axes = _figure(0.4 * len(categories) + 1.1)
    rows = sorted(categories, key=lambda row: row["pearson"])
    for y, row in enumerate(rows):
        axes.plot([row["neuron_pearson"], row["pearson"]], [y, y], color="#c5ced6", lw=3, zorder=1)
    axes.scatter(
        [row["neuron_pearson"] for row in rows], range(len(rows)), color=OUTSIDE, s=60, label="best neuron", zorder=2
    )
    axes.scatter([row["pearson"] for row in rows], range(len(rows)), color=INSIDE, s=60, label="best feature", zorder=3)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlim(min(0.0, *(min(row["pearson"], row["neuron_pearson"]) for row in rows)) - 0.02, 1.02)
    axes.set_xlabel("Pearson's r with the category")
    axes.legend(**ABOVE)
    figure.savefig(path)


def density(histogram: list[int], edges: list[float], path: Path, *, ultra_low: list[int] | None = None) -> None:
    """How many features fire how often. ultra_low: those of the ultra-low cluster, of the same bins, drawn apart."""
    figure, axes = _figure(2.6)
    axes.stairs(histogram, edges, fill=True, color=INSIDE, alpha=0.85, label="all features")
    if ultra_low is not None and any(ultra_low):
        axes.stairs(ultra_low, edges, fill=True, color=LINE, alpha=0.85, label="the ultra-low cluster")
        axes.legend(**ABOVE)
    axes.set_xlabel("log₁₀ of the share of tokens on which a feature fires")
    axes.set_ylabel("features")
    figure.savefig(path)


def activations(bins: dict, name: str, path: Path) -> None:
    """The paper's figure: per interval of activation, how many tokens fire, and which share is inside the category.

    Counts on a logarithmic axis cannot be stacked and compared by eye, so the shares have an axis of their own.
    """
    figure, (counts, shares) = _figure(3.9, 2, sharex=True)
    edges, total = bins["edges"], [a + b for a, b in zip(bins["inside"], bins["outside"], strict=True)]
    counts.stairs(total, edges, fill=True, color=OUTSIDE, label="all")
    counts.stairs(bins["inside"], edges, color=INSIDE, lw=2, label=name)
    counts.set_yscale("symlog", linthresh=1)
    counts.set_ylim(bottom=0)
    counts.set_ylabel("tokens (log)")
    counts.legend(**ABOVE)
    share = [a / n if n else 0.0 for a, n in zip(bins["inside"], total, strict=True)]
    _stacked(shares, edges, share, [1 - part if n else 0.0 for part, n in zip(share, total, strict=True)], name)
    for left, right, part, n in zip(edges, edges[1:], share, total, strict=False):
        if n:
            shares.annotate(_percent(part), ((left + right) / 2, 1), ha="center", va="bottom", fontsize=8, color=LINE)
    shares.set_ylabel("share of tokens")
    shares.set_ylim(0, 1.12)
    shares.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    shares.set_xlabel("activation of the feature")
    figure.savefig(path)


def _percent(share: float) -> str:
    """Whole per cent; never 100 unless it is all of them, never 0 unless it is none."""
    if 0 < share < 1:
        share = min(max(share, 0.01), 0.99)
    return f"{share:.0%}"


def _stacked(axes: Any, edges: list[float], inside: list[float], outside: list[float], name: str) -> None:
    width = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    axes.bar(edges[:-1], inside, width, align="edge", color=INSIDE, label=name, edgecolor="white")
    axes.bar(edges[:-1], outside, width, bottom=inside, align="edge", color=OUTSIDE, label="other", edgecolor="white")


def expected_value(bins: dict, name: str, path: Path) -> None:
    """The same weighted by the activation: what carries the feature's effect."""
    edges = bins["edges"]
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    inside, outside = ([n * m for n, m in zip(bins[part], middles, strict=True)] for part in ("inside", "outside"))
    figure, axes = _figure(2.4)
    _stacked(axes, edges, inside, outside, name)
    axes.set_xlabel("activation of the feature")
    axes.set_ylabel("tokens × activation")
    axes.legend(**ABOVE)
    figure.savefig(path)


def logits(weights: dict, name: str, path: Path) -> None:
    """Distribution of the feature's logit weights over the vocabulary, the category's tokens apart."""
    figure, axes = _figure(2.4)
    axes.stairs(weights["outside"], weights["edges"], fill=True, color=OUTSIDE, label="other tokens")
    axes.stairs(weights["inside"], weights["edges"], color=INSIDE, lw=2, label=f"{name} tokens")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("logit weight, per unit of activation")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("vocabulary (log)")
    axes.legend(**ABOVE)
    figure.savefig(path)


def best_matches(series: dict[str, Any], path: Path, label: str = "Pearson's r with the best match") -> None:
    """Distributions of likeness in another run, by name: "features", "neurons", "shuffled model", each values [·].

    As shares of their number, for there are more features than neurons; NaN is left out; a line marks the median.
    """
    import numpy as np

    figure, axes = _figure(2.8)
    edges = np.linspace(-0.2, 1.0, 49)
    for (name, values), color in zip(series.items(), (INSIDE, OUTSIDE, LINE, "#0072b2"), strict=False):
        values = np.asarray(values, dtype=float)
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        shares = np.histogram(values.clip(edges[0], edges[-1]), edges)[0] / len(values)
        axes.stairs(shares, edges, color=color, lw=2, label=f"{name}, median {np.median(values):.2f}")
        axes.axvline(np.median(values), color=color, lw=1, ls=":")
    axes.set_xlabel(label)
    axes.set_ylabel("share")
    axes.set_ylim(bottom=0)
    axes.legend(**{**ABOVE, "ncols": 2})
    figure.savefig(path)


def feature_map(
    points: Any, values: Any, label: str, path: Path, *, layers: Any = None, clusters: Any = None, log: bool = False
) -> None:
    """Features in the plane, points [M, 2] coloured by values [M] (density, or a proxy's score), with a colour bar.

    layers: [M], which dictionary each is of: those of wider ones are drawn smaller, and a legend tells them apart where
    there are several. clusters: [M], −1 for none: the ten largest carry their number. log: colours on a logarithmic
    scale; values must then be > 0.
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    points, values = np.asarray(points, dtype=float), np.asarray(values, dtype=float)
    layers = np.zeros(len(points), dtype=int) if layers is None else np.asarray(layers)
    figure, axes = _figure(5.2)
    low, high = float(values.min()), float(values.max())
    norm = LogNorm(low, max(high, low * 1.01)) if log else None
    limits = {"norm": norm} if log else {"vmin": low, "vmax": high if high > low else low + 1}
    drawn = None
    for layer in np.unique(layers):  # the many small points of the wide dictionaries on top
        here = layers == layer
        order = np.argsort(values[here])  # the strongest on top
        drawn = axes.scatter(
            *points[here][order].T, c=values[here][order], s=min(60.0, max(3.0, 5000 / here.sum())), cmap="viridis",
            alpha=0.8, linewidths=0.4, edgecolors="white", label=f"{here.sum()} features", **limits,
        )  # fmt: skip
    if clusters is not None:
        _number_clusters(axes, points, np.asarray(clusters))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if drawn is not None:
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    if len(np.unique(layers)) > 1:
        axes.legend(**{**ABOVE, "ncols": 4})
    figure.savefig(path)


def category_map(
    points: Any, category: Any, r: Any, names: Any, path: Path, *, layers: Any = None, clusters: Any = None,
    least: float = 0.2,
) -> None:  # fmt: skip
    """Features in the plane, points [M, 2] coloured by the category [M] that each follows best, a number in names.

    r: [M], its correlation with it: those below `least` are grey. layers, clusters: as in feature_map.
    """
    import matplotlib
    import numpy as np

    points, category, r = np.asarray(points, dtype=float), np.asarray(category), np.asarray(r, dtype=float)
    layers = np.zeros(len(points), dtype=int) if layers is None else np.asarray(layers)
    size = np.zeros(len(points))
    for layer in np.unique(layers):
        size[layers == layer] = min(60.0, max(3.0, 5000 / (layers == layer).sum()))
    figure, axes = _figure(5.2)
    none = ~(r >= least)
    axes.scatter(*points[none].T, c=LINE, s=size[none], alpha=0.25, linewidths=0, label=f"none, r < {least:g}")
    colors = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"].colors  # type: ignore[attr-defined]
    for p in [p for p in range(len(names)) if ((category == p) & ~none).any()]:
        here = (category == p) & ~none
        axes.scatter(
            *points[here].T, color=colors[p % len(colors)], s=size[here], alpha=0.9, linewidths=0.4,
            edgecolors="white", label=f"{names[p]}, {here.sum()}",
        )  # fmt: skip
    if clusters is not None:
        _number_clusters(axes, points, np.asarray(clusters))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(path)


def _number_clusters(axes: Any, points: Any, clusters: Any, count: int = 10) -> None:
    """The numbers of the largest clusters, at the medians of their points."""
    import numpy as np

    sizes = np.bincount(clusters[clusters >= 0]) if (clusters >= 0).any() else np.zeros(0)
    for number in np.argsort(-sizes)[:count]:
        x, y = np.median(points[clusters == number], axis=0)
        box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": LINE, "lw": 0.5, "alpha": 0.8}
        axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=8, color=LINE, bbox=box)
