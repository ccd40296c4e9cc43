"""Dead latents at the end of the dictionary, so that most steps can do without them.

Which latents are dead changes slowly. Every so many steps all latents are evaluated, and then dead ones change places
with living ones, weights, moments and all, until the living come first: the steps in between work on the first rows of
every matrix, which is a view, and costs no second copy.

Axes: F dictionary size, D width, B rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SWAPPED = 4096  # rows at a time
MOVED_ELEMENTS = 1 << 24  # of a matrix that are copied at a time


def living_first(order: Tensor, dead: Tensor, tensors: Iterable[Tensor]) -> int:
    """Swaps rows of order [F] and of all tensors [F, …], in place, until those that are not dead [F] come first; how
    many those are. Waits for the device."""
    living = int((~dead).sum())
    first = dead[:living].nonzero().squeeze(1)
    second = (~dead[living:]).nonzero().squeeze(1) + living
    for t in (order, *tensors):
        for start in range(0, first.numel(), SWAPPED):
            a, b = first[start : start + SWAPPED], second[start : start + SWAPPED]
            kept = t[a]
            t[a] = t[b]
            t[b] = kept
    return living


def restore(order: Tensor, tensors: Iterable[Tensor]) -> None:
    """Puts row i of all tensors [F, …] back to order[i], in place, some columns at a time; order becomes 0 … F − 1."""
    back = order.argsort()
    for t in tensors:
        columns = t.view(t.shape[0], -1)
        width = max(1, MOVED_ELEMENTS // max(t.shape[0], 1))
        for start in range(0, columns.shape[1], width):
            columns[:, start : start + width] = columns[:, start : start + width][back]
    order.copy_(torch.arange(order.numel(), device=order.device))
