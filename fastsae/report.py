"""The report: results of an analysis as one HTML page with figures beside it. Everything from text is escaped."""

from html import escape
from pathlib import Path
from typing import Any

from fastsae import figures, report_comparisons
from fastsae.files import write_text
from fastsae.visible import visible

# Bricken et al. 2023, text and published data of A/1: Pearson with the proxy, match in the other run.
PAPER_PEARSON = {"Arabic": 0.74, "DNA": 0.80, "base64": 0.38, "Hebrew": 0.55}
PAPER_MATCH = {"Arabic": 0.91}
PAPER_ARABIC = (
    "The paper’s Arabic feature: 0.13 % of its tokens are Arabic, 81 % of those on which the feature is active and 98 % "
    "of those above activation 5; without it the loss on the 20 strongest tokens rises by 6.1 nats. Its model saw far "
    "more text, so its figures are something to compare with, not the same experiment."
)

STYLE = """
:root{--ink:#1d2730;--soft:#5b6975;--line:#dde3e8;--paper:#fff;--card:#f6f8fa;--hot:213,94,0;--good:#00714f;--bad:#a8400a}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ee;--soft:#9fadb9;--line:#33404b;--paper:#151b21;--card:#1d252d;
--hot:230,120,30;--good:#4cc9a0;--bad:#ff9f66}img{filter:invert(.9) hue-rotate(180deg)}}
*{box-sizing:border-box}body{margin:0 auto;max-width:980px;padding:24px 16px 80px;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}h1{font-size:1.7rem;line-height:1.2}h2{margin-top:2.6rem;border-top:1px solid var(--line);
padding-top:1.4rem}h3{margin:1.6rem 0 .4rem}p,li{max-width:72ch}.soft,figcaption{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .55rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:6.2rem}thead th{color:var(--soft);font-weight:600}
.yes{color:var(--good);font-weight:600}.no{color:var(--bad);font-weight:600}figure{margin:1rem 0}
img{width:100%;max-width:640px;height:auto;border-radius:6px}.ctx{display:flex;gap:.6rem;align-items:baseline;margin:.25rem 0;padding:.35rem .6rem;background:var(--card);
border-radius:6px;font-size:.95rem}.ctx div{flex:1;min-width:0;overflow-wrap:anywhere}.ctx span{border-radius:3px;white-space:pre-wrap}
.ctx .at{outline:1px solid rgb(var(--hot))}.num{color:var(--soft);font-size:.8rem;min-width:2rem}summary{cursor:pointer;color:var(--soft);margin:.4rem 0}h1,code{overflow-wrap:anywhere}h1 code{font-size:.85em}
.sample{background:var(--card);border-radius:6px;padding:.5rem .7rem;margin:.3rem 0;overflow-wrap:anywhere;white-space:pre-wrap}
dt{font-weight:600;margin-top:.7rem}dd{margin:0;max-width:72ch}nav a{margin-right:1rem}a{color:inherit}
@media(max-width:600px){th,td{padding:.3rem .4rem}body{font-size:15px}}
"""

