"""Data made of known sparse features, and how much of them a dictionary has found.

Axes: N samples, G true features, F dictionary size, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What the data are made of. The features differ in frequency as those of language do: a few are common."""

    dim: int = 256
    """D, the width of a sample."""
    n_features: int = 512
    """G, true features; more than dim makes them overlap (superposition)."""
    active: float = 5.0
    """Features that are active in a sample, on average."""
    decay: float = 0.99
    """Frequency of a feature over that of the one before it; 1 makes all equally frequent."""
    noise: float = 0.0
    """Standard deviation, per coordinate, of Gaussian noise added to each sample."""
    seed: int = 0
    """Of the features' directions."""

    def __post_init__(self) -> None:
        for name in ("dim", "n_features"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number ≥ 1, got {getattr(self, name)!r}")
        if not 0 < self.active <= self.n_features:
            raise ConfigError(f"active must be in (0, n_features = {self.n_features}], got {self.active}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay must be in (0, 1], got {self.decay}")
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise must be a finite number ≥ 0, got {self.noise}")


class SyntheticData:
    """`SyntheticData(dim=256, n_features=512).sample(n, generator)` → x [n, D].

    Each feature fires on its own, with its probability; its value is then uniform in [0.5, 1.5], and x is the sum of
    value times unit direction, plus noise. features: [G, D], rows of unit norm. probabilities: [G], falling from the
    first feature to the last, none above 1/2; their sum is `active`.

    Raises ConfigError for sizes that cannot be meant, or where no probabilities up to 1/2 have that sum.
    """

    def __init__(self, config: SyntheticConfig | None = None, **options: float) -> None:
        self.config = config if config is not None else SyntheticConfig(**options)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = torch.randn(self.config.n_features, self.config.dim, generator=generator)
        self.features = rows / rows.norm(dim=1, keepdim=True)
        self.probabilities = _probabilities(self.config)

    def codes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The true activations of n samples: [n, G], almost all 0. Without a generator, torch's global one draws."""
        shape = (n, self.config.n_features)
        fires = torch.rand(shape, generator=generator) < self.probabilities
        return fires * (0.5 + torch.rand(shape, generator=generator))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n samples: [n, D] float32."""
        x = self.codes(n, generator) @ self.features
        if self.config.noise:
            x += self.config.noise * torch.randn(x.shape, generator=generator)
        return x


def _probabilities(config: SyntheticConfig) -> Tensor:
    """min(½, c · decay^g), c such that they sum up to `active`."""
    if config.active > 0.5 * config.n_features:
        raise ConfigError(f"active={config.active} needs probabilities above 1/2; use more features or fewer active")
    shape = config.decay ** torch.arange(config.n_features, dtype=torch.float64)
    low, high = 0.0, 1.0
    while (high * shape).clamp(max=0.5).sum() < config.active:
        high *= 2
    for _ in range(60):  # halving the interval: exact to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * shape).clamp(max=0.5).sum() < config.active else (low, middle)
    return (high * shape).clamp(max=0.5).float()


class Recovery(NamedTuple):
    """How much of the true features a dictionary has found.

    mean_max_cosine: over true features, the mean of the largest cosine with any decoder row. precision, recall, f1: of
    a one-to-one matching of rows and features, a pair counting as found at a cosine of `threshold` or more; precision
    is over the rows that were given, recall over the true features.
    """

    mean_max_cosine: float
    precision: float
    recall: float
    f1: float


def recovery(w_dec: Tensor, features: Tensor, threshold: float = 0.9, rows: Tensor | None = None) -> Recovery:
    """Compare w_dec [F, D] with features [G, D]. rows: indices or mask of the latents that count (the live ones).

    The matching is the one with the largest sum of cosines (Hungarian method, scipy); without scipy it is greedy,
    largest cosine first, which can miss a pair only where two rows both lie near one feature.
    """
    w_dec = w_dec.detach().to("cpu", torch.float32)
    if rows is not None:
        w_dec = w_dec[rows.cpu()]
    if w_dec.shape[0] == 0:
        return Recovery(0.0, 0.0, 0.0, 0.0)
    cosine = cosines(features, w_dec)  # [G, F]
    found = int((_match(cosine) >= threshold).sum())
    precision, recall = found / cosine.shape[1], found / cosine.shape[0]
    f1 = 2 * found / (cosine.shape[0] + cosine.shape[1])
    return Recovery(float(cosine.amax(1).mean()), precision, recall, f1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of every row of a [A, D] with every row of b [B, D]: [A, B]. A row of zeros has cosine 0 with everything."""
    a, b = a.detach().float(), b.detach().float()
    return (a / a.norm(dim=1, keepdim=True).clamp_min(1e-12)) @ (b / b.norm(dim=1, keepdim=True).clamp_min(1e-12)).T


def _match(cosine: Tensor) -> Tensor:
    """Cosines of the matched pairs, min(G, F) of them."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return _match_greedily(cosine)
    true, row = linear_sum_assignment(cosine.numpy(), maximize=True)
    return cosine[torch.as_tensor(true), torch.as_tensor(row)]


def _match_greedily(cosine: Tensor) -> Tensor:
    cosine = cosine.clone()
    pairs = []
    for _ in range(min(cosine.shape)):
        best = int(cosine.argmax())
        true, row = divmod(best, cosine.shape[1])
        pairs.append(cosine[true, row].clone())
        cosine[true] = cosine[:, row] = -2.0
    return torch.stack(pairs)
