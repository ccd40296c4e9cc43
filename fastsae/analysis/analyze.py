"""From a dictionary and text to a report: the best feature of every category, and whether it is real.

Features and neurons are chosen on one half of the documents and scored on the other half. Formulas: Bricken et al.
2023, "Towards Monosemanticity". Axes: n tokens, F features, D neurons, P categories.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.analysis import effects, goals
from fastsae.analysis.collect import Collected, collect, feature_pearson
from fastsae.analysis.labels import readable
from fastsae.analysis.proxies import DEFAULT, Proxy, proxies
from fastsae.analysis.universality import Matcher
from fastsae.contexts import context_batches
from fastsae.errors import FastSAEError
from fastsae.files import write_json
from fastsae.sae import SAE

PREFIXES = ("", "\n", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,")  # neutral: nothing, a new line, and the paper's count to ten


@dataclass(frozen=True)
class AnalyzeConfig:
    """What to look for, and how long to look."""

    categories: tuple[str, ...] = DEFAULT
    """Scripts by their Unicode name, base64, DNA."""
    features: tuple[int, ...] = ()
    """Features to show besides the best one of every category, each beside the category it follows best."""
    tokens: int | None = None
    """Held-out tokens to read; default: all."""
    context: int = 128
    """Tokens in a context, the begin-of-text token included."""
    batch_size: int = 32
    """Contexts in a forward pass."""
    contexts_per_effect: int = 96
    """Contexts with the category, and as many others, on which a feature's ablation is measured."""
    sample_tokens: int = 40
    """Tokens of a sampled continuation."""
    samples: int = 8
    """Continuations sampled from each neutral prefix."""
    universality_features: int = 200
    """Features, drawn at random, over which the median match in the other run is taken."""
    seed: int = 0
    """Seeds the samples and the features drawn."""

    def __post_init__(self) -> None:
        if not proxies(self.categories):
            raise FastSAEError("expected at least one category, got none")
        if self.tokens is not None and self.tokens < 1:
            raise FastSAEError(f"tokens must be at least 1, got {self.tokens}; leave it out to read all")
        for name in (
            "context",
            "batch_size",
            "contexts_per_effect",
            "sample_tokens",
            "samples",
            "universality_features",
        ):
            if getattr(self, name) < 1:
                raise FastSAEError(f"{name} must be at least 1, got {getattr(self, name)}")


def analyze(
    sae: SAE,
    model: Any,
    tokenizer: Any,
    documents: Sequence[Any],
    hook: str,
    out: str | Path,
    config: AnalyzeConfig | None = None,
    *,
    other: tuple[SAE, Any] | None = None,
    quality: dict | None = None,
    show_progress: bool = True,
) -> dict:
    """Writes out/report.html, out/results.json and PNG figures; returns the results.

    documents: text that neither model nor SAE was trained on (strings, or objects with a `text`). other: (SAE, model)
    of another run with the same tokenizer; its best matches are reported. quality: figures of training and evaluation
    to show beside. Categories that do not occur in both halves of the text are left out.
    """
    from fastsae import figures, report

    figures.require_matplotlib()
    config = config or AnalyzeConfig()
    if bad := [n for n in config.features if not 0 <= n < sae.cfg.d_sae]:
        raise FastSAEError(f"features must be numbers from 0 to {sae.cfg.d_sae - 1}, got {bad[0]}")
    options = {"categories": config.categories, "context": config.context, "batch_size": config.batch_size}
    data = collect(
        sae,
        model,
        tokenizer,
        documents,
        hook,
        other=other,
        max_tokens=config.tokens,
        show_progress=show_progress,
        **options,
    )
    study = _Study(sae, model, tokenizer, documents, hook, config, data, other)
    results = {
        "hook": hook,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "tokens": data.n,
        "documents": len(data.texts),
        "quality": quality or {},
        "categories": study.categories(),
        "features": [study.feature(number) for number in config.features],
        "universality": study.universality(),
    }
    results["goals"] = goals.table(results)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", json.loads(json.dumps(results, default=float)))
    report.write(results, out)
    return results


