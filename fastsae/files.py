"""Files that are whole or absent, and folders that belong to one run."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from fastsae.errors import FastSAEError

RUN_FILE = "run.json"


def replace_file(path: Path, write: Any) -> None:
    """write(temporary path) beside `path`, then rename: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FastSAEError(
            f"could not write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_torch(path: Path, value: Any) -> None:
    """torch.save, atomically."""

    def save(temporary: Path) -> None:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk as RuntimeError
            raise OSError(str(error).splitlines()[0]) from error

    replace_file(path, save)


def read_torch(path: Path, device: Any = "cpu") -> Any:
    """What write_torch wrote. Raises FastSAEError for a file that is not whole."""
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except (RuntimeError, EOFError, LookupError, pickle.UnpicklingError):
        raise FastSAEError(f"the checkpoint {path} is damaged; remove it to start the run again") from None


def claim_folder(folder: Path, kind: str, config: dict, resume: bool) -> None:
    """Marks `folder` as this run's. An empty or new folder is free; one with the same configuration may be resumed.

    A folder with nothing but the mark, left by a run that failed before it wrote anything, is free too.

    Raises FastSAEError if it holds something else, another run, or the same run without resume=True.
    """
    marker = folder / RUN_FILE
    wanted = json.loads(json.dumps({"kind": kind, **config}, default=str))
    if marker.exists() and any(path != marker for path in folder.iterdir()):
        try:
            there = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            raise FastSAEError(f"{marker} is damaged; choose another folder or remove this one") from None
        if there != wanted:
            raise FastSAEError(
                f"{folder} holds another run ({_difference(there, wanted)}); choose another folder or remove it"
            )
        if not resume:
            raise FastSAEError(
                f"{folder} holds this run already; resume it (--resume), choose another folder or remove it"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(path != marker for path in folder.iterdir())):
        raise FastSAEError(f"{folder} is not an empty folder and not a run of fastsae; choose another one")
    write_json(marker, wanted)


def seen_from(folder: Path, name: str | Path) -> str:
    """A path as it is seen from a folder, which a run notes so that whoever opens the folder finds it from anywhere; a
    name that is no path here (of a model on the hub, builtin) as it is."""
    if not Path(name).exists():
        return str(name)
    try:
        return os.path.relpath(Path(name).resolve(), folder.resolve())
    except ValueError:  # on another drive
        return str(Path(name).resolve())


def found_from(folder: Path, name: str) -> str:
    """The other way: what `seen_from` noted, as a path from here."""
    there = folder / name
    return str(there.resolve()) if there.exists() else name


def _difference(there: Any, wanted: Any, at: str = "") -> str:
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in [*there, *wanted]:
            if there.get(key) != wanted.get(key):
                return _difference(there.get(key), wanted.get(key), f"{at}.{key}" if at else key)
    return f"{at}: {there!r} there, {wanted!r} asked for"


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines that an interrupted run wrote after the checkpoint it will go on from."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
