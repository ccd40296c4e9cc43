"""TrainStep against autograd and torch's own optimizers, from the same start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import SAE, FastSAEError, TrainStep
from fastsae.optim import DecoderNorm, clip_gradients_
from fastsae.row_adam import AdamOptions, RowAdam

D, F, N = 12, 80, 32
RULES: list[dict[str, Any]] = [
    {"activation": "topk", "k": 5, "aux_coefficient": 0.0},
    {"activation": "topk", "k": 5, "dead_after_tokens": 3 * N, "k_aux": 4},
    {"activation": "batchtopk", "k": 4, "dead_after_tokens": 3 * N, "k_aux": 4},
    {"activation": "relu", "l1_coefficient": 0.3},
    {"activation": "relu", "l1_coefficient": 0.3, "l1_weighting": "decoder_norm", "decoder_norm": "free"},
    {"activation": "relu", "l1_coefficient": 0.3, "l1_weighting": "plain", "max_l0": 2},  # too dense for slots
    {"activation": "jumprelu", "l0_coefficient": 0.05, "bandwidth": 0.5, "init_threshold": 0.3},
    {"activation": "topk", "k": 5, "apply_b_dec_to_input": False, "decoder_norm": "free"},
]


def batches(count: int, n: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gen = torch.Generator().manual_seed(7)
    atoms = torch.randn(F // 2, D, generator=gen)
    return [((torch.rand(n, F // 2, generator=gen) < 0.1).float() @ atoms).to(dtype) for _ in range(count)]


def make(options: dict[str, Any], **more: Any) -> SAE:
    sae = SAE(d_in=D, d_sae=F, **{**options, **more})
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.2, 0.2, D))
    return sae


def by_autograd(sae: SAE, xs: list[Tensor], optimizer: Any, clip: float = 0.0) -> list[float]:
    norm, losses = DecoderNorm(sae), []
    for x in xs:
        loss = sae.loss(x).loss
        loss.backward()
        norm.project_gradient_()
        if clip:
            clip_gradients_(sae.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norm.renormalise_()
        losses.append(float(loss.detach()))
    return losses


def same(a: SAE, b: SAE, **tolerance: Any) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("options", RULES)
def test_fifty_steps_are_those_of_autograd_and_adam(options):
    """In float64, so that no choice of latents hangs on rounding."""
    ours, theirs = make(options, dtype="float64"), make(options, dtype="float64")
    xs = batches(50, dtype=torch.float64)
    step = TrainStep(ours, lr=1e-2)
    losses = [float(step(x).loss) for x in xs]
    want = by_autograd(theirs, xs, torch.optim.Adam(theirs.parameters(), lr=1e-2))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want), rtol=1e-9, atol=1e-9)
    same(ours, theirs, rtol=1e-7, atol=1e-8)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("options", [RULES[0], RULES[3]])
def test_fifty_steps_in_float32(options):
    ours, theirs = make(options), make(options)
    xs = batches(50)
    step = TrainStep(ours, lr=1e-3)
    losses = [float(step(x).loss) for x in xs]
    want = by_autograd(theirs, xs, torch.optim.Adam(theirs.parameters(), lr=1e-3))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want), rtol=1e-4, atol=1e-5)
    same(ours, theirs, rtol=1e-3, atol=1e-4)


def test_adamw_is_torchs():
    ours, theirs = make(RULES[0], dtype="float64"), make(RULES[0], dtype="float64")
    xs = batches(20, dtype=torch.float64)
    step = TrainStep(ours, "adamw", lr=1e-2, weight_decay=0.1)
    for x in xs:
        step(x)
    by_autograd(theirs, xs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1))
    same(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", RULES)
def test_without_momentum_untouched_rows_wait_and_nothing_is_lost(options):
    """β₁ = 0: rows silent for many steps, and Adam over all of them, come to the same."""
    ours, theirs = make(options, dtype="float64"), make(options, dtype="float64")
    with torch.no_grad():
        for sae in (ours, theirs):
            sae.encoder.bias[::3] = -1.5  # rarely on
    xs = batches(60, n=2, dtype=torch.float64)
    # Two tokens leave gradients that are rounding alone, which Adam would blow up to whole steps but for eps.
    adam: dict[str, Any] = {"lr": 1e-2, "betas": (0.0, 0.99), "eps": 1e-3}
    step = TrainStep(ours, **adam)
    for x in xs:
        step(x)
    by_autograd(theirs, xs, torch.optim.Adam(theirs.parameters(), **adam))
    same(ours, theirs, rtol=1e-5, atol=1e-5)
    assert "W_dec.m" not in step.tensors and step.last is not None
    if not (options.get("max_l0") or "dead_after_tokens" in options or options["activation"] == "relu"):
        waited = (step.steps - step.last).double()
        assert waited.max() > 20  # the test means something


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_waited_are_where_dense_adam_has_them(dtype):
    """The same gradients, at rows that rest for up to 200 steps, into RowAdam and into torch's Adam."""
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(10, D, generator=gen, dtype=dtype)
    dense, lazy = torch.nn.Parameter(start.clone()), start.clone()
    optimizer = torch.optim.Adam([dense], lr=1e-2, betas=(0.0, 0.999))
    rows, last = RowAdam(lazy, "fp32", 0.0, False), torch.zeros(10, dtype=torch.int64)
    longest = 0
    for t in range(1, 401):
        at = (torch.rand(10, generator=gen) < torch.logspace(0, -2.3, 10)).nonzero().squeeze(1)
        g = torch.randn(len(at), D, generator=gen, dtype=dtype)
        dense.grad = torch.zeros_like(dense).index_copy_(0, at, g)
        optimizer.step()
        silent = t - 1 - last[at]
        longest = max(longest, int(silent.max())) if len(at) else longest
        rows.update(at, g, AdamOptions(1e-2, 0.0, 0.999, 1e-8, 0.0, t), False, silent[:, None])
        last[at] = t
    assert longest > 80
    tight: Any = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(lazy, dense.detach(), **tight)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_eight_bits_bear_an_element_that_dwarfs_its_neighbours(beta1):
    """As residual streams have them: were the others' second moments rounded to 0, their steps would be millions."""
    gen, rounding = (torch.Generator().manual_seed(i) for i in range(2))
    w, scale = torch.zeros(16, 256), torch.ones(256)
    scale[7] = 1e4
    rows, most = RowAdam(w, "8bit", beta1, False), 0.0
    for t in range(1, 151):
        g = torch.randn(16, 256, generator=gen) * scale * (torch.rand(16, 1, generator=gen) < 0.3)
        before = w.clone()
        rows.update(slice(0, 16), g, AdamOptions(1.0, beta1, 0.999, 1e-8, 0.0, t), False, None, rounding)
        most = max(most, float((w - before).abs().max()))
    assert 1 < most < 40


