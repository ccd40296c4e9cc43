"""Hooks: modules found by name, their output read and replaced, the forward pass cut short."""

import pytest
import tiny_lm
import torch
from torch import nn

from fastsae.errors import FastSAEError
from fastsae.hooks import capture, find_module, replace

IDS = torch.arange(10).view(2, 5)


def test_a_wrong_path_offers_near_names():
    model = tiny_lm.model()
    assert find_module(model, "transformer.h.1.mlp.act") is model.transformer.h[1].mlp.act
    with pytest.raises(
        FastSAEError, match="no module 'transformer.h.1.mlp.akt': did you mean 'transformer.h.1.mlp.act'"
    ):
        find_module(model, "transformer.h.1.mlp.akt")
    with pytest.raises(FastSAEError, match="'transformer.h.0.mlp.act'"):
        find_module(model, "h.0.mlp.act")
    with pytest.raises(FastSAEError, match="did you mean"):
        find_module(model, "")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("blocks.1.hook_resid_post", "transformer.h.1"),
        ("blocks.1.hook_resid_pre", "transformer.h.0"),
        ("blocks.0.mlp.hook_post", "transformer.h.0.mlp.act"),
        ("blocks.1.hook_mlp_out", "transformer.h.1.mlp"),
        ("blocks.0.hook_attn_out", "transformer.h.0.attn"),
    ],
)
def test_hook_points_of_transformer_lens(name, path):
    model = tiny_lm.model()
    assert find_module(model, name) is model.get_submodule(path)


def test_a_hook_point_that_no_module_puts_out():
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"gate_proj": nn.Linear(2, 2), "act_fn": nn.SiLU()})})
    with pytest.raises(FastSAEError, match=r"gated MLP: hook layers.0.mlp"):
        find_module(nn.ModuleDict({"layers": nn.ModuleList([block])}), "blocks.0.mlp.hook_post")
    with pytest.raises(FastSAEError, match="no module"):
        find_module(tiny_lm.model(), "blocks.7.hook_resid_post")


def test_capture_reads_tensors_and_first_elements_of_tuples():
    model = tiny_lm.model()
    with (
        torch.no_grad(),
        capture(model, "transformer.h.1.attn") as tuples,
        capture(model, "transformer.h.1") as blocks,
    ):
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert tuples[0].shape == (2, 5, 16)
    assert len(blocks) == 1
    torch.testing.assert_close(model.transformer.ln_f(blocks[0]), hidden[-1])


def test_stop_runs_nothing_behind_the_module():
    model, ran = tiny_lm.model(), []
    model.transformer.h[1].register_forward_hook(lambda *_: ran.append("h.1"))
    model.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    with capture(model, "transformer.h.0.mlp.act", stop=True) as outputs:
        model(IDS)
        pytest.fail("the forward pass came back")
    assert outputs[0].shape == (2, 5, 24)
    assert ran == []
    model(IDS)
    assert ran == ["h.1", "lm_head"]


def test_an_error_inside_removes_the_hook():
    model = tiny_lm.model()
    with pytest.raises(RuntimeError, match="mine"), capture(model, "transformer.h.0"):
        raise RuntimeError("mine")
    assert not model.transformer.h[0]._forward_hooks


@pytest.mark.parametrize("path", ["transformer.h.0.mlp.act", "transformer.h.0", "transformer.h.0.attn", "transformer"])
def test_replace_exchanges_the_output_and_keeps_the_rest(path):
    model = tiny_lm.model()
    with torch.no_grad():
        before = model(IDS).logits
        with replace(model, path, lambda x: x):
            torch.testing.assert_close(model(IDS).logits, before)
        with replace(model, path, torch.zeros_like), capture(model, path) as outputs:
            changed = model(IDS).logits
        assert not outputs[0].any()
        assert not torch.allclose(changed, before)
        torch.testing.assert_close(model(IDS).logits, before)


def test_replace_refuses_another_shape():
    model = tiny_lm.model()
    with (
        replace(model, "transformer.h.0", lambda x: x[:1]),
        pytest.raises(FastSAEError, match=r"must have shape \[2, 5"),
    ):
        model(IDS)


def test_an_output_without_tensors_is_refused():
    class Nothing(nn.Module):
        def forward(self, x):
            return {"no": None}

    model = nn.Sequential(Nothing())
    with capture(model, "0"), pytest.raises(FastSAEError, match="holds no tensor"):
        model(IDS)
