"""Text that a model writes with features edited, beside what it writes untouched.

Axes: B continuations of one prompt, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsae.analysis.effects import (
    Edit,
    FeatureEdit,
    Mode,
    feature_values,
    only_at,
    ordinary,
    set_features,
    special_ids,
    token_losses,
)
from fastsae.analysis.stream import Source, check_features, device_of, evaluating, read
from fastsae.contexts import model_limits
from fastsae.errors import FastSAEError
from fastsae.hooks import find_module, replace
from fastsae.sae import SAE


@dataclass(frozen=True)
class SteerConfig:
    """Which features to edit, how far, and what to write."""

    features: tuple[int, ...] = ()
    """Features to edit, all in the same text."""
    mode: Mode = "pin"
    """pin: set to the value at every token but special ones. add: add the value. ablate: set to 0."""
    multiple: float = 1.0
    """The value, as a multiple of the feature's maximum, which is measured on text first."""
    value: float | None = None
    """The value itself, in units of the activation; nothing is measured then."""
    prompts: tuple[str, ...] = ("",)
    """Texts to go on from; an empty one begins with the begin-of-text token alone."""
    tokens: int = 40
    """Tokens to write."""
    samples: int = 3
    """Continuations of each prompt, with the edit and without."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token."""
    seed: int = 0
    """Of sampling: the same for both."""
    measure_tokens: int = 50_000
    """Tokens of text on which the maxima are measured."""
    context: int = 128
    """Tokens in a context while maxima are measured, the begin-of-text token included."""
    batch_size: int = 32
    """Contexts in a forward pass while maxima are measured."""

    def __post_init__(self) -> None:
        if not self.features:
            raise FastSAEError("expected features to edit, got none: name at least one")
        if not self.prompts:
            raise FastSAEError("expected prompts, got none: an empty text is one")
        for name in ("tokens", "samples", "measure_tokens", "context", "batch_size"):
            if getattr(self, name) < 1:
                raise FastSAEError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise FastSAEError(f"temperature must be 0 or more, got {self.temperature}")

    @property
    def needs_maxima(self) -> bool:
        """Whether the edit cannot be known before the features' maxima are."""
        return self.mode != "ablate" and self.value is None

    def edits(self, maxima: dict[int, float] | None = None) -> list[FeatureEdit]:
        """The edits meant. Raises FastSAEError for a feature that did not fire where its maximum was looked for."""
        if self.mode == "ablate":
            return [FeatureEdit(feature, mode="ablate") for feature in self.features]
        if self.value is not None:
            return [FeatureEdit(feature, self.value, self.mode) for feature in self.features]
        made = []
        for feature in self.features:
            highest = (maxima or {}).get(feature, 0.0)
            if highest <= 0:
                raise FastSAEError(
                    f"feature {feature} did not fire on the text where its maximum was measured: give a value instead"
                )
            made.append(FeatureEdit(feature, self.multiple * highest, self.mode))
        return made


@dataclass(frozen=True)
class Continuation:
    """text: what was written, up to an end-of-text token. token_ids: all of it. nll: nats per token by the untouched
    model, a measure of how far from its own the text is."""

    text: str
    token_ids: list[int]
    nll: float


@dataclass(frozen=True)
class Steered:
    """What the model makes of one prompt: untouched, and with the edits."""

    prompt: str
    plain: list[Continuation]
    steered: list[Continuation]


@dataclass(frozen=True)
class Steering:
    """The edits, the maxima that they were reckoned from, if any, and the texts of every prompt."""

    edits: list[FeatureEdit]
    prompts: list[Steered]
    maxima: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"feature {e.feature}: {e.mode}" + (f" {e.value:.4g}" if e.mode != "ablate" else "")
            + (f" (maximum {self.maxima[e.feature]:.4g})" if e.feature in self.maxima else "")
            for e in self.edits
        ]  # fmt: skip
        for item in self.prompts:
            lines += ["", f"prompt: {item.prompt!r}"]
            for name, texts in (("without", item.plain), ("with", item.steered)):
                lines += [f"  {name:8} {text.text!r}  ({text.nll:.2f} nats a token)" for text in texts]
        return "\n".join(lines)


def steer(
    sae: SAE,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    hook: str,
    edits: Sequence[FeatureEdit],
    *,
    tokens: int = 40,
    samples: int = 3,
    temperature: float = 1.0,
    seed: int = 0,
    watch: Callable[[], None] | None = None,
) -> list[Steered]:
    """Continuations of each prompt without and with the edits, from the same random numbers.

    The edits act on every token, those of the prompt included, but not on the tokenizer's special ones, on which no
    dictionary was trained: after an empty prompt they act from the first token written. Keys and values are cached, and
    those in the cache are of edited tokens. Only tokens that the tokenizer has are written. watch: called after every
    token that all continuations have got; what it raises ends the writing.
    Raises FastSAEError: features that the dictionary does not have, no such module, a tokenizer of another model, an
    empty prompt for a tokenizer without begin-of-text token, a value under which the model's output is not finite.
    """
    find_module(model, hook)
    model_limits(model, tokenizer, 1)
    edit = set_features(sae, edits)
    found = []
    with evaluating(sae, model):
        for number, prompt in enumerate(prompts):
            begin = _prompt_ids(tokenizer, prompt)
            sides = []
            for change in (None, edit):
                generator = torch.Generator().manual_seed(seed + number)
                ids = continuations(
                    model, hook, begin, change, tokens=tokens, count=samples, temperature=temperature,
                    generator=generator, vocabulary=len(tokenizer), special=special_ids(model, tokenizer),
                    watch=watch and (lambda _: watch()),
                )  # fmt: skip
                sides.append(_texts(model, hook, tokenizer, begin, ids))
            found.append(Steered(prompt, *sides))
    return found


