"""Progress of long work: a bar on a terminal, a line every ten seconds in a log, nothing where none is wanted."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 10.0


class Meter:
    """Counts units done, and tells the rate and the time left. Call `advance` as often as you like."""

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._done_before = done
        self.note = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    @property
    def rate(self) -> float:
        """Units a second, since this process began."""
        return (self.done - self._done_before) / max(time.monotonic() - self._start, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None while unknown."""
        if self.total is None or self.done == self._done_before:
            return None
        return max(self.total - self.done, 0) / self.rate

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """n more units are done; `note` (loss, L0, …) stays until the next one."""
        self.done += n
        self.note = self.note if note is None else note

    def line(self) -> str:
        """One line: done / total, rate, time left, note."""
        total = f" / {_count(self.total)}" if self.total is not None else ""
        left = f", {_clock(self.seconds_left)} left" if self.seconds_left is not None else ""
        note = f" · {self.note}" if self.note else ""
        return f"{self.title}: {_count(self.done)}{total} {self.unit} · {_count(self.rate)}/s{left}{note}"


class _BarMeter(Meter):
    def __init__(self, title: str, total: int | None, unit: str, done: int, bar: Progress) -> None:
        super().__init__(title, total, unit, done)
        self._bar, self._shown = bar, 0.0
        self._task = bar.add_task(self.line(), total=total, completed=done)

    def advance(self, n: int = 1, note: str | None = None) -> None:
        super().advance(n, note)
        now = time.monotonic()
        if now - self._shown > 0.1 or self.done == self.total:  # rich redraws ten times a second at most
            self._shown = now
            assert self._bar is not None
            self._bar.update(self._task, completed=self.done, description=self.line())


class _LineMeter(Meter):
    def advance(self, n: int = 1, note: str | None = None) -> None:
        super().advance(n, note)
        now = time.monotonic()
        if now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            sys.stderr.write(self.line() + "\n")
            sys.stderr.flush()


@contextmanager
def progress(
    title: str, total: int | None = None, unit: str = "tokens", done: int = 0, show: bool = True
) -> Iterator[Meter]:
    """A meter for the work in the `with` block, on stderr.

    total: units of work, None if unknown. done: units that an earlier run has finished. show=False: count silently.
    """
    if not show:
        yield Meter(title, total, unit, done)
        return
    bar = _terminal_bar()
    if bar is None:
        yield _LineMeter(title, total, unit, done)
        return
    with bar:
        yield _BarMeter(title, total, unit, done, bar)


def _terminal_bar() -> Progress | None:
    """A rich bar when stderr is a terminal and rich is installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:
        return None
    console = Console(stderr=True)
    return Progress(BarColumn(20), TextColumn("{task.description}", markup=False), console=console, transient=True)


def _count(n: float) -> str:
    """1234567 → 1.23M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if n >= size:
            return f"{n / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{n:.0f}" if n >= 10 or n == int(n) else f"{n:.2g}"


def _clock(seconds: float | None) -> str:
    """75 → 1:15."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
