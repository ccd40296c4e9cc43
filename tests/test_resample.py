"""Resampling as in "Towards Monosemanticity": which rows change, to what, drawn from which inputs."""

import torch

from fastsae import SAE
from fastsae.resample import resample

D, F, N = 8, 20, 200


def trained(activation="relu", **options):
    torch.manual_seed(0)
    sae = SAE(d_in=D, d_sae=F, activation=activation, k=4, **options)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
    x = torch.randn(N, D)
    for _ in range(3):
        sae.loss(x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sae, optimizer, x


def snapshot(sae, optimizer):
    weights = {name: p.detach().clone() for name, p in sae.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in sae.named_parameters()}
    return weights, moments


def test_thresholds_of_jumprelu_start_again():
    sae, optimizer, x = trained("jumprelu", init_threshold=0.2)
    dead = torch.arange(F) < 3
    before, _ = snapshot(sae, optimizer)
    resample(sae, optimizer, x.split(64), dead, torch.Generator().manual_seed(1))
    after, moments = snapshot(sae, optimizer)
    torch.testing.assert_close(after["log_threshold"][dead].exp(), torch.full((3,), 0.2))
    assert not moments["log_threshold"][dead].any()
    assert torch.equal(after["log_threshold"][~dead], before["log_threshold"][~dead])


def test_dead_latents_become_inputs_and_the_rest_stays():
    sae, optimizer, x = trained()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[2, 3, 11]] = True
    before, moments = snapshot(sae, optimizer)
    sae.tokens_since_fired[dead] = 999
    n = resample(sae, optimizer, x.split(64), dead, torch.Generator().manual_seed(1))
    after, moments_after = snapshot(sae, optimizer)

    assert n == 3 and sae.training
    centred = torch.nn.functional.normalize(x - before["b_dec"], dim=1)
    closeness = after["W_dec"][dead] @ centred.T
    assert (closeness.max(1).values > 1 - 1e-5).all()  # each is an input's direction
    assert len(closeness.argmax(1).unique()) == 3  # three different ones
    torch.testing.assert_close(after["W_dec"][dead].norm(dim=1), torch.ones(3))
    alive = before["encoder.weight"][~dead].norm(dim=1).mean()
    torch.testing.assert_close(after["encoder.weight"][dead], 0.2 * alive * after["W_dec"][dead])
    assert not after["encoder.bias"][dead].any()
    assert not sae.tokens_since_fired[dead].any()
    for name in ("encoder.weight", "encoder.bias", "W_dec"):
        assert not moments_after[name][dead].any() and moments[name][dead].any()
        assert torch.equal(moments_after[name][~dead], moments[name][~dead])
        assert torch.equal(after[name][~dead], before[name][~dead])
    assert torch.equal(after["b_dec"], before["b_dec"])
    assert torch.equal(moments_after["b_dec"], moments["b_dec"])


def test_inputs_are_drawn_by_the_square_of_their_loss():
    sae = SAE(d_in=2, d_sae=4000, activation="relu", l1_coefficient=0.0)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)  # nothing fires: the loss of x is ‖x‖²
    x = torch.tensor([[1.0, 0.0], [0.0, 2**0.5]])  # losses 1 and 2, squares 1 and 4
    optimizer = torch.optim.Adam(sae.parameters())
    resample(sae, optimizer, [x], torch.ones(4000, dtype=torch.bool), torch.Generator().manual_seed(0))
    share = sae.W_dec.detach()[:, 1].mean()
    assert abs(float(share) - 0.8) < 0.03


def test_the_penalty_counts_in_the_loss_of_an_input():
    sae = SAE(d_in=2, d_sae=2000, activation="relu", l1_coefficient=3.0, decoder_norm="free", max_l0=2000)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_dec.zero_()
        sae.W_enc[:, 0] = torch.tensor([1.0, 0.0])
        sae.W_dec[0] = torch.tensor([1.0, 0.0])
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # losses 0 + 3 · 1 and 1 + 0, squares 9 and 1
    dead = torch.ones(2000, dtype=torch.bool)
    dead[0] = False
    resample(sae, torch.optim.Adam(sae.parameters()), [x], dead, torch.Generator().manual_seed(0))
    assert abs(float(sae.W_dec.detach()[1:, 0].mean()) - 0.9) < 0.03


def test_it_works_in_normalised_units():
    sae, optimizer, x = trained()
    mean, scale = torch.full((D,), 5.0), 0.01
    sae.set_input_normalisation(mean, scale)
    dead = torch.arange(F) < 2
    resample(sae, optimizer, [x / scale + mean], dead, torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(x - sae.b_dec.detach(), dim=1)
    assert ((sae.W_dec.detach()[dead] @ directions.T).max(1).values > 1 - 1e-4).all()


def test_no_dead_latents_costs_nothing():
    sae, optimizer, _ = trained()
    assert resample(sae, optimizer, [], torch.zeros(F, dtype=torch.bool), torch.Generator()) == 0


def test_all_dead_and_more_dead_than_inputs():
    sae, optimizer, x = trained()
    n = resample(sae, optimizer, [x[:5]], torch.ones(F, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert n == F
    assert torch.isfinite(sae.loss(x).loss)
    torch.testing.assert_close(sae.W_enc.detach().norm(dim=0), torch.full((F,), 0.2))


def test_counters_and_mode_are_left_alone():
    sae, optimizer, x = trained("topk")
    sae.eval()
    sae.tokens_since_fired.fill_(7)
    resample(sae, optimizer, [x], torch.arange(F) == 0, torch.Generator().manual_seed(0))
    assert sae.tokens_since_fired.tolist() == [0] + [7] * (F - 1)
    assert not sae.training
