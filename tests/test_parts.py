"""Ranks of a match, a split or a survey: what does not belong together is not merged, and what is missing is told."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.analysis import Cards, Source, Survey, take_survey
from fastsae.analysis.splitting import Splitting, read_split, split
from fastsae.analysis.universality import Matching, match, read_match
from fastsae.errors import FastSAEError
from tests import analysis_case
from tests.survey_case import OPTIONS

HOOK, TEXTS = analysis_case.HOOK, analysis_case.documents()
HOW: dict[str, Any] = {"context": 33, "batch_size": 4, "show_progress": False}
MATCH: dict[str, Any] = HOW | {"min_fires": 5, "logit_contexts": 0}


def sources(seed: int = 1) -> tuple[Source, Source, Any]:
    (sae_a, model, tokenizer), (sae_b, _, _) = analysis_case.case(0), analysis_case.case(seed)
    return Source(sae_a, model, HOOK), Source(sae_b, model, HOOK), tokenizer


def merging(tokenizer: Any) -> Any:
    """The same vocabulary but for a byte that no text has, in whose place is the pair "th"."""
    other = copy.deepcopy(tokenizer)
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["vocab"]["th"] = state["model"]["vocab"].pop("ÿ")
    state["model"]["merges"] = [["t", "h"]]
    return type(tokenizer)(tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)),
                           bos_token="<|end|>", eos_token="<|end|>")  # fmt: skip


def part(verb: str, rank: int, world: int = 2, seed: int = 1, texts: list[str] = TEXTS, **options: Any) -> Any:
    a, b, tokenizer = sources(seed)
    tokenizer = options.pop("tokenizer", tokenizer)
    if verb == "match":
        return read_match(a, b, tokenizer, texts, rank=rank, world=world, **MATCH | options)
    return read_split([a, b], tokenizer, texts, rank=rank, world=world, **HOW | options)


@pytest.mark.parametrize("verb", ["match", "split"])
def test_only_parts_of_one_pass_merge(verb):
    whole = part(verb, 0)
    a, _, tokenizer = sources()
    with torch.no_grad():
        model = copy.deepcopy(a.model)
        model.transformer.wte.weight.mul_(1.01)
    others = [
        (part(verb, 0), "rank 0 of 2 has been added already"),
        (part(verb, 1, 3), "read by 3 there, 2 here"),
        (part(verb, 1, seed=2), "dictionaries is"),
        (part(verb, 1, texts=TEXTS[::-1]), "documents is"),
        (part(verb, 1, tokenizer=merging(tokenizer)), "text is"),
    ]
    for name, source in (("models", a._replace(model=model)), ("hooks", a._replace(hook="transformer.h.0.mlp.c_fc"))):
        pair = (source, source._replace(sae=sources()[1].sae))
        made = read_match(*pair, tokenizer, TEXTS, rank=1, world=2, **MATCH) if verb == "match" else read_split(
            pair, tokenizer, TEXTS, rank=1, world=2, **HOW)  # fmt: skip
        others.append((made, f"{name} is"))
    before = whole.arrays()
    for other, message in others:
        with pytest.raises(FastSAEError, match=f"to merge must be .*{message}"):
            whole.merge(other)
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert whole.missing() == [(1, 2, 0, len(TEXTS))]
    with pytest.raises(FastSAEError, match="rank 1 of 2 is missing: merge what is missing, or ask for"):
        whole.result()
    assert whole.result(partial=True).tokens < part(verb, 0, 1).result().tokens
    whole.merge(part(verb, 1))
    assert whole.missing() == [] and whole.result().tokens == part(verb, 0, 1).result().tokens
    with pytest.raises(FastSAEError, match="rank 1 of 2 has been added already"):
        whole.merge(part(verb, 1))


def test_a_control_is_one_of_the_dictionaries():
    a, b, tokenizer = sources()
    first, second = (
        read_match(a, b, tokenizer, TEXTS, control=Source(analysis_case.case(seed)[0], b.model, HOOK), rank=rank,
                   world=2, **MATCH) for rank, seed in ((0, 3), (1, 4))
    )  # fmt: skip
    with pytest.raises(FastSAEError, match="dictionaries is"):
        first.merge(second)


def test_what_sums_are_of_is_saved_with_them():
    (first, second), (a, b, _) = [part("match", rank) for rank in range(2)], sources()
    loaded = Matching(a, b, first.control, [True] * len(TEXTS), first.config, "shuffled")
    assert (loaded.of, loaded.parts, loaded.missing()) == ({}, [], [])
    loaded.load(first.arrays())
    assert loaded.of == first.of and loaded.parts == first.parts
    with pytest.raises(FastSAEError, match="rank 0 of 2 has been added already"):
        loaded.merge(first)
    loaded.merge(second)
    assert loaded.missing() == []
    empty = Splitting([40, 40], part("split", 0).config)
    empty.merge(part("split", 1))
    assert empty.missing() == [(0, 2, 0, len(TEXTS))]
    by_hand = Splitting([40, 40], empty.config)
    by_hand._sums[0].n = 1
    with pytest.raises(FastSAEError, match="documents is None here"):
        by_hand.merge(empty)


def test_a_survey_says_what_is_missing(tmp_path):
    a, _, tokenizer = sources()
    parts = [take_survey(a, tokenizer, TEXTS, rank=r, world=3, show_progress=False, **OPTIONS)[0] for r in range(3)]
    parts[0].save(tmp_path / "part.npz")
    loaded = Survey.load(tmp_path / "part.npz")
    assert loaded.missing() == [(rank, 3, 0, len(TEXTS)) for rank in (1, 2)]
    assert Cards(loaded).notes() == ["A part of the text is left out: ranks 1 and 2 of 3 are missing."]
    for other in parts[1:]:
        loaded.merge(other)
    assert loaded.missing() == [] and Cards(loaded).notes() == []


@pytest.mark.parametrize("verb", ["match", "split"])
@pytest.mark.parametrize("tokens", [None, 300])
def test_a_pass_is_of_one_tokenizer(verb, tokens, tmp_path):
    a, b, tokenizer = sources()
    part(verb, 0, 1, tokens=tokens, out=tmp_path)

    def again(tokenizer: Any) -> Any:
        how = (MATCH if verb == "match" else HOW) | {"tokens": tokens, "out": tmp_path, "resume": True}
        if verb == "match":
            return match(a, b, tokenizer, TEXTS, **how)
        return split([a, b], tokenizer, TEXTS, **how)

    with pytest.raises(FastSAEError, match="is of another pass: its text is"):
        again(merging(tokenizer))
    assert again(tokenizer).tokens


class Nothing:
    def add(self, some: Any) -> None: ...

    def arrays(self) -> dict[str, np.ndarray]:
        return {"n": np.zeros(1)}

    def load(self, arrays: dict[str, np.ndarray]) -> None: ...


def test_refusals_of_a_finished_pass_name_the_folder_to_remove(tmp_path):
    a, _, tokenizer = sources()
    out: Path = tmp_path / "out" / "unfinished"

    def taken(resume: bool = True, **options: Any) -> Survey:
        options = {"also": {"x": Nothing()}, "batch_size": 4} | options
        return take_survey(a, tokenizer, TEXTS, context=32, categories=(), out=out, resume=resume, show_progress=False,
                           **options)[0]  # fmt: skip

    taken()

    def refused(why: str, **options: Any) -> None:
        with pytest.raises(FastSAEError, match=f"{why}.*remove {out}( |$)"):
            taken(**options)

    refused("seed is 1 here and 0 there", seed=1)
    refused("survey-0.npz exists: resume", resume=False)
    refused("also is", also={"y": Nothing()})
    refused("watch would miss", watch=lambda some: None)
    (out / "survey-0.npz").rename(tmp_path / "survey-0.npz")
    refused("also.npz is of another pass, which made no survey-0.npz")
    (out / "survey-0.npz").write_bytes(b"no")
    refused("is no survey, or a damaged one")
    (tmp_path / "survey-0.npz").rename(out / "survey-0.npz")
    (out / "also.npz").write_bytes(b"no")
    refused("also.npz is damaged")
    (out / "also.npz").unlink()
    refused("survey-0.npz is of another pass, which made no also.npz")
    shutil.rmtree(out)
    assert taken(seed=1).config.seed == 1
