"""The paper's own proxies beside ours, for the categories of which the paper tells a correlation (Bricken et al. 2023).

They choose nothing: the feature is the one that our label finds, and its correlation with the paper's proxy stands
beside. Axes: F features, P proxies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fastsae.analysis.cards import Cards
from fastsae.analysis.evidence import SCORE
from fastsae.analysis.proxies import Proxy, proxies
from fastsae.analysis.survey import Survey

PAPERS = ("Arabic", "Hebrew", "base64", "DNA")
_AXES = {"p": 1, "c": 1, "cc": 1, "fp": 2, "fc": 2, "xp": 2, "xc": 2, "inside": 0, "inside_weight": 0}  # P of Sums


class PaperForm(NamedTuple):
    """Pearson's r of every feature with the paper's proxy on the half where features are scored, the proxy as yes or no
    (> 0) and as max(proxy, 0): [F] each."""

    binary: np.ndarray
    clipped: np.ndarray


def beside(chosen: Iterable[Proxy]) -> list[Proxy]:
    """The paper's form of each proxy that has one and that is not among them itself."""
    names = [proxy.name for proxy in chosen]
    forms = [f"{name}/paper" for name in PAPERS if name in names]
    return proxies([form for form in forms if form not in names])


def taken_apart(survey: Survey, extra: int) -> tuple[Survey, dict[str, PaperForm]]:
    """The survey, in place, without its last `extra` proxies; and what it says of the paper's forms, by category."""
    cards = Cards(survey)
    binary, clipped = cards.pearson(SCORE), cards.pearson(SCORE, clipped=True)
    places = {name.removesuffix("/paper"): p for p, name in enumerate(survey.proxies) if name.endswith("/paper")}
    found = {
        name: PaperForm(binary[:, p].copy(), clipped[:, p].copy()) for name, p in places.items() if name in PAPERS
    }
    stay = np.arange(len(survey.proxies) - extra)
    survey.proxies = survey.proxies[: len(stay)]
    for name, axis in _AXES.items():
        survey.sums.arrays[name] = np.take(survey.sums[name], stay, axis)
    return survey, found
