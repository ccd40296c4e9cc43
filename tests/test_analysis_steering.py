"""Steering against whole texts run again without a cache, on GPT-2 and on Llama."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsae.analysis import effects
from fastsae.analysis.effects import FeatureEdit, set_features
from fastsae.analysis.steering import SteerConfig, continuations, maxima, steer
from fastsae.cli import main
from fastsae.errors import FastSAEError
from fastsae.hooks import activations
from fastsae.sae import SAE
from tests import tiny_lm
from tests.analysis_case import documents
from tests.test_analysis_all_effects import LLAMA, sae_for, token_ids

TOKENIZER = tiny_lm.tokenizer()
GPT = tiny_lm.model(2)
CASES = [
    pytest.param(GPT, "transformer.h.0.mlp.act", id="gpt2-neurons"),
    pytest.param(GPT, "transformer.h.0.attn", id="gpt2-attention"),
    pytest.param(LLAMA, "model.layers.0", id="llama-block"),
]
EDITS = [FeatureEdit(3, 2.5), FeatureEdit(9, 1.5, "add"), FeatureEdit(17, mode="ablate")]


def without_cache(model: Any, hook: str, prefix: Tensor, edit: Any, tokens: int, temperature: float, seed: int):
    """The whole text through the edited model for every token: [3, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    ids = prefix.repeat(3, 1)
    for _ in range(tokens):
        logits = effects.logits(model, hook, ids[:, -64:], edit)[:, -1]
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            new = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], dim=1)
    return ids[:, len(prefix) :]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("model", "hook"), CASES)
