"""The sizes that are timed, and what a case of the bench is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """N tokens, D width, F dictionary size, K active latents per token."""

    name: str
    N: int
    D: int
    F: int
    K: int


SHAPES = [
    Shape("S1", 16384, 4096, 131072, 64),
    Shape("small", 4096, 768, 24576, 32),
    Shape("paper", 8192, 512, 4096, 20),
    Shape("paper wide", 8192, 512, 131072, 20),
    Shape("S2", 8192, 4096, 1048576, 64),
]
TINY = [Shape("tiny", 3, 32, 256, 4)]  # for a dry run
LARGEST_STEP = 2**31  # elements of [N, F] and twice those of [F, D]; past it a dense step fits no GPU we know of


class TooLarge(Exception):
    """Why a case was not even tried."""


@dataclass(frozen=True)
class Case:
    """build() gives the call to be timed, after checking it; work and traffic are in operations and bytes. memory:
    bytes that `fastsae.footprint` says a call allocates on a GPU."""

    op: str
    variant: str
    shape: Shape
    dtype: torch.dtype
    build: Callable[[torch.device], Call]
    operations: float = 0
    traffic: float = 0
    memory: int = 0

    def row(self) -> dict[str, Any]:
        return {"op": self.op, "variant": self.variant, "dtype": str(self.dtype).removeprefix("torch."),
                "shape": self.shape.name, **{k: v for k, v in asdict(self.shape).items() if k != "name"}}
