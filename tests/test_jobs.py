"""The queue of long calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fastsae.dashboard.jobs import Job, Jobs, QueueFullError, UnknownJobError
from fastsae.errors import FastSAEError


@pytest.fixture()
def jobs() -> Any:
    made = Jobs(waiting=3, kept=4)
    yield made
    made.close()


def held(jobs: Jobs) -> tuple[Job, threading.Event]:
    """A job that runs until the event is set, or it is cancelled."""
    begun, go = threading.Event(), threading.Event()

    def work(job: Job) -> str:
        begun.set()
        while not go.wait(0.005):
            job.check()
        return "went"

    job = jobs.submit("steer", "tokens", work)
    assert begun.wait(5)
    return job, go


def test_one_at_a_time_in_order(jobs: Jobs):
    first, go = held(jobs)
    order: list[int] = []
    running: list[int] = []

    def work(n: int) -> Any:
        def run(job: Job) -> int:
            running.append(n)
            assert len(running) == 1
            order.append(n)
            job.advance(3)
            running.remove(n)
            return n

        return run

    waiting = [jobs.submit("steer", "tokens", work(n)) for n in range(3)]
    assert [jobs.ahead(job) for job in [first, *waiting]] == [0, 1, 2, 3]
    go.set()
    assert all(job.wait(5) for job in waiting)
    assert order == [0, 1, 2] and first.result == "went"
    assert [(job.state, job.result, job.done) for job in waiting] == [("done", n, 3) for n in range(3)]


def test_the_queue_is_bounded(jobs: Jobs):
    _, go = held(jobs)
    for _ in range(3):
        jobs.submit("steer", "tokens", lambda job: None)
    with pytest.raises(QueueFullError, match="3 jobs wait already"):
        jobs.submit("steer", "tokens", lambda job: None)
    go.set()


def test_cancelling(jobs: Jobs):
    running, _ = held(jobs)
    waiting = jobs.submit("steer", "tokens", lambda job: "never")
    jobs.cancel(waiting.id)
    assert waiting.state == "cancelled" and running.state == "running"
    jobs.cancel(running.id)
    assert running.wait(5) and running.state == "cancelled" and running.result is None
    after = jobs.submit("steer", "tokens", lambda job: "goes on")
    assert after.wait(5) and after.result == "goes on"
    assert jobs.cancel(after.id).state == "done"


def test_errors_are_told_and_the_queue_goes_on(jobs: Jobs):
    def fail(job: Job) -> None:
        raise FastSAEError("write something else")

    def burst(job: Job) -> None:
        raise RuntimeError("first line\nsecond line")

    told, other = jobs.submit("steer", "tokens", fail), jobs.submit("steer", "tokens", burst)
    assert told.wait(5) and other.wait(5)
    assert (told.state, told.error) == ("failed", "write something else")
    assert (other.state, other.error) == ("failed", "RuntimeError: first line")


def test_old_jobs_are_forgotten_but_none_that_runs(jobs: Jobs):
    running, go = held(jobs)
    known = [jobs.finished("proxies", "tokens", n) for n in range(10)]
    assert [job.result for job in known[-4:]] == [jobs.get(job.id).result for job in known[-4:]]
    with pytest.raises(UnknownJobError):
        jobs.get(known[0].id)
    assert jobs.get(running.id) is running
    go.set()


def test_closing_ends_everything(jobs: Jobs):
    running, _ = held(jobs)
    waiting = jobs.submit("steer", "tokens", lambda job: None)
    jobs.close()
    assert running.state == waiting.state == "cancelled"
    with pytest.raises(QueueFullError):
        jobs.submit("steer", "tokens", lambda job: None)
