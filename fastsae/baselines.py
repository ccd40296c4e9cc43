"""Count-based language models that a neural one has to beat: unigram and interpolated bigram."""

import numpy as np


def losses(train: np.ndarray, heldout: np.ndarray, vocab_size: int) -> dict[str, float]:
    """{"unigram", "bigram"}: nats per token of `heldout` ([n] ids) under counts of `train` ([m] ids).

    unigram: add-one smoothed. bigram: Witten–Bell interpolation, p(b|a) = (c(a,b) + κ t(a) p(b)) / (c(a) + κ t(a)),
    t(a) the number of distinct successors of a; κ is the best of a small grid on the held-out tokens themselves, which
    favours the baseline.
    """
    train, heldout = train.astype(np.int64), heldout.astype(np.int64)
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    total = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)  # c(a)
    types = np.bincount(pairs // vocab_size, minlength=vocab_size)  # t(a)
    a, b = heldout[:-1], heldout[1:]
    wanted = a * vocab_size + b
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[at] == wanted, counts[at], 0)
    best = np.inf
    for kappa in (0.25, 0.5, 1.0, 2.0, 4.0):
        back = np.maximum(kappa * types[a], 1e-9)  # an unseen `a` falls back to the unigram
        best = min(best, float(-np.log((count + back * unigram[b]) / (total[a] + back)).mean()))
    return {"unigram": float(-np.log(unigram[heldout]).mean()), "bigram": best}
