"""Tokens with their activations and sparse codes, batch by batch, from models that run now or from a store.

What every analysis reads. Memory is that of a batch. Axes: B contexts, T tokens of a context, n tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fastsae.store import ActivationStore, MemoryStore


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
    codes stay on the device of their model.
    """

    token_ids: Tensor
    documents: Tensor
    positions: Tensor
    grid: Tensor | None
    context_ids: Tensor | None
    xs: tuple[Tensor, ...]
    codes: tuple[SparseCode, ...]


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

    max_tokens: stop after the batch with which so many are reached. rank, world: only every world-th context, from
    number rank on, so that a part of the text holds a part of everything in it. start: leave out so many batches, for
    which no model runs.
    Raises FastSAEError: no text, no such module, an SAE of another width, a tokenizer of another model, activations
    that are not finite.
    """
    if not sources:
        raise FastSAEError("expected at least one dictionary with its model, got none")
    for source in sources:
        model_limits(source.model, tokenizer, context)
    done = 0
    for number, whole in enumerate(context_batches(tokenizer, documents, context, batch_size * world, "cut")):
        if max_tokens is not None and done >= max_tokens:
            return
        done += int(whole.keep.sum())
        batch = ContextBatch(*(column[rank::world] for column in whole))
        if number < start or not len(batch.keep):
            continue
        keep = batch.keep
        n = int(keep.sum())
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
        yield Read(*places, grid, batch.token_ids, xs, codes)


@torch.no_grad()
def read_store(
    saes: Sequence[SAE],
    store: ActivationStore | MemoryStore,
    *,
    batch_size: int = 4096,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Iterator[Read]:
    """The rows of a store once, in random order; no model runs. Modes of dictionaries as in `read`.

    Raises FastSAEError for an SAE of another width.
    """
    done = 0
    for batch in store.batches(min(batch_size, store.count), seed=seed, epochs=1, drop_last=False):
        x = batch.x
        codes = tuple(encoded(sae, x.to(sae.device), "the store") for sae in saes)
        yield Read(batch.token_ids, batch.documents, batch.positions, None, None, tuple(x for _ in saes), codes)
        done += len(x)
        if max_tokens is not None and done >= max_tokens:
            return


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
