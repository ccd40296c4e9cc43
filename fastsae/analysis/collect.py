"""One pass of a model over text: every feature's activations as a sparse code, and the neurons' statistics.

Axes: n tokens, F features, D neurons (the coordinates of the hooked module's output), P proxies. Memory is
O(n · L0 + (F + D) · P), never [n, F].
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.labels import Spelling, TokenBytes
from fastsae.analysis.proxies import DEFAULT, Proxy, proxies, score_all
from fastsae.codes import SparseCode
from fastsae.contexts import context_batches, model_limits
from fastsae.errors import FastSAEError, TooDenseError
from fastsae.hooks import activations
from fastsae.progress import progress
from fastsae.sae import SAE


@dataclass
class Sparse:
    """Activations of F features on n tokens, by feature: those of f are at offsets[f] … offsets[f + 1]."""

    offsets: Tensor  # [F + 1] int64
    tokens: Tensor  # [nnz] int32, ascending within a feature
    values: Tensor  # [nnz] float32

    def of(self, feature: int) -> tuple[Tensor, Tensor]:
        """(tokens, values) where the feature is active."""
        span = slice(int(self.offsets[feature]), int(self.offsets[feature + 1]))
        return self.tokens[span].long(), self.values[span]

    def sums(self, weights: Tensor | None = None) -> Tensor:
        """Σ over tokens of value · weights[token], [F] or [F, P] in float64, for weights [n] or [n, P]."""
        features = torch.repeat_interleave(torch.arange(len(self.offsets) - 1), self.offsets.diff())
        total = torch.zeros(
            (len(self.offsets) - 1, *([] if weights is None else weights.shape[1:])), dtype=torch.float64
        )
        for rows in torch.arange(len(self.values)).split(2**20):
            add = self.values[rows].double()
            if weights is not None:
                picked = weights[self.tokens[rows].long()].double()
                add = add * picked if picked.ndim == 1 else add[:, None] * picked
            total.index_add_(0, features[rows], add)
        return total

    def restricted(self, keep: Tensor) -> "Sparse":
        """The same with every token outside `keep` [n] bool left out (its number stays)."""
        chosen = keep[self.tokens.long()]
        counts = torch.zeros(len(self.values) + 1, dtype=torch.int64)
        counts[1:] = chosen.cumsum(0)
        return Sparse(counts[self.offsets], self.tokens[chosen], self.values[chosen])


@dataclass
class Collected:
    """What the pass kept. half: [n] bool, False where features are chosen and True where they are scored; a document
    is wholly in one half. binary, clipped: [n, P], the proxies thresholded at 0 and max(score, 0)."""

    token_ids: Tensor  # [n]
    documents: Tensor  # [n]
    positions: Tensor  # [n], within the document
    half: Tensor
    codes: Sparse
    d_sae: int
    proxies: tuple[Proxy, ...]
    binary: Tensor
    clipped: Tensor
    texts: list[np.ndarray]  # token ids of every document
    pieces: list[bytes]  # bytes of the vocabulary's entries
    neuron_max: Tensor  # [D]
    neuron_pearson: Tensor  # [2, D, P]: half, neuron, proxy
    other: "Sparse | None" = None  # the other dictionary's codes on the same tokens
    other_neuron_pearson: Tensor | None = None  # [D, D']: neurons against those of the other model
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.token_ids)


def pearson(sum_xy: Tensor, sum_x: Tensor, sum_xx: Tensor, sum_y: Tensor, sum_yy: Tensor, n: float) -> Tensor:
    """Pearson's r of every row x [A] with every column y [P] from their sums, float64; 0 where one is constant."""
    cov = sum_xy / n - (sum_x / n)[:, None] * (sum_y / n)
    var = (sum_xx / n - (sum_x / n) ** 2).clamp(min=0)[:, None] * (sum_yy / n - (sum_y / n) ** 2).clamp(min=0)
    return torch.where(var > 1e-18, cov / var.clamp(min=1e-18).sqrt(), torch.zeros_like(cov))


