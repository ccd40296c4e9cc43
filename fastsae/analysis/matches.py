"""What `match` finds: for each feature of a dictionary its likeness in another run, and how to compare.

Axes: n tokens, A and B features of the two dictionaries, S features of A that are matched, D neurons.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastSAEError
from fastsae.files import write_json

TRAINED = "a dictionary trained on a shuffled model"
SHUFFLED = "the other run's dictionary, reading a shuffled copy of its model"


@dataclass(frozen=True)
class MatchConfig:
    """How to compare two runs. Raises FastSAEError for values that cannot be meant."""

    tokens: int | None = None
    """Held-out tokens to read; default: all."""
    context: int = 128
    """Tokens in a context, the begin-of-text token included."""
    batch_size: int = 32
    """Contexts in a forward pass."""
    min_fires: int = 10
    """A feature that is active on fewer tokens than this is neither matched nor a match: chance alone would do."""
    memory: float = 2.0
    """GiB for the sums of products, 8 bytes for every pair of features, half of the text and control. Where all pairs
    do not fit, a sample of the first dictionary's features is matched, drawn by the seed."""
    shuffled_control: bool = True
    """Run the second dictionary also on its model with the weights shuffled within each matrix."""
    logit_contexts: int = 8
    """Contexts on which logit weights are taken; 0 leaves them out."""
    assign_up_to: int = 8192
    """Features up to which the one-to-one assignment is made: its time grows with the cube."""
    seed: int = 0
    """Seeds the sample of features, the contexts and the shuffled weights."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise FastSAEError(f"tokens must be at least 1, got {self.tokens}; leave it out to read all")
        for name, least in (("context", 2), ("batch_size", 1), ("min_fires", 1), ("logit_contexts", 0)):
            if getattr(self, name) < least:
                raise FastSAEError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.memory > 0:
            raise FastSAEError(f"memory must be more than 0 GiB, got {self.memory}")


@dataclass(frozen=True, eq=False)
class Match:
    """Features of A with their likeness in B, one entry per feature in `features` [S], ascending.

    tokens: n. sampled: whether `features` is a sample, all pairs having been too many for the memory. fires: [S],
    tokens on which each is active; live: [S] bool, at least min_fires of them. What follows is NaN (−1 for numbers of
    features) where a feature is not live, or nothing in B is.

    In-sample, chosen and scored on the same tokens and so partly luck: best, pearson: the feature of B with the largest
    Pearson's r of activations over all tokens, and that r, the paper's measure. assigned, assigned_pearson: partner and
    r in the one-to-one assignment with the largest sum of r (Hungarian method), −1 for those that are left over; None
    where it was not made. Held out, chosen on one half of the documents and scored on the other: held_out,
    assigned_held_out; NaN where the feature is constant on a half, so that there is nothing to choose or to score by.

    logit_pearson: Pearson's r over the vocabulary of the logit weights of the feature and of `best`, which activations
    alone chose; None without logit weights. decoder_cosine: cosine of these two decoder rows; None where the widths
    differ. It says something only where both dictionaries read the same module of the same model. best_by_logits,
    best_logit_pearson and best_by_decoder, best_decoder_cosine: the live feature of B that is most alike in that way,
    and how alike: in-sample maxima, whatever the two fire on.

    control_kind: what stands in the place of B as a control, TRAINED or SHUFFLED; None without one. control,
    control_held_out, control_logit_pearson, control_best_logit_pearson: [S], as pearson, held_out, logit_pearson and
    best_logit_pearson. neurons, neurons_held_out, neurons_logit_pearson, neurons_best_logit_pearson: [D], the same for
    the coordinates of the module that A reads against those that B reads; None where that is the same module of the
    same model, for each would match itself.
    """

    tokens: int
    min_fires: int
    sampled: bool
    features: Tensor
    fires: Tensor
    best: Tensor
    pearson: Tensor
    held_out: Tensor
    assigned: Tensor | None
    assigned_pearson: Tensor | None
    logit_pearson: Tensor | None
    decoder_cosine: Tensor | None
    control: Tensor | None
    control_held_out: Tensor | None
    neurons: Tensor | None
    neurons_held_out: Tensor | None
    assigned_held_out: Tensor | None = None
    best_by_logits: Tensor | None = None
    best_logit_pearson: Tensor | None = None
    best_by_decoder: Tensor | None = None
    best_decoder_cosine: Tensor | None = None
    control_kind: str | None = None
    control_logit_pearson: Tensor | None = None
    control_best_logit_pearson: Tensor | None = None
    neurons_logit_pearson: Tensor | None = None
    neurons_best_logit_pearson: Tensor | None = None

    @property
    def live(self) -> Tensor:
        return self.fires >= self.min_fires

    def medians(self) -> dict[str, float | None]:
        """Over live features (neurons: over all that vary), by the name of the measure; None where there is none."""
        return {name: _median(getattr(self, name)) for name in MEASURES}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; numbers that are not finite become None."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {**values, "live": int(self.live.sum()), "medians": self.medians()}

    def save(self, path: str | Path) -> None:
        """Writes to_dict() as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Match:
        """What save wrote. Raises FastSAEError for another file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            given = [f.name for f in fields(cls) if f.name in values or f.default is MISSING]
            return cls(**{name: _tensor(name, values[name]) for name in given})
        except (OSError, ValueError, KeyError, TypeError):
            raise FastSAEError(f"expected a file that `fastsae match` wrote, got {path}: run match again") from None


MEASURES = (
    "pearson", "held_out", "assigned_pearson", "assigned_held_out", "logit_pearson", "best_logit_pearson",
    "decoder_cosine", "best_decoder_cosine",
    "control", "control_held_out", "control_logit_pearson", "control_best_logit_pearson",
    "neurons", "neurons_held_out", "neurons_logit_pearson", "neurons_best_logit_pearson",
)  # fmt: skip
_NUMBERS = ("features", "fires", "best", "assigned", "best_by_logits", "best_by_decoder")  # columns of whole numbers


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return [None if x != x else x for x in value.tolist()]


def _tensor(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if name in _NUMBERS:
        return torch.tensor(value, dtype=torch.int64)
    return torch.tensor([float("nan") if x is None else x for x in value], dtype=torch.float64)


def _median(values: Tensor | None) -> float | None:
    """Of the finite values, the mean of the two middle ones where their number is even (as numpy's)."""
    values = values[values.isfinite()] if values is not None else None
    return float(values.double().quantile(0.5)) if values is not None and len(values) else None
