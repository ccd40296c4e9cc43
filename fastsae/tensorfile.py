"""One file in the safetensors format, written and read piece by piece.

The format (huggingface.co/docs/safetensors): 8 bytes with the length of a header, little-endian; the header, JSON of
name → dtype, shape, data_offsets, padded with spaces to 8 bytes; the raw data. safetensors' own save_file first makes
bytes of every tensor, a second copy of tens of GB for a wide dictionary. Here nothing is copied where a CPU tensor is
contiguous, and PIECE_BYTES at a time elsewhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastsae.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
PIECE_BYTES = 64_000_000
_HEADER_LIMIT = 100_000_000  # bytes; safetensors refuses longer ones too
_METADATA = "__metadata__"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. offset: of its first byte from the start of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def check(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a tensor that a file cannot hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or name == _METADATA:
            raise CheckpointError(
                f"{name} is {tensor.dtype} and {tensor.layout}, which a safetensors file cannot hold under this name; "
                f"expected torch.strided and one of {', '.join(str(dtype) for dtype in _NAMES)}"
            )


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file of what passes `check`, and wait until it is on the disk. Equal tensors make equal files.

    Raises OSError where the disk refuses.
    """
    # Wide types first, so that every tensor starts at a multiple of its element's size; then by name.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, begin, end = _NAMES[tensors[name].dtype], end, end + tensors[name].nbytes
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_data(file, tensors[name].detach())
        file.flush()
        os.fsync(file.fileno())


def _write_data(file: BinaryIO, tensor: Tensor) -> None:
    staging = _staging(tensor)
    for piece in _pieces(tensor):
        file.write(_bytes(piece if staging is None else _like(staging, piece).copy_(piece)))


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the tensors of a file. Raises CheckpointError unless it is a whole safetensors file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            raise _damaged(path, "it is cut short or no safetensors file")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop(_METADATA, None) or {}
        found = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        entries, end = {}, 0
        for begin, stop, name in found:
            dtype, shape = DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                raise ValueError(f"shape and place of {name} disagree")
            entries[name] = Entry(path, dtype, shape, 8 + length + begin)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is damaged or of a type unknown here: {error}") from None
    if size != 8 + length + end:
        raise _damaged(path, f"its header says {8 + length + end} bytes, the file has {size}")
    return metadata, entries


def read_data(file: BinaryIO, entry: Entry, into: Tensor) -> None:
    """Copy a tensor out of `file`, opened at entry.path, to one of its shape and dtype, on any device.

    Plain reads to the tensor's own memory: pages of a mapped file would count as this process's memory.
    """
    into = into.detach()
    staging = _staging(into)
    file.seek(entry.offset)
    for piece in _pieces(into):
        data = piece if staging is None else _like(staging, piece)
        if file.readinto(_bytes(data)) != data.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
            raise _damaged(entry.path, "it became shorter while it was read")
        if staging is not None:
            piece.copy_(data)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({reason}); restore the file or save again")


def _staging(tensor: Tensor) -> Tensor | None:
    """Bytes to copy the pieces of `tensor` through; None where its own memory holds them as the file does."""
    lazy = tensor.is_conj() or tensor.is_neg()
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not lazy:
        return None
    pinned = tensor.device.type == "cuda"  # pageable memory would go through a buffer of the driver's as well
    return torch.empty(min(tensor.nbytes, PIECE_BYTES), dtype=torch.uint8, device="cpu", pin_memory=pinned)


def _like(staging: Tensor, piece: Tensor) -> Tensor:
    return staging[: piece.nbytes].view(piece.dtype).view(piece.shape)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most PIECE_BYTES, in the order of the file: elements of contiguous tensors, rows of others."""
    if tensor.nbytes == 0:
        return
    if tensor.nbytes <= PIECE_BYTES:
        yield tensor
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    rows = PIECE_BYTES * tensor.shape[0] // tensor.nbytes
    if rows:
        yield from tensor.split(rows)
    else:
        for row in tensor.unbind():
            yield from _pieces(row)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
