"""`analyze` that was stopped goes on, to the same figures, and takes nothing of another analysis for its own."""

import json
import signal
from pathlib import Path

import pytest

from fastsae.analysis import AnalyzeConfig, analyze, passes
from fastsae.analysis.analyze import UNFINISHED
from fastsae.analysis.survey import Survey
from fastsae.errors import FastSAEError
from tests.analysis_case import HOOK, case, documents

TEXTS = documents(40)
CONFIG = AnalyzeConfig(
    categories=("Arabic", "letters=regex:[a-z]", "Thai"), context=24, batch_size=8, contexts_per_effect=20,
    sample_tokens=2, samples=1, explain_features=2, explain_up_to=4,
)  # fmt: skip


def analysed(out: Path, config: AnalyzeConfig = CONFIG, **options) -> str:
    sae, model, tokenizer = case()
    other, _, _ = case(seed=1)
    wide, _, _ = case(seed=2)
    analyze(sae, model, tokenizer, TEXTS, HOOK, out, config, other=(other, model), widths=[wide],
            show_progress=False, **options)  # fmt: skip
    return (out / "results.json").read_text(encoding="utf-8")


def stop(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C while batch number `after` is taken."""
    real, calls = Survey.add, []

    def add(self, *args) -> None:
        calls.append(1)
        if len(calls) == after:
            signal.raise_signal(signal.SIGINT)
        real(self, *args)

    monkeypatch.setattr(Survey, "add", add)


def batches_at_start(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches each pass that runs from here on has behind it."""
    real, begun = passes.Running.run, []

    def run(self, *rest) -> None:
        begun.append(self.batches)
        real(self, *rest)

    monkeypatch.setattr(passes.Running, "run", run)
    return begun


def test_a_stopped_analysis_goes_on_to_the_same_figures(tmp_path, monkeypatch):
    whole = analysed(tmp_path / "whole")
    assert not (tmp_path / "whole" / UNFINISHED).exists()
    assert json.loads(whole)["left_out"] == [{"name": "Thai", "tokens": [0, 0]}]
    batches = Survey.load(tmp_path / "whole" / "survey.npz").batches
    for name, after in (("first", 3), ("second", batches + 5)):  # the first pass, and that of the controls
        out = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop(patch, after)
            analysed(out)
        assert not (out / "results.json").exists() and list((out / UNFINISHED).iterdir())
        if name == "first":
            with pytest.raises(FastSAEError, match="resume it, choose another folder, or remove"):
                analysed(out, resume=False)
            with pytest.raises(FastSAEError, match="is of another pass: its seed is 0"):
                analysed(out, AnalyzeConfig(**{**vars(CONFIG), "seed": 1}))
        with monkeypatch.context() as patch:
            begun = batches_at_start(patch)
            assert analysed(out) == whole
            assert begun[0] == (after if name == "first" else 0)  # the finished pass is not taken again
        assert not (out / UNFINISHED).exists() and (out / "index.html").exists()
