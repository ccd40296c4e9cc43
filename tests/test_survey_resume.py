"""Passes that stop and go on, and parts that are put together: the same survey, or one clear line."""

import copy
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsae
from fastsae.analysis import Cards, Read, Source, Survey, read_store, survey_of_store, take_survey
from fastsae.analysis.checkpoint import Checkpoint
from fastsae.errors import FastSAEError
from tests import analysis_case

OPTIONS: dict[str, Any] = {
    "categories": ("Arabic", "tokens:a"), "context": 32, "batch_size": 4, "around": 3, "top": 3, "bottom": 2,
    "per_interval": 2, "windows": 40, "show_progress": False,
}  # fmt: skip


class Watching:
    """How many tokens of each id were read."""

    def __init__(self) -> None:
        self.counts, self.reads = np.zeros(300), 0

    def add(self, some: Read) -> None:
        self.reads += 1
        np.add.at(self.counts, some.token_ids.numpy(), 1)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        self.counts = arrays["counts"]


@pytest.fixture(scope="module")
def case():
    sae, model, tokenizer = analysis_case.case()
    return Source(sae.eval(), model, analysis_case.HOOK), tokenizer, analysis_case.documents()


@pytest.fixture(scope="module")
def whole(case) -> Survey:
    return take_survey(*case, **OPTIONS)[0]


@pytest.fixture
def store(case, tmp_path):
    return harvested(case, tmp_path / "store", case[2])


def harvested(case, folder: Path, documents: list[str], **options: Any):
    source, tokenizer, _ = case
    options = {"packing": "cut", "context": 32} | options
    return fastsae.harvest(source.model, tokenizer, documents, source.hook, folder, show_progress=False, **options)


def identical(a: Survey, b: Survey) -> None:
    left, right = a.arrays(), b.arrays()
    assert left.keys() == right.keys() and a.of == b.of and a.parts == b.parts
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def stopping_at(monkeypatch, number: int) -> None:
    """Ctrl-C in the middle of a batch."""
    add, calls = Survey.add, []

    def stops(self, *args) -> None:
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        add(self, *args)

    monkeypatch.setattr(Survey, "add", stops)


def test_a_pass_that_goes_on_is_bit_for_bit_an_undisturbed_one(case, whole, tmp_path, monkeypatch, capsys) -> None:
    stopping_at(monkeypatch, 5)
    watching = Watching()
    with pytest.raises(KeyboardInterrupt):  # at once, long before a minute is over
        take_survey(*case, out=tmp_path, also={"ids": watching}, **OPTIONS)
    assert watching.reads == 5  # the batch that Ctrl-C came into is done whole
    with pytest.raises(FastSAEError, match="unfinished pass: resume it"):
        take_survey(*case, out=tmp_path, also={"ids": Watching()}, **OPTIONS)
    with pytest.raises(FastSAEError, match="its also is"):
        take_survey(*case, out=tmp_path, resume=True, **OPTIONS)
    watching = Watching()
    (found,) = take_survey(*case, out=tmp_path, resume=True, also={"ids": watching}, **OPTIONS)
    assert watching.reads == whole.batches - 5
    identical(found, whole)
    identical(Survey.load(tmp_path / "survey-0.npz"), whole)
    everything = Watching()
    take_survey(*case, also={"ids": everything}, **OPTIONS)
    np.testing.assert_array_equal(watching.counts, everything.counts)
    assert watching.counts.sum() == Cards(whole).tokens()
    # And a finished one is taken as it is, with what was beside it.
    again = Watching()
    identical(take_survey(*case, out=tmp_path, resume=True, also={"ids": again}, **OPTIONS)[0], whole)
    assert again.reads == 0 and (again.counts == everything.counts).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["also.npz", "survey-0.npz"]


def test_the_bar_goes_on_where_the_pass_does(case, tmp_path, monkeypatch) -> None:
    from contextlib import contextmanager

    from fastsae.analysis import passes

    began, real = [], passes.progress

    @contextmanager
    def seen(title, total, unit, done, show):
        began.append((total, done))
        with real(title, total, unit, done, show) as meter:
            yield meter

    monkeypatch.setattr(passes, "progress", seen)
    stopping_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        take_survey(*case, out=tmp_path, **OPTIONS)
    (found,) = take_survey(*case, out=tmp_path, resume=True, **OPTIONS)
    total = Cards(found).tokens()
    assert began[0] == (total, 0) and began[1][0] == total and 0 < began[1][1] < total


def test_another_pass_is_not_gone_on_with(case, tmp_path, monkeypatch) -> None:
    source, tokenizer, texts = case
    stopping_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        take_survey(*case, out=tmp_path, world=2, **OPTIONS)

    def refused(match: str, source: Source = source, texts: list[str] = texts, **options: Any) -> None:
        with pytest.raises(FastSAEError, match=match):
            options = OPTIONS | {"world": 2, "out": tmp_path, "resume": True} | options
            take_survey(source, tokenizer, texts, **options)

    other = analysis_case.case(seed=1)[0].eval()
    model = copy.deepcopy(source.model)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.01)

    def all_refused() -> None:
        refused("rank", rank=1)
        refused("dictionary", source._replace(sae=other))
        refused("model", source._replace(model=model))
        refused("hook", source._replace(hook="transformer.h.0.mlp.c_fc"))
        refused("documents", texts=texts[::-1])
        refused("watch would miss", watch=lambda some: None)

    all_refused()
    take_survey(*case, out=tmp_path, resume=True, world=2, **OPTIONS)
    all_refused()  # the finished one neither


