"""Loss and backward never make a tensor near [N, F], and together allocate little beyond the gradients."""

from __future__ import annotations

import pytest
import torch

import fastsae
from bench import step
from bench.allocations import Watch
from bench.naive import NaiveSAE
from bench.step import sae_for


def watched(sae: fastsae.SAE, x: torch.Tensor) -> Watch:
    sae.loss(x)  # torch imports a part of itself at the first call
    with Watch(ignore=[sae.W_dec.nbytes]) as watch:
        sae.loss(x).loss.backward()
    return watch


VARIANTS = ["topk", "relu", "batchtopk", "jumprelu", "topk with dead latents", "relu, dense", "jumprelu, dense"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tensor_of_a_quarter_of_tokens_times_features(variant) -> None:
    N, D, F, K = 1024, 64, 4096, 16
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    sae = sae_for(variant, x, F, K)
    if "dead" in variant:
        sae.tokens_since_fired[: F // 2] = sae.cfg.dead_after_tokens
    if "dense" in variant:
        with torch.no_grad():
            sae.encoder.bias.zero_()
    watch = watched(sae, x)
    # In bytes: a quarter of the entries of [N, F], of four bytes each, or of eight where they are places (nonzero).
    assert watch.largest < (2 * N * F if "dense" in variant else N * F), watch.largest_is
    assert watch.largest >= N * F / 2, "the chunk of pre-activations itself has to be seen"


@pytest.mark.parametrize("variant", ["topk", "relu"])
def test_a_quarter_of_one_dense_code_is_enough_beyond_the_gradients(variant) -> None:
    N, D, F, K = 2048, 512, 16384, 32
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    watch = watched(sae_for(variant, x, F, K), x)
    assert watch.largest < N * F, watch.largest_is
    assert N * F * 4 / 10 < watch.peak <= N * F * 4 / 4


def test_the_bench_of_steps_times_every_variant_and_says_what_it_allocates() -> None:
    rows = step.run(64, 16, 512, 4, rounds=3)["rows"]
    assert [row["variant"] for row in rows][:3] == ["encoder product", "fastsae topk", "fastsae relu + L1"]
    assert rows[0]["gemms"] == 1 and all(row["median_ms"] > 0 and row["repeats"] == 3 for row in rows)
    assert rows[1]["l0"] == 4 and 2 < rows[2]["l0"] < 8 and rows[1]["extra"] > 0
    assert all(row["variant"] in step.line(row) for row in rows)


def test_the_watch_sees_what_a_dense_step_allocates() -> None:
    N, D, F = 256, 16, 1024
    sae = NaiveSAE(D, F, torch.float32, torch.device("cpu"))
    x = torch.randn(N, D)
    with Watch() as watch:
        sae.loss(x).backward()
    assert watch.largest == 4 * N * F and watch.peak >= 2 * N * F * 4
