"""The server against numpy and the library's own parts, with hostile questions, and with twenty at once."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from fastsae import cli
from fastsae.analysis import steering
from fastsae.analysis.effects import FeatureEdit
from fastsae.analysis.stream import Source
from fastsae.analysis.survey import Survey
from fastsae.analysis.text import scoring_half
from fastsae.analysis.universality import MatchConfig, match
from fastsae.dashboard import run, schemas
from fastsae.dashboard.live import Live
from fastsae.dashboard.server import create_app
from fastsae.dashboard.stored import Stored
from fastsae.errors import FastSAEError
from tests.analysis_case import HOOK, case, contexts, neurons
from tests.serve_case import CONTEXT, TEXTS, hostile, make_live, make_report, save_run

LOCAL = "http://127.0.0.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    made = tmp_path_factory.mktemp("report")
    make_report(made)
    return made


@pytest.fixture(scope="module")
def live(folder: Path) -> Live:
    return make_live(Stored(folder).maximum)


@pytest.fixture(scope="module")
def client(folder: Path, live: Live) -> Any:
    with TestClient(create_app(folder, live), base_url=LOCAL) as made:
        yield made


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    """Of all tokens of the text, from dense codes: f [n, F], x [n, D], and what is known of each token."""
    sae, model, tokenizer = case()
    x = neurons(model, contexts(tokenizer, TEXTS, CONTEXT))
    marks = [(c, half) for text, half in zip(TEXTS, scoring_half(TEXTS), strict=True) for c in text for _ in c.encode()]
    return {
        "f": sae.encode(x).detach().numpy().astype(np.float64),
        "x": x.numpy().astype(np.float64),
        "arabic": np.array([c > "\u0590" for c, _ in marks]),
        "vowel": np.array([c in "aeiou" for c, _ in marks]),
        "scored": np.array([half for _, half in marks]),
    }


def finished(client: Any, job: dict, seconds: float = 60) -> dict:
    """The job when it is over."""
    end = time.monotonic() + seconds
    while job["state"] in ("waiting", "running"):
        assert time.monotonic() < end, job
        time.sleep(0.01)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


def post(client: Any, path: str, asked: Any) -> Any:
    """As a page sends it: JSON in ASCII, which can carry half a surrogate pair."""
    return client.post(f"/api/{path}", content=json.dumps(asked), headers={"content-type": "application/json"})


def done(client: Any, path: str, **asked: Any) -> dict:
    answer = client.post(f"/api/{path}", json=asked)
    assert answer.status_code == 202, answer.text
    job = finished(client, answer.json())
    assert job["state"] == "done", job
    return job["result"]


def r_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's r of every column of a with b."""
    return np.nan_to_num([np.corrcoef(column, b.astype(float))[0, 1] if column.std() else 0.0 for column in a.T])


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_list_is_sorted_searched_and_cut(client: Any, truth: dict):
    density = (truth["f"] > 0).mean(0)
    answer = client.get("/api/features?sort=density&descending=true&offset=3&limit=5").json()
    assert answer["total"] == 40 and answer["offset"] == 3
    order = np.argsort(-np.array([float(f"{d:.3g}") for d in density]), kind="stable")
    assert [row["feature"] for row in answer["rows"]] == order[3:8].tolist()
    for row in answer["rows"]:
        assert row["density"] == pytest.approx(density[row["feature"]], rel=6e-3)
    rows = client.get("/api/features?search=17").json()["rows"]
    assert [row["feature"] for row in rows] == [17]
    arabic = client.get("/api/features?search=ARABIC&limit=1000").json()
    assert {row["proxy"] for row in arabic["rows"]} == {"Arabic"} and 0 < arabic["total"] < 40
    assert client.get("/api/features?search=nowhere").json()["rows"] == []
    refused = client.get("/api/features?sort=beauty")
    assert refused.status_code == 400 and "one of feature, density" in refused.json()["detail"]


