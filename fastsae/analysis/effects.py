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

from fastsae.analysis.stream import check_features, device_of, encoded, evaluating
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
    check_features(features, sae.cfg.d_sae)
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


def logits(
    model: Any, hook: str, token_ids: Tensor, edit: Edit | None = None, special: Sequence[int] | None = None
) -> Tensor:
    """The logits [B, T, V] in float32 of the model in evaluation mode, with the hooked output edited at all tokens but
    the special ones.

    V is the width of the model's head, which may be padded beyond the tokenizer's vocabulary.
    """
    return _output(model, hook, token_ids, edit, special).float()


@torch.no_grad()
def token_losses(
    model: Any, hook: str, token_ids: Tensor, edit: Edit | None = None, special: Sequence[int] | None = None
) -> Tensor:
    """Negative log-likelihood in nats of every token given those before it, [B, T − 1] float32 on the CPU, the model in
    evaluation mode. special: not edited."""
    out = _output(model, hook, token_ids, edit, special)
    targets = token_ids[:, 1:].to(out.device)
    # Context by context: a float32 copy of all logits would be the largest tensor here.
    rows = [
        torch.nn.functional.cross_entropy(row[:-1].float(), target, reduction="none")
        for row, target in zip(out, targets, strict=True)
    ]
    return torch.stack(rows).cpu()


@torch.no_grad()
def _output(model: Any, hook: str, token_ids: Tensor, edit: Edit | None, special: Sequence[int] | None) -> Tensor:
    """Logits [B, T, V] in the model's own type. Dropout would be taken for an effect: at a rate of 0.1, 0.4 nats."""
    change = replace(model, hook, only_at(edit, ordinary(model, token_ids, special))) if edit else nullcontext()
    with evaluating(model), change:
        return model(token_ids.to(device_of(model)), use_cache=False).logits


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
