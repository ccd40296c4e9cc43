"""The server against the library's own answers, under hostile questions, and under twenty at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from fastsae.analysis.cards import Cards
from fastsae.analysis.passes import take_survey
from fastsae.analysis.stream import Source
from fastsae.dashboard.live import Live
from fastsae.dashboard.server import create_app
from tests.analysis_case import HOOK, case, documents

TEXTS = documents(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    sae, model, tokenizer = case()
    (survey,) = take_survey(
        Source(sae, model, HOOK), tokenizer, TEXTS, categories=("Arabic", "base64"), context=32, show_progress=False
    )
    made = tmp_path_factory.mktemp("report")
    survey.save(made / "survey.npz")
    return made


@pytest.fixture(scope="module")
def live(folder: Path) -> Live:
    from fastsae.analysis.survey import Survey

    sae, model, tokenizer = case()
    other, other_model, _ = case(seed=1)
    cards = Cards(Survey.load(folder / "survey.npz"))
    return Live(
        Source(sae, model, HOOK), tokenizer, TEXTS, maximum=cards.maximum(), context=32,
        other=Source(other, other_model, HOOK),
    )  # fmt: skip


@pytest.fixture(scope="module")
def client(folder: Path, live: Live) -> Any:
    with TestClient(create_app(folder, live), base_url="http://127.0.0.1") as made:
        yield made


def finished(client: Any, job: dict, seconds: float = 60) -> dict:
    end = time.monotonic() + seconds
    while job["state"] in ("waiting", "running"):
        assert time.monotonic() < end
        time.sleep(0.02)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


def test_smoke(client: Any):
    print(client.get("/api/status").json())
    print(client.get("/api/overview").json())
    print(client.get("/api/features?limit=2&sort=density&descending=true").json())
    print(str(client.get("/api/features/3").json())[:600])
    print(str(client.post("/api/activations", json={"text": "the cat قطة <|end|>"}).json())[:900])
    r = client.post("/api/steer", json={"edits": [{"feature": 3}]})
    print(r.status_code, finished(client, r.json()))
    for name in ("arabic", "Hebrew", "regex:[aeiou]"):
        r = client.post("/api/proxies", json={"name": name, "tokens": 2000})
        print(r.status_code, str(finished(client, r.json()))[:700])
    r = client.post("/api/compare", json={"tokens": 2000})
    print(r.status_code, finished(client, r.json()))
    print(str(client.get("/api/compare?limit=2").json())[:700])
