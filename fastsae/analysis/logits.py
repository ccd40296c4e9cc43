"""Logit weights of many features at once.

Axes: M directions, C contexts, T tokens, D width of the hooked output, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.analysis.stream import Source, device_of
from fastsae.hooks import activations, replace

_STEP = {torch.float32: 0.02, torch.float64: 1e-4}  # of the activations' norm; half precision needs a wide step
_LOGITS = 2**25  # logits held at once: 128 MB in float32


@torch.no_grad()
def logit_changes(model: Any, hook: str, directions: Tensor, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Change of every logit per unit of each direction [M, D], added at every token: [M, V] float32, on the CPU.

    The mean over the tokens [C, T] in `mask` (default: all) of the central difference
    (logits(x + ε d) − logits(x − ε d)) / 2ε with ε ‖d‖ = 2 % of the activations' root mean square norm: the derivative
    up to ε², whatever stands between hook and logits (down projection, later blocks, final norm). Directions go in as
    copies of the contexts in one batch. The derivative is linear in d, so M > D directions cost D: see LogitMap.

    A model in half precision takes a step of 50 %: its logits do not resolve a smaller one.
    """
    C, T = token_ids.shape
    device = device_of(model)
    keep = torch.ones(C, T) if mask is None else mask.float()
    weight = (keep / keep.sum().clamp(min=1)).to(device)  # [C, T]
    x = activations(model, hook, token_ids)
    size = float(x.float().square().sum(-1).mul(weight).sum().sqrt())
    size = (size or 1.0) * _STEP.get(x.dtype, 0.5)
    norms = directions.norm(dim=1).clamp(min=1e-12)
    steps = (directions / norms[:, None] * size).to(device, x.dtype)  # [M, D]
    # The first direction alone tells V, and with it how many copies fit.
    found: list[Tensor] = []
    start, group = 0, 1
    while start < len(steps):
        part = steps[start : start + group]
        found.append(_difference(model, hook, part, token_ids.to(device), weight))
        start += len(part)
        group = max(1, _LOGITS // (C * T * found[0].shape[1]))
    if not found:
        return torch.zeros(0, 0)
    return torch.cat(found).cpu() * (norms.cpu().float() / size / 2)[:, None]


def _difference(model: Any, hook: str, steps: Tensor, token_ids: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over tokens of logits(x + step) − logits(x − step) for steps [M, D]: [M, V]."""
    M, (C, T) = len(steps), token_ids.shape
    shift = steps.repeat_interleave(C, 0)[:, None]  # [M·C, 1, D]
    total: Tensor | None = None
    for sign in (1, -1):

        def edit(x: Tensor, sign: int = sign) -> Tensor:
            return x + sign * shift.to(x.dtype)

        with replace(model, hook, edit):
            out = model(token_ids.repeat(M, 1))
        logits = getattr(out, "logits", out).float()  # [M·C, T, V]
        mean = torch.einsum("mctv,ct->mv", logits.view(M, C, T, -1), weight)
        total = mean if total is None else total - mean
    assert total is not None
    return total


class LogitMap:
    """Logit weights of a dictionary's features on a few contexts: `LogitMap(source, ids, mask, count)(features)`.

    The logit weights of feature f are those of its direction d_f: what one unit of activation adds to every logit,
    median-shifted (Bricken et al. 2023). They are linear in d, so where more features will be asked for than the hook
    has coordinates, one [D, V] matrix of the coordinates is made first and every feature is a product with it.

    count: how many features will be asked for. Costs min(count, D) · 2 · C · T tokens of the model.
    """

    def __init__(self, source: Source, token_ids: Tensor, mask: Tensor | None, count: int) -> None:
        self.source, self.token_ids, self.mask = source, token_ids, mask
        D = source.sae.cfg.d_in
        self.matrix = self._changes(torch.eye(D)) if count > D else None

    def __call__(self, features: Tensor) -> Tensor:
        """[M] numbers of features → [M, V] float32."""
        sae = self.source.sae
        d = (sae.W_dec[features.to(sae.device)] / sae.input_scale).detach().float().cpu()
        weights = d @ self.matrix if self.matrix is not None else self._changes(d)
        return weights - weights.median(1, keepdim=True).values

    def _changes(self, directions: Tensor) -> Tensor:
        return logit_changes(self.source.model, self.source.hook, directions, self.token_ids, self.mask)


class ContextSample:
    """`count` contexts drawn evenly from a stream of contexts, cut to `length` tokens: a seeded reservoir."""

    def __init__(self, count: int, length: int, seed: int) -> None:
        self.count, self.length, self.seen = count, length, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, context_ids: Tensor, grid: Tensor) -> None:
        """context_ids, grid: [B, T], as in a Read."""
        for ids, rows in zip(context_ids[:, : self.length], grid[:, : self.length], strict=True):
            self.seen += 1
            if len(self._kept) < self.count:
                self._kept.append((ids, rows >= 0))
                continue
            place = int(torch.randint(self.seen, (), generator=self._generator))
            if place < self.count:
                self._kept[place] = (ids, rows >= 0)

    def contexts(self) -> tuple[Tensor, Tensor]:
        """(token ids [C, T], mask [C, T]); right padding is harmless in a causal model, and masked."""
        width = max((len(ids) for ids, _ in self._kept), default=0)
        ids, mask = torch.zeros(2, len(self._kept), width, dtype=torch.int64)
        for row, (some, real) in enumerate(self._kept):
            ids[row, : len(some)], mask[row, : len(some)] = some, real.long()
        return ids, mask.bool()
