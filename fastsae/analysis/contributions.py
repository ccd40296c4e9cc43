"""What features contribute to the next tokens of a text: gradient × activation, and what ablation says of it.

Axes: C contexts, T tokens of a context (its begin-of-text token included), F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.analysis.ablation import ablation
from fastsae.analysis.attribution import Agreement, TooFewError, agreement, attribution
from fastsae.analysis.effects import ordinary, special_ids
from fastsae.analysis.labels import TokenBytes, readable
from fastsae.analysis.stream import check_features
from fastsae.contexts import context_batches, model_limits
from fastsae.errors import FastSAEError
from fastsae.harvest import check_options
from fastsae.hooks import find_module
from fastsae.sae import SAE
from fastsae.visible import visible


@dataclass(frozen=True)
class AttributeConfig:
    """Which texts and features, and how much is checked. Raises FastSAEError for values that cannot be meant."""

    prompts: tuple[str, ...] = ()
    """Texts to look into; left out, full contexts of held-out text are drawn."""
    features: tuple[int, ...] = ()
    """Features to look at; left out, those that contribute most."""
    top: int = 20
    """So many of them, where they are not named."""
    contexts: int = 16
    """Contexts of held-out text."""
    context: int = 128
    """Tokens in one of these, the begin-of-text token included."""
    places: int = 256
    """Single tokens at which attribution is held against ablation, drawn at random of all at which a feature fires."""
    batch_size: int = 16
    """Contexts in a forward pass."""
    seed: int = 0
    """Of contexts and places."""

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("contexts", 1), ("context", 3), ("places", 3), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise FastSAEError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if len(set(self.features)) < len(self.features):
            raise FastSAEError(f"expected features of which none comes twice, got {list(self.features)}")


class Contribution(NamedTuple):
    """Of one feature, over all contexts. fires: tokens; maximum: its largest activation there.

    predicted: −Σ contribution, by how many nats the summed loss would rise without it, to first order; measured: by how
    many it does when the feature is 0 over the whole of each context. context, position, text: the token at which its
    contribution is largest.
    """

    feature: int
    fires: int
    maximum: float
    predicted: float
    measured: float
    context: int
    position: int
    text: str


@dataclass(frozen=True, eq=False)
class Contributions:
    """rows: the largest |predicted| first. tokens: those predicted; loss: theirs, nats per token. agreement: of single
    places (`attribution.agreement`); None where fewer than three are active."""

    texts: list[list[str]]
    tokens: int
    loss: float
    rows: list[Contribution]
    agreement: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; NaN becomes None."""
        found = None
        if self.agreement is not None:
            a = self.agreement
            scores = {name: getattr(a, name) for name in ("pearson", "spearman", "same_sign")}
            columns = ("contexts", "positions", "features", "predicted", "measured")
            found = {name: value if value == value else None for name, value in scores.items()}
            found |= {name: getattr(a, name).tolist() for name in columns}
        rows = [row._asdict() for row in self.rows]
        return {"tokens": self.tokens, "loss": self.loss, "features": rows, "agreement": found, "texts": self.texts}

    def __str__(self) -> str:
        lines = [
            f"{self.tokens:,} tokens in {len(self.texts)} contexts, {self.loss:.3f} nats a token. Rise of their summed "
            "loss without the feature:",
            f"{'feature':>8} {'fires':>6} {'maximum':>8} {'attribution':>12} {'ablation':>9}  most at",
        ]
        for row in self.rows:
            lines.append(
                f"{row.feature:>8} {row.fires:>6} {row.maximum:>8.3g} {row.predicted:>+12.4f} {row.measured:>+9.4f}  "
                f"{visible(row.text)!r}"
            )
        if self.agreement is None:
            return "\n".join([*lines, "too few features fire to hold attribution against ablation at single tokens"])
        a = self.agreement
        return "\n".join([
            *lines,
            f"at {len(a.measured)} single tokens: Pearson {a.pearson:.3f}, Spearman {a.spearman:.3f}, the same sign at "
            f"{a.same_sign:.0%}",
        ])  # fmt: skip