def test_surveys_of_one_folder_are_those_of_one_pass(case, tmp_path) -> None:
    source, tokenizer, texts = case
    take_survey(source, tokenizer, texts, out=tmp_path, **OPTIONS)
    with pytest.raises(FastSAEError, match=r"made no survey-1.npz"):
        take_survey([source, source], tokenizer, texts, out=tmp_path, resume=True, **OPTIONS)
    with pytest.raises(FastSAEError, match=r"made no also.npz"):
        take_survey(source, tokenizer, texts, out=tmp_path, resume=True, also={"x": Watching()}, **OPTIONS)


def test_several_dictionaries_go_on_together(case, tmp_path, monkeypatch) -> None:
    source, tokenizer, texts = case
    sources = [source, source._replace(sae=analysis_case.case(seed=3)[0].eval())]
    wanted = take_survey(sources, tokenizer, texts, **OPTIONS)
    stopping_at(monkeypatch, 4)  # in the second survey's batch
    with pytest.raises(KeyboardInterrupt):
        take_survey(sources, tokenizer, texts, out=tmp_path, **OPTIONS)
    for found, want in zip(take_survey(sources, tokenizer, texts, out=tmp_path, resume=True, **OPTIONS), wanted,
                           strict=True):  # fmt: skip
        identical(found, want)


def test_what_was_added_is_not_added_again(case, whole) -> None:
    source, tokenizer, texts = case

    def part(rank: int, world: int, source: Source = source, texts: list[str] = texts) -> Survey:
        return take_survey(source, tokenizer, texts, rank=rank, world=world, **OPTIONS)[0]

    one = part(0, 2)
    for other, match in (
        (part(0, 2), "rank 0 of 2 has been added already"),
        (part(1, 3), "read by 3 there, 2 here"),
        (whole, "read by 1 there, 2 here"),
        (part(1, 2, source._replace(sae=analysis_case.case(seed=1)[0].eval())), "dictionary is"),
        (part(1, 2, texts=texts[::-1]), "text and settings: documents is"),
    ):
        before = one.arrays()["sums.tokens"].copy()
        with pytest.raises(FastSAEError, match=match):
            one.merge(other)
        np.testing.assert_array_equal(one.sums["tokens"], before)
    one.merge(part(1, 2))
    assert Cards(one).tokens() == Cards(whole).tokens() and [p[:2] for p in one.parts] == [(0, 2), (1, 2)]
    with pytest.raises(FastSAEError, match="rank 1 of 2 has been added"):
        one.merge(part(1, 2))
    empty = Survey(one.d_sae, one.d_in, one.proxies, one.config)
    empty.merge(one)
    assert empty.of == one.of and empty.parts == one.parts


@pytest.mark.parametrize(("rank", "world"), [(5, 2), (-1, 2), (0, 0)])
def test_ranks_that_cannot_be(case, store, rank: int, world: int) -> None:
    with pytest.raises(FastSAEError, match=f"got {rank} of {world}"):
        take_survey(*case, rank=rank, world=world, **OPTIONS)
    with pytest.raises(FastSAEError, match=f"got {rank} of {world}"):
        survey_of_store(case[0].sae, store, *case[1:], rank=rank, world=world, **OPTIONS)


def test_files_of_the_first_version_are_read(whole, tmp_path) -> None:
    """They know nothing of shift, pairs and what they are of, and have some sums in float32."""
    whole.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays.pop("about").tobytes())
    for name in ("cofiring_tokens", "neuron_memory"):
        del about["config"][name]
    about = {name: about[name] for name in ("d_sae", "d_in", "proxies", "config", "format", "batches")} | {"version": 1}
    arrays = {name: part for name, part in arrays.items() if not name.startswith(("shift", "pairs", "batches"))}
    for name in ("sums.weight", "sums.inside_weight"):
        arrays[name] = arrays[name].astype(np.float32)
    np.savez(tmp_path / "old.npz", **arrays, about=np.frombuffer(json.dumps(about).encode(), np.uint8))  # type: ignore[arg-type]
    old = Survey.load(tmp_path / "old.npz")
    assert old.sums["weight"].dtype == np.float64 and old.batches == whole.batches
    np.testing.assert_array_equal(Cards(old).density(), Cards(whole).density())
    with pytest.raises(FastSAEError, match="dictionary is"):
        old.merge(Survey.load(tmp_path / "new.npz"))