def test_a_card_is_that_of_the_site(client: Any, folder: Path, truth: dict):
    from fastsae.dashboard.site import read_card

    card = client.get("/api/features/7").json()
    assert card == json.loads(json.dumps(read_card(folder, 7)))
    assert card["max"] == pytest.approx(truth["f"][:, 7].max(), rel=1e-3)
    assert sum(card["histogram"]["counts"]) == (truth["f"][:, 7] > 0).sum()
    for wrong in ("40", "-1", "99999999999999999999"):
        answer = client.get(f"/api/features/{wrong}")
        assert answer.status_code == 404 and "0 to 39" in answer.json()["detail"]
    assert client.get("/api/features/seven").status_code == 422
    assert client.get("/api/overview").json()["d_sae"] == 40


def test_the_report_s_comparison(client: Any, folder: Path):
    found = json.loads((folder / "match.json").read_text(encoding="utf-8"))
    live_one, client.app.state.server.match = client.app.state.server.match, None
    try:
        answer = client.get("/api/compare?limit=3").json()
    finally:
        client.app.state.server.match = live_one
    values = np.array([np.nan if r is None else r for r in found["pearson"]])
    best = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")[:3]
    assert [row["feature"] for row in answer["rows"]] == best.tolist()
    assert answer["rows"][0]["best"] == found["best"][best[0]] and answer["total"] == 40
    assert answer["medians"]["pearson"] == pytest.approx(found["medians"]["pearson"])


# --- live -----------------------------------------------------------------------------------------------------------


def dense(text: str) -> np.ndarray:
    """Activations of every token of a text, as contexts of CONTEXT tokens: [n, F]."""
    sae, model, tokenizer = case()
    return sae.encode(neurons(model, contexts(tokenizer, [text], CONTEXT))).detach().numpy()


def check_activations(found: dict, text: str, f: np.ndarray) -> None:
    assert [token["id"] for token in found["tokens"]] == case()[2](text, add_special_tokens=False)["input_ids"]
    for token, row in zip(found["tokens"], f, strict=True):
        assert token["count"] == (row > 0).sum()
        assert [g for g, _ in token["top"]] == np.argsort(-row, kind="stable")[: min(8, token["count"])].tolist()
    assert found["active"] == (f > 0).any(0).sum()
    for it in found["features"]:
        column = f[:, it["feature"]]
        assert it["peak"] == pytest.approx(column.max(), rel=1e-4) and it["at"] == column.argmax()
        at, values = zip(*it["values"], strict=True)
        assert list(at) == np.flatnonzero(column > 0).tolist() and it["count"] == len(at)
        np.testing.assert_allclose(values, column[list(at)], atol=1e-4)


def test_which_features_fire_on_which_token(client: Any, truth: dict):
    text = "the cat قطة على سجادة and the red ball"  # of more than one context
    found = client.post("/api/activations", json={"text": text}).json()
    check_activations(found, text, dense(text))
    shares = [it["peak"] / it["maximum"] for it in found["features"]]
    assert shares == sorted(shares, reverse=True)
    it = found["features"][0]
    assert it["maximum"] == pytest.approx(truth["f"][:, it["feature"]].max(), rel=1e-5)


def test_tokens_as_a_reader_sees_them(client: Any):
    found = client.post("/api/activations", json={"text": "a<|end|>\u202eق"}).json()["tokens"]
    assert found[0]["text"] == "a" and found[1] == {"text": "<|end|>", "id": 0, "special": True, "count": 0, "top": []}
    assert [t["text"] for t in found[2:5]] == ["‹E2›", "‹80›", "‹U+202E›"]  # the mark that turns the line is not sent
    assert [t["text"] for t in found[5:]] == ["‹D9›", "ق"]
    assert client.post("/api/activations", json={"text": "<|end|>"}).json()["active"] == 0


