"""What every analysis reads: modes of models and dictionaries, which a reader must not depend on, nor change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastsae.analysis.stream import Read, Source, encoded, evaluating, read, read_store
from fastsae.errors import FastSAEError
from fastsae.sae import SAE
from fastsae.store import MemoryStore
from tests import analysis_case as case

THRESHOLD = 0.35


@pytest.fixture
def batchtopk() -> tuple[SAE, Any, Any]:
    """A BatchTopK dictionary still in training, with a threshold that keeps another number than k."""
    sae, model, tokenizer = case.case(activation="batchtopk", k=3)
    sae.running_threshold.fill_(THRESHOLD)
    return sae.train(), model, tokenizer


def by_threshold(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """[n, F] by hand: pre-activations above the threshold, each token on its own."""
    with torch.no_grad():
        pre = (x * sae.input_scale - sae.b_dec) @ sae.W_enc + sae.b_enc
    return torch.where(pre > THRESHOLD, pre, torch.zeros_like(pre))


def of_text(sae: SAE, model: Any, tokenizer: Any, batch_size: int) -> Iterator[Read]:
    source = Source(sae, model, case.HOOK)
    return read([source], tokenizer, case.documents(6), context=33, batch_size=batch_size)


def of_store(sae: SAE, model: Any, tokenizer: Any, batch_size: int) -> Iterator[Read]:
    x = case.neurons(model, case.contexts(tokenizer, case.documents(6), 33))
    return read_store([sae], MemoryStore(x), batch_size=17 * batch_size)


READERS = [pytest.param(of_text, id="text"), pytest.param(of_store, id="store")]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_dictionary_in_training_is_read_by_its_threshold(
    reader: Callable[..., Iterator[Read]], batch_size: int, batchtopk: tuple[SAE, Any, Any]
):
    sae, model, tokenizer = batchtopk
    fired = 0
    for some in reader(sae, model, tokenizer, batch_size):
        wanted = by_threshold(sae, some.xs[0])
        fired += int((wanted > 0).sum())
        torch.testing.assert_close(some.codes[0].to_dense(), wanted, atol=1e-5, rtol=1e-4)
        over_the_batch = sae.encode(some.xs[0])  # in training mode again: the k largest a token, over the batch
        assert not torch.equal(over_the_batch > 0, wanted > 0)
    assert fired and sae.training and float(sae.running_threshold) == pytest.approx(THRESHOLD)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("training", [True, False])
def test_who_stops_early_finds_the_modes_unchanged(
    reader: Callable[..., Iterator[Read]], training: bool, batchtopk: tuple[SAE, Any, Any]
):
    sae, model, tokenizer = batchtopk
    sae.train(training)
    model.train()
    stream = reader(sae, model, tokenizer, 1)
    next(stream)  # and the generator lives on
    assert sae.training == training and sae.encoder.training == training
    assert all(part.training for part in model.modules())
    next(stream)
    assert sae.training == training


def test_text_is_read_without_dropout(batchtopk: tuple[SAE, Any, Any]):
    sae, model, tokenizer = batchtopk
    assert model.transformer.drop.p > 0
    wanted = [some.xs[0] for some in of_text(sae, model.eval(), tokenizer, 4)]
    found = [some.xs[0] for some in of_text(sae, model.train(), tokenizer, 4)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert model.training


def test_modes_come_back_after_an_error(batchtopk: tuple[SAE, Any, Any]):
    sae, model, _ = batchtopk
    with pytest.raises(FastSAEError, match="x on meta"):
        encoded(sae, torch.zeros(2, 24, device="meta"), "nowhere")
    assert sae.training
    with pytest.raises(FastSAEError, match="width 24, nowhere has 23"):
        encoded(sae, torch.zeros(2, 23), "nowhere")


def test_evaluating_gives_every_part_its_own_mode_back():
    _, model, _ = case.case()
    model.train()
    model.transformer.h[0].attn.eval()  # a frozen part
    before = [part.training for part in model.modules()]
    with pytest.raises(KeyError), evaluating(model, "no module"):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert [part.training for part in model.modules()] == before and len(set(before)) == 2


def test_a_store_is_read_to_the_row_and_to_the_rank(batchtopk: tuple[SAE, Any, Any]):
    sae, model, tokenizer = batchtopk
    x = case.neurons(model, case.contexts(tokenizer, case.documents(6), 33))
    whole = torch.cat([some.xs[0] for some in read_store([sae], MemoryStore(x), max_tokens=100)])
    assert len(whole) == 100
    ranks = [read_store([sae], MemoryStore(x), batch_size=16, max_tokens=100, rank=r, world=3) for r in range(3)]
    parts = [torch.cat([some.xs[0] for some in part]) for part in ranks]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    numbers = [some.number for some in read_store([sae], MemoryStore(x), batch_size=16, max_tokens=100, start=2)]
    assert numbers == [2, 3, 4, 5, 6]
    assert not list(read_store([sae], MemoryStore(x), batch_size=16, max_tokens=100, start=7))


def test_a_store_of_nan_is_told(batchtopk: tuple[SAE, Any, Any]):
    store = MemoryStore(torch.ones(4, 24))
    store.x[1, 2] = torch.nan
    with pytest.raises(FastSAEError, match="the store must be finite"):
        list(read_store([batchtopk[0]], store))


def test_text_is_read_to_the_token(batchtopk: tuple[SAE, Any, Any]):
    sae, model, tokenizer = batchtopk
    source = Source(sae, model, case.HOOK)

    def tokens(**options: Any) -> list[tuple[int, int]]:
        reads = read([source], tokenizer, case.documents(6), context=33, **options)
        return [pair for some in reads for pair in zip(some.documents.tolist(), some.positions.tolist(), strict=True)]

    everything = tokens(batch_size=2)
    assert tokens(batch_size=2, max_tokens=77) == everything[:77]
    parts = [tokens(batch_size=2, max_tokens=77, rank=r, world=2) for r in range(2)]
    assert sorted(sum(parts, [])) == everything[:77] and all(parts)
