"""Explaining through an endpoint: the whole protocol with a server that knows the answer, and every way it can fail."""

import dataclasses
import gc
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fastsae.analysis.explain import ExplainConfig, explain, explainer_of, prompts
from fastsae.analysis.explain.chat import ReplyCache
from fastsae.analysis.explain.endpoint import EndpointChat, EndpointConfig, read_key
from fastsae.analysis.explain.explainers import Budget, Session, Stopped
from fastsae.errors import FastSAEError
from tests import explain_case
from tests.chat_server import error, ok, oracle, serving
from tests.endpoint_case import ASK, chat, config, features, three, without_keys

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    without_keys(monkeypatch)


@pytest.fixture(scope="module")
def pairs():
    return three()


# --- the whole protocol --------------------------------------------------------------------------------------------


def test_a_model_that_knows_scores_one_and_is_accounted_for(pairs, tmp_path):
    with serving() as server:
        settings = config(server.url, prompt_price=3.0, completion_price=15.0)
        report = features(pairs, settings, tmp_path)
    for result in report["results"]["a"]:
        assert result.explanation == "Tokens in Arabic script." and result.failed is None
        assert result.spearman > 0.95 and result.spearman_weighted > 0.95
        assert result.detection == 1.0 and result.fuzzing == 1.0
        # 1 explanation, 60 windows and 40 and up to 40 to judge, 10 a request
        assert 9 <= result.accounting.requests <= 15 and result.shown >= 45 and result.windows >= 55
    total = report["accounting"]
    assert total.requests == len(server.seen) and total.retries == total.malformed == total.cached == 0
    assert (total.prompt_tokens, total.completion_tokens) == (100 * len(server.seen), 10 * len(server.seen))
    assert total.cost == pytest.approx(len(server.seen) * (100 * 3.0 + 10 * 15.0) / 1e6)
    saved = json.loads((tmp_path / "explain.json").read_text(encoding="utf-8"))
    assert saved["summary"]["a"]["detection"]["median"] == 1.0


def test_the_model_sees_levels_to_explain_and_none_to_predict(pairs):
    with serving() as server:
        explain(pairs[:1], explainer_of(config(server.url)), explain_case.bytes_of(), show_progress=False)
    first, *others = [body["messages"][-1]["content"] for body in server.seen]
    assert "these next tokens become likelier: \" the\", \" of\"" in first and "\" the\" 0" in first
    assert all("\" 0" not in text and "\" 9" not in text for text in others)
    held_out = {w.document for part in pairs[0][1].intervals for w in part}
    assert held_out and all(body["temperature"] == 0.0 for body in server.seen)


def test_a_second_run_asks_nothing(pairs, tmp_path):
    with serving() as server:
        settings = config(server.url)
        first = features(pairs, settings, tmp_path)
        asked = len(server.seen)
        again = features(pairs, settings, tmp_path)
        assert again["results"] == first["results"] and len(server.seen) == asked
        (tmp_path / "explain.jsonl").unlink()  # without the log the cache still has every answer
        cached = features(pairs, settings, tmp_path)
        assert len(server.seen) == asked and cached["accounting"].cached == asked
        assert [r.spearman for r in cached["results"]["a"]] == [r.spearman for r in first["results"]["a"]]
        other = dataclasses.replace(settings, seed=1)  # other windows: nothing of it may be reused
        features(pairs, other, tmp_path)
        assert len(server.seen) == 2 * asked


def test_a_line_that_a_crash_cut_off_is_done_again(pairs, tmp_path):
    with serving() as server:
        features(pairs, config(server.url), tmp_path)
        log = tmp_path / "explain.jsonl"
        log.write_text(log.read_text(encoding="utf-8")[:-30], encoding="utf-8")
        report = features(pairs, config(server.url), tmp_path)
    assert len(report["results"]["a"]) == 3 and len(log.read_text(encoding="utf-8").splitlines()) == 3
    log.write_text('{"other": 1}\n', encoding="utf-8")
    with pytest.raises(FastSAEError, match="is not a log of explanations"):
        features(pairs, config(server.url), tmp_path)


def test_the_budget_ends_the_run_and_the_next_goes_on(pairs, tmp_path):
    with serving() as server:
        settings = config(server.url, max_requests=20, concurrency=1)
        report = features(pairs, settings, tmp_path)
        assert len(server.seen) == 20 == report["accounting"].requests
        assert [bool(r.failed) for r in report["results"]["a"]] == [False, True, True]
        assert "budget" in report["results"]["a"][2].failed
        settings = config(server.url)
        report = features(pairs, settings, tmp_path)
        whole = len(server.seen)
        assert all(r.failed is None for r in report["results"]["a"])
    with serving() as fresh:
        features(pairs, config(fresh.url), None)
    assert whole == len(fresh.seen), "nothing was asked twice"