def test_lazy_is_no_more_than_close():
    exact, lazy = make(RULES[0]), make(RULES[0])
    a, b = TrainStep(exact, lr=1e-3), TrainStep(lazy, lr=1e-3, lazy=True)
    for x in batches(30):
        a(x)
        b(x)
    gap = (exact.W_dec - lazy.W_dec).norm() / (exact.W_dec - make(RULES[0]).W_dec).norm()
    assert 0 < gap < 0.5


@pytest.mark.parametrize("clip_by", ["exact", "previous"])
@pytest.mark.parametrize("options", [RULES[1], RULES[5], RULES[6]])
def test_clipping(options, clip_by):
    ours, theirs = make(options, dtype="float64"), make(options, dtype="float64")
    xs, clip = batches(30, dtype=torch.float64), 0.5
    step = TrainStep(ours, lr=1e-2, clip=clip, clip_by=clip_by)
    norms = [float(step(x).grad_norm) for x in xs]  # type: ignore[arg-type]
    assert max(norms) > clip
    optimizer, norm, previous = torch.optim.Adam(theirs.parameters(), lr=1e-2), DecoderNorm(theirs), None
    for x, given in zip(xs, norms, strict=True):
        theirs.loss(x).loss.backward()
        norm.project_gradient_()
        whole = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
        assert given == pytest.approx(float(whole), rel=1e-6)
        scale = min(1.0, clip / (float(whole if clip_by == "exact" else previous or 0.0) + 1e-6))
        for p in theirs.parameters():
            assert p.grad is not None
            p.grad.mul_(scale)
        previous = whole
        optimizer.step()
        optimizer.zero_grad()
        norm.renormalise_()
    same(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [RULES[0], RULES[3], RULES[5], RULES[6]])
