"""How features split as the dictionary grows: what `splitting.split` finds, what it is asked for, and both on disk.

Axes: L dictionaries ("layers", narrowest first), F features of one of them, E edges.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastSAEError
from fastsae.files import write_json


@dataclass(frozen=True)
class SplitConfig:
    """When two features of neighbouring dictionaries belong together. Raises FastSAEError for values out of range."""

    tokens: int | None = None
    """Held-out tokens to read; default: all."""
    context: int = 128
    """Tokens in a context, the begin-of-text token included."""
    batch_size: int = 32
    """Contexts in a forward pass."""
    threshold: float = 0.4
    """An edge needs a cosine of activations above this (the paper's value)."""
    min_fires: int = 10
    """Features that are active on fewer tokens than this have no edges."""
    memory: float = 2.0
    """GiB that the sums of products may take: 8 bytes for each pair of features of neighbouring dictionaries."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise FastSAEError(f"tokens must be at least 1, got {self.tokens}; leave it out to read all")
        for name, least in (("context", 2), ("batch_size", 1), ("min_fires", 1)):
            if getattr(self, name) < least:
                raise FastSAEError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise FastSAEError(f"threshold must be between 0 and 1, got {self.threshold}")
        if not self.memory > 0:
            raise FastSAEError(f"memory must be more than 0 GiB, got {self.memory}")


class Edges(NamedTuple):
    """Between one dictionary and the next wider one. parents, children: [E] int64, by parent and then by falling
    cosine; cosines: [E] float32."""

    parents: Tensor
    children: Tensor
    cosines: Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """The layered graph. density: of each of the L dictionaries, the share of tokens on which each feature fires [F].
    edges: L − 1 of them, edges[l] from dictionary l to l + 1."""

    tokens: int
    threshold: float
    density: tuple[Tensor, ...]
    edges: tuple[Edges, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(len(part) for part in self.density)

    def children(self, layer: int, feature: int) -> list[tuple[int, float]]:
        """(feature of the next dictionary, cosine), closest first; none in the last dictionary."""
        self._check(layer, feature)
        if layer + 1 == len(self.density):
            return []
        edges = self.edges[layer]
        at = (edges.parents == feature).nonzero().flatten()
        return list(zip(edges.children[at].tolist(), edges.cosines[at].tolist(), strict=True))

    def parents(self, layer: int, feature: int) -> list[tuple[int, float]]:
        """(feature of the dictionary before, cosine), closest first; none in the first dictionary."""
        self._check(layer, feature)
        if layer == 0:
            return []
        edges = self.edges[layer - 1]
        at = (edges.children == feature).nonzero().flatten()
        found = zip(edges.parents[at].tolist(), edges.cosines[at].tolist(), strict=True)
        return sorted(found, key=lambda pair: -pair[1])

    def descendants(self, layer: int, feature: int) -> dict[int, list[int]]:
        """By dictionary, the features that can be reached from one along edges, ascending; itself in its own."""
        self._check(layer, feature)
        reached = torch.tensor([feature])
        found = {layer: [feature]}
        for l in range(layer, len(self.edges)):
            edges = self.edges[l]
            reached = edges.children[torch.isin(edges.parents, reached)].unique()
            found[l + 1] = reached.tolist()
        return found

    def _check(self, layer: int, feature: int) -> None:
        if not 0 <= layer < len(self.density):
            raise FastSAEError(f"layer must be from 0 to {len(self.density) - 1}, got {layer}")
        if not 0 <= feature < self.widths[layer]:
            raise FastSAEError(f"features of layer {layer} are 0 to {self.widths[layer] - 1}, got {feature}")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: widths, densities, edges as lists of [parent, child, cosine], and how features split."""
        return {
            "tokens": self.tokens,
            "threshold": self.threshold,
            "widths": list(self.widths),
            "density": [part.tolist() for part in self.density],
            "edges": [
                [[p, c, round(r, 4)] for p, c, r in zip(*(column.tolist() for column in edges), strict=True)]
                for edges in self.edges
            ],
            "summary": self.summary(),
        }

    def summary(self) -> list[dict[str, float]]:
        """Of each step from one dictionary to the next: edges, parents with a child, and the mean and largest number
        of children of those."""
        rows = []
        for edges, size in zip(self.edges, self.widths, strict=False):
            counts = torch.bincount(edges.parents, minlength=size)
            have = counts[counts > 0].double()
            mean, most = (float(have.mean()), float(have.max())) if len(have) else (0.0, 0.0)
            rows.append({"edges": len(edges.parents), "parents": len(have), "mean_children": mean, "most": most})
        return rows

    def steps(self) -> list[tuple[int, int, dict[str, float]]]:
        """(width, next width, row of `summary`) of each step from one dictionary to the next."""
        return list(zip(self.widths, self.widths[1:], self.summary(), strict=False))

    def save(self, path: str | Path) -> None:
        """Writes to_dict() as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """What save wrote, cosines to 4 places. Raises FastSAEError for another file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            edges = (torch.tensor(part, dtype=torch.float64).reshape(-1, 3) for part in values["edges"])
            return cls(
                values["tokens"],
                values["threshold"],
                tuple(torch.tensor(part, dtype=torch.float64) for part in values["density"]),
                tuple(Edges(rows[:, 0].long(), rows[:, 1].long(), rows[:, 2].float()) for rows in edges),
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise FastSAEError(f"expected a file that `fastsae split` wrote, got {path}: run split again") from None
