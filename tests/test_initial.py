"""Initial weights: one sequence of random numbers, however many rows are drawn at a time."""

import pytest
import torch

import fastsae
from fastsae import sae as module


@pytest.mark.parametrize(("d_sae", "d_in"), [(1000, 37), (33, 7), (5, 3), (4096, 12)])
@pytest.mark.parametrize("init_encoder", ["tied", "random"])
def test_rows_drawn_in_blocks_are_those_of_one_draw(monkeypatch, d_sae, d_in, init_encoder) -> None:
    monkeypatch.setattr(module, "DRAWN_ELEMENTS", 1024)
    sae = fastsae.SAE(d_in=d_in, d_sae=d_sae, k=2, seed=7, init_encoder=init_encoder, decoder_norm="free",
                      init_decoder_norm=0.5)  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    for weight in (sae.W_dec, sae.encoder.weight)[: 1 if init_encoder == "tied" else 2]:
        rows = torch.randn(d_sae, d_in, generator=generator)
        want = 0.5 * rows / torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
        torch.testing.assert_close(weight.detach().double(), want.double(), rtol=1e-6, atol=1e-7)
    assert torch.equal(sae.W_dec, sae.encoder.weight) == (init_encoder == "tied")


def test_the_start_is_seeded_tied_and_of_the_norm_asked_for() -> None:
    state = torch.get_rng_state()
    a, b, c = (fastsae.SAE(d_in=12, d_sae=200, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state), "the global generator has to stay as it was"
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)
    assert torch.equal(a.encoder.weight, a.W_dec) and a.encoder.weight.data_ptr() != a.W_dec.data_ptr()
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(200))
    assert not a.b_enc.any() and not a.b_dec.any()
    small = fastsae.SAE(d_in=12, d_sae=200, decoder_norm="free", init_decoder_norm=0.1, init_encoder="random")
    torch.testing.assert_close(small.W_dec.norm(dim=1), torch.full((200,), 0.1))
    assert not torch.equal(small.encoder.weight, small.W_dec)
