"""Tokens → the characters that their bytes belong to, and from there the script of each token.

With a small byte-level vocabulary most letters of a rare script are spread over two or three tokens. Such a token is
labelled by the letter it is part of, in the text where it stands, so a half letter counts as what a reader sees.

Axes: N tokens, V vocabulary, B bytes of text, C characters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastsae.analysis.scripts import NEUTRAL, NO_SCRIPT, script_ids
from fastsae.errors import FastSAEError


def _byte_alphabet() -> dict[str, int]:
    """Character → byte, of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 upwards (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every entry of a vocabulary: entry v has data[offsets[v] : offsets[v + 1]]; special tokens none.

    data: uint8. offsets: [V + 1] int64.
    """

    data: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes:
        """From a Hugging Face tokenizer: byte-level BPE, SentencePiece with byte fallback, or plain word pieces."""
        size = len(tokenizer)
        names = [name if isinstance(name, str) else "" for name in tokenizer.convert_ids_to_tokens(list(range(size)))]
        special = set(tokenizer.all_special_ids)
        added = {number for number in tokenizer.get_added_vocab().values() if number not in special}
        alphabet = _byte_alphabet()
        byte_level = set(alphabet) <= set(names) or any(name.startswith("Ġ") for name in names)
        pieces: list[bytes] = []
        for number, name in enumerate(names):
            if number in special:
                pieces.append(b"")
            elif byte_level and number not in added and all(char in alphabet for char in name):
                pieces.append(bytes(alphabet[char] for char in name))
            else:
                pieces.append(name.encode() if byte_level else _piece_bytes(name))
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(pieces), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def digest(self) -> str:
        """A fingerprint, to know a tokenizer again."""
        found = hashlib.blake2b(self.data.tobytes(), digest_size=8)
        found.update(self.offsets.astype(np.int64).tobytes())
        return found.hexdigest()

    @cached_property
    def lengths(self) -> np.ndarray:
        """[V] bytes in each entry."""
        return np.diff(self.offsets)

    @cached_property
    def entries(self) -> tuple[dict[bytes, list[int]], dict[bytes, list[int]]]:
        """Bytes → the entries that are they; and the same for entries without the white space around them."""
        exact: dict[bytes, list[int]] = {}
        stripped: dict[bytes, list[int]] = {}
        for number in range(len(self)):
            piece = self[number]
            exact.setdefault(piece, []).append(number)
            stripped.setdefault(piece.strip(), []).append(number)
        return exact, stripped

    @cached_property
    def partial(self) -> np.ndarray:
        """[V] bool: entries that hold a part of a character: bytes that are no UTF-8 by themselves."""
        return np.array([not _is_utf8(self[number]) for number in range(len(self))], dtype=bool)

    def __getitem__(self, token_id: int) -> bytes:
        return self.data[self.offsets[token_id] : self.offsets[token_id + 1]].tobytes()

    def spell(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of token_ids [N] in a row, uint8 [B], and where each token starts in them, [N + 1]."""
        lengths = self.lengths[token_ids]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        place = np.arange(starts[-1]) - np.repeat(starts[:-1] - self.offsets[token_ids], lengths)
        return self.data[place], starts


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _piece_bytes(name: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return name.removeprefix("##").replace("▁", " ").encode()


def decode_utf8(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [B] → code points [C] and, for every byte, its character's number [B]. Broken sequences become U+FFFD."""
    if not len(data):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    lead = (data & 0xC0) != 0x80
    lead[0] = True  # a text that starts in the middle of a character: a broken one of its own
    character = np.cumsum(lead) - 1
    starts = np.flatnonzero(lead)
    lengths = np.diff(starts, append=len(data))
    first = data[starts].astype(np.int64)
    wanted = np.select([first < 0x80, first < 0xC0, first < 0xE0, first < 0xF0, first < 0xF8], [1, 0, 2, 3, 4], 0)
    points = np.where(wanted <= 1, first, first & (0x7F >> wanted))
    for k in range(1, 4):
        rest = data[np.minimum(starts + k, len(data) - 1)].astype(np.int64) & 0x3F
        points = np.where(wanted > k, points << 6 | rest, points)
    shortest = np.array([0, 0, 0x80, 0x800, 0x10000])[wanted]  # a code point written with more bytes than it needs
    whole = (lengths == wanted) & (points >= shortest) & (points <= 0x10FFFF) & (points >> 11 != 0x1B)  # surrogates
    return np.where(whole, points, 0xFFFD), character


@dataclass(frozen=True)
class Spelling:
    """Tokens of a text with their characters. token_ids, documents: [N]; tokens of a document stand together.

    data: uint8 [B], the bytes of all tokens. starts: [N + 1], where each token's bytes start. points: [C], code
    points. character: [B], the character each byte belongs to.
    """

    token_ids: np.ndarray
    documents: np.ndarray
    bytes_of: TokenBytes
    data: np.ndarray
    starts: np.ndarray
    points: np.ndarray
    character: np.ndarray

    @classmethod
    def of(cls, token_ids: np.ndarray, documents: np.ndarray, bytes_of: TokenBytes) -> Spelling:
        """Spell out a token stream. Raises FastSAEError for ids that are not in the vocabulary."""
        bad = token_ids[(token_ids < 0) | (token_ids >= len(bytes_of))]
        if len(bad):
            raise FastSAEError(
                f"expected token ids below {len(bytes_of)}, got {bad[0]}: give the model's own tokenizer"
            )
        data, starts = bytes_of.spell(token_ids)
        points, character = decode_utf8(data)
        return cls(token_ids, documents, bytes_of, data, starts, points, character)

    def __len__(self) -> int:
        return len(self.token_ids)

    def all_bytes(self, condition: np.ndarray) -> np.ndarray:
        """[N] bool: whether a condition, bool [B], holds for every byte of a token (and it has any)."""
        holds = np.concatenate([[0], np.cumsum(condition)])
        spans = np.diff(self.starts)
        return (holds[self.starts[1:]] - holds[self.starts[:-1]] == spans) & (spans > 0)

    def any_byte(self, condition: np.ndarray) -> np.ndarray:
        """[N] bool: whether a condition, bool [B], holds for some byte of a token."""
        holds = np.concatenate([[0], np.cumsum(condition)])
        return holds[self.starts[1:]] > holds[self.starts[:-1]]

    @cached_property
    def scripts(self) -> np.ndarray:
        """[N] int16: the script of all of a token's characters, NO_SCRIPT where they differ or have none.

        Spaces and invisible formatting marks are neutral: " كتاب" is Arabic; nothing but spaces is no script.
        """
        kinds = script_ids(self.points)[self.character]  # [B]
        spans = np.diff(self.starts)
        result = np.full(len(self), NO_SCRIPT, dtype=np.int16)
        some = np.flatnonzero(spans)
        if not len(some):
            return result
        neutral = kinds == NEUTRAL
        # reduceat over the starts of the tokens that have bytes: an empty token would steal its neighbour's first.
        low = np.minimum.reduceat(np.where(neutral, np.int16(32767), kinds), self.starts[some])
        high = np.maximum.reduceat(np.where(neutral, np.int16(-32768), kinds), self.starts[some])
        result[some] = np.where(low == high, low, NO_SCRIPT)
        return result

    def within(self, marked: np.ndarray) -> np.ndarray:
        """[N] bool: tokens all of whose characters are marked, bool [C], or neutral, and that have a marked one."""
        neutral = script_ids(self.points) == NEUTRAL
        return self.all_bytes((marked | neutral)[self.character]) & self.any_byte(marked[self.character])

    def largest(self, values: np.ndarray) -> np.ndarray:
        """[N]: the largest value, [C], of a token's characters; −∞ for a token without any."""
        result = np.full(len(self), -np.inf)
        some = np.flatnonzero(np.diff(self.starts))
        if len(some):
            result[some] = np.maximum.reduceat(values[self.character], self.starts[some])
        return result

    def texts(self) -> Iterator[tuple[str, int]]:
        """(text, number of its first character) of every run of tokens of one document; one character a code point."""
        if not len(self.points):
            return
        first_byte = np.flatnonzero(np.diff(self.character, prepend=-1))  # [C]
        document = self.documents[np.repeat(np.arange(len(self)), np.diff(self.starts))[first_byte]]
        edges = [0, *(np.flatnonzero(np.diff(document)) + 1).tolist(), len(document)]
        for first, last in zip(edges, edges[1:], strict=False):
            yield self.points[first:last].astype("<u4").tobytes().decode("utf-32-le"), first

    def characters_of(self, first: int, last: int) -> list[tuple[str, int, int]]:
        """Tokens first … last − 1 in groups that begin and end at a character's edge: (text, first, last) each.

        Tokens that share a character come in one group, so that each group can be shown to a reader.
        """
        groups, begin = [], first
        for n in range(first, last):
            end = self.starts[n + 1]
            inside = n + 1 < last and 0 < end < len(self.data) and self.character[end - 1] == self.character[end]
            if inside:
                continue
            text = self.data[self.starts[begin] : end].tobytes().decode("utf-8", "replace")
            groups.append((text, begin, n + 1))
            begin = n + 1
        return groups


def readable(parts: list[bytes]) -> list[str]:
    """Tokens as text. A character spread over several tokens is shown whole at the token that completes it, and its
    other parts as ‹D8›, unless that token has a character of its own. Bytes that never make a character likewise."""
    data = np.frombuffer(b"".join(parts), dtype=np.uint8)
    points, character = decode_utf8(data)
    last = np.flatnonzero(np.diff(character, append=-1))  # [C], the byte that completes each character
    out, at = [], 0
    for part in parts:
        text, rest = "", ""
        for place in range(at, at + len(part)):
            number = character[place]
            if points[number] == 0xFFFD:
                text += f"‹{data[place]:02X}›"
            elif last[number] == place:
                text += chr(points[number])
            else:
                rest += f"‹{data[place]:02X}›"
        out.append(text or rest)
        at += len(part)
    return out