@torch.no_grad()
def continuations(
    model: Any,
    hook: str,
    prefix: Tensor,
    edit: Edit | None,
    *,
    tokens: int,
    count: int,
    temperature: float,
    generator: torch.Generator,
    watch: Callable[[Tensor], None] | None = None,
    vocabulary: int | None = None,
    special: Sequence[int] | None = None,
) -> Tensor:
    """`count` continuations of prefix [T], [count, tokens], with the hooked output edited at all but special tokens.

    vocabulary: entries of the tokenizer, where the model's head may be padded beyond them: ids from there on are not
    written. special: ids of special tokens, as `effects` has them; () for none. watch: is shown the logits [count, V]
    that every next token is drawn from; what it raises ends the writing.

    An edit looks at one token at a time, so keys and values computed under it stay right for later tokens. A text that
    outgrows the model's longest context goes on without cache, on the last tokens that the model can read.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 10**9
    device, name = device_of(model), _cache_name(model)
    ids = prefix.repeat(count, 1)
    past: Any = None
    for _ in range(tokens):
        cached = name is not None and ids.shape[1] <= limit
        whole = past is None or not cached  # the first time, and always where nothing is cached
        run, options = (ids[:, -limit:], {}) if whole else (ids[:, -1:], {str(name): past})
        keep = ordinary(model, run, special)
        with replace(model, hook, only_at(edit, keep)) if edit else nullcontext():
            out = model(run.to(device), use_cache=cached, **options)
        past = getattr(out, str(name), None) if cached else None
        logits = out.logits[:, -1, :vocabulary].float().cpu()
        ids = torch.cat([ids, _next(logits, temperature, generator)], dim=1)
        if watch is not None:
            watch(logits)
    return ids[:, len(prefix) :]


def sample(
    model: Any,
    hook: str,
    prefix: Tensor,
    edit: Edit | None,
    *,
    tokens: int,
    count: int,
    members: Tensor,
    seed: int = 0,
    special: Sequence[int] | None = None,
) -> tuple[float, Tensor]:
    """`count` continuations of prefix [T] at temperature 1, the model in evaluation mode.

    members: [V], how much of each token of the tokenizer belongs to a category; what the model's head has beyond it is
    never written, and has no probability. Returns (the mean over all sampled positions of the probability that the
    model gave the category, token ids [count, tokens]). The edit acts on prefix and continuation, special tokens of
    either left out: where the prefix is a begin-of-text token alone, it acts from the first token written.
    """
    shares: list[float] = []

    def watch(logits: Tensor) -> None:
        shares.append(float((logits.softmax(-1) @ members[: logits.shape[1]]).mean()))

    with evaluating(model):
        ids = continuations(
            model, hook, prefix, edit, tokens=tokens, count=count, temperature=1.0, watch=watch,
            generator=torch.Generator().manual_seed(seed), vocabulary=len(members), special=special,
        )  # fmt: skip
    return sum(shares) / tokens, ids


def _cache_name(model: Any) -> str | None:
    """What the model calls its cache of keys and values, as argument and in its output; None if it has none.

    transformers renamed past_key_values to cache, and models that bring their own code keep the old name.
    """
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


def _next(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """[B, 1] from logits [B, V]."""
    if not torch.isfinite(logits).all():
        raise FastSAEError("the model's output is not finite with these edits: choose smaller values")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def _prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    """As contexts are harvested: behind the begin-of-text token, where there is one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    if not start and not len(ids):
        raise FastSAEError("the tokenizer has no begin-of-text token to begin an empty prompt with: give some text")
    return torch.tensor([*start, *ids], dtype=torch.int64)


def _texts(model: Any, hook: str, tokenizer: Any, prefix: Tensor, ids: Tensor) -> list[Continuation]:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 10**9
    whole = torch.cat([prefix.repeat(len(ids), 1), ids], dim=1)[:, -limit:]
    nll = token_losses(model, hook, whole)[:, -ids.shape[1] :].mean(1)
    made = []
    for row, value in zip(ids.tolist(), nll.tolist(), strict=True):
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:end], clean_up_tokenization_spaces=False)
        made.append(Continuation(text, row, value))
    return made


@torch.no_grad()
def maxima(
    sae: SAE,
    model: Any,
    tokenizer: Any,
    documents: Iterable[Any],
    hook: str,
    features: Sequence[int],
    *,
    tokens: int = 50_000,
    context: int = 128,
    batch_size: int = 32,
) -> dict[int, float]:
    """The largest activation of each feature on the first `tokens` tokens of the documents; 0 where it never fires."""
    check_features(features, sae.cfg.d_sae)
    highest = torch.zeros(len(features))
    source, texts = Source(sae, model, hook), list(documents)
    for batch in read([source], tokenizer, texts, context=context, batch_size=batch_size, max_tokens=tokens):
        found = feature_values(sae, batch.xs[0], list(features)).amax(0)
        highest = torch.maximum(highest, found.float().cpu())
    return dict(zip(features, highest.tolist(), strict=True))
