"""Contexts on which effects are measured, from the half of the documents on which features are scored.

Axes: B contexts, T tokens of a context (its begin-of-text token included), V vocabulary, P proxies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.kept import uniform
from fastsae.analysis.text import Text

_AT_ONCE = 64  # documents


class HeldOut:
    """A few full contexts with every category and as many without, drawn at random, in the order drawn.

    ids: [B, T] int64. inside: [B, T, P] bool, whether a token belongs to a category. members: [V, P] float32, the share
    of each vocabulary entry's occurrences, in all documents, that belong to it.
    """

    def __init__(
        self, text: Text, tokenizer: Any, context: int, limit: int, max_tokens: int | None = None, seed: int = 0
    ) -> None:
        self.limit, self._seed = limit, seed
        bos = tokenizer.bos_token_id
        self._lead = [] if bos is None else [bos]
        self._body = context - len(self._lead)
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        end = len(text) if max_tokens is None else max_tokens
        P, V = len(text.proxies), len(text.bytes_of)
        hits = np.zeros((V, P), dtype=np.int64)
        kept: dict[int, tuple[float, np.ndarray, np.ndarray]] = {}  # first token → key, ids, inside
        for low in range(0, text.documents, _AT_ONCE):
            high = min(low + _AT_ONCE, text.documents)
            where = np.arange(text.first[low], text.first[high])
            inside = text.scores(text.document_of(where), where) > 0
            token, p = np.nonzero(inside)
            np.add.at(hits, (text.ids[where[token]], p), 1)
            for document in np.flatnonzero(text.half[low:high]) + low:
                begin, stop = int(text.first[document]), min(int(text.first[document + 1]), end)
                for start in range(begin, stop - self._body + 1, self._body):
                    self._consider(kept, text, start, inside[start - text.first[low] :][: self._body])
            self._thin(kept)
        order = sorted(kept, key=lambda start: kept[start][0])
        rows = [kept[start] for start in order]
        self.ids = torch.from_numpy(np.stack([row[1] for row in rows])) if rows else torch.zeros(0, context).long()
        self.inside = torch.from_numpy(
            np.stack([row[2] for row in rows]) if rows else np.zeros((0, context, P), dtype=bool)
        )
        self.members = torch.from_numpy((hits / np.maximum(text.counts.unigrams, 1)[:, None]).astype(np.float32))

    def _consider(self, kept: dict, text: Text, start: int, inside: np.ndarray) -> None:
        ids = text.ids[start : start + self._body].astype(np.int64)
        if np.isin(ids, self._special).any():
            return
        key = float(uniform(self._seed, np.array([start]))[0])
        lead = np.zeros((len(self._lead), inside.shape[1]), dtype=bool)
        kept[start] = (key, np.concatenate([self._lead, ids]).astype(np.int64), np.concatenate([lead, inside]))

    def _thin(self, kept: dict) -> None:
        """`limit` contexts with each category stay, and twice as many of any kind."""
        if not kept:
            return
        order = sorted(kept, key=lambda start: kept[start][0])
        stay = set(order[: 2 * self.limit])
        has = np.stack([kept[start][2].any(0) for start in order])  # [·, P]
        for column in has.T:
            stay |= {order[i] for i in np.flatnonzero(column)[: self.limit]}
        for start in order:
            if start not in stay:
                del kept[start]

    def split(self, p: int) -> tuple[Tensor, Tensor]:
        """Numbers of at most `limit` contexts each in which a token of category p is to be predicted, and of those that
        hold none."""
        marked = self.inside[:, 1:, p].any(1)
        return marked.nonzero().flatten()[: self.limit], (~marked).nonzero().flatten()[: self.limit]
