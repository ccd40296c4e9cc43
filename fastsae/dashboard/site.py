"""The static site: a folder that opens with a double click or from any server, and that code can read as well.

    report/index.html   assets/ (scripts, one stylesheet, Plotly)   data/*.js

A page opened from a disk may not fetch, so data come as scripts, each one call `fastsae.put(name, value);` of at most
2 MB, and are loaded when they are looked at. `read_overview`, `read_rows`, `read_card` read the same files in Python.
The live parts of `fastsae serve` announce themselves in assets/server.js, which is empty here: the page so never asks a
server that is not there.

Axes: F features.
"""

from __future__ import annotations

import bisect
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsae.dashboard import data
from fastsae.dashboard.facts import Facts
from fastsae.dashboard.spelling import Spelling
from fastsae.errors import FastSAEError
from fastsae.files import write_text
from fastsae.progress import progress

FORMAT, VERSION = "fastsae-site", 1
STATIC = Path(__file__).with_name("static")
_LARGEST = 1_500_000  # bytes of a data file
_CARDS = 64  # in a file: a page waits for the file its card is in
_ROWS = 2048  # of the list, in a file: their text may take 800 bytes each
_POINTS = 50_000  # of a column in a file
_DIGITS = "".join(chr(c) for c in range(0x23, 0x7F) if chr(c) != "\\")  # 91, which JSON does not escape
_NEEDED = {"d_sae": int, "proxies": list, "has": dict}  # of the overview, to read the rest
_PART = "\x80"  # after the text of a token of `parts`; `visible` leaves none in a text


def write_site(out: str | Path, facts: Facts, *, show_progress: bool = True) -> Path:
    """Writes the site into a folder, in the place of one that is there; returns its index.html.

    Other files of the folder stay. Time: some milliseconds a feature. Size: about 8 kB a feature.
    Raises FastSAEError where a file cannot be written.
    """
    out = Path(out)
    _clear(out)
    writer = _Writer(out / "data")
    with progress("site", facts.d_sae, "features", show=show_progress) as meter:
        starts = writer.cards(facts, meter)
    parts = {
        "rows": writer.rows(facts),
        "map": writer.columns("map", data.feature_map(facts)),
        "compare": writer.columns("compare", data.comparison(facts)),
        "splitting": writer.splitting(data.splitting(facts)),
    }
    about = {"format": FORMAT, "version": VERSION, "cards": starts, "parts": parts}
    about["report"] = (out / "report.html").exists()
    writer.put("overview", data.overview(facts) | {"about": about})
    return _write_static(out)


def _clear(out: Path) -> None:
    """Removes what an earlier site wrote; raises FastSAEError for a folder that is somebody else's."""
    for name in ("data", "assets"):
        if (out / name).exists() and not (out / "index.html").exists():
            raise FastSAEError(f"{out / name} exists and is not part of a site: choose another folder")
    for name in ("data", "assets"):
        shutil.rmtree(out / name, ignore_errors=True)


def _write_static(out: Path) -> Path:
    (out / "assets").mkdir(parents=True, exist_ok=True)
    for file in STATIC.iterdir():
        if file.suffix in (".js", ".css", ".txt"):
            shutil.copyfile(file, out / "assets" / file.name)
    write_text(out / "index.html", (STATIC / "index.html").read_text(encoding="utf-8"))
    return out / "index.html"


