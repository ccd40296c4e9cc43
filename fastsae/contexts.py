"""Documents → token contexts for a causal LM, each token with its document and its place in it.

Used by harvesting and evaluation alike, so that both run the model on text in the same form.
Axes: B contexts, T tokens in a context (its begin-of-text token included).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.errors import FastSAEError

Packing = Literal["concat", "cut"]

_SHUFFLE_TOKENS = 2**24  # contexts held for shuffling: 200 MB with their bookkeeping; smaller corpora shuffle fully
_TOKENIZE_AT_ONCE = 64  # documents


class ContextBatch(NamedTuple):
    """token_ids, documents, positions: [B, T] int64; keep: [B, T] bool, False at special tokens and padding.

    documents: number of the document in the order it was given. positions: number of the token inside the document.
    """

    token_ids: Tensor
    documents: Tensor
    positions: Tensor
    keep: Tensor


_Context = tuple[np.ndarray, np.ndarray, np.ndarray]  # token ids, documents, positions: [T] each, without BOS


def context_batches(
    tokenizer: Any,
    documents: Iterable[Any],
    context: int,
    batch_size: int,
    packing: Packing = "concat",
    bos: bool = True,
    seed: int | None = None,
    wanted: int | None = None,
) -> Iterator[ContextBatch]:
    """Batches of at most `batch_size` contexts, right-padded where needed; a function of the arguments alone.

    documents: strings, or objects with a `text`. packing: "concat" joins documents, an end-of-text token between them,
    and cuts the stream into full contexts (a rest shorter than one is padded); "cut" starts every document in a
    context of its own. bos: begin every context with the tokenizer's begin-of-text token if it has one. seed: shuffle
    documents (when they are a sequence) and contexts (over 16M tokens at a time); None keeps the order.
    wanted: contexts that will be taken, if known: shuffling then looks ahead no further than four times as many.

    Raises FastSAEError when there is no text at all.
    """
    bos_id = tokenizer.bos_token_id if bos else None
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    body = context - (bos_id is not None)
    if body < 1:
        raise FastSAEError(f"a context must hold at least one token besides the begin-of-text token, got {context}")
    tokenized = _tokenize(tokenizer, _in_order(documents, seed))
    if packing == "concat":
        separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        contexts = _concatenate(tokenized, body, separator)
    else:
        contexts = _cut(tokenized, body)
    if seed is not None:
        ahead = _SHUFFLE_TOKENS // context
        contexts = _shuffle(contexts, max(batch_size, ahead if wanted is None else min(ahead, 4 * wanted)), seed)
    some = False
    while group := list(itertools.islice(contexts, batch_size)):
        some = True
        yield _batch(group, bos_id, special, tokenizer.pad_token_id)
    if not some:
        raise FastSAEError("expected text, found none: every document is empty")


def model_limits(model: nn.Module, tokenizer: Any, context: int) -> None:
    """Raise FastSAEError when the model cannot read contexts of that length, or this tokenizer's tokens."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise FastSAEError(f"the model reads at most {longest} tokens, got a context of {context}: lower it")
    get_embeddings = getattr(model, "get_input_embeddings", None)
    entries = getattr(get_embeddings() if get_embeddings else None, "num_embeddings", None)
    if entries is not None and len(tokenizer) > entries:
        raise FastSAEError(
            f"the tokenizer has {len(tokenizer)} entries, the model embeds {entries}: give the model's own tokenizer"
        )


