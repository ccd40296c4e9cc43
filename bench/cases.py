"""What `python -m bench gpu` times: each case makes its tensors when its turn comes and frees them after it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.checks import check_decode
from bench.encoders import encode_cases
from bench.shapes import Call, Case, Shape
from bench.steps import step_cases
from bench.widest import STEPS, WIDEST, widest_cases


def ceilings() -> Iterator[Case]:
    """What the chip gives at best: a copy, and a matrix product."""
    yield Case("copy", "1 GiB", Shape("-", 2**29, 1, 1, 1), torch.bfloat16, _copy, traffic=2 * 2**30)
    square = Shape("-", 8192, 8192, 8192, 1)
    yield Case("matmul", "8192³", square, torch.bfloat16, lambda device: _gemm(square, torch.bfloat16, device),
               operations=2 * 8192**3)


def all_cases(shapes: list[Shape], dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Per dtype and shape the encoder's product, the encoder, decode, the backward pass and whole steps; what is most
    wanted first, so that it is there if time runs out."""
    for dtype in dtypes:
        for shape in shapes:
            yield _encoder_case(shape, dtype)
            yield from encode_cases(shape, dtype)
            yield from _decode_cases(shape, dtype)
            yield from step_cases(shape, dtype)
        if any(shape.name == "tiny" for shape in shapes):  # a dry run
            yield from widest_cases(shapes[0], dtype, steps=5)
        elif dtype == torch.bfloat16:
            yield from widest_cases(WIDEST, dtype, STEPS)


def _copy(device: torch.device) -> Call:
    source = torch.randn(2**29 if device.type == "cuda" else 2**10, device=device).bfloat16()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _gemm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    N, F, D = (shape.N, shape.F, shape.D) if device.type == "cuda" else (64, 64, 64)
    x = torch.randn(N, D, device=device, dtype=dtype)
    weight = torch.randn(F, D, device=device, dtype=dtype)
    out = torch.empty(N, F, device=device, dtype=dtype)
    return lambda: torch.mm(x, weight.T, out=out)


def _encoder_case(shape: Shape, dtype: torch.dtype) -> Case:
    return Case("encoder", "x · W_encᵀ", shape, dtype, lambda device: _gemm(shape, dtype, device),
                operations=2 * shape.N * shape.D * shape.F)


def _decode_cases(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    size = torch.finfo(dtype).bits // 8
    least = size * shape.N * shape.D * (shape.K + 1) + 8 * shape.N * shape.K

    def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        # Features drawn evenly: few rows are met twice in L2, the worst case for a gather.
        indices = torch.randint(0, shape.F, (shape.N, shape.K), device=device, dtype=torch.int32)
        values = torch.rand(shape.N, shape.K, device=device)
        return indices, values, torch.randn(shape.F, shape.D, device=device, dtype=dtype)

    def kernel(device: torch.device) -> Call:
        from fastsae.kernels.decode import decode

        indices, values, w_dec = inputs(device)
        check_decode(decode(indices, values, w_dec), indices, values, w_dec)
        return lambda: decode(indices, values, w_dec)

    def by_torch(device: torch.device) -> Call:
        indices, values, w_dec = inputs(device)
        weights = values.to(dtype)

        def call() -> Tensor:
            return torch.nn.functional.embedding_bag(indices, w_dec, per_sample_weights=weights, mode="sum")

        check_decode(call(), indices, weights, w_dec)
        return call

    def with_error(device: torch.device) -> Call:
        from fastsae.kernels.decode import decode_error

        indices, values, w_dec = inputs(device)
        bias, target = w_dec[0].clone(), torch.randn(shape.N, shape.D, device=device, dtype=dtype)
        found = decode_error(indices, values, w_dec, bias, target)
        check_decode(found.out - bias, indices, values, w_dec, slack=4)
        return lambda: decode_error(indices, values, w_dec, bias, target)

    def uneven(device: torch.device) -> Call:
        """A variable code: rows of 0 to 4 K entries, K on average, a few of them long."""
        from fastsae.kernels.decode import decode

        slots = max(4 * shape.K, 256)
        indices = torch.randint(0, shape.F, (shape.N, slots), device=device, dtype=torch.int32)
        values = torch.rand(shape.N, slots, device=device)
        counts = (-torch.rand(shape.N, device=device).log() * shape.K).int().clamp(max=slots)
        w_dec = torch.randn(shape.F, shape.D, device=device, dtype=dtype)
        used = torch.arange(slots, device=device) < counts[:, None]
        check_decode(decode(indices, values, w_dec, counts), indices, values * used, w_dec)
        return lambda: decode(indices, values, w_dec, counts)

    yield Case("decode", "Triton", shape, dtype, kernel, traffic=least)
    yield Case("decode", "Triton, uneven", shape, dtype, uneven)
    yield Case("decode", "Triton, error", shape, dtype, with_error, traffic=least + 2 * size * shape.N * shape.D)
    yield Case("decode", "embedding_bag", shape, dtype, by_torch, traffic=least)
