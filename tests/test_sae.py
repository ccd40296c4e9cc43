"""SAE: its loss terms and their units, AuxK, initialisation, normalisation, saving, and the errors it gives."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import reference
from fastsae.config import SAEConfig
from fastsae.errors import ConfigError, DataError, FastSAEError, TooDenseError
from fastsae.sae import SAE

D, F, K = 12, 200, 6


def make(activation: str = "topk", **options) -> SAE:
    options = {"d_in": D, "d_sae": F, "activation": activation, "k": K, "dtype": "float64", **options}
    sae = SAE(**options)
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():  # away from the start, where the encoder is the decoder and biases are 0
        for p in sae.parameters():
            p += 0.3 * torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype) * p.square().mean().sqrt()
        sae.encoder.bias.sub_(0.5)
        sae.b_dec.add_(0.2)
    return sae


def data(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_loss(sae: SAE, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """mse, sparsity and x̂ of x [N, D], as the docstring of fastsae.activations writes them."""
    centre = sae.b_dec if sae.cfg.apply_b_dec_to_input else None
    weights = x, sae.encoder.weight, sae.encoder.bias
    sparsity = x.new_zeros(())
    if sae.cfg.activation == "topk":
        f = reference.encode_topk(*weights, sae.cfg.k, centre)
    elif sae.cfg.activation == "batchtopk":
        f = reference.encode_batchtopk(*weights, sae.cfg.k, centre)
    elif sae.cfg.activation == "jumprelu":
        theta = sae.log_threshold.exp()
        f = reference.encode_jumprelu(*weights, theta, centre, sae.cfg.bandwidth)
        l0 = reference.l0(reference.pre_activations(*weights, centre), theta, sae.cfg.bandwidth)
        sparsity = sae.cfg.l0_coefficient * l0.mean()
    else:
        f = reference.encode_relu(*weights, centre)
        norms = sae.W_dec if sae.cfg.l1_weighting == "decoder_norm" else None
        sparsity = sae.cfg.l1_coefficient * reference.l1(f, norms).mean()
    x_hat = reference.decode(f, sae.W_dec) + sae.b_dec
    return (x_hat - (x if target is None else target)).square().sum(-1).mean(), sparsity, x_hat


VARIANTS = [
    {"activation": "topk"},
    {"activation": "topk", "apply_b_dec_to_input": False},
    {"activation": "relu", "l1_coefficient": 0.7},
    {"activation": "relu", "l1_coefficient": 0.7, "l1_weighting": "plain"},
    {"activation": "relu", "l1_coefficient": 0.7, "max_l0": 3},
    {"activation": "relu", "l1_coefficient": 0.7, "max_l0": 3, "l1_weighting": "plain", "apply_b_dec_to_input": False},
    {"activation": "batchtopk"},
    {"activation": "jumprelu", "l0_coefficient": 0.3, "init_threshold": 0.5, "bandwidth": 0.6},
    {"activation": "jumprelu", "l0_coefficient": 0.3, "init_threshold": 0.5, "bandwidth": 0.6, "max_l0": 3},
]
ACTIVATIONS = ["topk", "relu", "batchtopk", "jumprelu"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("transcoder", [False, True])
def test_loss_and_all_gradients_are_those_of_the_formula(variant, transcoder) -> None:
    sae = make(**variant)
    x = data(3, 10, D).requires_grad_()
    target = data(3, 10, D, seed=2) if transcoder else None
    out = sae.loss(x, target)
    rows = x.reshape(-1, D)
    mse, sparsity, x_hat = dense_loss(sae, rows, None if target is None else target.reshape(-1, D))
    torch.testing.assert_close(out.mse, mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.sparsity, sparsity, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, mse + sparsity, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.x_hat, x_hat.reshape(3, 10, D), rtol=1e-12, atol=1e-12)
    assert (out.code is None) == (variant.get("max_l0") == 3)
    want = torch.autograd.grad(mse + sparsity, [x, *sae.parameters()])
    assert all(w.any() for w in want)
    got = torch.autograd.grad(out.loss, [x, *sae.parameters()])
    for name, g, w in zip(["x", *dict(sae.named_parameters())], got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-12 * float(w.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


def test_l0_and_fve() -> None:
    sae, x = make("relu"), data(50, D)
    out = sae.loss(x)
    f = sae.encode(x)
    torch.testing.assert_close(out.l0, (f > 0).sum(-1).double().mean(), check_dtype=False)
    residual = (x - sae.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(out.fve, 1 - residual, rtol=1e-12, atol=0)
    assert not out.l0.requires_grad and not out.fve.requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_mask_is_as_if_the_rows_were_not_there(activation) -> None:
    sae, x = make(activation), data(4, 5, D)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    broken = torch.where(mask[..., None], x, torch.full_like(x, float("nan")))
    out, alone = sae.loss(broken, mask=mask), sae.loss(x[mask])
    assert torch.equal(out.loss, alone.loss) and torch.equal(out.fve, alone.fve) and torch.equal(out.l0, alone.l0)
    assert torch.equal(out.x_hat[mask], alone.x_hat) and not out.x_hat[~mask].any()
    assert out.code is not None and out.code.shape == (int(mask.sum()), F)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows_at_all(variant) -> None:
    sae, x = make(**variant), data(0, 3, D)
    out = sae.loss(x)
    assert out.loss == 0 and out.x_hat.shape == (0, 3, D)
    out.loss.backward()
    assert all(not p.grad.any() for p in sae.parameters() if p.grad is not None)
    assert sae(x).shape == (0, 3, D) and sae.encode(x).shape == (0, 3, F) and sae.encode_sparse(x).shape == (0, 3, F)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_sparse_encode_decode_and_forward_say_the_same(activation) -> None:
    sae, x = make(activation), data(2, 7, D)
    code, dense = sae.encode_sparse(x), sae.encode(x)
    torch.testing.assert_close(code.to_dense(), dense, rtol=1e-12, atol=1e-12)
    assert code.shape == dense.shape == (2, 7, F) and (dense >= 0).all()
    for x_hat in (sae.decode(code), sae.decode(dense), sae(x), sae.loss(x).x_hat):
        torch.testing.assert_close(x_hat, sae(x), rtol=1e-12, atol=1e-12)


def test_batchtopk_in_evaluation_takes_what_is_above_the_running_threshold() -> None:
    """Row by row, by the mean of the smallest values that training kept, which starts at the first of them."""
    sae, least = make("batchtopk", threshold_rate=0.25), []
    assert sae.running_threshold == 0
    for seed in range(3):
        out = sae.loss(data(40, D, seed=seed))
        assert out.code is not None and int(out.code.l0().sum()) == 40 * K
        least.append(float(out.code.values[out.code.values > 0].detach().min()))
    want = 0.75 * (0.75 * least[0] + 0.25 * least[1]) + 0.25 * least[2]
    torch.testing.assert_close(sae.running_threshold, torch.tensor(want))
    sae.eval()
    x = data(40, D, seed=9)
    pre = reference.pre_activations(x, sae.encoder.weight, sae.encoder.bias, sae.b_dec)
    f = torch.where(pre > sae.running_threshold.double(), pre, 0)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae.encode_sparse(x).to_dense(), f)
    torch.testing.assert_close(sae.encode_sparse(x[:1]).to_dense(), f[:1])
    torch.testing.assert_close(sae(x), f @ sae.W_dec + sae.b_dec)
    before = sae.running_threshold.clone()
    torch.testing.assert_close(sae.loss(x).l0, (f > 0).sum(1).double().mean(), check_dtype=False)
    assert sae.running_threshold == before, "only training moves it"


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_thresholds_are_saved(activation, tmp_path) -> None:
    sae = make(activation)
    sae.loss(data(20, D))
    sae.eval().save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path).eval()
    assert torch.equal(again(data(5, D)), sae(data(5, D)))
    assert again.threshold is not None and sae.threshold is not None and torch.equal(again.threshold, sae.threshold)


def test_jumprelu_trains_towards_fewer_active_latents() -> None:
    """The penalty raises thresholds, and with them L0 falls."""

    def trained(l0_coefficient: float) -> tuple[float, float]:
        options: dict[str, Any] = {"init_threshold": 0.5, "bandwidth": 0.3, "l0_coefficient": l0_coefficient}
        sae = SAE(d_in=D, d_sae=F, activation="jumprelu", **options)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, betas=(0.0, 0.999))
        x = data(256, D, dtype=torch.float32)
        for _ in range(150):
            optimizer.zero_grad()
            sae.loss(x).loss.backward()
            optimizer.step()
        return float(sae.loss(x).l0), float(sae.log_threshold.detach().exp().mean())

    (few, high), (many, low) = trained(5.0), trained(0.0)
    assert few < 0.7 * many and high > 1.2 * low, (few, high, many, low)


# --- AuxK -----------------------------------------------------------------------------------------------------------


def with_dead(n_dead: int, **options) -> tuple[SAE, Tensor]:
    sae = make(dead_after_tokens=100, **options)
    dead = torch.arange(0, F, F // n_dead)[:n_dead]
    sae.tokens_since_fired[dead] = 100
    with torch.no_grad():
        sae.encoder.bias[dead] -= 50.0
    return sae, dead


@pytest.mark.parametrize("n_dead,k_aux", [(40, 10), (4, 10)])
def test_auxk_is_the_residual_rebuilt_by_the_best_dead_latents(n_dead, k_aux) -> None:
    sae, dead = with_dead(n_dead, k_aux=k_aux)
    with torch.no_grad():
        sae.encoder.bias[dead] += 49.0  # below every live latent, but positive for some tokens
    x = data(30, D)
    out = sae.loss(x)
    pre = reference.pre_activations(x, sae.encoder.weight, sae.encoder.bias, sae.b_dec)
    hidden = torch.full_like(pre, -1.0)
    hidden[:, dead] = pre.detach()[:, dead]
    chosen = reference.topk_mask(hidden, min(k_aux, n_dead))
    residual = (x - sae(x)).detach()
    e_hat = reference.decode(torch.where(chosen, pre, torch.zeros_like(pre)), sae.W_dec)
    want = (e_hat - residual).square().sum(-1).mean() / 32
    torch.testing.assert_close(out.aux, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, out.mse + out.aux)
    got = torch.autograd.grad(out.aux, [sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec])
    exact = torch.autograd.grad(want, [sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec])
    for g, w in zip(got, exact, strict=True):
        assert w.any(), "AuxK has to reach the encoder, the decoder and both biases"
        torch.testing.assert_close(g, w, rtol=0, atol=1e-12 * float(w.abs().max()))


def test_auxk_revives_dead_latents() -> None:
    def revived(aux_coefficient: float) -> int:
        """Of 100 latents pushed out of reach, how many fire again within 100 steps."""
        sae = SAE(d_in=D, d_sae=F, k=K, dead_after_tokens=2000, k_aux=16, aux_coefficient=aux_coefficient)
        with torch.no_grad():
            sae.encoder.bias[::2] = -3.0
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        gen = torch.Generator().manual_seed(0)
        for _ in range(100):
            sae.loss(torch.randn(256, D, generator=gen)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return int((sae.tokens_since_fired[::2] < 256 * 80).sum())

    assert revived(1 / 32) > 20 + revived(0.0)


def test_auxk_is_off_without_dead_latents_in_eval_and_by_its_coefficient() -> None:
    x = data(9, D)
    assert make().loss(x).aux == 0
    assert with_dead(20)[0].eval().loss(x).aux == 0
    sae, dead = with_dead(20, aux_coefficient=0.0)
    with torch.no_grad():
        sae.encoder.bias[dead] += 50.0
    assert sae.loss(x).aux == 0


def test_dead_latents_are_counted_in_tokens_and_only_in_training() -> None:
    sae = make()
    fired = sae.encode(data(5, 4, D)).reshape(-1, F).gt(0).any(0)
    for _ in range(2):
        sae.loss(data(5, 4, D))
    assert (sae.tokens_since_fired[fired] == 0).all() and (sae.tokens_since_fired[~fired] == 40).all()
    before = sae.tokens_since_fired.clone()
    sae.eval().loss(data(5, 4, D))
    assert torch.equal(sae.tokens_since_fired, before)
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[0] = True
    sae.train().loss(data(5, 4, D), mask=mask)
    assert int(sae.tokens_since_fired.max()) == 44


# --- start, normalisation, saving -----------------------------------------------------------------------------------


def test_b_dec_starts_at_the_geometric_median() -> None:
    x = data(500, D, dtype=torch.float32) + 3
    x[:20] += 1000  # the mean follows these, the median hardly does
    sae = SAE(d_in=D, d_sae=F).initialise_from_data(x)
    assert (sae.b_dec - 3).abs().max() < 0.3
    with pytest.raises(DataError, match="at least one row"):
        sae.initialise_from_data(x[:0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_normalisation_is_undone_in_the_output_and_folds_into_the_weights(variant) -> None:
    sae, x = make(**variant), data(20, D) * 3 + 5
    mean, scale = x.mean(0), 0.25
    plain = sae((x - mean) * scale) / scale + mean
    plain_loss = sae.loss((x - mean) * scale)
    sae.set_input_normalisation(mean, scale)
    torch.testing.assert_close(sae(x), plain, rtol=1e-10, atol=1e-10)
    normalised = sae.loss(x)
    torch.testing.assert_close(normalised.loss, plain_loss.loss)
    torch.testing.assert_close(normalised.x_hat, plain, rtol=1e-10, atol=1e-10)
    f, x_hat = sae.encode(x), sae(x)
    sae.fold_normalisation_()
    assert sae.input_scale == 1 and not sae.input_mean.any() and sae.cfg.decoder_norm == "free"
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-9, atol=1e-9)


def test_the_loss_passes_gradcheck() -> None:
    for variant in VARIANTS:
        sae = make(**variant).eval()

        def loss(x: Tensor, w_enc: Tensor, w_dec: Tensor, b_dec: Tensor, sae: SAE = sae) -> Tensor:
            values = {"encoder.weight": w_enc, "W_dec": w_dec, "b_dec": b_dec}
            return torch.func.functional_call(Loss(sae), {f"sae.{n}": v for n, v in values.items()}, (x,))

        inputs = (data(3, D), *(p.detach().clone() for p in (sae.encoder.weight, sae.W_dec, sae.b_dec)))
        assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in inputs], fast_mode=True)


class Loss(torch.nn.Module):
    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        return self.sae.loss(x).loss


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        ({"k": F + 1}, f"k must be at most d_sae = {F}, got {F + 1}"),
        ({"k": 0}, "k must be a whole number ≥ 1, got 0"),
        ({"d_in": 0}, "d_in must be"),
        ({"d_sae": 2.5}, "d_sae must be a whole number"),
        ({"activation": "gated"}, "activation must be one of 'relu', 'topk', 'batchtopk', 'jumprelu', got 'gated'"),
        ({"activation": "batchtopk", "k": F + 1}, "k must be at most"),
        ({"bandwidth": 0}, "bandwidth must be a number"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"l1_coefficient": -1}, "l1_coefficient must be a number ≥ 0"),
        ({"l1_coefficient": float("nan")}, "l1_coefficient must be a number ≥ 0"),
        ({"l1_weighting": "no"}, "l1_weighting must be one of"),
        ({"init_decoder_norm": 0.1}, "set decoder_norm='free'"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"width": 3}, "SAE has no option width"),
    ],
)
def test_options_that_cannot_be_meant(options, message) -> None:
    with pytest.raises(ConfigError) as error:
        SAE(**{"d_in": D, "d_sae": F, "k": K} | options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_ways_to_construct() -> None:
    config = SAEConfig(d_in=D, d_sae=F)
    assert SAE(config).cfg == SAE(**asdict(config)).cfg
    assert SAE(d_in=D, d_sae=F, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="got both"):
        SAE(config, k=3)
    with pytest.raises(ConfigError, match="needs d_sae"):
        SAE(d_in=3)
    with pytest.raises(ConfigError, match="takes an SAEConfig, got int"):
        SAE(512, d_sae=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(activation, value) -> None:
    x = data(9, D)
    x[4, 3] = value
    with pytest.raises(DataError, match="1 of 9 activation rows hold NaN or infinity"):
        make(activation).loss(x)


def test_parameters_that_are_not_finite() -> None:
    sae = make()
    with torch.no_grad():
        sae.W_dec.fill_(float("nan"))
    with pytest.raises(DataError, match="because of W_dec"):
        sae.loss(data(9, D))


def test_input_that_does_not_fit() -> None:
    sae = make()
    for call in (sae, sae.encode, sae.encode_sparse, sae.loss):
        with pytest.raises(DataError, match="expected activations \\[..., 12\\], got shape \\(3, 5\\)"):
            call(data(3, 5))
    with pytest.raises(DataError, match="floating-point"):
        sae(torch.ones(3, D, dtype=torch.int64))
    with pytest.raises(DataError, match="last axis of 5"):
        sae.decode(data(3, 5))
    with pytest.raises(DataError, match="target must have"):
        sae.loss(data(3, D), data(4, D))
    with pytest.raises(DataError, match="mask must be bool"):
        sae.loss(data(3, D), mask=torch.ones(3))


def test_a_code_too_dense_says_so_where_a_sparse_one_is_asked_for() -> None:
    sae = make("relu", max_l0=3)
    x = data(9, D)
    with pytest.raises(TooDenseError, match="max_l0=3"):
        sae.encode_sparse(x)
    assert sae.loss(x).code is None and sae(x).shape == x.shape
    assert issubclass(TooDenseError, FastSAEError) and fastsae.FastSAEError is FastSAEError
