"""The options of `fastsae explain`, and the explainer that they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from fastsae.analysis.explain.chat import AskConfig, ModelExplainer, ReplyCache
from fastsae.analysis.explain.endpoint import EndpointChat, EndpointConfig, read_key
from fastsae.analysis.explain.explainers import Explainer, OfflineExplainer
from fastsae.analysis.explain.local import LocalChat
from fastsae.device import choose_device
from fastsae.errors import ConfigError, FastSAEError, MissingDependencyError
from fastsae.lm import not_loaded

Kind = Literal["offline", "endpoint", "local"]
_POSITIVE = ("windows", "judged", "windows_per_request", "timeout", "concurrency")
_NOT_NEGATIVE = ("malformed_retries", "retries", "extra_tokens", "prompt_price", "completion_price", "backoff", "seed")


@dataclass(frozen=True)
class ExplainConfig:
    """How features are explained and scored.

    Args:
        explainer: offline (a search for the smallest pattern, no language model), endpoint (a server with OpenAI's API)
            or local (a Hugging Face causal LM in this process).
        explainer_model: The endpoint's name for its model, or a folder or hub name for local.
        endpoint: URL of the server, usually ending in /v1. Left out, OpenAI's.
        api_key_file: File with the endpoint's key alone. Left out, the openai package takes OPENAI_API_KEY.
        windows: Held-out windows of 9 tokens on which activations are predicted; the paper has 60.
        judged: Held-out windows for each of detection and fuzzing.
        windows_per_request: Windows that a model is asked about at once.
        malformed_retries: How often a question is asked again when the answer has not the form asked for.
        retries: How often a request is sent again after 429, 5xx, a time-out or a lost connection.
        backoff: Seconds before the first of those; doubles each time.
        timeout: Seconds that a request may take.
        requests_per_minute: The most requests that are sent in a minute; left out, any number.
        concurrency: Features that an endpoint works on at once.
        max_requests: The most requests that this run may send; left out, any number. Running it again goes on.
        extra_tokens: Added to the limit of every answer, for models that think before they answer.
        prompt_price: Per million tokens of prompts, in any currency; costs are in the same.
        completion_price: Per million tokens of answers.
        cache: File that keeps every answer of a model; left out, explain.cache beside the results, if they are saved.
        device: Where a local model runs: cpu, cuda, …; auto takes the GPU if there is one.
        seed: Of the windows drawn, and of models' answers.
    """

    explainer: Kind = "offline"
    explainer_model: str | None = None
    endpoint: str | None = None
    api_key_file: Path | None = None
    windows: int = 60
    judged: int = 40
    windows_per_request: int = 10
    malformed_retries: int = 3
    retries: int = 5
    backoff: float = 0.5
    timeout: float = 120.0
    requests_per_minute: float | None = None
    concurrency: int = 4
    max_requests: int | None = None
    extra_tokens: int = 0
    prompt_price: float = 0.0
    completion_price: float = 0.0
    cache: Path | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.explainer not in get_args(Kind):
            raise ConfigError(f"explainer must be one of {', '.join(get_args(Kind))}, got {self.explainer!r}")
        for name in (*_POSITIVE, *_NOT_NEGATIVE, "requests_per_minute", "max_requests"):
            value = getattr(self, name)
            if value is not None and (value < 0 or value == 0 and name not in _NOT_NEGATIVE):
                least = "at least 0" if name in _NOT_NEGATIVE else "above 0"
                raise ConfigError(f"{name} must be {least}, got {value}")
        if self.explainer != "offline" and not self.explainer_model:
            raise ConfigError(
                f"the {self.explainer} explainer needs a model: give --explainer-model, or take explainer offline"
            )
        if self.explainer != "endpoint" and self.endpoint is not None:
            raise ConfigError(f"endpoint goes with --explainer endpoint, not with {self.explainer}")


def explainer_of(config: ExplainConfig, cache: Path | None = None) -> Explainer:
    """The explainer that a configuration names. cache: where answers are kept if the configuration does not say.

    Raises FastSAEError: a key or model that is not there, a cache that is no cache, a package that is missing.
    """
    if config.explainer == "offline":
        return OfflineExplainer()
    assert config.explainer_model is not None
    if config.explainer == "local":
        chat = _local(config.explainer_model, config.device)
    else:
        key = read_key(config.api_key_file) if config.api_key_file is not None else None
        names = ("timeout", "retries", "backoff", "requests_per_minute", "concurrency")
        same = {name: getattr(config, name) for name in names}
        chat = EndpointChat(EndpointConfig(model=config.explainer_model, endpoint=config.endpoint, key=key, **same))
    names = ("windows_per_request", "malformed_retries", "extra_tokens", "prompt_price", "completion_price", "seed")
    ask = AskConfig(**{name: getattr(config, name) for name in names})
    path = config.cache or cache
    return ModelExplainer(chat, ask, ReplyCache(path) if path is not None else None)


def _local(name: str, device: str) -> LocalChat:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise MissingDependencyError("a local model needs transformers: pip install 'fastsae[all]'") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FastSAEError(f"{not_loaded(name, error)}; check --explainer-model") from None
    return LocalChat(torch.nn.Module.to(model, choose_device(device)), tokenizer, name)
