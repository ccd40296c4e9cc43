"""What proxies stand on: counts of a whole text that is scored chunk by chunk, and proxies that say yes or no.

Axes: N tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

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

    Bounded memory: [V] and a number per proxy. A first pass over the token ids makes it, a second one scores:

        counts = TokenCounts(chosen, len(bytes_of))
        for spelling in chunks: counts.add(spelling)
        for spelling in chunks: scores = score_all(chosen, spelling, counts)
    """

    def __init__(self, chosen: Iterable[Proxy], vocabulary: int) -> None:
        self.unigrams = np.zeros(vocabulary, dtype=np.int64)  # [V]
        self.members = {proxy.name: 0 for proxy in chosen if isinstance(proxy, _Marks)}
        self._marks = [proxy for proxy in chosen if isinstance(proxy, _Marks)]

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
            self.members[proxy.name] += int(proxy.members(spelling).sum())

    def merge(self, other: TokenCounts) -> None:
        """Add what another rank or shard has counted. Raises FastSAEError if it counted something else."""
        if len(other.unigrams) != len(self.unigrams) or other.members.keys() != self.members.keys():
            raise FastSAEError(
                f"counts to merge must be of one vocabulary ({len(self.unigrams)}) and the same proxies, got "
                f"{len(other.unigrams)} and {', '.join(other.members) or 'none'}"
            )
        self.unigrams += other.unigrams
        for name, count in other.members.items():
            self.members[name] += count

    def log_p(self) -> np.ndarray:
        """[V] log probability of each token, one more seen of each than was."""
        return np.log((self.unigrams + 1) / (self.total + len(self.unigrams)))

    def prior(self, name: str) -> float:
        """P(h): the category's share of the tokens, with one more token seen of either kind.

        Raises FastSAEError for a category that was not counted.
        """
        if name not in self.members:
            counted = ", ".join(self.members) or "none"
            raise FastSAEError(f"proxy {name!r} was not counted (counted: {counted}): give TokenCounts all proxies")
        return (self.members[name] + 1) / (self.total + 2)


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
