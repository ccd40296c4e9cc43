"""ΔNLL per token of many ablations, batched: what a feature card shows under each of its windows.

Axes: R pairs of context and feature, B contexts in a forward pass, T tokens, D width of the hooked output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.effects import ordinary, token_losses
from fastsae.analysis.stream import check_features, encoded, evaluating
from fastsae.codes import SparseCode
from fastsae.errors import FastSAEError
from fastsae.hooks import activations
from fastsae.sae import SAE


@torch.no_grad()
def ablation(
    sae: SAE,
    model: Any,
    hook: str,
    contexts: Sequence[Tensor | np.ndarray],
    features: Sequence[int],
    *,
    batch_size: int = 16,
    special: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Change of each token's NLL, nats, when a feature is set to 0 over its whole context: x − f d.

    special: ids of the tokens at which nothing is edited and whose own loss is not counted, their entries being 0:
    as `effects` has them, () for none.

    contexts: R arrays of token ids [T_r], from their begin-of-text token on: what a token's loss is depends on all that
    stands before it. features: R. The result has R arrays [T_r]; the first token has no prediction and 0. Contexts that
    occur with several features are run unedited once, pairs whose feature is silent there are not run again.
    batch_size: contexts in a forward pass.
    Raises FastSAEError when the lengths disagree, or for a feature that the dictionary does not have.
    """
    if len(contexts) != len(features):
        raise FastSAEError(f"each context needs its feature, got {len(contexts)} contexts and {len(features)} features")
    check_features(features, sae.cfg.d_sae)
    pairs: dict[tuple[int, ...], list[int]] = {}
    for r, ids in enumerate(contexts):
        pairs.setdefault(tuple(torch.as_tensor(ids).tolist()), []).append(r)
    result = [np.zeros(len(ids), dtype=np.float32) for ids in contexts]
    texts = sorted((text for text in pairs if len(text) > 1), key=len)  # alike in length: little padding
    with evaluating(sae, model):
        for begin in range(0, len(texts), batch_size):
            group = texts[begin : begin + batch_size]
            members = [(row, r) for row, text in enumerate(group) for r in pairs[text]]
            _ablate(sae, model, hook, group, members, features, batch_size, special, result)
    return result


def _ablate(
    sae: SAE,
    model: Any,
    hook: str,
    texts: list[tuple[int, ...]],
    members: list[tuple[int, int]],
    features: Sequence[int],
    batch_size: int,
    special: Sequence[int] | None,
    result: list[np.ndarray],
) -> None:
    """members: (row of texts, number of the pair). Writes into result."""
    # Right padding: in a causal model no token sees what comes after it.
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    x = activations(model, hook, ids)
    code = encoded(sae, x, hook)
    raw = token_losses(model, hook, ids)
    keep = ordinary(model, ids, special)
    run: list[tuple[int, int, Tensor]] = []
    for row, r in members:
        f = values_in(code, features[r], row, len(texts[row])) * keep[row, : len(texts[row])].to(x.device)
        if bool((f != 0).any()):
            run.append((row, r, f))
    for begin in range(0, len(run), batch_size):
        part = run[begin : begin + batch_size]
        rows = torch.tensor([row for row, _, _ in part])
        edited = x[rows.to(x.device)].clone()
        for i, (_, r, f) in enumerate(part):
            d = sae.W_dec[features[r]] / sae.input_scale
            edited[i, : len(f)] -= (f[:, None] * d).to(edited.dtype)
        without = token_losses(model, hook, ids[rows], lambda _, edited=edited: edited, ())
        change = ((without - raw[rows]) * keep[rows, 1:]).numpy()
        for i, (row, r, _) in enumerate(part):
            result[r][1:] = change[i, : len(texts[row]) - 1]


def values_in(code: SparseCode, feature: int, row: int, length: int) -> Tensor:
    """The feature's activations at the first `length` tokens of one context of a code [B, T]: [length]."""
    assert code.batch_shape is not None
    T = code.batch_shape[-1]
    span = slice(row * T, row * T + length)
    on = (code.indices[span] == feature) & code.valid()[span]
    return torch.where(on, code.values[span], torch.zeros_like(code.values[span])).sum(1)
