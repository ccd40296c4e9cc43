"""What proxies stand on: counts of a whole text that is scored chunk by chunk, and proxies that say yes or no.

Axes: N tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastsae.analysis.labels import Spelling
from fastsae.errors import FastSAEError

ELSEWHERE = 1e-10  # P(hypothesis | s) where s does not fit it (Bricken et al. 2023)


class Proxy(Protocol):
    """A hypothesis about tokens."""

    @property
    def name(self) -> str: ...

    def score(self, spelling: Spelling, counts: TokenCounts | None = None) -> np.ndarray:
        """[N] float32, nats: > 0 where the token belongs to the category.

        counts: of the whole text that `spelling` is a part of; None: `spelling` is the whole text. Documents must be
        whole in either case, as what stands beside a token counts.
        """
        ...


@runtime_checkable
class _Marks(Protocol):
    name: str

    def members(self, spelling: Spelling) -> np.ndarray: ...


class TokenCounts:
    """How often each token and each yes-or-no category occurs in a text, added up over its chunks.

    Bounded memory: [V], a number per proxy, and [V] more for one that asks for it (`by_token`). A first pass over the
    token ids makes it, a second one scores:

        counts = TokenCounts(chosen, len(bytes_of))
        for spelling in chunks: counts.add(spelling)
        for spelling in chunks: scores = score_all(chosen, spelling, counts)
    """

    def __init__(self, chosen: Iterable[Proxy], vocabulary: int) -> None:
        self.unigrams = np.zeros(vocabulary, dtype=np.int64)  # [V]
        self.members = {proxy.name: 0 for proxy in chosen if isinstance(proxy, _Marks)}
        self._marks = [proxy for proxy in chosen if isinstance(proxy, _Marks)]
        wanted = [proxy.name for proxy in self._marks if getattr(proxy, "by_token", False)]
        self.by_token = {name: np.zeros(vocabulary, dtype=np.int64) for name in wanted}  # members of each entry, [V]

    @classmethod
    def of(cls, chosen: Iterable[Proxy], spelling: Spelling) -> TokenCounts:
        """The counts of one spelling."""
        counts = cls(list(chosen), len(spelling.bytes_of))
        counts.add(spelling)
        return counts

    @property
    def total(self) -> int:
        """Tokens counted."""
        return int(self.unigrams.sum())

    def add(self, spelling: Spelling) -> None:
        """Count a chunk of whole documents."""
        self.unigrams += np.bincount(spelling.token_ids, minlength=len(self.unigrams))
        for proxy in self._marks:
            inside = proxy.members(spelling)
            self.members[proxy.name] += int(inside.sum())
            if proxy.name in self.by_token:
                ids = spelling.token_ids[inside]
                self.by_token[proxy.name] += np.bincount(ids, minlength=len(self.unigrams))

    def merge(self, other: TokenCounts) -> None:
        """Add what another rank or shard has counted. Raises FastSAEError if it counted something else."""
        mine, theirs = ((len(one.unigrams), one.members.keys(), one.by_token.keys()) for one in (self, other))
        if mine != theirs:
            raise FastSAEError(
                f"counts to merge must be of one vocabulary ({len(self.unigrams)}) and the same proxies, got "
                f"{len(other.unigrams)} and {', '.join(other.members) or 'none'}"
            )
        self.unigrams += other.unigrams
        for name, count in other.members.items():
            self.members[name] += count
        for name, counts in other.by_token.items():
            self.by_token[name] += counts

    def log_p(self) -> np.ndarray:
        """[V] log probability of each token, one more seen of each than was."""
        return np.log((self.unigrams + 1) / (self.total + len(self.unigrams)))

    def prior(self, name: str) -> float:
        """P(h): the category's share of the tokens, with one more token seen of either kind.

        Raises FastSAEError for a category that was not counted.
        """
        return (self._counted(name, self.members) + 1) / (self.total + 2)

    def fraction(self, name: str) -> np.ndarray:
        """P(h | token): [V], the category's share of each entry's occurrences; 0 where it does not occur.

        Raises FastSAEError for a category that was not counted token by token.
        """
        return self._counted(name, self.by_token) / np.maximum(self.unigrams, 1)

    def _counted(self, name: str, among: dict[str, Any]) -> Any:
        if name not in among:
            counted = ", ".join(among) or "none"
            raise FastSAEError(f"proxy {name!r} was not counted (counted: {counted}): give TokenCounts all proxies")
        return among[name]


class Membership(ABC):
    """A proxy that says yes or no: P(h | s) is 1 for members and 1e-10 for the rest.

    So log P(s | h) / P(s) = log P(h | s) / P(h) takes two values only, P(h) being the members' share of the text.
    """

    name: str

    @abstractmethod
    def members(self, spelling: Spelling) -> np.ndarray:
        """[N] bool."""

    def score(self, spelling: Spelling, counts: TokenCounts | None = None) -> np.ndarray:
        """See Proxy."""
        inside = self.members(spelling)
        prior = (inside.sum() + 1) / (len(inside) + 2) if counts is None else counts.prior(self.name)
        return np.where(inside, -np.log(prior), np.log(ELSEWHERE / prior)).astype(np.float32)