def test_a_limit_means_the_same_tokens_for_any_number_of_ranks(case, store) -> None:
    source, tokenizer, texts = case
    for tokens in (1, 500, 527):
        one = take_survey(*case, tokens=tokens, **OPTIONS)[0]
        assert Cards(one).tokens() == tokens
        parts = [take_survey(*case, tokens=tokens, rank=r, world=3, **OPTIONS)[0] for r in range(3)]
        of_store = [
            survey_of_store(source.sae, store, tokenizer, texts, tokens=tokens, rank=r, world=2, **OPTIONS)
            for r in range(2)
        ]
        for some in (parts, of_store):
            for part in some[1:]:
                some[0].merge(part)
            assert Cards(some[0]).tokens() == tokens
        np.testing.assert_array_equal(parts[0].sums["fires"], one.sums["fires"])
        rows = survey_of_store(source.sae, store, tokenizer, texts, tokens=tokens, **OPTIONS)
        np.testing.assert_array_equal(of_store[0].sums["fires"], rows.sums["fires"])


def test_a_store_goes_on_and_is_shared_by_ranks(case, store, tmp_path, monkeypatch) -> None:
    from fastsae.analysis import passes

    source, tokenizer, texts = case
    args = (source.sae, store.path, tokenizer, texts)
    real = passes.read_store
    monkeypatch.setattr(passes, "read_store", lambda *args, **more: real(*args, batch_size=64, **more))
    wanted = survey_of_store(*args, **OPTIONS)
    parts = [survey_of_store(*args, rank=r, world=2, **OPTIONS) for r in range(2)]
    parts[0].merge(parts[1])
    for table in ("top", "sampled", "random"):
        for name, array in getattr(parts[0], table).arrays().items():
            np.testing.assert_allclose(array, getattr(wanted, table).arrays()[name], rtol=1e-5, atol=1e-6, err_msg=name)
    stopping_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        survey_of_store(*args, out=tmp_path / "out", **OPTIONS)
    identical(survey_of_store(*args, out=tmp_path / "out", resume=True, **OPTIONS), wanted)
    identical(survey_of_store(*args, out=tmp_path / "out", resume=True, **OPTIONS), wanted)
    with pytest.raises(FastSAEError, match="rank"):
        survey_of_store(*args, out=tmp_path / "out", resume=True, rank=1, world=2, **OPTIONS)


def test_stores_of_halves_of_the_documents_merge(case, store, tmp_path) -> None:
    source, tokenizer, texts = case
    one = survey_of_store(source.sae, store, tokenizer, texts, **OPTIONS)
    parts = []
    for low, high in ((0, 11), (11, 24)):
        half = harvested(case, tmp_path / f"half-{low}", texts[low:high])
        parts.append(survey_of_store(source.sae, half, tokenizer, texts, first_document=low, **OPTIONS))
    first = copy.deepcopy(parts[0])
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].sums["fires"], one.sums["fires"])
    np.testing.assert_array_equal(parts[0].top.arrays()["ids"], one.top.arrays()["ids"])
    with pytest.raises(FastSAEError, match="must not share documents"):
        first.merge(one)
    with pytest.raises(FastSAEError, match=r"documents 11 to 23, and 13 were given"):
        survey_of_store(source.sae, half, tokenizer, texts[11:], first_document=11, **OPTIONS)


def test_a_checkpoint_that_takes_long_is_written_less_often(tmp_path, monkeypatch) -> None:
    from fastsae.analysis import checkpoint

    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    class Slow(Watching):
        def arrays(self) -> dict[str, np.ndarray]:
            now[0] += 10
            return super().arrays()

    part, place = Slow(), Checkpoint(tmp_path / "pass.npz", {})
    saved = []
    for now[0] in range(0, 1000, 10):
        place.save_if_due({"a": part}, 1)
        if place._saved not in saved:
            saved.append(place._saved)
    assert saved[1] == 80 and saved[2] - saved[1] >= 200


def test_a_store_of_some_tokens_shows_the_words_around(case, tmp_path) -> None:
    """Joined documents, 9 tokens of each context: windows end where documents do, and what was not stored is 0."""
    source, tokenizer, texts = case
    store = harvested(case, tmp_path / "store", texts, packing="concat", tokens_per_context=9)
    survey = survey_of_store(source.sae, store, tokenizer, texts, **OPTIONS)
    stored = {}
    for some in read_store([source.sae], store):
        for row in zip(some.documents.tolist(), some.positions.tolist(), some.codes[0].to_dense().numpy(), strict=True):
            stored[row[:2]] = row[2]
    k = int(survey.sums["fires"].sum(0).argmax())
    cards, unknown = Cards(survey), 0
    for example in [*cards.top(k), *cards.random(k, 9), *sum(cards.intervals(k), [])]:
        ids = tokenizer(texts[example.document], add_special_tokens=False)["input_ids"]
        low = max(0, example.position - 3)
        assert example.token_ids.tolist() == ids[low : example.position + 4]
        known = [(example.document, low + i) in stored for i in range(len(example.token_ids))]
        wanted = [stored[example.document, low + i][k] if known[i] else 0.0 for i in range(len(known))]
        np.testing.assert_allclose(example.activations, wanted, rtol=1e-4, atol=1e-5)
        unknown += known.count(False)
    assert unknown