def feature_pearson(codes: Sparse, targets: Tensor, keep: Tensor) -> Tensor:
    """Pearson's r of every feature with every column of targets [n, P], over the tokens in keep: [F, P]."""
    codes = codes.restricted(keep)
    wanted = targets[keep].double()
    squares = Sparse(codes.offsets, codes.tokens, codes.values.double() ** 2)
    return pearson(
        codes.sums(targets), codes.sums(), squares.sums(), wanted.sum(0), (wanted**2).sum(0), float(keep.sum())
    )


class _Moments:
    """Sums for Pearson's r of columns x [·, A] with columns y [·, B]."""

    def __init__(self, a: int, b: int) -> None:
        self.n, self.xy = 0, torch.zeros(a, b, dtype=torch.float64)
        self.x, self.xx = torch.zeros(2, a, dtype=torch.float64)
        self.y, self.yy = torch.zeros(2, b, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        self.n += len(x)
        self.xy += (x.T @ y).double()  # float32 within a batch: thousands of terms
        self.x += x.sum(0).double()
        self.xx += (x * x).sum(0).double()
        self.y += y.sum(0).double()
        self.yy += (y * y).sum(0).double()

    def pearson(self) -> Tensor:
        return pearson(self.xy, self.x, self.xx, self.y, self.yy, max(self.n, 1))


def scoring_half(documents: Sequence[Any]) -> list[bool]:
    """For each document whether features are scored on it (else chosen): every second one, ordered by kind and hash.

    Both halves so hold as much of every kind (an attribute `kind`, where documents have one) to a document, equal texts
    fall into the same half, and the order in which the documents come does not matter.
    """
    keys = [
        (getattr(d, "kind", ""), hashlib.sha256(("half\0" + _text(d)).encode("utf-8", "surrogatepass")).hexdigest())
        for d in documents
    ]
    rank = {key: number for number, key in enumerate(sorted(set(keys)))}
    return [rank[key] % 2 == 1 for key in keys]


@torch.no_grad()
def collect(
    sae: SAE,
    model: Any,
    tokenizer: Any,
    documents: Sequence[Any],
    hook: str,
    *,
    categories: Sequence[str | Proxy] = DEFAULT,
    other: tuple[SAE, Any] | None = None,
    context: int = 128,
    batch_size: int = 32,
    max_tokens: int | None = None,
    show_progress: bool = True,
) -> Collected:
    """Runs model and SAE over the documents once.

    categories: names of scripts, "base64", "DNA", or Proxy objects. other: (SAE, model) of another run with the same
    tokenizer, to compare with on the same tokens. max_tokens: stop after so many tokens. Begin-of-text tokens,
    separators and padding are left out, as the harvest leaves them out.
    Raises FastSAEError: no text, no such module, activations of another width than the SAE's.
    """
    model_limits(model, tokenizer, context)
    texts = [
        np.asarray(ids)
        for ids in tokenizer([_text(d) for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    ]
    total = sum(map(len, texts))
    if total == 0:
        raise FastSAEError("expected text to analyze, found none: every document is empty")
    bytes_of = TokenBytes.of(tokenizer)
    first = torch.from_numpy(np.concatenate([[0], np.cumsum([len(ids) for ids in texts])]))
    numbers = np.repeat(np.arange(len(texts)), [len(ids) for ids in texts])
    chosen = proxies(categories)
    scores = score_all(chosen, Spelling.of(np.concatenate(texts), numbers, bytes_of)).T
    scoring = torch.tensor(scoring_half(documents))
    wanted = torch.from_numpy(np.ascontiguousarray(scores))

    run = _Pass(sae, model, hook, other)
    done = 0
    limit = min(total, max_tokens or total)
    with progress("analyze", limit, "tokens", show=show_progress) as meter:
        for batch in context_batches(tokenizer, documents, context, batch_size, "cut"):
            keep = batch.keep
            where = first[batch.documents[keep]] + batch.positions[keep]
            run.add(batch.token_ids, keep, (wanted[where] > 0).float(), scoring[batch.documents[keep]])
            run.places.append(torch.stack([batch.token_ids[keep], batch.documents[keep], batch.positions[keep], where]))
            done += int(keep.sum())
            meter.advance(int(keep.sum()))
            if done >= limit:
                break
    ids, docs, positions, where = torch.cat(run.places, dim=1)
    return Collected(
        token_ids=ids,
        documents=docs,
        positions=positions,
        half=scoring[docs],
        codes=run.codes.sparse(sae.cfg.d_sae),
        d_sae=sae.cfg.d_sae,
        proxies=tuple(chosen),
        binary=wanted[where] > 0,
        clipped=wanted[where].clamp(min=0),
        texts=texts,
        pieces=[bytes_of[i] for i in range(len(bytes_of))],
        neuron_max=run.neuron_max,
        neuron_pearson=torch.stack([moments.pearson() for moments in run.by_half]),
        other=run.other_codes.sparse(other[0].cfg.d_sae) if other is not None else None,
        other_neuron_pearson=run.between.pearson() if run.between is not None else None,
    )


def sparse_code(sae: SAE, x: Tensor) -> SparseCode:
    """sae.encode_sparse(x), also where a ReLU dictionary has a token with more than max_l0 active latents."""
    try:
        return sae.encode_sparse(x)
    except TooDenseError:
        return SparseCode.from_dense(sae.encode(x))


class _Codes:
    """Codes in the order of tokens, turned over at the end."""

    def __init__(self) -> None:
        self.n, self.rows, self.features, self.values = 0, [], [], []

    def add(self, sae: SAE, x: Tensor) -> None:
        code = sparse_code(sae, x)
        on = code.valid() & (code.values > 0)
        rows, slots = on.nonzero(as_tuple=True)
        self.rows.append((rows + self.n).int().cpu())
        self.features.append(code.indices[rows, slots].int().cpu())
        self.values.append(code.values[rows, slots].float().cpu())
        self.n += len(x)

    def sparse(self, d_sae: int) -> Sparse:
        features = torch.cat(self.features)
        order = features.argsort(stable=True)
        offsets = torch.zeros(d_sae + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(features, minlength=d_sae).cumsum(0)
        return Sparse(offsets, torch.cat(self.rows)[order], torch.cat(self.values)[order])


class _Pass:
    def __init__(self, sae: SAE, model: Any, hook: str, other: tuple[SAE, Any] | None) -> None:
        self.sae, self.model, self.hook, self.other = sae, model, hook, other
        self.codes, self.other_codes = _Codes(), _Codes()
        self.places: list[Tensor] = []
        self.by_half: list[_Moments] = []
        self.between: _Moments | None = None
        self.neuron_max = torch.zeros(0)

    def add(self, token_ids: Tensor, keep: Tensor, binary: Tensor, scoring: Tensor) -> None:
        x = self._activations(self.model, token_ids, keep)  # [n, D]
        if x.shape[1] != self.sae.cfg.d_in:
            raise FastSAEError(
                f"the SAE reads activations of width {self.sae.cfg.d_in}, {self.hook} puts out {x.shape[1]}: "
                f"name the module that the SAE was trained on"
            )
        self.codes.add(self.sae, x)
        x = x.float().cpu()
        if not self.by_half:
            self.by_half = [_Moments(x.shape[1], binary.shape[1]) for _ in range(2)]
            self.neuron_max = x.amax(0)
        self.neuron_max = torch.maximum(self.neuron_max, x.amax(0))
        for half, moments in enumerate(self.by_half):
            moments.add(x[scoring == bool(half)], binary[scoring == bool(half)])
        if self.other is None:
            return
        y = self._activations(self.other[1], token_ids, keep)
        self.other_codes.add(self.other[0], y)
        y = y.float().cpu()
        self.between = self.between or _Moments(x.shape[1], y.shape[1])
        self.between.add(x, y)

    def _activations(self, model: Any, token_ids: Tensor, keep: Tensor) -> Tensor:
        x = activations(model, self.hook, token_ids)[keep]
        if not torch.isfinite(x).all():
            raise FastSAEError(
                f"activations at {self.hook} must be finite, got NaN or infinity: run the model in float32"
            )
        return x


def _text(document: Any) -> str:
    return document if isinstance(document, str) else document.text
