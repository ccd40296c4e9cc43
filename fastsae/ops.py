"""The differentiable operations of a sparse autoencoder, on codes that are never [N, F].

Axes: N tokens, K active latents per token, F dictionary size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.codes import SparseCode, pack_rows


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None = None) -> Tensor:
    """(x − centre) · weightᵀ + bias: [N, F]."""
    return torch.nn.functional.linear(x if centre is None else x - centre, weight, bias)


def encode_topk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, centre: Tensor | None = None, subset: Tensor | None = None
) -> SparseCode:
    """ReLU of the k largest entries of (x − centre) · weightᵀ + bias, as a SparseCode of k slots."""
    F = weight.shape[0]
    if subset is not None:
        weight, bias = weight[subset], bias[subset]
    values, indices = pre_activations(x, weight, bias, centre).topk(k, dim=-1)
    values = values.relu()
    if subset is not None:
        indices = subset[indices]
    return SparseCode(values, torch.where(values > 0, indices, 0), F)


def encode_relu(
    x: Tensor, weight: Tensor, bias: Tensor, max_l0: int, centre: Tensor | None = None
) -> SparseCode | None:
    """The positive entries of (x − centre) · weightᵀ + bias; None where a row has more than max_l0 of them."""
    pre = pre_activations(x, weight, bias, centre).relu()
    row, column = pre.detach().nonzero(as_tuple=True)
    indices, counts, slots = pack_rows(row, column, x.shape[0])
    if indices.shape[1] > max_l0:
        return None
    values = pre.new_zeros(indices.numel()).index_put((slots,), pre[row, column]).view(indices.shape)
    return SparseCode(values, indices, weight.shape[0], counts)


def decode(code: SparseCode, w_dec: Tensor, backend: str = "auto") -> Tensor:
    """out[n] = Σ_k values[n, k] · w_dec[indices[n, k]]: [N, D]."""
    return code.to_dense().reshape(-1, code.d_sae) @ w_dec


def decode_with_l1(code: SparseCode, w_dec: Tensor) -> tuple[Tensor, Tensor]:
    """decode, and Σ_k values[n, k] · ‖w_dec[indices[n, k]]‖ per row [N]."""
    return decode(code, w_dec), (code.to_dense().reshape(-1, code.d_sae) * w_dec.norm(dim=1)).sum(-1)


def relu_dense(
    x: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor, weighted: bool, centre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f · w_dec [N, D], L1 [N], L0 [N] and fired [F] of a dense ReLU code f."""
    f = pre_activations(x, weight, bias, centre).relu()
    l1 = (f * w_dec.norm(dim=1)).sum(-1) if weighted else f.sum(-1)
    return f @ w_dec, l1, (f > 0).sum(-1), (f > 0).any(0)
