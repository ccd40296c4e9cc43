"""One pass over text that learns of every feature at once what people ask: how often, how strongly, on what, with whom.

    survey = fastsae.analysis.survey(Source(sae, model, hook), tokenizer, documents)
    survey.density(), survey.top(7), survey.overlap(7, "Arabic"), survey.evidence(7, half=0)

All goes through sparse codes. Memory is O(F · examples), whatever the number of tokens; nothing of size [tokens, F] is
ever there. What the pass keeps is exact: counts, sums, histograms, the strongest examples; samples are uniform ones.
The result is that of one pass over all text also when ranks or shards each read a part and are merged, or when a pass
was interrupted, but for the order in which sums of floats are added.

Axes: n tokens, F features, D neurons (coordinates of the hooked output), P proxies, B bins.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.histogram import Ranges, exponents, widened
from fastsae.analysis.kept import Kept, uniform
from fastsae.analysis.proxies import DEFAULT
from fastsae.analysis.stream import Read
from fastsae.analysis.text import Text
from fastsae.analysis.windows import Entries, RandomWindows, Surroundings
from fastsae.errors import FastSAEError

FORMAT, VERSION = "fastsae-survey", 1
BINS, STRATA = 64, 16  # parts of a feature's range (Ranges): of histograms, and of samples
_NEURON_BYTES = 2 << 30  # above it, correlations of features with neurons are left out
_HALVES = 2


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
    """Examples from each sixteenth of a feature's range (a power of two), in each half of the documents."""
    around: int = 12
    """Tokens of an example on each side of the one it was chosen for."""
    windows: int = 2048
    """Windows drawn at random from each half of the documents, with all that is active in them."""
    cofiring_up_to: int = 4096
    """Features up to which all pairs are counted that fire together; beyond, no pairs are."""
    seed: int = 0
    """Of everything drawn at random."""

    def __post_init__(self) -> None:
        for name in ("context", "batch_size", "top", "per_interval", "windows"):
            if getattr(self, name) < 1:
                raise FastSAEError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("bottom", "around", "cofiring_up_to"):
            if getattr(self, name) < 0:
                raise FastSAEError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.tokens is not None and self.tokens < 1:
            raise FastSAEError(f"tokens must be at least 1, got {self.tokens}; leave it out to read all")


class Sums:
    """Plain sums, [half, …] each, that add up over batches and ranks. Arrays by name, all of them numpy.

    tokens: [2]. fires [2, F]; f, ff [2, F]: Σf, Σf². fp, fc [2, F, P]: Σf·p with the proxy as yes or no, and as
    max(proxy, 0). p, c, cc [2, P]: of the proxies alone. histogram, weight [2, F, B]: active tokens by bin, and their
    activations. inside, inside_weight [P, 2, F, B]: of tokens of the category. x, xx [2, D], xp, xc [2, D, P]: neurons.
    fx [F, D]: Σ f·x, or [0, 0]. together [F, F]: tokens on which two features fire, or [0, 0].
    """

    def __init__(self, F: int, D: int, P: int, cofiring: bool) -> None:
        double, whole = np.float64, np.int64
        with_neurons = 8 * F * D <= _NEURON_BYTES
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "tokens": ((2,), whole), "fires": ((2, F), whole), "f": ((2, F), double), "ff": ((2, F), double),
            "fp": ((2, F, P), double), "fc": ((2, F, P), double), "p": ((2, P), double), "c": ((2, P), double),
            "cc": ((2, P), double), "histogram": ((2, F, BINS), np.int32), "weight": ((2, F, BINS), np.float32),
            "inside": ((P, 2, F, BINS), np.int32), "inside_weight": ((P, 2, F, BINS), np.float32),
            "x": ((2, D), double), "xx": ((2, D), double), "xp": ((2, D, P), double), "xc": ((2, D, P), double),
            "fx": ((F, D) if with_neurons else (0, 0), double), "together": ((F, F) if cofiring else (0, 0), double),
        }  # fmt: skip
        self.arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