def test_steering_is_steering(client: Any, live: Live, truth: dict):
    edits = [{"feature": 3, "multiple": 2}, {"feature": 9, "mode": "add", "value": 1.5}, {"feature": 4, "mode": "ablate"}]
    asked = {"prompts": ["the cat", ""], "tokens": 12, "samples": 2, "seed": 5, "temperature": 0.8}
    found = done(client, "steer", edits=edits, **asked)
    assert found["edits"][0]["value"] == pytest.approx(2 * truth["f"][:, 3].max(), rel=1e-5)
    made = [FeatureEdit(3, found["edits"][0]["value"]), FeatureEdit(9, 1.5, "add"), FeatureEdit(4, mode="ablate")]
    sae, model, tokenizer = case()
    wanted = steering.steer(sae, model, tokenizer, asked["prompts"], HOOK, made, tokens=12, samples=2, seed=5, temperature=0.8)
    for one, other in zip(found["prompts"], wanted, strict=True):
        for side in ("plain", "steered"):
            assert [c["token_ids"] for c in one[side]] == [c.token_ids for c in getattr(other, side)]
    assert found["prompts"][0]["plain"] != found["prompts"][0]["steered"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"edits": [{"feature": 40}]}, "0 to 39"),
        ({"edits": [{"feature": 3}, {"feature": 3}]}, "one edit for each feature"),
        ({"edits": [{"feature": 3, "mode": "pin", "value": 1e6}], "prompts": ["x" * 600]}, "at most 512"),
    ],
)
def test_edits_that_cannot_be_meant(client: Any, asked: dict, words: str):
    answer = client.post("/api/steer", json=asked)
    assert answer.status_code == 400 and words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("steer", {"edits": []}),
        ("steer", {"edits": [{"feature": 1}] * 17}),
        ("steer", {"edits": [{"feature": 1}], "tokens": 201}),
        ("steer", {"edits": [{"feature": 1}], "samples": 5}),
        ("steer", {"edits": [{"feature": 1}], "prompts": [""] * 5}),
        ("steer", {"edits": [{"feature": 1}], "temperature": -1}),
        ("steer", {"edits": [{"feature": 1, "value": 1e9}]}),
        ("steer", {"edits": [{"feature": 1, "mode": "explode"}]}),
        ("steer", {"edits": [{"feature": 1}], "tokns": 3}),
        ("activations", {"text": ""}),
        ("activations", {"text": "x" * 10_001}),
        ("activations", {"text": 3}),
        ("proxies", {"name": "x" * 501}),
        ("proxies", {"name": "Arabic", "tokens": 10**9}),
        ("compare", {"tokens": 0}),
    ],
)
def test_inputs_are_bounded(client: Any, path: str, asked: dict):
    answer = client.post(f"/api/{path}", json=asked)
    assert answer.status_code == 422
    assert len(answer.json()["detail"]) <= 500 and "\n" not in answer.json()["detail"]


def test_a_text_of_too_many_tokens(client: Any):
    answer = client.post("/api/activations", json={"text": "ق" * 600})
    assert answer.status_code == 400 and "1200 tokens, at most 1024" in answer.json()["detail"]


def test_nan_is_no_number(client: Any):
    body = '{"edits": [{"feature": 1, "value": NaN}]}'
    assert client.post("/api/steer", content=body, headers={"content-type": "application/json"}).status_code == 422
    assert client.post("/api/steer", content="{", headers={"content-type": "application/json"}).status_code == 422


def check_scores(found: dict, truth: dict, label: np.ndarray, top: int = 20) -> None:
    scored = truth["scored"]
    chosen, r = r_of(truth["f"][~scored], label[~scored]), r_of(truth["f"][scored], label[scored])
    assert found["members"] == label.sum() and found["tokens"] == len(label)
    assert [row["feature"] for row in found["features"]] == np.argsort(-chosen, kind="stable")[:top].tolist()
    np.testing.assert_allclose(found["pearson"], r_of(truth["f"], label), atol=2e-4)
    for row in found["features"]:
        on = truth["f"][scored, row["feature"]] > 0
        assert row["pearson"] == pytest.approx(r[row["feature"]], abs=1e-5)
        assert row["specificity"] == pytest.approx(label[scored][on].mean())
        assert row["recall"] == pytest.approx(on[label[scored]].mean())
        assert row["lift"] == pytest.approx(label[scored][on].mean() / label[scored].mean())
    best = int(r_of(truth["x"][~scored], label[~scored]).argmax())
    assert found["neuron"]["neuron"] == best
    assert found["neuron"]["pearson"] == pytest.approx(r_of(truth["x"][scored], label[scored])[best], abs=1e-5)


