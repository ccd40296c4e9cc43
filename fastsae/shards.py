"""Tensors and a JSON object in a folder: whole or not at all, in files of bounded size, without a second copy.

    write(run / "checkpoint", {"sae.W_dec": …, "adam.W_dec.exp_avg": …}, {"step": 300})
    if exists(run / "checkpoint"):
        step = about(run / "checkpoint")["step"]
        read(run / "checkpoint", into={"sae.W_dec": …, "adam.W_dec.exp_avg": …})

The files are Hugging Face's: `state.safetensors`, or `state-00001-of-0000N.safetensors` with
`state.safetensors.index.json`; and `about.json`, whose text every tensor file carries in its metadata, so that files
of different saves are noticed. Other files in the folder are left alone.

How a save is whole: all files are written to `.state.part` in the folder and forced to the disk, `.state.part` is
renamed to `.state.ready`, and the files are moved over the old ones. That one rename decides: before it the old files
are untouched; after it whoever reads or writes next finishes the moves. So the folder may be a mount point, and
removing it leaves nothing behind. One writer at a time. There are no checksums: a flipped bit in the data is not seen.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import tensorfile
from fastsae.errors import CheckpointError
from fastsae.tensorfile import Entry

SHARD_BYTES = 5_000_000_000  # of data in one file; what Hugging Face's hub recommends


@dataclass(frozen=True)
class Layout:
    """The names of the files. stem: of the tensor files. about: of the JSON object."""

    stem: str = "state"
    about: str = "about.json"

    @property
    def single(self) -> str:
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    @property
    def patterns(self) -> list[str]:
        """Globs of every file that a save may consist of."""
        return [self.about, self.single, self.index, f"{self.stem}-*-of-*.safetensors"]

    def shard(self, i: int, n: int) -> str:
        """The i-th of n, from 0."""
        return f"{self.stem}-{i + 1:05d}-of-{n:05d}.safetensors"

    def holds_tensors(self, file: str) -> bool:
        """Whether a file is one that a save of this layout could have written, `about` aside."""
        shard = rf"{re.escape(self.stem)}-\d{{5,}}-of-\d{{5,}}\.safetensors"
        return file in (self.single, self.index) or re.fullmatch(shard, file) is not None

    def part(self, folder: Path) -> Path:
        return folder / f".{self.stem}.part"

    def ready(self, folder: Path) -> Path:
        return folder / f".{self.stem}.ready"


STATE = Layout()


def write(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    layout: Layout = STATE,
) -> Path:
    """Save tensors (any device and strides) and `about` (JSON-able), in place of what an earlier write left there.

    shard_bytes: of tensors in one file; a larger tensor has a file of its own, none is split. Beyond the tensors it
    needs tensorfile.PIECE_BYTES of memory; on the disk the old and the new save stand beside each other for a while.
    Raises CheckpointError where the folder cannot be written (the old save is still there) or the format cannot hold
    a tensor.
    """
    tensorfile.check(tensors)
    folder = Path(folder)
    text = json.dumps(about, indent=1)
    part = layout.part(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder, layout)
        if part.exists():
            shutil.rmtree(part)
        try:
            part.mkdir()
            _write_files(part, tensors, text, shard_bytes, layout)
            _sync(part)
            os.rename(part, layout.ready(folder))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        _settle(folder, layout)
        if is_new:
            _sync(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"could not write to {folder}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    return folder


def _write_files(part: Path, tensors: Mapping[str, Tensor], text: str, shard_bytes: int, layout: Layout) -> None:
    shards = _split(tensors, shard_bytes)
    files = [layout.single] if len(shards) == 1 else [layout.shard(i, len(shards)) for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        tensorfile.write(part / file, {name: tensors[name] for name in names}, {layout.about: text})
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
        _write_text(part / layout.index, json.dumps(index, indent=2, sort_keys=True))
    _write_text(part / layout.about, text)


def _split(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """The names of each file, in the order given. At least one file, that of no tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    if os.name == "nt":  # there a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that have no such thing
            raise
    finally:
        os.close(handle)


def _settle(folder: Path, layout: Layout) -> None:
    """Move the files of a decided save over the old ones, from wherever an earlier attempt stopped."""
    ready = layout.ready(folder)
    if not ready.is_dir():
        return
    _sync(folder)  # the decision itself, before anything old goes
    index = ready / layout.index
    # The index is moved last: without it what is left in `ready` is a save in one file.
    is_sharded = index.exists()
    new = {layout.index, *_weight_map(index).values()} if is_sharded else {layout.single}
    waiting = sorted(ready.iterdir(), key=lambda path: path == index)
    if waiting:
        for path in folder.iterdir():
            if layout.holds_tensors(path.name) and path.name not in new:
                path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # a reader may be doing the same
        for path in waiting:
            os.replace(path, folder / path.name)
        _sync(folder)
        ready.rmdir()