def test_micro_batches_are_one_batch(options):
    whole, parts = make(options, dtype="float64"), make(options, dtype="float64")
    a, b = TrainStep(whole, lr=1e-2), TrainStep(parts, lr=1e-2)
    for x in batches(10, dtype=torch.float64):
        want = a(x)
        for rows in x.split([N // 2, N // 4, N // 4]):
            b.accumulate(rows)
        got = b.update()
        for name in ("loss", "mse", "sparsity", "l0"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name))
        same(whole, parts, rtol=1e-7, atol=1e-8)


def test_a_penalty_that_begins_between_micro_batches():
    sae, start = make(RULES[3], dtype="float64"), make(RULES[3], dtype="float64")
    x = batches(1, dtype=torch.float64)[0]
    step = TrainStep(sae, lr=1e-2)
    step.penalty = 0.0
    step.accumulate(x[:5])
    step.penalty = 1.0
    step.accumulate(x[5:])
    step.update()
    optimizer, norm = torch.optim.Adam(start.parameters(), lr=1e-2), DecoderNorm(start)
    (5 / N * start.loss(x[:5]).mse + (N - 5) / N * start.loss(x[5:]).loss).backward()
    norm.project_gradient_()
    optimizer.step()
    norm.renormalise_()
    same(sae, start, rtol=1e-7, atol=1e-8)


def test_masks_targets_and_shapes_are_those_of_loss():
    ours, theirs = make(RULES[0], dtype="float64"), make(RULES[0], dtype="float64")
    x, target = batches(2, dtype=torch.float64)
    x, target = x.view(4, 8, D), target.view(4, 8, D)
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.6
    step = TrainStep(ours, lr=1e-2)
    metrics = step(x, target=target, mask=mask)
    out = theirs.loss(x, target=target, mask=mask)
    for name in ("loss", "mse", "l0", "fve"):
        torch.testing.assert_close(getattr(metrics, name), getattr(out, name).detach())
    out.loss.backward()
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    norm = DecoderNorm(theirs)
    norm.project_gradient_()
    optimizer.step()
    norm.renormalise_()
    same(ours, theirs, rtol=1e-8, atol=1e-9)


def test_no_rows_change_nothing_but_adams_clock():
    sae = make(RULES[0])
    before = sae.W_dec.clone()
    metrics = TrainStep(sae, lr=1e-2)(torch.zeros(0, D))
    assert float(metrics.loss) == 0 and torch.isfinite(sae.W_dec).all()
    torch.testing.assert_close(sae.W_dec, before)


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit", "rowwise"])
@pytest.mark.parametrize("master", ["fp32", "bf16-sr"])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_a_resumed_run_is_the_uninterrupted_one(state, master, beta1):
    options = {**RULES[1], "dtype": "bfloat16" if master == "bf16-sr" else "float32"}
    xs = batches(12)

    def start() -> tuple[SAE, TrainStep]:
        sae = make(options)
        return sae, TrainStep(sae, lr=1e-2, betas=(beta1, 0.99), state=state, master=master, seed=3)

    sae, step = start()
    for x in xs:
        step(x)
    first, half = start()
    for x in xs[:5]:
        half(x)
    kept = {name: t.clone() for name, t in first.state_dict().items()}, {
        name: t.clone() if isinstance(t, Tensor) else t for name, t in half.state_dict().items()
    }
    second, rest = start()
    second.load_state_dict(kept[0])
    rest.load_state_dict(kept[1])
    for x in xs[5:]:
        rest(x)
    for name, t in sae.state_dict().items():
        assert torch.equal(second.state_dict()[name], t), name
    for name, t in step.tensors.items():
        assert torch.equal(rest.tensors[name], t), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_a_master_copy(dtype):
    options = {**RULES[0], "dtype": dtype}
    sae = make(options)
    start = sae.W_dec.float().clone()
    step = TrainStep(sae, lr=1e-5)
    for x in batches(40):
        step(x)
    copy = step.tensors["W_dec.master"]
    assert copy.dtype == torch.float32
    assert torch.equal(copy.to(sae.dtype), sae.W_dec)
    # Steps of 1e-5 are lost on weights of 0.3 in bfloat16, whose neighbours are 1e-3 apart; the copy has them.
    assert (copy - start).abs().max() > 5e-5


def test_dead_latents_are_resampled():
    from fastsae.resample import resample

    sae = make({"activation": "relu", "l1_coefficient": 0.3})
    step = TrainStep(sae, lr=1e-2)
    xs = batches(5)
    for x in xs:
        step(x)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[1, 5]] = True
    assert resample(sae, step, xs, dead, torch.Generator().manual_seed(0)) == 2
    for name in ("W_dec.m", "W_dec.v", "encoder.weight.m", "encoder.weight.v"):
        assert not step.tensors[name][dead].any() and step.tensors[name][~dead].any()
    assert not step.tensors["bias.m"][0, dead].any()
    step(xs[0])


