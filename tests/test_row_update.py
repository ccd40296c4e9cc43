"""The kernel that updates a feature's rows as soon as their gradients are finished, against RowAdam in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastsae import SAE, TrainStep, fused_rows, gpu
from fastsae.kernels import row_update, weight_grad
from fastsae.moments import EightBit
from fastsae.row_adam import AdamOptions, RowAdam
from fastsae.row_blocks import Part, RowBlocks, Weights
from tests.encode_case import DEVICE

STATES = ["fp32", "bf16", "8bit", "rowwise"]


def part(N: int, K: int, F: int, D: int, seed: int = 0) -> tuple[Part, Weights]:
    gen = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(DEVICE)

    indices = torch.stack([torch.randperm(F, generator=gen)[:K] for _ in range(N)]).int().to(DEVICE)
    indices[: N // 2, 0] = 3  # often on
    counts = torch.randint(0, K + 1, (N,), generator=gen).int().to(DEVICE)
    values = (randn(N, K).abs() + 0.1) * (torch.arange(K, device=DEVICE) < counts[:, None])
    w_dec = torch.nn.functional.normalize(randn(F, D), dim=1)
    weights = Weights(randn(F, D), randn(F), w_dec, None, 0.0, w_dec.norm(dim=1))
    return Part(randn(N, D), randn(N, D), values, indices, counts, randn(N).abs(), None), weights


def both(given: Part, weights: Weights, options: AdamOptions, **kind: Any) -> tuple[list[RowAdam], list[RowAdam], dict]:
    """One step by the kernel, and the same in torch operations, from equal states."""
    lazy = kind.pop("lazy", False)
    F = weights.bias.numel()
    found: dict[str, Any] = {}
    made = []
    for name in ("kernel", "torch"):
        own = weights._replace(weight=weights.weight.clone(), w_dec=weights.w_dec.clone())
        states = [RowAdam(t, kind["state"], options.beta1, False) for t in (own.w_dec, own.weight)]
        for i, state in enumerate(states):
            warm_up(state, i)
        last = torch.full((F,), options.t - 5, dtype=torch.int32, device=DEVICE) if lazy else None
        torch.manual_seed(0)
        if name == "kernel":
            rows = fused_rows.FusedRows(own, [given], [], last)
            norms, square = (torch.zeros(F, device=DEVICE) for _ in range(2))
            pair = (states[0], states[1])
            rows.run(pair, options, True, 1, norms, square, False)
            found["norm"] = square.sum()
            rows.run(pair, options, True, 1, norms, None, True)
            found |= {"bias": rows.d_bias, "norms": norms, "last": last}
        else:
            from fastsae.row_adam import project_

            blocks = RowBlocks.of(own, [given], [], lazy)
            assert lazy or blocks.touched is None
            found |= {"want_norm": torch.zeros((), device=DEVICE), "want_bias": torch.zeros(F, device=DEVICE)}
            for _, at, block in blocks:
                project_(block.w_dec, states[0].rows(at))
                found["want_norm"] += block.w_dec.square().sum() + block.weight.square().sum()
                found["want_bias"][at] = block.bias
                silent = None if last is None else (options.t - 1 - last[at])[:, None]
                states[0].update(at, block.w_dec, options, True, silent)
                states[1].update(at, block.weight, options, False, silent)
        made.append(states)
    return made[0], made[1], found


def warm_up(state: RowAdam, seed: int) -> None:
    """Moments as after some steps."""
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    F = state.weight.shape[0]
    for moment, signed in ((state.m, True), (state.v, False)):
        if moment is not None:
            value = torch.randn(F, state.weight.shape[1], generator=gen)
            value = value if signed else value.square()
            value = value.mean(1, keepdim=True) if signed is False and state.state == "rowwise" else value
            moment.write(slice(0, F), value.to(DEVICE), None)


SIZES = [(17, 5, 40, 19), (9, 4, 30, 63), (6, 7, 24, 300), (5, 2, 9, 512)]  # N, K, F, D


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("size", SIZES)
def test_one_step_is_that_of_torch(size, state, beta1, monkeypatch):
    monkeypatch.setattr(weight_grad, "SPLIT", 4)  # the latent that is often on is shared among programs
    torch.manual_seed(0)
    given, weights = part(*size)
    options = AdamOptions(0.01, beta1, 0.99, 1e-6, 0.05, 7, torch.tensor(0.5, device=DEVICE))
    ours, theirs, found = both(given, weights, options, state=state)
    torch.testing.assert_close(found["norm"], found["want_norm"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["bias"], found["want_bias"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["norms"], ours[0].weight.norm(dim=1), rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-5)
        for x, y in ((a.m, b.m), (a.v, b.v)):
            assert (x is None) == (y is None)
            if x is None or y is None:
                continue
            if isinstance(x, EightBit) and isinstance(y, EightBit):  # rounded by other random bits: one step at most
                assert (x.codes.int() - y.codes.int()).abs().max() <= 1
                torch.testing.assert_close(x.scales, y.scales, rtol=1e-4, atol=1e-6)
            else:
                narrow = state == "bf16" or (state == "rowwise" and x is a.m)
                close: Any = {"rtol": 2**-7, "atol": 1e-5} if narrow else {"rtol": 1e-3, "atol": 1e-5}
                torch.testing.assert_close(x.read(slice(None)), y.read(slice(None)), **close)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_rows_that_waited(state):
    given, weights = part(6, 3, 40, 20)
    options = AdamOptions(0.01, 0.0, 0.9, 1e-6, 0.0, 9)
    ours, theirs, found = both(given, weights, options, state=state, lazy=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-5)
    touched = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    for n in range(6):
        touched[given.indices[n, : given.counts[n]].long()] = True
    assert torch.equal(found["last"] == 9, touched) and not touched.all()
    same = (ours[0].weight == weights.w_dec).all(1)
    assert torch.equal(same, ~touched)


def test_stochastic_rounding_is_right_on_average():
    """Of the kernel's own hash: the mean of many roundings is the number, and neighbours fall independently."""
    from triton.runtime.interpreter import InterpretedFunction

    assert DEVICE == "cuda" or isinstance(row_update.row_update_kernel, InterpretedFunction)
    D, F = 512, 64
    given, weights = part(2, 1, F, D)
    given = given._replace(counts=torch.zeros_like(given.counts), values=torch.zeros_like(given.values))
    state = RowAdam(torch.zeros(F, D, device=DEVICE), "bf16", 0.0, False)
    other = RowAdam(torch.zeros(F, D, device=DEVICE), "bf16", 0.0, False)
    own = weights._replace(w_dec=state.weight, weight=other.weight)
    state.v.data.fill_(1.0)  # type: ignore[union-attr]
    rows = fused_rows.FusedRows(own, [given._replace(l1=None)], [], None)
    options, norms = AdamOptions(0.0, 0.0, 0.999, 1e-8, 0.0, 1), torch.zeros(F, device=DEVICE)
    rows.run((state, other), options, False, 5, norms, None, True)
    v = state.v.data.float()  # type: ignore[union-attr]
    # 0.999 lies between 0.99609375 and 1.
    assert set(v.unique().tolist()) == {0.99609375, 1.0}
    assert float(v.mean()) == pytest.approx(0.999, abs=5 * 0.0039 * (0.19 / (F * D)) ** 0.5 * 2)
    up = (v == 1.0).float() - (v == 1.0).float().mean()
    for shifted in (up.roll(1, 0), up.roll(1, 1)):
        assert abs(float((up * shifted).mean() / up.var())) < 0.03


