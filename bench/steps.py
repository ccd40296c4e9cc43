"""Cases of `python -m bench gpu` that train: the backward pass alone, loss and backward, and whole steps, and what
people write instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench import naive
from bench.shapes import LARGEST_STEP, Call, Case, Shape, TooLarge

RULES = ("topk", "relu", "batchtopk", "jumprelu")
DRAWN = 1 << 26  # elements of the initial weights at a time


def step_cases(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """fastsae at all shapes, TrainStep first; the dense ones where [N, F] and four times [F, D] fit."""
    def case(op: str, variant: str, build: Callable[[torch.device], Call]) -> Case:
        return Case(op, variant, shape, dtype, build)

    for name, options in STATES.items():
        if dtype == torch.bfloat16 or "bf16-sr" not in name:
            yield Case("step", f"TrainStep topk, {name}", shape, dtype,
                       lambda device, options=options: _train_step(shape, dtype, device, options),
                       memory=_expected(shape, dtype, options))  # fmt: skip
    for variant in ("by_feature", "weight_grad", "weight_grad, rows only", "weight_grad, dots first", "dx"):
        yield case("backward", variant, lambda device, variant=variant: _part(shape, dtype, device, variant))
    for rule in RULES:
        yield case("loss + backward", f"fastsae {rule}", lambda device, rule=rule: _ours(shape, dtype, device, rule))
    for rule in RULES[:2]:
        yield case("step", f"fastsae {rule}", lambda device, rule=rule: _ours(shape, dtype, device, rule, step=True))
    yield case("step", "naive dense ReLU + L1", lambda device: _naive(shape, dtype, device))
    if shape.name != "tiny":
        yield case("step", "naive dense ReLU + L1, compiled", lambda device: _naive(shape, dtype, device, True))
    yield case("loss + backward", "torch.topk + embedding_bag", lambda device: _gathered(shape, dtype, device))
    yield case("step", "torch.topk + embedding_bag", lambda device: _gathered(shape, dtype, device, step=True))


@torch.no_grad()
def drawn(shape: Shape, dtype: torch.dtype, device: torch.device, rule: str = "topk") -> Any:
    """A fresh SAE whose weights are drawn on the device: on the host the four billion numbers of S2 take a minute each
    time, and all the time there is."""
    from fastsae.sae import SAE

    name: Any = str(dtype).removeprefix("torch.")
    sizes: Any = {"d_in": shape.D, "d_sae": shape.F, "k": shape.K, "activation": rule}
    sae = SAE(**sizes, dtype=name, backend="triton", device="meta").to_empty(device=device)
    for _, t in (*sae.named_parameters(), *sae.named_buffers()):
        t.zero_()
    sae.input_scale.fill_(1.0)
    if rule == "jumprelu":
        sae.log_threshold.fill_(math.log(sae.cfg.init_threshold))
    rows = max(1, DRAWN // shape.D)
    for start in range(0, shape.F, rows):
        part = torch.randn(min(rows, shape.F - start), shape.D, device=device)
        part /= torch.linalg.vector_norm(part, dim=1, keepdim=True)
        sae.W_dec[start : start + rows] = part
        sae.encoder.weight[start : start + rows] = part
    return sae


def sae_for(shape: Shape, dtype: torch.dtype, device: torch.device, rule: str) -> Any:
    """A fresh SAE; of rules without a K, with biases that leave about K latents above 0 on x ~ N(0, 1)."""
    sae = drawn(shape, dtype, device, rule)
    if rule in ("relu", "jumprelu"):
        # Pre-activations of unit rows are N(0, 1).
        threshold = torch.special.ndtri(torch.tensor(1 - shape.K / shape.F, dtype=torch.float64))
        sae.b_enc.data.fill_(-float(threshold))
    return sae


def _ours(shape: Shape, dtype: torch.dtype, device: torch.device, rule: str, step: bool = False) -> Call:
    from bench.step import step as whole_step

    sae = sae_for(shape, dtype, device, rule)
    x = torch.randn(shape.N, shape.D, device=device, dtype=dtype)
    return whole_step(sae, x) if step else loss_and_backward(sae, lambda: sae.loss(x).loss)


# States of TrainStep that are timed, from the whole to the cheapest; options of TrainConfig.
STATES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "8bit, bf16-sr": {"state": "8bit", "master": "bf16-sr"},
    "rowwise, bf16-sr, no momentum": {"state": "rowwise", "master": "bf16-sr", "beta1": 0.0},
}


# What a step may take, in encoder products of its shape and dtype, and in GiB at its peak, all tensors counted.
GOALS: dict[tuple[str, str, str], dict[str, float]] = {
    ("TrainStep topk, fp32", "S1", "bfloat16"): {"gemms": 1.9},
    ("TrainStep topk, rowwise, bf16-sr, no momentum", "S1", "bfloat16"): {"gemms": 1.6},
    ("TrainStep topk, rowwise, bf16-sr, no momentum", "S2", "bfloat16"): {"gemms": 1.6, "allocated_gib": 48},
}


def missed(row: dict[str, Any]) -> list[str]:
    """The goals that a row of results misses, in words."""
    goals = GOALS.get((row["variant"], row["shape"], row["dtype"]), {})
    return [f"{key} {row[key]:.2f}, goal {most:g}" for key, most in goals.items() if row.get(key, 0) > most]


def _train_step(shape: Shape, dtype: torch.dtype, device: torch.device, options: dict[str, Any]) -> Call:
    from fastsae.step import TrainStep

    own = {name: value for name, value in options.items() if name != "beta1"}
    betas = options.get("beta1", 0.9), 0.999
    step = TrainStep(sae_for(shape, dtype, device, "topk"), lr=1e-6, betas=betas, **own)
    x = torch.randn(shape.N, shape.D, device=device, dtype=dtype)
    return lambda: step(x)


def _expected(shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> int:
    """Bytes that such a step allocates beside its state and x, by the estimate."""
    from fastsae.footprint import footprint
    from fastsae.recipe import TrainConfig

    name: Any = str(dtype).removeprefix("torch.")
    config = TrainConfig(
        d_in=shape.D, d_sae=shape.F, k=shape.K, batch_size=shape.N, dtype=name, normalise="none", **options
    )
    return footprint(config, "cuda").phase.total - 4 * shape.N * shape.D  # the batch in float32, which is x here


def loss_and_backward(module: nn.Module, loss: Callable[[], Tensor]) -> Call:
    def call() -> None:
        module.zero_grad(set_to_none=True)
        loss().backward()

    return call


def _part(shape: Shape, dtype: torch.dtype, device: torch.device, part: str) -> Call:
    """Kernels of the backward pass alone, on a code of features drawn evenly; checked against each other."""
    from bench.checks import WrongResult
    from fastsae.gradients import Pull
    from fastsae.kernels import decode, weight_grad

    indices = torch.randint(0, shape.F, (shape.N, shape.K), device=device, dtype=torch.int32)
    values = torch.rand(shape.N, shape.K, device=device) + 0.1
    x, g = (torch.randn(shape.N, shape.D, device=device, dtype=dtype) for _ in range(2))
    w_dec = torch.randn(shape.F, shape.D, device=device, dtype=dtype).mul_(shape.D**-0.5)
    bias = torch.zeros(shape.F, device=device, dtype=dtype)

    def run(**how: Any) -> weight_grad.ByFeature:
        return weight_grad.weight_grad(x, values, indices, None, bias, w_dec, None, 0.0, None, Pull(g), **how)

    # A few features against float64; the first is on for every token, so that its sums come from many programs.
    first = indices[:, 0].clone()
    indices[:, 0] = 0
    for made in (run(), run(with_dots=True)):
        for f in torch.linspace(0, shape.F - 1, 3, device=device).long().tolist():
            n, k = (indices == f).nonzero(as_tuple=True)
            a = values[n, k].double()
            d_pre = g[n].double() @ w_dec[f].double()
            for got, want in ((made.made.w_dec[f], a @ g[n].double()), (made.made.weight[f], d_pre @ x[n].double())):
                error = float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
                if not error <= 4 * torch.finfo(dtype).eps:
                    raise WrongResult(f"weight_grad of feature {f} is off by {error:.3g} of its norm")
    indices[:, 0] = first
    made = run()
    calls: dict[str, Call] = {
        "by_feature": lambda: weight_grad.by_feature(indices, None, shape.F),
        "weight_grad": run,
        "weight_grad, rows only": lambda: run(compact=True),
        "weight_grad, dots first": lambda: run(with_dots=True),
        "dx": lambda: decode.decode(indices, made.d_pre, w_dec),
    }
    return calls[part]


def _check_fits(shape: Shape) -> None:
    if shape.N * shape.F > LARGEST_STEP or 2 * shape.F * shape.D > LARGEST_STEP:
        raise TooLarge("not tried: dense [N, F] or [F, D] gradients with Adam's state fit no GPU we know of")


def _naive(shape: Shape, dtype: torch.dtype, device: torch.device, compiled: bool = False) -> Call:
    _check_fits(shape)
    sae = naive.NaiveSAE(shape.D, shape.F, dtype, device)
    if compiled:
        sae.loss = torch.compile(sae.loss)  # type: ignore[method-assign]
    return naive.step(sae, torch.randn(shape.N, shape.D, device=device, dtype=dtype))


class Gathered(naive.NaiveSAE):
    """TopK as one writes it without kernels: torch.topk over a dense [N, F], and embedding_bag for the decoder."""

    k = 32

    def loss(self, x: Tensor) -> Tensor:
        pre = torch.nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc)
        values, indices = pre.topk(self.k, dim=-1)
        out = torch.nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values.relu(), mode="sum")
        return (out + self.b_dec - x).square().sum(-1).mean()


def _gathered(shape: Shape, dtype: torch.dtype, device: torch.device, step: bool = False) -> Call:
    _check_fits(shape)
    sae = Gathered(shape.D, shape.F, dtype, device)
    sae.k = shape.K
    x = torch.randn(shape.N, shape.D, device=device, dtype=dtype)
    return naive.step(sae, x) if step else loss_and_backward(sae, lambda: sae.loss(x))
