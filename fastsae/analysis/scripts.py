"""Scripts of the world by Unicode blocks, as the paper's proxies count them.

Unicode's own Script property splits finer (punctuation and digits shared by scripts are "Common"); the paper takes
whole blocks, and so do we: everything in a script's blocks belongs to it.
"""

from __future__ import annotations

import numpy as np

# name → (first, last) code points. Arabic: Bricken et al. 2023. The others: Unicode 15's Blocks.txt.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "Arabic": ((0x0600, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)),
    "Hebrew": ((0x0590, 0x05FF), (0xFB1D, 0xFB4F)),
    "Cyrillic": ((0x0400, 0x052F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Greek": ((0x0370, 0x03FF), (0x1F00, 0x1FFF)),
    "Han": (
        (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
        (0x20000, 0x323AF),
    ),
    "Kana": ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F)),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "Devanagari": ((0x0900, 0x097F), (0xA8E0, 0xA8FF)),
    "Thai": ((0x0E00, 0x0E7F),),
    "Latin": (
        (0x0041, 0x005A), (0x0061, 0x007A), (0x00C0, 0x00D6), (0x00D8, 0x00F6), (0x00F8, 0x024F), (0x0250, 0x02AF),
        (0x1D00, 0x1DBF), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xAB30, 0xAB6F), (0xFB00, 0xFB06),
        (0xFF21, 0xFF3A), (0xFF41, 0xFF5A),
    ),
    "Armenian": ((0x0530, 0x058F), (0xFB13, 0xFB17)),
    "Syriac": ((0x0700, 0x074F), (0x0860, 0x086F)),
    "Thaana": ((0x0780, 0x07BF),),
    "NKo": ((0x07C0, 0x07FF),),
    "Samaritan": ((0x0800, 0x083F),),
    "Mandaic": ((0x0840, 0x085F),),
    "Bengali": ((0x0980, 0x09FF),),
    "Gurmukhi": ((0x0A00, 0x0A7F),),
    "Gujarati": ((0x0A80, 0x0AFF),),
    "Oriya": ((0x0B00, 0x0B7F),),
    "Tamil": ((0x0B80, 0x0BFF),),
    "Telugu": ((0x0C00, 0x0C7F),),
    "Kannada": ((0x0C80, 0x0CFF),),
    "Malayalam": ((0x0D00, 0x0D7F),),
    "Sinhala": ((0x0D80, 0x0DFF),),
    "Lao": ((0x0E80, 0x0EFF),),
    "Tibetan": ((0x0F00, 0x0FFF),),
    "Myanmar": ((0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)),
    "Ethiopic": ((0x1200, 0x139F), (0x2D80, 0x2DDF), (0xAB00, 0xAB2F)),
    "Cherokee": ((0x13A0, 0x13FF), (0xAB70, 0xABBF)),
    "Canadian Aboriginal": ((0x1400, 0x167F), (0x18B0, 0x18FF)),
    "Ogham": ((0x1680, 0x169F),),
    "Runic": ((0x16A0, 0x16FF),),
    "Tagalog": ((0x1700, 0x171F),),
    "Khmer": ((0x1780, 0x17FF), (0x19E0, 0x19FF)),
    "Mongolian": ((0x1800, 0x18AF),),
    "Limbu": ((0x1900, 0x194F),),
    "Tai Le": ((0x1950, 0x197F),),
    "New Tai Lue": ((0x1980, 0x19DF),),
    "Buginese": ((0x1A00, 0x1A1F),),
    "Tai Tham": ((0x1A20, 0x1AAF),),
    "Balinese": ((0x1B00, 0x1B7F),),
    "Sundanese": ((0x1B80, 0x1BBF),),
    "Lepcha": ((0x1C00, 0x1C4F),),
    "Ol Chiki": ((0x1C50, 0x1C7F),),
    "Braille": ((0x2800, 0x28FF),),
    "Glagolitic": ((0x2C00, 0x2C5F), (0x1E000, 0x1E02F)),
    "Coptic": ((0x2C80, 0x2CFF),),
    "Tifinagh": ((0x2D30, 0x2D7F),),
    "Bopomofo": ((0x3100, 0x312F), (0x31A0, 0x31BF)),
    "Yi": ((0xA000, 0xA4CF),),
    "Lisu": ((0xA4D0, 0xA4FF),),
    "Vai": ((0xA500, 0xA63F),),
    "Bamum": ((0xA6A0, 0xA6FF),),
    "Phags-pa": ((0xA840, 0xA87F),),
    "Saurashtra": ((0xA880, 0xA8DF),),
    "Javanese": ((0xA980, 0xA9DF),),
    "Cham": ((0xAA00, 0xAA5F),),
    "Tai Viet": ((0xAA80, 0xAADF),),
    "Meetei Mayek": ((0xAAE0, 0xAAFF), (0xABC0, 0xABFF)),
    "Gothic": ((0x10330, 0x1034F),),
    "Deseret": ((0x10400, 0x1044F),),
    "Old Persian": ((0x103A0, 0x103DF),),
    "Phoenician": ((0x10900, 0x1091F),),
    "Grantha": ((0x11300, 0x1137F),),
    "Chakma": ((0x11100, 0x1114F),),
    "Cuneiform": ((0x12000, 0x1254F),),
    "Egyptian Hieroglyphs": ((0x13000, 0x1345F),),
    "Adlam": ((0x1E900, 0x1E95F),),
}

NO_SCRIPT = -1  # digits, punctuation, symbols, broken characters
NEUTRAL = -2  # spaces and invisible marks: part of whatever stands beside them

NUMBER: dict[str, int] = {name: i for i, name in enumerate(SCRIPTS)}

# White space, zero-width (non-)joiners (Persian has one inside many words), directional marks, byte-order mark.
_NEUTRAL_RANGES = (
    (0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200F), (0x2028, 0x202F),
    (0x205F, 0x2064), (0x2066, 0x2069), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip


def _table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [(first, last, NUMBER[name]) for name, ranges in SCRIPTS.items() for first, last in ranges]
    first, last, number = (np.array(column, dtype=np.int64) for column in zip(*sorted(rows), strict=True))
    return first, last, number


def script_ids(points: np.ndarray) -> np.ndarray:
    """[C] code points → [C] int16: the NUMBER of their script, NO_SCRIPT or NEUTRAL."""
    first, last, number = _table()
    at = np.maximum(np.searchsorted(first, points, side="right") - 1, 0)
    ids = np.where((points >= first[at]) & (points <= last[at]), number[at], NO_SCRIPT).astype(np.int16)
    for low, high in _NEUTRAL_RANGES:
        ids[(points >= low) & (points <= high)] = NEUTRAL
    return ids
