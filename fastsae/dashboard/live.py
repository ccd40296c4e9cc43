"""Questions to a model with its dictionary, while somebody waits: what fires on a text, what an edit changes.

One thread at a time runs the model: an edit is a hook on it, and would act on whoever runs it beside. Everything is
bounded, so that one question cannot keep the others waiting for long. Axes: n tokens, F features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fastsae.analysis import steering
from fastsae.analysis.effects import FeatureEdit, Mode
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.patterns import Function, PatternError, Regex, compiled
from fastsae.analysis.proxies import Proxy, proxies
from fastsae.analysis.stream import Read, Source, encoded, read
from fastsae.analysis.text import Text, text_of
from fastsae.analysis.universality import Match, MatchConfig, Matching
from fastsae.contexts import model_limits
from fastsae.dashboard.data import Spelling
from fastsae.dashboard.jobs import Job
from fastsae.dashboard.plain import plain
from fastsae.dashboard.proxy_scores import ProxySums
from fastsae.errors import FastSAEError
from fastsae.hooks import activations
from fastsae.visible import visible

TEXT_TOKENS = 1024  # of a text that is looked into
PROMPT_TOKENS = 512
SHOWN_FEATURES, SHOWN_PER_TOKEN = 50, 8
REGEX_SECONDS, REGEX_SECONDS_IN_ALL = 2.0, 60.0  # on one document, on all of them
_PATIENCE, _WAITING = 20.0, 24  # seconds that a short question waits for the model, and how many do at once


class BusyError(FastSAEError):
    """The model is at work for somebody else, and stayed so."""


class Live:
    """A dictionary with its model, tokenizer and text to stream.

    maximum: [F], largest activation of each feature as the report has it: values are read against it, and edits take
    multiples of it. context: tokens in a context, as the report was made with. other: another dictionary, to compare
    with. name: what the status calls it.
    Raises FastSAEError: no such module, a dictionary of another width, a tokenizer of another model, a report of
    another dictionary.
    """

    def __init__(
        self, source: Source, tokenizer: Any, documents: Sequence[Any] = (), *, maximum: np.ndarray | None = None,
        context: int = 128, other: Source | None = None, name: str = "",
    ) -> None:  # fmt: skip
        self.source, self.tokenizer, self.documents, self.other, self.name = source, tokenizer, documents, other, name
        self._lock, self._short = threading.Lock(), threading.BoundedSemaphore(_WAITING)
        F = source.sae.cfg.d_sae
        if maximum is not None and len(maximum) != F:
            raise FastSAEError(
                f"the report is of {len(maximum)} features, the dictionary has {F}: give the dictionary that the "
                "report was made of"
            )
        self.maximum = None if maximum is None else np.asarray(maximum, dtype=np.float64)
        longest = getattr(getattr(source.model, "config", None), "max_position_embeddings", None)
        self.context = min(context, longest or context)
        self.bytes_of = TokenBytes.of(tokenizer)
        self.special = set(tokenizer.all_special_ids)
        self._try_out(source)
        if other is not None:
            self._try_out(other)

    def _try_out(self, source: Source) -> None:
        """Raises what a first question would, before anybody waits for an answer."""
        import torch

        model_limits(source.model, self.tokenizer, self.context)
        start = self.tokenizer.bos_token_id
        ids = torch.tensor([[0 if start is None else start]])
        encoded(source.sae, activations(source.model, source.hook, ids)[0], source.hook)

    def describe(self) -> dict[str, Any]:
        """What the status page tells."""
        sae, _, hook = self.source
        return {
            "model": self.name, "hook": hook, "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "context": self.context,
            "documents": len(self.documents), "other": None if self.other is None else self.other.sae.cfg.d_sae,
        }  # fmt: skip

    @contextmanager
    def _model(self, seconds: float = -1) -> Iterator[None]:
        """The model for this thread alone. Raises BusyError where it was not to be had in time."""
        if not self._lock.acquire(timeout=seconds):
            raise BusyError("the model is busy with another question: try again in a moment")
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _soon(self) -> Iterator[None]:
        """The model for a short question, for which somebody's connection waits: so many of them and no more."""
        if not self._short.acquire(blocking=False):
            raise BusyError(f"{_WAITING} questions wait for the model already: try again in a moment")
        try:
            with self._model(_PATIENCE):
                yield
        finally:
            self._short.release()

    def _one_by_one(self, reads: Iterator[Read]) -> Iterator[Read]:
        """The same reads; between two of them others have the model."""
        while True:
            with self._model():
                some = next(reads, None)
            if some is None:
                return
            yield some

    # --- what fires -------------------------------------------------------------------------------------------------

    def activations(self, text: str) -> dict[str, Any]:
        """Which features fire on which token of a text.

        tokens: text as a reader sees it, id, special, part (of a character that a later token completes), count (of
        active features), top (the strongest: [feature, value]).
        features: the strongest first, by peak as a share of the feature's maximum in the report: feature, peak, at (the
        token with the peak), count, maximum, values ([token, value] of all tokens on which it fires).
        Raises FastSAEError for an empty text, one of more than TEXT_TOKENS tokens, and where the model stays busy.
        """
        ids = self._ids(text, TEXT_TOKENS, "the text")
        token, feature, value = [], [], []
        with self._soon():
            for some in read([self.source], self.tokenizer, [text], context=self.context, batch_size=16):
                if not len(some.token_ids):
                    continue
                code = some.codes[0]
                on = code.valid() & (code.values > 0)
                rows, slots = on.nonzero(as_tuple=True)
                token.append(some.positions[rows.cpu()].numpy())
                feature.append(code.indices[rows, slots].cpu().numpy().astype(np.int64))
                value.append(code.values[rows, slots].float().cpu().numpy())
        columns = [np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in (token, feature, value)]
        return plain({"tokens": self._tokens(ids, *columns), **self._strongest(*columns)})

    def _ids(self, text: str, limit: int, what: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        if not ids:
            raise FastSAEError(f"{what} has no tokens: write something")
        if len(ids) > limit:
            raise FastSAEError(f"{what} has {len(ids)} tokens, at most {limit} are read: shorten it")
        return list(ids)

    def _tokens(self, ids: list[int], token: np.ndarray, feature: np.ndarray, value: np.ndarray) -> list[dict]:
        shown, parts = Spelling(self.bytes_of).window(np.array(ids))
        names = self.tokenizer.convert_ids_to_tokens(ids)
        inside = set(parts)
        rows = [
            {"text": visible(name) if i in self.special else text, "id": i, "special": i in self.special,
             "part": place in inside, "count": 0, "top": []}
            for place, (i, text, name) in enumerate(zip(ids, shown, names, strict=True))
        ]  # fmt: skip
        for n in np.lexsort((-value, token)).tolist():
            row = rows[token[n]]
            row["count"] += 1
            if len(row["top"]) < SHOWN_PER_TOKEN:
                row["top"].append([int(feature[n]), round(float(value[n]), 4)])
        return rows

    def _strongest(self, token: np.ndarray, feature: np.ndarray, value: np.ndarray) -> dict[str, Any]:
        found, back = np.unique(feature, return_inverse=True)
        peak = np.zeros(len(found))
        np.maximum.at(peak, back, value)
        known = np.ones(len(found)) if self.maximum is None else self.maximum[found]
        strength = np.where(known > 0, peak / np.where(known > 0, known, 1), peak)
        rows = []
        for n in np.argsort(-strength, kind="stable")[:SHOWN_FEATURES].tolist():
            here = np.flatnonzero(back == n)
            here = here[np.argsort(token[here])]
            rows.append({
                "feature": found[n],
                "peak": peak[n],
                "at": token[here][value[here].argmax()],
                "count": len(here),
                "maximum": None if self.maximum is None else known[n],
                "values": [[int(t), round(float(v), 4)] for t, v in zip(token[here], value[here], strict=True)],
            })  # fmt: skip
        return {"active": len(found), "features": rows}

    # --- what an edit changes ---------------------------------------------------------------------------------------

    def edits(self, wanted: Sequence[tuple[int, Mode, float | None, float]]) -> list[FeatureEdit]:
        """Edits from (feature, mode, value, multiple): where value is None it is multiple × the feature's maximum.

        Raises FastSAEError for a feature that the dictionary does not have, one named twice, and one without a maximum.
        """
        F, made = self.source.sae.cfg.d_sae, []
        for feature, mode, value, multiple in wanted:
            if not 0 <= feature < F:
                raise FastSAEError(f"features must be numbers from 0 to {F - 1}, got {feature}")
            if mode != "ablate" and value is None:
                highest = 0.0 if self.maximum is None else float(self.maximum[feature])
                if highest <= 0:
                    raise FastSAEError(f"feature {feature} never fired in the report: give a value, not a multiple")
                value = multiple * highest
            made.append(FeatureEdit(feature, 0.0 if mode == "ablate" else float(value or 0), mode))
        if len({edit.feature for edit in made}) < len(made):
            raise FastSAEError(f"expected one edit for each feature, got features {[e.feature for e in made]}")
        return made

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises FastSAEError for a prompt of more than PROMPT_TOKENS tokens, or an empty one that cannot begin."""
        for prompt in prompts:
            if prompt or self.tokenizer.bos_token_id is None:
                self._ids(prompt, PROMPT_TOKENS, "the prompt")

    def steer(
        self, job: Job, edits: Sequence[FeatureEdit], prompts: Sequence[str], *, tokens: int, samples: int,
        temperature: float, seed: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Continuations of every prompt without and with the edits (steering.steer); job counts written tokens."""
        job.total = 2 * tokens * len(prompts)
        found = []
        for number, prompt in enumerate(prompts):
            with self._model():  # given back between prompts: short questions get their turn
                found += steering.steer(
                    self.source.sae, self.source.model, self.tokenizer, [prompt], self.source.hook, edits,
                    tokens=tokens, samples=samples, temperature=temperature, seed=seed + number, watch=job.advance,
                )  # fmt: skip
        return plain({"edits": [asdict(edit) for edit in edits], "prompts": [asdict(item) for item in found]})

    # --- all features -----------------------------------------------------------------------------------------------

    def proxy(self, name: str, job: Job | None = None) -> Proxy:
        """The proxy of that name (proxies.proxies), its regular expression one that gives up and lets others run.

        Raises FastSAEError for a name that means nothing.
        """
        (made,) = proxies([name])
        return Function(made.name, _patient(made.pattern, job)) if isinstance(made, Regex) else made

    def score_proxy(self, job: Job, name: str, tokens: int) -> ProxySums:
        """Sums of every feature against a proxy over about so many tokens, drawn as whole documents from the text."""
        sae = self.source.sae
        chosen = self.proxy(name, job)
        documents = self._some(tokens)
        text = Text(self.tokenizer, documents, [chosen])
        job.total = len(text)
        sums = ProxySums(sae.cfg.d_sae, sae.cfg.d_in)
        for some in self._one_by_one(read([self.source], self.tokenizer, documents, context=self.context)):
            numbers = some.documents.numpy()
            inside = text.scores(numbers, text.first[numbers] + some.positions.numpy())[:, 0] > 0
            sums.add(some, inside, text.half[numbers])
            job.advance(len(some.token_ids))
        return sums

    def compare(self, job: Job, tokens: int, config: MatchConfig | None = None) -> Match:
        """Every feature looked for in the other dictionary (universality.match), on about so many tokens.

        Raises FastSAEError without another dictionary, and what `match` raises.
        """
        if self.other is None:
            raise FastSAEError("there is no other dictionary to compare with: start the server with --other-sae")
        config = replace(config or MatchConfig(), shuffled_control=False, context=self.context)
        documents = self._some(tokens, least=2)
        text = Text(self.tokenizer, documents)
        matching = Matching(self.source, self.other, None, text.half.tolist(), config)
        job.total = len(text)
        sources = [self.source, self.other]
        for some in self._one_by_one(read(sources, self.tokenizer, documents, context=self.context)):
            matching.add(some)
            job.advance(len(some.token_ids))
        with self._model():
            return matching.result()

    def _some(self, tokens: int, least: int = 1) -> list[Any]:
        """Documents of about so many tokens in all, drawn from the whole text, in its order."""
        if len(self.documents) < least:
            raise FastSAEError(f"expected text of {least} documents or more to read, got {len(self.documents)}")
        chosen, left = [], tokens
        for number in np.random.default_rng(0).permutation(len(self.documents)).tolist():
            text = text_of(self.documents[number])
            chosen.append(number)
            left -= len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if left <= 0 and len(chosen) >= least:
                break
        return [self.documents[number] for number in sorted(chosen)]


def _patient(pattern: str, job: Job | None) -> Callable[[str], list[tuple[int, int]]]:
    """The pattern's matches in a text, as spans, without the interpreter's lock; bounded in time, and stops with the
    job. Raises PatternError where it takes too long."""
    import time

    found = compiled(pattern)
    spent = 0.0

    def spans(text: str) -> list[tuple[int, int]]:
        nonlocal spent
        if job is not None:
            job.check()
        began = time.monotonic()
        try:
            result = [match.span() for match in found.finditer(text, timeout=REGEX_SECONDS, concurrent=True)]
        except TimeoutError:
            spent = REGEX_SECONDS_IN_ALL
            result = []
        spent += time.monotonic() - began
        if spent >= REGEX_SECONDS_IN_ALL:
            raise PatternError(f"the pattern {pattern!r} takes too long on this text: write it without nested repeats")
        return result

    return spans
