"""Saving and loading an SAE."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from fastsae.config import SAEConfig
from fastsae.errors import CheckpointError, MissingDependencyError
from fastsae.sae import SAE
from tests.test_sae import D, F, data, make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_saved_and_loaded_it_is_the_same(tmp_path, dtype) -> None:
    sae = make("topk", dtype=dtype)
    sae.set_input_normalisation(torch.arange(float(D)), 0.5)
    sae.loss(data(8, D))
    sae.save_pretrained(tmp_path / "a" / "sae")
    again = SAE.from_pretrained(tmp_path / "a" / "sae")
    assert again.cfg == sae.cfg and again.dtype == sae.dtype and again.training
    for (name, a), b in zip(sae.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in again.parameters())
    x = data(4, D, dtype=sae.dtype)
    assert torch.equal(again(x), sae(x))
    config = json.loads((tmp_path / "a" / "sae" / "cfg.json").read_text())
    assert config["format"] == "fastsae" and config["format_version"] == 1
    assert sorted(p.name for p in (tmp_path / "a" / "sae").iterdir()) == ["cfg.json", "sae.safetensors"]


def test_the_dtype_that_is_saved_is_the_one_it_has(tmp_path) -> None:
    sae = SAE(d_in=D, d_sae=F).to(torch.bfloat16)
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and again.cfg == replace(sae.cfg, dtype="bfloat16")


def test_what_cannot_be_loaded_says_why(tmp_path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    SAE(d_in=D, d_sae=F).save_pretrained(good)

    def refused(match: str, **change) -> None:
        bad.mkdir(exist_ok=True)
        (bad / "sae.safetensors").write_bytes((good / "sae.safetensors").read_bytes())
        (bad / "cfg.json").write_text(json.dumps(json.loads((good / "cfg.json").read_text()) | change))
        with pytest.raises(CheckpointError, match=match):
            SAE.from_pretrained(bad)

    refused("was not written by fastsae", format="other")
    refused("format version 99, this fastsae reads 1", format_version=99)
    refused("does not describe a dictionary", shape="round")
    refused("does not describe a dictionary: k must be", k=0)
    refused("come from different saves", seed=9)
    (bad / "sae.safetensors").write_bytes((good / "sae.safetensors").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cannot be read"):
        SAE.from_pretrained(bad)
    (bad / "sae.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no sae.safetensors"):
        SAE.from_pretrained(bad)
    (bad / "cfg.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        SAE.from_pretrained(bad)
    (bad / "cfg.json").unlink()
    with pytest.raises(CheckpointError, match="has no cfg.json"):
        SAE.from_pretrained(bad)
    with pytest.raises(CheckpointError, match="no folder"):
        SAE.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="expected a folder"):
        SAE.from_pretrained(good / "cfg.json")


def test_a_hub_id_is_looked_up_where_there_is_no_such_folder(tmp_path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    sae = SAE(d_in=D, d_sae=F)
    sae.save_pretrained(tmp_path)
    asked = []

    def download(name, revision, allow_patterns) -> str:
        asked.append((name, revision, sorted(allow_patterns)))
        if name == "some/absent":
            raise OSError("404\nmore about it")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert torch.equal(SAE.from_pretrained("some/sae", revision="v1").W_dec, sae.W_dec)
    wanted = ["cfg.json", "sae-*-of-*.safetensors", "sae.safetensors", "sae.safetensors.index.json"]
    assert asked == [("some/sae", "v1", wanted)]
    with pytest.raises(CheckpointError, match="the hub did not give it: 404$"):
        SAE.from_pretrained("some/absent")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="install huggingface_hub"):
        SAE.from_pretrained("some/sae")


def test_a_configuration_with_further_fields_leaves_them_out(tmp_path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wider(SAEConfig):
        steps: int = 3

    sae = SAE(Wider(d_in=D, d_sae=F))
    assert type(sae.cfg) is SAEConfig
    sae.save_pretrained(tmp_path)
    assert SAE.from_pretrained(tmp_path).cfg == sae.cfg


def test_a_save_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    sae = SAE(d_in=D, d_sae=F)
    sae.save_pretrained(tmp_path)
    before = (tmp_path / "sae.safetensors").read_bytes()

    def full(path, tensors, metadata) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastsae.tensorfile.write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        SAE(d_in=D, d_sae=F, seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "sae.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write"):
        sae.save_pretrained(tmp_path / "file")