class _Study:
    def __init__(
        self,
        sae: SAE,
        model: Any,
        tokenizer: Any,
        documents: Sequence[Any],
        hook: str,
        config: AnalyzeConfig,
        data: Collected,
        other: tuple[SAE, Any] | None,
    ) -> None:
        self.sae, self.model, self.tokenizer, self.documents, self.hook = sae, model, tokenizer, documents, hook
        self.config, self.data, self.other = config, data, other
        self.pearson = [feature_pearson(data.codes, data.binary, data.half == half) for half in (False, True)]
        self.clipped = feature_pearson(data.codes, data.clipped, data.half)
        self.generator = torch.Generator().manual_seed(config.seed)
        self._contexts = self._read_contexts()
        self._matcher = Matcher(data.other, data.n) if data.other is not None else None

    def _read_contexts(self) -> tuple[Tensor, Tensor]:
        """All full contexts of the scoring half, [B, T] token ids and their tokens' rows in `data` (−1: none)."""
        data, rows, ids = self.data, [], []
        row = 0
        for batch in context_batches(
            self.tokenizer, self.documents, self.config.context, self.config.batch_size, "cut"
        ):
            place = torch.full(batch.token_ids.shape, -1)
            count = int(batch.keep.sum())
            place[batch.keep] = torch.arange(row, row + count)
            row += count
            if row > data.n:
                break
            if batch.token_ids.shape[1] == self.config.context:
                whole = (batch.keep[:, 1:].all(1)) & data.half[place[:, -1].clamp(min=0)]
                ids.append(batch.token_ids[whole])
                rows.append(place[whole])
        if not ids:
            return torch.zeros(0, self.config.context, dtype=torch.int64), torch.zeros(
                0, self.config.context, dtype=torch.int64
            )
        return torch.cat(ids), torch.cat(rows)

    def categories(self) -> list[dict]:
        found = []
        for p, proxy in enumerate(self.data.proxies):
            inside = self.data.binary[:, p]
            if min(int(inside[self.data.half].sum()), int(inside[~self.data.half].sum())) >= 20:
                found.append(self._category(p, proxy))
        return found

    def feature(self, number: int) -> dict:
        """The row of any feature, beside the category that it follows best on the half where features are chosen."""
        p = int(self.pearson[0][number].nan_to_num(-1.0).argmax())
        return self._category(p, self.data.proxies[p], number)

    def _category(self, p: int, proxy: Proxy, feature: int | None = None) -> dict:
        """The row of a category's best feature, or of the one given."""
        data = self.data
        inside, scored = data.binary[:, p], data.half
        if feature is None:
            feature = int(self.pearson[0][:, p].argmax())
        neuron = int(data.neuron_pearson[0, :, p].argmax())
        r, neuron_r = float(self.pearson[1][feature, p]), float(data.neuron_pearson[1, neuron, p])
        tokens, values = data.codes.of(feature)
        highest = float(values.max()) if len(values) else 0.0
        held = scored[tokens]
        active, hit = values[held], inside[tokens[held]]
        upper = active > highest / 2
        base_rate = float(inside[scored].float().mean())
        specificity, specificity_upper = _share(hit), _share(hit[upper])
        result = {
            "name": proxy.name,
            "base_rate": base_rate,
            "feature": feature,
            "pearson": r,
            "pearson_clipped": float(self.clipped[feature, p]),
            "neuron": neuron,
            "neuron_pearson": neuron_r,
            "advantage": r - neuron_r,
            "density": len(values) / data.n,
            "max": highest,
            "specificity": specificity,
            "specificity_upper": specificity_upper,
            "lift": specificity / max(base_rate, 1e-12),
            "lift_upper": specificity_upper / max(base_rate, 1e-12),
            "recall": float(hit.sum()) / max(1, int(inside[scored].sum())),
            "bins": _bins(active, hit, highest),
            "neurons": self._neurons(feature),
            "contexts": self._top_contexts(feature),
            "match": self._match(feature),
            "ablation": None,
            "pinning": None,
            "logits": None,
        }
        if highest > 0 and len(self._contexts[0]):
            result["ablation"] = self._ablation(feature, inside)
            result["pinning"] = self._pinning(feature, neuron, highest, p)
            result["logits"] = self._logits(feature, highest, p)
        return result

    def _members(self, p: int) -> Tensor:
        """How much of each vocabulary entry belongs to the category: the share of its occurrences, [V]."""
        ids, size = self.data.token_ids, len(self.data.pieces)
        seen = torch.bincount(ids, minlength=size)
        return torch.bincount(ids, weights=self.data.binary[:, p].float(), minlength=size) / seen.clamp(min=1)

    def _neurons(self, feature: int) -> list[list[float]]:
        d = self.sae.W_dec[feature].detach().float()
        d = d / d.norm().clamp(min=1e-12)
        order = d.abs().topk(min(5, len(d))).indices.tolist()
        return [[n, float(d[n])] for n in order]

    def _top_contexts(self, feature: int, count: int = 20, around: int = 12) -> list[dict]:
        tokens, values = self.data.codes.of(feature)
        shown, seen = [], set()
        on = dict(zip(tokens.tolist(), values.tolist(), strict=True)) if len(tokens) < 2_000_000 else {}
        for i in values.argsort(descending=True).tolist():
            at = int(tokens[i])
            document = int(self.data.documents[at])
            if (document, at // (2 * around)) in seen:  # not five times the same sentence
                continue
            seen.add((document, at // (2 * around)))
            lo, hi = max(0, at - around), min(self.data.n, at + around + 1)
            rows = [row for row in range(lo, hi) if int(self.data.documents[row]) == document]
            parts = [self.data.pieces[int(self.data.token_ids[row])] for row in rows]
            shown.append(
                {"tokens": readable(parts), "activations": [on.get(row, 0.0) for row in rows], "at": rows.index(at)}
            )
            if len(shown) == count:
                break
        return shown

    def _ablation(self, feature: int, inside: Tensor) -> dict | None:
        """ΔNLL in nats per token when the feature is set to 0 over whole contexts; None if none has the category.

        inside: on tokens of the category; beside: on the others of the contexts that hold such tokens; outside: on
        contexts that hold none; top: after the 20 strongest activations.
        """
        ids, rows = self._contexts
        marked = inside[rows[:, 1:].clamp(min=0)] & (rows[:, 1:] >= 0)  # [B, T − 1]: is the predicted token a member
        with_it, without = marked.any(1).nonzero().flatten(), (~marked.any(1)).nonzero().flatten()
        if not len(with_it):
            return None
        limit = self.config.contexts_per_effect
        chosen = torch.cat(
            [part[torch.randperm(len(part), generator=self.generator)[:limit]] for part in (with_it, without)]
        )
        edit = effects.set_feature(self.sae, feature, 0.0)
        change, strength = [], []
        for part in chosen.split(self.config.batch_size):
            raw = effects.token_losses(self.model, self.hook, ids[part])
            change.append((effects.token_losses(self.model, self.hook, ids[part], edit) - raw).cpu())
            strength.append(self._activation_at(feature, rows[part][:, :-1]))
        delta, member = torch.cat(change), marked[chosen]
        near = torch.arange(len(chosen))[:, None].expand_as(member) < min(limit, len(with_it))
        top = torch.cat(strength).flatten().topk(min(20, delta.numel())).indices
        return {
            "inside": float(delta[member].mean()),
            "beside": _mean(delta[near & ~member]),
            "outside": _mean(delta[~near]),
            "top": float(delta.flatten()[top].mean()),
            "tokens_inside": int(member.sum()),
            "tokens_beside": int((near & ~member).sum()),
            "tokens_outside": int((~near).sum()),
        }

    def _activation_at(self, feature: int, rows: Tensor) -> Tensor:
        """The feature's activation at rows of the data, −1 meaning none: the shape of rows."""
        tokens, values = self.data.codes.of(feature)
        dense = torch.zeros(self.data.n + 1)
        dense[tokens] = values
        return dense[rows]

    def _pinning(self, feature: int, neuron: int, highest: float, p: int) -> dict:
        """Share of probability on the category while sampling from neutral prefixes, untouched and pinned."""
        config, members = self.config, self._members(p).float()
        neuron_max = float(self.data.neuron_max[neuron])
        edits = {
            "unpinned": None,
            "pinned": effects.set_feature(self.sae, feature, highest),
            "neuron": effects.set_neuron(neuron, neuron_max),
        }
        result: dict[str, Any] = {"value": highest, "neuron_value": neuron_max, "prefix": list(PREFIXES), "samples": {}}
        start = self.tokenizer.bos_token_id
        for name, edit in edits.items():
            shares, texts = [], []
            for number, prefix in enumerate(PREFIXES):
                ids = self.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
                begin = torch.tensor([*([start] if start is not None else []), *ids], dtype=torch.int64)
                if not len(begin):  # nothing to begin with: no prefix, and no begin-of-text token in the vocabulary
                    continue
                share, sampled = effects.sample(
                    self.model, self.hook, begin, edit, tokens=config.sample_tokens, count=config.samples,
                    members=members, seed=config.seed + number,
                )  # fmt: skip
                shares.append(share)
                texts.append("".join(readable([self.data.pieces[i] for i in sampled[0].tolist()])))
            result[name] = sum(shares) / len(shares)
            result["samples"][name] = texts
        return result

    def _logits(self, feature: int, highest: float, p: int) -> dict:
        ids = self._contexts[0]
        some = ids[torch.randperm(len(ids), generator=self.generator)[:16]]
        weights = effects.logit_weights(self.model, self.hook, self.sae, feature, some, step=highest / 4)
        weights = weights[: len(self.data.pieces)]
        member = self._members(p) > 0.5
        edges = torch.linspace(float(weights.min()), float(weights.max()), 41)
        counts = [torch.histogram(part, edges).hist.int().tolist() for part in (weights[member], weights[~member])]
        order = weights.argsort(descending=True)

        def named(indices: Tensor) -> list[list]:
            return [[readable([self.data.pieces[i]])[0], float(weights[i])] for i in indices.tolist()]

        return {
            "top": named(order[:10]),
            "bottom": named(order[-10:].flip(0)),
            "edges": edges.tolist(),
            "inside": counts[0],
            "outside": counts[1],
        }

    def _match(self, feature: int) -> dict | None:
        if self.other is None or self._matcher is None:
            return None
        r = self._matcher.pearson(*self.data.codes.of(feature))
        best = int(r.argmax())
        result = {"feature": best, "pearson": float(r[best]), "logit_pearson": None}
        ids = self._contexts[0]
        if len(ids):
            some = ids[:16]
            weights = [
                effects.logit_weights(model, self.hook, sae, f, some, step=1.0)
                for sae, model, f in ((self.sae, self.model, feature), (*self.other, best))
            ]
            result["logit_pearson"] = float(torch.corrcoef(torch.stack(weights))[0, 1])
        return result

    def universality(self) -> dict | None:
        """Medians of the best match in the other run: over features drawn at random, and over all neurons."""
        data = self.data
        if self._matcher is None or data.other_neuron_pearson is None:
            return None
        alive = (data.codes.offsets.diff() > 10).nonzero().flatten()
        drawn = alive[torch.randperm(len(alive), generator=self.generator)[: self.config.universality_features]]
        best = [self._matcher.pearson(*data.codes.of(int(f))).max() for f in drawn] or [torch.zeros(())]
        return {
            "features": float(torch.stack(best).median()),
            "neurons": float(data.other_neuron_pearson.amax(1).median()),
            "count": len(drawn),
        }


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def _share(hits: Tensor) -> float:
    return float(hits.float().mean()) if len(hits) else 0.0


def _bins(active: Tensor, hit: Tensor, highest: float, count: int = 11) -> dict:
    edges = torch.linspace(0.0, max(highest, 1e-6), count + 1)
    number = torch.bucketize(active, edges[1:-1])
    return {
        "edges": edges.tolist(),
        "inside": torch.bincount(number[hit], minlength=count).tolist(),
        "outside": torch.bincount(number[~hit], minlength=count).tolist(),
    }
