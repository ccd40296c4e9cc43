"""Which category each feature of several dictionaries follows best: what a map of them is coloured by.

Axes: n tokens, L dictionaries, F features of one of them, P categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.analysis.cross import Entries, FeatureSums, add_products, entries, pearson
from fastsae.analysis.evidence import CHOOSE, SCORE
from fastsae.analysis.proxies import proxies
from fastsae.analysis.stream import Source, read, watched
from fastsae.analysis.text import Text


class Follows(NamedTuple):
    """names: P categories. best: L tensors [F] int64, the category with the largest Pearson r on the half of the
    documents where features are chosen. r: L tensors [F] float64, that r on the half where they are scored."""

    names: tuple[str, ...]
    best: tuple[Tensor, ...]
    r: tuple[Tensor, ...]


def follows(
    sources: Sequence[Source],
    tokenizer: Any,
    documents: Sequence[Any],
    categories: Sequence[str],
    *,
    context: int = 128,
    batch_size: int = 32,
    max_tokens: int | None = None,
    show_progress: bool = True,
) -> Follows:
    """In one pass over the documents. categories: names as everywhere (`proxies.proxies`).

    Raises FastSAEError: what `read` raises, and names that mean nothing.
    """
    chosen = proxies(categories)
    text = Text(tokenizer, documents, chosen)
    P = len(chosen)
    members = [FeatureSums(P) for _ in (CHOOSE, SCORE)]
    sums = [[FeatureSums(source.sae.cfg.d_sae) for _ in (CHOOSE, SCORE)] for source in sources]
    products = [torch.zeros(2, source.sae.cfg.d_sae, P, dtype=torch.float64) for source in sources]
    stream = read(sources, tokenizer, documents, context=context, batch_size=batch_size, max_tokens=max_tokens)
    for some in watched(stream, "categories", documents, max_tokens, show_progress):
        numbers = some.documents.numpy()
        inside = torch.from_numpy(text.scores(numbers, text.first[numbers] + some.positions.numpy()) > 0)
        half = torch.from_numpy(text.half[numbers])
        for side in (CHOOSE, SCORE):
            rows = (half == bool(side)).nonzero().flatten()
            here = inside[rows]
            features = here.nonzero()[:, 1]
            belongs = Entries(here.sum(1), features, torch.ones(len(features), dtype=torch.float64))
            members[side].add(belongs)
            for code, of_features, table in zip(some.codes, sums, products, strict=True):
                active = entries(code, "cpu", rows)
                of_features[side].add(active)
                add_products(table[side], active, belongs)
    best, r = [], []
    for of_features, table in zip(sums, products, strict=True):
        on = [pearson(table[side], of_features[side], members[side]) for side in (CHOOSE, SCORE)]
        best.append(on[0].argmax(1))
        r.append(on[1].gather(1, best[-1][:, None])[:, 0])
    return Follows(tuple(one.name for one in chosen), tuple(best), tuple(r))
