"""Explain many features and score the explanations: in parallel, logged as they come, resumed where they stopped."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.analysis.examples import Evidence, Example
from fastsae.analysis.explain import protocol
from fastsae.analysis.explain.accounting import Accounting, Ledger, append_line
from fastsae.analysis.explain.compare import compare
from fastsae.analysis.explain.config import ExplainConfig, explainer_of
from fastsae.analysis.explain.explainers import (
    Budget,
    Explainer,
    Explanation,
    FeatureFailed,
    Refused,
    Session,
    Stopped,
)
from fastsae.analysis.explain.pattern import Pattern
from fastsae.analysis.labels import TokenBytes
from fastsae.errors import FastSAEError
from fastsae.files import write_json
from fastsae.progress import progress

Halves = tuple[Evidence, Evidence]  # of one feature: to explain from, and held out to score on


@dataclass(frozen=True)
class ExplainResult:
    """A feature's explanation and its scores on held-out text.

    spearman: of predicted and true levels over all tokens of the held-out windows; spearman_weighted: the same with
    every token weighted by what it stands for in the text (`protocol.token_weights`), None where that is not counted.
    detection, fuzzing: balanced accuracies, None where there are no windows to judge. failed: which parts failed and
    why; their scores are None, never 0. tokens: how many were predicted. key: what it was made from, for resuming.
    """

    feature: int
    group: str
    explanation: str = ""
    pattern: Pattern | None = None
    spearman: float | None = None
    spearman_weighted: float | None = None
    detection: float | None = None
    fuzzing: float | None = None
    failed: str | None = None
    shown: int = 0
    windows: int = 0
    tokens: int = 0
    judged: int = 0
    accounting: Accounting = field(default_factory=Accounting)
    key: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        pattern = self.pattern.to_json() if self.pattern is not None else None
        return data | {"pattern": pattern, "accounting": asdict(self.accounting)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ExplainResult:
        """What to_json wrote."""
        pattern = Pattern.from_json(data["pattern"]) if data["pattern"] is not None else None
        return cls(**(data | {"pattern": pattern, "accounting": Accounting(**data["accounting"])}))


def explain_features(
    groups: Mapping[str, Sequence[Halves]],
    bytes_of: TokenBytes,
    config: ExplainConfig | None = None,
    out: Path | None = None,
    *,
    explainer: Explainer | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Explains and scores every group (features, and controls: neurons, a shuffled model, random features).

    groups: name → of each feature its evidence from the half to explain from and from the held-out half. out: folder
    for explain.jsonl (the log), explain.spent.jsonl (what was paid), explain.json (everything) and the answers of
    models; a second run goes on there. explainer: left out, the one that config names.
    Returns {"results": {group: [ExplainResult]}, "summary": {group: {score: Summary}}, "accounting": Accounting of all
    runs in this folder, "session": of this one}. Raises FastSAEError where no feature can be explained (endpoint down,
    no key, no credit).
    """
    config = config or ExplainConfig()
    explainer = explainer or explainer_of(config, cache_in(out))
    ledger = Ledger(out / "explain.spent.jsonl" if out is not None else None)
    budget = Budget(config.max_requests)
    results = {}
    for name, pairs in groups.items():
        results[name] = explain(
            pairs,
            explainer,
            bytes_of,
            config,
            group=name,
            log=out / "explain.jsonl" if out is not None else None,
            budget=budget,
            ledger=ledger,
            show_progress=show_progress,
        )
    summary = compare(results, seed=config.seed)
    if out is not None:
        write_json(
            out / "explain.json",
            {
                "explainer": explainer.identity(),
                "summary": {name: {k: asdict(s) for k, s in row.items()} for name, row in summary.items()},
                "accounting": asdict(ledger.total),
                "session": asdict(ledger.session),
                "results": {name: [result.to_json() for result in group] for name, group in results.items()},
            },
        )
    return {"results": results, "summary": summary, "accounting": ledger.total, "session": ledger.session}


def cache_in(out: Path | None) -> Path | None:
    """Where answers are kept unless the configuration says."""
    return None if out is None else out / "explain.cache"


def explain(
    pairs: Sequence[Halves],
    explainer: Explainer,
    bytes_of: TokenBytes,
    config: ExplainConfig | None = None,
    *,
    group: str = "features",
    log: Path | None = None,
    budget: Budget | None = None,
    ledger: Ledger | None = None,
    show_progress: bool = True,
) -> list[ExplainResult]:
    """The results of all pairs in their order.

    log: a JSONL file that gets each result as it comes, with one line each; what stands there for the same evidence,
    explainer and settings is not done again. What a server refused, and what is left when the budget is spent, is
    reported as failed and not logged. ledger: counts what is spent. After Ctrl-C no new request is sent; those in
    flight are waited for and kept in the cache.
    """
    config = config or ExplainConfig()
    keys = [_key(pair, explainer, config, group, bytes_of) for pair in pairs]
    known = _logged(log) if log is not None else {}
    results: list[ExplainResult | None] = [known.get(key) for key in keys]
    todo = [i for i, result in enumerate(results) if result is None]
    budget, ledger = budget or Budget(config.max_requests), ledger or Ledger()

    def one(i: int, stop: threading.Event) -> ExplainResult:
        session = Session(ledger=ledger, budget=budget, stop=stop)
        return _explained(pairs[i], explainer, bytes_of, config, session, group, keys[i])

    title = f"explain {group}"
    with progress(title, len(pairs), "features", done=len(pairs) - len(todo), show=show_progress) as meter:
        with closing(_run(todo, one, explainer.concurrency)) as finished:  # closed at once, so that the others stop
            for i, result in finished:
                results[i] = result
                if log is not None and result.key:
                    append_line(log, result.to_json())
                meter.advance(1)
    return [result for result in results if result is not None]


