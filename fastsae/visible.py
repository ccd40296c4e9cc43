"""Text as a reader should see it: controls as their pictures, what would hide or turn the line as its number."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """Nothing invisible stays, but for spaces and the joiners of Persian and emoji. Not HTML: that is escaped later."""
    return "".join(map(_character, text))


def _character(c: str) -> str:
    if c == "\n":
        return "⏎"
    if c == "\t":
        return "⇥"
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    if c.isprintable() or unicodedata.category(c) == "Zs" or c in "\u200c\u200d":
        return c
    return f"‹U+{ord(c):04X}›"
