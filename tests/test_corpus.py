import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from fastsae import corpus
from fastsae.errors import FastSAEError


def test_builtin_is_the_text_that_sources_md_describes():
    documents = corpus.builtin()
    assert len(documents) > 4500 and sum(len(d.text) for d in documents) > 11_000_000
    assert all(d.id == corpus.document(d.text).id for d in documents[::97])  # the id is the hash of the text
    kinds = {d.kind for d in documents}
    assert {"Arabic", "Hebrew", "Cyrillic", "Han", "Kana", "b64", "dna", "code", "gutenberg"} <= kinds


def test_heldout_documents_are_fixed_disjoint_and_of_every_rare_kind():
    train, heldout = corpus.builtin("train"), corpus.builtin("heldout")
    assert not {d.id for d in train} & {d.id for d in heldout}
    assert len(train) + len(heldout) == len(corpus.builtin())
    assert {"Arabic", "Hebrew", "Cyrillic", "Han", "Kana", "b64", "dna"} <= {d.kind for d in heldout}
    assert 0.1 < len(heldout) / len(train) < 0.2


def test_text_files_jsonl_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n" * 60, encoding="utf-8")
    rows = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(5))
    (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"body": "other field"}) + "\n")
    assert len(corpus.load(str(tmp_path / "a.txt"))) == 3  # 121 blocks, 50 a document
    assert [d.text for d in corpus.load(str(tmp_path / "b.jsonl"))] == [f"document {i}" for i in range(5)]
    assert corpus.load(str(tmp_path / "c.jsonl.gz"), text_field="body")[0].text == "other field"
    (tmp_path / "c.jsonl.gz").unlink()
    assert len(corpus.load(str(tmp_path))) == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found none"),
        (b" \n\n ", "found none"),
        ("caf\xe9".encode("latin1"), "not UTF-8"),
    ],
)
def test_bad_text_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(FastSAEError, match=message):
        corpus.load(str(path))


def test_bad_jsonl_names_the_line_and_what_came(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n{"body": "x"}\n', encoding="utf-8")
    with pytest.raises(FastSAEError, match="line 2.*'text', got body"):
        corpus.load(str(path))
    path.write_text("not json\n", encoding="utf-8")
    with pytest.raises(FastSAEError, match="line 1: not JSON"):
        corpus.load(str(path))


def test_missing_text_and_empty_split(tmp_path):
    with pytest.raises(FastSAEError, match="no text at"):
        corpus.load(str(tmp_path / "absent"))
    with pytest.raises(FastSAEError, match="expected text files in the folder"):
        corpus.load(str(tmp_path))
    (tmp_path / "one.txt").write_text("a single short document", encoding="utf-8")
    absent = "train" if corpus.load(str(tmp_path))[0].heldout else "heldout"
    with pytest.raises(FastSAEError, match=f"none of them in the {absent} split"):
        corpus.load(str(tmp_path), split=absent)


def test_separators_that_json_allows_inside_a_string_do_not_end_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028two", "three\u0085four\u2029five"]
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts), encoding="utf-8")
    assert [d.text for d in corpus.load(str(path))] == texts


def test_a_cut_off_gz_is_said(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some text " * 100)[:-20])
    with pytest.raises(FastSAEError, match="cannot be unpacked"):
        corpus.load(str(path))


def test_a_dataset_is_streamed_up_to_a_limit_and_errors_are_one_line(monkeypatch):
    read = []

    def load_dataset(name, *config, split, streaming):
        assert streaming
        if name == "no/config":
            raise ValueError("Config name is missing.\nPick one.")
        read.append((name, config, split))
        return ({"text": f"document {n}", "n": n} for n in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(corpus, "HF_CHARACTERS", 200)
    assert 10 < len(corpus.load("hf:some/set")) < 30
    for name in ("hf:some/set:validation", "hf:some/set:small:test"):
        assert corpus.load(name)
    assert read == [("some/set", (), "train"), ("some/set", (), "validation"), ("some/set", ("small",), "test")]
    with pytest.raises(FastSAEError, match="no text in a field 'n'; it has text, n"):
        corpus.load("hf:some/set", text_field="n")
    with pytest.raises(FastSAEError, match="no/config cannot be read: Config name is missing.; expected NAME"):
        corpus.load("hf:no/config")
