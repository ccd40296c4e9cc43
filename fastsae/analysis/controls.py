"""What features are compared with: neurons, random directions, and the features themselves in the wrong places.

Axes: F features, D neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsae.analysis.stream import encoded
from fastsae.codes import SparseCode
from fastsae.sae import SAE

_POOL = 20_000  # tokens that misplaced features are drawn from


@torch.no_grad()
def neurons_as_features(sae: SAE) -> SAE:
    """A dictionary whose features are the neurons (what is positive of them), in the neurons' own units."""
    D = sae.cfg.d_in
    name: Any = str(sae.dtype).removeprefix("torch.")
    made = SAE(d_in=D, d_sae=D, activation="relu", max_l0=D, decoder_norm="free", dtype=name, device=sae.device)
    made.encoder.weight.copy_(torch.eye(D))
    made.W_dec.copy_(torch.eye(D))
    return made.eval()


@torch.no_grad()
def random_features(sae: SAE, l0: float, seed: int = 0) -> SAE:
    """A dictionary as wide as this one whose directions are random: features that mean nothing. As many of them are on
    at each token as are of this one's on average: l0, measured, to the nearest whole number."""
    name: Any = str(sae.dtype).removeprefix("torch.")
    k = min(max(round(l0), 1), sae.cfg.d_sae)
    made = SAE(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, k=k, seed=seed + 1, dtype=name, device=sae.device)
    made.b_dec.copy_(sae.b_dec)
    made.input_mean.copy_(sae.input_mean)
    made.input_scale.copy_(sae.input_scale)
    return made.eval()


class Misplaced(nn.Module):
    """A dictionary whose features fire as often and as strongly, on other tokens: what chance explains.

    Each token takes the code of one drawn from all that were read before (a pool of them): within a batch tokens would
    change places with tokens of the same kind of text.
    """

    def __init__(self, sae: SAE, seed: int) -> None:
        super().__init__()
        self._sae, self.cfg = sae, sae.cfg
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.zeros(0, sae.cfg.d_in)

    @property
    def device(self) -> torch.device:
        return self._sae.device

    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The code of drawn tokens, also where one has more active latents than max_l0."""
        pool = x if not len(self._pool) else self._pool.to(x)
        drawn = pool[torch.randint(len(pool), (len(x),), generator=self._generator).to(x.device)]
        both = torch.cat([self._pool.to(x), x])
        stay = torch.randperm(len(both), generator=self._generator)[:_POOL]
        self._pool = both[stay.to(x.device)].cpu()
        return encoded(self._sae, drawn, "the pool of tokens")
