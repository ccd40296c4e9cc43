"""Schedules, clipping, the decoder-norm constraint, the geometric median."""

import pytest
import torch

from fastsae import SAE
from fastsae.optim import DecoderNorm, clip_gradients_, default_lr, geometric_median, lr_factor, penalty_factor


def test_learning_rate_rises_stays_and_falls():
    factors = [lr_factor(step, 1000, warmup=0.1, decay=0.2) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01) and factors[49] == pytest.approx(0.5)
    assert all(f == 1 for f in factors[99:801])
    assert factors[900] == pytest.approx(0.5) and factors[999] == pytest.approx(0.005)
    assert [lr_factor(step, 10, 0.0, 0.0) for step in range(10)] == [1] * 10


def test_penalty_rises_from_nothing():
    factors = [penalty_factor(step, 200, warmup=0.05) for step in range(200)]
    assert factors[:3] == [0, pytest.approx(0.1), pytest.approx(0.2)]
    assert factors[10:] == [1] * 190
    assert penalty_factor(0, 200, 0.0) == 1


def test_default_learning_rate_falls_with_width_and_length():
    assert default_lr(2**14, 10**5) == pytest.approx(2e-4)
    assert default_lr(2**12, 10**5) == pytest.approx(4e-4)
    assert default_lr(2**14, 5000) == pytest.approx(4e-4)
    assert default_lr(2**14, 10) == pytest.approx(1e-3)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3])
def test_clipping_is_torchs(max_norm):
    torch.manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.zeros(7, 3)),
        torch.nn.Parameter(torch.zeros(5)),
        torch.nn.Parameter(torch.ones(2)),
    ]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third has no gradient
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = clip_gradients_(ours, max_norm)
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, want)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("d_sae", [1, 255, 256, 700])
def test_constraint_projects_then_renormalises(d_sae):
    sae = SAE(d_in=12, d_sae=d_sae, k=1)
    norm = DecoderNorm(sae)
    start = sae.W_dec.detach().clone()
    raw = torch.randn(d_sae, 12, generator=torch.Generator().manual_seed(1))
    sae.W_dec.grad = raw.clone()
    norm.project_gradient_()
    want = raw - (raw * start).sum(1, keepdim=True) * start
    torch.testing.assert_close(sae.W_dec.grad, want)
    torch.testing.assert_close((sae.W_dec.grad * start).sum(1), torch.zeros(d_sae), atol=1e-5, rtol=0)
    with torch.no_grad():
        sae.W_dec.mul_(3).add_(0.1)
    moved = sae.W_dec.detach().clone()
    norm.renormalise_()
    torch.testing.assert_close(sae.W_dec.detach(), moved / moved.norm(dim=1, keepdim=True))


def test_free_decoders_are_left_alone():
    sae = SAE(d_in=4, d_sae=8, activation="relu", decoder_norm="free", init_decoder_norm=0.1)
    sae.W_dec.grad = torch.ones_like(sae.W_dec)
    before = sae.W_dec.detach().clone()
    norm = DecoderNorm(sae)
    norm.project_gradient_()
    norm.renormalise_()
    assert torch.equal(sae.W_dec.grad, torch.ones_like(sae.W_dec))
    assert torch.equal(sae.W_dec.detach(), before)


def test_geometric_median_minimises_the_sum_of_distances():
    torch.manual_seed(0)
    x = torch.randn(400, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + 7
    x[:40] += 1000  # attention sinks, say
    median = geometric_median(x)

    def total(m):
        return float((x - m).norm(dim=1).sum())

    for _ in range(20):
        assert total(median) <= total(median + 0.05 * torch.randn(5)) + 1e-2
    assert (median - 7).norm() < 2 < (x.mean(0) - 7).norm()


def test_geometric_median_of_equal_points_and_of_one_point():
    x = torch.full((9, 3), 2.5)
    torch.testing.assert_close(geometric_median(x), x[0])
    torch.testing.assert_close(geometric_median(x[:1]), x[0])
    heavy = torch.cat([torch.zeros(10, 2), torch.tensor([[1.0, 1.0]])])  # the median sits on a row
    torch.testing.assert_close(geometric_median(heavy), torch.zeros(2), atol=1e-3, rtol=0)
