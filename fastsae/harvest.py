"""Run a language model over text and keep the activations at one module, in a store.

Axes: B contexts, T tokens in a context, N rows kept, D width of the module's output.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.contexts import ContextBatch, Packing, context_batches, documents_digest, model_limits
from fastsae.errors import FastSAEError
from fastsae.hooks import activations
from fastsae.progress import Meter, progress
from fastsae.store import ActivationStore, StoreDtype
from fastsae.store_writer import StoreWriter, check_space, finished_store


@dataclass(frozen=True)
class HarvestConfig:
    """What to keep of the activations. Raises FastSAEError for values that cannot be meant."""

    tokens: int | None = None
    """Activations to store; harvesting ends there, or at the end of the text. Default: all of the text."""
    tokens_per_context: int | None = None
    """Tokens drawn at random from each context (the paper: 250); default: every token."""
    context: int = 128
    """Tokens in a context, the begin-of-text token included. Use the length the model was trained with."""
    packing: Packing = "concat"
    """concat: join documents and cut the stream into full contexts; cut: each document in contexts of its own."""
    bos: bool = True
    """Begin each context with the tokenizer's begin-of-text token if it has one (it is never stored)."""
    skip_first: int = 0
    """Leave out this many tokens at the start of each context: attention sinks of models that know no such token."""
    dtype: StoreDtype = "float32"
    """How activations are stored. bfloat16 halves the disk; float16 refuses values above 65504."""
    batch_size: int = 32
    """Contexts in a forward pass."""
    seed: int = 0
    """Seeds the order of contexts, the tokens drawn from them, and the shuffle of rows."""
    shard_rows: int | None = None
    """Rows in a shard, which are shuffled among themselves when written; default: 128 MiB of them."""

    def __post_init__(self) -> None:
        for name in ("tokens", "tokens_per_context", "context", "batch_size", "shard_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FastSAEError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.skip_first < self.context:
            raise FastSAEError(f"skip_first must be in [0, context = {self.context}), got {self.skip_first}")


def harvest(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Any],
    hook: str,
    out: str | Path,
    config: HarvestConfig | None = None,
    *,
    resume: bool = False,
    show_progress: bool = True,
    **options: Any,
) -> ActivationStore:
    """Store the output of the module at `hook` for the tokens of `documents`.

    model: a Hugging Face causal LM, any module that maps token ids [B, T], or the folder or hub name of a model.
    tokenizer: a Hugging Face tokenizer; None takes the one saved with the model's folder or name. documents: strings
    or objects with a `text`; a list is shuffled, a stream (for a corpus larger than memory) is read in its order.
    hook: module path, e.g. "transformer.h.0.mlp.act"; SAELens' hook names work where a module puts that tensor out.
    out: new folder. config, or its fields as options: see HarvestConfig. resume: go on where an interrupted run with
    the same arguments stopped (the result is byte for byte that of an undisturbed one), or take the finished store.

    The forward pass ends at the hooked module. Begin- and end-of-text tokens and padding are never stored.
    Raises FastSAEError: no text, no such module, an output that is not [B, T, D], NaN or infinite activations, values
    too large for float16, a context longer than the model reads, a used folder, too little disk.
    """
    config = replace(config or HarvestConfig(), **check_options(HarvestConfig, options))
    model, tokenizer, name = load_model(model, tokenizer)
    model_limits(model, tokenizer, config.context)
    out = Path(out)
    meta = {
        "model": name,
        "hook": hook,
        "documents": documents_digest(documents),
        **{key: value for key, value in asdict(config).items() if key not in ("dtype", "seed", "shard_rows")},
    }
    was_training = model.training
    model.eval()
    try:
        width = activations(model, hook, torch.zeros(1, 2, dtype=torch.long)).shape[-1]
        settings = (width, config.dtype, meta, config.seed, config.shard_rows)
        if resume and (store := finished_store(out, *settings)) is not None:
            return store
        with StoreWriter(out, *settings, resume=resume) as writer:
            if config.tokens is not None:
                check_space(out, config.tokens - writer.rows_written, width, config.dtype)
            batches = _batches(tokenizer, documents, config)
            with progress("harvest", config.tokens, "tokens", writer.rows_written, show_progress) as meter:
                _run(model, hook, config, batches, writer, meter)
    finally:
        model.train(was_training)
    return ActivationStore(out)


def _batches(tokenizer: Any, documents: Iterable[Any], config: HarvestConfig) -> Iterator[ContextBatch]:
    wanted = None
    if config.tokens is not None:
        wanted = math.ceil(config.tokens / min(config.tokens_per_context or config.context, config.context))
    return context_batches(
        tokenizer, documents, config.context, config.batch_size, config.packing, config.bos, config.seed, wanted
    )


def load_model(model: Any, tokenizer: Any) -> tuple[nn.Module, Any, str]:
    """(model, tokenizer, the model's name) from objects, or from the folder or hub name of a Hugging Face causal LM."""
    if isinstance(model, str | Path):
        from fastsae import lm

        name = str(model)
        model, own = lm.load(model)
        return model, own if tokenizer is None else tokenizer, name
    if tokenizer is None:
        raise FastSAEError("expected a tokenizer beside the model object, got None: pass the model's tokenizer")
    return model, tokenizer, getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def check_options(config: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if all of them are fields of the config dataclass; else FastSAEError with near names."""
    names = [field.name for field in fields(config)]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1) or names
            raise FastSAEError(f"{config.__name__} has no option {name!r}: did you mean {' or '.join(near)}?")
    return options


def _run(
    model: nn.Module,
    hook: str,
    config: HarvestConfig,
    batches: Iterable[ContextBatch],
    writer: StoreWriter,
    meter: Meter,
) -> None:
    rows = 0  # kept by the batches so far: known from the text alone, so a resumed run need not ask the model
    for number, batch in enumerate(batches):
        keep = _choose(batch.keep, config, number)  # [n] places in the flattened [B, T]
        if config.tokens is not None:
            keep = keep[: config.tokens - rows]
        stored = max(writer.rows_written - rows, 0)  # by an interrupted run
        rows += len(keep)
        if stored < len(keep):
            # The whole batch runs again, also for its last row: a sum may depend on what else is in the batch.
            x = activations(model, hook, batch.token_ids)
            new = keep[stored:]
            columns = (batch.token_ids, batch.documents, batch.positions)
            writer.add(x.flatten(0, 1)[new.to(x.device)], *(column.flatten()[new] for column in columns))
            meter.advance(len(new))
        if rows == config.tokens:
            return


def _choose(keep: Tensor, config: HarvestConfig, number: int) -> Tensor:
    """The flat places of the tokens to store from keep [B, T], in order; `number` of the batch seeds the draw."""
    keep = keep.clone()
    keep[:, : config.skip_first] = False
    n = config.tokens_per_context
    if n is not None and n < keep.shape[1]:
        draw = np.random.default_rng([config.seed, 2, number]).random(tuple(keep.shape))
        draw[~keep.numpy()] = np.inf
        largest = np.partition(draw, n - 1, axis=1)[:, n - 1 : n]  # [B, 1], the n-th smallest of each context
        keep &= torch.from_numpy(draw <= largest)
    return keep.flatten().nonzero().squeeze(1)