class Survey:
    """What one pass has learnt of F features. Made by `survey` (or by hand: `add` every Read); read with `Cards`.

    proxies: names, in the order of the axis P. ranges: of every feature. maximum: [2, F]. neuron_max: [D].
    batches: how many batches of text were read. first: [documents + 1], the number of each document's first token.
    """

    def __init__(self, d_sae: int, d_in: int, names: tuple[str, ...], config: SurveyConfig | None = None) -> None:
        self.config = config = config or SurveyConfig()
        self.d_sae, self.d_in, self.proxies, self.batches = d_sae, d_in, tuple(names), 0
        self.sums = Sums(d_sae, d_in, len(names), d_sae <= config.cofiring_up_to)
        self.ranges = Ranges(d_sae)
        self.maximum = np.zeros((_HALVES, d_sae), dtype=np.float32)
        self.neuron_max = np.full(d_in, -np.inf, dtype=np.float32)
        self.first = np.zeros(1, dtype=np.int64)
        apart = 2 * config.around  # not five times the same sentence
        self.top = Kept(config.top, config.around, _by_half, _HALVES * d_sae, apart)
        self.bottom = Kept(config.bottom, config.around, _by_half, _HALVES * d_sae, apart)
        self.sampled = Kept(config.per_interval, config.around, self._stratum, _HALVES * d_sae * STRATA)
        self.random = RandomWindows(config.windows, config.around, config.seed)

    def _stratum(self, feature: np.ndarray, half: np.ndarray, value: np.ndarray) -> np.ndarray:
        return _by_half(feature, half, value) * STRATA + self.ranges.place(feature, value, STRATA)

    # --- the pass ---------------------------------------------------------------------------------------------------

    def add(self, some: Read, text: Text, which: int = 0) -> None:
        """One batch. which: of the sources of the Read."""
        code = some.codes[which]
        on = code.valid() & (code.values > 0)
        rows, slots = on.nonzero(as_tuple=True)
        entries = Entries(
            rows.cpu().numpy(), code.indices[rows, slots].cpu().numpy().astype(np.int64),
            code.values[rows, slots].detach().float().cpu().numpy(),
        )  # fmt: skip
        self.first = text.first
        documents = some.documents.numpy()
        where = text.first[documents] + some.positions.numpy()
        half = text.half[documents]
        scores = text.scores(documents, where)
        x = some.xs[which].detach().float().cpu()
        self._widen(entries)
        self._count(entries, half, scores)
        self._count_neurons(entries, x, half, scores)
        self._keep(some, entries, where, half)
        self.batches += 1

    def _widen(self, entries: Entries) -> None:
        """Ranges take in this batch; histograms follow."""
        highest = np.zeros(self.d_sae, dtype=np.float32)
        np.maximum.at(highest, entries.feature, entries.value)
        self._set_ranges(np.maximum(self.ranges.exponent, exponents(highest)))

    def _set_ranges(self, exponent: np.ndarray) -> None:
        by = exponent.astype(np.int64) - self.ranges.exponent
        if not by.any():
            return
        for name in ("histogram", "weight", "inside", "inside_weight"):
            widened(self.sums[name], by)
        self.ranges.exponent = exponent.astype(np.int32)
        grown = np.zeros((self.d_sae, _HALVES * STRATA), dtype=bool)
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
        np.add.at(sums["weight"].reshape(-1), bins, value)
        clipped = np.maximum(scores, 0).astype(np.float64)
        inside = scores > 0
        for name, part in (("p", inside), ("c", clipped), ("cc", clipped**2)):
            for s in range(_HALVES):
                sums[name][s] += part[half == bool(s)].sum(0)
        entry, p = np.nonzero(inside[row])  # few: categories are rare
        P = scores.shape[1]
        flat = at[entry] * P + p
        np.add.at(sums["fp"].reshape(-1), flat, wide[entry])
        np.add.at(sums["fc"].reshape(-1), flat, wide[entry] * clipped[row[entry], p])
        flat = p * (_HALVES * F * BINS) + bins[entry]
        np.add.at(sums["inside"].reshape(-1), flat, 1)
        np.add.at(sums["inside_weight"].reshape(-1), flat, value[entry])

    def _count_neurons(self, entries: Entries, x: Tensor, half: np.ndarray, scores: np.ndarray) -> None:
        sums, P = self.sums, scores.shape[1]
        self.neuron_max = np.maximum(self.neuron_max, x.amax(0).numpy())
        # All sums over tokens are one product: what multiplies x is 1, p and max(proxy, 0), in either half. float32
        # within a batch, as a batch has thousands of terms.
        clipped = np.maximum(scores, 0)
        columns = np.concatenate([np.ones((len(x), 1), np.float32), scores > 0, clipped], axis=1)
        of_half = np.stack([~half, half]).astype(np.float32)  # [2, n]
        weights = torch.from_numpy((of_half[:, :, None] * columns).transpose(0, 2, 1).reshape(-1, len(x)))
        found = (weights @ x).double().numpy().reshape(_HALVES, 1 + 2 * P, -1)
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

    def _keep(self, some: Read, entries: Entries, where: np.ndarray, half: np.ndarray) -> None:
        around = Surroundings(some, entries, self.config.around)
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

    # --- ranks, shards, sessions ------------------------------------------------------------------------------------

    def check_like(self, other: Survey) -> None:
        """Raises FastSAEError where the other is of other sizes, proxies or settings."""
        mine, theirs = self._about(), other._about()
        if mine != theirs:
            different = next(key for key in mine if mine[key] != theirs[key])
            raise FastSAEError(
                f"surveys must be of the same dictionary and settings: {different} is {mine[different]} here and "
                f"{theirs[different]} there; use another folder"
            )

    def merge(self, other: Survey) -> None:
        """Adds what another pass has learnt of the same features on other text.

        Raises FastSAEError for a survey of other features, proxies or settings.
        """
        self.check_like(other)
        if not (self.batches and other.batches):
            self.first = self.first if self.batches else other.first
        elif not np.array_equal(self.first, other.first):
            raise FastSAEError("surveys to merge must be of parts of the same documents: give every rank all of them")
        exponent = np.maximum(self.ranges.exponent, other.ranges.exponent)
        self._set_ranges(exponent)
        by = exponent.astype(np.int64) - other.ranges.exponent
        for name, array in self.sums.arrays.items():
            add = other.sums[name]
            array += widened(add.copy(), by) if name in ("histogram", "weight", "inside", "inside_weight") else add
        self.maximum = np.maximum(self.maximum, other.maximum)
        self.neuron_max = np.maximum(self.neuron_max, other.neuron_max)
        for name in ("top", "bottom", "sampled"):
            getattr(self, name).merge(getattr(other, name))
        self.random.merge(other.random)
        self.batches += other.batches

    def _about(self) -> dict[str, Any]:
        return {"d_sae": self.d_sae, "d_in": self.d_in, "proxies": list(self.proxies),
                "config": json.loads(json.dumps(asdict(self.config)))}  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """One .npz file, written beside and renamed."""
        path = Path(path)
        arrays = {f"sums.{name}": array for name, array in self.sums.arrays.items()}
        for name in ("top", "bottom", "sampled", "random"):
            arrays |= {f"{name}.{part}": array for part, array in getattr(self, name).arrays().items()}
        arrays |= {"maximum": self.maximum, "exponent": self.ranges.exponent, "neuron_max": self.neuron_max,
                   "first": self.first}  # fmt: skip
        about = self._about() | {"format": FORMAT, "version": VERSION, "batches": self.batches}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        partial = path.with_name(path.name + ".part")
        with open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Survey:
        """Raises FastSAEError for a file that is none, is damaged or comes from a later version."""
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(arrays.pop("about").tobytes())
        except FileNotFoundError:
            raise FastSAEError(f"there is no survey at {path}: make one with fastsae analyze") from None
        except (ValueError, KeyError, OSError, zipfile.BadZipFile):
            raise FastSAEError(f"{path} is no survey, or a damaged one: make it again") from None
        if about.get("format") != FORMAT or about.get("version", 0) > VERSION:
            raise FastSAEError(f"expected a {FORMAT} up to version {VERSION} at {path}, got {about.get('format')}")
        config: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
        found = cls(about["d_sae"], about["d_in"], tuple(about["proxies"]), SurveyConfig(**config))
        found.batches = about["batches"]
        found.maximum, found.neuron_max = arrays["maximum"], arrays["neuron_max"]
        found.first = arrays["first"]
        found.ranges.exponent = arrays["exponent"]
        found.sums.arrays = {name: arrays[f"sums.{name}"] for name in found.sums.arrays}
        for name in ("top", "bottom", "sampled", "random"):
            parts = {key.split(".", 1)[1]: array for key, array in arrays.items() if key.startswith(name + ".")}
            getattr(found, name).load(parts)
        return found


def _by_half(feature: np.ndarray, half: np.ndarray, value: np.ndarray) -> np.ndarray:
    return feature.astype(np.int64) * _HALVES + half
