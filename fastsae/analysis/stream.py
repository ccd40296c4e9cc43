"""Tokens with their activations and sparse codes, batch by batch, from models that run now or from a store.

What every analysis reads. Memory is that of a batch. Axes: B contexts, T tokens of a context, n tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae.codes import SparseCode
from fastsae.contexts import ContextBatch, context_batches, model_limits
from fastsae.errors import FastSAEError, TooDenseError
from fastsae.hooks import activations
from fastsae.progress import progress
from fastsae.sae import SAE
from fastsae.store import ActivationStore, Batch, MemoryStore


class Source(NamedTuple):
    """A dictionary with the model and the module that it reads."""

    sae: SAE
    model: Any
    hook: str


class Read(NamedTuple):
    """n tokens of text.

    token_ids, documents, positions: [n] int64. grid: [B, T] int64, the row of every place of the contexts they come
    from, −1 where none is (special tokens, padding); context_ids: [B, T], all token ids; both None from a store, whose
    rows are not in the order of the text. xs, codes: of every source, its activations [n, D] and their code; x and
    codes stay on the device of their model. number: of the batch, counted from the start of the text or store.
    """

    token_ids: Tensor
    documents: Tensor
    positions: Tensor
    grid: Tensor | None
    context_ids: Tensor | None
    xs: tuple[Tensor, ...]
    codes: tuple[SparseCode, ...]
    number: int = 0


@torch.no_grad()
def read(
    sources: Sequence[Source],
    tokenizer: Any,
    documents: Sequence[Any],
    *,
    context: int = 128,
    batch_size: int = 32,
    max_tokens: int | None = None,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Read]:
    """The documents in their order, each from the start of a context; begin-of-text tokens, separators and padding are
    left out, as the harvest leaves them out. A model that several sources share runs once. Models and dictionaries run
    in evaluation mode, and between two Reads are as they were.

    max_tokens: of the whole text, in its order, for ranks too: what all of them read together. rank, world: only every
    world-th context, from number rank on, so that a part of the text holds a part of everything in it. start: leave out
    so many batches, for which no model runs. Batches with no token to read are left out, and counted.
    Raises FastSAEError: no text, no such module, an SAE of another width, a tokenizer of another model, activations
    that are not finite.
    """
    if not sources:
        raise FastSAEError("expected at least one dictionary with its model, got none")
    check_rank(rank, world)
    for source in sources:
        model_limits(source.model, tokenizer, context)
    left = max_tokens
    for number, whole in enumerate(context_batches(tokenizer, documents, context, batch_size * world, "cut")):
        if left is not None:
            if left <= 0:
                return
            whole = whole._replace(keep=whole.keep & (whole.keep.flatten().cumsum(0).view_as(whole.keep) <= left))
            left -= int(whole.keep.sum())
        batch = ContextBatch(*(column[rank::world] for column in whole))
        keep = batch.keep
        n = int(keep.sum())
        if number < start or not n:
            continue
        grid = torch.full(keep.shape, -1)
        grid[keep] = torch.arange(n)
        ran: dict[tuple[int, str], Tensor] = {}
        for source in sources:
            key = (id(source.model), source.hook)
            if key not in ran:
                with evaluating(source.model):
                    x = activations(source.model, source.hook, batch.token_ids)
                ran[key] = _finite(x, source.hook)[keep.to(device_of(source.model))]
        xs = tuple(ran[id(source.model), source.hook] for source in sources)
        codes = tuple(encoded(source.sae, x, source.hook) for source, x in zip(sources, xs, strict=True))
        places = (batch.token_ids[keep], batch.documents[keep], batch.positions[keep])
        yield Read(*places, grid, batch.token_ids, xs, codes, number)


@torch.no_grad()
def read_store(
    saes: Sequence[SAE],
    store: ActivationStore | MemoryStore,
    *,
    batch_size: int = 4096,
    max_tokens: int | None = None,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    wanted: Callable[[Batch], Tensor] | None = None,
) -> Iterator[Read]:
    """The rows of a store once, in random order; no model runs. Modes of dictionaries as in `read`.

    max_tokens: rows that all ranks read together, the first in that order. rank, world: only the documents whose number
    leaves that rest (of a MemoryStore, which has none: rows), so that a rank has the neighbours of its tokens too; all
    ranks read all rows and encode theirs. start: leave out so many batches. wanted: which rows of a batch to encode,
    [n] bool.
    Raises FastSAEError for an SAE of another width, and for activations that are not finite.
    """
    check_rank(rank, world)
    size = min(batch_size * world, store.count)
    limit = store.count if max_tokens is None else min(max_tokens, store.count)
    if start * size >= limit:
        return
    stream = store.batches(size, seed=seed, start_step=start, epochs=1, drop_last=False)
    for number, batch in enumerate(stream, start):
        done = number * size
        if done >= limit:
            return
        batch = Batch(*(column[: limit - done] for column in batch))
        part = batch.documents if isinstance(store, ActivationStore) else torch.arange(len(batch.x))
        keep = part % world == rank
        if wanted is not None:
            keep &= wanted(batch)
        if not keep.all():
            batch = Batch(*(column[keep] for column in batch))
        if not len(batch.x):
            continue
        x = _finite(batch.x, "the store")
        codes = tuple(encoded(sae, x.to(sae.device), "the store") for sae in saes)
        places = (batch.token_ids, batch.documents, batch.positions)
        yield Read(*places, None, None, tuple(x for _ in saes), codes, number)


def check_rank(rank: int, world: int) -> None:
    """Raises FastSAEError for a rank that is none of so many."""
    if world < 1 or not 0 <= rank < world:
        raise FastSAEError(f"expected a rank from 0 to world − 1 and a world of at least 1, got {rank} of {world}")


def watched(
    reads: Iterator[Read], title: str, documents: Sequence[Any], max_tokens: int | None, show: bool
) -> Iterator[Read]:
    """The same reads, with a bar of the tokens asked for or, without a limit, of the documents read."""
    total, unit = (len(documents), "documents") if max_tokens is None else (max_tokens, "tokens")
    with progress(title, total, unit, show=show) as meter:
        for some in reads:
            yield some
            done = int(some.documents.max()) + 1 if max_tokens is None and len(some.documents) else meter.done
            meter.advance(done - meter.done if max_tokens is None else len(some.token_ids))


def encoded(sae: SAE, x: Tensor, where: str) -> SparseCode:
    """sae.encode_sparse(x) in evaluation mode, also where a token has more than max_l0 active latents.

    where: names the activations in the error that an SAE of another width raises.
    """
    if x.shape[-1] != sae.cfg.d_in:
        raise FastSAEError(
            f"the SAE reads activations of width {sae.cfg.d_in}, {where} has {x.shape[-1]}: name the module that the "
            "SAE was trained on"
        )
    with evaluating(sae):
        try:
            return sae.encode_sparse(x)
        except TooDenseError:
            return SparseCode.from_dense(sae.encode(x))


def check_features(features: Sequence[int], d_sae: int) -> None:
    """Raises FastSAEError for a number that is none of the dictionary's features."""
    if bad := [f for f in features if not 0 <= f < d_sae]:
        raise FastSAEError(f"features must be numbers from 0 to {d_sae - 1}, got {bad[0]}")


@contextmanager
def evaluating(*modules: Any) -> Iterator[None]:
    """Modules in evaluation mode: no dropout, and no code of a token that depends on the others of its batch.

    A BatchTopK dictionary selects over the batch while it trains, and by its threshold in evaluation. Afterwards every
    part is in its own mode again, also where they differ. Not around a generator's `yield`: who stops reading early
    would be left with the mode changed.
    """
    roots = [module for module in modules if isinstance(module, nn.Module)]
    before = [(part, part.training) for root in roots for part in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def device_of(model: Any) -> torch.device:
    """The device that the model's parameters are on."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _finite(x: Tensor, hook: str) -> Tensor:
    if not torch.isfinite(x).all():
        raise FastSAEError(f"activations at {hook} must be finite, got NaN or infinity: run the model in float32")
    return x