def test_requests_run_side_by_side_and_no_more_than_allowed(pairs):
    with serving(delay=0.05) as server:
        explain(pairs, explainer_of(config(server.url, concurrency=2)), explain_case.bytes_of(), show_progress=False)
    assert server.at_once == 2


def test_the_rate_limit_holds():
    with serving(then=lambda _: ok("hi")) as server:
        talker = chat(server.url, requests_per_minute=600.0)
        for _ in range(5):
            talker.complete(ASK, Session())
    assert server.times[-1] - server.times[0] >= 0.38  # four gaps of a tenth of a second


def test_ctrl_c_stops_the_threads_and_keeps_what_is_done(pairs, tmp_path):
    many = [tuple(dataclasses.replace(half, feature=k) for half in pair) for k, pair in enumerate(pairs * 5)]
    over = threading.Event()
    with serving(delay=0.03) as server:

        def stop() -> None:
            while len(server.seen) < 20 and not over.wait(0.01):
                pass
            while not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)
                over.wait(1)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.disable()  # what is raised in its callbacks, of which hypothesis has one, is lost
        try:
            threading.Thread(target=stop, daemon=True).start()
            with pytest.raises(KeyboardInterrupt):
                features(many, config(server.url), tmp_path)
        finally:
            over.set()
            gc.enable()
            signal.signal(signal.SIGINT, before)
        stopped = len(server.seen)
        time.sleep(0.3)
        assert len(server.seen) == stopped, "no request is sent after Ctrl-C"
        report = features(many, config(server.url), tmp_path)
    assert len(report["results"]["a"]) == 15 and all(r.failed is None for r in report["results"]["a"])
    assert len(server.seen) <= 15 * 15


# --- malformed answers ---------------------------------------------------------------------------------------------


def test_a_malformed_answer_is_asked_again_and_counted(pairs):
    with serving(oracle, ok("I think it is 7."), ok("1: 0 0 0")) as server:
        settings = config(server.url, concurrency=1)
        (result,) = explain(pairs[:1], explainer_of(settings), explain_case.bytes_of(), settings, show_progress=False)
    assert result.accounting.malformed == 2 and result.failed is None and result.spearman is not None
    assert result.spearman > 0.95
    assert server.seen[1]["messages"] != server.seen[2]["messages"] and server.seen[2]["temperature"] > 0
    assert "not in the form" in server.seen[2]["messages"][-1]["content"]


def test_malformed_to_the_end_is_a_failure_with_counts_not_a_guess(pairs):
    def never(request: dict[str, Any]):
        return ok("7 7 7 7") if "predict how strongly" in request["messages"][0]["content"] else oracle(request)

    with serving(then=never) as server:
        settings = config(server.url, malformed_retries=2)
        (result,) = explain(pairs[:1], explainer_of(settings), explain_case.bytes_of(), settings, show_progress=False)
    assert result.failed == "prediction: malformed answers: asked 3 times for a digit behind each token"
    assert result.accounting.malformed == 3 and result.spearman is None and result.spearman_weighted is None
    assert result.detection == 1.0  # what was answered is scored


SHOWN = [['"a"', '" b"'], ['"\\n"']]


@pytest.mark.parametrize(
    ("answer", "levels"),
    [
        ('1: "a" 0, " b" 9\n2: "\\n" 3', [[0, 9], [3]]),
        ('Here you are:\n\n1: "a" 0, "b" 9\n2: "\\n" 3\n', [[0, 9], [3]]),
        ('<think>1: 5</think>1: "a" 0, " b" 9\n2: "\\n" 3', [[0, 9], [3]]),
        ('1: "a" 0, " b" 10\n2: "\\n" 3', None),
        ('1: "a" 0, " b" -1\n2: "\\n" 3', None),
        ('1: "a" 0, " c" 1\n2: "\\n" 3', None),
        ('1: "a" 0\n2: "\\n" 3', None),
        ('1: "a" 0, " b" 9', None),
        ('1: "a" 0, " b" 9\n1: "a" 0, " b" 9\n2: "\\n" 3', None),
        ('1: "a" 0, " b" 9 because\n2: "\\n" 3', None),
        ('1: __import__("os")\n2: "\\n" 3', None),
        ("", None),
    ],
)
def test_levels_are_read_exactly(answer, levels):
    found = prompts.read_levels(answer, SHOWN)
    assert (None if found is None else [x.tolist() for x in found]) == levels


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [("1: yes\n2: No.", [True, False]), ("1: yes", None), ("yes\nno", None), ("1: maybe\n2: no", None), ("1:", None)],
)
def test_verdicts_are_read_exactly(answer, verdicts):
    assert prompts.read_verdicts(answer, 2) == verdicts


def test_explanations_are_one_line():
    assert prompts.read_explanation("**Explanation:** the word tea\nand more", True) == "the word tea"
    assert prompts.read_explanation("the word tea in", False) is None
    assert prompts.read_explanation("  \n", True) is None and prompts.read_explanation("x" * 700, True) is None


