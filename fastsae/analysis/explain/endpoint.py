"""Any server that speaks OpenAI's chat completions: a hosted one, vLLM, llama.cpp's server, `transformers serve`, …"""

from __future__ import annotations

import random
import re
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlsplit

from fastsae.analysis.explain import prompts
from fastsae.analysis.explain.chat import Reply, Request
from fastsae.analysis.explain.explainers import Refused, Session
from fastsae.errors import FastSAEError, MissingDependencyError
from fastsae.visible import visible

_LONGEST_BACKOFF = 30.0  # seconds
_LONGEST_ASKED = 120.0  # seconds that a server may ask us to wait
_OPTIONAL = ("temperature", "seed")  # fields that some models refuse
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NO_SYSTEM = re.compile(r"system (role|message|prompt|instruction)|developer instruction|roles must alternate", re.I)
_TOO_LONG = re.compile(
    r"context.{0,20}(length|size|window)|exceed.{0,30}(context|tokens)|too long|too many tokens|token count|"
    r"max(imum)?[ _](model|input|sequence)[ _]len",
    re.I,
)
_OF_THE_QUESTION = ("context_length_exceeded", "content_filter", "content_policy_violation")  # OpenAI's, Azure's codes


@dataclass(frozen=True)
class EndpointConfig:
    """endpoint: its URL, usually ending in /v1; left out, the openai package's own. key: left out, the package takes
    OPENAI_API_KEY; a server on this machine needs none. timeout, backoff: seconds; the backoff doubles at each of at
    most `retries`. concurrency: requests at a time."""

    model: str
    endpoint: str | None = None
    key: str | None = None
    timeout: float = 120.0
    retries: int = 5
    backoff: float = 0.5
    requests_per_minute: float | None = None
    concurrency: int = 4


