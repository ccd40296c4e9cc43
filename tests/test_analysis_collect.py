"""The one pass over text, against dense arithmetic in numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsae.analysis.collect import Sparse, collect, feature_pearson, scoring_half
from fastsae.errors import FastSAEError
from tests import tiny_lm
from tests.analysis_case import ARABIC, HOOK, case, contexts, documents, neurons

CATEGORIES = ("Arabic", "Latin", "DNA")


@pytest.fixture(scope="module")
def run():
    sae, model, tokenizer = case()
    other = case(seed=1)[:2]
    data = collect(
        sae, model, tokenizer, documents(), HOOK, categories=CATEGORIES, other=other, context=64, batch_size=5,
        show_progress=False,
    )  # fmt: skip
    x = neurons(model, contexts(tokenizer, documents(), 64))
    return SimpleNamespace(sae=sae, model=model, tokenizer=tokenizer, other=other, data=data, x=x)


def dense(codes: Sparse, n: int) -> torch.Tensor:
    result = torch.zeros(n, len(codes.offsets) - 1)
    for feature in range(result.shape[1]):
        tokens, values = codes.of(feature)
        result[tokens, feature] = values
    return result


def corrcoef(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Pearson's r of the columns of a with those of b; 0 where one is constant."""
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(a.double().numpy(), b.double().numpy(), rowvar=False)[: a.shape[1], a.shape[1] :]
    return np.nan_to_num(r)


def test_tokens_are_those_of_the_documents_in_order(run):
    data = run.data
    ids = [run.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents()]
    assert data.token_ids.tolist() == [i for row in ids for i in row] and data.n == len(data.token_ids)
    assert data.documents.tolist() == [n for n, row in enumerate(ids) for _ in row]
    assert data.positions.tolist() == [p for row in ids for p in range(len(row))]
    assert b"".join(data.pieces[i] for i in ids[0]).decode() == documents()[0]


def test_codes_are_those_of_the_dense_encoder(run):
    torch.testing.assert_close(dense(run.data.codes, run.data.n), run.sae.encode(run.x).detach(), rtol=1e-4, atol=1e-5)
    y = neurons(run.other[1], contexts(run.tokenizer, documents(), 64))
    wanted = run.other[0].encode(y).detach()
    torch.testing.assert_close(dense(run.data.other, run.data.n), wanted, rtol=1e-4, atol=1e-5)


def test_labels_follow_the_characters(run):
    text = b"".join(run.data.pieces[i] for i in run.data.token_ids[run.data.documents == 0])
    labels = run.data.binary[run.data.documents == 0]
    arabic = [char in "".join(ARABIC) for char in text.decode() for _ in char.encode()]
    assert labels[:, 0].tolist() == arabic  # a byte is a token here
    assert labels[-3:, 1].all() and not labels[:, 2].any()
    assert ((run.data.clipped > 0) == run.data.binary).all()


@pytest.mark.parametrize("half", [False, True])
def test_correlations_of_features_and_neurons(run, half: bool):
    keep, data = run.data.half == half, run.data
    assert 0.2 < float(keep.float().mean()) < 0.8
    f, labels = dense(data.codes, data.n)[keep], data.binary[keep].double()
    np.testing.assert_allclose(feature_pearson(data.codes, data.binary, keep), corrcoef(f, labels), atol=1e-5)
    clipped = data.clipped.double()
    np.testing.assert_allclose(feature_pearson(data.codes, clipped, keep), corrcoef(f, clipped[keep]), atol=1e-5)
    np.testing.assert_allclose(data.neuron_pearson[int(half)], corrcoef(run.x[keep], labels), atol=1e-5)


def test_neurons_of_both_models(run):
    y = neurons(run.other[1], contexts(run.tokenizer, documents(), 64))
    np.testing.assert_allclose(run.data.other_neuron_pearson, corrcoef(run.x, y), atol=1e-5)
    torch.testing.assert_close(run.data.neuron_max, run.x.amax(0), rtol=1e-4, atol=1e-5)


