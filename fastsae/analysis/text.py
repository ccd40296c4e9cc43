"""Documents as one row of token ids, with what proxies say of each token.

Axes: N tokens of all documents, V vocabulary, P proxies.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fastsae.analysis.labels import Spelling, TokenBytes
from fastsae.analysis.proxies import Proxy, TokenCounts, score_all
from fastsae.contexts import text_of
from fastsae.errors import FastSAEError

_AT_ONCE = 64  # documents


class Text:
    """ids: [N] int32, in a temporary file that is read as an array. first: [documents + 1], where each document
    begins. half: [documents] bool, True where features are scored, False where they are chosen. bytes_of: the
    vocabulary's. special: ids that are no text, which no pass reads. counts: of the whole text, for proxies.

    Memory: the documents themselves, and what the system keeps of the file (4 bytes a token); scores are made for
    some documents at a time, or kept for all of them, 4 N P bytes, where tokens are asked for in no order
    (keep_scores). stretch: tokens of a document that stand in a context of their own, where it was cut so.
    digest: a fingerprint of the tokens, where documents begin, and halves.
    Raises FastSAEError where there is no text, or no list of documents.
    """

    def __init__(
        self, tokenizer: Any, documents: Sequence[Any], chosen: Sequence[Proxy] = (), keep_scores: bool = False,
        stretch: int | None = None,
    ) -> None:  # fmt: skip
        if isinstance(documents, str) or not hasattr(documents, "__len__") or not hasattr(documents, "__getitem__"):
            remedy = "put it into a list" if isinstance(documents, str) else "read them into a list"
            raise FastSAEError(f"expected a list of documents, got {type(documents).__name__}: {remedy}")
        self.stretch = stretch
        digest = hashlib.blake2b(digest_size=8)
        self.bytes_of, self.special = TokenBytes.of(tokenizer), sorted(tokenizer.all_special_ids)
        self.proxies = tuple(chosen)
        lengths, file = [], tempfile.TemporaryFile()
        for start in range(0, len(documents), _AT_ONCE):
            texts = [text_of(document) for document in documents[start : start + _AT_ONCE]]
            found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            for ids in found:
                as_bytes = np.asarray(ids, dtype=np.int32).tobytes()
                digest.update(as_bytes)
                file.write(as_bytes)
                lengths.append(len(ids))
        if not sum(lengths):
            raise FastSAEError("expected text to analyze, found none: every document is empty")
        file.flush()
        self.ids = np.memmap(file, np.int32, "r")
        self.first = np.concatenate([[0], np.cumsum(lengths)])
        self.half = np.array(scoring_half(documents), dtype=bool)
        digest.update(self.first.tobytes() + self.half.tobytes())
        self.digest = digest.hexdigest()
        self.counts = TokenCounts(self.proxies, len(self.bytes_of))
        for low, high in self._parts(0, len(documents)):
            self.counts.add(self.spelling(low, high))
        self._scored: tuple[int, int, np.ndarray] = (0, 0, np.zeros((len(self.proxies), 0), np.float32))
        if keep_scores:
            self._score(0, self.documents)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.first) - 1

    def _parts(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        for start in range(low, high, _AT_ONCE):
            yield start, min(start + _AT_ONCE, high)

    def spelling(self, low: int, high: int) -> Spelling:
        """Of documents low … high − 1."""
        lengths = np.diff(self.first[low : high + 1])
        ids = self.ids[self.first[low] : self.first[high]].astype(np.int64)
        return Spelling.of(ids, np.repeat(np.arange(low, high), lengths), self.bytes_of)

    def scores(self, documents: np.ndarray, where: np.ndarray) -> np.ndarray:
        """What each proxy says of tokens `where` [n] of `documents` [n]: [n, P] float32. Made for the documents at hand
        and those after them, so reading in order costs one pass."""
        if not len(where) or not self.proxies:
            return np.zeros((len(where), len(self.proxies)), np.float32)
        low, high = int(documents.min()), int(documents.max()) + 1
        if low < self._scored[0] or high > self._scored[1]:
            self._score(low, max(high, min(low + _AT_ONCE, self.documents)))
        begin, _, scored = self._scored
        return scored[:, where - self.first[begin]].T

    def _score(self, low: int, high: int) -> None:
        parts = [score_all(self.proxies, self.spelling(a, b), self.counts) for a, b in self._parts(low, high)]
        self._scored = (low, high, np.concatenate(parts, axis=1))

    def around(self, where: np.ndarray, around: int) -> np.ndarray:
        """The tokens around each of `where` [M], −1 where the document (or the stretch of it) has none: [M, W]."""
        document = self.document_of(where)
        low, high = self.first[document], self.first[np.asarray(document) + 1]
        if self.stretch is not None:
            low = where - (where - low) % self.stretch
            high = np.minimum(high, low + self.stretch)
        near = where[:, None] + np.arange(-around, around + 1)
        return np.where((near >= low[:, None]) & (near < high[:, None]), near, -1)

    def ids_at(self, near: np.ndarray) -> np.ndarray:
        """Token ids at `near`, −1 where that is −1 or where a special token stands: int32."""
        ids = self.ids[np.maximum(near, 0)].astype(np.int32)
        return np.where((near >= 0) & ~np.isin(ids, self.special), ids, np.int32(-1))

    def document_of(self, where: np.ndarray | int) -> np.ndarray:
        """The document that tokens stand in."""
        return np.searchsorted(self.first, where, side="right") - 1


def scoring_half(documents: Iterable[Any]) -> list[bool]:
    """For each document whether features are scored on it (else chosen): every second one, ordered by kind and hash.

    Both halves so hold as much of every kind (an attribute `kind`, where documents have one) to a document, equal texts
    fall into the same half, and the order in which the documents come does not matter.
    """
    keys = [
        (
            getattr(d, "kind", ""),
            hashlib.sha256(("half\0" + text_of(d)).encode("utf-8", "surrogatepass")).hexdigest(),
        )
        for d in documents
    ]
    rank = {key: number for number, key in enumerate(sorted(set(keys)))}
    return [rank[key] % 2 == 1 for key in keys]
