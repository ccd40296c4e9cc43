"""The encoder's cases for `python -m bench gpu`: four rules, both encoders, their parts, their yardsticks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.checks import ROUNDING, WrongResult, allowed_error, code_error
from bench.shapes import Call, Case, Shape

CHECKED_ROWS = 8  # of a large case: each costs a row of [F] in float64
NAIVE_MOST = 2**31  # elements of [N, F]


class Inputs:
    """Pre-activations near N(0, 1); the bias of the threshold rules leaves about K of F above 0."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype = shape, dtype
        self.x = torch.randn(shape.N, shape.D, device=device, dtype=dtype)
        self.weight = torch.randn(shape.F, shape.D, device=device, dtype=dtype).mul_(shape.D**-0.5)
        self.bias = torch.zeros(shape.F, device=device, dtype=dtype)
        cut = torch.special.ndtri(torch.tensor(1 - shape.K / shape.F, dtype=torch.float64))
        self.sparse_bias = torch.full_like(self.bias, -float(cut))

    def truth(self, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """float64 pre-activations [R, F] of some rows, a block of features at a time, and what rounding allows."""
        x = self.x[rows].double()
        parts = [x @ w.double().T for w in self.weight.split(16384)]
        tf32 = self.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        rounding = 2.0**-12 if tf32 and self.x.device.type == "cuda" else ROUNDING[torch.float32]
        return torch.cat(parts, 1) + bias.double(), allowed_error(self.x[rows], self.weight[:1024], rounding)


def encode_cases(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    operations = 2 * shape.N * shape.D * shape.F
    half = dtype != torch.float32 or shape.name == "tiny"
    for rule in ("topk", "relu", "jumprelu", "batchtopk"):
        # What follows the groups is the same for both encoders, so that one rule shows what they differ by.
        for encoder in ("fused", "chunked") if rule == "topk" or half else ("fused",):
            yield Case("encode", f"{rule} {encoder}", shape, dtype,
                       lambda device, rule=rule, encoder=encoder: _encode(shape, dtype, device, rule, encoder),
                       operations=operations)
    for part in ("groups", "bound", "collect", "repair", "finish", "exact") if half else ():
        yield Case("part", f"topk {part}", shape, dtype,
                   lambda device, part=part: _part(shape, dtype, device, part),
                   operations=operations if part == "groups" else 0)
    yield Case("gemm", "plain Triton", shape, dtype, lambda device: _plain_gemm(shape, dtype, device),
               operations=operations)
    if shape.N * shape.F <= NAIVE_MOST:
        yield Case("encode", "naive topk", shape, dtype, lambda device: _naive(shape, dtype, device, False))
        yield Case("encode + decode", "naive topk", shape, dtype, lambda device: _naive(shape, dtype, device, True))
    yield Case("encode + decode", "fastsae topk", shape, dtype, lambda device: _both(shape, dtype, device))


def effort(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """How many rows of the TopK case failed their certificate, with how many groups, and how many went to `exact`."""
    from fastsae import gpu

    given = Inputs(shape, dtype, device)
    found = gpu.encode_topk(given.x, given.weight, given.bias, shape.K).effort
    return {"rows_failed": float((found.failed > 0).float().mean()), "groups_failed": float(found.failed.sum()),
            "rows_exact": float(found.open.sum())}  # fmt: skip


def _encode(shape: Shape, dtype: torch.dtype, device: torch.device, rule: str, encoder: Any) -> Call:
    from fastsae import gpu
    from fastsae.capacity import Capacity

    given = Inputs(shape, dtype, device)
    x, weight = given.x, given.weight
    most = shape.F // 8 + 1
    relu, jump = Capacity(), Capacity()
    band = given.sparse_bias.float() + 0.05  # JumpReLU with a band of a tenth: its kernels are those of ReLU
    bias, call = {
        "topk": (given.bias, lambda: gpu.encode_topk(x, weight, given.bias, shape.K, encoder=encoder)),
        "relu": (given.sparse_bias,
                 lambda: gpu.encode_above(x, weight, given.sparse_bias, most, encoder=encoder, capacity=relu)),
        "jumprelu": (band, lambda: gpu.encode_above(x, weight, band, most, encoder=encoder, capacity=jump)),
        "batchtopk": (given.bias, lambda: gpu.encode_batchtopk(x, weight, given.bias, shape.K, encoder=encoder)),
    }[rule]  # fmt: skip
    found = call()
    rows = torch.linspace(0, shape.N - 1, min(CHECKED_ROWS, shape.N), device=device).long()
    pre, allowed = given.truth(rows, bias)
    values, indices, counts = (t[rows] for t in found[:3])
    if rule == "batchtopk":
        least = found.values[found.values > 0].min().double()
        pre = torch.where(pre >= least - allowed, pre, -1.0)
    error = code_error(values, indices, counts, pre, 2 * allowed, shape.K if rule == "topk" else None)
    if not error <= 1:
        raise WrongResult(f"{rule} is off by {error:.3g} times what rounding allows")
    return call


def _part(shape: Shape, dtype: torch.dtype, device: torch.device, part: str) -> Call:
    """One of the kernels of TopK alone, on what those before it leave. `repair` and `exact` do what there is to do."""
    from fastsae import gpu
    from fastsae.kernels import encode, exact, repair, select

    given = Inputs(shape, dtype, device)
    x, weight, bias, k = given.x, given.weight, given.bias.float(), shape.K
    r = gpu.kept_per_group(k, shape.F)
    groups = encode.encode_fused(x, weight, bias, r)
    bound = select.row_bound(groups, k)
    slots = gpu.slots_for(k)
    found = select.collect(groups, bound, slots, gpu.MOST_FAILED)
    before = found.counts.clone()

    def repaired() -> None:
        found.counts.copy_(before)
        repair.repair(x, weight, bias, groups, bound, found)

    repaired()
    code = select.finish(found, k)
    return {
        "groups": lambda: encode.encode_fused(x, weight, bias, r),
        "bound": lambda: select.row_bound(groups, k),
        "collect": lambda: select.collect(groups, bound, slots, gpu.MOST_FAILED),
        "repair": repaired,
        "finish": lambda: select.finish(found, k),
        "exact": lambda: exact.exact_topk(x, weight, bias, found, *code),
    }[part]


def _plain_gemm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    from bench.plain_gemm import gemm

    given = Inputs(shape, dtype, device)
    out = gemm(given.x, given.weight)
    rows = torch.linspace(0, shape.N - 1, 4, device=device).long()
    truth, allowed = given.truth(rows, given.bias)
    allowed = allowed + truth.abs() * ROUNDING[dtype]
    error = float(((out[rows].double() - truth).abs() / allowed).max())
    if not error <= 2:
        raise WrongResult(f"the plain product is off by {error:.3g} times what rounding allows")
    return lambda: gemm(given.x, given.weight, out)


def _naive(shape: Shape, dtype: torch.dtype, device: torch.device, decode: bool) -> Call:
    given = Inputs(shape, dtype, device)
    w_dec = torch.randn_like(given.weight)

    def call() -> Any:
        values, indices = torch.nn.functional.linear(given.x, given.weight, given.bias).relu().topk(shape.K)
        if not decode:
            return values, indices
        return torch.nn.functional.embedding_bag(indices, w_dec, per_sample_weights=values, mode="sum")

    return call


def _both(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    from fastsae import gpu
    from fastsae.kernels.decode import decode

    given = Inputs(shape, dtype, device)
    w_dec = torch.randn_like(given.weight)

    def call() -> Tensor:
        values, indices, counts, _ = gpu.encode_topk(given.x, given.weight, given.bias, shape.K)
        return decode(indices, values, w_dec, counts)

    return call
