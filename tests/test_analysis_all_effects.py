"""Effects of many features at once against the models put together by hand, finite differences and edited forwards."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastsae.analysis import effects
from fastsae.analysis.ablation import ablation
from fastsae.analysis.attribution import agreement, attribution, logit_of
from fastsae.analysis.logit_map import ContextSample, logit_map
from fastsae.errors import FastSAEError
from fastsae.hooks import activations
from fastsae.sae import SAE
from tests import tiny_lm
from tests.analysis_case import HOOK, case, contexts, documents


def llama() -> Any:
    """Two layers, RMS norms, rotary positions, gated MLPs: nothing like GPT-2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, initializer_range=0.5,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def sae_for(model: Any, hook: str, ids: Tensor, **config: Any) -> SAE:
    """A dictionary with a mean and a scale of its input, whose features fire on some tokens."""
    x = activations(model, hook, ids)
    sae = SAE(d_in=x.shape[-1], d_sae=30, **{"activation": "topk", "k": 5, "seed": 2, **config})
    sae.set_input_normalisation(x.mean((0, 1)), 1.3)
    return sae


def token_ids(rows: int = 5, length: int = 40) -> Tensor:
    found = [row for row in contexts(tiny_lm.tokenizer(), documents(), length) if len(row) == length]
    return torch.tensor(found[:rows])


GPT = tiny_lm.model(2)
LLAMA = llama()
CASES = [
    pytest.param(GPT, "transformer.h.0.mlp.act", id="gpt2-neurons"),
    pytest.param(GPT, "transformer.h.0", id="gpt2-block"),
    pytest.param(LLAMA, "model.layers.0", id="llama-block"),
    pytest.param(LLAMA, "model.layers.1.mlp", id="llama-mlp"),
    pytest.param(LLAMA, "model.layers.0.self_attn.o_proj", id="llama-attention"),
]


# Size of a finite difference and what it may be off by. Llama's norms go through float32 whatever the model's dtype.
STEPS = ((1e-5, 1e-3), (3e-3, 1e-2))


# --- logit weights ---------------------------------------------------------------------------------------------------


def test_logit_weights_of_one_layer_are_the_papers_formula():
    sae, model, _ = case()
    ids = token_ids()
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 0] = False
    found = logit_map(model, HOOK, ids, keep).of_features(sae, slice(None)).numpy()
    with torch.no_grad():  # r: the stream before the final norm
        norm = model.transformer.ln_f
        r = []
        handle = norm.register_forward_pre_hook(lambda _, inputs: r.append(inputs[0]))
        model(ids)
        handle.remove()
        r = r[0][keep].double().numpy()
    down = model.transformer.h[0].mlp.c_proj.weight.detach().double().numpy()  # [24, 16]
    unembed = (model.lm_head.weight.double() * norm.weight.double()).detach().numpy()  # [V, 16]
    wanted = np.zeros((40, 257))
    centred = r - r.mean(1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(1, keepdims=True) + norm.eps)
    unit = centred / sigma
    for f in range(40):
        d = (sae.W_dec[f].detach().double().numpy() / 1.7) @ down
        moved = (d - d.mean()) / sigma - unit * (unit * (d - d.mean())).mean(1, keepdims=True) / sigma
        wanted[f] = unembed @ moved.mean(0)
    wanted -= np.sort(wanted, axis=1)[:, 128:129]  # 257 entries: the middle one
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("model", "hook"), CASES)
def test_logit_weights_are_the_limit_of_finite_differences(model: Any, hook: str):
    ids = token_ids()
    sae = sae_for(model, hook, ids)
    model, sae = model.double(), sae.double()  # small differences drown in float32
    step, rough = STEPS[model is LLAMA]
    try:
        weights = logit_map(model, hook, ids).of_features(sae, torch.tensor([3, 17]))
        for row, feature in zip(weights, (3, 17), strict=True):
            d = sae.W_dec[feature] / sae.input_scale
            up, down = (_logits64(model, hook, ids, lambda x, s=s, d=d: x + s * d) for s in (step, -step))
            wanted = (up - down).flatten(0, 1).mean(0) / (2 * step)
            wanted -= wanted.median()
            torch.testing.assert_close(row.double(), wanted, rtol=rough, atol=rough * float(wanted.std()))
    finally:
        model.float()


