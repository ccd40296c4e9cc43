"""Which latents are active, by each rule, on whichever backend; no gradients.

Axes: N tokens, F dictionary size, D width, K slots of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import cpu
from fastsae.capacity import Capacity
from fastsae.dispatch import use_triton
from fastsae.gradients import widened


class Selected(NamedTuple):
    """values, indices [N, K] and counts [N], the leading slots in use, or None for all; unused slots hold 0.

    is_open [N] bool: rows left out for want of slots, where there may be such; cut [2]: of batchtopk then, see
    `kernels.batch_cut`.
    """

    values: Tensor
    indices: Tensor
    counts: Tensor | None
    is_open: Tensor | None = None
    cut: Tensor | None = None


def select(
    x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rule: str, k: int, most: int, bandwidth: float,
    backend: str, capacity: Capacity, may_leave_open: bool = False,
) -> Selected | None:  # fmt: skip
    """By rule: topk, batchtopk (k), relu, jumprelu (most, threshold, bandwidth). x: [N, D], already centred.

    None where a row of relu or jumprelu has more than `most` entries. may_leave_open: whether the kernels may leave
    rows out, so as not to wait for the device.
    """
    if rule == "topk":
        return topk(x, weight, bias, k, backend)
    if rule == "batchtopk":
        return batchtopk(x, weight, bias, k, backend, capacity, may_leave_open)
    if rule == "jumprelu":
        assert threshold is not None
        return jumprelu(x, weight, bias, threshold, most, bandwidth, backend, capacity, may_leave_open)
    return above(x, weight, bias, most, backend, capacity, may_leave_open)


def as_tensors(selected: Selected | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices and counts, all there: of shape [0, 0] and [0] where the code was too dense."""
    if selected is None:
        nothing = torch.zeros(0, 0, dtype=torch.int64, device=like.device)
        return like.new_zeros(0, 0), nothing, nothing.new_zeros(0)
    values, indices, counts = selected[:3]
    return values, indices, indices.new_full(indices.shape[:1], indices.shape[1]) if counts is None else counts


def fake(x: Tensor, weight: Tensor, rule: str, k: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """as_tensors in shapes and dtypes only, within torch.compile."""
    size = torch.library.get_ctx().new_dynamic_size
    triton = use_triton(backend, weight, product=True, k=k if rule == "topk" else 0)
    value, index = (torch.float32, torch.int32) if triton else (x.dtype, torch.int64)
    slots = k if rule == "topk" else size()
    filled = x.shape[0] if rule in ("topk", "batchtopk") else size()
    return (x.new_empty(filled, slots, dtype=value), x.new_empty(filled, slots, dtype=index),
            x.new_empty(filled, dtype=index))  # fmt: skip


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int, backend: str) -> Selected:
    """ReLU of the k largest entries of each row of x · weightᵀ + bias; of equal ones the lower features."""
    if use_triton(backend, weight, product=True, k=k):
        from fastsae import gpu

        return Selected(*gpu.encode_topk(x, weight, bias, k)[:3])
    values, indices = cpu.encode_topk(x, weight, bias, k)
    # Values descend, so a row is full if its last slot is in use.
    return Selected(values, indices, None if bool((values[:, -1] > 0).all()) else (values > 0).sum(-1))


def above(
    x: Tensor, weight: Tensor, bias: Tensor, most: int, backend: str, capacity: Capacity, may_leave_open: bool = False
) -> Selected | None:
    """The positive entries of x · weightᵀ + bias."""
    if use_triton(backend, weight, product=True):
        from fastsae import gpu

        if may_leave_open:
            found = gpu.encode_open(x, weight, bias, most, capacity)
            return None if found is None else Selected(*found[:4])
        found = gpu.encode_above(x, weight, bias, most, capacity=capacity)
    else:
        found = cpu.encode_relu(x, weight, bias.to(x.dtype), most)
    return None if found is None else Selected(*found)


def jumprelu(
    x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, most: int, bandwidth: float,
    backend: str, capacity: Capacity, may_leave_open: bool = False,
) -> Selected | None:  # fmt: skip
    """Entries above threshold [F] − bandwidth / 2, of which those that are not above the threshold have value 0."""
    below = widened(threshold) - bandwidth / 2  # rounded to bfloat16, bias − threshold would choose other entries
    found = above(x, weight, widened(bias) - below, most, backend, capacity, may_leave_open)
    if found is None:
        return None
    margins, indices, counts, is_open, _ = found
    values = torch.where(margins > bandwidth / 2, margins + below[indices.long()].to(margins.dtype), 0)
    return Selected(values, indices, counts, is_open)


def batchtopk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, backend: str, capacity: Capacity, may_leave_open: bool = False
) -> Selected:
    """ReLU of the N · k largest entries of the batch; of equal ones those of earlier rows, then of lower features."""
    if use_triton(backend, weight, product=True):
        from fastsae import gpu

        if may_leave_open:
            return Selected(*gpu.encode_batchtopk_open(x, weight, bias, k, capacity))
        return Selected(*gpu.encode_batchtopk(x, weight, bias, k, capacity=capacity))
    return Selected(*cpu.encode_batchtopk(x, weight, bias, k))