def documents_digest(documents: Iterable[Any]) -> str | None:
    """A fingerprint of a sequence of documents, to know them again; None for a stream, which is read only once."""
    if not isinstance(documents, Sequence):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for document in documents:
        digest.update(text_of(document).encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def tokens_digest(tokenizer: Any, documents: Iterable[Any], tokens: int | None = None) -> str:
    """A fingerprint of what the tokenizer makes of the documents, in their order and up to so many tokens that are no
    special ones, and of which those are. Costs tokenizing them."""
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    digest = hashlib.blake2b(f"{special.tolist()} {tokenizer.bos_token_id}".encode(), digest_size=8)
    kept = 0
    for number, ids in _tokenize(tokenizer, _in_order(documents, None)):
        digest.update(np.array([number, len(ids)]).tobytes() + ids.tobytes())
        kept += int((~np.isin(ids, special)).sum())
        if tokens is not None and kept >= tokens:
            break
    return digest.hexdigest()


def text_of(document: Any) -> str:
    """A document's text: itself, or its attribute. Raises FastSAEError for what has none."""
    text = document if isinstance(document, str) else getattr(document, "text", None)
    if not isinstance(text, str):
        raise FastSAEError(f"a document is a string or has a .text string, got {type(document).__name__}")
    return text


def _in_order(documents: Iterable[Any], seed: int | None) -> Iterator[tuple[int, str]]:
    if isinstance(documents, str):
        raise FastSAEError("expected a list of documents, got one string: put it into a list")
    if seed is not None and isinstance(documents, Sequence):
        for number in np.random.default_rng([seed, 0]).permutation(len(documents)).tolist():
            yield number, text_of(documents[number])
    else:
        for number, document in enumerate(documents):
            yield number, text_of(document)


def _tokenize(tokenizer: Any, documents: Iterator[tuple[int, str]]) -> Iterator[tuple[int, np.ndarray]]:
    """(document, its token ids), without special tokens; empty documents left out."""
    while group := list(itertools.islice(documents, _TOKENIZE_AT_ONCE)):
        texts = [text for _, text in group]
        # verbose=False: documents longer than the model's context are cut here, no reason to warn.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for (number, _), ids in zip(group, encoded, strict=True):
            if len(ids):
                yield number, np.asarray(ids, dtype=np.int64)


def _cut(documents: Iterator[tuple[int, np.ndarray]], body: int) -> Iterator[_Context]:
    for number, ids in documents:
        for start in range(0, len(ids), body):
            piece = ids[start : start + body]
            yield piece, np.full(len(piece), number), np.arange(start, start + len(piece))


def _concatenate(documents: Iterator[tuple[int, np.ndarray]], body: int, separator: int | None) -> Iterator[_Context]:
    pending = np.zeros((3, 0), dtype=np.int64)
    for number, ids in documents:
        if separator is not None:
            ids = np.append(ids, separator)  # counted as the document's last token, and never kept
        new = np.stack([ids, np.full(len(ids), number), np.arange(len(ids))])
        pending = np.concatenate([pending, new], axis=1)
        full = pending.shape[1] // body * body
        for start in range(0, full, body):
            yield _columns(pending[:, start : start + body])
        pending = pending[:, full:]
    if pending.shape[1]:
        yield _columns(pending)


def _columns(rows: np.ndarray) -> _Context:
    return rows[0], rows[1], rows[2]


def _shuffle(contexts: Iterator[_Context], capacity: int, seed: int) -> Iterator[_Context]:
    """A shuffle of bounded memory: a full buffer gives up a random context for every new one."""
    rng = np.random.default_rng([seed, 1])
    buffer = list(itertools.islice(contexts, capacity))
    rng.shuffle(buffer)  # type: ignore[arg-type]  # in place on a list, as documented
    for new in contexts:
        place = int(rng.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = new
    yield from buffer


def _batch(group: list[_Context], bos_id: int | None, special: np.ndarray, pad_id: int | None) -> ContextBatch:
    lead = int(bos_id is not None)
    width = lead + max(len(ids) for ids, _, _ in group)
    token_ids = np.full((len(group), width), pad_id if pad_id is not None else 0)
    documents, positions = np.zeros_like(token_ids), np.zeros_like(token_ids)
    keep = np.zeros(token_ids.shape, dtype=bool)
    for row, (ids, numbers, places) in enumerate(group):
        stop = lead + len(ids)
        token_ids[row, lead:stop], documents[row, lead:stop], positions[row, lead:stop] = ids, numbers, places
        keep[row, lead:stop] = ~np.isin(ids, special)
        if bos_id is not None:
            token_ids[row, 0], documents[row, 0] = bos_id, numbers[0]
    return ContextBatch(*(torch.from_numpy(array) for array in (token_ids, documents, positions, keep)))
