"""A dictionary in a folder: `sae.safetensors`, the tensors under the names of `state_dict`, and `cfg.json`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastsae.errors import CheckpointError, FastSAEError, MissingDependencyError

if TYPE_CHECKING:
    from fastsae.sae import SAE

FORMAT = "fastsae"
FORMAT_VERSION = 1
CONFIG_FILE = "cfg.json"
TENSOR_FILE = "sae.safetensors"


def save(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write both files, each whole or not at all. Raises CheckpointError where the folder cannot be written.

    The configuration is written into both, so that a save cut short over an older one is noticed when it is read.
    """
    folder = Path(folder)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(sae.cfg),
        "dtype": str(sae.dtype).removeprefix("torch."),
    }
    text = json.dumps(config, indent=1)
    tensors = {name: t.detach().contiguous() for name, t in sae.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The metadata are strings, in the order given, so equal dictionaries make equal files.
        _replace(folder / TENSOR_FILE, lambda path: save_file(tensors, path, metadata={CONFIG_FILE: text}))
        _replace(folder / CONFIG_FILE, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write a dictionary to {folder}: {error}; free space or choose another"
        ) from error
    return folder


def _replace(path: Path, write: Any) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(
    cls: type[SAE], source: str | os.PathLike[str], device: torch.device | str | None, revision: str | None
) -> SAE:
    """The dictionary of a folder, or of a Hugging Face hub id where there is no such folder."""
    from fastsae.config import SAEConfig

    folder = _folder(source, revision)
    written = _read_config(folder)
    version = written.pop("format_version", None)
    if written.pop("format", None) != FORMAT:
        raise CheckpointError(f"{folder / CONFIG_FILE} was not written by fastsae; import it with the tool that did")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, this fastsae reads {FORMAT_VERSION}; install a newer fastsae"
        )
    try:
        sae = cls(SAEConfig(**written), device="meta")
    except (TypeError, FastSAEError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a dictionary: {error}") from error
    tensors = _read_tensors(folder, device)
    shapes = {name: tuple(t.shape) for name, t in sae.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != found:
        wrong = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))[0]
        raise CheckpointError(
            f"{folder / TENSOR_FILE}: {wrong} should have shape {shapes.get(wrong)}, found {found.get(wrong)}; "
            "the file is incomplete or belongs to another cfg.json"
        )
    sae.load_state_dict(tensors, assign=True)
    return sae


def _folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"expected a folder with {CONFIG_FILE} and {TENSOR_FILE}, got the file {folder}")
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
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, TENSOR_FILE]))
    except Exception as error:  # the hub's client raises its own errors, requests' and OSErrors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no folder {name}, and the hub did not give it: {reason}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; give a folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); save the dictionary again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}, expected an object; save the dictionary again")
    return config


def _read_tensors(folder: Path, device: torch.device | str | None) -> dict[str, torch.Tensor]:
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {TENSOR_FILE}; the save was cut short or a file is missing")
    where = torch.device(device) if device is not None else torch.get_default_device()
    try:
        with safe_open(path, framework="pt", device=str(where)) as file:
            written = (file.metadata() or {}).get(CONFIG_FILE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); save the dictionary again") from error
    if written is not None and json.loads(written) != _read_config(folder):
        raise CheckpointError(
            f"{path} and {CONFIG_FILE} come from different saves; save the dictionary again, or restore both files"
        )
    return tensors
