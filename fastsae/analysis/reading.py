"""Text read into sums by one process or by one of several, which goes on where it was stopped, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastsae.analysis.checkpoint import Arrays, Checkpoint, dictionary_digest, model_digest
from fastsae.analysis.parts import Piece
from fastsae.analysis.passes import Watcher
from fastsae.analysis.stream import Read, Source, check_rank, read
from fastsae.contexts import documents_digest, tokens_digest
from fastsae.interrupt import uninterrupted
from fastsae.progress import progress


class Sums(Watcher, Protocol):
    """What text is read into: as `parts.Parted`, it is told of what it is and which part of it."""

    of: dict[str, Any]
    parts: list[Piece]


class _Place:
    """How far the text is read. tokens, documents: read so far; whole: to its end."""

    def __init__(self) -> None:
        self.tokens = self.documents = 0
        self.whole = False

    def add(self, some: Read) -> None:
        self.tokens += len(some.token_ids)
        self.documents = max([self.documents, *(some.documents[-1:] + 1).tolist()])

    def arrays(self) -> Arrays:
        return {"place": np.array([self.tokens, self.documents, int(self.whole)])}

    def load(self, arrays: Arrays) -> None:
        self.tokens, self.documents, whole = arrays["place"].tolist()
        self.whole = bool(whole)


def pass_file(out: str | Path, title: str, rank: int = 0, world: int = 1) -> Path:
    """Where a pass keeps its state: of one process out/match.pass.npz, of several out/match.pass-0-of-4.npz."""
    return Path(out) / (f"{title}.pass.npz" if world == 1 else f"{title}.pass-{rank}-of-{world}.npz")


def read_into(
    sums: Sums,
    sources: Sequence[Source],
    tokenizer: Any,
    documents: Sequence[Any],
    config: Any,
    title: str,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    rank: int = 0,
    world: int = 1,
    show_progress: bool = True,
) -> None:
    """Reads the documents, or every world-th context from number `rank` on, and adds every Read to the sums.

    config: a dataclass with tokens, context and batch_size. out: a folder; pass_file(out, title, rank, world) is
    written there once a minute, on Ctrl-C and at the end. It stays until whoever has written what is made of the sums
    removes it. resume: begin with what such a file holds, which then costs no model a pass.

    Raises FastSAEError: what `read` raises; a rank that is not of the world; a file of another pass, a damaged one, or
    one that is there without resume.
    """
    check_rank(rank, world)
    place, batches = _Place(), 0
    parts = {"sums": sums, "place": place}
    sums.of = {
        "documents": documents_digest(documents), "text": tokens_digest(tokenizer, documents, config.tokens),
        "dictionaries": [dictionary_digest(source.sae) for source in sources],
        "models": [model_digest(source.model) for source in sources], "hooks": [source.hook for source in sources],
    }  # fmt: skip
    sums.parts = [(rank, world, 0, len(documents))]
    checkpoint = None
    if out is not None:
        about = sums.of | {"pass": title, "config": asdict(config), "rank": rank, "world": world}
        checkpoint = Checkpoint(pass_file(out, title, rank, world), about)
        batches = checkpoint.resume(parts, resume)
    if place.whole:
        return
    stream = read(
        sources, tokenizer, documents, context=config.context, batch_size=config.batch_size,
        max_tokens=config.tokens, start=batches, rank=rank, world=world,
    )  # fmt: skip
    by_tokens = config.tokens is not None
    total, unit = (max(config.tokens // world, 1), "tokens") if by_tokens else (len(documents), "documents")
    done = place.tokens if by_tokens else place.documents
    with progress(f"{title}, going on" if batches else title, total, unit, done, show_progress) as meter:
        try:
            for some in stream:
                with uninterrupted():
                    sums.add(some)
                    place.add(some)
                    batches = some.number + 1
                meter.advance((place.tokens if by_tokens else place.documents) - meter.done)
                if checkpoint is not None:
                    checkpoint.save_if_due(parts, batches)
        except KeyboardInterrupt:
            if checkpoint is not None and batches:
                checkpoint.save(parts, batches)
            raise
    place.whole = True
    if checkpoint is not None:
        checkpoint.save(parts, batches)
