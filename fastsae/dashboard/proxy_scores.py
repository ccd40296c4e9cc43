"""Every feature's score against one proxy, from sums that a survey has or that a pass over text adds up.

Features are ranked by Pearson's r on one half of the documents and scored on the other, as everywhere in the analysis.
Axes: n tokens, F features.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.analysis import specificity
from fastsae.analysis.evidence import CHOOSE, SCORE
from fastsae.analysis.stream import Read
from fastsae.dashboard.plain import plain
from fastsae.errors import FastSAEError

_AT_ONCE = 1 << 22  # bytes that are read at once on the way to what is wanted


class ProxySums:
    """By half of the documents. tokens, members: [2]. fires, f, ff, fp, inside: [2, F], as survey.Sums has them; inside
    counts the tokens of the category on which a feature fires. x, xx, xp: [2, D], the same of neurons, which every
    score of a feature wants beside it."""

    def __init__(self, F: int, D: int) -> None:
        self.tokens, self.members = np.zeros(2, np.int64), np.zeros(2, np.int64)
        self.fires, self.inside = np.zeros((2, F), np.int64), np.zeros((2, F), np.int64)
        self.f, self.ff, self.fp = (np.zeros((2, F)) for _ in range(3))
        self.x, self.xx, self.xp = (np.zeros((2, D)) for _ in range(3))

    @classmethod
    def of_file(cls, file: Any, path: Path, p: int) -> ProxySums:
        """Of proxy number p of a survey. file: its arrays by name (an open .npz file); path: that file."""
        made = cls(0, 0)
        made.tokens, made.members = file["sums.tokens"], file["sums.p"][:, p].astype(np.int64)
        made.fires, made.f, made.ff = (file[f"sums.{name}"] for name in ("fires", "f", "ff"))
        made.fp, made.xp = file["sums.fp"][:, :, p], file["sums.xp"][:, :, p]
        made.x, made.xx = file["sums.x"], file["sums.xx"]
        made.inside = _entry(path, "sums.inside", p).sum(-1, dtype=np.int64)
        return made

    def add(self, some: Read, inside: np.ndarray, half: np.ndarray, which: int = 0) -> None:
        """One batch. inside, half: [n] bool, tokens of the category, and those of documents that score."""
        code, F = some.codes[which], self.f.shape[1]
        on = code.valid() & (code.values > 0)
        rows, slots = on.nonzero(as_tuple=True)
        at = code.indices[rows, slots].cpu().numpy().astype(np.int64)
        value = code.values[rows, slots].double().cpu().numpy()
        row = rows.cpu().numpy()
        at += half[row] * F
        hit = inside[row].astype(np.float64)
        self.tokens += np.bincount(half, minlength=2)
        self.members += np.bincount(half[inside], minlength=2)
        for into, weights in ((self.fires, None), (self.inside, hit), (self.f, value), (self.ff, value**2),
                              (self.fp, value * hit)):  # fmt: skip
            into += np.bincount(at, weights, minlength=2 * F).reshape(2, F).astype(into.dtype)
        x = some.xs[which].detach().cpu().double().numpy()
        for side in range(2):
            of_half = x[half == bool(side)]
            self.x[side] += of_half.sum(0)
            self.xx[side] += (of_half**2).sum(0)
            self.xp[side] += x[inside & (half == bool(side))].sum(0)

    def pearson(self, half: int | None = None, neurons: bool = False) -> np.ndarray:
        """r of every feature with the proxy as yes or no: [F], or of every neuron: [D]; half None: on all text."""
        sums = (self.x, self.xx, self.xp) if neurons else (self.f, self.ff, self.fp)
        parts = (self.tokens, self.members, *sums)
        n, p, f, ff, fp = (part.sum(0) if half is None else part[half] for part in parts)
        return specificity.pearson(max(float(n), 1.0), f, ff, p, p, fp)

    def check(self, name: str) -> None:
        """Raises FastSAEError where a half of the documents has no token of the category: nothing could be scored."""
        if not self.members.all():
            raise FastSAEError(
                f"{int(self.members.sum())} of {int(self.tokens.sum())} tokens belong to {name}, and either half of "
                "the documents needs some: read more text, or ask for something that occurs in it"
            )

    def table(self, top: int = 20) -> dict[str, Any]:
        """Ready for JSON. features: the `top` best by r on the half that chooses, with r, specificity, lift and recall
        on the half that scores. neuron: the best neuron, found and scored likewise; None where all are constant.
        pearson: [F], r of every feature on all text, to 4 places."""
        chosen, scored = self.pearson(CHOOSE), self.pearson(SCORE)
        order = np.argsort(-chosen, kind="stable")[:top]
        base = self.members[SCORE] / max(int(self.tokens[SCORE]), 1)
        rows = []
        for f in order.tolist():
            fires, inside = int(self.fires[SCORE, f]), int(self.inside[SCORE, f])
            share = inside / fires if fires else None
            rows.append({
                "feature": f,
                "chosen": chosen[f],
                "pearson": scored[f],
                "specificity": share,
                "lift": share / base if share is not None and base else None,
                "recall": inside / int(self.members[SCORE]) if self.members[SCORE] else None,
            })  # fmt: skip
        return plain({
            "tokens": self.tokens.sum(),
            "members": self.members.sum(),
            "base_rate": base,
            "features": rows,
            "neuron": self._neuron(),
            "pearson": np.round(self.pearson(), 4),
        })  # fmt: skip

    def _neuron(self) -> dict[str, Any] | None:
        chosen = self.pearson(CHOOSE, neurons=True)
        if not chosen.any():
            return None
        best = int(chosen.argmax())
        return {"neuron": best, "chosen": chosen[best], "pearson": self.pearson(SCORE, neurons=True)[best]}


def _entry(path: Path, name: str, number: int) -> np.ndarray:
    """array[number] of an array in an .npz file, without the rest of it in memory."""
    with zipfile.ZipFile(path) as whole, whole.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)  # type: ignore[arg-type]
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[arg-type]
        size = int(np.prod(shape[1:])) * dtype.itemsize
        for left in range(number * size, 0, -_AT_ONCE):
            file.read(min(left, _AT_ONCE))
        return np.frombuffer(file.read(size), dtype).reshape(shape[1:])
