"""From a dictionary and text to a report: the best feature of every category, and whether it is real.

Features and neurons are chosen on one half of the documents and scored on the other half. Formulas: Bricken et al.
2023, "Towards Monosemanticity". Axes: n tokens, F features, D neurons, P categories.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsae.analysis import goals, paper_forms
from fastsae.analysis.cards import Cards
from fastsae.analysis.evidence import control_sources
from fastsae.analysis.gaps import GapCounter, Gaps
from fastsae.analysis.held_out import HeldOut
from fastsae.analysis.logit_map import ContextSample, LogitMap, logit_map
from fastsae.analysis.matches import SHUFFLED, TRAINED, Match, MatchConfig
from fastsae.analysis.neurons import ClosestHeldOut, neuron_basis
from fastsae.analysis.pages import Pages
from fastsae.analysis.paper_forms import PaperForm
from fastsae.analysis.passes import Watcher, take_survey
from fastsae.analysis.proxies import DEFAULT, Proxy, proxies
from fastsae.analysis.quality import quality as quality_of
from fastsae.analysis.splitting import Split, SplitConfig, Splitting
from fastsae.analysis.stream import Read, Source, check_features
from fastsae.analysis.study import Effects, Known, Study, chosen_features, left_out, not_measured
from fastsae.analysis.survey import Survey, SurveyConfig
from fastsae.analysis.text import Text
from fastsae.analysis.universality import Matching, shuffled
from fastsae.errors import FastSAEError
from fastsae.evaluate import EvalConfig, evaluate
from fastsae.files import write_json
from fastsae.sae import SAE

UNFINISHED = "unfinished"  # folder, in that of the results, of a pass that can go on
_LOGIT_CONTEXTS = 8  # over which logit weights are averaged: the final norm differs little between tokens


@dataclass(frozen=True)
class AnalyzeConfig:
    """What to look for, and how long to look."""

    categories: tuple[str, ...] = DEFAULT
    """Scripts by their Unicode name, base64, DNA, hex, regex:…, tokens:…; Arabic/paper, base64/paper: as the paper."""
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
    control_tokens: int = 150_000
    """About how many tokens, spread over the text, are read for what features are compared with: neurons, random
    directions, a dictionary of a shuffled model; and for what a feature misses."""
    explain_features: int = 48
    """Features, drawn at random, that the offline explainer explains, and as many of each control; 0: none."""
    explain_up_to: int = 2000
    """Features that have an explanation on their page: those shown, then others at random; a tenth of a second each."""
    effects_up_to: int = 1000
    """Features that have ΔNLL under the strongest examples on their page: those shown, then others at random; each
    costs a forward pass for every example."""
    quality_tokens: int = 100_000
    """Tokens on which the dictionary is evaluated for the table of quality, at most; 0: no table."""
    seed: int = 0
    """Seeds the samples and the features drawn."""

    def __post_init__(self) -> None:
        if unnamed := [one for one in self.categories if not isinstance(one, str)]:
            raise FastSAEError(
                f"categories are names, got {unnamed[0]!r}: give functions and proxies to take_survey as more_proxies"
            )
        if not proxies(self.categories):
            raise FastSAEError("expected at least one category, got none")
        if self.tokens is not None and self.tokens < 1:
            raise FastSAEError(f"tokens must be at least 1, got {self.tokens}; leave it out to read all")
        for least, names in (
            (2, ("context",)),  # a begin-of-text token, and something behind it
            (1, ("batch_size", "contexts_per_effect", "sample_tokens", "samples", "control_tokens")),
            (0, ("explain_features", "explain_up_to", "effects_up_to", "quality_tokens")),
        ):
            for name in names:
                if getattr(self, name) < least:
                    raise FastSAEError(f"{name} must be at least {least}, got {getattr(self, name)}")


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
    control: tuple[SAE, Any] | None = None,
    widths: Sequence[SAE] = (),
    quality: dict | None = None,
    resume: bool = True,
    show_progress: bool = True,
) -> dict:
    """Writes a site of all features (out/index.html), out/report.html on the categories, out/results.json,
    out/survey.npz and PNG figures; returns the results.

    documents: text that neither model nor SAE was trained on (strings, or objects with a `text`). other: (SAE, model)
    of another run with the same tokenizer, in which every feature is looked for. control: (SAE, model) of a model with
    shuffled weights (universality.shuffled) and a dictionary trained on it; without one, other's dictionary reads a
    shuffled copy of its model. widths: narrower and wider dictionaries of the same model and hook, to see features
    split. quality: figures of training and evaluation to show beside; None evaluates the dictionary. Categories that do
    not occur in both halves of the text are left out; "notes" of the results says which effects are, and why. resume:
    go on with the pass over the text where an analysis of the same things was stopped in `out`, to the same bits.

    Raises FastSAEError: what take_survey raises; an unfinished analysis there of other things, or any, without resume.
    """
    from fastsae import figures, report

    figures.require_matplotlib()
    config = config or AnalyzeConfig()
    check_features(config.features, sae.cfg.d_sae)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(Source(sae, model, hook), tokenizer, documents, config, show_progress)
    first = run.first(other, control, widths, out / UNFINISHED, resume)
    cards = Cards(first.survey)
    chosen = chosen_features(cards)
    second = run.second(control, chosen, first.survey.l0())
    controls = {name: Cards(survey) for name, survey in second.surveys.items() if name != "features"}
    logits, no_logits = run.logits()
    known = Known(
        run.source, tokenizer, cards, controls, run.held_out, logits, neuron_basis(sae.W_dec, k=5),
        first.match, second.gaps, run.text.bytes_of, first.papers, second.closest,
    )  # fmt: skip
    how = Effects(config.batch_size, config.sample_tokens, config.samples, config.seed)
    study = Study(known, how)
    rows = [study.row(p, feature) for p, feature in chosen.items()]
    asked = [study.row(study.closest_category(f), f) for f in config.features]
    shown = [row["feature"] for row in (*rows, *asked)]
    pages = Pages(sae, hook, cards, run.text.bytes_of, config.seed, show_progress)
    results = {
        **pages.sizes(),
        "quality": run.quality() if quality is None else quality,
        "categories": rows,
        "left_out": left_out(cards),
        "features": asked,
        "notes": not_measured(run.held_out, [*rows, *asked], no_logits),
        "universality": _universality(first.match),
        "splitting": _splitting(first.split, sae.cfg.d_sae, chosen, cards.survey.proxies),
        "explain": pages.explained(second.surveys, shown, config.explain_features, config.explain_up_to),
    }
    results["goals"] = goals.table(results)
    first.survey.save(out / "survey.npz")
    if first.split is not None:
        first.split.save(out / "split.json")
    if first.match is not None:
        first.match.save(out / "match.json")
    write_json(out / "results.json", json.loads(json.dumps(results, default=float)))
    report.write(results, out)
    pages.write(
        out, results, logits=known.logits, match=first.match, split=first.split, layers=run.layers,
        effects=pages.effects(
            model, tokenizer, run.text, pages.drawn(shown, config.effects_up_to), config.batch_size
        ),
    )  # fmt: skip
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return results


class _Shown:
    """A part of the pass that is shown something of every Read; see passes.Watcher."""

    def __init__(self, part: Any, of: Callable[[Read], Any]) -> None:
        self._part, self._of = part, of
        self.arrays, self.load = part.arrays, part.load

    def add(self, some: Read) -> None:
        self._part.add(self._of(some))


class _First(NamedTuple):
    survey: Survey
    papers: dict[str, PaperForm]
    match: Match | None
    split: Split | None


class _Second(NamedTuple):
    surveys: dict[str, Survey]
    gaps: dict[int, Gaps]
    closest: dict[int, float | None]


class _Run:
    """The passes over the text. All of it once for the dictionary and those it is compared with feature by feature; a
    part of it once more, when the best features are known, for controls, of which neurons are dense and take time."""

    def __init__(
        self, source: Source, tokenizer: Any, documents: Sequence[Any], config: AnalyzeConfig, show_progress: bool
    ) -> None:
        self.source, self.tokenizer, self.documents, self.config = source, tokenizer, documents, config
        self.show, self.layers = show_progress, [source.sae]
        chosen: list[Proxy] = proxies(config.categories)
        self.papers = paper_forms.beside(chosen)
        self.text = Text(tokenizer, documents, [*chosen, *self.papers])
        self.held_out = HeldOut(
            self.text, tokenizer, config.context, config.contexts_per_effect, config.tokens, config.seed
        )
        self._contexts = ContextSample(_LOGIT_CONTEXTS, config.seed)
        self.how = SurveyConfig(
            categories=config.categories, tokens=config.tokens, context=config.context,
            batch_size=config.batch_size, seed=config.seed,
        )  # fmt: skip

    def first(
        self, other: tuple[SAE, Any] | None, control: tuple[SAE, Any] | None, widths: Sequence[SAE], out: Path,
        resume: bool,
    ) -> _First:  # fmt: skip
        sae, model, hook = self.source
        beside: list[Source] = []
        matching = splitting = None
        if other is not None:
            second = Source(other[0], other[1], hook)
            third = Source(*(control or (other[0], shuffled(other[1], self.config.seed))), hook)
            matching = Matching(
                self.source, second, third, self.text.half.tolist(), MatchConfig(context=self.config.context),
                SHUFFLED if control is None else TRAINED,
            )  # fmt: skip
            beside += [second, third]
        compared = len(beside)
        self.layers = layers = sorted([sae, *widths], key=lambda one: one.cfg.d_sae)
        if widths:
            splitting = Splitting([one.cfg.d_sae for one in layers], SplitConfig())
            beside += [Source(one, model, hook) for one in widths]

        also: dict[str, Watcher] = {}
        if matching is not None:
            kept = slice(0, 1 + compared)
            also["match"] = _Shown(matching, lambda some: some._replace(xs=some.xs[kept], codes=some.codes[kept]))
        if splitting is not None:
            order = sorted(range(len(layers)), key=lambda i: ([sae, *widths][i]).cfg.d_sae)
            also["split"] = _Shown(
                splitting, lambda some: [(some.codes[0], *some.codes[1 + compared :])[i] for i in order]
            )

        (survey,) = take_survey(
            self.source, self.tokenizer, self.documents, self.how, more_proxies=self.papers, beside=beside,
            also=also, text=self.text, out=out, resume=resume, show_progress=self.show,
        )  # fmt: skip
        return _First(
            *paper_forms.taken_apart(survey, len(self.papers)), None if matching is None else matching.result(),
            None if splitting is None else splitting.result(),
        )  # fmt: skip

    def second(self, control: tuple[SAE, Any] | None, chosen: dict[int, int], l0: float) -> _Second:
        """l0: features on per token, on average, as the first pass has found."""
        sae, model, hook = self.source
        limit = min(len(self.text), self.config.tokens or len(self.text))
        sources = {"features": self.source, **control_sources(self.source, l0, self.config.seed)}
        if control is not None:
            sources["shuffled model"] = Source(*control, hook)
        counters = {p: GapCounter(f, sae.cfg.d_sae, seed=self.config.seed) for p, f in chosen.items()}

        closest = ClosestHeldOut([*chosen.values(), *self.config.features], sae.cfg.d_sae, sae.cfg.d_in)

        def watch(some: Read) -> None:
            assert some.context_ids is not None and some.grid is not None
            self._contexts.add(some.context_ids, some.grid)
            documents = some.documents.numpy()
            closest.add(some.codes[0], some.xs[0], torch.from_numpy(self.text.half[documents]))
            where = self.text.first[documents] + some.positions.numpy()
            inside, scored = self.text.scores(documents, where) > 0, torch.from_numpy(self.text.half[documents])
            for p, counter in counters.items():
                counter.add(some, torch.from_numpy(inside[:, p]), scored)

        # Bookkeeping of neurons costs their density: none of the weakest examples, no pairs.
        how = replace(self.how, bottom=0, cofiring_up_to=0)
        surveys = take_survey(
            list(sources.values()), self.tokenizer, self.documents, how, more_proxies=self.papers, watch=watch,
            text=self.text, world=max(1, math.ceil(limit / self.config.control_tokens)), show_progress=self.show,
        )  # fmt: skip
        found = {p: counter.result() for p, counter in counters.items() if counter.tokens}
        return _Second(dict(zip(sources, surveys, strict=True)), found, closest.result())

    def logits(self) -> tuple[LogitMap | None, str | None]:
        """After the second pass. (None, why) for a model without an unembedding that the hook leads to."""
        try:
            return logit_map(self.source.model, self.source.hook, *self._contexts.contexts()), None
        except FastSAEError as error:
            return None, str(error)

    def quality(self) -> dict:
        """What `evaluate` finds on the first tokens of the text; empty without any."""
        config = self.config
        if not config.quality_tokens:
            return {}
        tokens = min(config.quality_tokens, config.tokens or config.quality_tokens)
        how = EvalConfig(tokens=tokens, context=config.context, batch_size=config.batch_size)
        sae, model, hook = self.source
        found = evaluate(sae, model, self.tokenizer, self.documents, hook, how, show_progress=self.show)
        return {"a": {"eval": quality_of(sae, found, seed=config.seed).to_dict()}}


def _universality(match: Match | None) -> dict | None:
    """Medians over live features, over neurons, and of the control; see Match for which of them are in-sample."""
    if match is None:
        return None
    found = match.medians()
    named = {"features": "pearson", "one_to_one": "assigned_pearson", "one_to_one_held_out": "assigned_held_out"}
    named |= {"logits": "logit_pearson", "best_logits": "best_logit_pearson"}
    rest = [name for name in found if name not in named.values()]
    return {
        **{key: found[name] for key, name in [*named.items(), *zip(rest, rest, strict=True)]},
        "control_kind": match.control_kind, "count": int(match.live.sum()),
    }  # fmt: skip


def _splitting(split: Split | None, d_sae: int, chosen: dict[int, int], names: Sequence[str]) -> dict | None:
    """The steps between widths, and what becomes of the categories' features: their parents and children."""
    if split is None:
        return None
    layer = split.widths.index(d_sae)
    rows = []
    for p, feature in chosen.items():
        rows.append({
            "name": names[p],
            "feature": feature,
            "parents": split.parents(layer, feature) if layer > 0 else [],
            "children": split.children(layer, feature) if layer + 1 < len(split.widths) else [],
        })  # fmt: skip
    return {"widths": list(split.widths), "steps": split.summary(), "categories": rows}
