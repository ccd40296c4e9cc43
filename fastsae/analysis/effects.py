"""Edits of a feature, and what they do to the model's output. On any causal LM and any hook.

For one feature at a time; all features' logit weights are in `logit_map`, many ablations in `ablation`, gradients in
`attribution`, texts in `steering`. Axes: B contexts, T tokens, D width of the hooked output, V vocabulary.

Special tokens (begin and end of text, padding) are left alone: no dictionary is harvested there, and what its features
do at a begin-of-text token, whose norm is often a hundred times that of others, means nothing. `special` names their
ids: by default those of `special_ids(model)`, better a tokenizer's all_special_ids; () leaves no token out.
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


def special_ids(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """The tokenizer's special tokens; without one those that the model's config names: begin and end of text, padding,
    separator."""
    if tokenizer is not None:
        return tuple(sorted(tokenizer.all_special_ids))
    config, found = getattr(model, "config", None), set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"):
        value = getattr(config, name, None)
        found.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return tuple(sorted(found))


def ordinary(model: Any, token_ids: Tensor, special: Sequence[int] | None = None) -> Tensor:
    """Which of token_ids are not special: bool of the same shape, on the CPU. special: as this module has it."""
    ids = torch.tensor(special_ids(model) if special is None else tuple(special), dtype=torch.int64)
    return ~torch.isin(token_ids.cpu(), ids)


def only_at(edit: Edit, keep: Tensor) -> Edit:
    """The edit at the tokens that keep [B, T] marks; others stay as they are."""
    return lambda x: torch.where(keep.to(x.device)[..., None], edit(x).to(x.dtype), x)


def set_features(sae: SAE, edits: Sequence[FeatureEdit]) -> Edit:
    """Several edits at once: x + Σ_pinned (value − f) d + Σ_added value · d, all f read from the unedited x.

    It acts on every row of x; what runs a model with it here and in `steering` leaves special tokens out (`only_at`).
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
    """The edit that sets one feature to a value: x + (to − f) d. `to` = 0 ablates it."""
    return set_features(sae, [FeatureEdit(feature, to)])


def set_neuron(neuron: int, to: float) -> Edit:
    """The edit that sets one coordinate of the hooked output."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., neuron] = to
        return x

    return edit


@torch.no_grad()
def logits(
    model: Any, hook: str, token_ids: Tensor, edit: Edit | None = None, special: Sequence[int] | None = None
) -> Tensor:
    """The model's logits [B, T, V] in float32, with the hooked output edited at all tokens but the special ones.

    V is the width of the model's head, which may be padded beyond the tokenizer's vocabulary.
    """
    with replace(model, hook, only_at(edit, ordinary(model, token_ids, special))) if edit else nullcontext():
        return model(token_ids.to(next(model.parameters()).device), use_cache=False).logits.float()


def token_losses(
    model: Any, hook: str, token_ids: Tensor, edit: Edit | None = None, special: Sequence[int] | None = None
) -> Tensor:
    """Negative log-likelihood in nats of every token given those before it, [B, T − 1]. special: not edited."""
    out = logits(model, hook, token_ids, edit, special)[:, :-1]
    targets = token_ids[:, 1:].to(out.device)
    return torch.nn.functional.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def logit_weights(
    model: Any, hook: str, sae: SAE, feature: int, token_ids: Tensor, step: float, special: Sequence[int] | None = None
) -> Tensor:
    """Change of every logit per unit of activation, averaged over the tokens given [B, T] and median-shifted: [V].
    special: neither edited nor averaged over.

    A finite difference of size `step`, so that whatever stands between hook and logits (down projection, later blocks,
    final norm) is taken as it is. For the MLP of a one-layer model this is the paper's d_i · W_down · W_unembed with
    the norm's scale averaged over tokens.
    """
    d = direction(sae, feature)
    edited = logits(model, hook, token_ids, lambda x: x + step * d.to(x.dtype), special)
    keep = ordinary(model, token_ids, special).to(edited.device)
    mean = ((edited - logits(model, hook, token_ids))[keep] / step).mean(0)
    return (mean - mean.median()).cpu()


@torch.no_grad()
def sample(
    model: Any,
    hook: str,
    prefix: Tensor,
    edit: Edit | None,
    *,
    tokens: int,
    count: int,
    members: Tensor,
    seed: int = 0,
    special: Sequence[int] | None = None,
) -> tuple[float, Tensor]:
    """Samples `count` continuations of prefix [T] at temperature 1 with the hooked output edited.

    members: [V], how much of each token of the tokenizer belongs to the category; what the model's head has beyond it
    is never written, and has no probability. Returns (the mean over all sampled positions of the probability that the
    model gave the category, token ids [count, tokens]). The edit acts on prefix and continuation, special tokens of
    either left out: where the prefix is a begin-of-text token alone, it acts from the first token written.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = prefix.repeat(count, 1)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 10**9
    share = 0.0
    for _ in range(tokens):
        p = logits(model, hook, ids[:, -limit:], edit, special)[:, -1, : len(members)].softmax(-1).cpu()
        share += float((p @ members[: p.shape[1]]).mean()) / tokens
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return share, ids[:, len(prefix) :]