def test_a_document_is_in_one_half_and_every_kind_in_both(run):
    for number, half in enumerate(scoring_half(documents())):
        assert set(run.data.half[run.data.documents == number].tolist()) == {half}
    many = [SimpleNamespace(text=str(n), kind="ab"[n % 3 == 0]) for n in range(100)]
    halves = scoring_half(many)
    assert [scoring_half(many[::-1])[99 - n] for n in range(100)] == halves, "the order does not matter"
    assert sum(halves) == 50 and abs(sum(halves[::3]) - 17) <= 1
    assert scoring_half([*many, many[7]])[100] == scoring_half([*many, many[7]])[7], "equal texts stay together"


def test_sums_and_restriction_of_sparse_codes():
    full = torch.relu(torch.randn(50, 7, generator=torch.Generator().manual_seed(0)))
    full[:, 3] = 0
    entries = full.T.nonzero()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(entries[:, 0], minlength=7).cumsum(0)])
    codes = Sparse(offsets, entries[:, 1].int(), full.T[full.T > 0])
    weights = torch.randn(50, 2)
    torch.testing.assert_close(codes.sums(), full.double().sum(0))
    torch.testing.assert_close(codes.sums(weights), full.double().T @ weights.double())
    torch.testing.assert_close(codes.sums(weights[:, 0]), full.double().T @ weights[:, 0].double())
    keep = torch.arange(50) % 3 == 0
    torch.testing.assert_close(dense(codes.restricted(keep), 50), full * keep[:, None])


def test_max_tokens_ends_the_pass(run):
    data = collect(
        run.sae, run.model, run.tokenizer, documents(), HOOK, categories=CATEGORIES, context=64, batch_size=2,
        max_tokens=100, show_progress=False,
    )  # fmt: skip
    assert 100 <= data.n < 100 + 2 * 63
    assert data.token_ids.tolist() == run.data.token_ids[: data.n].tolist()
    assert data.other is None and data.other_neuron_pearson is None


def test_topk_codes_too():
    sae, model, tokenizer = case(activation="topk", k=3)
    texts = documents(6)
    data = collect(sae, model, tokenizer, texts, HOOK, categories=CATEGORIES, context=64, show_progress=False)
    wanted = sae.encode(neurons(model, contexts(tokenizer, texts, 64))).detach()
    torch.testing.assert_close(dense(data.codes, data.n), wanted, rtol=1e-4, atol=1e-5)


def test_bad_input(run):
    def attempt(sae=run.sae, texts=("some text",), hook=HOOK, context=64):
        collect(sae, run.model, run.tokenizer, list(texts), hook, context=context, show_progress=False)

    with pytest.raises(FastSAEError, match="none"):
        attempt(texts=("", ""))
    with pytest.raises(FastSAEError, match="no module 'transformer.h.0.mlp.cat'"):
        attempt(hook="transformer.h.0.mlp.cat")
    with pytest.raises(FastSAEError, match="width 24.*puts out 16"):
        attempt(hook="transformer.h.0.mlp")
    with pytest.raises(FastSAEError, match="at most 64 tokens, got a context of 65"):
        attempt(context=65)


def test_words_of_the_case_are_what_they_say():
    assert not set("".join(ARABIC)) & set("".join(tiny_lm.WORDS))


def test_activations_that_are_not_finite_and_modules_that_do_not_run():
    sae, model, tokenizer = case()
    with pytest.raises(FastSAEError, match="does not run transformer.h: hook another"):
        collect(sae, model, tokenizer, documents(), "transformer.h", context=64, show_progress=False)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[3] = float("nan")
    with pytest.raises(FastSAEError, match="must be finite, got NaN"):
        collect(sae, model, tokenizer, documents(), HOOK, context=64, show_progress=False)
