"""What a language model is asked, and how its answers are read: exactly as asked for, or not at all.

Answers are data. They are matched against a fixed form; nothing in them is run, and nothing missing is made up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np

from fastsae.analysis.examples import Evidence
from fastsae.analysis.explain.protocol import Window
from fastsae.analysis.labels import TokenBytes, readable
from fastsae.visible import visible

Messages = list[dict[str, str]]

_ABOUT = (
    "We study features inside a language model. A feature is on at some tokens of a text and silent at the others. How "
    "strongly it is on is given from 0 (silent) to 9 (strongest). Tokens are pieces of words in quotation marks, with "
    "the spaces that belong to them; ‹D8› stands for a byte that is part of a character."
)
_EXPLAIN = (
    "Say in one short sentence what the feature responds to: which tokens, in which contexts. Name what the strong "
    "activations have in common and the silent tokens have not. Answer with that sentence alone, on one line."
)
_PREDICT = (
    "For each numbered excerpt predict how strongly the feature is on at each of its tokens, from 0 to 9. Most tokens "
    "are 0. Answer with one line for each excerpt: its number, a colon, and its tokens as they stand there, each "
    'followed by its digit, such as\n1: " a" 0, " cup" 7, "," 0\nWrite nothing else.'
)
_DETECT = (
    "For each numbered excerpt say whether the feature is on at any of its tokens. Answer with one line for each "
    "excerpt: its number, a colon, and yes or no, such as\n1: no\nWrite nothing else."
)
_FUZZ = (
    "In each numbered excerpt some tokens are marked «so». Say whether these are the tokens at which the feature is "
    "on. Answer with one line for each excerpt: its number, a colon, and yes or no, such as\n1: no\nWrite nothing else."
)
# One question with its answer goes before the real one: small models keep to a form that they have seen.
_SHOWN = [["my", " cup", " of", " tea", "."], ["a", " green", " hill"]]
_MARKED = [["my", " cup", " of", "« tea»", "."], ["a", "« green»", " hill"]]
_ANSWERS = {
    _PREDICT: '1: "my" 0, " cup" 0, " of" 0, " tea" 8, "." 0\n2: "a" 0, " green" 0, " hill" 0',
    _DETECT: "1: yes\n2: no",
    _FUZZ: "1: yes\n2: no",
}
LONGEST = 600  # characters of an explanation


def tokens_of(window: Window, bytes_of: TokenBytes) -> list[str]:
    """Each token in quotation marks, on one line."""
    return [json.dumps(text, ensure_ascii=False) for text in readable([bytes_of[int(i)] for i in window.token_ids])]


def explain(evidence: Evidence, shown: Sequence[Window], bytes_of: TokenBytes) -> Messages:
    """The question for an explanation: the windows with their levels, and the logits."""
    lines = ["Excerpts, each token followed by the feature's activation:"]
    for number, window in enumerate(shown, 1):
        pairs = zip(tokens_of(window, bytes_of), window.levels.tolist(), strict=True)
        lines.append(f"{number}: " + ", ".join(f"{token} {level}" for token, level in pairs))
    for title, tokens in (("likelier", evidence.top_logits), ("less likely", evidence.bottom_logits)):
        if tokens:
            listed = ", ".join(json.dumps(token, ensure_ascii=False) for token in tokens)
            lines.append(f"Where it is on, these next tokens become {title}: {listed}")
    return _asked(f"{_ABOUT}\n\n{_EXPLAIN}", "\n".join(lines))


def predict(text: str, windows: Sequence[Window], bytes_of: TokenBytes) -> Messages:
    """The question for levels of each window."""
    return _with_example(_PREDICT, text, [tokens_of(window, bytes_of) for window in windows])


def judge(text: str, windows: Sequence[Window], marks: Sequence[np.ndarray] | None, bytes_of: TokenBytes) -> Messages:
    """The question of yes or no: is the feature on somewhere (marks None), or where marked."""
    shown = [tokens_of(window, bytes_of) for window in windows]
    if marks is not None:
        shown = [
            [f"«{token}»" if marked else token for token, marked in zip(tokens, mark.tolist(), strict=True)]
            for tokens, mark in zip(shown, marks, strict=True)
        ]
    return _with_example(_DETECT if marks is None else _FUZZ, text, shown)


def again(messages: Messages, answer: str, wanted: str) -> Messages:
    """The question once more, after an answer that had not the form asked for. A server may ignore the temperature
    and the seed; so asked, it cannot give the same answer from the same words."""
    complaint = f"That is not in the form asked for: answer with {wanted}, and nothing else."
    return [*messages, {"role": "assistant", "content": answer[:LONGEST]}, {"role": "user", "content": complaint}]


def without_system(messages: Messages) -> Messages:
    """The same for a model whose template has no system role: that text begins the first message of the user."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, first, *others = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]


