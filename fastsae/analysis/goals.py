"""The demonstration's goals, held against its results: what was met, and what was missed by how much."""

from statistics import median

ARABIC = "Arabic"


def table(results: dict) -> list[dict]:
    """[{"name", "goal", "value", "met"}] for every goal that the results have figures for."""
    rows: list[dict] = []

    def add(name: str, goal: str, value: float, met: bool, form: str = ".2f") -> None:
        rows.append({"name": name, "goal": goal, "value": format(value, form), "met": bool(met)})

    quality = results["quality"].get("a") if results["quality"] else None
    if quality and "lm" in quality:  # the demo's own
        below = quality["lm"]["bigram"] - quality["lm"]["val_loss"]
        add("language model below the interpolated bigram, nats", "≥ 0.3", below, below >= 0.3)
        scores = quality["eval"]
        add("L0", "≤ 20", scores["l0"], scores["l0"] <= 20, ".1f")
        add(
            "CE recovered against zero ablation",
            "≥ 80 %",
            scores["recovered_zero"],
            scores["recovered_zero"] >= 0.8,
            ".1%",
        )
        add("dead features", "≤ 10 %", scores["dead"], scores["dead"] <= 0.1, ".1%")
    categories = {row["name"]: row for row in results["categories"]}
    if categories:
        advantage = median(row["advantage"] for row in categories.values())
        add("median advantage of feature over neuron, Pearson", "≥ 0.10", advantage, advantage >= 0.1)
    arabic = categories.get(ARABIC)
    if arabic is None:
        return rows
    add("Arabic feature, Pearson with the proxy", "≥ 0.74", arabic["pearson"], arabic["pearson"] >= 0.74)
    add("Arabic feature above the best neuron by", "> 0", arabic["advantage"], arabic["advantage"] > 0)
    upper = arabic["specificity_upper"]
    add("Arabic specificity, upper half of the range", "≥ 80 %", upper, upper >= 0.8, ".1%")
    if arabic["ablation"]:
        inside, outside = arabic["ablation"]["inside"], arabic["ablation"]["outside"]
        add("ablation ΔNLL on Arabic, nats", "> 0", inside, inside > 0, ".3f")
        if outside is not None:
            add("ablation ΔNLL elsewhere, nats", "≈ 0 (within 0.01)", outside, abs(outside) < 0.01, ".4f")
    if arabic["pinning"]:
        pinned, unpinned, neuron = (arabic["pinning"][key] for key in ("pinned", "unpinned", "neuron"))
        add("pinned: share of probability on Arabic", "≥ 0.3", pinned, pinned >= 0.3)
        add("pinned against unpinned", "≥ 10 ×", pinned / max(unpinned, 1e-9), pinned >= 10 * unpinned, ".1f")
        add("pinned against the best neuron pinned", "≥ 3 ×", pinned / max(neuron, 1e-9), pinned >= 3 * neuron, ".1f")
    if arabic["match"]:
        held_out = arabic["match"]["held_out"] or 0.0  # None: constant on a half, so nothing was found
        add("best match in the other run, Pearson, held out", "≥ 0.8", held_out, held_out >= 0.8)
        rows[-1]["value"] += f" ({arabic['match']['pearson']:.2f} in-sample)"  # as the paper measures it
    return rows
