"""The server's answers against numpy and the library's own parts, and with twenty questions at once."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsae.analysis import steering
from fastsae.analysis.effects import FeatureEdit
from fastsae.analysis.stream import Source
from fastsae.analysis.text import scoring_half
from fastsae.analysis.universality import MatchConfig, match
from fastsae.dashboard.live import Live
from tests.analysis_case import HOOK, case, contexts, neurons
from tests.serve_case import CONTEXT, TEXTS, finished


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
    words = client.get("/api/features?search=arab%20ic").json()  # each of them, in any order
    assert words["total"] == arabic["total"] == client.get("/api/features?search=IC%20arab").json()["total"]
    assert client.get("/api/features?search=arabic%20nowhere").json()["total"] == 0
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
    special = {"text": "<|end|>", "id": 0, "special": True, "part": False, "count": 0, "top": []}
    assert found[0]["text"] == "a" and found[1] == special
    # The mark that would turn the line comes as its number, a letter of two tokens whole at the second.
    assert [t["text"] for t in found[2:]] == ["‹E2›", "‹80›", "‹U+202E›", "‹D9›", "ق"]
    assert [t["part"] for t in found] == [False, False, True, True, False, True, False]
    assert client.post("/api/activations", json={"text": "<|end|>"}).json()["active"] == 0


def test_steering_is_steering(client: Any, live: Live, truth: dict):
    edits = [
        {"feature": 3, "multiple": 2},
        {"feature": 9, "mode": "add", "value": 1.5},
        {"feature": 4, "mode": "ablate"},
    ]
    asked = {"prompts": ["the cat", ""], "tokens": 12, "samples": 2, "seed": 5, "temperature": 0.8}
    found = done(client, "steer", edits=edits, **asked)
    assert found["edits"][0]["value"] == pytest.approx(2 * truth["f"][:, 3].max(), rel=1e-5)
    made = [FeatureEdit(3, found["edits"][0]["value"]), FeatureEdit(9, 1.5, "add"), FeatureEdit(4, mode="ablate")]
    sae, model, tokenizer = case()
    wanted = steering.steer(
        sae, model, tokenizer, asked["prompts"], HOOK, made, tokens=12, samples=2, seed=5, temperature=0.8
    )
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
    wanted = match(
        Source(sae, model, HOOK), Source(other, other_model, HOOK), tokenizer, TEXTS, config, show_progress=False
    )
    assert found["medians"]["pearson"] == pytest.approx(wanted.medians()["pearson"], abs=1e-6)
    rows = client.get("/api/compare?sort=feature&descending=false&limit=1000").json()["rows"]
    assert [row["best"] for row in rows] == [None if b < 0 else b for b in wanted.best.tolist()]


# --- many at once ---------------------------------------------------------------------------------------------------


def test_twenty_at_once_are_right_while_the_model_is_edited(client: Any):
    texts = [f"the dog ran to town {n} with {'قطة' if n % 2 else 'his red ball'}" for n in range(20)]
    wanted = [dense(text) for text in texts]
    asked = {
        "edits": [{"feature": f, "value": 5.0} for f in range(8)],
        "prompts": ["the", "cat"],
        "tokens": 120,
        "samples": 4,
    }
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
