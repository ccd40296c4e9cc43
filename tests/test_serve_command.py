"""`fastsae serve`: what it finds of a report, and what it says where something is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from fastsae import cli
from fastsae.analysis.stream import Source
from fastsae.analysis.survey import Survey
from fastsae.dashboard import run
from fastsae.dashboard.live import Live
from fastsae.dashboard.run import Inputs
from fastsae.dashboard.server import create_app
from fastsae.dashboard.stored import Stored
from fastsae.errors import FastSAEError
from tests.analysis_case import HOOK, case
from tests.serve_case import CONTEXT, LOCAL, TEXTS, finished, save_run


def test_without_a_model_the_report_is_served_and_says_why_the_rest_is_off(folder: Path):
    with TestClient(create_app(folder, None, note="the model moved out"), base_url=LOCAL) as client:
        status = client.get("/api/status").json()
        assert status["live"] is False and status["note"] == "the model moved out"
        assert client.get("/api/features/3").status_code == 200
        assert client.post("/api/proxies", json={"name": "Arabic"}).json()["state"] == "done"
        for path, asked in (("activations", {"text": "x"}), ("steer", {"edits": [{"feature": 1}]}), ("compare", {}),
                            ("proxies", {"name": "Thai"})):  # fmt: skip
            answer = client.post(f"/api/{path}", json=asked)
            assert answer.status_code == 409 and answer.json() == {"detail": "the model moved out"}


def test_a_dictionary_or_tokenizer_that_does_not_fit(folder: Path):
    sae, model, tokenizer = case()
    with pytest.raises(FastSAEError, match="of 39 features, the dictionary has 40"):
        Live(Source(sae, model, HOOK), tokenizer, maximum=np.ones(39))
    with pytest.raises(FastSAEError, match="reads activations of width 24"):
        Live(Source(sae, model, "transformer.h.0"), tokenizer)
    with pytest.raises(FastSAEError, match="no module 'nowhere'"):
        Live(Source(sae, model, "nowhere"), tokenizer)
    tokenizer.add_tokens(["extra"])
    with pytest.raises(FastSAEError, match="the tokenizer has 258 entries, the model embeds 257"):
        Live(Source(sae, model, HOOK), tokenizer)


def test_values_that_break_the_model_are_told(client: Any, live: Live):
    with torch.no_grad():
        before = live.source.model.lm_head.weight.clone()
        live.source.model.lm_head.weight.fill_(torch.finfo(torch.float32).max)
    try:
        job = finished(client, client.post("/api/steer", json={"edits": [{"feature": 1, "value": 1e6}]}).json())
    finally:
        with torch.no_grad():
            live.source.model.lm_head.weight.copy_(before)
    assert job["state"] == "failed" and "not finite" in job["error"]


def fails(capsys: Any, *argv: str) -> str:
    assert cli.main(["serve", *argv]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastsae: ")
    return line


def test_bad_input_is_one_line(folder: Path, tmp_path: Path, capsys: Any):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is in use: choose another" in fails(capsys, str(folder), "--port", port)
    assert "make one with fastsae analyze" in fails(capsys, str(tmp_path), "--port", "0")
    assert "make one with fastsae analyze" in fails(capsys, str(tmp_path / "nowhere"), "--port", "0")
    assert "give --model too" in fails(capsys, str(folder), "--port", "0", "--sae", "x")
    assert "as host, got 'no.such.host.invalid'" in fails(capsys, str(folder), "--host", "no.such.host.invalid")
    assert "port must be" in fails(capsys, str(folder), "--port", "70000")
    sae, _ = save_run(tmp_path)
    assert "nowhere" in fails(
        capsys, str(folder), "--port", "0", "--sae", str(sae), "--model", str(tmp_path / "nowhere")
    )


def test_the_model_is_the_one_that_the_report_remembers(folder: Path, tmp_path: Path):
    sae, model = save_run(tmp_path)
    (tmp_path / "text.txt").write_text("\f\n".join(text + "\n" for text in TEXTS), encoding="utf-8")
    given = {"kind": "analysis", "sae": str(sae), "model": str(model), "hook": HOOK, "text": str(tmp_path / "text.txt")}
    (tmp_path / "run.json").write_text(json.dumps({**given, "other_sae": None}), encoding="utf-8")
    inputs = run.Inputs.of_report(tmp_path)
    stored = Stored(folder)
    live, note = run.open_live(stored, inputs.but(sae=None))
    assert note is None and live is not None and live.context == CONTEXT and live.describe()["model"] == "lm"
    live, note = run.open_live(stored, run.replace(inputs, model=str(tmp_path / "gone")))
    assert live is None and note is not None and note.startswith("live questions are off: ") and "\n" not in note
    live, note = run.open_live(stored, run.Inputs.of_report(folder))
    assert live is None and note is not None and "give --sae and --model" in note
    with pytest.raises(FastSAEError):
        run.open_live(stored, inputs.but(model=str(tmp_path / "gone")))


def test_addresses():
    assert run.is_loopback("127.0.0.1") and run.is_loopback("::1") and run.is_loopback("localhost")
    assert not run.is_loopback("0.0.0.0") and not run.is_loopback("example.org") and not run.is_loopback("::")


def test_another_dictionary_or_model_than_the_reports_is_told(folder: Path, tmp_path: Path, capsys: Any):
    sae, model = save_run(tmp_path)
    asked = Inputs(sae, str(model), HOOK, given=True)
    live, note = run.open_live(Stored(folder), asked)
    assert live is not None and note is None
    live.source.sae.save_pretrained(tmp_path / "other")
    with torch.no_grad():
        live.source.sae.W_dec.mul_(2)
        live.source.model.transformer.wte.weight.mul_(2)
    live.source.sae.save_pretrained(tmp_path / "other")
    live.source.model.save_pretrained(model)
    live, note = run.open_live(Stored(folder), replace(asked, sae=tmp_path / "other"))
    assert live is not None and note is not None and "another dictionary and model than the report" in note
    with TestClient(create_app(folder, live, note=note), base_url=LOCAL) as client:
        assert client.get("/api/status").json()["note"] == note
        assert client.post("/api/activations", json={"text": "x"}).status_code == 200


def test_a_model_with_another_tokenizer_is_refused(folder: Path, tmp_path: Path):
    sae, model = save_run(tmp_path)
    stored = Stored(folder)
    stored.overview["tokenizer"] = "0" * 16
    with pytest.raises(FastSAEError, match="made with another tokenizer than"):
        run.open_live(stored, Inputs(sae, str(model), HOOK, given=True))
    live, note = run.open_live(stored, Inputs(sae, str(model), HOOK))  # as remembered
    assert live is None and note is not None and "another tokenizer" in note


@pytest.mark.parametrize("kind", ["flipped", "short", "without maximum"])
def test_a_damaged_survey_is_one_line(folder: Path, tmp_path: Path, kind: str):
    shutil.copytree(folder, tmp_path / "report")
    path = tmp_path / "report" / "survey.npz"
    whole = bytearray(path.read_bytes())
    if kind == "flipped":
        whole[200:260] = bytes(60)  # of the first array
        path.write_bytes(whole)
    elif kind == "short":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        with np.load(path) as file:
            np.savez(path, **{name: file[name] for name in file.files if name not in ("maximum", "about")})
    stored = Stored(tmp_path / "report")
    with pytest.raises(FastSAEError, match="survey.npz is damaged"):
        _ = [stored.maximum, stored.of, *(stored.proxy_sums(p) for p in range(2))]
    with TestClient(create_app(tmp_path / "report"), base_url=LOCAL) as client:
        assert client.get("/api/features/3").status_code == 200
        assert client.post("/api/proxies", json={"name": "Arabic"}).status_code in (202, 400)


def test_the_survey_is_not_needed(folder: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    for part in ("index.html", *(f"data/{path.name}" for path in (folder / "data").glob("*.js"))):
        shutil.copyfile(folder / part, tmp_path / part)
    stored = Stored(tmp_path)
    exact = Survey.load(folder / "survey.npz").maximum.max(0)
    np.testing.assert_allclose(stored.maximum, exact, rtol=6e-3)
    assert stored.context is None and stored.proxy_sums(0) is None and stored.match is None
    with TestClient(create_app(tmp_path), base_url=LOCAL) as client:
        assert client.get("/api/compare").status_code == 404
        assert client.post("/api/proxies", json={"name": "Arabic"}).status_code == 409


@pytest.mark.slow
def test_it_serves_until_ctrl_c(folder: Path, tmp_path: Path):
    sae, model = save_run(tmp_path)
    (tmp_path / "text.txt").write_text("\f\n".join(text + "\n" for text in TEXTS), encoding="utf-8")
    options = {"sae": sae, "model": model, "hook": HOOK, "text": tmp_path / "text.txt", "port": 0}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "fastsae", "serve", str(folder), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"}) as server:
        assert server.stderr is not None
        said, address = [], None
        while address is None:
            line = server.stderr.readline()
            assert line, said
            said.append(line)
            address = re.search(r"http://\S+/", line)
        with urllib.request.urlopen(f"{address[0]}api/status", timeout=20) as answer:
            assert json.load(answer)["live"] is True and answer.headers["server"] is None
        server.send_signal(signal.SIGINT)
        rest = server.stderr.read()
        assert server.wait(20) == 0 and "Traceback" not in rest


def test_another_address_is_used_only_with_a_warning(folder: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.setattr(run, "serve", lambda *_: None)
    assert cli.main(["serve", str(folder), "--port", "0", "--host", "0.0.0.0"]) == 0
    said = capsys.readouterr().err
    assert "warning: whoever can reach 0.0.0.0" in said and "live questions are off" in said
    assert cli.main(["serve", str(folder), "--port", "0"]) == 0
    assert "warning" not in capsys.readouterr().err
