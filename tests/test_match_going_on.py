"""Matches and splits that are stopped and go on, or are read by several processes: one result, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsae import cli
from fastsae.analysis.matches import SHUFFLED, TRAINED, Match
from fastsae.analysis.reading import pass_file
from fastsae.analysis.splitting import Split, SplitConfig, Splitting, read_split, split
from fastsae.analysis.stream import Source
from fastsae.analysis.universality import Matching, match, read_match, shuffled
from fastsae.errors import FastSAEError
from fastsae.sae import SAE
from tests import analysis_case as case

HOOK, TEXTS = case.HOOK, case.documents()
HOW: dict[str, Any] = {"context": 33, "batch_size": 4, "show_progress": False}
MATCH: dict[str, Any] = HOW | {"min_fires": 5, "logit_contexts": 3}
OTHER: dict[str, Any] = MATCH | {"min_fires": 6}


def pair() -> tuple[Source, Source, Any]:
    sae_a, model_a, tokenizer = case.case(0)
    sae_b, model_b, _ = case.case(1)
    return Source(sae_a, model_a, HOOK), Source(sae_b, model_b, HOOK), tokenizer


def layers() -> tuple[list[Source], Any]:
    sae, model, tokenizer = case.case()
    return [Source(one, model, HOOK) for one in (sae, SAE(d_in=24, d_sae=60, activation="relu", seed=3))], tokenizer


def interrupt(monkeypatch: pytest.MonkeyPatch, sums: type, after: int) -> None:
    """Ctrl-C comes in the middle of batch number `after`, when half of its sums are taken."""
    real, calls = sums.add, []

    def add(self: Any, some: Any) -> None:
        calls.append(1)
        if len(calls) == after:
            signal.raise_signal(signal.SIGINT)
        real(self, some)

    monkeypatch.setattr(sums, "add", add)


def passes(model: Any) -> list[int]:
    """One entry for every time that the model runs from here on."""
    calls: list[int] = []
    model.get_submodule(HOOK).register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_match_goes_on_bit_for_bit(tmp_path, monkeypatch):
    a, b, tokenizer = pair()
    whole = match(a, b, tokenizer, TEXTS, **MATCH)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, Matching, 7)
        match(a, b, tokenizer, TEXTS, out=tmp_path, **MATCH)
    assert [path.name for path in tmp_path.iterdir()] == ["match.pass.npz"]
    with pytest.raises(FastSAEError, match="unfinished pass: resume it"):
        match(a, b, tokenizer, TEXTS, out=tmp_path, **MATCH)
    with pytest.raises(FastSAEError, match="of another pass: its documents"):
        match(a, b, tokenizer, TEXTS[1:], out=tmp_path, resume=True, **MATCH)
    with pytest.raises(FastSAEError, match="of another pass: its dictionaries"):
        match(a, Source(a.sae, b.model, HOOK), tokenizer, TEXTS, out=tmp_path, resume=True, **MATCH)
    with pytest.raises(FastSAEError, match="of another pass: its config"):
        match(a, b, tokenizer, TEXTS, out=tmp_path, resume=True, **OTHER)
    calls = passes(a.model)
    again = match(a, b, tokenizer, TEXTS, out=tmp_path, resume=True, **MATCH)
    assert again.to_dict() == whole.to_dict()
    batches = -(-len(case.contexts(tokenizer, TEXTS, 33)) // 4)
    assert len(calls) == batches - 7 + 1  # and one for the logit weights
    assert [path.name for path in tmp_path.iterdir()] == ["match.json"]
    assert Match.load(tmp_path / "match.json").to_dict() == whole.to_dict()


def test_a_split_goes_on_bit_for_bit(tmp_path, monkeypatch):
    sources, tokenizer = layers()
    whole = split(sources, tokenizer, TEXTS, **HOW)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, Splitting, 3)
        split(sources, tokenizer, TEXTS, out=tmp_path, **HOW)
    again = split(sources, tokenizer, TEXTS, out=tmp_path, resume=True, **HOW)
    assert again.to_dict() == whole.to_dict() and len(again.edges[0].parents) > 10
    assert all(torch.equal(x, y) for x, y in zip(again.edges[0], whole.edges[0], strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


def test_a_pass_is_kept_once_a_minute(tmp_path, monkeypatch):
    """Also where nobody can write at the end: the process is killed."""
    from fastsae.analysis import checkpoint

    sources, tokenizer = layers()
    real, calls = Splitting.add, []

    def add(self: Any, some: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("killed")
        real(self, some)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoint, "SECONDS", 0.0)
        patch.setattr(checkpoint, "TIMES", 0)
        patch.setattr(Splitting, "add", add)
        split(sources, tokenizer, TEXTS, out=tmp_path, **HOW)
    calls = passes(sources[0].model)
    again = split(sources, tokenizer, TEXTS, out=tmp_path, resume=True, **HOW)
    assert again.to_dict() == split(sources, tokenizer, TEXTS, **HOW).to_dict()
    batches = -(-len(case.contexts(tokenizer, TEXTS, 33)) // 4)
    assert len(calls) == batches - 4 + batches


def test_ranks_merge_to_the_match_of_one_process(tmp_path):
    a, b, tokenizer = pair()
    whole = match(a, b, tokenizer, TEXTS, **MATCH)
    for rank in range(3):
        read_match(a, b, tokenizer, TEXTS, rank=rank, world=3, out=tmp_path, **MATCH)
    assert pass_file(tmp_path, "match", 1, 3).name == "match.pass-1-of-3.npz" and len(list(tmp_path.iterdir())) == 3
    calls = passes(a.model)
    parts = [
        read_match(a, b, tokenizer, TEXTS, rank=rank, world=3, out=tmp_path, resume=True, **MATCH) for rank in range(3)
    ]
    assert not calls  # they were done
    assert max(int(part.result(partial=True).tokens) for part in parts) < whole.tokens
    for part in parts[1:]:
        with pytest.raises(FastSAEError, match="of all ranks, and ranks? .*2 of 3 (is|are) missing: merge"):
            parts[0].result()
        parts[0].merge(part)
    assert parts[0].missing() == []
    found = parts[0].result().to_dict()
    for name, wanted in whole.to_dict().items():
        if isinstance(wanted, list):
            np.testing.assert_allclose(np.array(found[name], float), np.array(wanted, float), atol=1e-9, err_msg=name)
        elif name != "medians":
            assert found[name] == wanted, name
    other = read_match(a, b, tokenizer, TEXTS, **OTHER)
    with pytest.raises(FastSAEError, match="same dictionaries with the same configuration"):
        other.merge(parts[0])


def test_ranks_merge_to_the_split_of_one_process():
    sources, tokenizer = layers()
    whole = split(sources, tokenizer, TEXTS, **HOW)
    first, second = (read_split(sources, tokenizer, TEXTS, rank=rank, world=2, **HOW) for rank in range(2))
    first.merge(second)
    found = first.result()
    assert found.tokens == whole.tokens and torch.equal(found.edges[0].parents, whole.edges[0].parents)
    torch.testing.assert_close(found.edges[0].cosines, whole.edges[0].cosines)
    with pytest.raises(FastSAEError, match="same dictionaries with the same configuration"):
        first.merge(Splitting([40, 61], SplitConfig(context=33, batch_size=4)))


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_is_of_its_world(rank, world):
    a, b, tokenizer = pair()
    with pytest.raises(FastSAEError, match="expected a rank from 0 to world − 1"):
        read_match(a, b, tokenizer, TEXTS, rank=rank, world=world, **MATCH)
    with pytest.raises(FastSAEError, match="expected a rank from 0 to world − 1"):
        read_split([a, a], tokenizer, TEXTS, rank=rank, world=world, **HOW)


def saved(folder: Path) -> list[str]:
    """Options of a verb: models, dictionaries and text on disk."""
    a, b, tokenizer = pair()
    for name, network in (("lm", a.model), ("other", b.model), ("control", shuffled(b.model, 5))):
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, sae in (("sae-a", a.sae), ("sae-b", b.sae)):
        sae.save_pretrained(folder / name)
    SAE(d_in=24, d_sae=60, activation="relu", seed=3).save_pretrained(folder / "wide")
    texts = "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(TEXTS * 9))
    (folder / "text.jsonl").write_text(texts)
    more = ["--model", str(folder / "lm"), "--hook", HOOK, "--text", str(folder / "text.jsonl")]
    return [*more, "--context", "33", "--batch-size", "1", "--min-fires", "3", "--json"]


def test_the_verbs_go_on_and_take_a_control(tmp_path, monkeypatch, capsys):
    more = saved(tmp_path)
    argv = ["match", "--sae", str(tmp_path / "sae-a"), "--other-sae", str(tmp_path / "sae-b")]
    argv += ["--other-model", str(tmp_path / "other"), *more, "--logit-contexts", "2", "--tokens", "400", "--out"]
    assert cli.main([*argv, str(tmp_path / "whole")]) == 0
    assert json.loads(capsys.readouterr().out)["control"] == SHUFFLED
    with monkeypatch.context() as patch:
        interrupt(patch, Matching, 2)
        assert cli.main([*argv, str(tmp_path / "stopped")]) == 130
    assert "goes on from here" in capsys.readouterr().err and (tmp_path / "stopped" / "match.pass.npz").exists()
    with monkeypatch.context() as patch:
        patch.setattr("fastsae.progress._LINE_SECONDS", 0.0)
        assert cli.main([*argv, str(tmp_path / "stopped")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("match, going on: ")]
    assert lines and int(lines[0].split(": ")[1].split()[0]) > 2 * 24  # the contexts that were read are counted
    texts = [(tmp_path / name / "match.json").read_bytes() for name in ("whole", "stopped")]
    assert texts[0] == texts[1] and not (tmp_path / "stopped" / "match.pass.npz").exists()
    control = ["--control-sae", str(tmp_path / "sae-a"), "--control-model", str(tmp_path / "control")]
    assert cli.main([*argv, str(tmp_path / "trained"), *control]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = Match.load(tmp_path / "trained" / "match.json")
    assert shown["control"] == TRAINED == found.control_kind and found.control is not None
    assert shown["median control"] != json.loads(texts[0])["medians"]["control"]
    assert cli.main([*argv, str(tmp_path / "bad"), *control[:2]]) == 2
    assert "control_sae and control_model go together" in capsys.readouterr().err


def test_the_verb_split_goes_on(tmp_path, monkeypatch, capsys):
    from fastsae.analysis import splitting

    monkeypatch.setattr(splitting, "draw_map", lambda *_, **__: None)
    more = saved(tmp_path)
    argv = ["split", "--saes", str(tmp_path / "sae-a"), str(tmp_path / "wide"), *more, "--out"]
    assert cli.main([*argv, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, Splitting, 2)
        assert cli.main([*argv, str(tmp_path / "stopped")]) == 130
    assert cli.main([*argv, str(tmp_path / "stopped")]) == 0
    texts = [(tmp_path / name / "split.json").read_bytes() for name in ("whole", "stopped")]
    assert texts[0] == texts[1] and not (tmp_path / "stopped" / "split.pass.npz").exists()
    assert Split.load(tmp_path / "stopped" / "split.json").tokens > 100
