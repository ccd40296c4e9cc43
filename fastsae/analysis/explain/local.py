"""A Hugging Face causal LM that explains, in this process."""

from __future__ import annotations

from typing import Any

import torch

from fastsae.analysis.explain import prompts
from fastsae.analysis.explain.chat import Reply, Request
from fastsae.analysis.explain.explainers import FeatureFailed, Session
from fastsae.analysis.stream import device_of
from fastsae.errors import FastSAEError
from fastsae.visible import visible


class LocalChat:
    """A Chat that runs a causal LM, one question at a time.

    model, tokenizer: as AutoModelForCausalLM and AutoTokenizer give them. name: stands for them in the cache and the
    log. The tokenizer's chat template is used if it has one; else roles and texts stand in a plain prompt.
    """

    concurrency = 1

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    def identity(self) -> dict[str, Any]:
        """See Chat."""
        return {"chat": "local", "model": self.name}

    @torch.no_grad()
    def complete(self, request: Request, session: Session) -> Reply:
        """See Chat. Greedy at temperature 0; else sampled from the request's seed, and torch's generators stay as they
        are. A question longer than the model's context fails the feature."""
        device = device_of(self.model)
        prompt = torch.tensor([self._prompt(request.messages)], device=device)
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and prompt.shape[1] + request.max_tokens > room:
            raise FeatureFailed(
                f"the question has {prompt.shape[1]} tokens and its answer up to {request.max_tokens}, the model reads "
                f"{room}"
            )
        session.spend()
        end = self.tokenizer.eos_token_id
        options: dict[str, Any] = {"max_new_tokens": request.max_tokens, "pad_token_id": end}
        options["do_sample"] = request.temperature > 0
        if request.temperature > 0:
            options["temperature"] = request.temperature
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(request.seed)
            out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        ids = out[0, prompt.shape[1] :].tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Reply(text, prompt.shape[1], len(ids), len(ids) < request.max_tokens)

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self._templated(messages)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        text = "\n\n".join(message["content"] for message in messages) + "\n\nAnswer:\n"
        return self.tokenizer(text)["input_ids"]

    def _templated(self, messages: list[dict[str, str]]) -> str:
        """By the tokenizer's template; one that has no system role gets that text from the user. Raises FastSAEError
        for one that takes neither."""
        from jinja2 import TemplateError  # transformers needs it for templates

        refusal = ""
        for form in (messages, prompts.without_system(messages)):
            try:
                return self.tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                refusal = visible(" ".join(str(error).split()))[:160]
        raise FastSAEError(
            f"the chat template of {self.name} takes no question and answer in turn ({refusal}); take another model"
        )
