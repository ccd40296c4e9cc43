"""One pass over text that learns of every feature at once what people ask: how often, how strongly, on what, with whom.

    (survey,) = fastsae.analysis.take_survey(Source(sae, model, hook), tokenizer, documents)
    cards = Cards(survey)
    cards.density(), cards.top(7), cards.overlap(7, "Arabic"), cards.evidence(7, half=0)

All goes through sparse codes. Memory is O(F · examples), whatever the number of tokens; nothing of size [tokens, F] is
ever there. What the pass keeps is exact: counts, sums, histograms, the strongest examples; samples are uniform ones.
An interrupted pass that goes on gives what an undisturbed one gives, bit for bit; parts that ranks have read merge into
the same, but for the order in which sums of floats are added.

Axes: n tokens, F features, D neurons (coordinates of the hooked output), P proxies, B bins.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.checkpoint import Arrays, read_arrays, save_arrays
from fastsae.analysis.histogram import Ranges, exponents, widened
from fastsae.analysis.kept import Kept, uniform
from fastsae.analysis.parts import Parted, check_parts
from fastsae.analysis.proxies import DEFAULT
from fastsae.analysis.stream import Read
from fastsae.analysis.sums import BINNED, BINS, HALVES, Sums
from fastsae.analysis.text import Text
from fastsae.analysis.windows import Entries, RandomWindows, Surroundings
from fastsae.codes import SparseCode
from fastsae.errors import FastSAEError

FORMAT, VERSION = "fastsae-survey", 2
STRATA = 16  # parts of a feature's range (Ranges) that are sampled
_TABLES = ("top", "bottom", "sampled", "random", "pairs")


@dataclass(frozen=True)
class SurveyConfig:
    """What a pass keeps. Raises FastSAEError for values that cannot be meant."""

    categories: tuple[str, ...] = DEFAULT
    """Proxies: scripts, base64, DNA, hex, regex:…, tokens:…, ids:…"""
    tokens: int | None = None
    """Tokens to read; default: all."""
    context: int = 128
    """Tokens in a context, the begin-of-text token included."""
    batch_size: int = 32
    """Contexts in a forward pass."""
    top: int = 20
    """Strongest examples of a feature, in each half of the documents."""
    bottom: int = 10
    """Weakest examples of a feature, in each half of the documents."""
    per_interval: int = 4
    """Examples from each sixteenth of a feature's range (a power of two), in each half of the documents. m intervals
    of the range that is in use (half of it to all) so find 8 to 16 times as many, divided by m; a feature's take
    32 · (25 + 8 · (2 · around + 1)) bytes for each: 7 kB with the defaults, 1 GB for 131,072 features, times four."""
    around: int = 12
    """Tokens of an example on each side of the one it was chosen for."""
    windows: int = 2048
    """Windows drawn at random from each half of the documents, with all that is active in them."""
    cofiring_up_to: int = 4096
    """Features up to which all pairs are counted that fire together (8 bytes a pair); beyond, pairs are counted on a
    sample of the tokens. 0: no pairs at all."""
    cofiring_tokens: int = 65_536
    """Tokens of that sample in each half of the documents: about 10 bytes for each active feature of each."""
    neuron_memory: float = 2.0
    """GiB for the correlations of features with neurons, 8 bytes a pair; where they would take more, they are left
    out."""
    seed: int = 0
    """Of everything drawn at random."""

    def __post_init__(self) -> None:
        if unnamed := [one for one in self.categories if not isinstance(one, str)]:
            raise FastSAEError(f"categories are names, got {unnamed[0]!r}: give functions and proxies as more_proxies")
        for name in ("context", "batch_size", "top", "per_interval", "windows", "cofiring_tokens"):
            if getattr(self, name) < 1:
                raise FastSAEError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("bottom", "around", "cofiring_up_to"):
            if getattr(self, name) < 0:
                raise FastSAEError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.neuron_memory >= 0:
            raise FastSAEError(f"neuron_memory must be at least 0 GiB, got {self.neuron_memory}")
        if self.tokens is not None and self.tokens < 1:
            raise FastSAEError(f"tokens must be at least 1, got {self.tokens}; leave it out to read all")


class Survey(Parted):
    """What one pass has learnt of F features. Made by `take_survey` (or by hand: `add` every Read); read with `Cards`.

    proxies: names, in the order of the axis P. ranges: of every feature. maximum: [2, F]. neuron_max: [D]. shift: [D],
    what is taken off x before it is summed (the mean of the first batch), None before there is one.
    batches: how many batches of text were read. first: [documents + 1], the number of each document's first token.
    of: what was read with what (digests of dictionary, model and text), empty in a survey made by hand. parts: which of
    it, (rank, world, first document, end) each; missing() has those of the other ranks, where they are not in.
    """

    def __init__(self, d_sae: int, d_in: int, names: tuple[str, ...], config: SurveyConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SurveyConfig()
        self.d_sae, self.d_in, self.proxies, self.batches = d_sae, d_in, tuple(names), 0
        neurons = 8 * d_sae * d_in <= config.neuron_memory * 2**30
        self.sums = Sums(d_sae, d_in, len(names), neurons, d_sae <= config.cofiring_up_to)
        self.ranges = Ranges(d_sae)
        self.maximum = np.zeros((HALVES, d_sae), dtype=np.float32)
        self.neuron_max = np.full(d_in, -np.inf, dtype=np.float32)
        self.shift: np.ndarray | None = None
        self.first = np.zeros(1, dtype=np.int64)
        apart = 2 * config.around  # not five times the same sentence
        self.top = Kept(config.top, config.around, _by_half, HALVES * d_sae, apart)
        self.bottom = Kept(config.bottom, config.around, _by_half, HALVES * d_sae, apart)
        self.sampled = Kept(config.per_interval, config.around, self._stratum, HALVES * d_sae * STRATA)
        self.random = RandomWindows(config.windows, config.around, config.seed)
        self.pairs = RandomWindows(config.cofiring_tokens, 0, config.seed + 1)

    @property
    def pairs_sampled(self) -> bool:
        """Whether pairs that fire together are counted on a sample."""
        return 0 < self.config.cofiring_up_to < self.d_sae

    def _stratum(self, feature: np.ndarray, half: np.ndarray, value: np.ndarray) -> np.ndarray:
        return _by_half(feature, half, value) * STRATA + self.ranges.place(feature, value, STRATA)

    # --- the pass ---------------------------------------------------------------------------------------------------

    def add(self, some: Read, text: Text, which: int = 0) -> None:
        """One batch. which: of the sources of the Read."""
        self.first = text.first
        self.batches += 1
        if not len(some.token_ids):
            return
        entries = active(some.codes[which])
        documents = some.documents.numpy()
        where = text.first[documents] + some.positions.numpy()
        half = text.half[documents]
        scores = text.scores(documents, where)
        x = some.xs[which].detach().float().cpu()
        self._widen(entries)
        self._count(entries, half, scores)
        self._count_neurons(entries, x, half, scores)
        self._keep(some, entries, where, half, text)

    def _widen(self, entries: Entries) -> None:
        """Ranges take in this batch; histograms follow."""
        highest = np.zeros(self.d_sae, dtype=np.float32)
        np.maximum.at(highest, entries.feature, entries.value)
        self._set_ranges(np.maximum(self.ranges.exponent, exponents(highest)))

    def _set_ranges(self, exponent: np.ndarray) -> None:
        by = exponent.astype(np.int64) - self.ranges.exponent
        if not by.any():
            return
        for name in BINNED:
            widened(self.sums[name], by)
        self.ranges.exponent = exponent.astype(np.int32)
        grown = np.zeros((self.d_sae, HALVES * STRATA), dtype=bool)
        grown[by > 0] = True
        self.sampled.forget(grown.reshape(-1))

    def _count(self, entries: Entries, half: np.ndarray, scores: np.ndarray) -> None:
        sums, F = self.sums, self.d_sae
        row, feature, value = entries
        side = half[row].astype(np.int64)
        wide = value.astype(np.float64)
        at = side * F + feature
        sums["tokens"][:] += np.bincount(half, minlength=2)
        np.add.at(sums["fires"].reshape(-1), at, 1)
        np.add.at(sums["f"].reshape(-1), at, wide)
        np.add.at(sums["ff"].reshape(-1), at, wide * wide)
        np.maximum.at(self.maximum.reshape(-1), at, value)
        bins = at * BINS + self.ranges.place(feature, value, BINS)
        np.add.at(sums["histogram"].reshape(-1), bins, 1)
        np.add.at(sums["weight"].reshape(-1), bins, wide)
        clipped = np.maximum(scores, 0).astype(np.float64)
        inside = scores > 0
        for name, part in (("p", inside), ("c", clipped), ("cc", clipped**2)):
            for s in range(HALVES):
                sums[name][s] += part[half == bool(s)].sum(0)
        entry, p = np.nonzero(inside[row])  # few: categories are rare
        P = scores.shape[1]
        flat = at[entry] * P + p
        np.add.at(sums["fp"].reshape(-1), flat, wide[entry])
        np.add.at(sums["fc"].reshape(-1), flat, wide[entry] * clipped[row[entry], p])
        flat = p * (HALVES * F * BINS) + bins[entry]
        np.add.at(sums["inside"].reshape(-1), flat, 1)
        np.add.at(sums["inside_weight"].reshape(-1), flat, wide[entry])

    def _count_neurons(self, entries: Entries, x: Tensor, half: np.ndarray, scores: np.ndarray) -> None:
        sums, P = self.sums, scores.shape[1]
        self.neuron_max = np.maximum(self.neuron_max, x.amax(0).numpy())
        if self.shift is None:
            self.shift = x.mean(0, dtype=torch.float64).float().numpy()
        x = x - torch.from_numpy(self.shift)
        # All sums over tokens are one product: what multiplies x is 1, p and max(proxy, 0), in either half. float32
        # within a batch, as a batch has thousands of terms, and without the mean, which would take their digits.
        clipped = np.maximum(scores, 0)
        columns = np.concatenate([np.ones((len(x), 1), np.float32), scores > 0, clipped], axis=1)
        of_half = np.stack([~half, half]).astype(np.float32)  # [2, n]
        weights = torch.from_numpy((of_half[:, :, None] * columns).transpose(0, 2, 1).reshape(-1, len(x)))
        found = (weights @ x).double().numpy().reshape(HALVES, 1 + 2 * P, -1)
        sums["x"][:] += found[:, 0]
        sums["xp"][:] += found[:, 1 : 1 + P].transpose(0, 2, 1)
        sums["xc"][:] += found[:, 1 + P :].transpose(0, 2, 1)
        sums["xx"][:] += (torch.from_numpy(of_half) @ x.square()).double().numpy()
        row, feature, value = (torch.from_numpy(part) for part in entries)
        if sums["fx"].size:
            code = torch.sparse_coo_tensor(
                torch.stack([feature, row]), value, (self.d_sae, len(x)), check_invariants=False
            )
            sums["fx"][:] += torch.sparse.mm(code, x).double().numpy()
        if sums["together"].size:
            from scipy.sparse import csr_matrix

            on = csr_matrix(
                (np.ones(len(row), np.float32), (entries.row, entries.feature)), shape=(len(x), self.d_sae)
            )
            pairs = (on.T @ on).tocoo()
            sums["together"][pairs.row, pairs.col] += pairs.data

    def _keep(self, some: Read, entries: Entries, where: np.ndarray, half: np.ndarray, text: Text) -> None:
        around = Surroundings(some, entries, self.config.around, text, where)
        row, feature, value = entries
        place, side = where[row], half[row]
        drawn = uniform(self.config.seed, place, feature)
        for table, key in ((self.top, -value.astype(np.float64)), (self.bottom, value.astype(np.float64)),
                           (self.sampled, drawn)):  # fmt: skip
            if not table.limit:
                continue
            chosen = np.flatnonzero(table.wanted(feature, side, value, key))
            columns = (feature, side, value, key, place)
            window, ids = around.window(chosen)
            table.add(*(column[chosen] for column in columns), window, ids)
        self.random.add(around, entries, where, half)
        if self.pairs_sampled:
            self.pairs.add(around.alone(), entries, where, half)

    # --- ranks, shards, sessions ------------------------------------------------------------------------------------

    def check_like(self, other: Survey, remedy: str = "") -> None:
        """Raises FastSAEError where the other is of other sizes, proxies, settings, dictionary, model or text. remedy:
        what the error is to advise."""
        mine, theirs = self._identity(), other._identity()
        different = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if different:
            key = different[0]
            raise FastSAEError(
                f"surveys must be of the same dictionary, text and settings: {key} is {mine.get(key)} here and "
                f"{theirs.get(key)} there{remedy and '; ' + remedy}"
            )

    def l0(self) -> float:
        """Features that fire on a token, on average."""
        return float(self.sums["fires"].sum()) / max(1, int(self.sums["tokens"].sum()))

    def merge(self, other: Survey) -> None:
        """Adds what another pass has learnt of the same features on other parts of the same text.

        Raises FastSAEError for a survey of other features, proxies, settings or text, or of a part that is in already.
        """
        for empty, full in ((self, other), (other, self)):
            if not (empty.batches or empty.of or empty.parts):  # made to be merged into
                empty.of = full.of
        self.check_like(other)
        check_parts(self.parts, other.parts, "surveys")
        if not (self.batches and other.batches):
            self.first = self.first if self.batches else other.first
        elif not np.array_equal(self.first, other.first):
            raise FastSAEError("surveys to merge must be of parts of the same documents: give every rank all of them")
        exponent = np.maximum(self.ranges.exponent, other.ranges.exponent)
        self._set_ranges(exponent)
        by = exponent.astype(np.int64) - other.ranges.exponent
        if self.shift is None:
            self.shift = other.shift
        if self.shift is not None and other.shift is not None:
            self.sums.move(self.shift.astype(np.float64) - other.shift)
        for name, array in self.sums.arrays.items():
            add = other.sums[name]
            array += widened(add.copy(), by) if name in BINNED else add
        if other.shift is not None:
            self.shift = other.shift
        self.maximum = np.maximum(self.maximum, other.maximum)
        self.neuron_max = np.maximum(self.neuron_max, other.neuron_max)
        for name in _TABLES:
            getattr(self, name).merge(getattr(other, name))
        self.batches += other.batches
        self.parts = sorted(self.parts + other.parts)

    def _identity(self) -> dict[str, Any]:
        about = self._about()
        return about.pop("config") | about | self.of

    def _about(self) -> dict[str, Any]:
        return {"d_sae": self.d_sae, "d_in": self.d_in, "proxies": list(self.proxies),
                "config": json.loads(json.dumps(asdict(self.config)))}  # fmt: skip

    def arrays(self) -> Arrays:
        """All that the pass has added up."""
        arrays = {f"sums.{name}": array for name, array in self.sums.arrays.items()}
        for name in _TABLES:
            arrays |= {f"{name}.{part}": array for part, array in getattr(self, name).arrays().items()}
        shift = np.zeros(0, np.float32) if self.shift is None else self.shift
        return arrays | {"maximum": self.maximum, "exponent": self.ranges.exponent, "neuron_max": self.neuron_max,
                         "shift": shift, "first": self.first, "batches": np.array(self.batches)}  # fmt: skip

    def load_arrays(self, arrays: Arrays) -> None:
        """What `arrays` gave, in the place of what is there."""
        self.maximum, self.neuron_max, self.first = arrays["maximum"], arrays["neuron_max"], arrays["first"]
        self.batches, self.ranges.exponent = int(arrays["batches"]), arrays["exponent"]
        self.shift = arrays["shift"] if len(arrays["shift"]) else None
        self.sums.load({name.removeprefix("sums."): array for name, array in arrays.items()})
        for name in _TABLES:
            parts = {key.split(".", 1)[1]: array for key, array in arrays.items() if key.startswith(name + ".")}
            if parts:
                getattr(self, name).load(parts)

    def save(self, path: str | Path) -> Path:
        """One .npz file, written beside and renamed."""
        about = self._about() | {"format": FORMAT, "version": VERSION, "batches": self.batches}
        save_arrays(Path(path), self.arrays(), about | {"of": self.of, "parts": self.parts})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, remedy: str = "make it again") -> Survey:
        """What `save` wrote. Files of version 1 do not say what they are of, and merge with their like only. remedy:
        what the error is to advise for a damaged one.

        Raises FastSAEError for a file that is none, is damaged or comes from a later version."""
        path = Path(path)
        if not path.exists():
            raise FastSAEError(f"there is no survey at {path}: make one with fastsae analyze")
        read = read_arrays(path)
        if read is None:
            raise FastSAEError(f"{path} is no survey, or a damaged one: {remedy}")
        arrays, about = read
        if about.get("format") != FORMAT or about.get("version", 0) > VERSION:
            raise FastSAEError(f"expected a {FORMAT} up to version {VERSION} at {path}, got {about.get('format')}")
        config: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
        found = cls(about["d_sae"], about["d_in"], tuple(about["proxies"]), SurveyConfig(**config))
        old = {"batches": np.array(about["batches"]), "shift": np.zeros(found.d_in, np.float32)}
        found.load_arrays(old | arrays)
        found.of, found.parts = about.get("of", {}), [(a, b, c, d) for a, b, c, d in about.get("parts", [])]
        return found


def active(code: SparseCode) -> Entries:
    """What is on in a code."""
    rows, slots = (code.valid() & (code.values > 0)).nonzero(as_tuple=True)
    return Entries(
        rows.cpu().numpy(), code.indices[rows, slots].cpu().numpy().astype(np.int64),
        code.values[rows, slots].detach().float().cpu().numpy(),
    )  # fmt: skip


def _by_half(feature: np.ndarray, half: np.ndarray, value: np.ndarray) -> np.ndarray:
    return feature.astype(np.int64) * HALVES + half