# --- failing servers -----------------------------------------------------------------------------------------------


def test_429_waits_as_asked_and_goes_on():
    with serving(error(429, headers={"retry-after": "0.4"}), then=lambda _: ok("hi")) as server:
        session = Session()
        assert chat(server.url).complete(ASK, session).text == "hi"
    assert server.times[1] - server.times[0] >= 0.4
    assert (session.account.requests, session.account.retries) == (2, 1)


@pytest.mark.parametrize("status", [408, 500, 502, 503])
def test_errors_that_pass_are_tried_again(status):
    with serving(error(status), error(status), then=lambda _: ok("hi")) as server:
        session = Session()
        assert chat(server.url).complete(ASK, session).text == "hi"
    assert (session.account.requests, session.account.retries, session.account.malformed) == (3, 2, 0)


@pytest.mark.parametrize("body", ["{not json", '"text"', '{"choices": []}', "<html></html>"])
def test_a_body_that_is_no_completion_is_counted_and_tried_again(body):
    with serving((200, {}, body), then=lambda _: ok("hi")) as server:
        session = Session()
        assert chat(server.url).complete(ASK, session).text == "hi"
    assert session.account.malformed == 1 and session.account.requests == 2


def test_retries_end_with_one_line():
    with serving(then=lambda _: error(500, "broken\nbadly")) as server:
        with pytest.raises(FastSAEError, match="failed 4 times") as caught:
            chat(server.url).complete(ASK, Session())
        assert len(server.seen) == 4
    assert "\n" not in str(caught.value)


def test_a_timeout_is_tried_again():
    def slow(_: dict[str, Any]):
        time.sleep(1.0)
        return ok("late")

    with serving(slow, then=lambda _: ok("hi")) as server:
        session = Session()
        assert chat(server.url, timeout=0.3).complete(ASK, session).text == "hi"
    assert session.account.retries == 1


def test_an_endpoint_that_is_down_is_one_line_at_once(pairs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(FastSAEError, match=r"does not answer .*start the server or check --endpoint") as caught:
        explain(pairs, explainer_of(config(url)), explain_case.bytes_of(), show_progress=False)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 10


def test_a_server_that_counts_no_tokens(pairs):
    with serving(then=lambda r: ok(oracle(r)[2]["choices"][0]["message"]["content"], usage=False)) as server:
        settings = config(server.url, prompt_price=1.0)
        (result,) = explain(pairs[:1], explainer_of(settings), explain_case.bytes_of(), settings, show_progress=False)
    assert result.accounting.without_usage == len(server.seen) and result.accounting.cost == 0


# --- keys, caches, options -----------------------------------------------------------------------------------------


def test_keys_come_from_a_file_or_the_package(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text("secret-1\n", encoding="utf-8")
    with serving(then=lambda _: ok("hi")) as server:
        chat(server.url, key=read_key(path)).complete(ASK, Session())
        chat(server.url).complete(ASK, Session())  # a server on this machine needs none
    assert server.keys[0] == "Bearer secret-1" and "secret" not in server.keys[1]
    with pytest.raises(FastSAEError, match=r"no API key for OpenAI.*--api-key-file"):
        EndpointChat(EndpointConfig(model="m"))
    for bad, message in ((tmp_path / "none", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(FastSAEError, match=message):
            read_key(Path(bad))
    path.write_text("two words", encoding="utf-8")
    with pytest.raises(FastSAEError, match="expected one key"):
        read_key(path)


def test_no_key_is_written_to_disk(pairs, tmp_path):
    path = tmp_path / "key"
    path.write_text("secret-2", encoding="utf-8")
    with serving() as server:
        settings = config(server.url, api_key_file=path)
        features(pairs[:1], settings, tmp_path / "out")
    assert all(b"secret-2" not in file.read_bytes() for file in (tmp_path / "out").iterdir())


def test_a_cache_that_is_none_is_one_line(tmp_path):
    path = tmp_path / "cache"
    path.write_text("hello " * 1000, encoding="utf-8")
    with pytest.raises(FastSAEError, match="name another file or remove it"):
        ReplyCache(path)


def test_the_budget_is_shared_and_stopping_is_at_once():
    budget = Budget(1)
    Session(budget=budget).spend()
    with pytest.raises(Stopped):
        Session(budget=budget).spend()
    session = Session()
    threading.Timer(0.1, session.stop.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        session.wait(30)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "bad",
    [{"explainer": "oracle"}, {"explainer": "endpoint"}, {"explainer": "local"}, {"endpoint": "http://x"},
     {"windows": 0}, {"retries": -1}, {"max_requests": 0}, {"prompt_price": -1.0}],
)  # fmt: skip
def test_options_that_cannot_be_meant(bad):
    with pytest.raises(FastSAEError) as caught:
        ExplainConfig(**bad)
    assert "\n" not in str(caught.value)
