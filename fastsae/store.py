"""Activation shards on disk: written once, shuffled across contexts, read in random order without loading them.

A store is a folder:

    index.json                   format, version, width, dtype, count, statistics, shards, meta; written last
    shard-00000.safetensors      activations [n, D], token_ids, documents, positions [n], and the shard's sums

Rows are shuffled twice. The writer permutes every shard's rows before it writes them (a shard holds hundreds of
contexts), and the reader permutes short blocks of rows over *all* shards, anew in every epoch. A batch therefore mixes
the whole store, while the disk still sees runs of some tens of kilobytes and memory holds one batch: shards are
memory-mapped.

Axes: N tokens (rows), D width.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsae.errors import FastSAEError

StoreDtype = Literal["float32", "bfloat16", "float16"]

FORMAT, VERSION = "fastsae-activations", 1
INDEX, PARTIAL = "index.json", "partial.json"
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SHARD_BYTES = 2**27  # enough contexts to shuffle well, small enough that two of them fit in any memory
_BLOCK_ROWS = 32  # rows read together: their shard is shuffled, so they come from as many contexts
_MAX_BLOCKS = 2**22  # bounds the read permutation at 32 MB; larger stores read longer runs
_ROW_EXTRA_BYTES = 12  # token id, document, position


class Batch(NamedTuple):
    """Rows of a store. x: [N, D] float32; token_ids, documents, positions: [N] int64.

    `documents` counts the documents handed to the harvest, `positions` the tokens inside the document.
    """

    x: Tensor
    token_ids: Tensor
    documents: Tensor
    positions: Tensor


class StoreWriter:
    """Writes a store, shard by shard; the same rows in the same order always give the same bytes.

    path: a new or empty folder, or, with `resume`, one that an interrupted writer left. width: D. dtype: as stored;
    float16 refuses values it cannot hold. meta: JSON-able facts about the rows (model, hook, context, …). seed: of the
    shuffle. shard_rows: rows a shard (default: 128 MiB of them).

    After a resume `rows_written` rows are already on disk: the caller goes on with row number `rows_written`.
    Nothing half-written can be taken for a store: each shard appears under its name only when complete, and the index
    comes last. Raises FastSAEError for a used folder, other settings than the interrupted run's, a full disk,
    non-finite values.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        dtype: StoreDtype = "float32",
        meta: dict[str, Any] | None = None,
        seed: int = 0,
        shard_rows: int | None = None,
        resume: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise FastSAEError(f"a store's dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
        self.path, self.width, self.dtype = Path(path), width, DTYPES[dtype]
        self._header = _header(width, dtype, meta, seed, shard_rows)
        self._n_shards = self._open_folder(resume)
        rows = self._header["shard_rows"]
        self.rows_written = self._n_shards * rows
        self._fill = 0
        self._x = torch.empty(rows, width, dtype=self.dtype)  # [shard_rows, D]
        self._ids = torch.empty(rows, 3, dtype=torch.int32)  # token id, document, position

    def _open_folder(self, resume: bool) -> int:
        """Prepare the folder; the number of shards that an interrupted run left complete."""
        if (self.path / INDEX).exists():
            raise FastSAEError(f"{self.path} already holds a finished store: choose another folder, or delete it")
        partial = self.path / PARTIAL
        if partial.exists():
            if not resume:
                raise FastSAEError(f"{self.path} holds an unfinished store: resume it, or delete the folder")
            check_same_settings(self._header, json.loads(partial.read_text()), self.path)
            for leftover in self.path.glob("*.tmp"):
                leftover.unlink()
            n = 0
            while (self.path / _shard_name(n)).exists():
                n += 1
            # Only a run that ended (and then failed to write its index) leaves a short last shard: it is redone.
            if n and _shard_row_count(self.path / _shard_name(n - 1)) != self._header["shard_rows"]:
                n -= 1
            return n
        if self.path.exists() and any(self.path.iterdir()):
            raise FastSAEError(f"{self.path} holds other files, expected a new or empty folder: choose another")
        self.path.mkdir(parents=True, exist_ok=True)
        with disk_errors(self.path):
            write_atomically(partial, json.dumps(self._header, indent=1).encode())
        return 0

    def add(self, x: Tensor, token_ids: Tensor, documents: Tensor, positions: Tensor) -> None:
        """Append rows. x: [N, D] any float dtype; the others [N] integers."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise FastSAEError(f"expected activations of shape [N, {self.width}], got {list(x.shape)}")
        ids = torch.stack([token_ids, documents, positions], 1).to("cpu", torch.int32)  # [N, 3]
        x = x.detach()
        stored = x.to("cpu", self.dtype)
        if not torch.isfinite(stored).all():
            self._refuse(x, stored, ids)
        start = 0
        while start < len(stored):
            n = min(len(stored) - start, len(self._x) - self._fill)
            self._x[self._fill : self._fill + n] = stored[start : start + n]
            self._ids[self._fill : self._fill + n] = ids[start : start + n]
            self._fill += n
            start += n
            if self._fill == len(self._x):
                self._flush()

    def _refuse(self, x: Tensor, stored: Tensor, ids: Tensor) -> None:
        row = int((~torch.isfinite(stored)).any(1).nonzero()[0])
        where = f"document {int(ids[row, 1])}, token {int(ids[row, 2])}"
        if torch.isfinite(x[row]).all():
            raise FastSAEError(
                f"an activation of {float(x[row].abs().max()):.3g} ({where}) does not fit "
                f"{str(self.dtype).removeprefix('torch.')}: store bfloat16 or float32"
            )
        raise FastSAEError(
            f"activations must be finite, got NaN or infinity at {where}: "
            f"run the model in float32 or bfloat16, or hook another module"
        )

    def _flush(self) -> None:
        n = self._fill
        generator = torch.Generator().manual_seed(self._header["seed"] * 1_000_003 + self._n_shards)
        order = torch.randperm(n, generator=generator)
        x, ids = self._x[:n][order], self._ids[:n][order]
        total, squares, norms = _sums(x)
        tensors = {
            "activations": x,
            "token_ids": ids[:, 0].contiguous(),
            "documents": ids[:, 1].contiguous(),
            "positions": ids[:, 2].contiguous(),
            "sum": total,
            "sum_squares": squares,
            "sum_norms": norms,
        }
        target = self.path / _shard_name(self._n_shards)
        temporary = target.with_suffix(".tmp")
        with disk_errors(self.path, temporary):
            save_file(tensors, temporary)
            _sync(temporary)
            os.replace(temporary, target)
        self._n_shards += 1
        self.rows_written += n
        self._fill = 0

    def close(self) -> ActivationStore:
        """Write the last shard and the index; the finished store."""
        if self._fill:
            self._flush()
        if not self.rows_written:
            raise FastSAEError(f"no activations were added to {self.path}: nothing to store")
        index = self._header | _collect(self.path, self._n_shards)
        with disk_errors(self.path):
            write_atomically(self.path / INDEX, json.dumps(index, indent=1).encode())
        (self.path / PARTIAL).unlink(missing_ok=True)
        return ActivationStore(self.path)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


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


def finished_store(
    path: Path, width: int, dtype: StoreDtype, meta: dict[str, Any] | None, seed: int, shard_rows: int | None
) -> ActivationStore:
    """The store in `path`, if it is the one that a writer with these arguments would make; else FastSAEError."""
    index = _read_index(path)
    wanted = _header(width, dtype, meta, seed, shard_rows)
    check_same_settings(wanted, {key: index.get(key) for key in wanted}, path)
    return ActivationStore(path)


def _header(
    width: int, dtype: str, meta: dict[str, Any] | None, seed: int, shard_rows: int | None
) -> dict[str, Any]:
    """What a store is made of, apart from its rows; as JSON gives it back."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "width": width,
        "dtype": dtype,
        "seed": seed,
        "shard_rows": shard_rows or max(1024, _SHARD_BYTES // (width * DTYPES[dtype].itemsize)),
        "meta": json.loads(json.dumps(meta or {})),
    }


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
        if not torch.isfinite(x).all():
            raise FastSAEError("activations must be finite, got NaN or infinity: drop those rows")
        self.x = x.detach().cpu()
        self.count, self.width, self.dtype = len(x), x.shape[1], x.dtype
        self.seed, self.meta = 0, {}
        if not self.count:
            raise FastSAEError("expected activations, got a tensor of 0 rows")
        total, squares, norms = _sums(self.x)
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


def check_space(path: Path, rows: int, width: int, dtype: StoreDtype) -> None:
    """Raise FastSAEError now, not hours later, when `rows` activations do not fit on the disk that holds `path`."""
    needed = rows * (width * DTYPES[dtype].itemsize + _ROW_EXTRA_BYTES)
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FastSAEError(
            f"{rows} activations take {needed / 1e9:.2f} GB as {dtype}, {folder} has {free / 1e9:.2f} GB free: "
            f"harvest fewer tokens, store bfloat16, or choose another disk"
        )


def check_same_settings(wanted: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    """Raise FastSAEError, naming the first differing setting, when a folder belongs to another run."""
    wanted, found = _flat(wanted), _flat(found)
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise FastSAEError(
                f"{path} holds another run: its {key} is {found.get(key)!r}, this one's is {wanted.get(key)!r}: "
                f"use the same settings, choose another folder, or delete it"
            )


def write_atomically(target: Path, data: bytes) -> None:
    """Write a file that is either there completely or not at all, also after a power cut."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class disk_errors:
    """Turn a full disk into one clear line; remove what was half-written."""

    def __init__(self, path: Path, temporary: Path | None = None) -> None:
        self.path, self.temporary = path, temporary

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors reports the same as its own error, with the system's words inside.
        full |= isinstance(error, SafetensorError) and ("os error 28" in str(error) or "os error 122" in str(error))
        if full:
            raise FastSAEError(
                f"the disk that holds {self.path} is full: free some space and resume, or choose another folder"
            ) from error


def _sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ x [D], Σ x² [D], Σ ‖x‖ [1] in float64, over chunks so that no second copy of a shard is made."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    squares, norms = torch.zeros_like(total), torch.zeros(1, dtype=torch.float64)
    for chunk in x.split(4096):
        wide = chunk.double()
        total += wide.sum(0)
        squares += wide.square_().sum(0)
        norms += wide.sum(1).sqrt_().sum()
    return total, squares, norms


def _collect(path: Path, n_shards: int) -> dict[str, Any]:
    """The index's part that depends on the shards."""
    shards, count, sums = [], 0, None
    for number in range(n_shards):
        file = path / _shard_name(number)
        rows = _shard_row_count(file)
        with safe_open(file, framework="pt") as opened:
            part = [opened.get_tensor(key) for key in ("sum", "sum_squares", "sum_norms")]
        sums = [t.clone() for t in part] if sums is None else [a + b for a, b in zip(sums, part, strict=True)]
        shards.append({"file": file.name, "rows": rows, "bytes": file.stat().st_size})
        count += rows
    assert sums is not None
    mean = sums[0] / count
    variance = (sums[1] / count - mean.square()).clamp_min(0)
    return {
        "count": count,
        "mean_norm": float(sums[2]) / count,
        "mean": mean.float().tolist(),
        "variance": variance.float().tolist(),
        "shards": shards,
    }


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FastSAEError(f"there is no activation store at {path}: harvest one first")
    if not (path / INDEX).exists():  # written last: where it is, everything is
        if (path / PARTIAL).exists():
            raise FastSAEError(f"the store in {path} is unfinished: harvest again with the same options to resume it")
        raise FastSAEError(f"{path} holds no activation store (no {INDEX}): harvest one first")
    index = json.loads((path / INDEX).read_text())
    if index.get("format") != FORMAT or index.get("version", 0) > VERSION:
        raise FastSAEError(
            f"{path / INDEX} is {index.get('format')} version {index.get('version')}, "
            f"expected {FORMAT} up to version {VERSION}: harvest again, or update fastsae"
        )
    return index


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _shard_row_count(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return opened.get_slice("token_ids").get_shape()[0]


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