def test_a_proxy_that_the_report_knows_takes_no_pass(client: Any, truth: dict):
    answer = client.post("/api/proxies", json={"name": "arabic"})
    assert answer.json()["state"] == "done" and answer.json()["result"]["source"] == "report"
    check_scores(answer.json()["result"], truth, truth["arabic"])


def test_a_new_proxy_takes_a_pass_and_the_list_sorts_by_it(client: Any, truth: dict):
    found = done(client, "proxies", name="vowels=regex:[aeiou]", tokens=100_000)
    assert found["source"] == "text" and found["name"] == "vowels"
    check_scores(found, truth, truth["vowel"])
    rows = client.get("/api/features?sort=proxy:vowels&descending=true&limit=1").json()["rows"]
    assert rows[0]["feature"] == int(r_of(truth["f"], truth["vowel"]).argmax())


@pytest.mark.parametrize("name", ["Klingon", "regex:(", "regex:" + "(" * 400, "tokens:", "ids:x", "regex:\\p{Nope}"])
def test_a_proxy_that_means_nothing(client: Any, name: str):
    answer = client.post("/api/proxies", json={"name": name})
    assert answer.status_code == 400 and len(answer.json()["detail"]) > 20


@pytest.mark.parametrize(("name", "words"), [("Thai", "0 of"), ("regex:(?:[a-z ]|[a-z])+[0-9]", "takes too long")])
def test_a_proxy_of_which_nothing_can_be_said(client: Any, monkeypatch: Any, name: str, words: str):
    monkeypatch.setattr("fastsae.dashboard.live.REGEX_SECONDS", 0.05)
    job = finished(client, client.post("/api/proxies", json={"name": name}).json())
    assert job["state"] == "failed" and words in job["error"]


def test_two_dictionaries_compared_live(client: Any):
    found = done(client, "compare", tokens=100_000)
    sae, model, tokenizer = case()
    other, other_model, _ = case(seed=1)
    config = MatchConfig(context=CONTEXT, shuffled_control=False)
    wanted = match(Source(sae, model, HOOK), Source(other, other_model, HOOK), tokenizer, TEXTS, config, show_progress=False)
    assert found["medians"]["pearson"] == pytest.approx(wanted.medians()["pearson"], abs=1e-6)
    rows = client.get("/api/compare?sort=feature&descending=false&limit=1000").json()["rows"]
    assert [row["best"] for row in rows] == [None if b < 0 else b for b in wanted.best.tolist()]


# --- many at once ---------------------------------------------------------------------------------------------------


def test_twenty_at_once_are_right_while_the_model_is_edited(client: Any):
    texts = [f"the dog ran to town {n} with {'قطة' if n % 2 else 'his red ball'}" for n in range(20)]
    wanted = [dense(text) for text in texts]
    asked = {"edits": [{"feature": f, "value": 5.0} for f in range(8)], "prompts": ["the", "cat"], "tokens": 120, "samples": 4}
    jobs = [client.post("/api/steer", json=asked).json() for _ in range(3)]
    start = threading.Barrier(20)

    def one(text: str) -> dict:
        start.wait()
        return client.post("/api/activations", json={"text": text}).json()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, texts))
    for found, text, f in zip(answers, texts, wanted, strict=True):
        check_activations(found, text, f)
    results = [finished(client, job)["result"] for job in jobs]
    assert results[0] == results[1] == results[2]  # nobody's edit was on anybody else's text


def test_generation_is_queued_one_at_a_time_bounded_and_cancelled(client: Any):
    asked = {"edits": [{"feature": 1, "value": 1.0}], "tokens": 200, "samples": 4, "prompts": ["the"] * 4}
    jobs, refused = [], None
    for _ in range(30):
        answer = client.post("/api/steer", json=asked)
        if answer.status_code != 202:
            refused = answer
            break
        jobs.append(answer.json())
    assert refused is not None and refused.status_code == 429 and "wait already" in refused.json()["detail"]
    states = [client.get(f"/api/jobs/{job['id']}").json() for job in jobs]
    assert sum(job["state"] == "running" for job in states) <= 1 and len(jobs) <= 10
    waiting = [job for job in states if job["state"] == "waiting"]
    assert [job["ahead"] for job in waiting][-1] > 1
    for job in reversed(jobs):
        assert client.delete(f"/api/jobs/{job['id']}").status_code == 200
    over = [finished(client, job, 10) for job in jobs]
    assert all(job["state"] in ("cancelled", "done") for job in over) and over[-1]["state"] == "cancelled"
    cut = [job for job in over if job["state"] == "cancelled" and job["done"]]
    assert all(job["done"] < job["total"] for job in cut)
    f = dense("the cat")
    check_activations(client.post("/api/activations", json={"text": "the cat"}).json(), "the cat", f)  # no edit is left


