"""What an endpoint refuses, what that costs, and how a run goes on afterwards."""

import dataclasses
import json
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest

from fastsae.analysis.explain import Accounting, ExplainConfig, Ledger, explain, explainer_of
from fastsae.analysis.explain.explainers import FeatureFailed, Session
from fastsae.analysis.explain.local import LocalChat
from fastsae.errors import FastSAEError
from tests import explain_case, tiny_lm
from tests.chat_server import error, ok, oracle, serving
from tests.endpoint_case import ASK, chat, config, features, three, without_keys

pytest.importorskip("openai")
SYSTEM = dataclasses.replace(ASK, messages=[{"role": "system", "content": "be brief"}, *ASK.messages])


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    without_keys(monkeypatch)


@pytest.fixture(scope="module")
def pairs():
    return three()


def asks_to_explain(request: dict[str, Any]) -> bool:
    return "Say in one short sentence" in request["messages"][0]["content"]


# --- what a model words otherwise ----------------------------------------------------------------------------------


def test_requests_that_are_refused_together_are_all_sent_again(pairs):
    """Four threads send `max_tokens` and `seed` before any of them hears that the model takes neither."""
    together = threading.Barrier(4)

    def picky(request: dict[str, Any]):
        for name, said in (("max_tokens", "use 'max_completion_tokens' instead"), ("seed", "unsupported")):
            if name in request:
                together.wait(10)
                return error(400, said, param=name)
        return oracle(request)

    four = [tuple(dataclasses.replace(half, feature=k) for half in pairs[0]) for k in range(4)]
    with serving(then=picky) as server:
        settings = config(server.url, concurrency=4)
        results = explain(four, explainer_of(settings), explain_case.bytes_of(), settings, show_progress=False)
    assert [result.failed for result in results] == [None] * 4
    assert sum("seed" in body for body in server.seen) == 8


def test_a_model_with_other_names_for_its_limits_is_met_halfway():
    def picky(request: dict[str, Any]):
        if "max_tokens" in request:
            return error(400, "use 'max_completion_tokens' instead", param="max_tokens")
        return error(400, "unsupported value", param="temperature") if "temperature" in request else ok("hi")

    with serving(then=picky) as server:
        talker = chat(server.url)
        assert talker.complete(ASK, Session()).text == "hi"
        talker.complete(ASK, Session())
    assert len(server.seen) == 4 and server.seen[-1]["max_completion_tokens"] == 10


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_whose_model_has_no_system_role(status):
    def picky(request: dict[str, Any]):
        roles = [message["role"] for message in request["messages"]]
        return error(status, "System role not supported") if "system" in roles else ok("hi")

    with serving(then=picky) as server:
        talker, session = chat(server.url), Session()
        assert talker.complete(SYSTEM, session).text == talker.complete(SYSTEM, session).text == "hi"
    assert len(server.seen) == 3 and session.account.retries == 0
    assert server.seen[-1]["messages"] == [{"role": "user", "content": "be brief\n\nhello"}]


def test_a_local_model_whose_template_has_no_system_role():
    words, network = tiny_lm.tokenizer(), tiny_lm.model()
    words.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    reply = LocalChat(network, words, "tiny").complete(SYSTEM, Session())
    assert reply.prompt_tokens == len(words("user: be brief\n\nhello\n").input_ids)
    words.chat_template = "{{ raise_exception('no\\nquestions') }}"
    with pytest.raises(FastSAEError, match="the chat template of tiny takes no .*no questions.*another") as caught:
        LocalChat(network, words, "tiny").complete(SYSTEM, Session())
    assert "\n" not in str(caught.value)


# --- what no other wording mends -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (error(401, "bad key"), "refused the key: .*check --api-key-file"),
        (error(402, "Insufficient credits"), "quota or credit .* is spent: .*Insufficient credits"),
        (error(403, "not you"), "refused the key: .*check --api-key-file"),
        (error(404, "model m does not exist"), "has no model 'm'.*check --explainer-model and --endpoint"),
        (error(400, "unknown model"), "refused the request: .*unknown model.*check --explainer-model"),
        (error(418, "a teapot"), "refused the request: .*a teapot"),
        (error(429, "pay", code="insufficient_quota"), "quota"),
    ],
)
@pytest.mark.parametrize("served", [False, True])
def test_what_no_retry_mends_is_one_line_at_once(answer, message, served):
    with serving(*[ok("hi")] * served, then=lambda _: answer) as server:
        talker = chat(server.url)
        if served:
            talker.complete(ASK, Session())
        with pytest.raises(FastSAEError, match=message) as caught:
            talker.complete(ASK, Session())
        assert len(server.seen) == 1 + served
    assert "\n" not in str(caught.value) and ("run it again to go on" in str(caught.value)) is served


