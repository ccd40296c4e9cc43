"""What a feature does to the model's output: logit weights, ablation, pinning. On any causal LM and any hook.

Axes: B contexts, T tokens, D width of the hooked output, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastsae.analysis.collect import sparse_code
from fastsae.hooks import replace
from fastsae.sae import SAE

Edit = Callable[[Tensor], Tensor]  # the hooked output [B, T, D] → what stands in its place


def direction(sae: SAE, feature: int) -> Tensor:
    """What one unit of the feature's activation adds to the hooked output, [D]."""
    return (sae.W_dec[feature] / sae.input_scale).detach()


def feature_values(sae: SAE, x: Tensor, feature: int) -> Tensor:
    """The feature's activation at x [B, T, D]: [B, T]."""
    code = sparse_code(sae, x)
    value = torch.where((code.indices == feature) & code.valid(), code.values, torch.zeros_like(code.values)).sum(-1)
    return value.reshape(x.shape[:-1])


def set_feature(sae: SAE, feature: int, to: float) -> Edit:
    """The edit that sets the feature to a value at every token: x + (to − f) d. `to` = 0 ablates it."""
    d = direction(sae, feature)
    return lambda x: x + ((to - feature_values(sae, x, feature))[..., None] * d).to(x.dtype)


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
