"""Gradient × activation: what every active feature contributes to a target, from one backward pass.

Special tokens count neither as places of a feature nor as tokens to be predicted; `special` is as `effects` has it.
Axes: B contexts, T tokens, N = B · T, K active features, D width of the hooked output, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.effects import ordinary, token_losses
from fastsae.analysis.stream import device_of, encoded, evaluating
from fastsae.codes import SparseCode
from fastsae.errors import FastSAEError
from fastsae.hooks import activations, replace
from fastsae.sae import SAE

Target = Callable[[Tensor], Tensor]  # logits [B, T, V] float32 → a scalar

_CHUNK = 2**24  # numbers of gathered decoder rows held at a time


class TooFewError(FastSAEError):
    """Too few active entries to correlate anything."""


def loss_of(token_ids: Tensor, keep: Tensor | None = None) -> Target:
    """Σ of the NLL of every token of [B, T] given those before it, nats. keep: [B, T] bool, those to be predicted."""

    def target(logits: Tensor) -> Tensor:
        wanted = token_ids[:, 1:] if keep is None else token_ids[:, 1:].where(keep[:, 1:], torch.tensor(-100))
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted.flatten().to(logits.device), reduction="sum", ignore_index=-100
        )

    return target


def logit_of(token: int, position: int = -1, context: int = 0) -> Target:
    """The logit of a token at a position of a context, less the mean over the vocabulary, which shifts nothing."""
    return lambda logits: logits[context, position, token] - logits[context, position].mean()


@dataclass(frozen=True, eq=False)
class Attribution:
    """contribution [N, K]: activation · (∂target/∂x · d_feature), for the entries of code, [N, K] of [B, T]; 0 at
    special tokens.

    What the target would lose, to first order, if that feature were ablated at that token alone. target: its value.
    """

    code: SparseCode
    contribution: Tensor
    target: float

    def at(self, context: int, position: int) -> list[tuple[int, float]]:
        """(feature, contribution) of all features active at one token, largest |contribution| first."""
        assert self.code.batch_shape is not None
        B, T = self.code.batch_shape
        if not (0 <= context < B and -T <= position < T):
            raise FastSAEError(f"expected a place in {B} contexts of {T} tokens, got context {context}, {position}")
        n = context * T + position % T
        on = self.code.valid()[n] & (self.code.values[n] != 0)
        found = zip(self.code.indices[n][on].tolist(), self.contribution[n][on].tolist(), strict=True)
        return sorted(found, key=lambda pair: -abs(pair[1]))

    def by_feature(self) -> Tensor:
        """[F], summed over all tokens."""
        total = torch.zeros(self.code.d_sae, device=self.contribution.device)
        return total.index_add_(0, self.code.indices.flatten().long(), self.contribution.flatten().float())


def attribution(
    sae: SAE,
    model: Any,
    hook: str,
    token_ids: Tensor,
    target: Target | None = None,
    special: Sequence[int] | None = None,
) -> Attribution:
    """Of contexts [B, T] to a target; unless another is given, loss_of all tokens that are not special. One forward and
    one backward pass.

    Raises FastSAEError when the target does not depend on the hooked output.
    """
    leaf: list[Tensor] = []
    keep = ordinary(model, token_ids, special)

    def cut(x: Tensor) -> Tensor:
        leaf.append(x.detach().requires_grad_())
        return leaf[-1]

    with evaluating(model), torch.enable_grad(), replace(model, hook, cut):
        logits = model(token_ids.to(device_of(model)), use_cache=False).logits.float()
        value = (target or loss_of(token_ids.cpu(), keep))(logits)
        gradient = torch.autograd.grad(value, leaf[0], allow_unused=True)[0] if leaf and value.requires_grad else None
        if gradient is None:
            raise FastSAEError(f"the target does not depend on the output of {hook}: hook a module before it")
    with torch.no_grad():
        code = encoded(sae, leaf[0].detach(), hook)
        found = _contributions(sae, code, gradient.flatten(0, 1)) * keep.to(gradient.device).view(-1, 1)
        return Attribution(code, found, float(value))


def _contributions(sae: SAE, code: SparseCode, gradient: Tensor) -> Tensor:
    """values · (gradient · d) [N, K]; unused slots hold value 0."""
    N, K = code.values.shape
    step = max(1, _CHUNK // max(1, K * gradient.shape[1]))
    parts = [
        torch.einsum("nd,nkd->nk", gradient[n : n + step].to(sae.dtype), sae.W_dec[code.indices[n : n + step].long()])
        for n in range(0, N, step)
    ]
    slopes = torch.cat(parts) if parts else torch.zeros_like(code.values)
    return code.values * slopes / sae.input_scale


@dataclass(frozen=True, eq=False)
class Agreement:
    """predicted: [S], −contribution to the loss; measured: [S], its change in nats when the feature is ablated there.

    contexts, positions, features: [S], where. pearson, spearman: of predicted and measured; NaN for a constant.
    same_sign: the share of places at which both have the same sign.
    """

    predicted: np.ndarray
    measured: np.ndarray
    contexts: np.ndarray
    positions: np.ndarray
    features: np.ndarray
    pearson: float
    spearman: float
    same_sign: float


@torch.no_grad()
def agreement(
    sae: SAE,
    model: Any,
    hook: str,
    token_ids: Tensor,
    *,
    feature: int | None = None,
    count: int = 256,
    keep: Tensor | None = None,
    batch_size: int = 16,
    seed: int = 0,
    special: Sequence[int] | None = None,
) -> Agreement:
    """Attribution to the loss against ablation, each at one token: `count` drawn at random of all active entries.

    token_ids: [B, T]. feature: only entries of this one. keep: [B, T] bool, tokens to draw from, of those that are not
    special. A context's last token, padding aside, predicts nothing here and is left out. One forward pass a sample, in
    batches.
    Raises TooFewError when fewer than three entries are active.
    """
    found = attribution(sae, model, hook, token_ids, special=special)
    usual = ordinary(model, token_ids, special)
    B, T = token_ids.shape
    code = found.code
    on = (code.valid() & (code.values != 0)).view(B, T, -1)
    usual &= usual.int().flip(1).cumsum(1).flip(1) - usual.int() > 0  # with something behind it to be predicted
    on &= (usual if keep is None else usual & keep.cpu()).to(on.device)[..., None]
    if feature is not None:
        on &= (code.indices == feature).view(B, T, -1)
    entries = on.view(B * T, -1).nonzero()  # [entries, 2]: token, slot
    if len(entries) < 3:
        raise TooFewError(f"agreement needs at least 3 active entries to correlate, got {len(entries)}: add text")
    drawn = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))[:count]
    n, slot = entries[drawn.sort().values.to(entries.device)].T
    features, values = code.indices[n, slot].long(), code.values[n, slot]
    counted = ordinary(model, token_ids, special)
    measured = _ablated_at(sae, model, hook, token_ids, counted, n, features, values, batch_size)
    predicted = -found.contribution[n, slot].double().cpu().numpy()
    return Agreement(
        predicted=predicted,
        measured=measured,
        contexts=(n // T).cpu().numpy(),
        positions=(n % T).cpu().numpy(),
        features=features.cpu().numpy(),
        pearson=_correlation(predicted, measured),
        spearman=_correlation(_ranks(predicted), _ranks(measured)),
        same_sign=float((np.sign(predicted) == np.sign(measured)).mean()),
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r, NaN where one is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if min(np.ptp(a), np.ptp(b)) > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 … S, those that tie at their mean."""
    _, back, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[back]


def _ablated_at(
    sae: SAE,
    model: Any,
    hook: str,
    token_ids: Tensor,
    keep: Tensor,
    n: Tensor,
    features: Tensor,
    values: Tensor,
    batch_size: int,
) -> np.ndarray:
    """Change of a context's loss, summed over tokens in keep [B, T], when a feature is taken away at one token: [S] for
    tokens n [S] of B · T."""
    T, change, wanted = token_ids.shape[1], [], keep[:, 1:].double()
    with evaluating(sae, model):
        raw = torch.cat([token_losses(model, hook, part).double() for part in token_ids.split(batch_size)])
        for begin in range(0, len(n), batch_size):
            some = slice(begin, begin + batch_size)
            rows = (n[some] // T).cpu()
            x = activations(model, hook, token_ids[rows]).clone()
            d = sae.W_dec[features[some]] / sae.input_scale
            x[torch.arange(len(rows)), (n[some] % T).to(x.device)] -= (values[some, None] * d).to(x.dtype)
            moved = token_losses(model, hook, token_ids[rows], lambda _, x=x: x, ()).double() - raw[rows]
            change.append((moved * wanted[rows]).sum(1))
    return torch.cat(change).numpy()
