"""Is a feature more than a neuron? Its decoder over the neuron basis, and the neuron that follows it best.

Both mean something where the hooked output is a layer's neurons (an MLP after its nonlinearity); in a residual stream
the coordinates are no privileged basis. Axes: F features, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.cross import NeuronCross, entries, rows_of, selected
from fastsae.analysis.specificity import pearson
from fastsae.codes import SparseCode

_CHUNK = 2**24  # numbers worked on at a time


@dataclass(frozen=True, eq=False)
class NeuronBasis:
    """Decoder rows at unit norm, over neurons.

    neurons, coefficients: [F, k], by absolute value. large: [F], coefficients of absolute value ≥ 0.1 (the paper's
    Arabic feature: 27). largest: [F], the largest absolute value (no feature of the paper's A/1 exceeds 0.9).
    negative: [F] bool, the largest is negative. kurtosis: [F], excess, of the coefficients; 0 for a normal
    distribution. neurons_used: [F], exp of the entropy of the squared coefficients: 1 for a neuron, D for all alike.
    """

    neurons: np.ndarray
    coefficients: np.ndarray
    large: np.ndarray
    largest: np.ndarray
    negative: np.ndarray
    kurtosis: np.ndarray
    neurons_used: np.ndarray


@torch.no_grad()
def neuron_basis(w_dec: Tensor, k: int = 10, least: float = 0.1) -> NeuronBasis:
    """Of decoder rows [F, D], whatever their norm. least: what counts as a large coefficient."""
    D = w_dec.shape[1]
    parts: list[tuple[Tensor, ...]] = []
    for rows in w_dec.split(max(1, _CHUNK // D)):
        unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp(min=1e-30)
        size = unit.abs()
        order = size.topk(min(k, D), dim=1).indices
        centred = unit - unit.mean(1, keepdim=True)
        variance = centred.square().mean(1)
        share = unit.square()
        parts.append(
            (
                order,
                unit.gather(1, order),
                (size >= least).sum(1),
                size.amax(1),
                unit.gather(1, order[:, :1])[:, 0] < 0,
                centred.pow(4).mean(1) / variance.square().clamp(min=1e-30) - 3,
                torch.special.entr(share).sum(1).exp(),
            )
        )
    return NeuronBasis(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class ClosestNeurons:
    """neurons, pearson: [F, k], the neurons whose activations follow the feature's best, best first."""

    neurons: np.ndarray
    pearson: np.ndarray


def closest_neurons(
    n: int,
    f: np.ndarray,
    ff: np.ndarray,
    x: np.ndarray,
    xx: np.ndarray,
    fx: np.ndarray,
    k: int = 3,
) -> ClosestNeurons:
    """From sums over n tokens: Σf, Σf² [F], Σx, Σx² [D] and Σf·x [F, D].

    A neuron that falls when the feature rises is not close: the largest r counts, not the largest |r|.
    """
    F, D = fx.shape
    k = min(k, D)
    neurons, found = np.zeros((F, k), dtype=np.int64), np.zeros((F, k))
    for begin in range(0, F, max(1, _CHUNK // D)):
        rows = slice(begin, begin + max(1, _CHUNK // D))
        r = pearson(n, f[rows, None], ff[rows, None], x, xx, fx[rows])
        order = np.argsort(-r, axis=1, kind="stable")[:, :k]
        neurons[rows], found[rows] = order, np.take_along_axis(r, order, 1)
    return ClosestNeurons(neurons, found)


class ClosestHeldOut:
    """The closest neuron of a few features, chosen on one half of the documents and scored on the other.

    Takes the features' numbers C, and is shown codes and activations batch by batch: 16 · C · D bytes.
    """

    def __init__(self, features: Sequence[int], d_sae: int, d_in: int) -> None:
        self._features = torch.tensor(sorted(set(features)), dtype=torch.int64)
        self._row = rows_of(self._features, d_sae)
        self._cross = NeuronCross(len(self._features), d_in, torch.device("cpu"))

    def add(self, code: SparseCode, x: Tensor, scoring: Tensor) -> None:
        """x: [n, D]; scoring: [n] bool, the half on which a choice is scored."""
        some = selected(entries(code, "cpu"), self._row)
        dense = torch.zeros(len(scoring), len(self._features), dtype=torch.float64)
        dense[torch.arange(len(scoring)).repeat_interleave(some.counts), some.features] = some.values
        for half in range(2):
            rows = scoring == bool(half)
            self._cross.add(half, dense[rows], x[rows.to(x.device)])

    def result(self) -> dict[int, float | None]:
        """Feature → Pearson on the scoring half of the neuron chosen on the other; None where it is constant on one."""
        scored = self._cross.best().held_out.tolist() if len(self._features) else []
        return {f: None if math.isnan(r) else r for f, r in zip(self._features.tolist(), scored, strict=True)}


def best_neurons(n: int, x: np.ndarray, xx: np.ndarray, p: np.ndarray, pp: np.ndarray, xp: np.ndarray) -> np.ndarray:
    """The neuron that follows each proxy best, [P], from Σx, Σx² [D], Σp, Σp² [P] and Σx·p [D, P] over n tokens.

    Take the sums from the half of the text where neurons are chosen; score the choice on the other half, by
    `specificity.OverlapCounter` and `specificity.Moments`, as features are scored.
    """
    return pearson(n, x[:, None], xx[:, None], p, pp, xp).argmax(0)