class _Writer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, value: Any) -> None:
        self._put(name, _json(value))

    def _put(self, name: str, text: str) -> None:
        # Half a surrogate pair, which a Python string may hold, becomes a question mark.
        text = text.encode("utf-8", "replace").decode()
        write_text(self.folder / f"{name}.js", f'fastsae.put("{name}",{text});\n')

    def cards(self, facts: Facts, meter: Any) -> list[int]:
        """Cards by file; returns the first feature of each file."""
        spelling = Spelling(facts.bytes_of)
        starts: list[int] = []
        for first in range(0, facts.d_sae, _CARDS):
            some = []
            for f in range(first, min(first + _CARDS, facts.d_sae)):
                some.append(data.feature_card(facts, f, spelling))
                meter.advance(1)
            self._cards(some, starts)
        return starts

    def _cards(self, some: list[dict[str, Any]], starts: list[int]) -> None:
        """In one file, or in two halves where that would be too large."""
        text = _json(pack(some))
        if len(text.encode("utf-8", "replace")) > _LARGEST and len(some) > 1:
            self._cards(some[: len(some) // 2], starts)
            self._cards(some[len(some) // 2 :], starts)
            return
        self._put(f"cards-{len(starts)}", text)
        starts.append(some[0]["feature"])

    def rows(self, facts: Facts) -> int:
        begins = range(0, facts.d_sae, _ROWS)
        for number, low in enumerate(begins):
            self.put(f"rows-{number}", data.feature_rows(facts, low, min(low + _ROWS, facts.d_sae)))
        return len(begins)

    def columns(self, name: str, value: dict[str, Any] | None) -> int:
        """A dictionary with columns, cut into files of so many entries; what is no column stands in the first."""
        if value is None:
            return 0
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        rest = {key: column for key, column in value.items() if key not in columns}
        longest = max((len(column) for column in columns.values()), default=0)
        begins = range(0, max(longest, 1), _POINTS)
        for number, low in enumerate(begins):
            part = {key: column[low : low + _POINTS] for key, column in columns.items()}
            self.put(f"{name}-{number}", part | (rest if not number else {}))
        return len(begins)

    def splitting(self, value: dict[str, Any] | None) -> int:
        """The first file has all but the steps; each step has a file."""
        if value is None:
            return 0
        self.put("splitting-0", value | {"steps": []})
        for number, step in enumerate(value["steps"]):
            self.put(f"splitting-{number + 1}", {"steps": [step]})
        return 1 + len(value["steps"])


# --- cards in little space ------------------------------------------------------------------------------------------


def pack(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """Cards as a file holds them. tokens: the different texts, the commonest first, those of `parts` with a mark at
    their end. width: digits of base 91 that a token's number in this list takes. cards: windows with their text as such
    numbers, and of activations and effects only what is not 0."""
    counts = Counter(text for card in cards for window in _windows(card) for text in _marked(window))
    tokens = [text for text, _ in counts.most_common()]
    width = next(w for w in range(1, 9) if len(tokens) <= len(_DIGITS) ** w)
    codes = {text: _code(number, width) for number, text in enumerate(tokens)}
    return {"tokens": tokens, "width": width, "cards": [_changed(card, lambda w: _packed(w, codes)) for card in cards]}


def unpack(file: dict[str, Any], place: int) -> dict[str, Any]:
    """One card of a packed file, as `data.feature_card` gave it."""
    return _changed(file["cards"][place], lambda window: _unpacked(window, file["tokens"], file["width"]))


def _windows(card: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from card["top"]
    yield from card["bottom"]
    for part in card["intervals"]:
        yield from part["windows"]


def _changed(card: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The card with all of its windows changed."""
    intervals = [part | {"windows": [change(w) for w in part["windows"]]} for part in card["intervals"]]
    both = {name: [change(window) for window in card[name]] for name in ("top", "bottom")}
    return card | both | {"intervals": intervals}


def _marked(window: dict[str, Any]) -> list[str]:
    if not window["parts"]:
        return window["tokens"]
    parts = set(window["parts"])
    return [text + _PART if i in parts else text for i, text in enumerate(window["tokens"])]


def _code(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def _packed(window: dict[str, Any], codes: dict[str, str]) -> list[Any]:
    """[text, place of the chosen token, places, activations], and places and effects if any."""
    found = [
        "".join([codes[text] for text in _marked(window)]), window["at"], *_sparse(window["activations"]),
    ]  # fmt: skip
    return [*found, *_sparse(window["effects"])] if "effects" in window else found


def _sparse(values: list[float]) -> tuple[list[int], list[float]]:
    places = [i for i, value in enumerate(values) if value]
    return places, [values[i] for i in places]


def _unpacked(window: list[Any], tokens: list[str], width: int) -> dict[str, Any]:
    text, at, *columns = window
    texts = []
    for start in range(0, len(text), width):
        number = 0
        for digit in text[start : start + width]:
            number = number * len(_DIGITS) + _DIGITS.index(digit)
        texts.append(tokens[number])
    found = {
        "tokens": [one.removesuffix(_PART) for one in texts],
        "parts": [i for i, one in enumerate(texts) if one.endswith(_PART)],
        "activations": _dense(len(texts), *columns[:2]), "at": at,
    }  # fmt: skip
    return found | ({"effects": _dense(len(texts), *columns[2:])} if columns[2:] else {})


def _dense(length: int, places: Iterable[int], values: Iterable[float]) -> list[float]:
    found = [0.0] * length
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# --- reading it again -----------------------------------------------------------------------------------------------


def read_overview(folder: str | Path) -> dict[str, Any]:
    """What `data.overview` gave. Raises FastSAEError for a folder without a site."""
    found = _overview(Path(folder))
    del found["about"]
    return found


def read_rows(folder: str | Path) -> dict[str, list[Any]]:
    """What `data.feature_rows` gave of all features."""
    overview = _overview(Path(folder))
    with _whole(Path(folder) / "data"):
        parts = [_read(Path(folder), f"rows-{number}") for number in range(overview["about"]["parts"]["rows"])]
        rows = {name: [value for part in parts for value in part[name]] for name in (parts[0] if parts else ())}
        if len(rows["feature"]) != overview["d_sae"] or any(len(v) != overview["d_sae"] for v in rows.values()):
            raise ValueError
    return rows


def read_card(folder: str | Path, f: int) -> dict[str, Any]:
    """What `data.feature_card` gave. Raises FastSAEError for a feature that the site does not have."""
    overview = _overview(Path(folder))
    if isinstance(f, bool) or not isinstance(f, int) or not 0 <= f < overview["d_sae"]:
        raise FastSAEError(f"features must be numbers from 0 to {overview['d_sae'] - 1}, got {f}")
    with _whole(Path(folder) / "data"):
        starts = overview["about"]["cards"]
        number = bisect.bisect_right(starts, f) - 1
        card = unpack(_read(Path(folder), f"cards-{number}"), f - starts[number])
        if card["feature"] != f:
            raise ValueError
    return card


def _overview(folder: Path) -> dict[str, Any]:
    """With `about`, which says how the other files are cut. Raises FastSAEError for a folder without a site."""
    found = _read(folder, "overview")
    about = found.get("about") if isinstance(found, dict) else None
    kind, version = (about.get("format"), about.get("version", 0)) if isinstance(about, dict) else (None, 0)
    if kind != FORMAT or not isinstance(version, int) or version > VERSION:
        raise FastSAEError(f"expected a {FORMAT} up to version {VERSION} in {folder}, got {kind}, version {version}")
    if not all(isinstance(found.get(name), kind) for name, kind in _NEEDED.items()):
        raise FastSAEError(f"{folder / 'data' / 'overview.js'} is damaged: make the report again")
    return found


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes go wrong, as one clear error."""
    try:
        yield
    except FastSAEError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise FastSAEError(f"the files in {path} do not fit together: make the report again") from None


def _read(folder: Path, name: str) -> Any:
    path = folder / "data" / f"{name}.js"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"there is no report in {folder} ({path} is missing): make one with fastsae analyze"
        raise FastSAEError(message) from None
    except UnicodeDecodeError:
        raise FastSAEError(f"{path} is damaged: make the report again") from None
    except OSError as error:
        raise FastSAEError(f"{path} cannot be read: {error.strerror or error}") from None
    start, end = f'fastsae.put("{name}",', ");\n"
    try:
        if not (text.startswith(start) and text.endswith(end)):
            raise ValueError
        return json.loads(text[len(start) : -len(end)])
    except ValueError:
        raise FastSAEError(f"{path} is damaged: make the report again") from None
