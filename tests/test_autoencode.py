"""The whole autoencoder as one operation: every output and gradient against float64 autograd of `reference`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastsae
from fastsae import autoencode as fused
from fastsae import auxk, ops, reference
from fastsae.autoencode import RULES, Autoencoded, autoencode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "target", "weight", "bias", "w_dec", "b_dec", "threshold")


def problem(N: int, D: int, F: int, dtype: torch.dtype = torch.float64, shift: float = 0.0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(N + D + F)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=gen, dtype=torch.float64) * scale).to(DEVICE, dtype)

    made = {
        "x": randn(N, D), "target": randn(N, D), "weight": randn(F, D, scale=D**-0.5), "bias": randn(F, scale=0.1),
        "w_dec": randn(F, D, scale=D**-0.5), "b_dec": randn(D, scale=0.3), "threshold": randn(F).abs() * 0.3 + 0.2,
    }  # fmt: skip
    made["bias"] += shift
    return {name: t.requires_grad_() for name, t in made.items()}


def dense(p: dict[str, Tensor], rule: str, k: int, centred: bool, weighted: bool, bandwidth: float,
          dead: Tensor | None, k_aux: int) -> list[Tensor]:  # fmt: skip
    """x̂, error, l1, l0 (of JumpReLU), aux and f of the reference."""
    centre = p["b_dec"] if centred else None
    weights = p["x"], p["weight"], p["bias"]
    l0 = p["x"].new_zeros(0)
    if rule == "jumprelu":
        f = reference.encode_jumprelu(*weights, p["threshold"], centre, bandwidth)
        l0 = reference.l0(reference.pre_activations(*weights, centre), p["threshold"], bandwidth)
    elif rule == "relu":
        f = reference.encode_relu(*weights, centre)
    else:
        f = (reference.encode_topk if rule == "topk" else reference.encode_batchtopk)(*weights, k, centre)
    x_hat = reference.decode(f, p["w_dec"]) + p["b_dec"]
    aux = p["x"].new_zeros(0)
    if dead is not None:
        aux = reference.auxk(*weights, p["w_dec"], p["target"] - x_hat, dead, min(k_aux, len(dead)), centre)
    error = (x_hat - p["target"]).square().sum(-1)
    return [x_hat, error, reference.l1(f, p["w_dec"] if weighted else None), l0, aux, f]


def pulled(outputs: list[Tensor], p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of all outputs."""
    gen = torch.Generator().manual_seed(3)
    pulls = [torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t) for t in outputs]
    total = sum((t * pull).sum() for t, pull in zip(outputs, pulls, strict=True))
    assert isinstance(total, Tensor)
    got = torch.autograd.grad(total, [p[name] for name in NAMES], allow_unused=True)
    return {name: g for name, g in zip(NAMES, got, strict=True) if g is not None}


