"""The progress meter: rates, what it shows where, and that it keeps quiet when told to."""

import sys

import pytest

from fastsae import progress as module
from fastsae.progress import progress


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_rate_and_time_left_count_only_this_process(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with progress("train", 1_000_000, done=500_000, show=False) as meter:
        assert meter.seconds_left is None
        clock.now += 20
        meter.advance(100_000, "loss 1")
        assert meter.rate == pytest.approx(5000)
        assert meter.seconds_left == pytest.approx(80)
        assert meter.line() == "train: 600k / 1M tokens · 5000/s, 1:20 left · loss 1"
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with progress("harvest", 1000) as meter:
        for _ in range(40):
            clock.now += 1
            meter.advance(25)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 4
    assert lines[0] == "harvest: 250 / 1000 tokens · 25/s, 0:30 left"


def test_unknown_totals_and_long_waits(monkeypatch):
    clock = Clock(monkeypatch)
    with progress("work", None, "documents", show=False) as meter:
        clock.now += 4
        meter.advance(1)
        assert meter.line() == "work: 1 documents · 0.25/s"
    with progress("work", 10_000, show=False) as meter:
        clock.now += 10
        meter.advance(10)
        assert meter.line().endswith("2:46:30 left")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("train", 10) as meter:
        for _ in range(10):
            meter.advance(1, "loss [bold]2[/bold]")
        assert type(meter).__name__ == "_BarMeter" and meter.done == 10
    assert capsys.readouterr().out == ""
