"""Folders belong to one run."""

import pytest

from fastsae.errors import FastSAEError
from fastsae.files import claim_folder


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