GLOSSARY = {
    "feature, neuron": "a feature is one latent of the dictionary, a neuron one coordinate of the activations it was "
    "trained on.",
    "base rate": "share of all tokens that belong to the category.",
    "Pearson": "correlation of the activation with the proxy (belongs / does not), over all held-out tokens of the half of "
    "the documents that did not choose the feature. 1 is a perfect detector.",
    "by the paper’s proxy": "the same feature’s correlation with the label as the paper makes it: a token that holds only "
    "part of a character is Arabic where more of its occurrences are than of all tokens, and base64 is any string of its "
    "characters that random letters of base64 give more often than the text does, be it a single letter.",
    "advantage": "Pearson of the best feature less that of the best neuron; both were chosen on the other half.",
    "recall": "of the category's tokens, the share on which the feature is active.",
    "specificity": "of the tokens on which the feature is active, the share inside the category; upper: of those with more "
    "than half of its largest activation. Lift is specificity over base rate.",
    "ablation": "rise of the loss, in nats per token, when the feature is set to 0. Inside: on tokens of the category that "
    "are to be predicted; beside: on the other tokens of the same contexts, which gain when the category is expected "
    "less; elsewhere: in contexts that hold no such token; top 20: after the 20 strongest activations.",
    "pinned": "the feature is held at its largest observed value while the model writes from neutral beginnings; the "
    "figure is the share of probability that goes to tokens of the category.",
    "expected value": "share of the feature’s total output, activation summed over tokens, that falls inside the category.",
    "average precision": "area under precision against recall as the activation that counts as on is lowered; the base "
    "rate is what chance gets.",
    "random directions": "a dictionary as wide and as sparse whose directions were drawn and not trained.",
    "misplaced features": "the dictionary’s own features, on as often and as strongly, but on tokens drawn at random.",
    "shuffled model": "a dictionary trained on the same language model with the weights of every matrix shuffled.",
    "gaps": "tokens of the category on which the feature is off, and the features that are on there.",
    "match": "correlation with the most similar feature of the dictionary of the other language model, trained from "
    "another seed; chosen on one half of the documents and scored on the other, unless it is called in-sample.",
    "CE recovered": "how much of the loss that ablating the layer costs the dictionary wins back. Zero ablation flatters; "
    "the figure against mean ablation stands beside it.",
    "nats": "unit of the loss: minus the natural logarithm of the probability given to the token that came.",
    "unigram, bigram": "loss of predicting each token from frequencies alone, and from the token before it: what a "
    "language model must beat.",
    "logit weight": "what one unit of the feature adds to the logit of a token, the median token taken as 0.",
    "dead": "the share of features that never fired on the text of the evaluation.",
    "L0": "features active per token.",
    "FVE": "fraction of the activations' variance that the dictionary explains.",
}


