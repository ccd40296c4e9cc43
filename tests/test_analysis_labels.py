"""Tokens are labelled by the characters their bytes belong to."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsae.analysis.labels import Spelling, TokenBytes, decode_utf8, readable
from fastsae.analysis.scripts import NEUTRAL, NO_SCRIPT, NUMBER, SCRIPTS, script_ids
from fastsae.errors import FastSAEError
from tests import tiny_lm

BYTES = TokenBytes(np.arange(256, dtype=np.uint8), np.arange(257))  # every byte a token of its own


def spelling(*tokens: bytes, documents: list[int] | None = None) -> Spelling:
    """A text of just these tokens."""
    vocabulary = sorted(set(tokens))
    table = TokenBytes(
        np.frombuffer(b"".join(vocabulary), dtype=np.uint8), np.cumsum([0, *map(len, vocabulary)], dtype=np.int64)
    )
    ids = np.array([vocabulary.index(token) for token in tokens])
    return Spelling.of(ids, np.array(documents if documents is not None else [0] * len(tokens)), table)


def scripts(*tokens: bytes) -> list[str]:
    names = list(SCRIPTS)
    return [names[n] if n >= 0 else "-" for n in spelling(*tokens).scripts.tolist()]


def test_words_spaces_and_mixtures():
    texts = [" كتاب", " ", "abc", "ب(", "שלום\n", "漢", "かな", "12", "\n "]
    found = scripts(*(text.encode() for text in texts))
    assert found == ["Arabic", "-", "Latin", "-", "Hebrew", "Han", "Kana", "-", "-"]


def test_parts_of_a_character_take_its_script():
    first, second = "ك".encode()[:1], "ك".encode()[1:]
    assert scripts(b"a", b" " + first, second, b"b") == ["Latin", "Arabic", "Arabic", "Latin"]
    # The same first byte begins characters of other scripts too: only the text at hand tells.
    han = "漢".encode()
    assert scripts(han[:1], han[1:2], han[2:] + "あ".encode()[:1], "あ".encode()[1:]) == ["Han", "Han", "-", "Kana"]


def test_zero_width_joiners_are_neutral_inside_a_persian_word():
    assert scripts("می\u200cخواهم".encode()) == ["Arabic"]
    assert scripts("\u200c".encode()) == ["-"]


def test_tokens_without_bytes_have_no_script_and_steal_none():
    table = TokenBytes(np.frombuffer("جa".encode(), dtype=np.uint8), np.array([0, 0, 2, 3]))
    text = Spelling.of(np.array([0, 1, 0, 2, 0]), np.zeros(5, dtype=np.int64), table)
    assert text.scripts.tolist() == [NO_SCRIPT, NUMBER["Arabic"], NO_SCRIPT, NUMBER["Latin"], NO_SCRIPT]
    assert text.all_bytes(text.data > 0).tolist() == [False, True, False, True, False]
    assert text.any_byte(text.data == ord("a")).tolist() == [False, False, False, True, False]


@given(st.text(max_size=60))
def test_decoding_agrees_with_python(text: str):
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    points, character = decode_utf8(data)
    assert points.tolist() == [ord(c) for c in text]
    assert character.tolist() == [i for i, c in enumerate(text) for _ in c.encode("utf-8", "surrogatepass")]


@given(st.binary(max_size=60))
def test_broken_bytes_are_counted_and_never_a_letter(data: bytes):
    points, character = decode_utf8(np.frombuffer(data, dtype=np.uint8))
    assert len(character) == len(data)
    assert (np.diff(character) >= 0).all() and len(points) == (character[-1] + 1 if len(data) else 0)
    for number, point in enumerate(points.tolist()):
        raw = bytes(b for b, c in zip(data, character, strict=True) if c == number)
        assert point == 0xFFFD or chr(point).encode("utf-8", "surrogatepass") == raw


def test_blocks_do_not_overlap():
    ranges = sorted(pair for pairs in SCRIPTS.values() for pair in pairs)
    assert all(low <= high for low, high in ranges)
    assert all(before[1] < after[0] for before, after in zip(ranges, ranges[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "word"),
    [("Arabic", "ARABIC LETTER"), ("Hebrew", "HEBREW LETTER"), ("Cyrillic", "CYRILLIC"), ("Greek", "GREEK"),
     ("Han", "CJK UNIFIED"), ("Kana", "KATAKANA LETTER"), ("Hangul", "HANGUL SYLLABLE"), ("Thai", "THAI CHARACTER"),
     ("Devanagari", "DEVANAGARI LETTER"), ("Armenian", "ARMENIAN"), ("Ethiopic", "ETHIOPIC SYLLABLE"),
     ("Cherokee", "CHEROKEE"), ("Tamil", "TAMIL"), ("Adlam", "ADLAM"), ("Canadian Aboriginal", "CANADIAN SYLLABICS")],
)  # fmt: skip
def test_letters_of_the_character_database_are_in_their_block(name: str, word: str):
    letters = [p for p in range(0x1F000) if unicodedata.name(chr(p), "").startswith((word + " ", word + "-"))]
    inside = script_ids(np.array(letters)) == NUMBER[name]
    strays = [p for p, ok in zip(letters, inside.tolist(), strict=True) if not ok]
    # Arabic Extended-B and -C, the paper leaves out; phonetic letters, ancient numbers and the like have other blocks.
    assert len(letters) > 20 and all(p in range(0x870, 0x8A0) or p >= 0x10000 or 0x1D00 <= p < 0x1DC0 or p == 0xAB65
                                     for p in strays), list(map(hex, strays))  # fmt: skip


def test_white_space_is_neutral():
    spaces = [p for p in range(0x3001) if chr(p).isspace() and p not in range(0x1C, 0x20)]
    assert (script_ids(np.array(spaces)) == NEUTRAL).all()


def test_bytes_of_a_byte_level_tokenizer_spell_the_text():
    tokenizer = tiny_lm.tokenizer()
    text = "Hello, كتاب 漢字!\n"
    table = TokenBytes.of(tokenizer)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert b"".join(table[i] for i in ids) == text.encode()
    assert table.spell(ids)[0].tobytes() == text.encode()
    assert table[tokenizer.bos_token_id] == b"" and len(table) == len(tokenizer)


def test_bytes_of_a_sentencepiece_vocabulary():
    class Tokenizer:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 5

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [["<s>", "▁the", "<0xD9>", "<0x83>", "##s"][i] for i in ids]

        def get_added_vocab(self) -> dict[str, int]:
            return {"<s>": 0}

    table = TokenBytes.of(Tokenizer())
    assert [table[i] for i in range(5)] == [b"", b" the", b"\xd9", b"\x83", b"s"]
    assert Spelling.of(np.array([1, 2, 3]), np.zeros(3, dtype=np.int64), table).scripts.tolist()[1:] == [0, 0]


def test_groups_for_a_reader_break_at_characters_only():
    pieces = [b"a", "ك".encode()[:1], "ك".encode()[1:], b"b", "漢".encode()[:2]]
    text = spelling(*pieces)
    assert text.characters_of(0, 5) == [("a", 0, 1), ("ك", 1, 3), ("b", 3, 4), ("\ufffd", 4, 5)]
    assert text.characters_of(2, 4) == [("\ufffd", 2, 3), ("b", 3, 4)]


def test_readable_puts_a_character_where_it_is_complete():
    han, arabic_letter = "漢".encode(), "ك".encode()
    assert readable([b"a", arabic_letter[:1], arabic_letter[1:], b"b"]) == ["a", "‹D9›", "ك", "b"]
    assert readable([han[:1], han[1:2], han[2:]]) == ["‹E6›", "‹BC›", "漢"]
    assert readable([han[:2], han[2:] + arabic_letter[:1], arabic_letter[1:]]) == ["‹E6›‹BC›", "漢", "ك"]
    assert readable([b"\xff", b"ok"]) == ["‹FF›", "ok"]
    assert readable([han[:2], b"a\xe6", b"b"]) == ["‹E6›‹BC›", "a‹E6›", "b"]
    assert readable([b"\xed\xa0\x80"]) == ["‹ED›‹A0›‹80›"]  # a surrogate is no character
    assert readable([han[:1]]) == ["‹E6›"] and readable([]) == []


def test_ids_of_another_vocabulary_are_refused():
    with pytest.raises(FastSAEError, match="token ids below 256, got 300.*own tokenizer"):
        Spelling.of(np.array([300]), np.zeros(1, dtype=np.int64), BYTES)


def test_empty_text():
    text = Spelling.of(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), BYTES)
    assert len(text) == 0 and len(text.scripts) == 0
