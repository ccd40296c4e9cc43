"""Builds the text that ships with fastsae: `python fastsae/data/build.py FOLDER` → builtin.jsonl.xz beside this file.

FOLDER holds one `NAME.jsonl.gz` per source (see SOURCES.md), one document a line {"source", "lang", "text"}.
The mix is a Pile in miniature: mostly English prose, European languages and code, and many *rare* kinds of text, each
well below 1 % of the tokens. Rarity is the point: a kind of text that is common gets a neuron of its own in a small
model, and then there is nothing for a dictionary to untangle.
"""

import gzip
import hashlib
import json
import lzma
import re
import sys
from collections import defaultdict
from pathlib import Path

# Characters per kind of text. The first block is the bulk; the others are rare on purpose.
BULK = {"gutenberg": 3_600_000, "sotu": 1_800_000, "code": 1_700_000, "handbook": 1_500_000, "gnome": 1_000_000,
        "udhr": 700_000, "rawhtml": 400_000}  # fmt: skip
RARE = {"Arabic": 60_000, "Hebrew": 48_000, "Cyrillic": 56_000, "Greek": 52_000, "Han": 18_000, "Kana": 44_000,
        "Hangul": 28_000, "Devanagari": 48_000, "Thai": 18_000, "b64": 52_000, "dna": 80_000}  # fmt: skip
OTHER_SCRIPT = 6_000  # characters of every further script that the Universal Declaration is written in
SCRIPTS = {
    "Arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "Hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Kana": "\u3040-\u30ff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7af",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
_SCRIPT = {name: re.compile(f"[{chars}]") for name, chars in SCRIPTS.items()}
_NOT_LATIN = re.compile("[^\u0000-\u024f\u0300-\u036f\u1e00-\u1eff\u2000-\u2fff]")


def kind_of(source: str, lang: str, text: str) -> str:
    """The quota that a document counts against: its script where that is not Latin, else its source."""
    if source in ("b64", "dna"):
        return source
    foreign = _NOT_LATIN.findall(text)
    if len(foreign) < 0.2 * len(text):
        return source
    share = {name: len(pattern.findall(text)) / len(foreign) for name, pattern in _SCRIPT.items()}
    if share["Kana"] > 0.3:  # Japanese mixes in as many Han characters
        return "Kana"
    best = max(share, key=lambda name: share[name])
    return best if share[best] > 0.5 else f"other:{lang}"


def pieces(text: str, size: int) -> list[str]:
    """text cut at line ends into parts of about `size` characters, so that a rare kind has many documents."""
    parts, current = [], ""
    for line in text.splitlines(keepends=True):
        if current and len(current) + len(line) > size:
            parts.append(current)
            current = ""
        current += line
        while len(current) > 2 * size:
            parts.append(current[:size])
            current = current[size:]
    return [part.strip() for part in [*parts, current] if len(part.strip()) >= 40]


def quota_of(kind: str) -> int:
    return BULK.get(kind) or RARE.get(kind) or OTHER_SCRIPT


def build(folder: Path) -> list[dict]:
    """Documents {"id", "source", "kind", "lang", "text"}, chosen in the order of a hash of their text."""
    found = defaultdict(list)  # kind → documents
    for path in sorted(folder.glob("*.jsonl.gz")):
        for line in gzip.open(path, "rt", encoding="utf-8"):
            row = json.loads(line)
            kind = kind_of(row["source"], row["lang"], row["text"])
            if kind == "metamath":  # its compressed proofs look like base64 to any proxy
                continue
            for text in pieces(row["text"], 4000 if kind in BULK else 900):
                digest = hashlib.sha256(text.encode()).hexdigest()[:16]
                found[kind].append(
                    {"id": digest, "source": row["source"], "kind": kind, "lang": row["lang"], "text": text}
                )
    chosen = []
    for kind, documents in sorted(found.items()):
        left = quota_of(kind)
        for document in sorted(documents, key=lambda d: d["id"]):
            if left <= 0:
                break
            chosen.append(document)
            left -= len(document["text"])
    return sorted({d["id"]: d for d in chosen}.values(), key=lambda d: (d["kind"], d["id"]))


if __name__ == "__main__":
    documents = build(Path(sys.argv[1]))
    out = Path(__file__).with_name("builtin.jsonl.xz")
    with lzma.open(out, "wt", preset=9, encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    sizes = defaultdict(int)
    for document in documents:
        sizes[document["kind"]] += len(document["text"])
    for kind, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{kind:12} {size:9,} characters")
    print(f"{len(documents)} documents, {sum(sizes.values()):,} characters, {out.stat().st_size / 1e6:.1f} MB in {out}")
