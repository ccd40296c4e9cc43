"""Planted features on made-up text for the tests of fastsae.analysis.explain: what each is on is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastsae.analysis.examples import Evidence, Example
from fastsae.analysis.labels import TokenBytes

ENGLISH = (
    " the of and to in a is that it was for on are as with his they at be this from I have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know"
).split()
NAMES = "London Paris Alice Robert Monday Berlin Smith Vienna Peter Oxford Sarah Rome Madrid Thomas Egypt Kate".split()
ARABIC = "قطة على سجادة والكلب يركض إلى المدينة مع كرته الحمراء بينما تمطر فوق التلال الخضراء كلها".split()
MARKS = [",", ".", ";", ":", "\n", "ing", "ed", "er", "ly", "tion"]
PIECES = [f" {w}" for w in ENGLISH] + [f" {w}" for w in NAMES] + [f" {w}" for w in ARABIC] + MARKS
BYTES = [p.encode() for p in PIECES] + [" ق".encode()[:2], " ق".encode()[2:]]  # the last two: halves of a letter
DOCUMENT = 120

Rule = Callable[[list[str], int], float]


def bytes_of() -> TokenBytes:
    return TokenBytes(
        np.frombuffer(b"".join(BYTES), dtype=np.uint8), np.cumsum([0, *map(len, BYTES)], dtype=np.int64)
    )


def text(n_documents: int = 200, seed: int = 0) -> np.ndarray:
    """[documents, 120] token ids: English by Zipf's law, 4 % names, 2 % Arabic, 12 % punctuation and endings."""
    generator = np.random.default_rng(seed)
    shares = np.concatenate([
        0.82 * _zipf(len(ENGLISH)), 0.04 * _even(len(NAMES)), 0.02 * _even(len(ARABIC)), 0.12 * _even(len(MARKS)),
        [0.0, 0.0],
    ])  # fmt: skip
    return generator.choice(len(BYTES), size=(n_documents, DOCUMENT), p=shares / shares.sum())


def _zipf(n: int) -> np.ndarray:
    return (1 / np.arange(1, n + 1)) / (1 / np.arange(1, n + 1)).sum()


def _even(n: int) -> np.ndarray:
    return np.full(n, 1 / n)


def activations(ids: np.ndarray, rule: Rule, noise: float = 0.2, seed: int = 1) -> np.ndarray:
    """[documents, 120] float32: the rule's value at each token, by a factor of 1 ± noise."""
    generator = np.random.default_rng(seed)
    values = np.array([[rule([PIECES[i] if i < len(PIECES) else "" for i in row], k) for k in range(len(row))]
                       for row in ids.tolist()])  # fmt: skip
    return (values * generator.uniform(1 - noise, 1 + noise, values.shape)).astype(np.float32)


def evidence(ids: np.ndarray, values: np.ndarray, number: int = 0, m: int = 12, n: int = 6, seed: int = 2) -> Evidence:
    """What a pass over the text would keep: n windows of each interval, 20 of the other kinds, ±6 tokens around."""
    generator = np.random.default_rng(seed)
    maximum = float(values.max())
    flat = values.ravel()
    stratum = np.clip(np.ceil(m * flat / max(maximum, 1e-9)), 0, m).astype(int)

    def example(place: int) -> Example:
        d, k = divmod(int(place), DOCUMENT)
        low, high = max(0, k - 6), min(DOCUMENT, k + 7)
        return Example(ids[d, low:high], values[d, low:high], k - low, d, k)

    def some(pool: np.ndarray, count: int) -> list[Example]:
        return [example(i) for i in generator.permutation(pool)[:count]]

    on = np.flatnonzero(flat > 0)
    top = on[np.argsort(-flat[on], kind="stable")[:20]]
    strongest = np.unique(ids.ravel()[top])
    return Evidence(
        feature=number,
        maximum=maximum,
        top=[example(i) for i in top],
        intervals=[some(np.flatnonzero(stratum == k + 1), n) for k in range(m)],
        random=some(np.arange(flat.size), 30),
        elsewhere=some(np.flatnonzero(np.isin(ids.ravel(), strongest)), 30),
        top_logits=[" the", " of"],
        bottom_logits=[" Rome"],
        interval_counts=[int((stratum == k + 1).sum()) for k in range(m)],
        tokens=flat.size,
    )


def halves(rule: Rule, number: int = 0, noise: float = 0.2) -> tuple[Evidence, Evidence]:
    """A planted feature's evidence from two texts that share no document."""
    first, second = text(seed=10), text(seed=11)
    return (
        evidence(first, activations(first, rule, noise, 20), number),
        evidence(second, activations(second, rule, noise, 21), number),
    )


def random_halves(number: int, density: float = 0.01) -> tuple[Evidence, Evidence]:
    """A feature that is on at tokens drawn without regard to the text."""
    generator = np.random.default_rng(number + 1000)
    parts = []
    for seed in (10, 11):
        ids = text(seed=seed)
        on = generator.random(ids.shape) < density
        parts.append(evidence(ids, (on * generator.exponential(1.0, ids.shape)).astype(np.float32), number))
    return parts[0], parts[1]


def _is(*tokens: str) -> Rule:
    return lambda row, k: float(row[k] in tokens)


RULES: dict[str, Rule] = {
    "token": _is(" which"),
    "set": lambda row, k: {" two": 3.0, " one": 1.0, " first": 2.0}.get(row[k], 0.0),
    "bigram": lambda row, k: float(row[k] == " of" and k > 0 and row[k - 1] in (" that", " it", " the")),
    "script": lambda row, k: float(any("\u0600" <= char <= "\u06ff" for char in row[k])),
    "capital": lambda row, k: float(row[k].strip()[:1].isupper()),
    "after": lambda row, k: float(k > 0 and row[k - 1] == ","),
    "gap": lambda row, k: float(k > 1 and row[k - 2] == " is" and row[k] in (" the", " of", " and", " to", " in")),
    "suffix": lambda row, k: float(row[k].endswith("e") and len(row[k]) > 2),
}
