"""Folders belong to one run."""

from pathlib import Path

import pytest

from fastsae.errors import FastSAEError
from fastsae.files import claim_folder, found_from, read_torch, seen_from, write_torch


def test_a_folder_belongs_to_one_run(tmp_path):
    folder = tmp_path / "run"
    claim_folder(folder, "train", {"lr": 1.0}, resume=False)
    claim_folder(folder, "train", {"lr": 2.0}, resume=False)  # the first run failed before it wrote anything
    (folder / "log.jsonl").write_text("{}\n")
    with pytest.raises(FastSAEError, match="holds this run already.*--resume"):
        claim_folder(folder, "train", {"lr": 2.0}, resume=False)
    claim_folder(folder, "train", {"lr": 2.0}, resume=True)
    with pytest.raises(FastSAEError, match="holds another run.*lr"):
        claim_folder(folder, "train", {"lr": 1.0}, resume=True)
    with pytest.raises(FastSAEError, match="holds another run"):
        claim_folder(folder, "lm", {"lr": 2.0}, resume=True)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FastSAEError, match="not an empty folder"):
        claim_folder(tmp_path, "lm", {}, resume=True)
    with pytest.raises(FastSAEError, match="not an empty folder"):
        claim_folder(tmp_path / "thesis.tex", "lm", {}, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", [b"", b"half a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_said(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(FastSAEError, match="state.pt is damaged; remove it"):
        read_torch(tmp_path / "state.pt")
    write_torch(tmp_path / "state.pt", {"step": 3})
    assert read_torch(tmp_path / "state.pt") == {"step": 3}


def test_a_damaged_mark_is_said(tmp_path):
    claim_folder(tmp_path / "run", "lm", {}, resume=False)
    (tmp_path / "run" / "log.jsonl").write_text("")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(FastSAEError, match="run.json is damaged"):
        claim_folder(tmp_path / "run", "lm", {}, resume=True)


def test_a_path_is_found_from_wherever_the_folder_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sae").mkdir()
    (tmp_path / "runs" / "report").mkdir(parents=True)
    noted = seen_from(Path("runs/report"), "sae")
    assert noted == "../../sae" and seen_from(Path("runs/report"), "gpt2") == "gpt2"
    monkeypatch.chdir("/")
    assert found_from(tmp_path / "runs" / "report", noted) == str((tmp_path / "sae").resolve())
    assert found_from(tmp_path / "runs" / "report", "gpt2") == "gpt2"