def exists(folder: str | os.PathLike[str], *, layout: Layout = STATE) -> bool:
    """Whether a save is in the folder."""
    return (Path(folder) / layout.about).is_file() or layout.ready(Path(folder)).is_dir()


def about(folder: str | os.PathLike[str], *, layout: Layout = STATE) -> dict[str, Any]:
    """The JSON object of a save. Raises CheckpointError where there is none."""
    folder = Path(folder)
    with _reading(folder):
        _settle(folder, layout)
        path = folder / layout.about
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {layout.about}; give a folder that was saved to, or save again")
        return _read_json(path)


def entries(folder: str | os.PathLike[str], *, layout: Layout = STATE) -> dict[str, Entry]:
    """Name → dtype, shape and place of all tensors of a save, without their data.

    Raises CheckpointError for a file that is missing, not whole, or of another save.
    """
    folder = Path(folder)
    found: dict[str, Entry] = {}
    with _reading(folder):
        _settle(folder, layout)
        for file, names in _files(folder, layout).items():
            if not (folder / file).is_file():
                raise CheckpointError(
                    f"{folder} has no {file}, which {layout.index} names; restore the file or save again"
                )
            metadata, there = tensorfile.read_header(folder / file)
            if names is not None and names != set(there):
                raise CheckpointError(
                    f"{folder / file} and {layout.index} disagree about {min(names ^ set(there))}; "
                    "restore both files or save again"
                )
            if layout.about in metadata and not _equal(metadata[layout.about], about(folder, layout=layout)):
                raise CheckpointError(
                    f"{folder / file} and {layout.about} come from different saves; restore both files or save again"
                )
            found |= there
    return found


def read(
    folder: str | os.PathLike[str],
    into: Mapping[str, Tensor] | None = None,
    *,
    device: torch.device | str | None = None,
    layout: Layout = STATE,
) -> dict[str, Tensor]:
    """The tensors of a save: copied to those of `into`, or new ones on `device` (default: torch's default device).

    `into` has to have the same names, shapes and dtypes; it is untouched unless all agree. Beyond the tensors this
    needs no memory, or tensorfile.PIECE_BYTES where they are not contiguous or not on the CPU.
    Raises CheckpointError for a file that is missing, not whole, or of another save, and where `into` disagrees.
    """
    folder = Path(folder)
    found = entries(folder, layout=layout)
    if into is None:
        tensors = {name: torch.empty(e.shape, dtype=e.dtype, device=device) for name, e in found.items()}
    else:
        tensors = dict(into)
        _check(folder, found, tensors)
    with _reading(folder):
        for path in sorted({entry.path for entry in found.values()}):
            inside = {name: entry for name, entry in found.items() if entry.path == path}
            with open(path, "rb") as file:
                for name, entry in inside.items():
                    tensorfile.read_data(file, entry, tensors[name])
    return tensors


def _check(folder: Path, found: Mapping[str, Entry], wanted: Mapping[str, Tensor]) -> None:
    for name in sorted({*found, *wanted}):
        expected, there = (
            None if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (wanted.get(name), found.get(name))
        )
        if expected != there:
            raise CheckpointError(
                f"{folder}: {name} should be {expected or 'absent'}, found {there or 'no such tensor'}; "
                "it was saved from something else, give the folder that belongs to this"
            )


def _files(folder: Path, layout: Layout) -> Mapping[str, set[str] | None]:
    """Tensor file → the names it should hold, None where nothing says so."""
    if (folder / layout.single).is_file():
        return {layout.single: None}
    if not (folder / layout.index).is_file():
        raise CheckpointError(f"{folder} has no {layout.single}; the save was cut short or a file is missing")
    places = _weight_map(folder / layout.index)
    return {file: {name for name in places if places[name] == file} for file in sorted(set(places.values()))}


def _weight_map(index: Path) -> dict[str, str]:
    places = _read_json(index).get("weight_map")
    # A file of the hub's is not to name one elsewhere.
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        raise CheckpointError(f"{index} has no weight_map of files beside it; restore the file or save again")
    return places


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore the file or save again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object; restore the file")
    return value


def _equal(text: str, value: dict[str, Any]) -> bool:
    try:  # as texts, since NaN differs from itself
        return json.dumps(json.loads(text), sort_keys=True) == json.dumps(value, sort_keys=True)
    except ValueError:
        return False


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"could not read {folder}: {error.strerror or error}; look at its permissions and its disk"
        ) from error