@torch.no_grad()
def _logits64(model: Any, hook: str, ids: Tensor, edit: Any) -> Tensor:
    from fastsae.hooks import replace

    with replace(model, hook, edit):
        return model(ids).logits


def test_top_and_bottom_tokens():
    sae, model, _ = case()
    found = logit_map(model, HOOK, token_ids())
    weights = found.of_features(sae, slice(None))[:, :200].numpy()
    top = found.top(sae, 4, entries=200, chunk=7)
    for f in range(40):
        order = np.argsort(-weights[f])
        assert top.top[f].tolist() == order[:4].tolist() and top.bottom[f].tolist() == order[::-1][:4].tolist()
        np.testing.assert_allclose(top.top_values[f], weights[f][order[:4]], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(top.spread[f], weights[f].std(ddof=1), rtol=1e-4)


def test_logit_weights_of_what_has_none():
    from transformers import GPT2Model

    with pytest.raises(FastSAEError, match="GPT2Model has none"):
        logit_map(GPT2Model(GPT.config), "h.0", token_ids())
    with pytest.raises(FastSAEError, match="does not read lm_head"):
        logit_map(GPT, "lm_head", token_ids())
    with pytest.raises(FastSAEError, match="at least one token"):
        logit_map(GPT, "transformer.h.0", token_ids(), torch.zeros(5, 40, dtype=torch.bool))


def test_a_sample_of_contexts():
    """Every context equally often, whole where short, cut where long; those without a token to keep, never."""
    ids = torch.arange(1, 9)[:, None].expand(8, 6)  # context c consists of token c
    grid = torch.arange(48).view(8, 6).clone()
    grid[:, 0] = -1
    grid[2] = -1
    grid[4, 3:] = -1
    drawn = torch.zeros(9)
    for seed in range(300):
        sample = ContextSample(3, seed, length=4)
        for part in (slice(0, 3), slice(3, 8)):
            sample.add(ids[part], grid[part])
        found, mask = sample.contexts()
        assert found.shape == mask.shape == (3, 4)
        drawn[found[:, 0]] += 1
        for row, keep in zip(found[:, 0].tolist(), mask.tolist(), strict=True):
            assert keep == [False, True, True, row != 5]
    assert drawn[0] == drawn[3] == 0
    share = drawn[torch.tensor([1, 2, 4, 5, 6, 7, 8])] / 300
    assert (share - 3 / 7).abs().max() < 5 * (3 / 7 * 4 / 7 / 300) ** 0.5
    sample = ContextSample(3, 0)
    sample.add(ids[:1, :2], grid[:1, :2])
    sample.add(ids[1:2], grid[1:2])
    found, mask = sample.contexts()
    assert sorted(found.tolist()) == [[1, 1, 0, 0, 0, 0], [2] * 6]
    assert sorted(mask.sum(1).tolist()) == [1, 5]


def test_a_sample_of_contexts_does_not_depend_on_the_cut():
    """Of parts that are merged, of a state that was saved, and of batches padded wider: the same contexts."""
    ids = torch.randint(9, (20, 6), generator=torch.Generator().manual_seed(0))
    grid = torch.arange(120).view(20, 6)
    grid = grid.masked_fill(torch.arange(6) >= 2 + torch.arange(20)[:, None] % 5, -1)
    whole, parts = ContextSample(5, 3), [ContextSample(5, 3) for _ in range(2)]
    whole.add(ids, grid)
    for rank, part in enumerate(parts):
        padded = torch.nn.functional.pad(ids[rank::2], (0, 3), value=7)
        part.add(padded, torch.nn.functional.pad(grid[rank::2], (0, 3), value=-1))
    again = ContextSample(5, 3)
    again.load(parts[0].arrays())
    again.merge(parts[1])
    for mine, theirs in zip(again.contexts(), whole.contexts(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(again.arrays().values(), whole.arrays().values(), strict=True):
        assert mine.tobytes() == theirs.tobytes()


# --- ablation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "hook"), CASES)
def test_batched_ablations_are_those_one_by_one(model: Any, hook: str):
    ids = token_ids()
    sae = sae_for(model, hook, ids)
    windows = [ids[0], ids[1, :17], ids[0], ids[2, :33], ids[1, :17], ids[3, :1]]
    features = [3, 17, 9, 3, 17, 4]
    found = ablation(sae, model, hook, windows, features, batch_size=2)
    changed = 0
    for window, feature, delta in zip(windows, features, found, strict=True):
        assert delta.shape == (len(window),) and delta[0] == 0
        row = window[None]
        raw = effects.token_losses(model, hook, row)
        edited = effects.token_losses(model, hook, row, effects.set_feature(sae, feature, 0.0))
        np.testing.assert_allclose(delta[1:], (edited - raw)[0].numpy(), rtol=1e-3, atol=2e-5)
        changed += bool(abs(delta).max() > 1e-3)
    assert changed >= 2


def test_an_ablation_by_hand():
    sae, model, _ = case()
    ids = token_ids(1)
    x = activations(model, HOOK, ids)
    f = sae.encode(x)[..., 7]
    assert (f > 0).any()
    net, block = model.transformer, model.transformer.h[0]

    def nll(neurons: Tensor) -> Tensor:
        stream = net.wte(ids) + net.wpe(torch.arange(40))
        stream = stream + block.attn(block.ln_1(stream))[0]
        logits = model.lm_head(net.ln_f(stream + block.mlp.c_proj(neurons)))
        return -logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    wanted = nll(x - f[..., None] * sae.W_dec[7] / 1.7) - nll(x)
    np.testing.assert_allclose(ablation(sae, model, HOOK, [ids[0]], [7])[0][1:], wanted.detach(), rtol=1e-3, atol=1e-5)


def test_ablation_runs_the_threshold_of_evaluation():
    ids = token_ids(4)
    sae = sae_for(GPT, HOOK, ids, activation="batchtopk")
    sae.loss(activations(GPT, HOOK, ids))  # sets the running threshold
    assert sae.training
    together = ablation(sae, GPT, HOOK, list(ids), [3, 4, 3, 5])
    alone = [ablation(sae, GPT, HOOK, [row], [f])[0] for row, f in zip(ids, [3, 4, 3, 5], strict=True)]
    np.testing.assert_allclose(np.stack(together), np.stack(alone), atol=2e-5)
    assert sae.training and not GPT.training


def test_ablations_that_cannot_be_meant():
    sae, model, _ = case()
    with pytest.raises(FastSAEError, match="got 1 contexts and 2 features"):
        ablation(sae, model, HOOK, [token_ids()[0]], [1, 2])
    with pytest.raises(FastSAEError, match="from 0 to 39, got 40"):
        ablation(sae, model, HOOK, [token_ids()[0]], [40])
    assert ablation(sae, model, HOOK, [], []) == []


# --- attribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "hook"), CASES)
def test_attribution_is_the_slope_of_ablation(model: Any, hook: str):
    ids = token_ids(2)
    sae = sae_for(model, hook, ids).double()
    model.double()
    step, rough = (1e-2, 1e-2) if model is LLAMA else (1e-3, 1e-3)  # step: share of the feature that is taken away
    try:
        found = attribution(sae, model, hook, ids)
        x = activations(model, hook, ids)
        with torch.no_grad():
            dense = sae.encode(x)
        assert found.target == pytest.approx(_loss(model, hook, ids, x), rel=1e-5)
        for context, position in ((0, 5), (1, 20), (1, 38)):
            active = dense[context, position].nonzero().flatten().tolist()
            listed = found.at(context, position)
            assert sorted(feature for feature, _ in listed) == active
            for feature, contribution in listed:
                losses = []
                for sign in (1, -1):
                    moved = x.clone()
                    part = dense[context, position, feature] * sae.W_dec[feature] / sae.input_scale
                    moved[context, position] += sign * step * part.detach()
                    losses.append(_loss(model, hook, ids, moved))
                assert contribution == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=rough, abs=rough / 100)
    finally:
        model.float()


@torch.no_grad()
def _loss(model: Any, hook: str, ids: Tensor, x: Tensor) -> float:
    logits = _logits64(model, hook, ids, lambda _: x)
    return float(-logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum())


def test_attribution_to_a_logit():
    sae, model, _ = case()
    ids = token_ids(2)
    found = attribution(sae, model, HOOK, ids, logit_of(65, 10, 1))
    logits = model(ids).logits[1, 10].detach()
    assert found.target == pytest.approx(float(logits[65] - logits.mean()), rel=1e-4)
    assert found.at(1, 10) and all(value == 0 for _, value in found.at(0, 10))  # of the other context: nothing
    weights = [abs(value) for _, value in found.at(1, 10)]
    assert weights == sorted(weights, reverse=True)
    totals = torch.zeros(40)
    for feature, value in found.at(1, 10):
        totals[feature] = value
    torch.testing.assert_close(found.by_feature(), totals, rtol=1e-4, atol=1e-6)


def test_agreement_of_attribution_and_ablation():
    ids = token_ids()
    hook = "model.layers.0"
    sae = sae_for(LLAMA, hook, ids)
    found = agreement(sae, LLAMA, hook, ids, count=40, batch_size=16, seed=3)
    assert len(found.measured) == 40
    x = activations(LLAMA, hook, ids)
    with torch.no_grad():
        dense = sae.encode(x)
    for i in (0, 11, 39):
        context, position, feature = (int(a[i]) for a in (found.contexts, found.positions, found.features))
        cut = x.clone()
        cut[context, position] -= (dense[context, position, feature] * sae.W_dec[feature] / sae.input_scale).detach()
        wanted = _loss(LLAMA, hook, ids, cut) - _loss(LLAMA, hook, ids, x)
        assert found.measured[i] == pytest.approx(wanted, abs=2e-3)
        slope = dict(attribution(sae, LLAMA, hook, ids).at(context, position))[feature]
        assert found.predicted[i] == pytest.approx(-slope, rel=1e-3, abs=1e-5)
    results: Any = [test(found.predicted, found.measured) for test in (stats.pearsonr, stats.spearmanr)]
    assert [found.pearson, found.spearman] == pytest.approx([result.statistic for result in results])
    assert found.spearman > 0.3
    assert found.positions.max() < 39
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[:, 7] = True
    assert set(agreement(sae, LLAMA, hook, ids, keep=keep).positions) == {7}


def test_agreement_is_exact_where_the_loss_is_linear():
    """Features of a small scale: what ablation does is then its own first order."""
    ids = token_ids()
    sae = sae_for(GPT, HOOK, ids)
    with torch.no_grad():
        sae.W_dec.mul_(1e-3)
    one = int(sae.encode_sparse(activations(GPT, HOOK, ids)).indices.flatten().mode().values)
    GPT.double()
    sae.double()
    try:
        found = agreement(sae, GPT, HOOK, ids, feature=one, count=60)
    finally:
        GPT.float()
    assert set(found.features) == {one} and found.pearson > 0.99


def test_attributions_that_cannot_be_meant():
    sae, model, _ = case()
    with pytest.raises(FastSAEError, match="target does not depend"):
        attribution(sae, model, HOOK, token_ids(), lambda logits: torch.ones((), requires_grad=True))
    with pytest.raises(FastSAEError, match="context 9"):
        attribution(sae, model, HOOK, token_ids()).at(9, 0)
    with torch.no_grad():
        sae.encoder.bias.sub_(1e4)
    with pytest.raises(FastSAEError, match="at least 3 active"):
        agreement(sae, model, HOOK, token_ids())