def _with_example(question: str, text: str, shown: list[list[str]]) -> Messages:
    example = [[json.dumps(token) for token in tokens] for tokens in _SHOWN]
    if question == _FUZZ:
        example = [
            [f"«{json.dumps(token[1:-1])}»" if token[0] == "«" else json.dumps(token) for token in tokens]
            for tokens in _MARKED
        ]
    system, first = _asked(f"{_ABOUT}\n\n{question}", _excerpts("the word “tea”", example))
    return [
        system,
        first,
        {"role": "assistant", "content": _ANSWERS[question]},
        {"role": "user", "content": _excerpts(text, shown)},
    ]


def _asked(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _excerpts(text: str, shown: list[list[str]]) -> str:
    lines = [f"The feature responds to: {text}", "", "Excerpts:"]
    return "\n".join([*lines, *(f"{number}: " + ", ".join(tokens) for number, tokens in enumerate(shown, 1))])


# --- reading answers: None where the answer has not the form asked for ---------------------------------------------


def _spoken(answer: str) -> str:
    """Without what a reasoning model thinks aloud first."""
    return answer.rpartition("</think>")[2] if "</think>" in answer else answer


def read_explanation(answer: str, complete: bool) -> str | None:
    """The first line that says something, controls in it as their pictures. complete: False if the answer was cut off
    at its limit of tokens."""
    lines = [line.strip() for line in _spoken(answer).strip().splitlines() if line.strip()]
    if not lines or "<think>" in lines[0] or (not complete and len(lines) == 1):
        return None
    text = re.sub(r"^(\*\*)?(explanation|answer)(\*\*)?\s*:\s*(\*\*)?\s*", "", lines[0], flags=re.IGNORECASE).strip()
    return visible(text) if 3 <= len(text) <= LONGEST and any(char.isalpha() for char in text) else None


def _numbered(answer: str, n: int) -> list[str] | None:
    """What stands behind "1:" … "n:", each on its line and once."""
    found: dict[int, str] = {}
    for line in _spoken(answer).splitlines():
        match = re.match(r"\s*(\d{1,6})\s*[:.)]\s*(.*?)\s*$", line)
        if match is None:
            continue
        number = int(match[1])
        if number in found or not 1 <= number <= n:
            return None
        found[number] = match[2]
    return [found[k] for k in range(1, n + 1)] if len(found) == n else None


def read_levels(answer: str, shown: Sequence[Sequence[str]]) -> list[np.ndarray] | None:
    """Of each window its levels, int64. shown: its tokens as they stood in the question. They are asked for again so
    that a digit cannot slip to another token: models count badly."""
    lines = _numbered(answer, len(shown))
    if lines is None:
        return None
    levels = [_digits(line, tokens) for line, tokens in zip(lines, shown, strict=True)]
    return [np.array(digits, dtype=np.int64) for digits in levels if digits is not None] if None not in levels else None


def _digits(line: str, tokens: Sequence[str]) -> list[int] | None:
    """The digit behind each of the tokens, which must all stand there in their order; spaces in them may differ."""
    digits: list[int] = []
    for token in tokens:
        try:
            said, end = json.JSONDecoder().raw_decode(line)
        except ValueError:
            return None
        digit = re.match(r"\s*([0-9])(\s*,\s*|\s*$)", line[end:])
        if not isinstance(said, str) or said.strip() != json.loads(token).strip() or digit is None:
            return None
        digits.append(int(digit[1]))
        line = line[end + digit.end() :]
    return digits if not line.strip() else None


def read_verdicts(answer: str, n: int) -> list[bool] | None:
    """Of each window, yes or no."""
    lines = _numbered(answer, n)
    if lines is None:
        return None
    words = [line.rstrip(".").strip("*").casefold() for line in lines]
    return [word == "yes" for word in words] if all(word in ("yes", "no") for word in words) else None
