"""The quality of a dictionary beyond what `evaluate` measures: the ultra-low cluster, geometry, known features.

Axes: F features, D width, G true features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.errors import FastSAEError, MissingDependencyError
from fastsae.evaluate import EvalResult, density_histogram
from fastsae.sae import SAE
from fastsae.synthetic import Recovery, recovery

_BLOCK = 1024  # decoder rows compared at once: [1024, F] cosines
_COSINE_BINS = 40  # of width 0.05 from −1 to 1
_RARE = -3.0  # log10 of the density above which nothing is ultra-low
_LEAST = 20  # live features, below which no mixture is fitted


class UltraLow(NamedTuple):
    """Live features apart in two clusters. members: [F] bool, those of the ultra-low one, all False where there is
    none. found: whether there is one; why: what decided it, in words. means: of the rows (ultra-low, healthy), mean
    log10 density, encoder bias and enc·dec cosine; None where not found."""

    members: Tensor
    found: bool
    why: str
    means: tuple[tuple[float, ...], tuple[float, ...]] | None


class Geometry(NamedTuple):
    """Cosines between the decoder rows that count. histogram: pairs i < j by cosine between `edges`, 40 bins from −1 to
    1. features: [S] numbers of the rows; nearest, cosine: [S], of each the row closest to it and how close."""

    histogram: list[int]
    edges: list[float]
    features: Tensor
    nearest: Tensor
    cosine: Tensor


@dataclass(frozen=True, eq=False)
class Quality:
    """What a dictionary is worth. evaluation: see EvalResult. bias, alignment: [F], encoder bias and cosine of encoder
    and decoder row. truth: of data with known features, else None."""

    evaluation: EvalResult
    bias: Tensor
    alignment: Tensor
    ultra_low: UltraLow
    geometry: Geometry
    truth: Recovery | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: all of the evaluation; its density histogram once more in two parts; the rest in figures."""
        low, result = self.ultra_low.members, self.evaluation
        live = result.density > 0
        parts = {"healthy": live & ~low, "ultra_low": low}
        geometry = self.geometry
        return {
            **result.to_dict(),
            **{f"histogram_{k}": density_histogram(result.density[m], result.tokens)[0] for k, m in parts.items()},
            "ultra_low": int(low.sum()),
            "ultra_low_why": self.ultra_low.why,
            "ultra_low_means": self.ultra_low.means,
            "alignment_median": float(self.alignment[live].median()) if live.any() else None,
            "cosine_histogram": geometry.histogram,
            "cosine_edges": geometry.edges,
            "nearest_cosine_median": float(geometry.cosine.median()) if len(geometry.cosine) > 1 else None,
            "nearest_cosine_max": float(geometry.cosine.max()) if len(geometry.cosine) > 1 else None,
            "truth": self.truth._asdict() if self.truth is not None else None,
        }


def quality(
    sae: SAE, evaluation: EvalResult, *, features: Tensor | None = None, threshold: float = 0.9, seed: int = 0
) -> Quality:
    """Adds to an evaluation what the weights say together with its densities.

    features: [G, D], the directions that synthetic data were made of (SyntheticData.features): the live decoder rows
    are compared with them, mean maximal cosine and one-to-one F1 at a cosine of `threshold` (see synthetic.recovery).
    Raises FastSAEError for an evaluation of another dictionary; MissingDependencyError without scikit-learn.
    """
    if len(evaluation.density) != sae.cfg.d_sae:
        raise FastSAEError(
            f"the evaluation is of {len(evaluation.density)} features, the SAE has {sae.cfg.d_sae}: evaluate this SAE"
        )
    live = evaluation.density > 0
    bias, alignment = sae.encoder.bias.detach().float().cpu(), alignment_of(sae)
    return Quality(
        evaluation,
        bias,
        alignment,
        ultra_low(evaluation.density, bias, alignment, seed),
        geometry(sae.W_dec, live),
        recovery(sae.W_dec, features, threshold, live) if features is not None else None,
    )


@torch.no_grad()
def alignment_of(sae: SAE) -> Tensor:
    """Cosine of each feature's encoder and decoder row, [F]: near 1 in a healthy feature (Bricken et al. 2023)."""
    return torch.nn.functional.cosine_similarity(sae.encoder.weight.float(), sae.W_dec.float(), dim=1).cpu()


