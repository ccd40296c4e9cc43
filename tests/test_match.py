"""Two runs compared in a stream, against correlations of dense columns that the model's own parts give."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fastsae.analysis import specificity
from fastsae.analysis.cross import FeatureSums, add_products, entries, pearson, row_blocks, sample_of
from fastsae.analysis.logit_map import logit_map
from fastsae.analysis.stream import Source
from fastsae.analysis.text import scoring_half
from fastsae.analysis.universality import Match, match, shuffled
from fastsae.codes import SparseCode
from fastsae.errors import FastSAEError
from fastsae.sae import SAE
from tests import analysis_case as case

HOOK, TEXTS = case.HOOK, case.documents()


def run(a: Source, b: Source, tokenizer: Any, **options: Any) -> Match:
    settings: dict[str, Any] = {"context": 33, "batch_size": 4, "show_progress": False, "shuffled_control": False}
    settings |= {"min_fires": 5, "logit_contexts": 2} | options
    return match(a, b, tokenizer, TEXTS, **settings)


def dense(sae: SAE, model: Any, tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(activations [n, F], neurons [n, D], is the token in the scoring half [n]), without the stream."""
    halves = scoring_half(TEXTS)
    x, scoring = [], []
    for text, half in zip(TEXTS, halves, strict=True):
        rows = case.contexts(tokenizer, [text], 33)
        x.append(case.neurons(model, rows))
        scoring += [half] * len(x[-1])
    x = torch.cat(x)
    with torch.no_grad():
        return sae.encode(x).double().numpy(), x.double().numpy(), np.array(scoring)