def test_what_was_refused_to_the_whole_run_is_asked_when_it_goes_on(pairs, tmp_path):
    """Credit that ends in the middle makes no feature a failure for good."""
    with serving(*[oracle] * 20, then=lambda _: error(402, "Insufficient credits")) as server:
        with pytest.raises(FastSAEError, match="Insufficient credits"):
            features(pairs, config(server.url, concurrency=1), tmp_path)
        assert len(server.seen) == 21
    with serving() as server:
        report = features(pairs, config(server.url, concurrency=1), tmp_path)
        assert [result.failed for result in report["results"]["a"]] == [None] * 3 and 0 < len(server.seen) < 40


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "this model's maximum context length is 10 tokens"),
        error(400, "too much", code="context_length_exceeded"),
        error(400, "the request exceeds the available context size"),
        error(400, "filtered", code="content_filter"),
        error(413, "Payload Too Large"),
    ],
)
def test_a_question_that_is_refused_fails_its_feature_alone_and_is_asked_again(answer, pairs, tmp_path):
    with serving(answer) as server:
        settings = config(server.url, concurrency=1)
        results = features(pairs, settings, tmp_path)["results"]["a"]
        assert "refused the request" in str(results[0].failed) and results[0].spearman is None
        assert [result.failed for result in results[1:]] == [None, None]
        sent = len(server.seen)
        assert all(result.failed is None for result in features(pairs, settings, tmp_path)["results"]["a"])
        assert sent < len(server.seen) < 2 * sent
    with serving(then=lambda _: answer) as server, pytest.raises(FeatureFailed):
        chat(server.url).complete(ASK, Session())


@pytest.mark.parametrize("bad", ["localhost:8000", "http://[bad", "http://", "http://host:99999999/v1", "ftp://a", ""])
def test_a_url_that_is_none(bad):
    with pytest.raises(FastSAEError, match="endpoint must be a URL") as caught:
        chat(bad)
    assert "\n" not in str(caught.value)


# --- waiting as asked ----------------------------------------------------------------------------------------------


def test_a_wait_in_milliseconds_is_kept():
    with serving(error(429, headers={"retry-after-ms": "300", "retry-after": "60"}), then=lambda _: ok("hi")) as server:
        assert chat(server.url).complete(ASK, Session()).text == "hi"
    assert 0.3 <= server.times[1] - server.times[0] < 5


def test_a_wait_until_a_date_is_kept():
    then = (datetime.now(timezone.utc) + timedelta(seconds=3)).replace(microsecond=0)  # 2 to 3 seconds from now
    date = format_datetime(then, usegmt=True)
    over = format_datetime(then - timedelta(days=1), usegmt=True)
    answers = [error(429, headers={"retry-after": date}), error(429, headers={"retry-after": over})]
    with serving(*answers, then=lambda _: ok("hi")) as server:
        assert chat(server.url, backoff=60.0).complete(ASK, Session()).text == "hi"
        assert time.time() >= then.timestamp()
    assert server.times[1] - server.times[0] > 1 and server.times[2] - server.times[1] < 1


# --- what it cost --------------------------------------------------------------------------------------------------


def test_what_was_paid_adds_up_over_sessions(pairs, tmp_path):
    """A budget that ends a run within a feature, a server that fails, then the rest: every request is accounted for."""
    prices: dict[str, Any] = {"prompt_price": 3.0, "completion_price": 15.0, "concurrency": 1}
    with serving() as server:
        first = features(pairs, config(server.url, max_requests=20, **prices), tmp_path)
        assert first["session"] == first["accounting"] and first["session"].requests == len(server.seen) == 20
    with serving(*[oracle] * 10, then=lambda _: error(500)) as server:
        with pytest.raises(FastSAEError, match="failed 2 times"):
            features(pairs, config(server.url, retries=1, **prices), tmp_path)
        paid = 20 + len(server.seen)
    assert len(server.seen) == 12 and Ledger(tmp_path / "explain.spent.jsonl").total.requests == paid
    with serving() as server:
        last = features(pairs, config(server.url, **prices), tmp_path)
        assert last["session"].requests == len(server.seen) > 10
        again = features(pairs, config(server.url, **prices), tmp_path)
    paid += len(server.seen)
    total, answered = last["accounting"], paid - 2
    assert total.requests == paid and total.prompt_tokens == 100 * answered and total.retries == 1
    assert total.cost == pytest.approx(answered * (100 * 3.0 + 10 * 15.0) / 1e6)
    assert again["accounting"] == total and again["session"] == Accounting()
    saved = json.loads((tmp_path / "explain.json").read_text(encoding="utf-8"))
    assert saved["accounting"]["requests"] == paid and saved["session"]["requests"] == 0


