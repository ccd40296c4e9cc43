"""A model whose head is wider than its tokenizer (Pythia, Qwen, Phi pad their vocabularies), and padding's own rows."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.analysis import AnalyzeConfig, analyze, attribution, steering
from fastsae.analysis.automata import automata
from fastsae.analysis.effects import FeatureEdit
from fastsae.analysis.logit_map import logit_map
from fastsae.analysis.stream import Source
from fastsae.analysis.study import Effects, Study
from fastsae.hooks import activations, replace
from fastsae.sae import SAE
from tests import tiny_lm
from tests.analysis_case import documents

NEOX_HOOK = "gpt_neox.layers.0"


def neox(vocabulary: int = 400) -> Any:
    """A GPT-NeoX with rows for `vocabulary` tokens, those beyond the tokenizer's 257 the likeliest."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = GPTNeoXConfig(
            vocab_size=vocabulary, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
        )  # fmt: skip
        model = GPTNeoXForCausalLM(config).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight[257:] *= 5
        return model


def dictionary(model: Any) -> SAE:
    sae = SAE(d_in=24, d_sae=40, activation="topk", k=6, seed=1)
    ids = torch.tensor([tiny_lm.tokenizer()(text)["input_ids"][:40] for text in documents(12)])
    x = activations(model, NEOX_HOOK, ids)
    sae.set_input_normalisation(x.mean((0, 1)), 1 / float(x.std()))
    return sae.eval()


@pytest.mark.parametrize("bos", [True, False])
def test_a_head_wider_than_the_tokenizer(tmp_path: Path, bos: bool):
    model, tokenizer = neox(), tiny_lm.tokenizer(bos)
    sae = dictionary(model)
    config = AnalyzeConfig(
        categories=("Arabic",), features=(3,), context=24, sample_tokens=6, samples=2, contexts_per_effect=6
    )
    results = analyze(sae, model, tokenizer, documents(60), NEOX_HOOK, tmp_path, config, show_progress=False)
    row = results["categories"][0]
    assert 0 <= row["pinning"]["pinned"] <= 1 and row["pinning"]["samples"]["pinned"][0]
    assert sum(row["logits"]["inside"]) + sum(row["logits"]["outside"]) == 257
    agreement = row["ablation"]["agreement"]
    assert agreement is None or (agreement["places"] >= 3 and 0 <= agreement["same_sign"] <= 1)
    assert "NaN" not in (tmp_path / "results.json").read_text(encoding="utf-8")
    assert (tmp_path / "index.html").exists()

    (found,) = steering.steer(sae, model, tokenizer, ["cat"], NEOX_HOOK, [FeatureEdit(3, 4.0)], tokens=20, samples=3)
    assert all(max(text.token_ids) < 257 and math.isfinite(text.nll) for text in (*found.plain, *found.steered))
    graph = automata(Source(sae, model, NEOX_HOOK), tokenizer, documents(60), context=24, show_progress=False)
    assert len(graph.features) and all(step.token < 257 for step in graph.steps.values())
    ids = torch.tensor([tokenizer(text)["input_ids"][:40] for text in documents(4)])
    assert np.isfinite(attribution.agreement(sae, model, NEOX_HOOK, ids, count=20).pearson)


@torch.no_grad()
def test_effects_of_the_study_leave_the_begin_of_text_token_out():
    """A feature that fires most at that token, and an end of text inside a context."""
    model, tokenizer = neox(), tiny_lm.tokenizer()
    sae = dictionary(model)
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"][:23]] for text in documents(12)])
    ids[2, 9] = 0
    first = activations(model, NEOX_HOOK, ids)[0, 0]
    sae.encoder.weight[5] = 100 * (first - sae.input_mean) / (first - sae.input_mean).norm()
    sae.encoder.bias[5] = 0.0
    x = activations(model, NEOX_HOOK, ids)
    f = sae.encode(x)[..., 5]
    assert float(f[:, 0].min()) > 20 and int((f[:, 1:] > 0).sum()) > 40
    f = f * (ids != 0)

    def nll(x: torch.Tensor) -> torch.Tensor:
        with replace(model, NEOX_HOOK, lambda _: x):
            out = model(ids).logits[:, :-1].log_softmax(-1)
        return -out.gather(2, ids[:, 1:, None])[..., 0]

    delta = nll(x - f[..., None] * sae.W_dec[5] / sae.input_scale) - nll(x)
    inside = torch.zeros(12, 24, 1, dtype=torch.bool)
    inside[:6, 5:12] = True
    counted = ids[:, 1:] != 0
    member = inside[:, 1:, 0] & counted

    study = Study.__new__(Study)
    held_out: Any = SimpleNamespace(ids=ids, inside=inside, split=lambda p: (torch.arange(6), torch.arange(6, 12)))
    known: Any = SimpleNamespace(source=Source(sae, model, NEOX_HOOK), tokenizer=tokenizer, held_out=held_out)
    study.known, study.how = known, Effects(5, 2, 1, 0)
    found = study._ablation(5, 0)
    assert found is not None
    near = torch.arange(12)[:, None] < 6
    order = f[:, :-1].masked_fill(~counted | (ids[:, :-1] == 0), -1).flatten().argsort(descending=True)[:20]
    wanted = {
        "inside": delta[member], "beside": delta[near & counted & ~member], "outside": delta[~near & counted],
        "top": delta.flatten()[order],
    }  # fmt: skip
    for name, values in wanted.items():
        assert found[name] == pytest.approx(float(values.mean()), rel=1e-3, abs=1e-5), name
    assert (found["tokens_inside"], found["tokens_outside"]) == (int(member.sum()), 6 * 23)
    assert found["tokens_inside"] + found["tokens_beside"] == 6 * 23 - 1
    assert found["agreement"]["places"] == 64 and -1 <= found["agreement"]["pearson"] <= 1
    sae.encoder.bias[5] = -1e6
    assert study._ablation(5, 0)["agreement"] is None  # type: ignore[index]


def test_logit_weights_over_a_padding_row_of_zeros():
    """Gemma 2 and Cohere begin a context with a token whose embedding is 0: a norm of nothing, and no NaN from it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 5.0}, "cohere": {}}
    ids = torch.randint(2, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    for name, options in more.items():
        make: Any = CONFIG_MAPPING[name]
        config = make(
            **sizes, **options, vocab_size=97, max_position_embeddings=64, pad_token_id=0, bos_token_id=0,
            eos_token_id=1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config).eval()
        hook = "model.layers.0"
        assert float(activations(model, hook, ids)[:, 0].norm()) == 0
        sae = SAE(d_in=32, d_sae=20, k=4, seed=0).eval()
        for keep in (None, ids != 0):
            assert torch.isfinite(logit_map(model, hook, ids, keep).of_features(sae, slice(None))).all()
        found = attribution.agreement(sae, model, hook, ids, count=20)
        assert np.isfinite(found.predicted).all() and np.isfinite(found.measured).all()
