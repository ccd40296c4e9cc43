"""Text to train on: the built-in corpus, and readers for your own files. A document is never split over sets.

The built-in corpus (11.5M characters, sources and licences in `fastsae/data/SOURCES.md`) is mostly English, European
languages and code, with many kinds of text that are rare on purpose (each script 0.3–1 % of the tokens).
"""

import hashlib
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from fastsae.errors import FastSAEError

Split = Literal["train", "heldout", "all"]
HF_CHARACTERS = 400_000_000  # read of a streamed dataset
HELDOUT_ONE_IN = 6  # one document in six is held out, picked by its hash


@dataclass(frozen=True)
class Document:
    """One text. `id` is 16 hex digits of the SHA-256 of the text, `kind` the quota it was chosen for ("" if none)."""

    id: str
    text: str
    source: str = ""
    kind: str = ""
    lang: str = ""

    @property
    def heldout(self) -> bool:
        """Whether this document belongs to the held-out set: a function of its text alone."""
        return int(self.id, 16) % HELDOUT_ONE_IN == 0


def document(text: str, source: str = "") -> Document:
    """A Document of any text, with its hash as id."""
    return Document(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16], text, source)


def split_of(documents: Iterable[Document], split: Split) -> list[Document]:
    """The documents of one split ("train", "heldout") or all of them."""
    if split not in ("train", "heldout", "all"):
        raise FastSAEError(f"split must be 'train', 'heldout' or 'all', got {split!r}")
    return [d for d in documents if split == "all" or d.heldout == (split == "heldout")]


def builtin(split: Split = "all") -> list[Document]:
    """The built-in corpus: about 4,900 documents, 11.5M characters.

    Ordered by hash, so that any part of it is a fair sample of the whole.
    """
    blob = resources.files("fastsae").joinpath("data/builtin.jsonl.xz").read_bytes()
    rows = (json.loads(line) for line in lzma.decompress(blob).decode("utf-8").split("\n") if line)
    return split_of(sorted((Document(**row) for row in rows), key=lambda document: document.id), split)


def load(source: str = "builtin", split: Split = "all", text_field: str = "text") -> list[Document]:
    """Documents from a name: "builtin", a .txt/.md/any text file, a .jsonl(.gz) file, a folder of those, or "hf:NAME".

    A text file is cut into documents at lines that hold nothing but a form feed or at every 50 blank-line-separated
    blocks; a JSONL file has one document a line in `text_field`. "hf:NAME[:CONFIG][:SPLIT]" reads a Hugging Face
    dataset (split train unless given) as a stream, up to `HF_CHARACTERS` characters, which fit into memory.
    Raises FastSAEError for a missing or empty source, text that is not UTF-8, or rows without the field.
    """
    if source == "builtin":
        return builtin(split)
    if source.startswith("hf:"):
        documents = list(_huggingface(source[3:], text_field))
    else:
        documents = [d for path in _files(Path(source)) for d in _read(path, text_field)]
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise FastSAEError(f"expected text in {source!r}, found none; give a file, a folder or 'builtin'")
    chosen = split_of(documents, split)
    if not chosen:
        raise FastSAEError(
            f"{source!r} has {len(documents)} document(s), none of them in the {split} split; "
            f"one in {HELDOUT_ONE_IN} is held out by hash: give more, or shorter, documents"
        )
    return chosen


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        if files:
            return files
        raise FastSAEError(f"expected text files in the folder {path}, found none")
    raise FastSAEError(f"no text at {path}: give 'builtin', a text file, a .jsonl file, a folder or 'hf:NAME'")


def _decode(blob: bytes, path: Path) -> str:
    try:
        return blob.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastSAEError(
            f"{path} is not UTF-8 (byte {error.start}: 0x{blob[error.start]:02x}); "
            f"convert it first, for example: iconv -f latin1 -t utf-8"
        ) from None


def _read(path: Path, text_field: str) -> Iterator[Document]:
    blob = path.read_bytes()
    name = path.name
    if name.endswith(".gz"):
        import gzip

        try:
            blob, name = gzip.decompress(blob), name[:-3]
        except (EOFError, OSError, zlib.error) as error:
            raise FastSAEError(f"{path} cannot be unpacked ({error}); is it complete?") from None
    text = _decode(blob, path)
    if not name.endswith((".jsonl", ".ndjson")):
        yield from (document(part, path.name) for part in _blocks(text))
        return
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 and its kind may stand inside a line
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FastSAEError(f"{path}, line {number}: not JSON ({error.msg}); expected one object a line") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise FastSAEError(f"{path}, line {number}: expected text in field {text_field!r}, got {fields}")
        yield document(row[text_field], path.name)


def _blocks(text: str, paragraphs: int = 50) -> Iterator[str]:
    for chapter in text.split("\f"):
        parts = chapter.split("\n\n")
        for start in range(0, len(parts), paragraphs):
            yield "\n\n".join(parts[start : start + paragraphs])


def _huggingface(name: str, text_field: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise FastSAEError("reading a Hugging Face dataset needs `datasets`: pip install 'fastsae[all]'") from None
    name, *rest = name.split(":")
    part = rest[-1] if rest else "train"
    try:
        rows = load_dataset(name, *rest[:-1][:1], split=part, streaming=True)
        read = 0
        for row in rows:
            if not isinstance(row.get(text_field), str):
                raise FastSAEError(f"dataset {name} has no text in a field {text_field!r}; it has {', '.join(row)}")
            yield document(row[text_field], name)
            read += len(row[text_field])
            if read > HF_CHARACTERS:
                return
    except FastSAEError:
        raise
    except Exception as error:  # of the network, the hub and a dozen formats
        reason = (str(error) or repr(error)).splitlines()[0]
        raise FastSAEError(
            f"dataset {':'.join([name, *rest])} cannot be read: {reason}; expected NAME[:CONFIG][:SPLIT]"
        ) from None