def test_unknown_jobs(client: Any):
    for answer in (client.get("/api/jobs/nobody"), client.delete("/api/jobs/nobody")):
        assert answer.status_code == 404 and "no job 'nobody'" in answer.json()["detail"]


# --- without a model ------------------------------------------------------------------------------------------------


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


# --- safety ---------------------------------------------------------------------------------------------------------

SECRETS = ["survey.npz", "match.npz", ".hidden.js", "data/../survey.npz", "lm/config.json", "data/.hidden.js", "../secret.js"]
SECRETS += ["data/../../secret.js", "data\\..\\..\\secret.js", "//secret.js", "data//overview.js", "data/link.js", "data/elsewhere/secret.js"]
SECRETS += ["/etc/passwd", "data/" + "a" * 400 + ".js", "data/" + "a/" * 200 + "b.js", "data", "data/", "data/overview.js/", "data/\0.js"]


def raw(app: Any, path: str, method: str = "GET", headers: dict | None = None, body: list[bytes] | None = None) -> tuple[int, dict, bytes]:
    """(status, headers, body) of a path that no client has tidied up."""
    sent: list[Any] = []
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in body or []]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        if not waiting:
            await asyncio.Event().wait()  # a client that stays
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1", **(headers or {})}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode("utf-8", "replace"), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "headers": [(k.encode(), v.encode("latin-1")) for k, v in named.items()],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


def test_nothing_outside_the_site_can_be_read(folder: Path, tmp_path: Path):
    # A site of its own, beside what must not be read; the links lead there, not back into the site.
    root, outside = tmp_path / "site", tmp_path / "outside"
    for place in (root / "data", root / "assets", root / "lm", outside):
        place.mkdir(parents=True)
    for name in ("index.html", "data/overview.js", "data/rows-0.js"):
        shutil.copyfile(folder / name, root / name)
    for place in (root / "survey.npz", root / ".hidden.js", root / "data/.hidden.js", root / "lm/config.json", tmp_path / "secret.js",
                  outside / "secret.js"):  # fmt: skip
        place.write_text("secret", encoding="utf-8")
    (root / "data/link.js").symlink_to(outside / "secret.js")
    (root / "data/elsewhere").symlink_to(outside)
    app = create_app(root)
    for path in SECRETS:
        status, _, body = raw(app, "/" + path)
        assert status == 404 and b"secret" not in body, path
    status, headers, body = raw(app, "/")
    assert status == 200 and body == (root / "index.html").read_bytes() and headers["content-type"].startswith("text/html")
    status, headers, _ = raw(app, "/data/overview.js")
    assert status == 200 and headers["content-type"].startswith("text/javascript")
    assert raw(app, "/assets/server.js")[2] == b"fastsae.server = true;\n"
    assert raw(app, "/assets/live.js")[0] == raw(app, "/assets/live.css")[0] == 200


def test_every_answer_has_the_headers_of_safety(folder: Path):
    app = create_app(folder, None)
    cases = [("/", "GET"), ("/nothing", "GET"), ("/api/status", "GET"), ("/api/nothing", "GET"), ("/api/steer", "POST"),
             ("/api/openapi.json", "GET"), ("/data/overview.js", "GET"), ("/", "POST"), ("/", "TRACE")]  # fmt: skip
    for path, method in cases:
        status, headers, _ = raw(app, path, method)
        assert status < 500, path
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ") and "unsafe" not in policy, path
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in headers and "server" not in headers