def write(results: dict, folder: Path) -> Path:
    """Writes folder/report.html and its PNG figures; returns the page's path. Parts without results are left out.

    results: what `fastsae.analysis.analyze` returns. Raises FastSAEError where matplotlib is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    categories = results["categories"]
    parts = [_intro(results), _goals(results.get("goals") or []), _quality(results, folder)]
    if categories:
        figures.features_and_neurons(categories, folder / "features_and_neurons.png")
        parts.append(_table(results))
        parts += [
            section(results)
            for section in (
                report_comparisons.beside_paper, report_comparisons.universality, report_comparisons.splitting,
                report_comparisons.explained,
            )
        ]  # fmt: skip
        parts += [_card(row, folder) for row in categories]
    parts += [_card(row, folder, f"f-{row['feature']}") for row in results.get("features") or []]
    parts.append("<h2 id=words>What the numbers mean</h2><dl>" + "".join(
        f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in GLOSSARY.items()) + "</dl>")  # fmt: skip
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fastsae report</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _intro(results: dict) -> str:
    links = " ".join(f"<a href='#{_id(row)}'>{escape(row['name'])}</a>" for row in results["categories"])
    links += "".join(f" <a href='#f-{row['feature']}'>feature {row['feature']}</a>" for row in results.get("features") or [])
    return (
        "<p><a href='index.html'>← All features</a></p>"
        f"<h1>Features found at <code>{escape(results['hook'])}</code></h1>"
        f"<p>A sparse autoencoder with {results['d_sae']:,} features was trained on the {results['d_in']:,} activations of "
        "this module. For every category of text below, the feature that follows it best was picked on one half of the "
        f"held-out documents and scored on the other half ({results['tokens']:,} tokens in {results['documents']:,} "
        "documents in all). The method is that of “Towards Monosemanticity” (Bricken et al. 2023), at a much smaller scale.</p>"
        f"<nav>{links} <a href='#words'>What the numbers mean</a></nav>{_left_out(results.get('left_out') or [])}"
        + "".join(
            f"<p>Without {escape(note['name'])}: {escape(visible(note['reason']))}.</p>" for note in results.get("notes") or []
        )
    )


def _left_out(rows: list[dict]) -> str:
    if not rows:
        return ""
    names = ", ".join(f"{row['name']} ({row['tokens'][0]:,} and {row['tokens'][1]:,} tokens)" for row in rows)
    return f"<p>Too rare in one half of this text to be looked at: {escape(names)}.</p>"


def _goals(goals: list[dict]) -> str:
    if not goals:
        return ""
    rows = "".join(
        f"<tr><td>{escape(row['name'])}</td><td>{escape(row['goal'])}</td><td>{escape(row['value'])}</td>"
        f"<td class={'yes' if row['met'] else 'no'}>{'met' if row['met'] else 'missed'}</td></tr>"
        for row in goals
    )
    met = sum(row["met"] for row in goals)
    return f"<h2>Goals: {met} of {len(goals)} met</h2>" + _frame(("", "goal", "here", ""), rows)


def _frame(head: tuple[str, ...], rows: str) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"


def _row(*cells: Any) -> str:
    return "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"


# Label, part of the run's figures, key, format, and the paper's figure for A/1 (512 neurons, 4,096 features).
QUALITY = [
    ("LM: held-out loss, nats per token", "lm", "val_loss", ".3f", ""),
    ("LM: interpolated bigram on the same tokens", "lm", "bigram", ".3f", ""),
    ("LM: unigram", "lm", "unigram", ".3f", ""),
    ("LM: parameters", "lm", "parameters", ",.0f", ""),
    ("LM: tokens seen", "lm", "tokens", ",.0f", ""),
    ("SAE: tokens seen", "train", "tokens", ",.0f", ""),
    ("SAE: held-out tokens on which the following is measured", "eval", "tokens", ",.0f", ""),
    ("SAE: L0, features active per token", "eval", "l0", ".1f", "4.9"),
    ("SAE: FVE, variance explained", "eval", "fve", ".1%", ""),
    ("SAE: normalised MSE, ‖x − x̂‖² over ‖x‖²", "eval", "nmse", ".3f", ""),
    ("SAE: L1, sum of activations per token", "eval", "l1", ".2f", ""),
    ("SAE: dead features", "eval", "dead", ".1%", ""),
    ("SAE: features in the ultra-low cluster", "eval", "ultra_low", ",.0f", ""),
    ("SAE: cosine of encoder and decoder row, median", "eval", "alignment_median", ".2f", "≈ 1 in healthy ones"),
    ("SAE: cosine to the nearest other feature, median", "eval", "nearest_cosine_median", ".2f", ""),
    ("KL from the model to the model through the SAE, nats", "eval", "kl", ".3f", ""),
    ("loss as it is", "eval", "ce_raw", ".3f", ""),
    ("loss through the SAE", "eval", "ce_spliced", ".3f", ""),
    ("loss, layer set to zero", "eval", "ce_zero", ".3f", ""),
    ("loss, layer set to its mean", "eval", "ce_mean", ".3f", ""),
    ("CE recovered, against zero", "eval", "recovered_zero", ".1%", "79 %"),
    ("CE recovered, against mean", "eval", "recovered_mean", ".1%", ""),
]


def _quality(results: dict, folder: Path) -> str:
    runs = [(name, results["quality"][name]) for name in ("a", "b") if results["quality"].get(name)]
    if not runs:
        return ""
    rows = ""
    for label, part, key, form, paper in QUALITY:
        values = [run.get(part, {}).get(key) for _, run in runs]
        if any(value is not None for value in values):
            rows += _row(label, *("–" if value is None else format(value, form) for value in values), paper)
    table = _frame(("", *(f"run {name.upper()}" for name, _ in runs), "paper"), rows)
    scores = runs[0][1].get("eval", {})
    if not scores.get("histogram"):
        return "<h2>Quality</h2>" + table
    figures.density(
        scores["histogram"], scores["histogram_edges"], folder / "density.png",
        ultra_low=scores.get("histogram_ultra_low"),
    )  # fmt: skip
    caption = f"How often features fire (run {runs[0][0].upper()}); those that never did are not drawn."
    return "<h2>Quality</h2>" + table + _image("density.png", "Histogram of feature densities", caption)


def _image(name: str, alt: str, caption: str) -> str:
    return f"<figure><img src='{name}' alt='{escape(alt)}'><figcaption>{escape(caption)}</figcaption></figure>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def _table(results: dict) -> str:
    found, effects = "", ""
    for row in results["categories"]:
        paper, match = PAPER_PEARSON.get(row["name"]), PAPER_MATCH.get(row["name"])
        found += _row(
            row["name"], f"{row['base_rate']:.2%}", _number(row["pearson"], ".2f"),
            _number(row.get("pearson_paper"), ".2f"), "–" if paper is None else f"{paper:.2f}",
            _number(row["neuron_pearson"], ".2f"), _number(row["advantage"], "+.2f"), f"{row['specificity']:.0%}",
            f"{row['specificity_upper']:.0%}", f"{row['lift_upper']:.0f}×", f"{row['recall']:.0%}",
        )  # fmt: skip
        effects += _row(row["name"], *_effects(row), "–" if match is None else f"{match:.2f}")
    any_effect = any(row["ablation"] or row["pinning"] or row["match"] for row in results["categories"])
    return (
        "<h2>The features, beside the paper’s figures</h2><h3>Is it a detector?</h3>"
        + _frame(("category", "base rate", "Pearson", "by the paper’s proxy", "paper", "neuron", "advantage",
                  "specificity", "upper half", "lift there", "recall"), found)
        + _image("features_and_neurons.png", "Best feature and best neuron per category",
                 "Best feature and best neuron, each chosen on the other half of the documents.")
        + (
            "<h3>Does the model use it, and does another run find it?</h3>"
            + _frame(("category", "ΔNLL inside", "elsewhere", "pinned", "unpinned", "neuron pinned", "match",
                      "in-sample", "paper"), effects)
            if any_effect else ""
        )
        + f"<p class=soft>{escape(PAPER_ARABIC)}</p>"
    )  # fmt: skip


def _effects(row: dict) -> list[str]:
    ablation, pinning, match = row["ablation"], row["pinning"], row["match"]
    cells = [_number(ablation["inside"], "+.3f"), _number(ablation["outside"], "+.4f")] if ablation else ["–", "–"]
    cells += [f"{pinning[key]:.1%}" for key in ("pinned", "unpinned", "neuron")] if pinning else ["–"] * 3
    return [*cells, *(_number(match[key], ".2f") if match else "–" for key in ("held_out", "pearson"))]


def _id(row: dict) -> str:
    return "c-" + "".join(c if c.isalnum() else "-" for c in row["name"])


def _card(row: dict, folder: Path, asked_for: str | None = None) -> str:
    """Everything about one feature. asked_for: the id of a feature that was not found by its category."""
    name, stem = row["name"], asked_for or _id(row)
    figures.activations(row["bins"], name, folder / f"{stem}-activations.png")
    figures.expected_value(row["bins"], name, folder / f"{stem}-expected.png")
    image = f"Activations inside and outside {name}"
    parts = [
        f"<h2 id='{stem}'>Feature {row['feature']}, beside {escape(name)}</h2>"
        if asked_for
        else f"<h2 id='{stem}'>{escape(name)}: feature {row['feature']}</h2>",
        _summary(row),
        _image(f"{stem}-activations.png", image,
               f"Above: tokens by the feature’s activation. Below: the share of them that are {name}, per interval; "
               f"of all tokens it is {row['base_rate']:.2%}."),
        _image(f"{stem}-expected.png", f"Expected value inside and outside {name}",
               "Expected value: tokens weighted by their activation."),
        _logit_part(row, stem, folder),
        _ablation_part(row),
        _pinning_part(row),
        _gaps_part(row),
        _contexts(row),
    ]  # fmt: skip
    return "".join(parts)


def _summary(row: dict) -> str:
    largest = ", ".join(f"neuron {n} {_number(c, '+.2f')}" for n, c in row["neurons"])
    match = row["match"]
    sentences = [
        f"Fires on {row['density']:.2%} of tokens, at most {row['max']:.1f}; on {row['recall']:.0%} of the category.",
        f"Pearson with the category {_number(row['pearson'], '.2f')} ({_number(row['pearson_clipped'], '.2f')} with the "
        f"graded proxy); the best neuron, {row['neuron']}, has {_number(row['neuron_pearson'], '.2f')}.",
        f"Largest decoder coefficients: {largest}." if largest else "",
    ]
    if match:
        weights = match["logit_pearson"]
        also = "" if weights is None else f" (logit weights: {_number(weights, '.2f')})"
        sentences.append(
            f"In the other run feature {match['feature']} matches it, r {_number(match['pearson'], '.2f')} on the tokens "
            f"that chose it, {_number(match['held_out'], '.2f')} held out{also}."
        )
    return f"<p>{' '.join(filter(None, sentences))}</p>"


def _logit_part(row: dict, stem: str, folder: Path) -> str:
    if not row["logits"]:
        return ""
    figures.logits(row["logits"], row["name"], folder / f"{stem}-logits.png")
    lists = "".join(
        f"<p>{label}: " + ", ".join(f"<bdi>{escape(visible(t))}</bdi> <span class=soft>{_number(v, '+.2f')}</span>" for t, v in row["logits"][key]) + "</p>"
        for key, label in (("top", "It makes likelier"), ("bottom", "and less likely"))
    )  # fmt: skip
    return (
        _image(
            f"{stem}-logits.png",
            "Logit weights",
            f"What one unit of activation adds to every token’s logit; {row['name']} tokens outlined.",
        )
        + lists
    )


def _ablation_part(row: dict) -> str:
    if not row["ablation"]:
        return ""
    a = row["ablation"]
    return (
        f"<p>Set to zero, it changes the loss by {_number(a['inside'], '+.3f')} nats per token on {a['tokens_inside']:,} "
        f"tokens inside the category, by {_number(a['beside'], '+.3f')} on the others of the same contexts, by "
        f"{_number(a['outside'], '+.4f')} in contexts without it, and by {_number(a['top'], '+.2f')} after the 20 strongest "
        f"activations.{_agreement(a.get('agreement'))}</p>"
    )


def _agreement(found: dict | None) -> str:
    if not found:
        return ""
    return (
        f" At {found['places']} single tokens gradient × activation foretells that with r "
        f"{_number(found['pearson'], '.2f')}, and its sign at {found['same_sign']:.0%} of them."
    )


def _pinning_part(row: dict) -> str:
    if not row["pinning"]:
        return ""
    p = row["pinning"]
    labels = {
        "unpinned": "untouched",
        "pinned": f"feature pinned at {p['value']:.1f}",
        "neuron": f"neuron {row['neuron']} pinned at {p['neuron_value']:.1f}",
    }
    parts = []
    for key, label in labels.items():
        samples = "".join(f"<div class=sample dir=auto>{escape(visible(text))}</div>" for text in p["samples"][key])
        parts.append(f"<h4>{escape(label)}: {p[key]:.1%} of the probability on {escape(row['name'])}</h4>{samples}")
    return f"<h3>What the model writes from {_prefixes(p.get('prefix'))}</h3>" + "".join(parts)


def _gaps_part(row: dict) -> str:
    """What the category covers and the feature skips, and which features have it."""
    gaps = row.get("gaps")
    if not gaps or not gaps["members"]:
        return ""
    strings = ", ".join(f"<bdi>{escape(visible(t))}</bdi> <span class=soft>{missed}</span>" for t, _, missed in gaps["strings"])
    others = ", ".join(f"feature {o['feature']} (on {o['share']:.0%} of them)" for o in gaps["others"])
    return (
        f"<p>Of {gaps['members']:,} tokens of the category in a part of the text it skips {gaps['missed']:,}"
        + (f", most often {strings}" if strings else "")
        + (f". There fire {others}, chosen on other documents" if others else "") + ".</p>"
    )  # fmt: skip


def _prefixes(prefix: str | list[str] | None) -> str:
    prefixes = [prefix] if isinstance(prefix, str) else prefix or [""]
    return ", ".join(f"<q><bdi>{escape(visible(p))}</bdi></q>" if p else "nothing" for p in prefixes)


def _contexts(row: dict, shown: int = 8) -> str:
    if not row["contexts"]:
        return ""
    lines = [_context(context, row["max"]) for context in row["contexts"]]
    more = f"<details><summary>{len(lines) - shown} more</summary>{''.join(lines[shown:])}</details>"
    return "<h3>Where it fires most</h3>" + "".join(lines[:shown]) + (more if len(lines) > shown else "")


def _context(context: dict, highest: float) -> str:
    spans = []
    for i, (token, value) in enumerate(zip(context["tokens"], context["activations"], strict=True)):
        shade = (
            f" style='background:rgba(var(--hot),{min(1.0, value / max(highest, 1e-9)) * 0.8:.2f})'"
            if value > 0
            else ""
        )
        mark = " class=at" if i == context["at"] else ""
        spans.append(f"<span{mark}{shade} title='{value:.2f}'>{escape(visible(token))}</span>")
    value = context["activations"][context["at"]]
    return f"<div class=ctx><span class=num>{value:.1f}</span><div dir=auto>{''.join(spans)}</div></div>"
