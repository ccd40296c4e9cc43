"""Results as JSON, one file a kind and machine, with what is needed to know what was measured."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
FOLDER = Path(__file__).parent / "results"


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Date, processor or GPU, threads, versions and commit."""
    device = torch.device(device)
    described: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return described


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, '+' after it where files differ from it, or None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def path_for(kind: str, about: dict[str, Any], folder: Path = FOLDER) -> Path:
    """results/<kind>-<machine>.json: a later run on the same sort of machine replaces the earlier one."""
    name = about.get("gpu") or f"{about['processor']} {about['threads']} threads"
    return folder / f"{kind}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def save(kind: str, about: dict[str, Any], rows: list[dict[str, Any]], path: Path, **more: Any) -> Path:
    """Writes {format, kind, machine, rows, …}. Called after every row, so that a run cut short leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "kind": kind, "machine": about, **more, "rows": rows}, indent=1)
    partial = path.with_suffix(".part")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def load(kind: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All results of a kind, by file name. Raises ValueError for a file of another format."""
    found = []
    for path in sorted(folder.glob(f"{kind}-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("format") != FORMAT:
            raise ValueError(f"{path} has format {result.get('format')}, expected {FORMAT}; measure again")
        found.append(result)
    return found


def _processor() -> str:
    """The processor's own name where the system tells it (Linux), else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
