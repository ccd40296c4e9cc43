"""What explaining costs: counts of a feature, of this session, and of all sessions that wrote into one folder."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from fastsae.errors import FastSAEError
from fastsae.interrupt import uninterrupted


@dataclass
class Accounting:
    """What a feature cost. requests: sent, also those that failed. cached: answered from disk. retries: requests sent
    again after an error. malformed: answers that did not have the form asked for. without_usage: answers whose server
    did not count tokens; they are missing from the tokens and from cost. cost: in the unit of the prices."""

    requests: int = 0
    cached: int = 0
    retries: int = 0
    malformed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    cost: float = 0.0

    def add(self, other: Accounting) -> None:
        """Sums of both."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def since(self, before: Accounting) -> Accounting:
        """What came on top of an earlier state."""
        return Accounting(**{name: value - getattr(before, name) for name, value in asdict(self).items()})


class Ledger:
    """What was spent: `session` by this object, `total` by all that kept their lines in the same file.

    path: a JSON Lines file, a line for each question as soon as it is paid for, so that neither a kill nor an outage
    loses any; None: in memory alone. Safe for threads. Raises FastSAEError for a file that is something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.session, self.total = Accounting(), Accounting()
        self._path, self._lock = path, threading.Lock()
        if path is None or not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # a crash cut it off
            lines.pop()
            path.write_text("".join(lines), encoding="utf-8")
        try:
            for line in lines:
                self.total.add(Accounting(**json.loads(line)))
        except (ValueError, TypeError):
            raise FastSAEError(f"{path} is not a list of what was spent; name another folder or remove it") from None

    def add(self, spent: Accounting) -> None:
        """Counts, and is on disk when this returns. What is all zero is left out."""
        line = {name: value for name, value in asdict(spent).items() if value}
        if not line:
            return
        with self._lock:
            self.session.add(spent)
            self.total.add(spent)
            if self._path is not None:
                append_line(self._path, line)


def append_line(path: Path, value: dict) -> None:
    """One more line of a JSON Lines file, whole unless the machine fails. Raises FastSAEError for a full disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with uninterrupted(), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        raise FastSAEError(f"could not write {path}: {error.strerror or error}; free some space") from error
