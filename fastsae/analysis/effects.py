"""Edits of a feature, and what they do to the model's output. On any causal LM and any hook.

For one feature at a time; all features' logit weights are in `logit_map`, many ablations in `ablation`, gradients in
`attribution`, texts in `steering`. Axes: B contexts, T tokens, D width of the hooked output, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastsae.analysis.stream import encoded
from fastsae.errors import FastSAEError
from fastsae.hooks import replace
from fastsae.sae import SAE

Edit = Callable[[Tensor], Tensor]  # the hooked output [B, T, D] → what stands in its place


def direction(sae: SAE, feature: int) -> Tensor:
    """What one unit of the feature's activation adds to the hooked output, [D]."""
    return (sae.W_dec[feature] / sae.input_scale).detach()


Mode = Literal["add", "pin", "ablate"]


@dataclass(frozen=True)
class FeatureEdit:
    """What to do to a feature at every token; value in units of its activation.

    pin: set it to value. add: add value to it, wherever it stands. ablate: set it to 0; takes no value.
    Raises FastSAEError for another mode, or a value that is not a finite number.
    """

    feature: int
    value: float = 0.0
    mode: Mode = "pin"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise FastSAEError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if not abs(self.value) < float("inf"):
            raise FastSAEError(f"the value of feature {self.feature} must be a finite number, got {self.value}")
        if self.mode == "ablate" and self.value:
            raise FastSAEError(f"mode ablate sets to 0, got the value {self.value}: leave it out, or use pin")


def feature_values(sae: SAE, x: Tensor, features: int | Sequence[int]) -> Tensor:
    """Activations at x [B, T, D]: [B, T] of one feature, [B, T, M] of M."""
    code = encoded(sae, x, "the hooked output")
    one = isinstance(features, int)
    wanted = torch.as_tensor([features] if one else list(features), device=code.device)
    values = torch.where(code.valid(), code.values, torch.zeros_like(code.values))
    found = torch.stack([torch.where(code.indices == f, values, torch.zeros_like(values)).sum(-1) for f in wanted], -1)
    return found[:, 0].reshape(x.shape[:-1]) if one else found.reshape(*x.shape[:-1], len(wanted))


def set_features(sae: SAE, edits: Sequence[FeatureEdit]) -> Edit:
    """Several edits at once: x + Σ_pinned (value − f) d + Σ_added value · d, all f read from the unedited x.

    What the dictionary leaves unexplained of x stays as it is. Raises FastSAEError for a feature that the dictionary
    does not have, or one that is edited twice.
    """
    features = [edit.feature for edit in edits]
    if not edits or len(set(features)) < len(features):
        raise FastSAEError(f"expected edits of one feature each, no feature twice, got features {features}")
    if bad := [f for f in features if not 0 <= f < sae.cfg.d_sae]:
        raise FastSAEError(f"features must be numbers from 0 to {sae.cfg.d_sae - 1}, got {bad[0]}")
    d = (sae.W_dec[features] / sae.input_scale).detach()  # [M, D]
    to = torch.tensor([edit.value for edit in edits], device=d.device, dtype=d.dtype)
    fixed = torch.tensor([edit.mode != "add" for edit in edits], device=d.device)

    def apply(x: Tensor) -> Tensor:
        change = to.expand(*x.shape[:-1], len(to))
        if bool(fixed.any()):
            change = change - feature_values(sae, x, features) * fixed
        return x + (change.to(d.dtype) @ d).to(x.dtype)

    return apply


def set_feature(sae: SAE, feature: int, to: float) -> Edit:
    """The edit that sets one feature to a value at every token: x + (to − f) d. `to` = 0 ablates it."""
    return set_features(sae, [FeatureEdit(feature, to)])


def set_neuron(neuron: int, to: float) -> Edit:
    """The edit that sets one coordinate of the hooked output at every token."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., neuron] = to
        return x

    return edit


@torch.no_grad()
def logits(model: Any, hook: str, token_ids: Tensor, edit: Edit | None = None) -> Tensor:
    """The model's logits [B, T, V] in float32, with the hooked output edited."""
    with replace(model, hook, edit) if edit else nullcontext():
        return model(token_ids.to(next(model.parameters()).device), use_cache=False).logits.float()


def token_losses(model: Any, hook: str, token_ids: Tensor, edit: Edit | None = None) -> Tensor:
    """Negative log-likelihood in nats of every token given those before it, [B, T − 1]."""
    out = logits(model, hook, token_ids, edit)[:, :-1]
    targets = token_ids[:, 1:].to(out.device)
    return torch.nn.functional.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def logit_weights(model: Any, hook: str, sae: SAE, feature: int, token_ids: Tensor, step: float) -> Tensor:
    """Change of every logit per unit of activation, averaged over the tokens given [B, T] and median-shifted: [V].

    A finite difference of size `step`, so that whatever stands between hook and logits (down projection, later blocks,
    final norm) is taken as it is. For the MLP of a one-layer model this is the paper's d_i · W_down · W_unembed with
    the norm's scale averaged over tokens.
    """
    d = direction(sae, feature)
    change = (
        logits(model, hook, token_ids, lambda x: x + step * d.to(x.dtype)) - logits(model, hook, token_ids)
    ) / step
    mean = change.flatten(0, 1).mean(0)
    return (mean - mean.median()).cpu()


@torch.no_grad()
def sample(
    model: Any, hook: str, prefix: Tensor, edit: Edit | None, *, tokens: int, count: int, members: Tensor, seed: int = 0
) -> tuple[float, Tensor]:
    """Samples `count` continuations of prefix [T] at temperature 1 with the hooked output edited at every token.

    members: [V], how much of each token belongs to the category. Returns (the mean over all sampled positions of the
    probability that the model gave the category, token ids [count, tokens]). The edit acts on prefix and continuation.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = prefix.repeat(count, 1)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 10**9
    share = 0.0
    for _ in range(tokens):
        p = logits(model, hook, ids[:, -limit:], edit)[:, -1].softmax(-1).cpu()
        share += float((p @ members).mean()) / tokens
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return share, ids[:, len(prefix) :]
