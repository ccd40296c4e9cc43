"""Ablation, pinning and logit weights against the model put together by hand from its parts."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.analysis import effects
from fastsae.analysis.steering import continuations, sample
from fastsae.analysis.stream import Source
from fastsae.analysis.study import Effects, Study
from tests.analysis_case import HOOK, case, contexts, documents

SAE, MODEL, TOKENIZER = case()
FEATURE = 7


@pytest.fixture(scope="module")
def ids() -> Tensor:
    rows = [row for row in contexts(TOKENIZER, documents(), 48) if len(row) == 48]
    return torch.tensor(rows[:6])


def by_hand(token_ids: Tensor, edit, bos: bool = False) -> Tensor:
    """Logits [B, T, V] of the one-layer model with edit(neurons [B, T, 24]) in the place of its neurons; bos: also of
    the first token's."""
    net, block = MODEL.transformer, MODEL.transformer.h[0]
    stream = net.wte(token_ids) + net.wpe(torch.arange(token_ids.shape[1]))
    stream = stream + block.attn(block.ln_1(stream))[0]
    x = block.mlp.c_fc(block.ln_2(stream)).relu()
    edited = edit(x) if bos else torch.cat([x[:, :1], edit(x)[:, 1:]], dim=1)
    return MODEL.lm_head(net.ln_f(stream + block.mlp.c_proj(edited)))


def active(x: Tensor) -> Tensor:
    return SAE.encode(x)[..., FEATURE]


