"""The trainer: what a run leaves behind, that it resumes bit for bit, that its recipes are the published ones."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae import SAE, FastSAEError, TrainConfig, tensorfile
from fastsae.recipe import start
from fastsae.store import ActivationStore, MemoryStore
from fastsae.store_writer import StoreWriter

D, F, N = 16, 48, 4096


def activations(n: int = N, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Sparse sums of 32 fixed directions, with a mean."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(32, D, generator=generator), dim=1)
    generator.manual_seed(seed + 2)
    on = (torch.rand(n, 32, generator=generator) < 0.1) * torch.rand(n, 32, generator=generator).add(0.5)
    return scale * (on @ directions + 0.3)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    path = tmp_path_factory.mktemp("data") / "store"
    with StoreWriter(path, D, shard_rows=512) as writer:
        n = torch.arange(N)
        writer.add(activations(), n, n // 64, n % 64)
    return ActivationStore(path)


SMALL: dict[str, Any] = {
    "d_sae": F,
    "batch_size": 128,
    "tokens": 60 * 128,
    "lr": 3e-3,
    "log_every": 10,
    "show_progress": False,
}
RELU: dict[str, Any] = {"activation": "relu", "l1_coefficient": 2.0, "resample_at": (0.2, 0.5), "resample_inputs": 1024}
TOPK: dict[str, Any] = {"activation": "topk", "k": 4, "dead_after_tokens": 500}
BATCHTOPK: dict[str, Any] = TOPK | {"activation": "batchtopk"}
JUMPRELU: dict[str, Any] = {"activation": "jumprelu", "l0_coefficient": 0.1, "beta1": 0.0}


def train(data: Any, **options: Any) -> SAE:
    return fastsae.train(data, **options)


def log_lines(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for row in rows:
        del row["tokens_per_s"]  # the only thing that two equal runs may differ in
    return rows


def assert_same(a: SAE, b: SAE) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_run_leaves_its_log_its_dictionary_and_its_result(store, tmp_path):
    seen = []
    sae = train(store, out=tmp_path / "run", on_log=seen.append, **SMALL, **TOPK)
    rows = log_lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60] and len(seen) == 6
    assert set(rows[0]) == {
        *("step", "tokens", "loss", "mse", "sparsity", "aux", "l0", "fve"),
        *("dead", "lr", "penalty", "resampled", "grad_norm"),
    }
    assert rows[-1]["tokens"] == 60 * 128
    assert rows[-1]["mse"] < 0.8 * rows[0]["mse"] and rows[-1]["fve"] > 0.6
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["mse"] + rows[-1]["aux"])
    result = json.loads((tmp_path / "run/train.json").read_text())
    assert result["step"] == 60 and result["config"]["k"] == 4 and result["config"]["d_in"] == D
    assert not (tmp_path / "run/checkpoint").exists()
    assert not sae.training
    assert_same(SAE.from_pretrained(tmp_path / "run/sae"), sae)
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("options", [RELU, TOPK, JUMPRELU, BATCHTOPK], ids=["relu", "topk", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("signal_at", [10, 40])
def test_interrupted_and_resumed_is_the_same_run_bit_for_bit(store, tmp_path, options, signal_at):
    before = signal.getsignal(signal.SIGINT)  # in a background job: ignored
    whole = train(store, out=tmp_path / "whole", **SMALL, **options)

    def control_c(row):
        if row["step"] == signal_at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(store, out=tmp_path / "cut", on_log=control_c, **SMALL, **options)
    assert not (tmp_path / "cut/train.json").exists()
    resumed = train(store, out=tmp_path / "cut", resume=True, **SMALL, **options)
    assert_same(whole, resumed)
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "cut")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_killed_run_goes_on_from_its_last_checkpoint(store, tmp_path):
    whole = train(store, out=tmp_path / "whole", **SMALL, **RELU)

    def power_cut(row):
        if row["step"] == 40:
            raise OSError("power cut")  # nothing is saved now

    with pytest.raises(OSError, match="power cut"):
        train(store, out=tmp_path / "cut", on_log=power_cut, checkpoint_every=25, **SMALL, **RELU)
    assert len(log_lines(tmp_path / "cut")) == 4
    resumed = train(store, out=tmp_path / "cut", resume=True, checkpoint_every=25, **SMALL, **RELU)
    assert_same(whole, resumed)
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "cut")


def test_a_finished_run_is_taken_as_it_is(store, tmp_path):
    sae = train(store, out=tmp_path / "run", **SMALL, **TOPK)
    again = train(store, out=tmp_path / "run", resume=True, on_log=lambda _: pytest.fail("ran"), **SMALL, **TOPK)
    assert_same(sae, again)


def test_folders_of_other_runs_are_refused(store, tmp_path):
    train(store, out=tmp_path / "run", **SMALL, **TOPK)
    with pytest.raises(FastSAEError, match="resume it"):
        train(store, out=tmp_path / "run", **SMALL, **TOPK)
    with pytest.raises(FastSAEError, match="another run.*k.*choose another folder"):
        train(store, out=tmp_path / "run", resume=True, **SMALL | TOPK | {"k": 5})
    with pytest.raises(FastSAEError, match="another run.*store"):
        train(MemoryStore(activations(seed=5)), out=tmp_path / "run", resume=True, **SMALL, **TOPK)


def test_a_full_disk_keeps_the_last_checkpoint(store, tmp_path, monkeypatch):
    real, calls = tensorfile.write, []

    def full(path, tensors, metadata):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(tensorfile, "write", full)
    with pytest.raises(FastSAEError, match="No space left on device"):
        train(store, out=tmp_path / "run", checkpoint_every=20, **SMALL, **TOPK)
    kept = {file.name for file in (tmp_path / "run/checkpoint").iterdir()}
    assert kept == {"about.json", "state.safetensors"}
    resumed = train(store, out=tmp_path / "run", resume=True, checkpoint_every=20, **SMALL, **TOPK)
    assert_same(resumed, train(store, **SMALL, **TOPK))


def test_bad_input_is_one_clear_line(store):
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"k must be at most d_sae = 48, got 49", {"k": 49}),
        (r"width 16, got d_in=17", {"d_in": 17}),
        (r"a batch of 9000 rows needs at least as many activations, the store has 4096", {"batch_size": 9000}),
        (r"did you mean l1_coefficient", {"l1_coeficient": 1.0}),
        (r"lr_warmup is a fraction", {"lr_warmup": 5.0}),
        (r"normalise must be one of none, scale, centre", {"normalise": "yes"}),
        (r"resample_at must be rising fractions", {"resample_at": (0.5, 0.2)}),
        (r"preset must be one of monosemanticity", {"preset": "best"}),
        (r"a config or a preset", {"preset": "topk", "config": TrainConfig()}),
        (r"tokens must be at least 0", {"tokens": -1}),
        (r"beta1 must be in", {"beta1": 1.0}),
        (r"lr must be a finite number", {"lr": float("nan")}),
        (r"float64 moments, got state='8bit'", {"dtype": "float64", "state": "8bit"}),
    ]
    for message, options in cases:
        with pytest.raises(FastSAEError, match=message) as caught:
            train(store, **SMALL | options)
        assert "\n" not in str(caught.value)


def test_bad_tensors_are_refused():
    x = activations()
    x[3, 3] = float("inf")
    for bad, message in [
        (x, "must be finite"),
        (x[0], r"expected activations \[N, D\]"),
        (x[:0], "0 rows"),
        (torch.ones(256, D).long(), "float dtype"),
        (torch.zeros(256, D), "all the same"),
    ]:
        with pytest.raises(FastSAEError, match=message):
            train(bad, **SMALL)


def test_a_loss_that_is_not_finite_says_what_to_do(tmp_path):
    with pytest.raises(FastSAEError, match="in step .*lower lr"):
        train(activations(), out=tmp_path / "run", **SMALL | {"lr": 1e30, "clip": 0.0}, **TOPK)


@pytest.mark.parametrize("normalise", ["none", "scale", "centre"])
@pytest.mark.parametrize("init_b_dec", ["geometric_median", "mean", "zero"])
def test_start_from_data(store, normalise, init_b_dec):
    config = TrainConfig(d_sae=F, k=4, batch_size=64, normalise=normalise, init_b_dec=init_b_dec).complete(D, N)
    sae = start(config, store)
    x = activations()
    inner = (x - sae.input_mean) * sae.input_scale
    if normalise != "none":
        assert float(inner.norm(dim=1).mean()) == pytest.approx(D**0.5, rel=0.01)
    if normalise == "centre":
        assert inner.mean(0).norm() < 1e-4
    if init_b_dec == "zero":
        assert not sae.b_dec.any()
    elif init_b_dec == "mean":
        torch.testing.assert_close(sae.b_dec.detach(), inner.mean(0), atol=1e-4, rtol=1e-4)
    else:
        total = (inner - sae.b_dec).norm(dim=1).sum()
        assert total <= (inner - inner.mean(0)).norm(dim=1).sum()
    assert_same(sae, start(config, store))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_a_sparse_start(store, apply_b_dec_to_input):
    options: dict[str, Any] = {"d_sae": 300, "activation": "relu", "apply_b_dec_to_input": apply_b_dec_to_input}
    for dtype in ("bfloat16", "float16", "float64"):
        narrow = start(TrainConfig(init_l0=12, dtype=dtype, **options).complete(D, N), store)
        assert (narrow.encode(activations()) > 0).float().mean() == pytest.approx(0.04, rel=0.05)
    sae = start(TrainConfig(init_l0=12, **options).complete(D, N), store)
    rate = (sae.encode(activations()) > 0).float().mean(0)  # [300], wanted 12 / 300
    assert rate.mean() == pytest.approx(0.04, rel=0.01) and rate.std() < 0.001
    dense = start(TrainConfig(init_l0=0, **options).complete(D, N), store)
    assert not dense.b_enc.any()
    options["d_sae"] = 8
    few = start(TrainConfig(init_l0=64, **options).complete(D, N), store)
    assert (few.encode(activations()) > 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_training_learns_the_same_at_any_scale_of_the_data():
    """What normalisation is for: the penalty means the same for activations a hundred times larger."""
    rows = []
    for scale in (0.03, 3.0, 300.0):
        train(activations(scale=scale), on_log=rows.append, **SMALL | {"log_every": 60}, **RELU)
    for row in rows[1:]:
        assert row["fve"] == pytest.approx(rows[0]["fve"], abs=0.02)
        assert row["l0"] == pytest.approx(rows[0]["l0"], rel=0.1)


def test_schedules_reach_the_step(store):
    rows = []
    options: dict[str, Any] = {"log_every": 1, "lr_warmup": 0.1, "lr_decay": 0.5, "l1_warmup": 0.5}
    train(store, on_log=rows.append, **SMALL | options | {"activation": "relu"})
    assert [row["lr"] for row in rows[:6]] == pytest.approx([3e-3 * i / 6 for i in range(1, 7)])
    assert rows[45]["lr"] == pytest.approx(3e-3 * 15 / 30)
    assert [row["penalty"] for row in rows[:3]] == pytest.approx([0, 1 / 30, 2 / 30]) and rows[30]["penalty"] == 1
    for row in rows:
        assert row["loss"] == pytest.approx(row["mse"] + row["penalty"] * row["sparsity"], rel=1e-5)
    sae = SAE(TrainConfig(d_sae=F, activation="relu").complete(D, N).sae)
    assert sae.cfg.activation == "relu"


def test_k_comes_down(store):
    rows = []
    train(store, on_log=rows.append, **SMALL | TOPK | {"log_every": 1, "k_start": 12, "k_anneal": 0.5})
    assert rows[0]["l0"] == pytest.approx(12, abs=0.5) and rows[15]["l0"] == pytest.approx(8, abs=0.5)
    assert rows[30]["l0"] <= 4 and rows[-1]["l0"] <= 4


@pytest.mark.parametrize(
    "options", [{"state": "8bit"}, {"state": "rowwise", "beta1": 0.0}, {"state": "bf16"},
                {"state": "8bit", "master": "bf16-sr", "dtype": "bfloat16"}, {"clip_by": "previous", "clip": 1.0}]
)  # fmt: skip
def test_small_states_train_and_resume_bit_for_bit(store, tmp_path, options):
    def control_c(row):
        if row["step"] == 30:
            os.kill(os.getpid(), signal.SIGINT)

    whole, rows = None, []
    whole = train(store, on_log=rows.append, **SMALL, **TOPK, **options)
    assert rows[-1]["fve"] > 0.5
    with pytest.raises(KeyboardInterrupt):
        train(store, out=tmp_path / "cut", on_log=control_c, **SMALL, **TOPK, **options)
    assert_same(train(store, out=tmp_path / "cut", resume=True, **SMALL, **TOPK, **options), whole)


def test_warmed_up_penalty_has_the_gradient_of_the_scaled_loss():
    x = activations(64)
    sae = SAE(d_in=D, d_sae=F, activation="relu", l1_coefficient=2.0, max_l0=F)
    out = sae.loss(x)
    (out.mse + 0.5 * out.sparsity).backward()
    half = SAE(d_in=D, d_sae=F, activation="relu", l1_coefficient=1.0, max_l0=F)
    half.loss(x).loss.backward()
    for a, b in zip(sae.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_dead_is_defined_in_tokens():
    rows = []
    x = activations(2048)
    options: dict[str, Any] = {
        "activation": "topk",
        "k": 1,
        "aux_coefficient": 0.0,
        "dead_after_tokens": 1000,
        "log_every": 1,
        "d_sae": 512,
    }
    sae = train(x, on_log=rows.append, **SMALL | options)
    assert all(row["dead"] == 0 for row in rows[:7])  # 7 · 128 tokens cannot tell
    assert rows[7]["dead"] > 0
    assert rows[-1]["dead"] == float((sae.tokens_since_fired >= 1000).float().mean())


def test_resampling_revives_dead_latents(store):
    def dead_at_end(**options: Any):
        rows = []
        base: dict[str, Any] = {
            "activation": "relu",
            "l1_coefficient": 1.0,
            "dead_after_tokens": 1000,
            "tokens": 200 * 128,
        }
        base |= {"d_sae": 128, "lr": 0.03, "init_encoder": "random"}  # too fast on purpose: it kills latents
        train(store, on_log=rows.append, **SMALL | base | options)
        return rows[-1]

    without, resampled = dead_at_end(), dead_at_end(resample_at=(0.2, 0.4, 0.6))
    assert without["dead"] > 0.1 and without["resampled"] == 0
    assert resampled["resampled"] > 0
    assert resampled["dead"] < without["dead"]


def test_more_tokens_than_the_store_holds_take_further_passes():
    rows = []
    train(activations(300), on_log=rows.append, **SMALL, **TOPK)
    assert rows[-1]["tokens"] == 60 * 128


def test_defaults_filled_in_from_the_data():
    config = TrainConfig().complete(width=512, count=1_000_000)
    assert (config.d_in, config.d_sae, config.tokens) == (512, 4096, 1_000_000)
    assert config.lr == pytest.approx(5 * 4e-4)
    assert config.dead_after_tokens == 100_000 and config.steps == 1_000_000 // 4096
    assert config.complete(512, 5000) == config  # complete already
    long = TrainConfig(tokens=10**9).complete(512, 1_000_000)
    assert long.dead_after_tokens == 10_000_000 and long.lr == pytest.approx(4e-4)


def test_preset_monosemanticity_has_the_papers_loss():
    """mean over the width of the squared error + 0.004 Σ f, times D."""
    config = TrainConfig.preset("monosemanticity", d_in=D, d_sae=F, batch_size=64).complete(D, N)
    sae = SAE(config.sae)
    x = activations(64)
    f = sae.encode(x)
    paper = ((sae.decode(f) - x).square().mean(-1) + 0.004 * f.sum(-1)).mean()
    torch.testing.assert_close(sae.loss(x).loss, D * paper)


def test_preset_april2024():
    config = TrainConfig.preset("april2024", d_sae=F).complete(D, 10**6)
    sae = start(config, MemoryStore(activations(8192)))
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.full((F,), 0.1))
    assert torch.equal(sae.W_enc.T, sae.W_dec)
    assert not sae.b_dec.any() and not sae.cfg.apply_b_dec_to_input
    assert (config.l1_coefficient, config.l1_weighting, config.decoder_norm) == (5.0, "decoder_norm", "free")
    assert (config.l1_warmup, config.lr_decay, config.clip, config.resample_at) == (0.05, 0.2, 1.0, ())


@pytest.mark.parametrize("preset", ["monosemanticity", "april2024", "relu", "topk"])
def test_every_preset_trains(store, preset):
    rows = []
    options: dict[str, Any] = {key: SMALL[key] for key in ("d_sae", "batch_size", "log_every", "show_progress")}
    options |= {"topk": {"k": 4}, "april2024": {"l1_coefficient": 0.5}, "relu": {"l1_coefficient": 0.5}}.get(
        preset, {}
    )  # for a width of 16
    train(store, preset=preset, on_log=rows.append, tokens=150 * 128, lr=3e-3, **options)
    assert rows[-1]["fve"] > 0.6 and rows[-1]["fve"] > rows[0]["fve"]
