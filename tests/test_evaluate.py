"""Evaluation: dictionaries whose scores are known, and each figure against its definition."""

import json
from typing import Any

import pytest
import tiny_lm
import torch

import fastsae
from fastsae import SAE, FastSAEError
from fastsae.contexts import context_batches
from fastsae.evaluate import EvalResult, density_histogram
from fastsae.hooks import capture

HOOK, D = "transformer.h.0.mlp", 16
TOKENIZER = tiny_lm.tokenizer()
MODEL = tiny_lm.trained()
END = TOKENIZER.eos_token_id
DOCUMENTS = tiny_lm.documents(40, seed=5)


def run(sae: Any, **options: Any) -> EvalResult:
    settings: dict[str, Any] = {"documents": DOCUMENTS, "hook": HOOK, "context": 32, "batch_size": 4, "tokens": 2000}
    settings |= {"show_progress": False} | options
    return fastsae.evaluate(sae, MODEL, TOKENIZER, **settings)


def perfect() -> SAE:
    """Each coordinate and its negative has a latent: x̂ = x."""
    sae = SAE(d_in=D, d_sae=2 * D, activation="relu", max_l0=2 * D)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def constant(value: torch.Tensor) -> SAE:
    """Nothing fires: x̂ = value."""
    sae = SAE(d_in=D, d_sae=8, activation="relu")
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(value)
    return sae


def activations() -> torch.Tensor:
    """Of the text tokens that a run with the settings above scores, [N, D]."""
    rows = []
    for batch in context_batches(TOKENIZER, DOCUMENTS, 32, 4):
        with torch.no_grad(), capture(MODEL, HOOK) as outputs:
            MODEL(batch.token_ids)
        rows.append(outputs[0][batch.keep])
    return torch.cat(rows)


X = activations()


def test_a_perfect_dictionary_loses_nothing():
    result = run(perfect(), tokens=10**6)
    assert result.tokens == len(X) == sum(len(TOKENIZER(text).input_ids) for text in DOCUMENTS)
    assert result.fve == pytest.approx(1) and result.mse == pytest.approx(0, abs=1e-8)
    assert result.ce_spliced == pytest.approx(result.ce_raw, abs=1e-5)
    assert result.recovered_zero == pytest.approx(1, abs=1e-4) == result.recovered_mean
    assert result.l0 == pytest.approx(D)
    assert result.dead == float(torch.cat([(X <= 0).all(0), (X >= 0).all(0)]).float().mean())
    torch.testing.assert_close(result.density[:D], (X > 0).float().mean(0))
    assert abs(result.ce_zero - result.ce_raw) > 0.01  # or the rest would say nothing


def test_a_dictionary_of_zero_or_the_mean_is_the_ablation():
    zero = run(constant(torch.zeros(D)), tokens=10**6)
    assert zero.ce_spliced == pytest.approx(zero.ce_zero, abs=1e-6)
    assert zero.l0 == 0 and zero.dead == 1
    assert zero.mse == pytest.approx(float(X.square().sum(1).mean()), rel=1e-5)
    mean = run(constant(X.mean(0)), tokens=10**6)
    assert mean.ce_spliced == pytest.approx(mean.ce_mean, abs=1e-5)
    assert mean.fve == pytest.approx(0, abs=1e-5)
    assert mean.ce_raw == zero.ce_raw and mean.ce_zero == zero.ce_zero


def test_cross_entropies_are_the_models():
    """Over all text tokens given those before them, and the ablations leave begin- and end-of-text alone."""
    result = run(perfect(), tokens=10**6)
    nats = {"raw": 0.0, "zero": 0.0}
    n = 0
    for batch in context_batches(TOKENIZER, DOCUMENTS, 32, 4):
        keep = batch.keep[:, :, None]
        for name in nats:
            handle = MODEL.get_submodule(HOOK).register_forward_hook(
                lambda _m, _i, x, name=name, keep=keep: torch.where(keep, 0.0, x) if name == "zero" else x
            )
            with torch.no_grad():
                logits = MODEL(batch.token_ids).logits.log_softmax(-1)
            handle.remove()
            picked = logits[:, :-1].gather(2, batch.token_ids[:, 1:, None]).squeeze(2)
            nats[name] -= float(picked[batch.keep[:, 1:]].sum())
        n += int(batch.keep[:, 1:].sum())
    assert result.ce_raw == pytest.approx(nats["raw"] / n, rel=1e-5)
    assert result.ce_zero == pytest.approx(nats["zero"] / n, rel=1e-5)


def test_kl_is_from_the_model_to_the_spliced_model():
    """Against scipy's relative entropy of both distributions, over the tokens that the cross-entropies are of."""
    from scipy.special import rel_entr

    result, nats, n = run(constant(X.mean(0)), tokens=10**6), 0.0, 0
    for batch in context_batches(TOKENIZER, DOCUMENTS, 32, 4):
        keep, p = batch.keep[:, :, None], []
        for splice in (False, True):
            handle = MODEL.get_submodule(HOOK).register_forward_hook(
                lambda _m, _i, x, splice=splice, keep=keep: torch.where(keep, X.mean(0), x) if splice else x
            )
            with torch.no_grad():
                p.append(MODEL(batch.token_ids).logits[:, :-1].double().softmax(-1)[batch.keep[:, 1:]].numpy())
            handle.remove()
        nats, n = nats + rel_entr(*p).sum(), n + len(p[0])
    assert result.kl == pytest.approx(nats / n, rel=1e-4) and result.kl > 0.01
    assert run(perfect(), tokens=10**6).kl == pytest.approx(0, abs=1e-6)