RULES: list[dict[str, Any]] = [
    {"activation": "topk", "k": 3, "dead_after_tokens": 12, "k_aux": 4},
    {"activation": "relu", "l1_coefficient": 0.3, "decoder_norm": "free"},
    {"activation": "jumprelu", "l0_coefficient": 0.05, "bandwidth": 0.5, "init_threshold": 0.3},
    {"activation": "batchtopk", "k": 3, "aux_coefficient": 0.0},
]


@pytest.mark.parametrize("how", [{}, {"betas": (0.0, 0.99)}, {"clip": 0.5}, {"clip": 0.5, "clip_by": "previous"}])
@pytest.mark.parametrize("options", RULES)
def test_training_steps_by_kernels_are_those_of_torch(options, how, monkeypatch):
    monkeypatch.setattr(gpu, "slots_for", lambda k: 16)  # the interpreter is slow at sorting
    monkeypatch.setattr(fused_rows, "EXTRA_ELEMENTS", 24)  # dead latents two at a time
    if "k_aux" in options and how.get("betas"):
        how = how | {"eps": 1e-4}
    D, F, N = 12, 24, 4
    saes = [SAE(d_in=D, d_sae=F, **options, backend=backend, device=DEVICE) for backend in ("triton", "torch")]
    steps = [TrainStep(sae, lr=3e-3, **how) for sae in saes]
    launched = []
    real = row_update.row_update
    monkeypatch.setattr(row_update, "row_update", lambda *a, **k: (launched.append(1), real(*a, **k))[1])
    gen = torch.Generator().manual_seed(3)
    for _ in range(8):
        x = torch.randn(N, D, generator=gen).to(DEVICE)
        got, want = (step(x) for step in steps)
        for name in ("loss", "l0", "aux"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-3, atol=1e-4)
    assert len(launched) >= 8
    for p, q in zip(saes[0].parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(monkeypatch):
    monkeypatch.setattr(gpu, "slots_for", lambda k: 16)
    gen = torch.Generator().manual_seed(3)
    xs = [torch.randn(2, 12, generator=gen).to(DEVICE) for _ in range(4)]

    def start() -> tuple[SAE, TrainStep]:
        sae = SAE(d_in=12, d_sae=24, activation="relu", l1_coefficient=0.3, decoder_norm="free", dtype="float16",
                  backend="triton", device=DEVICE)  # fmt: skip
        return sae, TrainStep(sae, lr=1e-2, state="8bit")

    whole, step = start()
    for x in xs[:2]:
        step(x)
    again, rest = start()
    again.load_state_dict(whole.state_dict())
    rest.load_state_dict({k: v.clone() if isinstance(v, Tensor) else v for k, v in step.state_dict().items()})
    for x in xs[2:]:
        step(x)
        rest(x)
    for name, t in [*whole.state_dict().items(), *step.tensors.items()]:
        assert torch.equal({**again.state_dict(), **rest.tensors}[name], t), name


def test_the_same_bits_every_time():
    given, weights = part(9, 4, 30, 63)
    options = AdamOptions(0.01, 0.9, 0.99, 1e-6, 0.0, 3)
    first, second = (both(given, weights, options, state="8bit")[0] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for x, y in zip([a.weight, *a.tensors.values()], [b.weight, *b.tensors.values()], strict=True):
            assert torch.equal(x, y)


def test_no_second_moment_is_rounded_to_0_in_eight_bits():
    given, weights = part(9, 4, 30, 63)
    given.rows[:, 0] *= 1e6
    options = AdamOptions(0.01, 0.9, 0.99, 1e-6, 0.0, 3, torch.tensor(1.0, device=DEVICE))
    ours, theirs, _ = both(given, weights, options, state="8bit")
    for encoder in (ours[1], theirs[1]):
        assert isinstance(encoder.v, EightBit)
        assert int((encoder.v.codes == 1).sum()) > 63 and int(encoder.v.codes.min()) == 1


def test_rows_that_are_too_wide_are_refused():
    with pytest.raises(ValueError, match="at most"):
        wide = weight_grad.WIDEST + 1
        given, weights = part(1, 1, 4, wide)
        fused = fused_rows.FusedRows(weights, [given], [], None)
        states = [RowAdam(t, "fp32", 0.9, False) for t in (weights.w_dec, weights.weight)]
        fused.run((states[0], states[1]), AdamOptions(0.1, 0.9, 0.9, 1e-8, 0.0, 1), True, 0, weights.bias, None, True)
