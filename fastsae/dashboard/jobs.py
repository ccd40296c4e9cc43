"""A queue of long calls: bounded, one at a time, with progress, each can be cancelled."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from fastsae.errors import FastSAEError

State = Literal["waiting", "running", "done", "failed", "cancelled"]
OVER: tuple[State, ...] = ("done", "failed", "cancelled")


class QueueFullError(FastSAEError):
    """As many jobs wait as may."""


class UnknownJobError(FastSAEError):
    """A job that never was, or that ended so long ago that it is forgotten."""


class Cancelled(Exception):
    """Raised inside a job that shall stop."""


class Job:
    """One call. work(job) runs in the queue's thread, tells how far it is, and looks now and then whether to stop.

    done, total: units of work; total is None while it is unknown. result: what work returned. error: one line.
    """

    def __init__(self, kind: str, unit: str, work: Callable[[Job], Any]) -> None:
        self.id = secrets.token_hex(8)
        self.kind, self.unit, self._work = kind, unit, work
        self.state: State = "waiting"
        self.done, self.total = 0, None
        self.result: Any = None
        self.error: str | None = None
        self.started: float | None = None  # time.monotonic()
        self.ended: float | None = None
        self._stop = threading.Event()
        self._over = threading.Event()

    done: int
    total: int | None

    def advance(self, n: int = 1) -> None:
        """n more units are done. Raises Cancelled where the job shall stop."""
        self.done += n
        self.check()

    def check(self) -> None:
        """Raises Cancelled where the job shall stop."""
        if self._stop.is_set():
            raise Cancelled

    def wait(self, seconds: float | None = None) -> bool:
        """Until the job is over; False where the time was up first."""
        return self._over.wait(seconds)

    @property
    def seconds(self) -> float:
        """How long it has run."""
        if self.started is None:
            return 0.0
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    def _end(self, state: State, result: Any = None, error: str | None = None) -> None:
        self.result, self.error, self.ended = result, error, time.monotonic()
        self.state = state
        self._work = _nothing  # what it held on to may go
        self._over.set()

    def _run(self) -> None:
        self.started = time.monotonic()
        try:
            self.check()
            self._end("done", result=self._work(self))
        except Cancelled:
            self._end("cancelled")
        except FastSAEError as error:
            self._end("failed", error=str(error))
        except Exception as error:  # of torch, mostly: the server goes on, and who asked is told
            line = (str(error) or type(error).__name__).splitlines()[0]
            self._end("failed", error=f"{type(error).__name__}: {line}")


def _nothing(_: Job) -> None:
    return None


class Jobs:
    """The queue. waiting: jobs that may wait; kept: jobs that are over and can still be asked about.

    Thread-safe. The thread that runs the jobs starts with the first of them and ends with the process, or with close().
    """

    def __init__(self, waiting: int = 8, kept: int = 32) -> None:
        self._waiting, self._kept = waiting, kept
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, kind: str, unit: str, work: Callable[[Job], Any]) -> Job:
        """Raises QueueFullError where too many wait already."""
        job = Job(kind, unit, work)
        with self._changed:
            if self._closed:
                raise QueueFullError("the server is about to end: start it again")
            if len(self._queue) >= self._waiting:
                raise QueueFullError(f"{len(self._queue)} jobs wait already: try again when some of them are done")
            self._forget()
            self._jobs[job.id] = job
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work_off, name="fastsae-jobs", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def finished(self, kind: str, unit: str, result: Any) -> Job:
        """A job whose result is known already: it does not wait."""
        job = Job(kind, unit, _nothing)
        job._end("done", result=result)
        with self._changed:
            self._forget()
            self._jobs[job.id] = job
        return job

    def get(self, job_id: str) -> Job:
        """Raises UnknownJobError."""
        with self._changed:
            job = self._jobs.get(job_id)
        if job is None:
            raise UnknownJobError(f"there is no job {job_id[:40]!r}: the last {self._kept} that ended are kept")
        return job

    def ahead(self, job: Job) -> int:
        """Jobs that run or wait before this one; 0 for one that runs or is over."""
        with self._changed:
            if job not in self._queue:
                return 0
            running = sum(1 for other in self._jobs.values() if other.state == "running")
            return running + self._queue.index(job)

    def cancel(self, job_id: str) -> Job:
        """A job that waits is over at once, one that runs at its next step; one that is over stays as it is."""
        job = self.get(job_id)
        with self._changed:
            job._stop.set()
            if job in self._queue:
                self._queue.remove(job)
                job._end("cancelled")
        return job

    def close(self, seconds: float = 5.0) -> None:
        """Cancels all jobs and waits so long for the one that runs."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                job._stop.set()
            while self._queue:
                self._queue.popleft()._end("cancelled")
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)

    def _forget(self) -> None:
        over = [name for name, job in self._jobs.items() if job.state in OVER]
        for name in over[: max(0, len(over) - self._kept + 1)]:
            del self._jobs[name]

    def _work_off(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closed:
                        return
                    self._changed.wait()
                job = self._queue.popleft()
                job.state = "running"
            job._run()