@torch.no_grad()
def test_setting_a_feature_moves_along_its_direction(ids: Tensor):
    for to in (0.0, 2.5):
        found = effects.logits(MODEL, HOOK, ids, effects.set_feature(SAE, FEATURE, to))
        direction = SAE.W_dec[FEATURE] / 1.7  # the SAE works on 1.7 x
        wanted = by_hand(ids, lambda x, to=to, d=direction: x + (to - active(x))[..., None] * d)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        everywhere = effects.logits(MODEL, HOOK, ids, effects.set_feature(SAE, FEATURE, to), special=())
        wanted = by_hand(ids, lambda x, to=to, d=direction: x + (to - active(x))[..., None] * d, bos=True)
        torch.testing.assert_close(everywhere, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[:, 0], everywhere[:, 0], atol=1e-2)
    assert active(torch.zeros(3, 24)).shape == (3,)
    torch.testing.assert_close(effects.logits(MODEL, HOOK, ids), by_hand(ids, lambda x: x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ablated_losses(ids: Tensor):
    raw = by_hand(ids, lambda x: x)
    ablated = by_hand(ids, lambda x: x - active(x)[..., None] * SAE.W_dec[FEATURE] / 1.7)
    wanted = [
        [-float(row[t].log_softmax(-1)[tokens[t + 1]]) for t in range(len(tokens) - 1)]
        for logits, rows in ((raw, ids), (ablated, ids))
        for row, tokens in zip(logits, rows, strict=True)
    ]
    raw_losses = effects.token_losses(MODEL, HOOK, ids)
    ablated_losses = effects.token_losses(MODEL, HOOK, ids, effects.set_feature(SAE, FEATURE, 0.0))
    torch.testing.assert_close(torch.cat([raw_losses, ablated_losses]), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert not torch.equal(raw_losses, ablated_losses)


@torch.no_grad()
def test_a_token_before_the_feature_fires_is_not_touched(ids: Tensor):
    change = effects.token_losses(MODEL, HOOK, ids, effects.set_feature(SAE, FEATURE, 0.0))
    change = (change - effects.token_losses(MODEL, HOOK, ids)).abs()
    fires = []
    by_hand(ids, lambda x: fires.append(active(x) > 0) or x)
    silent = ~fires[0][:, :-1]  # the hook is behind the only attention: an ablation stays at its token
    assert silent.any() and float(change[silent].max()) < 1e-5 < float(change[~silent].max())


@torch.no_grad()
def test_setting_a_neuron(ids: Tensor):
    def pin(x: Tensor) -> Tensor:
        return torch.cat([x[..., :5], torch.full_like(x[..., :1], 3.0), x[..., 6:]], dim=-1)

    found = effects.logits(MODEL, HOOK, ids, effects.set_neuron(5, 3.0))
    torch.testing.assert_close(found, by_hand(ids, pin), rtol=1e-4, atol=1e-4)


def test_logit_weights_are_the_derivative(ids: Tensor):
    found = effects.logit_weights(MODEL, HOOK, SAE, FEATURE, ids, step=0.05)
    direction = SAE.W_dec[FEATURE].detach() / 1.7

    def along(t: Tensor) -> Tensor:
        return by_hand(ids, lambda x: x + t * direction)[:, 1:].flatten(0, 1).mean(0)

    slope = torch.autograd.functional.jvp(along, torch.zeros(()), torch.ones(()))[1]
    assert isinstance(slope, Tensor)
    wanted = slope - slope.median()
    assert float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.999
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()))
    assert float(found.median()) == 0


def test_sampling_scores_what_it_sampled_from():
    members = torch.zeros(257)
    members[100:200] = torch.rand(100, generator=torch.Generator().manual_seed(1))
    prefix = torch.tensor([TOKENIZER.bos_token_id, 80, 90])
    edit = effects.set_feature(SAE, FEATURE, 6.0)
    share, ids = sample(MODEL, HOOK, prefix, edit, tokens=20, count=4, members=members, seed=3)
    assert ids.shape == (4, 20)
    whole = torch.cat([prefix.repeat(4, 1), ids], dim=1)
    p = effects.logits(MODEL, HOOK, whole, edit)[:, 2:-1].softmax(-1)  # before each sampled token
    assert math.isclose(share, float((p @ members).mean()), rel_tol=1e-4)
    again = sample(MODEL, HOOK, prefix, edit, tokens=20, count=4, members=members, seed=3)
    assert again[0] == share and torch.equal(again[1], ids)
    assert not torch.equal(sample(MODEL, HOOK, prefix, edit, tokens=20, count=4, members=members)[1], ids)
    free, _ = sample(MODEL, HOOK, prefix, None, tokens=20, count=4, members=members, seed=3)
    assert free != share
    everything, _ = sample(MODEL, HOOK, prefix, edit, tokens=5, count=2, members=torch.ones(257))
    assert math.isclose(everything, 1.0, rel_tol=1e-5)


def test_sampling_past_the_longest_context_goes_on():
    prefix = torch.full((60,), 70)
    _, ids = sample(MODEL, HOOK, prefix, None, tokens=10, count=1, members=torch.ones(257))
    assert ids.shape == (1, 10)  # the model reads 64


def test_special_tokens_are_the_tokenizers_or_the_configs():
    assert effects.special_ids(MODEL) == effects.special_ids(MODEL, TOKENIZER) == (0,)
    config = SimpleNamespace(bos_token_id=None, eos_token_id=[7, 5], pad_token_id=3)
    assert effects.special_ids(SimpleNamespace(config=config)) == (3, 5, 7) and effects.special_ids(object()) == ()
    ids = torch.tensor([[3, 4, 5]])
    assert effects.ordinary(SimpleNamespace(config=config), ids).tolist() == [[False, True, False]]
    assert effects.ordinary(SimpleNamespace(config=config), ids, special=()).all()
    assert effects.ordinary(MODEL, ids, special=[4]).tolist() == [[True, False, True]]


def test_what_the_head_has_beyond_the_tokenizer_is_never_written():
    """Entries 200 … 256 are padding of the head here, and the likeliest."""
    prefix = torch.tensor([0, 80, 90])
    loud = copy.deepcopy(MODEL)
    loud.lm_head.weight = torch.nn.Parameter(loud.lm_head.weight.detach().clone())
    with torch.no_grad():
        loud.lm_head.weight[200:] *= 30
    share, ids = sample(loud, HOOK, prefix, None, tokens=20, count=4, members=torch.ones(200))
    assert share == pytest.approx(1, abs=1e-5) and int(ids.max()) < 200
    _, ids = sample(loud, HOOK, prefix, None, tokens=20, count=4, members=torch.ones(257))
    assert int(ids.max()) >= 200
    options: dict = {"tokens": 20, "count": 4, "temperature": 0}
    for vocabulary, low in ((200, True), (None, False)):
        generator = torch.Generator().manual_seed(0)
        ids = continuations(loud, HOOK, prefix, None, generator=generator, vocabulary=vocabulary, **options)
        assert (int(ids.max()) < 200) == low
    share, _ = sample(MODEL, HOOK, prefix, None, tokens=2, count=1, members=torch.ones(300))
    assert share == pytest.approx(1, abs=1e-5)  # a head narrower than the tokenizer


@torch.no_grad()
def test_effects_are_those_of_the_model_in_evaluation(ids: Tensor):
    """Dropout would be taken for an effect; modes are given back."""
    noisy, sae = case(activation="batchtopk", k=4)[1], case(activation="batchtopk", k=4)[0]
    for part in noisy.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    edit, members, prefix = effects.set_feature(sae, FEATURE, 2.0), torch.rand(257), ids[0, :4]
    known: Any = SimpleNamespace(
        source=Source(sae, noisy, HOOK), tokenizer=TOKENIZER,
        held_out=SimpleNamespace(
            ids=ids, inside=torch.ones(*ids.shape, 1, dtype=torch.bool), split=lambda p: (torch.arange(6), ids[:0, 0])
        ),
    )  # fmt: skip
    study = Study.__new__(Study)
    study.known, study.how = known, Effects(4, 2, 1, 0)

    def measured() -> list[Any]:
        return [
            effects.logits(noisy, HOOK, ids, edit), effects.token_losses(noisy, HOOK, ids, edit),
            effects.logit_weights(noisy, HOOK, sae, FEATURE, ids, step=0.1),
            *sample(noisy, HOOK, prefix, edit, tokens=5, count=2, members=members), study._ablation(FEATURE, 0),
        ]  # fmt: skip

    wanted = measured()
    noisy.train()
    sae.train()
    found = measured()
    assert noisy.training and noisy.transformer.drop.training and sae.training
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_nothing_is_left_on_the_model(ids: Tensor):
    before = effects.logits(MODEL, HOOK, ids)
    with pytest.raises(RuntimeError):
        effects.logits(MODEL, HOOK, ids, lambda x: x @ torch.zeros(3, 3))
    assert torch.equal(effects.logits(MODEL, HOOK, ids), before)
