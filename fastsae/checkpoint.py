"""A dictionary in a folder: `sae.safetensors`, the tensors under the names of `state_dict`, and `cfg.json`.

Above `shards.SHARD_BYTES` the tensors are in `sae-00001-of-0000N.safetensors`, with `sae.safetensors.index.json`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastsae import shards
from fastsae.errors import CheckpointError, FastSAEError, MissingDependencyError

if TYPE_CHECKING:
    from fastsae.sae import SAE

FORMAT = "fastsae"
FORMAT_VERSION = 1
LAYOUT = shards.Layout("sae", "cfg.json")


def save(sae: SAE, folder: str | os.PathLike[str], *, shard_bytes: int = shards.SHARD_BYTES) -> Path:
    """Write the files, all or none, without a second copy in memory. Equal dictionaries make equal files.

    The configuration is written into each, so that files of different saves are noticed when they are read.
    Raises CheckpointError where the folder cannot be written.
    """
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(sae.cfg),
        "dtype": str(sae.dtype).removeprefix("torch."),
    }
    return shards.write(folder, sae.state_dict(), config, shard_bytes=shard_bytes, layout=LAYOUT)


def load(
    cls: type[SAE], source: str | os.PathLike[str], device: torch.device | str | None, revision: str | None
) -> SAE:
    """The dictionary of a folder, or of a Hugging Face hub id where there is no such folder."""
    from fastsae.config import SAEConfig

    folder = _folder(source, revision)
    written = shards.about(folder, layout=LAYOUT)
    version = written.pop("format_version", None)
    if written.pop("format", None) != FORMAT:
        raise CheckpointError(f"{folder / LAYOUT.about} was not written by fastsae; import it with the tool that did")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, this fastsae reads {FORMAT_VERSION}; install a newer fastsae"
        )
    try:
        sae = cls(SAEConfig(**written), device="meta")
    except (TypeError, FastSAEError) as error:
        raise CheckpointError(f"{folder / LAYOUT.about} does not describe a dictionary: {error}") from error
    # Shapes before data, so that the wrong tens of GB are never read. The dtypes are those of the files.
    shapes = {name: tuple(t.shape) for name, t in sae.state_dict().items()}
    found = {name: entry.shape for name, entry in shards.entries(folder, layout=LAYOUT).items()}
    if shapes != found:
        wrong = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))[0]
        raise CheckpointError(
            f"{folder}: {wrong} should have shape {shapes.get(wrong)}, found {found.get(wrong)}; "
            f"the files are incomplete or belong to another {LAYOUT.about}"
        )
    sae.load_state_dict(shards.read(folder, device=device, layout=LAYOUT), assign=True)
    return sae


def _folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():  # a training run keeps its dictionary in sae/
        inner = folder / "sae"
        return inner if not (folder / LAYOUT.about).exists() and (inner / LAYOUT.about).exists() else folder
    if folder.exists():
        raise CheckpointError(f"expected a folder with {LAYOUT.about} and {LAYOUT.single}, got the file {folder}")
    name = str(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CheckpointError(f"no folder {name}; give one that save_pretrained wrote, or a hub id owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            f"no folder {name}; to look it up as a hub id, install huggingface_hub (pip install 'fastsae[lm]')"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=LAYOUT.patterns))
    except Exception as error:  # the hub's client raises its own errors, requests' and OSErrors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no folder {name}, and the hub did not give it: {reason}") from error