def test_malformed_answers_are_counted_once_over_sessions(pairs, tmp_path):
    with serving(oracle, ok("I think it is 7.")) as server:
        settings = config(server.url, concurrency=1, max_requests=5)
        assert features(pairs[:1], settings, tmp_path)["session"].malformed == 1
        report = features(pairs[:1], dataclasses.replace(settings, max_requests=None), tmp_path)
    assert report["accounting"].malformed == 1 and report["accounting"].requests == len(server.seen)


def test_a_ledger_outlives_a_crash(tmp_path):
    path = tmp_path / "spent.jsonl"
    ledger = Ledger(path)
    for _ in range(3):
        ledger.add(Accounting(requests=1, prompt_tokens=7, cost=0.5))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"requests": 1, "pro')
    again = Ledger(path)
    again.add(Accounting(requests=1))
    assert again.session == Accounting(requests=1)
    assert Ledger(path).total == again.total == Accounting(requests=4, prompt_tokens=21, cost=1.5)
    path.write_text('{"other": 1}\n', encoding="utf-8")
    with pytest.raises(FastSAEError, match="name another folder or remove it"):
        Ledger(path)


def test_a_server_on_another_port_is_the_same_server(pairs, tmp_path):
    with serving() as server:
        first = features(pairs, config(server.url), tmp_path)
    (tmp_path / "explain.jsonl").unlink()
    with serving() as other:
        assert other.url != server.url
        again = features(pairs, config(other.url.replace("127.0.0.1", "localhost")), tmp_path)
        assert not other.seen and again["session"].requests == 0
        features(pairs[:1], config(other.url, explainer_model="n"), tmp_path)
        assert other.seen, "another model is another model"
    assert [r.spearman for r in again["results"]["a"]] == [r.spearman for r in first["results"]["a"]]
    far = [chat(f"http://{host}/v1", key="k").identity()["url"] for host in ("a.example", "a.example:81")]
    assert far == ["http://a.example/v1", "http://a.example:81/v1"]


# --- answers that no terminal, file or request should hold ---------------------------------------------------------


def test_an_answer_with_half_a_character_or_escapes_is_shown_and_used(pairs, tmp_path):
    said = "Tokens \ud800 in \x1b[31m\x1b]0;owned\x07 Arabic\u202e script"

    def rude(request: dict[str, Any]):
        return ok(said) if asks_to_explain(request) else oracle(request)

    with serving(then=rude) as server:
        settings = config(server.url, concurrency=1)
        report = features(pairs[:1], settings, tmp_path)
    (result,) = report["results"]["a"]
    assert result.failed is None and result.accounting.malformed == 0 and result.spearman > 0.95
    assert result.explanation == "Tokens ? in ␛[31m␛]0;owned␇ Arabic‹U+202E› script"


def test_escapes_in_an_error_are_shown():
    with serving(then=lambda _: error(400, "no \x1b[2J way")) as server:
        with pytest.raises(FastSAEError, match="no ␛"):
            chat(server.url).complete(ASK, Session())


def test_an_explanation_that_is_too_long_is_asked_for_again_with_its_limit(pairs):
    def wordy(request: dict[str, Any]):
        if not asks_to_explain(request):
            return oracle(request)
        return ok("Arabic." if "at most 600 characters" in request["messages"][-1]["content"] else "long " * 200)

    with serving(then=wordy) as server:
        settings = config(server.url, concurrency=1)
        (result,) = explain(pairs[:1], explainer_of(settings), explain_case.bytes_of(), settings, show_progress=False)
    assert result.explanation == "Arabic." and result.accounting.malformed == 1 and result.failed is None
    with serving(then=lambda _: ok("long " * 200)) as server:
        (result,) = explain(pairs[:1], explainer_of(settings_at(server.url)), explain_case.bytes_of(),
                            settings_at(server.url), show_progress=False)  # fmt: skip
    assert "asked 2 times for an explanation of one line and at most 600 characters" in str(result.failed)


def settings_at(url: str) -> ExplainConfig:
    return config(url, concurrency=1, malformed_retries=1)
