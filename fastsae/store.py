"""Activation shards on disk: written once, shuffled across contexts, read in random order without loading them.

A store is a folder:

    run.json                     the settings, from the start: an unfinished store is known by it
    index.json                   format, version, width, dtype, count, statistics, shards, meta; written last
    shard-00000.safetensors      activations [n, D], token_ids, documents, positions [n], and the shard's sums

Rows are shuffled twice. The writer permutes every shard's rows before it writes them (a shard holds hundreds of
contexts), and the reader permutes short blocks of rows over *all* shards, anew in every epoch. A batch therefore mixes
the whole store, while the disk still sees runs of some tens of kilobytes and memory holds one batch: shards are
memory-mapped.

Axes: N tokens (rows), D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fastsae.errors import FastSAEError
from fastsae.files import RUN_FILE

StoreDtype = Literal["float32", "bfloat16", "float16"]

FORMAT, VERSION = "fastsae-activations", 1
INDEX = "index.json"
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_BLOCK_ROWS = 32  # rows read together: their shard is shuffled, so they come from as many contexts
_MAX_BLOCKS = 2**22  # bounds the read permutation at 32 MB; larger stores read longer runs


class Batch(NamedTuple):
    """Rows of a store. x: [N, D] float32; token_ids, documents, positions: [N] int64.

    `documents` counts the documents handed to the harvest, `positions` the tokens inside the document.
    """

    x: Tensor
    token_ids: Tensor
    documents: Tensor
    positions: Tensor


class ActivationStore:
    """A finished store, opened for reading.

    width: D. count: N rows. dtype: as stored. meta: what the harvest noted. mean, variance: [D] float32. mean_norm:
    E‖x‖. seed: of the shuffle. Raises FastSAEError when the folder holds no store, an unfinished or a damaged one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self.width: int = index["width"]
        self.count: int = index["count"]
        self.dtype: torch.dtype = DTYPES[index["dtype"]]
        self.seed: int = index["seed"]
        self.meta: dict[str, Any] = index["meta"]
        self.mean = torch.tensor(index["mean"], dtype=torch.float32)
        self.variance = torch.tensor(index["variance"], dtype=torch.float32)
        self.mean_norm: float = index["mean_norm"]
        self._rows: list[int] = [shard["rows"] for shard in index["shards"]]
        self._files = [self.path / shard["file"] for shard in index["shards"]]
        self._maps: list[tuple[Tensor, Tensor, Tensor, Tensor] | None] = [None] * len(self._files)
        for file, shard in zip(self._files, index["shards"], strict=True):
            size = file.stat().st_size if file.exists() else 0
            if size != shard["bytes"]:
                raise FastSAEError(
                    f"{file} should have {shard['bytes']} bytes, has {size}: the store is damaged, harvest it again"
                )

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, {self.count} × {self.width} {self.dtype})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": [None] * len(self._files)}  # memory maps do not travel between processes

    @property
    def identity(self) -> dict[str, Any]:
        """What a training run notes to know that it resumes on the same data."""
        return {"width": self.width, "count": self.count, "seed": self.seed, "mean_norm": self.mean_norm}

    def read(self, start: int, stop: int) -> Batch:
        """Rows start … stop − 1 in the order of the disk (shuffled by the writer)."""
        if not 0 <= start <= stop <= self.count:
            raise FastSAEError(f"rows {start} to {stop} are outside the store's {self.count}")
        first = np.concatenate([[0], np.cumsum(self._rows)])
        pieces = []
        for shard in range(len(self._rows)):
            low, high = max(start, first[shard]), min(stop, first[shard + 1])
            if low < high:
                pieces.append((shard, int(low - first[shard]), int(high - first[shard])))
        return self._gather(pieces)

    def document_range(self) -> tuple[int, int]:
        """The lowest number of a document that has rows here, and the highest plus 1. Reads 4 to 8 bytes a row."""
        numbers = [self._shard(shard)[2] for shard in range(len(self._rows)) if self._rows[shard]]
        if not numbers:
            return 0, 0
        return min(int(part.min()) for part in numbers), max(int(part.max()) for part in numbers) + 1

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """min(n, count) distinct random rows: [n, D] float32."""
        return next(self.batches(min(n, self.count), seed=seed)).x

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
    ) -> Iterator[Batch]:
        """Batches of rows drawn over the whole store, in an order that depends only on `seed`.

        start_step: batches to leave out, at no cost: a resumed reader goes on exactly where it stopped. epochs: passes
        over the store, each in a new order (None: for ever). drop_last: leave out an epoch's last, smaller batch.
        """
        per_epoch = steps_per_epoch(self.count, batch_size, drop_last)
        epoch, step = divmod(start_step, per_epoch)
        while epochs is None or epoch < epochs:
            shards, starts, lengths = self._blocks(seed, epoch)
            ends = np.cumsum(lengths)
            for s in range(step, per_epoch):
                low, high = s * batch_size, min((s + 1) * batch_size, self.count)
                i, j = np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high, side="left")
                pieces = []
                for b in range(int(i), int(j) + 1):
                    begin = int(ends[b] - lengths[b])  # the block covers rows begin … ends[b] of this epoch
                    a, z = max(low - begin, 0), min(high - begin, int(lengths[b]))
                    pieces.append((int(shards[b]), int(starts[b]) + a, int(starts[b]) + z))
                yield self._gather(pieces)
            epoch, step = epoch + 1, 0

    def _blocks(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch's blocks in reading order: shard, first row, rows. Their borders move from epoch to epoch."""
        rng = np.random.default_rng([seed, epoch])
        size = max(_BLOCK_ROWS, math.ceil(self.count / _MAX_BLOCKS))
        shards, starts, lengths = [], [], []
        for shard, rows in enumerate(self._rows):
            border = np.unique(np.concatenate([[0], np.arange(rng.integers(size), rows, size), [rows]]))
            starts.append(border[:-1])
            lengths.append(np.diff(border))
            shards.append(np.full(len(border) - 1, shard))
        order = rng.permutation(sum(map(len, starts)))
        return np.concatenate(shards)[order], np.concatenate(starts)[order], np.concatenate(lengths)[order]

    def _gather(self, pieces: list[tuple[int, int, int]]) -> Batch:
        columns = []
        for column in range(4):
            parts = [self._shard(shard)[column][a:z] for shard, a, z in pieces]
            columns.append(torch.cat(parts) if parts else self._shard(0)[column][:0])
        x, token_ids, documents, positions = columns
        return Batch(x.float(), token_ids.long(), documents.long(), positions.long())

    def _shard(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mapped = self._maps[number]
        if mapped is None:
            with safe_open(self._files[number], framework="pt") as file:  # get_tensor maps, it does not read
                mapped = (
                    file.get_tensor("activations"),
                    file.get_tensor("token_ids"),
                    file.get_tensor("documents"),
                    file.get_tensor("positions"),
                )
            self._maps[number] = mapped
        return mapped


def steps_per_epoch(count: int, batch_size: int, drop_last: bool = True) -> int:
    """Batches in one pass over `count` rows; raises FastSAEError when there is not one."""
    steps = count // batch_size if drop_last else math.ceil(count / batch_size)
    if not steps:
        raise FastSAEError(
            f"a batch of {batch_size} rows needs at least as many activations, the store has {count}: "
            f"harvest more tokens or lower the batch size"
        )
    return steps


class MemoryStore:
    """A tensor of activations [N, D] with the reading side of an ActivationStore; token ids and the rest are 0."""

    def __init__(self, x: Tensor) -> None:
        if x.ndim != 2 or not x.is_floating_point():
            raise FastSAEError(f"expected activations [N, D] of a float dtype, got {list(x.shape)} {x.dtype}")
        self.x = x.detach().cpu()
        self.count, self.width, self.dtype = len(x), x.shape[1], x.dtype
        self.seed, self.meta = 0, {}
        if not self.count:
            raise FastSAEError("expected activations, got a tensor of 0 rows")
        total, squares, norms = sums(self.x)
        if not torch.isfinite(squares).all():  # told from the sums: isfinite(x) would take twice x's memory
            raise FastSAEError("activations must be finite, got NaN or infinity: drop those rows")
        self.mean = (total / self.count).float()
        self.variance = (squares / self.count - (total / self.count).square()).clamp_min(0).float()
        self.mean_norm = float(norms) / self.count

    @property
    def identity(self) -> dict[str, Any]:
        """See ActivationStore."""
        return {"width": self.width, "count": self.count, "seed": self.seed, "mean_norm": self.mean_norm}

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """See ActivationStore."""
        return next(self.batches(min(n, self.count), seed=seed)).x

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
    ) -> Iterator[Batch]:
        """See ActivationStore; each epoch is a full permutation of the rows."""
        per_epoch = steps_per_epoch(self.count, batch_size, drop_last)
        epoch, step = divmod(start_step, per_epoch)
        while epochs is None or epoch < epochs:
            order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(self.count))
            for rows in order.split(batch_size)[step:per_epoch]:
                nothing = torch.zeros(len(rows), dtype=torch.long)
                yield Batch(self.x[rows].float(), nothing, nothing, nothing)
            epoch, step = epoch + 1, 0


def sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ x [D], Σ x² [D], Σ ‖x‖ [1] of x [N, D] in float64, over chunks so that no second copy of a shard is made."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    squares, norms = torch.zeros_like(total), torch.zeros(1, dtype=torch.float64)
    for chunk in x.split(4096):
        wide = chunk.double()
        total += wide.sum(0)
        squares += wide.square_().sum(0)
        norms += wide.sum(1).sqrt_().sum()
    return total, squares, norms


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FastSAEError(f"there is no activation store at {path}: harvest one first")
    if not (path / INDEX).exists():  # written last: where it is, everything is
        kind = _kind(path / RUN_FILE)
        if kind == "store":
            raise FastSAEError(f"the store in {path} is unfinished: harvest again with the same options to resume it")
        other = f"it is what fastsae made as {kind!r}" if kind else f"no {INDEX}"
        raise FastSAEError(f"{path} holds no activation store ({other}): give the folder that a harvest wrote")
    try:
        index = json.loads((path / INDEX).read_text())
    except ValueError:
        raise FastSAEError(f"{path / INDEX} is damaged: harvest again into another folder") from None
    if index.get("format") != FORMAT or index.get("version", 0) > VERSION:
        raise FastSAEError(
            f"{path / INDEX} is {index.get('format')} version {index.get('version')}, "
            f"expected {FORMAT} up to version {VERSION}: harvest again, or update fastsae"
        )
    return index


def _kind(marker: Path) -> str | None:
    """Of the run that marked the folder; None without a mark. A damaged one stands in an unfinished store."""
    if not marker.exists():
        return None
    try:
        return str(json.loads(marker.read_text(encoding="utf-8"))["kind"])
    except (ValueError, LookupError, TypeError):
        return "store"


def shard_name(number: int) -> str:
    """File name of the shard with that number."""
    return f"shard-{number:05d}.safetensors"