def compare(p: dict[str, Tensor], rule: str, tolerance: float, *, k: int = 3, centred: bool = True,
            weighted: bool = False, bandwidth: float = 0.2, dead: Tensor | None = None, k_aux: int = 4,
            backend: str = "torch", most: int | None = None) -> Autoencoded:  # fmt: skip
    exact = {name: t.detach().double().requires_grad_() for name, t in p.items()}
    want = dense(exact, rule, k, centred, weighted, bandwidth, dead, k_aux)
    F = p["weight"].shape[0]
    is_dead = None if dead is None else torch.zeros(F, dtype=torch.bool, device=DEVICE).index_fill_(0, dead, True)
    made = autoencode(
        p["x"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], rule=rule, target=p["target"], centred=centred, k=k,
        most=most, threshold=p["threshold"] if rule == "jumprelu" else None, bandwidth=bandwidth, weighted=weighted,
        dead=dead, is_dead=is_dead, k_aux=k_aux, backend=backend,
    )  # fmt: skip
    l0 = made.l0 if rule == "jumprelu" else made.l0[:0]
    f = want.pop()
    got = [made.x_hat, made.error, made.l1, l0, made.aux]
    for name, g, w in zip(("x_hat", "error", "l1", "l0", "aux"), got, want, strict=True):
        close(name, g, w, tolerance)
    assert torch.equal(made.l0.long(), (f > 0).sum(1)) and torch.equal(made.fired.long(), (f > 0).sum(0))
    code = made.code(F)
    if most is None:
        assert code is not None
        close("code", code.to_dense(), f, tolerance)
        got, want = [*got, code.to_dense()], [*want, f]
    else:
        assert code is None
    mine, truth = pulled(got, p), pulled(want, exact)
    assert mine.keys() == truth.keys() and ("threshold" in truth) == (rule == "jumprelu")
    for name in truth:
        close(f"gradient of {name}", mine[name], truth[name], tolerance)
    return made


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape, name
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.3g} of the largest entry, at most {tolerance:g}"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("N", "D", "F", "k"), [(1, 1, 1, 1), (17, 5, 63, 4), (33, 20, 300, 9), (40, 17, 130, 60)])
@pytest.mark.parametrize(("centred", "weighted"), [(True, False), (False, True)])
def test_every_output_and_gradient(rule, N, D, F, k, centred, weighted):
    compare(problem(N, D, F), rule, 1e-11, k=k, centred=centred, weighted=weighted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_codes_too_dense_for_slots(rule, weighted, shift):
    """Half dense, and nearly full; no code, and everything else as it should be."""
    compare(problem(20, 12, 150, shift=shift), rule, 1e-11, weighted=weighted, most=2)


@pytest.mark.parametrize("most", [None, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n_dead", "k_aux"), [(1, 1), (9, 4), (9, 50)])
def test_dead_latents(rule, n_dead, k_aux, most):
    if most is not None and "topk" in rule:
        return  # their codes are never too dense
    dead = torch.arange(0, 60, 60 // n_dead, device=DEVICE)[:n_dead]
    compare(problem(21, 8, 60), rule, 1e-11, dead=dead, k_aux=k_aux, most=most)


def test_without_dead_latents_aux_is_zero():
    """An empty list, and one filled up with living latents, as it is on a GPU."""
    p = problem(5, 4, 9)
    for dead in (torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.tensor([2, 7], device=DEVICE)):
        made = autoencode(
            p["x"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], rule="topk", target=p["target"], k=2,
            dead=dead, is_dead=torch.zeros(9, dtype=torch.bool, device=DEVICE), k_aux=2,
        )  # fmt: skip
        assert made.aux.shape == (5,) and not made.aux.any()
        assert all(not g.any() for g in torch.autograd.grad(made.aux.sum(), [p["weight"], p["w_dec"]]))


@pytest.mark.parametrize("rule", RULES)
def test_a_latent_that_fires_everywhere_and_one_that_never_does(rule):
    p = problem(30, 8, 50)
    with torch.no_grad():
        p["bias"][3], p["bias"][4] = 30.0, -30.0
    made = compare(p, rule, 1e-11, weighted=True)
    assert made.fired[3] == 30 and made.fired[4] == 0


@settings(max_examples=40)
@given(
    N=st.integers(1, 9), D=st.integers(1, 9), F=st.integers(1, 40), k=st.integers(1, 40), rule=st.sampled_from(RULES),
    centred=st.booleans(), weighted=st.booleans(), shift=st.sampled_from([-3.0, 0.0, 1.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape(N, D, F, k, rule, centred, weighted, shift, seed):
    p = problem(N, D + seed % 2, F, shift=shift)
    compare(p, rule, 1e-10, k=min(k, F), centred=centred, weighted=weighted)


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule):
    """Numerically, away from places where the choice would change; the threshold's gradient is none of that kind."""
    p = problem(4, 3, 6)
    names = [name for name in NAMES if name != "threshold"]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        q = dict(zip(names, tensors, strict=True))
        threshold = p["threshold"].detach() if rule == "jumprelu" else None
        made = autoencode(q["x"], q["weight"], q["bias"], q["w_dec"], q["b_dec"], rule=rule, target=q["target"], k=2,
                          threshold=threshold, weighted=True)  # fmt: skip
        return made.x_hat, made.error, made.l1, made.values

    assert torch.autograd.gradcheck(call, [p[name] for name in names], eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_errors_in_low_precision_are_no_larger_than_those_of_dense_torch(dtype, rule):
    """Both against float64, with the choice of latents pinned to the one made in low precision."""
    p = problem(40, 32, 300, dtype, shift=-0.5)
    made = autoencode(p["x"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], rule=rule, target=p["target"], k=8,
                      threshold=p["threshold"] if rule == "jumprelu" else None)  # fmt: skip
    code = made.code(300)
    assert code is not None
    chosen = code.to_dense() > 0

    def plain(q: dict[str, Tensor]) -> list[Tensor]:
        pre = reference.pre_activations(q["x"], q["weight"], q["bias"], q["b_dec"])
        x_hat = reference.decode(torch.where(chosen, pre, 0), q["w_dec"]) + q["b_dec"]
        return [x_hat, (x_hat - q["target"]).float().square().sum(-1).to(q["x"].dtype)]

    exact = {name: t.detach().double().requires_grad_() for name, t in p.items()}
    want, mine, theirs = pulled(plain(exact), exact), pulled([made.x_hat, made.error], p), pulled(plain(p), p)
    slack = 4 * torch.finfo(dtype).eps
    for name, w in want.items():
        if name != "threshold":
            ours, other = ((g[name].double() - w).abs().max() / w.abs().max() for g in (mine, theirs))
            assert ours <= 1.5 * other + slack, f"{name}: {ours:.3g} against {other:.3g} of torch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "gated"}, "expected a rule of relu, topk, jumprelu, batchtopk, got 'gated'"),
        ({"rule": "topk", "k": 10}, "k in 1 … 9"),
        ({"rule": "jumprelu"}, r"needs a threshold \[9\], got None"),
        ({"rule": "jumprelu", "threshold": torch.ones(3)}, r"expected threshold \[9\]"),
        ({"rule": "relu", "target": torch.ones(2, 4)}, r"expected target \[5, 4\] .*, got \[2, 4\]"),
    ],
)
def test_bad_input_is_a_clear_error(change, message):
    p = problem(5, 4, 9)
    with pytest.raises(ValueError, match=message):
        autoencode(p["x"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], **change)


# --- in kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("N", "D", "F", "k", "more"),
    [
        (1, 1, 1, 1, {}),
        (9, 16, 63, 4, {"weighted": True}),
        (7, 17, 100, 9, {"centred": False}),
        (6, 16, 40, 3, {"dead": 5}),
    ],
)
def test_kernels_agree_with_float64(rule, N, D, F, k, more):
    pytest.importorskip("triton")
    more = {**more, "dead": torch.arange(0, F, 8, device=DEVICE)} if "dead" in more else more
    compare(problem(N, D, F, torch.float32), rule, 2e-5, k=k, backend="triton", **more)


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_kernels_hand_dense_codes_over(rule):
    pytest.importorskip("triton")
    compare(problem(6, 16, 80, torch.float32), rule, 2e-5, backend="triton", most=2)


# --- as torch's operation -------------------------------------------------------------------------------------------


def arguments(rule: str, dtype: torch.dtype = torch.float64, dead: bool = False) -> tuple[Any, ...]:
    p = problem(6, 4, 20, dtype)
    which = torch.tensor([2, 5], device=DEVICE)
    is_dead = torch.zeros(20, dtype=torch.bool, device=DEVICE).index_fill_(0, which, True)
    threshold = p["threshold"] if rule == "jumprelu" else None
    tensors = (p["x"], p["target"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], threshold)
    options = (rule, 3, 20, 0.2, True, True, 2, "torch", 0)
    return (*tensors, which if dead else None, is_dead if dead else None, *options)


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule):
    torch.library.opcheck(fused._autoencode, arguments(rule))
    torch.library.opcheck(fused._autoencode, arguments(rule, torch.float32, dead=True))


@pytest.mark.parametrize("rule", RULES)
def test_opcheck_of_the_parts(rule):
    p = problem(6, 4, 20)
    threshold = p["threshold"] if rule == "jumprelu" else None
    weights = p["x"], p["weight"], p["bias"], p["b_dec"], threshold
    torch.library.opcheck(ops._select, (*weights, rule, 3, 20, 0.2, "torch", 0))
    code = ops.encode_topk(p["x"], p["weight"], p["bias"], 3)
    values = code.values.detach().requires_grad_()
    torch.library.opcheck(ops._decode, (values, code.indices, code.counts, p["w_dec"], "torch"))
    torch.library.opcheck(auxk.dead_latents, (torch.arange(9), 5, 0))


@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_module_is_one_graph_with_the_same_gradients(rule):
    options: dict[str, Any] = {"k": 4} if "topk" in rule else {}
    sae = fastsae.SAE(d_in=8, d_sae=64, activation=rule, dead_after_tokens=5, device=DEVICE, **options)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.sae = torch.nn.Linear(8, 8, device=DEVICE), sae

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.before(x)
            return self.sae.loss(x).loss, self.sae(x)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(10, 8, device=DEVICE)
    found = []
    for run in (model, compiled):
        sae.tokens_since_fired.copy_(5 * (torch.arange(64) < 7))
        model.zero_grad()
        loss, x_hat = run(x)
        (loss + x_hat.square().sum()).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), x_hat.detach(), *gradients])
    assert len(found[0]) == 2 + len(list(model.parameters()))
    for mine, eager in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, eager)