def test_pages_of_other_sites_are_not_answered(folder: Path):
    app = create_app(folder, None)
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:8300"):
        status, _, body = raw(app, "/api/status", headers={"host": host})
        assert status == 400 and b"answers to" in body
    for host in ("localhost:8300", "127.0.0.1:8300", "[::1]:8300", "LOCALHOST"):
        assert raw(app, "/api/status", headers={"host": host})[0] == 200
    body = [json.dumps({"name": "Arabic"}).encode()]
    there = {"content-type": "application/json"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9", "http://[", "https://localhost"):
        assert raw(app, "/api/proxies", "POST", {**there, "origin": origin}, body)[0] == 403
    assert raw(app, "/api/proxies", "POST", {**there, "origin": "http://127.0.0.1"}, body)[0] == 202
    # Without a preflight a page may send text/plain only: that is no question.
    assert raw(app, "/api/proxies", "POST", {"content-type": "text/plain"}, body)[0] == 422
    assert raw(create_app(folder, None, hosts=None), "/api/status", headers={"host": "box.lan"})[0] == 200


def test_bodies_are_bounded_with_and_without_their_length(folder: Path):
    app = create_app(folder, None)
    there = {"content-type": "application/json"}
    for headers in ({"content-length": str(10**7)}, {"content-length": "9" * 30}, {"content-length": "-5"}, {"content-length": "x"}):
        assert raw(app, "/api/activations", "POST", {**there, **headers}, [b"{}"])[0] == 413
    parts = [b"x" * 65536] * (schemas.BODY_BYTES // 65536 + 1)
    status, _, body = raw(app, "/api/activations", "POST", there, parts)
    assert status == 413 and b"send less" in body


def ask_everywhere(client: Any, text: str) -> list[Any]:
    """The string through every input of the API."""
    part = quote(text[:3000], safe="", errors="surrogatepass")
    edit = {"feature": 1, "value": 1}
    answers = [
        post(client, "activations", {"text": text}),
        post(client, "steer", {"edits": [edit], "prompts": [text], "tokens": 1, "samples": 1}),
        post(client, "steer", {"edits": [{"feature": text, "mode": text}], text: text}),
        post(client, "proxies", {"name": text, "tokens": 1000}),
    ]
    answers += [client.get(f"/api/{path}{part}") for path in ("features?search=", "features?sort=", "compare?sort=", "features/", "jobs/")]
    answers += [client.get(f"/{part}"), client.get(f"/data/{part}"), client.delete(f"/api/jobs/{part}")]
    answers.append(client.post("/api/activations", content=text.encode("utf-8", "replace"), headers={"content-type": "application/json"}))
    return answers


def check_hostile(client: Any, strings: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("fastsae.dashboard.live.REGEX_SECONDS", 0.05)
    for text in strings:
        for answer in ask_everywhere(client, text):
            assert answer.status_code < 500, (text[:80], answer.request.url)
            if answer.status_code >= 400:
                detail = answer.json()["detail"]
                assert isinstance(detail, str) and 0 < len(detail) < 1500, (text[:80], detail)
            if answer.headers["content-type"].startswith("application/json"):
                answer.content.decode("utf-8")
            job = answer.json().get("id") if answer.status_code == 202 else None
            if job:
                client.delete(f"/api/jobs/{job}")


def test_hostile_strings_are_answered_or_refused(client: Any, monkeypatch: Any):
    check_hostile(client, hostile(70), monkeypatch)


@pytest.mark.slow
def test_a_thousand_hostile_strings(client: Any, monkeypatch: Any):
    check_hostile(client, hostile(1000)[70:], monkeypatch)


@pytest.mark.slow
def test_no_question_that_openapi_describes_or_forbids_breaks_the_server(folder: Path, live: Live):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    # ASGI transport has no Host of its own.
    app = create_app(folder, live, hosts=None)
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app)
    checks = [schemathesis.checks.not_a_server_error]
    operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        operations += 1

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            case.call_and_validate(checks=checks)

        ask()
    assert operations >= 11


# --- the command line -----------------------------------------------------------------------------------------------


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
    assert "nowhere" in fails(capsys, str(folder), "--port", "0", "--sae", str(sae), "--model", str(tmp_path / "nowhere"))


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