def contributions(
    sae: SAE,
    model: Any,
    tokenizer: Any,
    hook: str,
    documents: Sequence[Any] = (),
    config: AttributeConfig | None = None,
    **options: Any,
) -> Contributions:
    """Of features to the next tokens of config.prompts or, without any, of contexts drawn from the documents.

    Costs a forward and a backward pass of the texts, then a forward pass for each feature and context and for each
    place. The tokenizer's special tokens count neither as places nor as tokens to be predicted.
    Raises FastSAEError: features that the dictionary does not have, no such module, a tokenizer of another model,
    prompts with nothing to predict or longer than the model reads, documents none of which fills a context.
    """
    config = replace(config or AttributeConfig(), **check_options(AttributeConfig, options))
    check_features(config.features, sae.cfg.d_sae)
    find_module(model, hook)
    if config.prompts:
        ids = _of_prompts(model, tokenizer, config.prompts)
    else:
        ids = _drawn(model, tokenizer, documents, config)
    special = special_ids(model, tokenizer)
    keep = ordinary(model, ids, special)
    found = [attribution(sae, model, hook, part, special=special) for part in ids.split(config.batch_size)]
    total = torch.stack([part.by_feature().double().cpu() for part in found]).sum(0)
    chosen = list(config.features) or total.abs().topk(min(config.top, len(total))).indices.tolist()
    chosen = sorted((f for f in chosen if config.features or total[f] != 0), key=lambda f: -abs(float(total[f])))
    changes = ablation(
        sae, model, hook, [row for row in ids for _ in chosen], chosen * len(ids), batch_size=config.batch_size,
        special=special,
    )  # fmt: skip
    texts = _spelt(tokenizer, ids)
    predicted = int(keep[:, 1:].sum())
    rows = []
    for number, feature in enumerate(chosen):
        values, parts = _of_feature(found, feature, ids.shape)
        values = values * keep
        context, position = divmod(int(parts.abs().argmax()), ids.shape[1])
        rows.append(
            Contribution(
                feature, int((values != 0).sum()), float(values.max()), -float(total[feature]),
                sum(float(change.sum()) for change in changes[number :: len(chosen)]), context, position,
                texts[context][position],
            )
        )  # fmt: skip
    try:
        one = config.features[0] if len(config.features) == 1 else None
        places = agreement(
            sae, model, hook, ids, feature=one, count=config.places, batch_size=config.batch_size, seed=config.seed,
            special=special,
        )  # fmt: skip
    except TooFewError:
        places = None
    loss = sum(part.target for part in found) / max(predicted, 1)
    return Contributions(texts, predicted, loss, rows, places)


def _of_feature(found: Sequence[Any], feature: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Activations and contributions of a feature at every token, [C, T] each."""
    values, parts = [], []
    for some in found:
        on = (some.code.indices == feature) & some.code.valid()
        zero = torch.zeros_like(some.code.values)
        values.append(torch.where(on, some.code.values, zero).sum(1).cpu())
        parts.append(torch.where(on, some.contribution, zero.to(some.contribution)).sum(1).cpu())
    return torch.cat(values).view(shape), torch.cat(parts).view(shape)


def _of_prompts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """[C, T], each behind the begin-of-text token where there is one, padded on the right with a special token."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [torch.tensor([*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in prompts]
    for row, text in zip(rows, prompts, strict=True):
        if len(row) < 2:
            raise FastSAEError(f"the prompt {text!r} has no token to be predicted: write more")
    model_limits(model, tokenizer, max(map(len, rows)))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None and len({len(row) for row in rows}) > 1:
        raise FastSAEError("prompts of several lengths need a tokenizer with a padding token: give one at a time")
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding or 0)


def _drawn(model: Any, tokenizer: Any, documents: Sequence[Any], config: AttributeConfig) -> Tensor:
    """[C, T] full contexts."""
    model_limits(model, tokenizer, config.context)
    batches = context_batches(
        tokenizer, documents, config.context, config.batch_size, "cut", seed=config.seed, wanted=4 * config.contexts
    )
    rows: list[Tensor] = []
    least = config.context - (tokenizer.bos_token_id is not None)
    for batch in batches:
        rows += [ids for ids, keep in zip(batch.token_ids, batch.keep, strict=True) if int(keep.sum()) == least]
        if len(rows) >= config.contexts:
            return torch.stack(rows[: config.contexts])
    if not rows:
        raise FastSAEError(f"no document fills a context of {config.context} tokens: lower context, or give prompts")
    return torch.stack(rows)


def _spelt(tokenizer: Any, ids: Tensor) -> list[list[str]]:
    bytes_of = TokenBytes.of(tokenizer)
    return [readable([bytes_of[i] for i in row]) for row in ids.tolist()]