def test_compiled_encode_and_decode_are_one_graph():
    sae = fastsae.SAE(d_in=8, d_sae=64, k=4, device=DEVICE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x: Tensor) -> Tensor:
        return sae.decode(sae.encode(x)) + fastsae.ops.decode(sae.encode_sparse(x), sae.W_dec, check=False)

    x = torch.randn(10, 8, device=DEVICE)
    both(x).sum().backward()
    torch.testing.assert_close(both(x), 2 * sae(x) - sae.b_dec)


@pytest.mark.parametrize("call", ["loss", "encode_sparse", "decode"])
def test_second_gradients_are_a_clear_error(call):
    sae, x = fastsae.SAE(d_in=4, d_sae=16, k=2, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    out = {
        "loss": lambda: sae.loss(x).loss,
        "encode_sparse": lambda: sae.encode_sparse(x).values.sum(),
        "decode": lambda: sae.decode(sae.encode_sparse(x).detach()).square().sum(),
    }[call]()
    parameter = sae.W_dec if call != "encode_sparse" else sae.encoder.weight
    (first,) = torch.autograd.grad(out, parameter, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated a second time.*fastsae.reference"):
        first.square().sum().backward()


def test_autocast_is_that_of_a_linear_layer():
    """Products in bfloat16 within, whatever the parameters' dtype; gradients in the parameters' dtype."""
    sae, x = fastsae.SAE(d_in=16, d_sae=64, k=4, device=DEVICE), torch.randn(9, 16, device=DEVICE)
    half = fastsae.SAE(d_in=16, d_sae=64, k=4, dtype="bfloat16", device=DEVICE)
    half.load_state_dict(sae.state_dict())
    with torch.autocast(DEVICE, torch.bfloat16):
        out = sae.loss(x)
    out.loss.backward()
    want = half.loss(x.bfloat16())
    want.loss.backward()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, want.loss)
    for p, q in zip(sae.parameters(), half.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_autocast_takes_b_dec_off_before_it_rounds(activation, centred):
    """Of data far from 0, as of most residual streams; beside the same written with nn.functional.linear."""
    sae = fastsae.SAE(d_in=16, d_sae=64, k=8, activation=activation, apply_b_dec_to_input=centred, device=DEVICE)
    x = 100 + torch.randn(256, 16, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    with torch.no_grad():
        sae.b_dec.fill_(100.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = sae.loss(x)
        x_hat = sae(x)
        pre = torch.nn.functional.linear(x - sae.b_dec if centred else x, sae.encoder.weight, sae.encoder.bias)
        mask = reference.topk_mask(pre, 8) if activation == "topk" else pre > 0
        by_hand = torch.where(mask, pre, 0) @ sae.W_dec + sae.b_dec
        want = (by_hand - x).square().sum(-1).mean()
    exact = fastsae.SAE(sae.cfg).double().to(DEVICE)
    exact.load_state_dict(sae.state_dict())
    truth = float(exact.loss(x.double()).mse)
    assert abs(float(out.mse) - truth) <= abs(float(want) - truth) + 0.005 * truth
    torch.testing.assert_close(x_hat.float(), out.x_hat.float())


@pytest.mark.parametrize("rule", RULES)
def test_checkpointing(rule):
    from torch.utils.checkpoint import checkpoint

    options: dict[str, Any] = {"k": 4} if "topk" in rule else {}
    sae = fastsae.SAE(d_in=8, d_sae=64, activation=rule, device=DEVICE, **options)
    x = torch.randn(10, 8, device=DEVICE, requires_grad=True)
    want = torch.autograd.grad(sae(x).square().sum(), [x, *sae.parameters()])
    out = checkpoint(lambda x: sae(x), x, use_reentrant=False)
    assert isinstance(out, Tensor)
    for got, w in zip(torch.autograd.grad(out.square().sum(), [x, *sae.parameters()]), want, strict=True):
        assert torch.equal(got, w)