def read_key(path: Path) -> str:
    """The key in a file, without white space around it. Raises FastSAEError if there is none."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise FastSAEError(f"the key file {path} cannot be read ({reason}); name a file with the key alone") from None
    if not key or len(key.split()) != 1:
        raise FastSAEError(f"expected one key in {path}, got {len(key.split())} words; put the key alone into it")
    return key


@dataclass(frozen=True)
class _Form:
    """How a request is worded: names differ between models, and what they take."""

    limit: str = "max_tokens"
    left_out: frozenset[str] = frozenset()  # of _OPTIONAL
    system: bool = True

    def fields(self, model: str, request: Request) -> dict[str, Any]:
        optional = {"temperature": request.temperature, "seed": request.seed}
        messages = request.messages if self.system else prompts.without_system(request.messages)
        fields = {"model": model, "messages": messages, self.limit: request.max_tokens}
        return fields | {name: value for name, value in optional.items() if name not in self.left_out}


class EndpointChat:
    """A Chat through the openai package. Its own retries are off: ours are counted, and end with Ctrl-C."""

    def __init__(self, config: EndpointConfig) -> None:
        try:
            import openai
        except ImportError:
            raise MissingDependencyError("an endpoint needs the openai package: pip install 'fastsae[all]'") from None
        self._openai, self.config = openai, config
        local = config.endpoint is not None and _parts(config.endpoint).hostname in _LOOPBACK
        options: dict[str, Any] = {"base_url": config.endpoint, "max_retries": 0, "timeout": config.timeout}
        try:
            self._client = openai.OpenAI(api_key=config.key, **options)
        except openai.OpenAIError as error:
            if not local:
                detail = str(error).splitlines()[0].split(".")[0]
                raise FastSAEError(
                    f"no API key for {config.endpoint or 'OpenAI'} ({detail}): give one with --api-key-file or set "
                    "OPENAI_API_KEY"
                ) from None
            self._client = openai.OpenAI(api_key="none", **options)
        self.url = str(self._client.base_url).rstrip("/")
        self._answered = False  # whether the endpoint has answered anything yet, be it an error
        self._served = False  # whether it has answered a question
        self._form = _Form()  # what the endpoint took last
        self._next, self._lock = 0.0, threading.Lock()

    @property
    def concurrency(self) -> int:
        """See Chat."""
        return self.config.concurrency

    def identity(self) -> dict[str, Any]:
        """See Chat. On this machine a server is known by path and model, not by its port: started again on another one
        it is the same. Two models of the same name there need two folders."""
        parts = _parts(self.url)
        url = f"loopback{parts.path}" if parts.hostname in _LOOPBACK else self.url
        return {"chat": "endpoint", "url": url, "model": self.config.model}

    def complete(self, request: Request, session: Session) -> Reply:
        """See Chat. Errors that pass (429, 5xx, time-outs, no connection, no JSON) are tried again, after the time that
        the server asks for or a doubling one."""
        tried, openai = 0, self._openai
        while True:
            self._take_turn(session)
            session.spend()
            wait: float | None = None
            with self._lock:
                form = self._form
            try:
                answer = self._client.chat.completions.create(**form.fields(self.config.model, request))
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                self._answered |= isinstance(error, openai.APIStatusError)
                if self._adapted(error, form):
                    continue
                self._fatal(error, tried)
                trouble, wait = error, _asked_wait(error)
            except (openai.APIError, ValueError) as error:  # a body that is no JSON, or not what the API says
                session.account.malformed += 1
                trouble = error
            else:
                reply = _reply(answer)
                if reply is not None:
                    self._answered = self._served = True
                    return reply
                session.account.malformed += 1
                trouble = ValueError("its answer holds no message")
            if tried == self.config.retries:
                raise FastSAEError(
                    f"the endpoint {self.url} failed {tried + 1} times: {_line(trouble)}; what was answered is kept, "
                    "run it again to go on"
                )
            backoff = min(self.config.backoff * 2**tried, _LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
            session.wait(backoff if wait is None else wait)
            session.account.retries += 1
            tried += 1

    def _adapted(self, error: Any, sent: _Form) -> bool:
        """Whether to send a request that was refused in the form `sent` again, in another one. Others that are under
        way at the same time are refused for the same: what counts is what each of them has sent."""
        if getattr(error, "status_code", None) not in (400, 422, 500):  # 500: a template's error in some servers
            return False
        param, said, new = getattr(error, "param", None), str(error), sent
        if error.status_code != 500 and sent.limit == "max_tokens":
            if param == "max_tokens" or "max_completion_tokens" in said:
                new = replace(new, limit="max_completion_tokens")
        if param in _OPTIONAL:
            new = replace(new, left_out=new.left_out | {str(param)})
        if _NO_SYSTEM.search(said):
            new = replace(new, system=False)
        if new == sent:
            return False
        with self._lock:
            now = self._form
            limit = new.limit if new.limit != sent.limit else now.limit
            self._form = _Form(limit, now.left_out | new.left_out, now.system and new.system)
        return True

    def _fatal(self, error: Any, tried: int) -> None:
        """Raises for an error that no retry mends: Refused where it is of this question, else FastSAEError."""
        if isinstance(error, self._openai.APIStatusError):
            passes = error.status_code in (408, 409, 429) or error.status_code >= 500
            if not passes or getattr(error, "code", None) == "insufficient_quota":
                self._refused(error)
        elif not self._answered and tried >= min(1, self.config.retries) and not _timed_out(error):
            cause = error.__cause__ or error
            raise FastSAEError(
                f"the endpoint {self.url} does not answer ({_line(cause)}): start the server or check --endpoint"
            ) from None

    def _refused(self, error: Any) -> NoReturn:
        """A question that is too long, or that a filter holds back, fails its feature alone. All else would be refused
        to every feature, now or from now on: a key, a model, an account, a form."""
        status, said, code = error.status_code, _line(error), getattr(error, "code", None)
        if status == 413 or code in _OF_THE_QUESTION or status in (400, 422) and _TOO_LONG.search(str(error)):
            raise Refused(f"{self.url} refused the request: {said}") from None
        on = "; what was answered is kept, run it again to go on" if self._served else ""
        if status == 402 or code == "insufficient_quota":
            raise FastSAEError(f"the account's quota or credit at {self.url} is spent: {said}{on}") from None
        if status in (401, 403):
            raise FastSAEError(f"{self.url} refused the key: {said}; check --api-key-file{on}") from None
        if status == 404:
            raise FastSAEError(
                f"{self.url} has no model {self.config.model!r}, or is no such API: {said}; check --explainer-model "
                f"and --endpoint{on}"
            ) from None
        raise FastSAEError(
            f"{self.url} refused the request: {said}; check --explainer-model {self.config.model} and --endpoint{on}"
        ) from None

    def _take_turn(self, session: Session) -> None:
        """Waits until this request may be sent at the rate allowed."""
        if self.config.requests_per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + 60.0 / self.config.requests_per_minute
        session.wait(turn - now)


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:  # .port raises above 65535
            return parts
    except ValueError:
        pass
    raise FastSAEError(f"endpoint must be a URL such as http://127.0.0.1:8000/v1, got {url!r}")


def _asked_wait(error: Any) -> float | None:
    """Seconds that the server asks for, by retry-after-ms or by Retry-After in seconds or as a date; None if it does
    not, or in another form."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * unit
        except ValueError:
            seconds = _until(value)
        if seconds is not None and seconds >= 0:
            return min(seconds, _LONGEST_ASKED)
    return None


def _until(date: str) -> float | None:
    """Seconds until an HTTP date, 0 if it is over; None for anything else."""
    try:
        then = parsedate_to_datetime(date)
    except (TypeError, ValueError, IndexError):
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=timezone.utc)
    return max(0.0, (then - datetime.now(timezone.utc)).total_seconds())


def _timed_out(error: Any) -> bool:
    return "Timeout" in type(error).__name__  # a subclass of the package's connection errors


def _reply(answer: Any) -> Reply | None:
    """None for an answer that is not a chat completion. A message without text is an empty one."""
    try:
        choice = answer.choices[0]
        text, finish = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        return None
    usage = getattr(answer, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) else None for count in counts)
    return Reply(text if isinstance(text, str) else "", prompt, completion, finish != "length")


def _line(error: BaseException) -> str:
    """An error's message on one line of at most 200 visible characters, without keys."""
    text = visible(" ".join(str(getattr(error, "message", None) or error).split()))
    return text[:200] or type(error).__name__
