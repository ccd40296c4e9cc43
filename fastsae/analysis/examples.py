"""A feature on a window of text, and what an explainer may see of a feature.

Axes: W tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Example:
    """A feature's activations on the window of tokens around the one it was chosen for.

    token_ids: [W] int64. activations: [W] float32, 0 where the feature is silent. at: that token's place in the window.
    document, position: where it stands, the number of its document and its own number in it.
    """

    token_ids: np.ndarray
    activations: np.ndarray
    at: int
    document: int
    position: int

    @property
    def value(self) -> float:
        """The activation at the token that the window was chosen for."""
        return float(self.activations[self.at])

    def cut(self, around: int) -> Example:
        """The same with at most `around` tokens on each side of the chosen one."""
        low, high = max(0, self.at - around), min(len(self.token_ids), self.at + around + 1)
        return Example(
            self.token_ids[low:high], self.activations[low:high], self.at - low, self.document, self.position
        )


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of a feature from one half of the documents; the other half has another Evidence.

    maximum: its largest activation there. top: the strongest windows, strongest first. intervals: windows drawn evenly
    from each of m equal intervals of (0, maximum], weakest interval first. random: windows drawn without regard to the
    feature, on most of which it is silent. elsewhere: windows with the tokens on which it is strongest, drawn without
    regard to whether it is on there. top_logits, bottom_logits: tokens that it makes likelier and unlikelier.
    interval_counts: [m], how many tokens of that half have an activation in each interval; empty if not counted.
    tokens: how many tokens that half has; 0 if not counted.
    """

    feature: int
    maximum: float
    top: list[Example]
    intervals: list[list[Example]]
    random: list[Example]
    elsewhere: list[Example] = field(default_factory=list)
    top_logits: list[str] = field(default_factory=list)
    bottom_logits: list[str] = field(default_factory=list)
    interval_counts: list[int] = field(default_factory=list)
    tokens: int = 0
