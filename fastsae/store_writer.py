"""Write an activation store, shard by shard: resumable, and never half of one under a finished name.

Axes: N tokens (rows), D width.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsae.errors import FastSAEError
from fastsae.files import RUN_FILE, claim_folder, write_json
from fastsae.store import DTYPES, FORMAT, INDEX, VERSION, ActivationStore, StoreDtype, shard_name, sums

_SHARD_BYTES = 2**27  # enough contexts to shuffle well, small enough that two of them fit in any memory
_ROW_EXTRA_BYTES = 12  # token id, document, position


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
        claim_folder(self.path, "store", self._header, resume)
        if (self.path / INDEX).exists():
            raise FastSAEError(f"{self.path} already holds the finished store: open it, or choose another folder")
        for leftover in self.path.glob("*.tmp"):
            leftover.unlink()
        n = 0
        while (self.path / shard_name(n)).exists():
            n += 1
        # Only a run that ended, and then failed to write its index, leaves a short last shard: it is redone.
        if n and _shard_row_count(self.path / shard_name(n - 1)) != self._header["shard_rows"]:
            n -= 1
        return n

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
        total, squares, norms = sums(x)
        tensors = {
            "activations": x,
            "token_ids": ids[:, 0].contiguous(),
            "documents": ids[:, 1].contiguous(),
            "positions": ids[:, 2].contiguous(),
            "sum": total,
            "sum_squares": squares,
            "sum_norms": norms,
        }
        target = self.path / shard_name(self._n_shards)
        temporary = target.with_suffix(".tmp")
        try:
            save_file(tensors, temporary)
            _sync(temporary)
            os.replace(temporary, target)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            raise FastSAEError(
                f"could not write {target}: {error}; free some space and resume, or choose another folder"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
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
        write_json(self.path / INDEX, index)
        return ActivationStore(self.path)

    def abandon(self) -> None:
        """Give up after an error: finished shards stay for a resume; with none, the folder is free for another run."""
        if not self._n_shards:
            (self.path / RUN_FILE).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


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


def finished_store(
    path: Path, width: int, dtype: StoreDtype, meta: dict[str, Any] | None, seed: int, shard_rows: int | None
) -> ActivationStore | None:
    """The finished store in `path`, if there is one; FastSAEError if its writer was given other arguments."""
    if not (path / INDEX).exists():
        return None
    claim_folder(path, "store", _header(width, dtype, meta, seed, shard_rows), resume=True)
    return ActivationStore(path)


def _header(width: int, dtype: str, meta: dict[str, Any] | None, seed: int, shard_rows: int | None) -> dict[str, Any]:
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


def _collect(path: Path, n_shards: int) -> dict[str, Any]:
    """The index's part that depends on the shards."""
    shards, count = [], 0
    total, squares, norms = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for number in range(n_shards):
        file = path / shard_name(number)
        rows = _shard_row_count(file)
        with safe_open(file, framework="pt") as opened:
            total = total + opened.get_tensor("sum")
            squares = squares + opened.get_tensor("sum_squares")
            norms = norms + opened.get_tensor("sum_norms")
        shards.append({"file": file.name, "rows": rows, "bytes": file.stat().st_size})
        count += rows
    mean = total / count
    return {
        "count": count,
        "mean_norm": float(norms) / count,
        "mean": mean.float().tolist(),
        "variance": (squares / count - mean.square()).clamp_min(0).float().tolist(),
        "shards": shards,
    }


def _shard_row_count(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return opened.get_slice("token_ids").get_shape()[0]


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