def test_the_edit_acts_on_cached_tokens_too(model: Any, hook: str, temperature: float):
    sae = sae_for(model, hook, token_ids())
    prefix = torch.tensor([0, 85, 70, 84, 85])
    edit = set_features(sae, EDITS)
    found = continuations(
        model, hook, prefix, edit, tokens=30, count=3, temperature=temperature,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    assert torch.equal(found, without_cache(model, hook, prefix, edit, 30, temperature, 4))
    assert not torch.equal(found, without_cache(model, hook, prefix, None, 30, temperature, 4))


@torch.no_grad()
def test_special_tokens_stay_untouched_with_a_cache_too():
    """Of prefix and text written; () edits them as well."""
    hook, end = "transformer.h.0", 0
    prefix = torch.tensor([end, 85, 70, end, 85])
    model = copy.deepcopy(GPT)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight[end] *= 3  # texts end often
    seen: list[Tensor] = []
    handle = model.get_submodule("transformer.h.1").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for special, untouched in ((None, True), ((), False)):
            seen.clear()
            ids = continuations(
                model, hook, prefix, lambda x: torch.full_like(x, 7.0), tokens=30, count=3, temperature=1.0,
                generator=torch.Generator().manual_seed(1), special=special,
            )  # fmt: skip
            edited = (torch.cat(seen, dim=1) == 7).all(-1)
            whole = torch.cat([prefix.repeat(3, 1), ids], dim=1)[:, :-1]
            assert (whole[:, 5:] == end).any() or not untouched
            assert torch.equal(edited, (whole != end) | (not untouched))
    finally:
        handle.remove()


def test_a_text_may_outgrow_the_longest_context():
    hook = "transformer.h.0"
    sae = sae_for(GPT, hook, token_ids())
    prefix = torch.arange(60, 115)
    edit = set_features(sae, EDITS)
    generator = torch.Generator().manual_seed(4)
    found = continuations(GPT, hook, prefix, edit, tokens=20, count=3, temperature=1.0, generator=generator)
    assert torch.equal(found, without_cache(GPT, hook, prefix, edit, 20, 1.0, 4))


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(("model", "hook"), CASES)
def test_a_token_is_run_once(model: Any, hook: str):
    sae, lengths = sae_for(model, hook, token_ids()), []
    handle = model.get_submodule(hook).register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    try:
        options = {"tokens": 6, "count": 2, "temperature": 1.0, "generator": torch.Generator().manual_seed(0)}
        continuations(model, hook, torch.arange(60, 64), set_features(sae, EDITS), **options)
    finally:
        handle.remove()
    assert lengths == [4, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["past_key_values", None])
def test_models_with_an_older_cache_or_none(name: str | None):
    """Equal texts, whatever the model calls its cache, and whether it has one."""

    class Older(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config, self.lengths = GPT, GPT.config, []

        def run(self, ids: Tensor, past: Any, use_cache: bool) -> Any:
            self.lengths.append(ids.shape[1])
            out = self.inner(ids, cache=past, use_cache=use_cache and name is not None)
            return SimpleNamespace(logits=out.logits, past_key_values=out.cache if name else None)

    class Cached(Older):
        def forward(self, ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
            return self.run(ids, past_key_values, use_cache)

    class Uncached(Older):
        def forward(self, ids: Tensor, use_cache: bool = False) -> Any:
            return self.run(ids, None, use_cache)

    hook, model, prefix = "transformer.h.0", Cached() if name else Uncached(), torch.arange(60, 64)
    edit = set_features(sae_for(GPT, hook, token_ids()), EDITS)
    options: dict[str, Any] = {"tokens": 6, "count": 3, "temperature": 1.0}
    found = continuations(model, f"inner.{hook}", prefix, edit, generator=torch.Generator().manual_seed(4), **options)
    assert torch.equal(found, without_cache(GPT, hook, prefix, edit, 6, 1.0, 4))
    assert model.lengths == ([4, 1, 1, 1, 1, 1] if name else [4, 5, 6, 7, 8, 9])


@torch.no_grad()
def test_edits_of_several_features_at_once():
    hook = "transformer.h.0"
    x = activations(GPT, hook, token_ids())
    sae = sae_for(GPT, hook, token_ids())
    f, d = sae.encode(x), sae.W_dec / sae.input_scale
    wanted = x + (2.5 - f[..., 3, None]) * d[3] + 1.5 * d[9] - f[..., 17, None] * d[17]
    torch.testing.assert_close(set_features(sae, EDITS)(x), wanted, rtol=1e-4, atol=1e-5)
    assert effects.feature_values(sae, x, [3, 17]).shape == (5, 40, 2)
    torch.testing.assert_close(effects.feature_values(sae, x, [3, 17]), f[..., [3, 17]])


def test_steered_beside_plain():
    hook = "transformer.h.0"
    sae = sae_for(GPT, hook, token_ids())
    (found, again) = (
        steer(sae, GPT, TOKENIZER, ["the cat", ""], hook, EDITS, tokens=12, samples=2, seed=5) for _ in range(2)
    )
    assert found == again and [item.prompt for item in found] == ["the cat", ""]
    assert found[0].plain != found[0].steered
    for item in found:
        begin = [0, *TOKENIZER(item.prompt)["input_ids"]] if item.prompt else [0]
        for made in (*item.plain, *item.steered):
            ids = torch.tensor([[*begin, *made.token_ids]])
            losses = effects.token_losses(GPT, hook, ids)[0, -12:]
            assert made.nll == pytest.approx(float(losses.mean()), rel=1e-4)
            stop = made.token_ids.index(0) if 0 in made.token_ids else 12
            assert made.text == TOKENIZER.decode(made.token_ids[:stop])
    # Nothing changed: the same random numbers write the same text.
    same = steer(sae, GPT, TOKENIZER, ["the"], hook, [FeatureEdit(3, 0.0, "add")], tokens=12, samples=2)[0]
    assert same.plain == same.steered


def test_a_dictionary_in_training_is_read_in_evaluation():
    hook = "transformer.h.0"
    sae = sae_for(GPT, hook, token_ids(), activation="batchtopk")
    sae.loss(activations(GPT, hook, token_ids()))
    options: dict[str, Any] = {"tokens": 8, "samples": 1, "temperature": 0}
    many = steer(sae.train(), GPT, TOKENIZER, ["the", "cat"], hook, [FeatureEdit(3, 4.0)], **options)
    alone = steer(sae.eval(), GPT, TOKENIZER, ["cat"], hook, [FeatureEdit(3, 4.0)], **options)
    assert many[1] == alone[0]


def test_maxima():
    hook = "transformer.h.0"
    sae = sae_for(GPT, hook, token_ids(), activation="relu", l1_coefficient=1.0)
    found = maxima(sae, GPT, TOKENIZER, documents(), hook, [3, 9], tokens=10**9, context=64)
    highest = np.zeros(2)
    for text in documents():
        ids = TOKENIZER(text)["input_ids"]
        for start in range(0, len(ids), 63):
            x = activations(GPT, hook, torch.tensor([[0, *ids[start : start + 63]]]))[0, 1:]
            highest = np.maximum(highest, sae.encode(x)[:, [3, 9]].detach().numpy().max(0))
    assert list(found) == [3, 9]
    np.testing.assert_allclose(list(found.values()), highest, rtol=1e-4)
    few = maxima(sae, GPT, TOKENIZER, documents(), hook, [3, 9], tokens=10, context=64, batch_size=1)
    assert few != found


def test_what_a_config_means():
    config = SteerConfig(features=(3, 9), multiple=2.0)
    assert config.needs_maxima and config.edits({3: 1.5, 9: 4.0}) == [FeatureEdit(3, 3.0), FeatureEdit(9, 8.0)]
    assert SteerConfig(features=(3,), value=-2.0, mode="add").edits() == [FeatureEdit(3, -2.0, "add")]
    assert SteerConfig(features=(3,), mode="ablate").edits() == [FeatureEdit(3, mode="ablate")]
    with pytest.raises(FastSAEError, match="feature 9 did not fire"):
        config.edits({3: 1.5, 9: 0.0})
    for fields, message in (
        ({}, "features to edit"),
        ({"features": (1,), "tokens": 0}, "tokens must be at least 1"),
        ({"features": (1,), "temperature": -1.0}, "temperature must be 0 or more"),
        ({"features": (1,), "prompts": ()}, "expected prompts"),
    ):
        with pytest.raises(FastSAEError, match=message):
            SteerConfig(**fields)


def test_edits_that_cannot_be_meant():
    sae = SAE(d_in=16, d_sae=30, k=5)
    with pytest.raises(FastSAEError, match="one of add, pin, ablate, got 'push'"):
        FeatureEdit(3, 1.0, "push")  # type: ignore[arg-type]
    with pytest.raises(FastSAEError, match="finite number, got nan"):
        FeatureEdit(3, math.nan)
    with pytest.raises(FastSAEError, match="ablate sets to 0"):
        FeatureEdit(3, 1.0, "ablate")
    with pytest.raises(FastSAEError, match="from 0 to 29, got 30"):
        set_features(sae, [FeatureEdit(30)])
    with pytest.raises(FastSAEError, match="no feature twice"):
        set_features(sae, [FeatureEdit(3), FeatureEdit(3)])
    with pytest.raises(FastSAEError, match="no begin-of-text token"):
        steer(sae, GPT, tiny_lm.tokenizer(bos=False), [""], "transformer.h.0", [FeatureEdit(3)])
    with pytest.raises(FastSAEError, match="no module 'h.7'"):
        steer(sae, GPT, TOKENIZER, ["a"], "h.7", [FeatureEdit(3)])
    wide = SAE(d_in=17, d_sae=30, k=5)
    with pytest.raises(FastSAEError, match="width 17"):
        steer(wide, GPT, TOKENIZER, ["a"], "transformer.h.0", [FeatureEdit(3)])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hook = "transformer.h.0"
    sae = sae_for(GPT, hook, token_ids())
    sae.save_pretrained(tmp_path / "sae")
    GPT.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(200)), encoding="utf-8")
    argv = ["steer", "--sae", str(tmp_path / "sae"), "--model", str(tmp_path / "model"), "--hook", hook]
    argv += ["--features", "3", "9", "--tokens", "6", "--samples", "2", "--prompts", "the cat", "a dog"]
    assert main([*argv, "--value", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["edits"] == [{"feature": f, "value": 4.0, "mode": "pin"} for f in (3, 9)]
    wanted = steer(sae, GPT, TOKENIZER, ["the cat", "a dog"], hook, [FeatureEdit(3, 4.0), FeatureEdit(9, 4.0)],
                   tokens=6, samples=2)  # fmt: skip
    assert [p["steered"][0]["token_ids"] for p in found["prompts"]] == [w.steered[0].token_ids for w in wanted]
    assert main([*argv, "--multiple", "2", "--text", str(text)]) == 0
    shown = capsys.readouterr().out
    assert "feature 3: pin" in shown and "(maximum " in shown and "prompt: 'a dog'" in shown
    assert main([*argv[:7], "--features", "99", "--value", "1"]) == 2
    assert capsys.readouterr().err.strip() == "fastsae: features must be numbers from 0 to 29, got 99"
    assert main(argv[:7]) == 2
    assert "expected features to edit" in capsys.readouterr().err
