"""What explains and predicts: one interface for language models and for the search that needs none."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from fastsae.analysis.examples import Evidence
from fastsae.analysis.explain.accounting import Accounting, Ledger
from fastsae.analysis.explain.pattern import Pattern
from fastsae.analysis.explain.protocol import Window
from fastsae.analysis.explain.search import SearchConfig, find_pattern, predicted
from fastsae.analysis.labels import TokenBytes


class FeatureFailed(Exception):
    """This feature cannot be explained or scored; the others can. The message says why."""


class Refused(FeatureFailed):
    """A server took no answer to this feature's question, which another day or server may: it is tried again when the
    run goes on."""


class Stopped(Exception):
    """The run ends here: interrupted, or its budget of requests is spent."""


class Budget:
    """Requests that a run may still send; None: any number. Shared by threads."""

    def __init__(self, max_requests: int | None = None) -> None:
        self.left, self._lock = max_requests, threading.Lock()

    def spend(self) -> None:
        """One request. Raises Stopped when none is left."""
        with self._lock:
            if self.left is not None:
                if self.left <= 0:
                    raise Stopped("the budget of requests is spent; raise max_requests and run it again to go on")
                self.left -= 1


@dataclass
class Session:
    """One feature's run: its accounting, the run's ledger and budget, and the signal to stop."""

    account: Accounting = field(default_factory=Accounting)
    ledger: Ledger = field(default_factory=Ledger)
    budget: Budget = field(default_factory=Budget)
    stop: threading.Event = field(default_factory=threading.Event)

    def spend(self) -> None:
        """Counts a request that is about to be sent. Raises Stopped."""
        if self.stop.is_set():
            raise Stopped("interrupted")
        self.budget.spend()
        self.account.requests += 1

    def wait(self, seconds: float) -> None:
        """Sleeps. Raises Stopped if the run is interrupted meanwhile."""
        if seconds > 0 and self.stop.wait(seconds):
            raise Stopped("interrupted")


@dataclass(frozen=True)
class Explanation:
    """In words; from the offline explainer also as a pattern that runs on new text."""

    text: str
    pattern: Pattern | None = None


class Explainer(Protocol):
    """Explains features, and predicts from an explanation alone. Methods raise FeatureFailed and Stopped."""

    @property
    def concurrency(self) -> int:
        """How many features may be worked on at once."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that its answers depend on, for the log by which a run resumes."""
        ...

    def explain(
        self, evidence: Evidence, shown: Sequence[Window], bytes_of: TokenBytes, session: Session
    ) -> Explanation:
        """From one half of the documents. shown: the windows of the paper's protocol."""
        ...

    def predict(
        self, explanation: Explanation, windows: Sequence[Window], bytes_of: TokenBytes, session: Session
    ) -> list[np.ndarray]:
        """Of each window, [n] levels in 0–9; only its token_ids may be read."""
        ...

    def judge(
        self,
        explanation: Explanation,
        windows: Sequence[Window],
        marks: Sequence[np.ndarray] | None,
        bytes_of: TokenBytes,
        session: Session,
    ) -> list[bool]:
        """Whether the feature is on in each window, or, with marks ([n] bool each), whether it is on where marked."""
        ...


class OfflineExplainer:
    """No language model: `search.find_pattern` on all of the evidence."""

    concurrency = 1

    def __init__(self, config: SearchConfig | None = None) -> None:
        self.config = config or SearchConfig()

    def identity(self) -> dict[str, Any]:
        """See Explainer."""
        return {"explainer": "offline", **asdict(self.config)}

    def explain(
        self, evidence: Evidence, shown: Sequence[Window], bytes_of: TokenBytes, session: Session
    ) -> Explanation:
        """See Explainer. It reads every example of the evidence, not only those shown: it has no prompt to fill."""
        pattern = find_pattern(evidence, bytes_of, self.config)
        return Explanation(pattern.name, pattern)

    def predict(
        self, explanation: Explanation, windows: Sequence[Window], bytes_of: TokenBytes, session: Session
    ) -> list[np.ndarray]:
        """See Explainer: the pattern's levels."""
        assert explanation.pattern is not None
        return predicted(explanation.pattern, [window.token_ids for window in windows], bytes_of)

    def judge(
        self,
        explanation: Explanation,
        windows: Sequence[Window],
        marks: Sequence[np.ndarray] | None,
        bytes_of: TokenBytes,
        session: Session,
    ) -> list[bool]:
        """See Explainer: a rule holds somewhere; with marks, at half of the marked tokens or more."""
        levels = self.predict(explanation, windows, bytes_of, session)
        if marks is None:
            return [bool((level > 0).any()) for level in levels]
        return [bool((level[mark] > 0).mean() >= 0.5) for level, mark in zip(levels, marks, strict=True)]
