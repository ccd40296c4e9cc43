"""Tokens as a reader should see them. Not yet escaped: who puts them into a page does that."""

from __future__ import annotations

import itertools

import numpy as np

from fastsae.analysis.labels import TokenBytes, decode_utf8, readable
from fastsae.visible import visible

_LONGEST = 48  # characters of a token that are shown
_RUNS = 100_000  # of tokens that are parts of characters, remembered


class Spelling:
    """Tokens as a reader should see them: characters whole (labels.readable), controls visible, no longer than 48.

    A token of whole characters is spelled once, and so is each run of tokens between such ones.
    """

    def __init__(self, bytes_of: TokenBytes) -> None:
        self._bytes_of = bytes_of
        self._known: dict[int, str | None] = {}
        self._runs: dict[tuple[int, ...], tuple[list[str], list[int]]] = {}

    def one(self, token: int) -> str:
        """A token that stands alone."""
        return self.window(np.array([token]))[0][0]

    def window(self, token_ids: np.ndarray) -> tuple[list[str], list[int]]:
        """(text of every token, places of `parts`: tokens that only begin, or continue, a character which a later one
        completes, and which are shown together with it)."""
        known, ids = self._known, token_ids.tolist()
        whole = [known[i] if i in known else self._whole(i) for i in ids]
        if None not in whole:
            return whole, []  # type: ignore[return-value]
        texts: list[str] = []
        parts: list[int] = []
        for broken, group in itertools.groupby(zip(ids, whole, strict=True), lambda pair: pair[1] is None):
            if not broken:
                texts += [text for _, text in group if text is not None]
                continue
            run, inside = self._run(tuple(i for i, _ in group))
            parts += [len(texts) + place for place in inside]
            texts += run
        return texts, parts

    def _whole(self, token: int) -> str | None:
        """The token's text, None where it is part of a character."""
        try:
            text = self._bytes_of[token].decode("utf-8")
            found = None if "\ufffd" in text else _shown(text)
        except UnicodeDecodeError:
            found = None
        self._known[token] = found
        return found

    def _run(self, ids: tuple[int, ...]) -> tuple[list[str], list[int]]:
        if ids not in self._runs:
            if len(self._runs) > _RUNS:
                self._runs.clear()
            pieces = [self._bytes_of[i] for i in ids]
            self._runs[ids] = [_shown(text) for text in readable(pieces)], _parts(pieces)
        return self._runs[ids]


def _shown(text: str) -> str:
    return visible(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def _parts(pieces: list[bytes]) -> list[int]:
    """Places of pieces all of whose bytes belong to a character that ends in a later piece."""
    data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    points, character = decode_utf8(data)
    found, begin = [], 0
    for place, piece in enumerate(pieces):
        end = begin + len(piece)
        of = character[end - 1]
        if end < len(data) and character[begin] == of == character[end] and points[of] != 0xFFFD:
            found.append(place)
        begin = end
    return found
