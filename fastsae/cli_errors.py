"""What the command line says of a command that cannot be meant, and how to go on with one that was stopped."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_KINDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text", "PATH": "a path"}
_MANY = {"INT": "whole numbers", "FLOAT": "numbers", "STR": "texts", "PATH": "paths"}
_START_OVER = ("automata",)  # writes into a folder, but begins anew in it


def again(argv: Sequence[str], verbs: Mapping[str, Callable[..., Any]]) -> str:
    """How to go on with a verb that was stopped: by --resume if it has that option, by the same command if it writes
    into a folder of its own."""
    verb = verbs.get(argv[0]) if argv else None
    options = inspect.signature(verb).parameters if verb is not None else {}
    if "resume" in options:
        return "the same command with --resume goes on from here"
    if "out" in options and options["out"].default is inspect.Parameter.empty and argv[0] not in _START_OVER:
        return "the same command goes on from here"
    return "the same command starts over"


def one_line(box: str, argv: Sequence[str], verbs: Sequence[str]) -> str:
    """What tyro prints in a box of many lines as one: the option, what it takes, what came, and where to look."""
    sections = _sections(box)
    first = " ".join(line.strip() for line in sections[0]) if sections else ""
    if argv and argv[0] not in verbs and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], verbs, n=1)
        meant = f"did you mean {near[0]}" if near else f"there are {', '.join(verbs)}"
        return f"there is no verb {argv[0]!r}; {meant}; see fastsae --help"
    verb = argv[0] if argv and argv[0] in verbs else ""
    said = _value(first, sections) or _choice(first) or _missing(first, sections) or _unknown(sections, verb) or first
    return f"{said}; see fastsae {verb} --help".replace("  ", " ")


def _sections(box: str) -> list[list[str]]:
    """The lines between the rules, without title and frame; their indentation stays. Where output is not UTF-8, tyro
    draws no frame, and a rule below the title."""
    found: list[list[str]] = [[]]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    framed = any(line.startswith("│") for line in lines)
    for line in lines if framed else lines[2:]:
        if framed and not line.startswith("│"):
            continue
        text = line.strip("│").rstrip()[1 if framed else 2 :]
        if len(text) > 1 and not text.strip("─-"):
            found.append([])
        elif text:
            found[-1].append(text)
    return [section for section in found if section]


def _value(first: str, sections: list[list[str]]) -> str | None:
    match = re.match(r"Error parsing (\S+): (.*)", first)
    if match is None:
        return None
    option, message = match[1], match[2]
    usage = next((line.strip() for part in sections[1:] for line in part if line.strip().startswith(option)), "")
    got = re.search(r"from \[(.*?)\]\.|arguments: \[(.*?)\]$|(?:base 10|to float): (.*)$", message)
    if not usage or got is None:
        return f"{option}: {message}"
    came = next(group for group in got.groups() if group is not None)
    words = [one or other for one, other in re.findall(r"'([^']*)'|\"([^\"]*)\"", came)]
    return f"{option} takes {_kind(usage.removeprefix(option).strip())}, got {' '.join(words)!r}"


def _kind(metavar: str) -> str:
    """A metavar in words: INT, {None}|FLOAT, [INT [INT ...]], INT INT; others as they are."""
    names = re.findall(r"[A-Z]{3,}", metavar)
    if len(set(names)) != 1 or names[0] not in _KINDS:
        return metavar
    kind = _KINDS[names[0]] if len(names) == 1 and "[" not in metavar else _MANY[names[0]]
    return kind + (" or None" if "{None}" in metavar else "")


def _choice(first: str) -> str | None:
    match = re.match(r"invalid choice '(.*)' for argument '(.*?)'\. Expected one of \((.*)\)", first)
    if match is None:
        return None
    choices = re.findall(r"'([^']*)'", match[3])
    return f"{match[2]} must be one of {', '.join(choices)}, got {match[1]!r}"


def _missing(first: str, sections: list[list[str]]) -> str | None:
    value = re.match(r"Missing value for argument '(.*?)'", first)
    if value is not None:
        return f"{value[1]} needs a value"
    whole = re.match(r"Missing from (fastsae[\w ]*):", first)
    if whole is None:
        return None
    # Its options stand four places in, "-o PATH, --out PATH"; what they are for is further in.
    needed = [(re.findall(r"--[\w-]+", line) or line.split())[0] for line in sections[0] if re.match(r" {4}\S", line)]
    unknown = _unknown(sections[1:], whole[1].rpartition(" ")[2])
    verb = whole[1].rpartition(" ")[2]
    return f"{verb} needs {_listed(needed)}" + (f", and {unknown}" if unknown else "")


def _unknown(sections: list[list[str]], verb: str) -> str | None:
    """Words that the verb has no use for, with the options that tyro finds similar."""
    part = next((part for part in sections if part[0].startswith("Unrecognized")), None)
    if part is None:
        return None
    words = re.sub(r"\(applied to [^)]*\)", "", " ".join(part).partition(":")[2].partition("Arguments are")[0])
    tokens = [word.strip(",") for word in words.split()]
    options = [word for word in tokens if word.startswith("-")]
    if not options:
        return f"{verb} has no use for {_listed([repr(word) for word in tokens])}"
    here: list[str] = []
    elsewhere: list[str] = []
    near = ""
    for line in (line.strip() for part in sections for line in part):
        if line.startswith("--"):
            near = line.replace(",", " ").split()[0]
        elif near and (of := re.match(r"in fastsae (\w+) --help", line)):
            if of[1] == verb:
                here.append(near)
            elif near in options:
                elsewhere.append(f"fastsae {of[1]}")
    said = f"there is no option {_listed(options, 'or')}"
    if here:
        return f"{said}, did you mean {_listed(list(dict.fromkeys(here)), 'or')}"
    return f"{said} here, but in {_listed(list(dict.fromkeys(elsewhere)))}" if elsewhere else said


def _listed(words: Sequence[str], joint: str = "and") -> str:
    return f" {joint} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