def test_recovered_is_its_definition():
    torch.manual_seed(0)
    sae = fastsae.train(X, d_sae=32, k=4, batch_size=64, tokens=64 * 100, lr=1e-2, show_progress=False)
    r = run(sae)
    assert r.recovered_zero == pytest.approx((r.ce_zero - r.ce_spliced) / (r.ce_zero - r.ce_raw))
    assert r.recovered_mean == pytest.approx((r.ce_mean - r.ce_spliced) / (r.ce_mean - r.ce_raw))
    assert 0 < r.fve < 1 and 0 < r.l0 <= 4


def test_figures_are_those_of_the_dictionary_on_the_same_rows():
    torch.manual_seed(0)
    sae = fastsae.train(X, d_sae=32, k=4, batch_size=64, tokens=64 * 100, lr=1e-2, show_progress=False)
    result = run(sae, tokens=10**6)
    with torch.no_grad():
        f, x_hat = sae.encode(X), sae(X)
    error = (x_hat - X).double().square().sum(1)
    assert result.mse == pytest.approx(float(error.mean()), rel=1e-4)
    assert result.fve == pytest.approx(float(1 - error.sum() / (X - X.mean(0)).square().sum()), rel=1e-4)
    assert result.nmse == pytest.approx(float(error.sum() / X.double().square().sum()), rel=1e-4)
    assert result.l0 == pytest.approx(float((f > 0).sum(1).float().mean()))
    assert result.l1 == pytest.approx(float(f.sum(1).double().mean()), rel=1e-5)
    torch.testing.assert_close(result.density, (f > 0).float().mean(0))
    assert result.dead == pytest.approx(float((result.density == 0).float().mean()))


def test_a_code_too_dense_for_the_sparse_path_is_scored_the_same():
    sparse, dense = perfect(), SAE(d_in=D, d_sae=2 * D, activation="relu", max_l0=2)
    dense.load_state_dict(sparse.state_dict())
    a, b = run(sparse), run(dense)
    assert b.l0 == a.l0 and torch.equal(a.density, b.density)
    assert b.l1 == pytest.approx(a.l1) and b.kl == pytest.approx(a.kl, abs=1e-6)
    assert b.fve == pytest.approx(a.fve) and b.ce_spliced == pytest.approx(a.ce_spliced, abs=1e-6)


def test_the_mean_can_come_from_elsewhere():
    zeros = run(perfect(), mean=torch.zeros(D))
    assert zeros.ce_mean == pytest.approx(zeros.ce_zero)


def test_skipped_tokens_are_neither_scored_nor_replaced():
    result = run(constant(torch.zeros(D)), skip_first=31)
    assert result.tokens < 2000 / 20
    assert abs(result.ce_zero - result.ce_raw) < abs(run(constant(torch.zeros(D))).ce_zero - result.ce_raw)


def test_tokens_bounds_the_work():
    assert 500 <= run(perfect(), tokens=500).tokens <= 500 + 31


def test_a_folder_does_for_an_sae_and_modes_are_restored(tmp_path):
    sae = perfect()
    sae.save_pretrained(tmp_path)
    sae.train()
    MODEL.train()
    try:
        assert run(str(tmp_path), packing="cut").fve == pytest.approx(run(sae, packing="cut").fve)
        assert sae.training and MODEL.training
    finally:
        MODEL.eval()


def test_a_result_is_json():
    result = run(perfect())
    values = json.loads(json.dumps(result.to_dict()))
    assert set(values) == {
        *("tokens", "mse", "fve", "nmse", "l0", "l1", "dead", "ce_raw", "ce_spliced", "ce_zero", "ce_mean"),
        *("recovered_zero", "recovered_mean", "kl", "histogram", "histogram_edges"),
    }
    assert sum(values["histogram"]) == int((result.density > 0).sum()) > D


def test_density_histogram():
    density = torch.tensor([0, 1e-4, 1e-3, 1.1e-3, 0.02, 0.5, 1.0])
    counts, edges = density_histogram(density, tokens=10_000)
    assert len(edges) == len(counts) + 1 and (edges[0], edges[-1]) == (-4.0, 0.0)
    assert sum(counts) == 6
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        logs = density[1:].double().log10() + 1e-6
        assert count == int(((logs >= low) & ((logs < high) | (high == 0))).sum())
    assert density_histogram(torch.zeros(3), 10) == ([0, 0, 0, 0], [-1.0, -0.75, -0.5, -0.25, 0.0])


def test_bad_input_is_one_clear_line(tmp_path):
    narrow = SAE(d_in=D + 1, d_sae=8, k=2)
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        (r"reads activations of width 17, transformer.h.0.mlp puts out", narrow, {}),
        ("did you mean 'transformer.h.0.mlp", perfect(), {"hook": "transformer.h.0.mpl"}),
        ("expected text, found none", perfect(), {"documents": [""]}),
        ("too little to predict", perfect(), {"documents": ["a"], "skip_first": 5}),
        ("tokens must be at least 1", perfect(), {"tokens": 0}),
        ("did you mean tokens", perfect(), {"token": 9}),
        ("at most 64 tokens", perfect(), {"context": 100}),
        ("nowhere", tmp_path / "nowhere", {}),
    ]
    for message, sae, options in cases:
        with pytest.raises(FastSAEError, match=message) as caught:
            run(sae, **options)
        assert "\n" not in str(caught.value)


def test_activations_that_are_not_finite_are_refused():
    model = tiny_lm.model()
    model.transformer.h[0].mlp.c_proj.bias.data[3] = float("inf")
    with pytest.raises(FastSAEError, match="must be finite"):
        fastsae.evaluate(perfect(), model, TOKENIZER, DOCUMENTS, HOOK, context=32, show_progress=False)
