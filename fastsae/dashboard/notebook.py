"""A feature's card in a notebook: HTML that stands by itself, without scripts, everything from text escaped.

    fastsae.show(1234, "report/")          # from the site that analyze wrote
    fastsae.show(1235)                     # from the same one
    fastsae.show(1234, facts)              # from what is at hand

Axes: W tokens of a window.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from fastsae.dashboard import data, site
from fastsae.dashboard.facts import Facts

_HOT = "213,94,0"  # Okabe–Ito vermilion; with these opacities ink stays legible on it, on a light and a dark page
_LINE = "border-bottom:1px solid rgba(128,128,128,.3);padding:.15em 0;"
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]")
_BYTES = re.compile("(?:‹[0-9A-F]{2}›)+")


class Shown:
    """A card as a notebook shows it; `card` is the dictionary behind it (see data.feature_card)."""

    def __init__(self, card: dict[str, Any], examples: int) -> None:
        self.card, self.examples = card, examples

    def __repr__(self) -> str:
        return f"feature {self.card['feature']}: density {self.card['density']}, maximum {self.card['max']}"

    def _repr_html_(self) -> str:
        card = self.card
        parts = [_head(card), _columns(card)]
        if card["top"]:
            parts.append(_windows("Strongest examples", card["top"][: self.examples], card["max"]))
        for part in reversed(card["intervals"]):
            if part["windows"]:
                title = f"{part['low']:g} to {part['high']:g}"
                parts.append(_windows(title, part["windows"], card["max"], closed=True))
        if card["bottom"]:
            parts.append(_windows("Weakest examples", card["bottom"][: self.examples], card["max"], closed=True))
        return f"<div style='font:14px/1.5 system-ui,sans-serif;max-width:60em'>{''.join(parts)}</div>"


_last: str | Path | Facts = "report"  # what `show` showed a feature of


def show(feature: int, source: str | Path | Facts | None = None, *, examples: int = 20) -> Shown:
    """The card of a feature, for the last line of a notebook's cell.

    source: the folder of a report, or Facts; left out, the one of the call before, at first the folder "report".
    examples: of the strongest and of the weakest, how many.
    Raises FastSAEError for a folder without a report, or a feature that it does not have.
    """
    global _last
    source = _last if source is None else source
    card = data.feature_card(source, feature) if isinstance(source, Facts) else site.read_card(source, feature)
    _last = source
    return Shown(card, examples)


def _head(card: dict[str, Any]) -> str:
    said = card["explanation"]
    facts = [f"fires on {_percent(card['density'])} of tokens", f"maximum {_number(card['max'])}"]
    if card.get("follows") and card["fires"]:
        name, r = card["follows"]
        facts.append(f"{name}: r {_number(r)}")
    if card["match"]:
        r = f"r held out {_number(card['match']['held_out'])}"
        facts.append(f"in the other run: feature {card['match']['feature']}, {r}")
    # What an explanation quotes is kept apart: else a list of Arabic tokens would run from right to left.
    quoted = re.sub("`[^`]*`", lambda found: f"<bdi>{found[0]}</bdi>", escape(said["text"])) if said else ""
    names = {"spearman": "simulation ρ", "detection": "detection"}
    scores = [f"{word} {_number(said[name])}" for name, word in names.items() if said and said.get(name) is not None]
    score = f" <span style='opacity:.75'>{escape(' · '.join(scores))}</span>" if scores else ""
    line = f"<p style='margin:.2em 0'><bdi>{quoted}</bdi>{score}</p>" if said else ""
    return (
        f"<p style='font-size:1.3em;font-weight:600;margin:.2em 0'>Feature {card['feature']}</p>{line}"
        f"<p style='opacity:.75;margin:.2em 0'>{escape(' · '.join(facts))}</p>"
    )


def _columns(card: dict[str, Any]) -> str:
    parts = []
    if card["fires"]:
        parts.append(_histogram("Activations", card["histogram"]["counts"], 0.0, card["max"]))
    logits = card["logits"]
    if logits:
        parts.append(_histogram("Logit weights", logits["counts"], logits["low"], logits["high"]))
        for name, key in (("Makes likelier", "top"), ("Makes less likely", "bottom")):
            rows = [(f"<bdi>{escape(text)}</bdi>", f"{value:+.2f}") for text, value in logits[key]]
            parts.append(_list(name, rows))
    if card["proxies"] and card["fires"]:
        rows = [(f"<bdi>{escape(name)}</bdi>", f"r {_number(r)}") for name, r in card["proxies"][:5]]
        parts.append(_list("Proxies", rows))
    for name, key, word in (
        ("Nearest neurons", "neurons", "neuron"),
        ("Similar decoder rows", "similar", "feature"),
        ("Fires together with", "cofiring", "feature"),
    ):
        if card[key]:
            column = 2 if key == "cofiring" else 1
            parts.append(_list(name, [(f"{word} {row[0]}", _number(row[column])) for row in card[key][:5]]))
    return f"<div style='display:flex;flex-wrap:wrap;gap:.5em 2em;align-items:flex-start'>{''.join(parts)}</div>"


def _list(title: str, rows: list[tuple[str, str]]) -> str:
    """rows: left cells are HTML already."""
    lines = "".join(
        f"<div style='display:flex;justify-content:space-between;gap:1em;white-space:pre;{_LINE}'>"
        f"<span>{left}</span><span style='opacity:.75'>{escape(right)}</span></div>"
        for left, right in rows
    )
    return f"<div><div style='font-weight:600'>{escape(title)}</div>{lines}</div>"


def _histogram(title: str, counts: list[int], low: float, high: float) -> str:
    """Bars of equal width, heights by the root of the count, so that few tokens are seen beside many."""
    width, height = 220, 80
    most, step = max(counts, default=0) ** 0.5 or 1.0, width / max(len(counts), 1)
    bars = "".join(
        f"<rect x='{i * step:.1f}' y='{height - n**0.5 / most * height:.1f}' width='{max(step - 0.6, 0.5):.1f}' "
        f"height='{n**0.5 / most * height:.1f}'><title>{n:,}</title></rect>"
        for i, n in enumerate(counts)
    )
    return (
        f"<div><div style='font-weight:600'>{escape(title)}</div><svg role='img' aria-label='{escape(title)}' "
        f"width='{width}' height='{height}' style='display:block' fill='rgb({_HOT})'>{bars}</svg>"
        f"<div style='display:flex;justify-content:space-between;opacity:.75;width:{width}px'>"
        f"<span>{_number(low)}</span><span>{_number(high)}</span></div></div>"
    )


def _windows(title: str, windows: list[dict[str, Any]], highest: float, closed: bool = False) -> str:
    lines = "".join(_window(window, highest) for window in windows)
    start = f"<summary style='cursor:pointer'>{escape(title)}</summary>"
    return f"<details {'' if closed else 'open'} style='margin:.5em 0'>{start}{lines}</details>"


def _window(window: dict[str, Any], highest: float) -> str:
    value = window["activations"][window["at"]]
    joined = "".join(window["tokens"])
    letters = sum(c.isalpha() for c in _BYTES.sub("", joined))
    direction = "rtl" if 2 * len(_RIGHT_TO_LEFT.findall(joined)) > letters else "ltr"
    spans = "".join(_span(window, piece, highest) for piece in _pieces(window))
    return (
        f"<div style='display:flex;gap:.8em;{_LINE}'><span style='opacity:.75;min-width:3em;text-align:right'>"
        f"{_number(value)}</span><span dir='{direction}' style='flex:1;white-space:pre-wrap;overflow-wrap:anywhere'>"
        f"{spans}</span></div>"
    )


def _pieces(window: dict[str, Any]) -> list[list[int]]:
    """Places of the tokens that are shown as one: those that make a character together."""
    parts, found, places = set(window["parts"]), [], []
    for place in range(len(window["tokens"])):
        places.append(place)
        if place not in parts:
            found.append(places)
            places = []
    return found


def _span(window: dict[str, Any], places: list[int], highest: float) -> str:
    values = [window["activations"][place] for place in places]
    strength = max(values) / highest if highest else 0.0
    style = f"border-radius:3px;background:rgba({_HOT},{0.12 + 0.5 * strength:.2f})" if strength else ""
    if window["at"] in places:
        style += f";border-bottom:2px solid rgb({_HOT})"
    # Bytes that make no character are written in Latin letters, which must not turn the text around them.
    apart = "<span dir='ltr' style='opacity:.7;font-size:.75em'>"
    shown = _BYTES.sub(lambda found: f"{apart}{found[0]}</span>", escape(window["tokens"][places[-1]]))
    title = " | ".join(_number(value) for value in values)
    if "effects" in window:
        change = sum(window["effects"][place] for place in places)
        title += f", ΔNLL {change:+.3f}".replace("-", "−")
    return f"<span style='{style}' title='{title}'>{shown}</span>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2g} %"