def correlations(f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """[A, B], 0 where a column is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.corrcoef(f.T, g.T)[: f.shape[1], f.shape[1] :])


@pytest.mark.parametrize("least", [5, 300])  # the second leaves out features that are the best match of others
def test_every_figure_is_that_of_dense_columns(least):
    sae_a, model_a, tokenizer = case.case(0)
    sae_b, model_b, _ = case.case(1)
    found = run(Source(sae_a, model_a, HOOK), Source(sae_b, model_b, HOOK), tokenizer, min_fires=least)
    (f, x, scoring), (g, y, _) = dense(sae_a, model_a, tokenizer), dense(sae_b, model_b, tokenizer)
    live, few = (f > 0).sum(0) >= least, (g > 0).sum(0) < least
    assert found.tokens == len(f) and not found.sampled and 5 < live.sum()
    np.testing.assert_array_equal(found.fires, (f > 0).sum(0))
    r = correlations(f, g)
    r[:, few] = -1
    np.testing.assert_array_equal(found.best, np.where(live, r.argmax(1), -1))
    np.testing.assert_allclose(found.pearson, np.where(live, r.max(1), np.nan), atol=1e-6)
    chosen = correlations(f[~scoring], g[~scoring])
    chosen[:, few] = -1
    held_out = correlations(f[scoring], g[scoring])[np.arange(40), chosen.argmax(1)]
    np.testing.assert_allclose(found.held_out, np.where(live, held_out, np.nan), atol=1e-6)
    assert found.assigned is not None and found.assigned_pearson is not None
    rows, columns = linear_sum_assignment(-r[live][:, ~few])
    assert float(found.assigned_pearson.nansum()) == pytest.approx(r[live][:, ~few][rows, columns].sum(), abs=1e-5)
    partners = found.assigned[found.assigned >= 0]
    assert len(partners) == len(set(partners.tolist())) == min(live.sum(), (~few).sum())
    neurons, picked = correlations(x, y), correlations(x[~scoring], y[~scoring]).argmax(1)
    varies = x.std(0) > 0
    assert found.neurons is not None and found.neurons_held_out is not None
    np.testing.assert_allclose(found.neurons, np.where(varies, neurons.max(1), np.nan), atol=1e-6)
    held_out = correlations(x[scoring], y[scoring])[np.arange(24), picked]
    np.testing.assert_allclose(found.neurons_held_out, np.where(varies, held_out, np.nan), atol=1e-6)
    cosine = [
        np.dot(p, q) / np.linalg.norm(p) / np.linalg.norm(q)
        for p, q in zip(sae_a.W_dec.detach().numpy(), sae_b.W_dec.detach().numpy()[found.best], strict=True)
    ]
    assert found.decoder_cosine is not None
    np.testing.assert_allclose(found.decoder_cosine, np.where(live, cosine, np.nan), atol=1e-5)
    assert found.medians()["pearson"] == pytest.approx(np.median(r.max(1)[live]), abs=1e-6)


def permuted(sae: SAE, order: torch.Tensor, scale: torch.Tensor, extra: int = 0) -> SAE:
    """Latent i is order[i]'s of the other, times scale[i], with as many dead ones more."""
    F = len(order) + extra
    copy = SAE(d_in=sae.cfg.d_in, d_sae=F, activation="relu")
    with torch.no_grad():
        copy.encoder.weight.zero_()
        copy.encoder.bias.fill_(-1.0)
        copy.encoder.weight[: len(order)] = sae.encoder.weight[order] * scale[:, None]
        copy.encoder.bias[: len(order)] = sae.encoder.bias[order] * scale
        copy.W_dec[: len(order)] = sae.W_dec[order] / scale[:, None]
        copy.b_dec.copy_(sae.b_dec)
    copy.set_input_normalisation(None, float(sae.input_scale))
    return copy


@pytest.mark.parametrize("extra", [0, 7])
def test_a_permuted_and_scaled_dictionary_is_matched_exactly(extra):
    sae, model, tokenizer = case.case()
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(40, generator=generator)
    other = permuted(sae, order, torch.rand(40, generator=generator) + 0.5, extra)
    found = run(Source(sae, model, HOOK), Source(other, model, HOOK), tokenizer)
    live = found.live
    assert int(live.sum()) > 5 and found.assigned is not None and found.logit_pearson is not None
    assert found.decoder_cosine is not None
    assert torch.equal(found.best[live], order.argsort()[live]) and torch.equal(found.assigned, found.best)
    for measure in (found.pearson, found.logit_pearson, found.decoder_cosine, found.held_out):
        torch.testing.assert_close(measure[live], torch.ones_like(measure[live]), atol=1e-3, rtol=0)
        assert measure[~live].isnan().all()
    assert found.neurons is None  # the same module of the same model: each would match itself


def test_widths_of_models_may_differ():
    """Another module of the same model, of another width: no decoder cosine, the rest stands."""
    sae, model, tokenizer = case.case()
    narrow = SAE(d_in=16, d_sae=20, activation="relu", seed=1)
    found = run(Source(sae, model, HOOK), Source(narrow, model, "transformer.h.0"), tokenizer)
    assert found.decoder_cosine is None and found.medians()["decoder_cosine"] is None
    assert found.neurons is not None and len(found.neurons) == 24
    assert found.logit_pearson is not None and found.logit_pearson[found.live].isfinite().all()


def test_a_shared_model_runs_once():
    sae, model, tokenizer = case.case()
    calls = []
    handle = model.get_submodule(HOOK).register_forward_hook(lambda *_: calls.append(1))
    run(Source(sae, model, HOOK), Source(SAE(d_in=24, d_sae=9, k=3), model, HOOK), tokenizer, logit_contexts=0)
    handle.remove()
    assert len(calls) == -(-len(case.contexts(tokenizer, TEXTS, 33)) // 4)


def test_too_little_memory_takes_a_sample_and_says_so():
    sae, model, tokenizer = case.case()
    a = Source(sae, model, HOOK)
    whole = run(a, a, tokenizer, logit_contexts=0)
    part = run(a, a, tokenizer, logit_contexts=0, memory=16 * 40 * 12 / 2**30)
    assert part.sampled and len(part.features) == 12 and torch.equal(part.features, part.features.unique())
    torch.testing.assert_close(part.pearson, whole.pearson[part.features], equal_nan=True)
    assert torch.equal(part.best, whole.best[part.features])
    with pytest.raises(FastSAEError, match="raise memory"):
        run(a, a, tokenizer, memory=1e-9)
    assert torch.equal(sample_of(10, 8, 40 / 2**30, 0), sample_of(10, 8, 40 / 2**30, 0))


def test_the_control_is_a_dictionary_on_the_shuffled_model():
    sae, model, tokenizer = case.case()
    source = Source(sae, model, HOOK)
    found = run(source, source, tokenizer, shuffled_control=True, seed=4)
    (f, _, _), (g, _, _) = dense(sae, model, tokenizer), dense(sae, shuffled(model, 4), tokenizer)
    r = correlations(f, g)
    r[:, (g > 0).sum(0) < 5] = -1
    assert found.control is not None
    np.testing.assert_allclose(found.control[found.live], r.max(1)[found.live], atol=1e-6)
    medians = found.medians()
    assert medians["pearson"] == pytest.approx(1, abs=1e-6)
    assert medians["control"] is not None and medians["control"] < 0.9
    given = match(
        source, source, tokenizer, TEXTS, control=Source(sae, shuffled(model, 4), HOOK), context=33, min_fires=5,
        logit_contexts=0, show_progress=False,
    )  # fmt: skip
    assert given.control is not None
    torch.testing.assert_close(given.control, found.control, equal_nan=True)


def test_shuffled_keeps_the_entries_of_every_matrix_and_everything_else():
    _, model, _ = case.case()
    control = shuffled(model, 1)
    for (name, old), new in zip(model.named_parameters(), control.parameters(), strict=True):
        if old.ndim < 2:
            assert torch.equal(old, new), name
        else:
            assert not torch.equal(old, new) and torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    assert control.lm_head.weight is control.transformer.wte.weight
    assert torch.equal(shuffled(model, 1).lm_head.weight, control.lm_head.weight)
    assert not torch.equal(shuffled(model, 2).lm_head.weight, control.lm_head.weight)


@torch.no_grad()
def paper_weights(sae: SAE, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[F, V]: d · W_down · (mean removal, scale of the norm at each token) · W_unembed, with the norm's derivative."""
    block, final = model.transformer.h[0], model.transformer.ln_f
    inner = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
    inner = inner + block.attn(block.ln_1(inner))[0]
    inner = inner + block.mlp(block.ln_2(inner))  # what ln_f reads
    stream = model.transformer(ids).last_hidden_state
    torch.testing.assert_close(final(inner)[mask], stream[mask], atol=1e-4, rtol=1e-4)
    inner = inner[mask].double()  # [n, 16]
    d = (sae.W_dec / sae.input_scale).double() @ block.mlp.c_proj.weight.double()  # [F, 16]
    scale = (inner.var(1, unbiased=False) + final.eps).rsqrt()  # [n]
    normal = (inner - inner.mean(1, keepdim=True)) * scale[:, None]
    flat = d - d.mean(1, keepdim=True)
    change = flat[:, None] - normal * (flat @ normal.T / 16)[..., None]  # [F, n, 16]
    weights = (change * scale[:, None]).mean(1) * final.weight.double() @ model.lm_head.weight.double().T
    return weights - weights.median(1, keepdim=True).values


def text_contexts(tokenizer: Any, texts: list[str], context: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts cut to `length` tokens, and which of them are text, the begin-of-text token being none."""
    rows = [row[:length] for row in case.contexts(tokenizer, texts, context)]
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, 1 : len(row)] = torch.tensor(row), 1
    return ids, mask.bool()


def test_logit_weights_are_those_of_the_papers_formula():
    sae, model, tokenizer = case.case()
    ids, mask = text_contexts(tokenizer, TEXTS[:6], 33, 33)
    assert len(set(mask.sum(1).tolist())) > 1  # contexts of several lengths
    wanted = paper_weights(sae, model, ids, mask)
    some = torch.tensor([3, 0, 39])
    weights = logit_map(model, HOOK, ids, mask).of_features(sae, some).double()
    torch.testing.assert_close(weights, wanted[some], atol=1e-4 * float(wanted.abs().max()), rtol=0)


def test_matches_are_compared_by_the_papers_logit_weights():
    sae_a, model_a, tokenizer = case.case(0)
    sae_b, model_b, _ = case.case(1)
    found = run(Source(sae_a, model_a, HOOK), Source(sae_b, model_b, HOOK), tokenizer, logit_contexts=10_000)
    ids, mask = text_contexts(tokenizer, TEXTS, 33, 32)  # all contexts are in the sample, each cut to 32 tokens
    a, b = paper_weights(sae_a, model_a, ids, mask), paper_weights(sae_b, model_b, ids, mask)
    wanted = [np.corrcoef(a[f], b[g])[0, 1] if g >= 0 else np.nan for f, g in enumerate(found.best.tolist())]
    assert found.logit_pearson is not None and int(np.isfinite(wanted).sum()) > 5
    np.testing.assert_allclose(found.logit_pearson, wanted, atol=1e-4)


def test_a_model_without_logits_is_told_before_the_pass():
    from transformers import GPT2Model

    sae, model, tokenizer = case.case()
    calls = []
    handle = model.get_submodule(HOOK).register_forward_hook(lambda *_: calls.append(1))
    bare = GPT2Model(model.config)
    sources = Source(sae, model, HOOK), Source(sae, bare, "h.0.mlp.act")
    with pytest.raises(FastSAEError, match="GPT2Model has none"):
        run(*sources, tokenizer)
    assert not calls
    assert run(*sources, tokenizer, logit_contexts=0).logit_pearson is None
    handle.remove()


def test_products_of_sparse_codes(monkeypatch):
    from fastsae.analysis import cross

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.relu(torch.randn(200, size, generator=generator) - 0.8) for size in (7, 11))
    a[50:60] = b[55:70] = 0  # tokens on which nothing is active
    for pairs in (2**22, 5, 1):
        monkeypatch.setattr(cross, "_PAIRS", pairs)
        out = torch.zeros(7, 11, dtype=torch.float64)
        add_products(out, entries(SparseCode.from_dense(a)), entries(SparseCode.from_dense(b)))
        torch.testing.assert_close(out, a.double().T @ b.double())


def test_rare_and_weak_features_correlate_too():
    """On 2 of a million tokens at 1e-4: a variance of 1e-14, and r = 1 with itself."""
    f = torch.zeros(1_000_000, 1)
    f[[5, 700_000]] = 1e-4
    code = entries(SparseCode.from_dense(f))
    sums, xy = FeatureSums(1), torch.zeros(1, 1, dtype=torch.float64)
    sums.add(code)
    add_products(xy, code, code)
    assert float(pearson(xy, sums, sums)) == pytest.approx(1)
    moments = (float(each) for each in (sums.total, sums.squares, sums.total, sums.squares, xy))
    assert float(specificity.pearson(sums.n, *moments)) == pytest.approx(1)  # numpy's twin draws the line there too


def test_a_match_is_json_and_back(tmp_path):
    sae, model, tokenizer = case.case()
    source = Source(sae, model, HOOK)
    found = run(source, source, tokenizer)
    found.save(tmp_path / "match.json")
    again = Match.load(tmp_path / "match.json")
    assert again.to_dict() == found.to_dict()
    assert "NaN" not in (tmp_path / "match.json").read_text()
    (tmp_path / "other.json").write_text(json.dumps({"tokens": 3}))
    with pytest.raises(FastSAEError, match="expected a file that `fastsae match` wrote"):
        Match.load(tmp_path / "other.json")


def test_bad_input_is_one_line():
    sae, model, tokenizer = case.case()
    source = Source(sae, model, HOOK)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("did you mean min_fires", {"min_fire": 3}),
        ("min_fires must be at least 1", {"min_fires": 0}),
        ("tokens must be at least 1", {"tokens": 0}),
        ("memory must be more than 0", {"memory": 0.0}),
    ]
    for message, options in cases:
        with pytest.raises(FastSAEError, match=message) as caught:
            run(source, source, tokenizer, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(FastSAEError, match="at least 2 documents"):
        match(source, source, tokenizer, TEXTS[:1], show_progress=False)


def test_rows_are_compared_block_by_block(monkeypatch):
    from fastsae.analysis import cross

    sae_a, model_a, tokenizer = case.case(0)
    sae_b, model_b, _ = case.case(1)
    sources = Source(sae_a, model_a, HOOK), Source(sae_b, model_b, HOOK)
    whole = run(*sources, tokenizer)
    monkeypatch.setattr(cross, "row_blocks", lambda count: row_blocks(count, 7))
    assert run(*sources, tokenizer).to_dict() == whole.to_dict()


def test_the_verb_writes_the_match(tmp_path, capsys):
    from fastsae import cli

    sae, model, tokenizer = case.case()
    for name, network in (("lm", model), ("other", case.case(1)[1])):
        network.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sae.save_pretrained(tmp_path / "sae")
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(TEXTS * 9))
    )
    argv = [
        "match",
        "--sae",
        str(tmp_path / "sae"),
        "--other-sae",
        str(tmp_path / "sae"),
        "--model",
        str(tmp_path / "lm"),
    ]
    argv += ["--hook", HOOK, "--text", str(folder), "--context", "33", "--min-fires", "3", "--logit-contexts", "2"]
    capsys.readouterr()
    assert cli.main([*argv, "--out", str(tmp_path / "same"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["median pearson"] == pytest.approx(1, abs=1e-6) and shown["median control"] < 0.95
    assert shown["median neurons"] is None and shown["live"] > 5
    assert Match.load(tmp_path / "same" / "match.json").tokens == shown["tokens"]
    assert cli.main([*argv, "--other-model", str(tmp_path / "other"), "--out", str(tmp_path / "two"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["median neurons"] > 0
    assert cli.main([*argv, "--other-hook", "transformer.h.9", "--out", str(tmp_path / "bad")]) == 2
    assert "did you mean" in capsys.readouterr().err
