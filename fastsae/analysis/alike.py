"""Which features point the same way, and which do the same to the output: likeness of all pairs without their table.

Both are products of rows: of decoder rows at unit norm, and, for Pearson's r of logit weights over the vocabulary, of
rows of the width of the stream. With W the centred unembedding and u, v what two features add to the stream before it,
r = uᵀ (W_Aᵀ W_B) v / (‖W_A u‖ · ‖W_B v‖): exact, and nothing of size [S, V] is ever there.

Axes: S and B rows of the two sides, D width of the hooked output, M of the stream before the unembedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.analysis.logit_map import LogitMap
from fastsae.sae import SAE

Rows = Callable[[Tensor], Tensor]  # numbers [m] → rows [m, D]

_AT_ONCE = 1024  # rows of the other side
_VOCABULARY = 4096  # rows of an unembedding


class Alike:
    """left: [S, M] float64; right: of numbers from 0 to B − 1, their rows [m, M]. A product of two is their likeness,
    NaN where a row is."""

    def __init__(self, left: Tensor, right: Rows) -> None:
        self._left, self._right = left, right

    @torch.no_grad()
    def of(self, partners: Tensor) -> Tensor:
        """[S] float64, on the CPU: the likeness of every row with its partner; NaN where that is −1."""
        found = torch.full((len(partners),), torch.nan, dtype=torch.float64)
        for at in (partners >= 0).nonzero().flatten().split(_AT_ONCE):
            found[at] = (self._left[at.to(self._left.device)] * self._right(partners[at])).sum(1).cpu()
        return found

    @torch.no_grad()
    def best(self, among: Tensor) -> tuple[Tensor, Tensor]:
        """(partner, likeness), [S] each, on the CPU: the largest among these numbers (mask [B]); −1 and NaN for none.

        A maximum over many, so partly luck. Memory: S · 1024 products at a time.
        """
        value = torch.full((len(self._left),), -torch.inf, dtype=torch.float64)
        partner = torch.full((len(self._left),), -1)
        for some in among.cpu().nonzero().flatten().split(_AT_ONCE):
            if not len(some):  # the one part of nothing
                continue
            found, place = (self._left @ self._right(some).T).nan_to_num_(nan=-torch.inf).max(1)
            found, place = found.cpu(), some[place.cpu()]
            partner, value = torch.where(found > value, place, partner), torch.maximum(found, value)
        return partner, value.masked_fill(partner < 0, torch.nan)


@torch.no_grad()
def by_decoder(a: SAE, features: Tensor, b: SAE) -> Alike:
    """Cosines of the decoder rows of these features [S] of A with those of B, dictionaries of one width."""

    def rows(sae: SAE, numbers: Tensor) -> Tensor:
        rows = sae.W_dec.detach()[numbers.to(sae.W_dec.device)].to(a.W_dec.device).double()
        return rows / rows.norm(dim=1, keepdim=True)  # 0 / 0: a row of zeros has no direction

    return Alike(rows(a, features), lambda numbers: rows(b, numbers))


class LogitLikeness:
    """Pearson's r, over the vocabulary, of the logit weights of directions in one model with those in another.

    of_a, of_b: maps of the two models at their hooks, which may be one. Where the models pad one tokenizer's vocabulary
    differently, the entries that both have. Takes V · M² multiplications, three times for two models.
    """

    def __init__(self, of_a: LogitMap, of_b: LogitMap) -> None:
        self._a, self._b = of_a, of_b
        self._aa = _covariance(of_a, of_a, len(of_b.unembedding))
        self._ab = self._aa if of_b is of_a else _covariance(of_a, of_b)
        self._bb = self._aa if of_b is of_a else _covariance(of_b, of_b, len(of_a.unembedding)).to(self._ab)

    @torch.no_grad()
    def of(self, x: Tensor, y: Rows) -> Alike:
        """Directions x [S, D] of A's hook against y of B's: features' decoder rows, or the rows of an identity. Their
        scale does not matter. NaN for a direction that changes no logit against another."""
        left = self._stream(self._a, x)
        left = (left @ self._ab) * _inverse_norm(left, self._aa)

        def right(numbers: Tensor) -> Tensor:
            rows = self._stream(self._b, y(numbers))
            return rows * _inverse_norm(rows, self._bb)

        return Alike(left, right)

    def _stream(self, of: LogitMap, directions: Tensor) -> Tensor:
        """What directions [m, D] add to the stream before the unembedding: [m, M] float64."""
        return (directions.detach().to(of.matrix).double() @ of.matrix.double().T).to(self._ab.device)


@torch.no_grad()
def _covariance(of_a: LogitMap, of_b: LogitMap, vocabulary: int | None = None) -> Tensor:
    """Σ over the vocabulary that both have of the centred rows' outer products: [M, M′] float64.

    vocabulary: entries that a third has, for both sides to be centred over the same ones.
    """
    a, b = of_a.unembedding, of_b.unembedding
    V = min(len(a), len(b), vocabulary or len(a))
    device = a.device

    def mean(weight: Tensor) -> Tensor:
        return torch.stack([part.double().sum(0) for part in weight[:V].split(_VOCABULARY)]).sum(0).to(device) / V

    means = mean(a), mean(b)
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=device)
    for rows in zip(a[:V].split(_VOCABULARY), b[:V].split(_VOCABULARY), strict=True):
        x, y = (part.to(device).double() - m for part, m in zip(rows, means, strict=True))
        total += x.T @ y
    return total


def _inverse_norm(rows: Tensor, covariance: Tensor) -> Tensor:
    """1 / √(uᵀ C u) of every row u [m, M]: [m, 1]; NaN where that is 0 up to rounding."""
    square = ((rows @ covariance) * rows).sum(1, keepdim=True)
    least = 1e-20 * covariance.trace() * rows.square().sum(1, keepdim=True)
    return square.clamp(min=1e-300).rsqrt().masked_fill(square <= least, torch.nan)