def test_k_and_penalty_change_between_steps():
    sae = make(RULES[0])
    step = TrainStep(sae, lr=1e-3)
    x = batches(1)[0]
    step.k = 2
    assert float(step(x).l0) <= 2
    step.k = None
    assert 2 < float(step(x).l0) <= 5
    relu = make(RULES[3])
    step = TrainStep(relu, lr=0.0)
    full = step(x)
    step.penalty = 0.0
    none = step(x)
    torch.testing.assert_close(none.loss, none.mse)
    torch.testing.assert_close(full.loss, full.mse + full.sparsity)


def test_what_cannot_be_stepped_on():
    sae = make(RULES[0])
    step = TrainStep(sae)
    with pytest.raises(FastSAEError, match="accumulate"):
        step.update()
    with pytest.raises(FastSAEError, match="NaN"):
        step(torch.full((3, D), float("nan")))
    with pytest.raises(FastSAEError, match=str(D)):
        step(torch.zeros(3, D + 1))
    step(torch.zeros(3, D))  # what failed left nothing behind
    with pytest.raises(FastSAEError, match="train"):
        TrainStep(sae.eval())(torch.zeros(3, D))
    with pytest.raises(FastSAEError, match="SAE"):
        TrainStep(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    other = TrainStep(make(RULES[0]), state="8bit")
    with pytest.raises(FastSAEError, match="state"):
        other.load_state_dict(TrainStep(make(RULES[0])).state_dict())
    assert fastsae.TrainStep is TrainStep


def test_parameters_that_cannot_be_updated():
    sae = make(RULES[6])
    sae.b_dec.requires_grad_(False)
    with pytest.raises(FastSAEError, match="b_dec .*requires_grad"):
        TrainStep(sae)
    step = TrainStep(sae.requires_grad_())
    step(batches(1)[0])
    sae.log_threshold.data = sae.log_threshold.data.clone()
    with pytest.raises(FastSAEError, match="log_threshold is another tensor"):
        step(batches(1)[0])
    step = TrainStep(sae)
    sae.to(torch.bfloat16)
    with pytest.raises(FastSAEError, match="W_dec is another tensor"):
        step(batches(1)[0])


def test_decoder_norms_are_those_of_weights_written_from_outside():
    ours, theirs = make(RULES[4], dtype="float64"), make(RULES[4], dtype="float64")
    xs = batches(6, dtype=torch.float64)
    step = TrainStep(ours, lr=1e-2)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for i, x in enumerate(xs):
        if i == 3:
            with torch.no_grad():
                ours.W_dec.mul_(2)
                theirs.W_dec.mul_(2)
        step(x)
        by_autograd(theirs, [x], optimizer)
    same(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("options", [RULES[0], RULES[1], RULES[4], RULES[5], RULES[6]])
def test_under_autocast_only_the_forward_pass_is_rounded(options):
    ours, theirs = make(options), make(options)
    step, optimizer = TrainStep(ours, lr=1e-3), torch.optim.Adam(theirs.parameters(), lr=1e-3)
    norm = DecoderNorm(theirs)
    for x in batches(8):
        with torch.autocast("cpu", torch.bfloat16):
            got = step(x)
            want = theirs.loss(x).loss
        want.backward()
        norm.project_gradient_()
        optimizer.step()
        optimizer.zero_grad()
        norm.renormalise_()
        torch.testing.assert_close(got.loss, want.detach(), rtol=0.03, atol=0.03)
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in ours.parameters())
