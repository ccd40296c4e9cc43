"""A chat with the tests' server, and a planted feature three times over to ask it about."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastsae.analysis.explain import ExplainConfig, explain_features
from fastsae.analysis.explain.chat import Request
from fastsae.analysis.explain.endpoint import EndpointChat, EndpointConfig
from tests import explain_case

ASK = Request([{"role": "user", "content": "hello"}], 10, 0.0, 0)


def without_keys(monkeypatch: Any) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def three() -> list[Any]:
    first, second = explain_case.halves(explain_case.RULES["script"])
    return [(dataclasses.replace(first, feature=k), dataclasses.replace(second, feature=k)) for k in range(3)]


def chat(url: str, **options: Any) -> EndpointChat:
    settings: dict[str, Any] = {"backoff": 0.01, "retries": 3, "timeout": 5.0, **options}
    return EndpointChat(EndpointConfig(model="m", endpoint=url, **settings))


def config(url: str, **options: Any) -> ExplainConfig:
    settings: dict[str, Any] = {"explainer": "endpoint", "explainer_model": "m", "endpoint": url, "backoff": 0.01}
    settings |= options
    return ExplainConfig(**settings)


def features(pairs: Any, settings: ExplainConfig, out: Path | None) -> dict[str, Any]:
    return explain_features({"a": pairs}, explain_case.bytes_of(), settings, out, show_progress=False)
