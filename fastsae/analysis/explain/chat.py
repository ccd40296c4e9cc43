"""Language models that explain: one question at a time, malformed answers asked again, every answer kept on disk."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from fastsae.analysis.examples import Evidence
from fastsae.analysis.explain import prompts
from fastsae.analysis.explain.accounting import Accounting
from fastsae.analysis.explain.explainers import Explanation, FeatureFailed, Session
from fastsae.analysis.explain.protocol import Window
from fastsae.analysis.labels import TokenBytes
from fastsae.errors import FastSAEError

T = TypeVar("T")
_RETRY_TEMPERATURE = 0.7  # greedy decoding would give the same malformed answer again


@dataclass(frozen=True)
class Request:
    """messages: role and content each. max_tokens: of the answer. temperature 0: greedy."""

    messages: list[dict[str, str]]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Reply:
    """text. tokens: as the server counted them, None if it did not. complete: False if cut off at max_tokens."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    complete: bool


class Chat(Protocol):
    """A language model that answers. `complete` raises FeatureFailed for a question that it refuses, Stopped, and
    FastSAEError where no question can be answered."""

    @property
    def concurrency(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """Everything that an answer depends on besides the request."""
        ...

    def complete(self, request: Request, session: Session) -> Reply: ...


class ReplyCache:
    """Answers on disk, by the SHA-256 of the model's identity and the request. One SQLite file, safe for threads and
    for several processes. Raises FastSAEError for a file that is something else."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=60.0, check_same_thread=False)
            with self._base:
                self._base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise FastSAEError(f"the cache {path} cannot be used ({error}); name another file or remove it") from None

    @staticmethod
    def key(identity: dict[str, Any], request: Request) -> str:
        """Hexadecimal, 64 characters."""
        return hashlib.sha256(json.dumps([identity, asdict(request)], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Reply | None:
        """The answer, if there is one."""
        with self._lock:
            row = self._base.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return Reply(**json.loads(row[0])) if row else None

    def put(self, key: str, reply: Reply) -> None:
        """Keeps an answer; it is on disk when this returns."""
        with self._lock, self._base:
            self._base.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(asdict(reply))))

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._base.close()


@dataclass(frozen=True)
class AskConfig:
    """windows_per_request: how many a prediction or judgement is asked for at once. malformed_retries: how often a
    question is asked again after an answer without the form asked for. extra_tokens: added to the limit of every
    answer, for models that think before they speak. prompt_price, completion_price: per million tokens, in any
    currency; the cost is in the same."""

    windows_per_request: int = 10
    malformed_retries: int = 3
    extra_tokens: int = 0
    prompt_price: float = 0.0
    completion_price: float = 0.0
    seed: int = 0


class ModelExplainer:
    """An Explainer that asks a language model."""

    def __init__(self, chat: Chat, config: AskConfig | None = None, cache: ReplyCache | None = None) -> None:
        self.chat, self.config, self.cache = chat, config or AskConfig(), cache

    @property
    def concurrency(self) -> int:
        """See Explainer."""
        return self.chat.concurrency

    def identity(self) -> dict[str, Any]:
        """See Explainer."""
        names = ("windows_per_request", "malformed_retries", "extra_tokens", "seed")
        return {"explainer": "model", **self.chat.identity(), **{name: getattr(self.config, name) for name in names}}

    def explain(
        self, evidence: Evidence, shown: Sequence[Window], bytes_of: TokenBytes, session: Session
    ) -> Explanation:
        """See Explainer."""
        messages = prompts.explain(evidence, shown, bytes_of)
        wanted = f"an explanation of one line and at most {prompts.LONGEST} characters"
        return Explanation(self._ask(messages, 200, prompts.read_explanation, session, wanted))

    def predict(
        self, explanation: Explanation, windows: Sequence[Window], bytes_of: TokenBytes, session: Session
    ) -> list[np.ndarray]:
        """See Explainer."""
        levels: list[np.ndarray] = []
        for part in self._parts(windows):
            shown = [prompts.tokens_of(window, bytes_of) for window in part]
            messages = prompts.predict(explanation.text, part, bytes_of)
            # No tokenizer has more tokens than a text has bytes.
            limit = 20 + sum(len(token.encode()) + 5 for tokens in shown for token in tokens) + 6 * len(shown)
            wanted = "a digit behind each token"
            levels += self._ask(messages, limit, lambda text, _, s=shown: prompts.read_levels(text, s), session, wanted)
        return levels

    def judge(
        self,
        explanation: Explanation,
        windows: Sequence[Window],
        marks: Sequence[np.ndarray] | None,
        bytes_of: TokenBytes,
        session: Session,
    ) -> list[bool]:
        """See Explainer."""
        verdicts: list[bool] = []
        for part in self._parts(range(len(windows))):
            chosen = None if marks is None else [marks[i] for i in part]
            messages = prompts.judge(explanation.text, [windows[i] for i in part], chosen, bytes_of)
            n = len(part)
            verdicts += self._ask(
                messages, 20 + 8 * n, lambda text, _, n=n: prompts.read_verdicts(text, n), session, "yes or no for each"
            )
        return verdicts

    def _parts(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        size = self.config.windows_per_request
        return [items[i : i + size] for i in range(0, len(items), size)]

    def _ask(
        self,
        messages: list[dict[str, str]],
        limit: int,
        read: Callable[[str, bool], T | None],
        session: Session,
        wanted: str,
    ) -> T:
        """Asks until the answer has the form asked for. Raises FeatureFailed after the last retry."""
        tries, asked = 1 + self.config.malformed_retries, messages
        for attempt in range(tries):
            temperature = _RETRY_TEMPERATURE if attempt else 0.0
            request = Request(asked, limit + self.config.extra_tokens, temperature, self.config.seed + attempt)
            reply, fresh = self._reply(request, session)
            value = read(reply.text, reply.complete)
            if value is not None:
                return value
            session.account.malformed += 1
            if fresh:  # one from disk was counted when it came
                session.ledger.add(Accounting(malformed=1))
            asked = prompts.again(messages, reply.text, wanted)
        raise FeatureFailed(f"malformed answers: asked {tries} times for {wanted}")

    def _reply(self, request: Request, session: Session) -> tuple[Reply, bool]:
        """The answer, and whether it came now and not from disk."""
        account = session.account
        before = replace(account)
        key = ReplyCache.key(self.chat.identity(), request)
        reply = self.cache.get(key) if self.cache is not None else None
        if reply is not None:
            account.cached += 1
            session.ledger.add(account.since(before))
            return reply, False
        try:
            reply = self.chat.complete(request, session)
            if reply.prompt_tokens is None or reply.completion_tokens is None:
                account.without_usage += 1
            else:
                account.prompt_tokens += reply.prompt_tokens
                account.completion_tokens += reply.completion_tokens
                account.cost += self.config.prompt_price * reply.prompt_tokens / 1e6
                account.cost += self.config.completion_price * reply.completion_tokens / 1e6
        finally:  # before the answer is kept: a crash between the two pays twice, and counts twice
            session.ledger.add(account.since(before))
        # A model may answer with half of a surrogate pair, which no file and no request can hold.
        reply = replace(reply, text=reply.text.encode("utf-8", "replace").decode())
        if self.cache is not None:
            self.cache.put(key, reply)
        return reply, True
