"""What verbs read by name: dictionaries of training runs, and whether they are read with what they were trained on."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastsae
from fastsae import cli
from fastsae.analysis.stream import check_features
from fastsae.dashboard.run import Inputs, open_live
from fastsae.errors import FastSAEError
from fastsae.inputs import load_beside, load_sae
from fastsae.store import MemoryStore
from tests import tiny_lm


def trained(tmp_path, **meta):
    store = MemoryStore(torch.randn(256, 8))
    store.meta.update(meta)
    config = fastsae.TrainConfig(d_in=8, d_sae=16, k=2, activation="topk", tokens=256, batch_size=64)
    fastsae.train(store, config, tmp_path / "run", show_progress=False)
    return tmp_path / "run"


def test_the_folder_of_a_run_is_that_of_its_dictionary(tmp_path):
    run = trained(tmp_path)
    both = fastsae.SAE.from_pretrained(run), fastsae.SAE.from_pretrained(run / "sae")
    assert torch.equal(both[0].W_dec, both[1].W_dec)


def test_another_model_or_module_than_it_was_trained_on_is_told(tmp_path, capsys):
    run = trained(tmp_path, model="/long/ago/lm-a", hook="layers.1")
    for folder in (run, run / "sae"):
        load_sae(folder, "here/lm-a", "layers.1")
        assert capsys.readouterr().err == ""  # models move
        load_sae(folder, "lm-b", "layers.2")
        first, second = capsys.readouterr().err.splitlines()
        assert first.endswith("was trained on the model /long/ago/lm-a, and reads lm-b now")
        assert second.endswith("was trained on the module layers.1, and reads layers.2 now")


def test_a_dictionary_of_unknown_origin_is_read_in_silence(tmp_path, capsys):
    load_sae(trained(tmp_path), "lm-b", "layers.2")
    fastsae.SAE(d_in=4, d_sae=8, k=2).save_pretrained(tmp_path / "alone")
    load_sae(tmp_path / "alone", "lm-b", "layers.2")
    assert capsys.readouterr().err == ""


def test_a_model_beside_another_has_its_tokenizer(tmp_path, capsys):
    """Its ids in another order are other tokens: analyze, match, explain and serve say so, all alike."""
    model, words = tiny_lm.model(n_layer=1), tiny_lm.tokenizer()
    for name in ("own", "other"):
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    own, other = str(tmp_path / "own"), str(tmp_path / "other")
    assert load_beside(other, words, own).config.vocab_size == 257
    file = tmp_path / "other" / "tokenizer.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    ids = written["model"]["vocab"]
    written["model"]["vocab"] = {**ids, "a": ids["b"], "b": ids["a"]}
    file.write_text(json.dumps(written), encoding="utf-8")
    wanted = f"{own} and {other} must share a tokenizer: they read the same tokens"
    with pytest.raises(FastSAEError, match=re.escape(wanted)):
        load_beside(other, words, own)

    fastsae.SAE(d_in=24, d_sae=30, k=4, activation="topk").save_pretrained(tmp_path / "sae")
    sae, control = str(tmp_path / "sae"), ["--control-sae", str(tmp_path / "sae"), "--control-model", other]
    second = ["--other-sae", sae, "--other-model", other]
    for verb, more in (("analyze", second), ("analyze", control), ("match", second), ("explain", control)):
        out = tmp_path / f"{verb}{more[0]}"
        assert cli.main([verb, "--sae", sae, "--model", own, "--out", str(out), *more]) == 2
        assert capsys.readouterr().err == f"fastsae: {wanted}\n"
    beside = Inputs(Path(sae), own, other_sae=Path(sae), other_model=other, given=True)
    stored: Any = SimpleNamespace(tokenizer=None)
    with pytest.raises(FastSAEError, match=re.escape(wanted)):
        open_live(stored, beside)


def test_features_that_there_are_not():
    check_features([0, 7], 8)
    with pytest.raises(FastSAEError, match="features must be numbers from 0 to 7, got 8"):
        check_features([3, 8], 8)
