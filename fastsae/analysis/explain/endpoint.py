"""Any server that speaks OpenAI's chat completions: a hosted one, vLLM, llama.cpp's server, `transformers serve`, …"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastsae.analysis.explain.chat import Reply, Request
from fastsae.analysis.explain.explainers import FeatureFailed, Session
from fastsae.errors import FastSAEError, MissingDependencyError

_LONGEST_BACKOFF = 30.0  # seconds
_LONGEST_ASKED = 120.0  # seconds that a server may ask us to wait
_OPTIONAL = ("temperature", "seed")  # fields that some models refuse
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


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


class EndpointChat:
    """A Chat through the openai package. Its own retries are off: ours are counted, and end with Ctrl-C."""

    def __init__(self, config: EndpointConfig) -> None:
        try:
            import openai
        except ImportError:
            raise MissingDependencyError("an endpoint needs the openai package: pip install 'fastsae[all]'") from None
        self._openai, self.config = openai, config
        local = config.endpoint is not None and urlsplit(config.endpoint).hostname in _LOOPBACK
        if config.endpoint is not None and urlsplit(config.endpoint).scheme not in ("http", "https"):
            raise FastSAEError(f"endpoint must be a URL such as http://127.0.0.1:8000/v1, got {config.endpoint!r}")
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
        self._left_out: set[str] = set()  # of _OPTIONAL
        self._limit_field = "max_tokens"
        self._next, self._lock = 0.0, threading.Lock()

    @property
    def concurrency(self) -> int:
        """See Chat."""
        return self.config.concurrency

    def identity(self) -> dict[str, Any]:
        """See Chat."""
        return {"chat": "endpoint", "url": self.url, "model": self.config.model}

    def complete(self, request: Request, session: Session) -> Reply:
        """See Chat. Errors that pass (429, 5xx, time-outs, no connection, no JSON) are tried again, after the time that
        the server asks for or a doubling one."""
        tried, openai = 0, self._openai
        while True:
            self._take_turn(session)
            session.spend()
            wait: float | None = None
            try:
                answer = self._client.chat.completions.create(**self._fields(request))
            except openai.BadRequestError as error:
                if not self._adapted(error):
                    self._refused(error)
                continue
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                self._answered |= isinstance(error, openai.APIStatusError)
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

    def _fields(self, request: Request) -> dict[str, Any]:
        fields: dict[str, Any] = {"temperature": request.temperature, "seed": request.seed}
        for name in self._left_out:
            del fields[name]
        return {
            "model": self.config.model,
            "messages": request.messages,
            self._limit_field: request.max_tokens,
            **fields,
        }

    def _adapted(self, error: Any) -> bool:
        """Whether the request can go without the field that was refused: names differ between models."""
        with self._lock:
            param, said = getattr(error, "param", None), str(error)
            if self._limit_field == "max_tokens" and (param == "max_tokens" or "max_completion_tokens" in said):
                self._limit_field = "max_completion_tokens"
                return True
            if param in _OPTIONAL and param not in self._left_out:
                self._left_out.add(str(param))
                return True
        return False

    def _fatal(self, error: Any, tried: int) -> None:
        """Raises for an error that no retry mends."""
        openai, model = self._openai, self.config.model
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            raise FastSAEError(f"{self.url} refused the key: {_line(error)}; check --api-key-file") from None
        if isinstance(error, openai.NotFoundError):
            raise FastSAEError(
                f"{self.url} has no model {model!r}, or is no such API: {_line(error)}; check --explainer-model and "
                "--endpoint"
            ) from None
        if isinstance(error, openai.APIStatusError):
            if getattr(error, "code", None) == "insufficient_quota":
                raise FastSAEError(f"the account's quota at {self.url} is spent: {_line(error)}") from None
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                self._refused(error)
        elif not self._answered and tried >= min(1, self.config.retries) and not _timed_out(error):
            cause = error.__cause__ or error
            raise FastSAEError(
                f"the endpoint {self.url} does not answer ({_line(cause)}): start the server or check --endpoint"
            ) from None

    def _refused(self, error: Any) -> None:
        """Raises: a question that is too long fails its feature; what is refused before any answer was had, fails all,
        as some servers answer 400 to a model they do not have."""
        message = f"{self.url} refused the request: {_line(error)}"
        if self._served or "context" in message or "too long" in message or error.status_code == 413:
            raise FeatureFailed(message) from None
        raise FastSAEError(f"{message}; check --explainer-model {self.config.model} and --endpoint") from None

    def _take_turn(self, session: Session) -> None:
        """Waits until this request may be sent at the rate allowed."""
        if self.config.requests_per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + 60.0 / self.config.requests_per_minute
        session.wait(turn - now)


def _asked_wait(error: Any) -> float | None:
    """Seconds that the server asks for in Retry-After; None if it does not, or in another form."""
    response = getattr(error, "response", None)
    try:
        seconds = float(response.headers["retry-after"]) if response is not None else None
    except (KeyError, ValueError):
        return None
    return None if seconds is None or not 0 <= seconds else min(seconds, _LONGEST_ASKED)


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
    """An error's message on one line of at most 200 characters, without keys."""
    text = " ".join(str(getattr(error, "message", None) or error).split())
    return text[:200] or type(error).__name__