def _run(todo: list[int], one: Any, concurrency: int) -> Generator[tuple[int, ExplainResult], None, None]:
    """(i, one(i)) as they are done. Stops the others when one raises, or on Ctrl-C."""
    stop = threading.Event()
    if concurrency == 1:
        for i in todo:
            yield i, one(i, stop)
        return
    with ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="explain") as pool:
        futures = {pool.submit(one, i, stop): i for i in todo}
        try:
            for done in as_completed(futures):
                yield futures[done], done.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


def _explained(
    pair: Halves,
    explainer: Explainer,
    bytes_of: TokenBytes,
    config: ExplainConfig,
    session: Session,
    group: str,
    key: str,
) -> ExplainResult:
    found: dict[str, Any] = {"feature": pair[0].feature, "group": group, "accounting": session.account, "key": key}
    try:
        _score(pair, explainer, bytes_of, config, session, found)
    except FeatureFailed as failure:
        found |= _failure(failure)
    except Stopped as stopped:
        found |= {"failed": str(stopped), "key": ""}
    return ExplainResult(**found)


def _score(
    pair: Halves,
    explainer: Explainer,
    bytes_of: TokenBytes,
    config: ExplainConfig,
    session: Session,
    found: dict[str, Any],
) -> None:
    """Fills `found` with the fields of an ExplainResult, as far as it comes."""
    first, second = pair
    shown = protocol.windows(first, protocol.TO_EXPLAIN, config.seed)
    held_out = protocol.windows(second, protocol.TO_PREDICT.scaled(config.windows), config.seed + 1)
    if first.maximum <= 0 or not any(window.active.any() for window in held_out):
        raise FeatureFailed("the feature is silent in one half of the documents")
    explanation = explainer.explain(first, shown, bytes_of, session)
    found |= {"shown": len(shown), "explanation": explanation.text, "pattern": explanation.pattern}
    failures = []
    try:
        predicted = np.concatenate(explainer.predict(explanation, held_out, bytes_of, session))
    except FeatureFailed as failure:
        failures.append(f"prediction: {failure}")
        found |= _failure(failure)
    else:
        true = np.concatenate([window.levels for window in held_out])
        found |= {"windows": len(held_out), "tokens": len(true), "spearman": protocol.spearman(predicted, true)}
        weights = protocol.token_weights(held_out, second)
        if weights is not None:
            found["spearman_weighted"] = protocol.spearman(predicted, true, weights)
    for name, make in (("detection", protocol.detection), ("fuzzing", protocol.fuzzing)):
        judged = make(second, config.judged, config.seed + 2)
        try:
            found[name] = _judgement(judged, explanation, explainer, bytes_of, session)
        except FeatureFailed as failure:
            failures.append(f"{name}: {failure}")
            found |= _failure(failure)
        else:
            found["judged"] = found.get("judged", 0) + len(judged.truth)
    found["failed"] = "; ".join(failures) or None


def _failure(failure: FeatureFailed) -> dict[str, Any]:
    """Without a key where it may pass: what has none is not logged."""
    return {"failed": str(failure)} | ({"key": ""} if isinstance(failure, Refused) else {})


def _judgement(
    judged: protocol.Judged, explanation: Explanation, explainer: Explainer, bytes_of: TokenBytes, session: Session
) -> float | None:
    if not any(judged.truth) or all(judged.truth):
        return None
    answers = explainer.judge(explanation, judged.windows, judged.marks, bytes_of, session)
    return protocol.balanced_accuracy(judged.truth, answers)


# --- the log -------------------------------------------------------------------------------------------------------


def _logged(log: Path) -> dict[str, ExplainResult]:
    """key → result. A last line that a crash left unfinished is taken off."""
    if not log.exists():
        return {}
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        log.write_text("".join(lines), encoding="utf-8")
    try:
        results = [ExplainResult.from_json(json.loads(line)) for line in lines]
    except (ValueError, TypeError, LookupError):
        raise FastSAEError(f"{log} is not a log of explanations; name another folder or remove it") from None
    return {result.key: result for result in results}


def _key(pair: Halves, explainer: Explainer, config: ExplainConfig, group: str, bytes_of: TokenBytes) -> str:
    """SHA-256 of all that a result depends on."""
    settings = [explainer.identity(), config.windows, config.judged, config.seed, group]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(hashlib.sha256(bytes_of.data.tobytes() + bytes_of.offsets.tobytes()).digest())
    for evidence in pair:
        counts = (evidence.interval_counts, evidence.tokens, evidence.top_logits, evidence.bottom_logits)
        digest.update(repr((evidence.feature, evidence.maximum, *counts)).encode())
        for part in (evidence.top, *evidence.intervals, evidence.random, evidence.elsewhere):
            digest.update(f"part {len(part)}".encode())
            for example in part:
                _digest(digest, example)
    return digest.hexdigest()


def _digest(digest: Any, example: Example) -> None:
    digest.update(repr((example.document, example.position, example.at)).encode())
    digest.update(np.ascontiguousarray(example.token_ids, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(example.activations, dtype=np.float32).tobytes())
