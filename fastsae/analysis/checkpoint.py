"""Where a long reading stands, kept on disk: one file, whole or not at all, that knows what it belongs to."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fastsae.errors import FastSAEError
from fastsae.files import replace_file
from fastsae.sae import SAE

SECONDS, TIMES = 60.0, 20  # between two checkpoints: at least so long, and so many times what writing one takes

Arrays = dict[str, np.ndarray]


class Part(Protocol):
    """What a pass adds up: its whole state as arrays by name, and back."""

    def arrays(self) -> Arrays: ...

    def load(self, arrays: Arrays) -> None: ...


class Checkpoint:
    """The parts of one pass in one file, with how many batches of text they have seen.

    about: what the pass is of, such as digests of dictionaries and documents; ready for JSON. A file of something else
    is refused. folder: what refusals tell to remove, where the pass has a folder of its own; None: the file.
    """

    def __init__(self, path: str | Path, about: dict[str, Any], folder: Path | None = None) -> None:
        self.path, self._about = Path(path), json.loads(json.dumps(about, default=str))
        self._remove = "remove the file" if folder is None else f"remove {folder}"
        self._saved, self._pause = time.monotonic(), SECONDS

    def resume(self, parts: Mapping[str, Part], resume: bool) -> int:
        """Loads what the file holds into the parts; batches that they have seen, 0 where there is no file.

        Raises FastSAEError for a file that is there without resume, that is damaged, or of another pass.
        """
        if not self.path.exists():
            return 0
        if not resume:
            raise FastSAEError(
                f"{self.path} is an unfinished pass: resume it, choose another folder, or {self._remove}"
            )
        found = read_arrays(self.path)
        if found is None:
            raise FastSAEError(f"{self.path} is damaged: {self._remove} to start the pass again")
        arrays, about = found
        batches = about.pop("batches", 0)
        if about != self._about:
            key = next(k for k in {**self._about, **about} if about.get(k) != self._about.get(k))
            raise FastSAEError(
                f"{self.path} is of another pass: its {key} is {about.get(key)}, and {self._about.get(key)} here; "
                f"choose another folder, or {self._remove}"
            )
        for name, part in parts.items():
            head = name + "/"
            part.load({key.removeprefix(head): array for key, array in arrays.items() if key.startswith(head)})
        return batches

    def save(self, parts: Mapping[str, Part], batches: int) -> None:
        """All parts now, in the place of what the file held."""
        begun = time.monotonic()
        arrays = {f"{name}/{key}": array for name, part in parts.items() for key, array in part.arrays().items()}
        save_arrays(self.path, arrays, self._about | {"batches": batches})
        self._saved = time.monotonic()
        self._pause = max(SECONDS, TIMES * (self._saved - begun))

    def save_if_due(self, parts: Mapping[str, Part], batches: int) -> None:
        """Once a minute, or less often where that would take more than a twentieth of the time."""
        if time.monotonic() - self._saved > self._pause:
            self.save(parts, batches)

    def remove(self) -> None:
        """The pass is finished and its results are written."""
        self.path.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: Arrays, about: dict[str, Any]) -> None:
    """An .npz file with a JSON header `about`, atomically."""
    header = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays, about=header)  # type: ignore[arg-type]

    replace_file(path, write)


def read_arrays(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """What save_arrays wrote; None for a file that is not whole, or another one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays.pop("about").tobytes())
    except (ValueError, KeyError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        return None
    return (arrays, about) if isinstance(about, dict) else None


def dictionary_digest(sae: Any) -> str:
    """A fingerprint of a dictionary's configuration and parameters, to know it again; of a stand-in, its name."""
    if not isinstance(sae, SAE):
        return type(sae).__name__
    digest = hashlib.blake2b(repr(sae.cfg).encode(), digest_size=8)
    for name, tensor in sorted(sae.state_dict().items()):
        if name == "tokens_since_fired":  # counts on while it trains
            continue
        digest.update(name.encode())
        for rows in tensor.detach().reshape(-1).split(1 << 24):
            digest.update(rows.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_digest(model: Any) -> str:
    """A fingerprint of a model from its parameters' names, shapes and some thousand numbers of each, spread evenly: all
    of a large model would take longer to read than it takes to notice that it is another."""
    if not isinstance(model, nn.Module):
        return type(model).__name__
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 4096)].cpu().contiguous()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