def ultra_low(density: Tensor, bias: Tensor, alignment: Tensor, seed: int = 0) -> UltraLow:
    """Splits off the cluster of features that almost never fire and mean nothing (Bricken et al. 2023), from density,
    encoder bias and enc·dec cosine, [F] each; dead features (density 0) are in neither cluster.

    A mixture of two Gaussians is fitted to (log10 density, bias, cosine), each divided by its standard deviation. The
    component of lower density is an ultra-low cluster where all of this holds: its mean density is below 1e-3; two
    components explain the data better than one (Bayesian information criterion); their mean densities are a factor of
    10 apart or more, and by Ashman's D = |μ₁ − μ₂| √2 / √(σ₁² + σ₂²) > 2 in log density, apart clearly; and its mean
    cosine is lower, or its mean bias different, by a standard deviation of the healthy ones' or more. Otherwise there
    is none; `why` says why.
    Its members are those of the component whose density is nearer to its mean than to the other's.

    Densities below 1 / tokens read as 0: on few tokens an ultra-low cluster (near 1e-7 in the paper) looks dead.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError:
        raise MissingDependencyError("ultra_low needs scikit-learn: pip install 'fastsae[all]'") from None
    live = (density > 0).nonzero().flatten()
    members = torch.zeros(len(density), dtype=torch.bool)
    if len(live) < _LEAST:
        return UltraLow(members, False, f"{len(live)} live features are too few to tell clusters apart", None)
    columns = (density[live].double().log10(), bias[live].double(), alignment[live].double())
    table = torch.stack(columns, 1).numpy()  # [S, 3]
    scale = table.std(0)
    points = (table - table.mean(0)) / np.where(scale > 1e-9, scale, 1.0)
    one = GaussianMixture(1, random_state=seed, reg_covar=1e-4).fit(points)
    two = GaussianMixture(2, random_state=seed, reg_covar=1e-4, n_init=5).fit(points)
    label = two.predict(points)
    parts = [table[label == k] for k in range(2)]
    if min(map(len, parts)) < 3:
        return UltraLow(members, False, "one cluster: the second of two is of fewer than 3 features", None)
    low = int(np.argmin([part[:, 0].mean() for part in parts]))
    why = _no_cluster(parts[low], parts[1 - low], one.bic(points) - two.bic(points))
    if why:
        return UltraLow(members, False, why, None)
    middle = (parts[low][:, 0].mean() + parts[1 - low][:, 0].mean()) / 2
    members[live[torch.from_numpy((label == low) & (table[:, 0] < middle))]] = True
    means = tuple(tuple(float(v) for v in part.mean(0)) for part in (parts[low], parts[1 - low]))
    gap = means[1][0] - means[0][0]
    return UltraLow(members, True, f"two clusters, {gap:.1f} decades of density apart", (means[0], means[1]))


def _no_cluster(low: np.ndarray, healthy: np.ndarray, gain: float) -> str:
    """Why these two are not an ultra-low cluster [·, 3] and the rest; empty where they are. gain: BIC of one − two."""
    means, spreads = ([part.mean(0) for part in (low, healthy)], [part.std(0) for part in (low, healthy)])
    gap = means[1][0] - means[0][0]
    ashman = gap * np.sqrt(2) / max(np.hypot(spreads[0][0], spreads[1][0]), 1e-9)
    if gain <= 0:
        return "one cluster: two Gaussians explain the features no better than one"
    if gap < 1 or ashman <= 2:
        return f"one cluster: two parts lie {gap:.1f} decades of density apart, with Ashman's D = {ashman:.1f}"
    if means[0][0] > _RARE:
        return f"two clusters, but the rarer fires on {10 ** means[0][0]:.1g} of the tokens: not ultra-low"
    if means[1][2] - means[0][2] < spreads[1][2] and abs(means[0][1] - means[1][1]) < spreads[1][1]:
        return "two densities, but the rare features' bias and enc·dec are those of the others: rare, not ultra-low"
    return ""


@torch.no_grad()
def geometry(w_dec: Tensor, rows: Tensor | None = None) -> Geometry:
    """Cosines of all pairs of decoder rows [F, D], in blocks: never [F, F]. rows: mask [F] or numbers of those that
    count (the live ones). A row of zeros has cosine 0 with everything."""
    w = w_dec.detach().float()
    numbers = torch.arange(len(w), device=w.device)
    numbers = numbers if rows is None else numbers[rows.to(w.device)]
    w = torch.nn.functional.normalize(w[numbers], dim=1)
    S = len(w)
    counts = torch.zeros(_COSINE_BINS, dtype=torch.float64)
    nearest, cosine = torch.full((S,), -1), torch.full((S,), torch.nan)
    for start in range(0, S, _BLOCK):
        block = (w[start : start + _BLOCK] @ w.T).clamp(-1, 1)  # [b, S]
        itself = torch.arange(start, start + len(block), device=w.device)
        later = torch.arange(S, device=w.device) > itself[:, None]
        place = ((block[later] + 1) / 2 * _COSINE_BINS).long().clamp(max=_COSINE_BINS - 1)
        counts += torch.bincount(place, minlength=_COSINE_BINS).cpu()
        block[torch.arange(len(block), device=w.device), itself] = -2.0
        if S > 1:
            best = block.max(1)
            nearest[start : start + len(block)] = numbers[best.indices].cpu()
            cosine[start : start + len(block)] = best.values.cpu()
    edges = [round(-1 + 2 * i / _COSINE_BINS, 6) for i in range(_COSINE_BINS + 1)]
    return Geometry(counts.long().tolist(), edges, numbers.cpu(), nearest, cosine)
