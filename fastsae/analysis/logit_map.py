"""Logit weights of all features at once, through the model's own final norm and unembedding.

Axes: F features, D width of the hooked output, M width of the stream before the unembedding, V vocabulary, B contexts,
T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.analysis.stream import evaluating
from fastsae.errors import FastSAEError
from fastsae.hooks import replace
from fastsae.sae import SAE


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The tokens that each feature makes likelier and unlikelier.

    top, bottom: [F, k] token ids, strongest first. top_values, bottom_values: [F, k], change of the logit per unit of
    activation, median-shifted. spread: [F], standard deviation over the vocabulary.
    """

    top: np.ndarray
    top_values: np.ndarray
    bottom: np.ndarray
    bottom_values: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True, eq=False)
class LogitMap:
    """logits ≈ constant + W_U · matrix · (what is added to the hooked output): matrix [M, D] float32, W_U [V, M]."""

    matrix: Tensor
    unembedding: Tensor

    @torch.no_grad()
    def weights(self, directions: Tensor) -> Tensor:
        """Of directions [C, D]: [C, V] float32, each row shifted to a median of 0."""
        stream = directions.to(self.matrix) @ self.matrix.T
        weights = (stream.to(self.unembedding.dtype) @ self.unembedding.T).float()
        return weights - weights.median(dim=1, keepdim=True).values

    @torch.no_grad()
    def of_features(self, sae: SAE, features: Tensor | slice) -> Tensor:
        """Of these features, per unit of activation: [C, V]."""
        return self.weights(sae.W_dec[features].detach() / sae.input_scale)

    def top(self, sae: SAE, k: int = 10, *, entries: int | None = None, chunk: int = 64) -> TopLogits:
        """Of every feature, `chunk` features at a time, so that memory is chunk · V.

        entries: of the vocabulary, where the unembedding is padded beyond the tokenizer's.
        """
        parts: list[tuple[Tensor, ...]] = []
        for begin in range(0, sae.cfg.d_sae, chunk):
            weights = self.of_features(sae, slice(begin, begin + chunk))[:, :entries]
            high, low = (weights.topk(min(k, weights.shape[1]), largest=largest) for largest in (True, False))
            parts.append((high.indices, high.values, low.indices, low.values, weights.std(1)))
        return TopLogits(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def logit_map(model: Any, hook: str, token_ids: Tensor, keep: Tensor | None = None) -> LogitMap:
    """The map of a model at a hook, averaged over the tokens of a few contexts [B, T].

    matrix = mean over tokens t of ∂h_t / ∂(x moved alike at every token), h being what the unembedding reads, behind
    the final norm: the exact derivative there, so the norm's mean removal and scale are each token's own. For the MLP
    of a one-layer model, (mean over t of the norm's Jacobian) · W_down, the paper's d_i · W_down · norm · W_unembed.
    A constant scale or soft cap that a model puts on its logits afterwards is left out.

    keep: [B, T] bool, the tokens to average over: leave out begin-of-text tokens and padding. One forward pass, and M
    backward passes from the final norm to the hook: its cost does not grow with F.
    Raises FastSAEError: a model without an unembedding, or a hook that does not lead to it.
    """
    head = unembedding(model)
    device = head.weight.device
    leaf: list[Tensor] = []

    def cut(x: Tensor) -> Tensor:
        leaf.append(x.detach().requires_grad_())
        return leaf[-1]

    with evaluating(model), torch.enable_grad(), replace(model, hook, cut), _input_of(head) as inputs:
        model(token_ids.to(device), use_cache=False)
        if not leaf or not inputs:
            raise FastSAEError(f"the model's forward pass does not run {hook} and its unembedding: hook another module")
        h = inputs[0].float()
        kept = h.flatten(0, 1) if keep is None else h[keep.to(device)]
        if not len(kept):
            raise FastSAEError("expected at least one token to average logit weights over, got none")
        mean = kept.mean(0)  # [M]
        matrix = torch.empty(len(mean), leaf[0].shape[-1], device=device)
        for m in range(len(mean)):
            last = m + 1 == len(mean)
            gradient = torch.autograd.grad(mean[m], leaf[0], retain_graph=not last, allow_unused=True)[0]
            if gradient is None:
                raise FastSAEError(f"the unembedding does not read {hook}: hook a module that stands before it")
            matrix[m] = gradient.float().sum((0, 1))
    return LogitMap(matrix, head.weight.detach())


def unembedding(model: Any) -> nn.Linear:
    """The model's output embedding. Raises FastSAEError when it has none, as a model that is no language model."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise FastSAEError(f"logit weights need a causal LM with an unembedding, {type(model).__name__} has none")
    assert head is not None
    return head


class ContextSample:
    """`count` contexts drawn evenly from a stream of contexts, cut to `length` tokens: those of the lowest hashes.

    What `logit_map` averages over where there is a stream: the tokens give the final norm's scale, no more, so a few
    short contexts do. Contexts without a token to keep are left out. The hash is of the seed and the context's tokens,
    so the same contexts are drawn for every cut of the text into batches, ranks and sessions.
    """

    def __init__(self, count: int, seed: int, length: int = 32) -> None:
        self.count, self.length, self.seed = count, length, seed
        self._kept: list[tuple[bytes, Tensor, Tensor]] = []  # (hash, token ids, which to keep), by the hash

    def add(self, context_ids: Tensor, grid: Tensor) -> None:
        """context_ids, grid: [B, T], as in a Read."""
        for ids, rows in zip(context_ids[:, : self.length], grid[:, : self.length], strict=True):
            real = (rows >= 0).nonzero().flatten()
            if len(real):
                end = int(real[-1]) + 1  # what stands behind is padding, as wide as the batch has it
                key = hashlib.blake2b(ids[:end].cpu().numpy().tobytes(), digest_size=16, salt=self._salt())
                self._kept.append((key.digest(), ids[:end], rows[:end] >= 0))
        self._thin()

    def _salt(self) -> bytes:
        return (self.seed % 2**64).to_bytes(8, "little")

    def _thin(self) -> None:
        self._kept = sorted(self._kept, key=lambda one: one[0])[: self.count]

    def merge(self, other: ContextSample) -> None:
        """Takes in a sample of other contexts, drawn by the same seed."""
        self._kept += other._kept
        self._thin()

    def contexts(self) -> tuple[Tensor, Tensor]:
        """(token ids [C, T], mask [C, T]); right padding is harmless in a causal model, and masked."""
        width = max((len(ids) for _, ids, _ in self._kept), default=0)
        ids, mask = torch.zeros(2, len(self._kept), width, dtype=torch.int64)
        for row, (_, some, real) in enumerate(self._kept):
            ids[row, : len(some)], mask[row, : len(some)] = some, real.long()
        return ids, mask.bool()

    def arrays(self) -> dict[str, np.ndarray]:
        """hash: [C, 16]; ids, mask: as `contexts`; length: [C], tokens of each."""
        ids, mask = self.contexts()
        return {
            "hash": np.frombuffer(b"".join(key for key, _, _ in self._kept), np.uint8).reshape(-1, 16),
            "ids": ids.numpy(), "mask": mask.numpy(), "length": np.array([len(some) for _, some, _ in self._kept], int),
        }  # fmt: skip

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """What `arrays` gave."""
        columns = zip(*(arrays[name] for name in ("hash", "ids", "mask", "length")), strict=True)
        self._kept = [
            (key.tobytes(), torch.from_numpy(ids[:n].copy()), torch.from_numpy(mask[:n].copy()))
            for key, ids, mask, n in columns
        ]


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
