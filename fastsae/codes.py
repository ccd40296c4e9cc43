"""SparseCode: the active latents of N tokens, in rows of K slots (ELL layout).

Axes: N tokens, K slots, F dictionary size (`d_sae`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import DataError


class FeatureMajor(NamedTuple):
    """The same entries as a SparseCode, sorted by feature and, within a feature, by token (CSC layout).

    offsets: [F + 1] int64, entries of feature f are offsets[f] : offsets[f + 1]. tokens, values: [M].
    slots: [M] int64, where the entry stands in the flattened [N·K] code.
    """

    offsets: Tensor
    tokens: Tensor
    values: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class SparseCode:
    """values [N, K] and indices [N, K]: latent `indices[n, k]` of token n is active with `values[n, k]`.

    counts: [N], how many leading slots of a row are in use, or None when all K are. Unused slots hold value 0 and
    index 0, so reading them as entries adds nothing. The order within a row carries no meaning; a feature appears at
    most once in it. d_sae: F. batch_shape: what N stands for: `x.shape[:-1]` of the encoded x; (N,) by default.

    Raises DataError when shapes disagree. The range of indices is not checked, which would cost a pass.
    """

    values: Tensor
    indices: Tensor
    d_sae: int
    counts: Tensor | None = None
    batch_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.indices.shape != self.values.shape:
            raise DataError(
                "a SparseCode takes values [N, K] and indices of the same shape, got "
                f"{tuple(self.values.shape)} and {tuple(self.indices.shape)}; flatten leading axes into N"
            )
        N = self.values.shape[0]
        if self.counts is not None and self.counts.shape != (N,):
            raise DataError(f"counts must have shape ({N},), one per row, got {tuple(self.counts.shape)}")
        shape = (N,) if self.batch_shape is None else tuple(int(size) for size in self.batch_shape)
        object.__setattr__(self, "batch_shape", shape)
        rows = 1
        for size in shape:
            rows *= size
        if rows != N:
            raise DataError(f"batch_shape {shape} stands for {rows} rows, but the code has {N}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense tensor this stands for: [*batch_shape, F]."""
        assert self.batch_shape is not None
        return (*self.batch_shape, self.d_sae)

    @property
    def n_tokens(self) -> int:
        return self.values.shape[0]

    @property
    def k(self) -> int:
        return self.values.shape[1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def valid(self) -> Tensor:
        """[N, K] bool: the slots in use."""
        if self.counts is None:
            return torch.ones_like(self.indices, dtype=torch.bool)
        return torch.arange(self.k, device=self.device) < self.counts[:, None]

    def l0(self) -> Tensor:
        """[N] int64: active latents (value ≠ 0) per token."""
        return (self.values != 0).sum(-1)

    def fired(self) -> Tensor:
        """[F] bool: the latents that are active on any token."""
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=self.device)
        fired[self.indices[self.values.detach() > 0].long()] = True
        return fired

    def to_dense(self) -> Tensor:
        """[*batch_shape, F], zero where nothing is active. Differentiable in `values`."""
        dense = self.values.new_zeros(self.n_tokens, self.d_sae)
        # Added rather than written: unused slots point at latent 0, which may be active in the same row.
        dense = dense.scatter_add(1, self.indices.long(), self.values)
        return dense.reshape(self.shape)

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCode:
        """The nonzero entries of dense [..., F], in ascending order of feature; K is the most that any row has.

        Differentiable in `dense` where it is nonzero.
        """
        if dense.ndim < 1:
            raise DataError("from_dense takes a tensor [..., F], got a scalar")
        F = dense.shape[-1]
        rows = dense.reshape(-1, F)
        row, column = rows.detach().nonzero(as_tuple=True)
        indices, counts, slots = pack_rows(row, column, rows.shape[0])
        values = rows.new_zeros(indices.numel()).index_put((slots,), rows[row, column]).view(indices.shape)
        return cls(values, indices, F, counts, tuple(dense.shape[:-1]))

    def by_feature(self) -> FeatureMajor:
        """The entries in use, sorted by feature and then by token; entries of value 0 in used slots are kept."""
        flat = self.indices.reshape(-1).long()
        if self.counts is None:
            features, order = torch.sort(flat, stable=True)
        else:
            used = self.valid().reshape(-1).nonzero().squeeze(1)
            features, order = torch.sort(flat[used], stable=True)
            order = used[order]
        edges = torch.arange(self.d_sae + 1, device=self.device)
        offsets = torch.searchsorted(features, edges)
        tokens = order.div(max(self.k, 1), rounding_mode="floor")
        return FeatureMajor(offsets, tokens, self.values.reshape(-1)[order], order)

    def detach(self) -> SparseCode:
        return replace(self, values=self.values.detach())

    def to(self, *args, **kwargs) -> SparseCode:
        """As Tensor.to on the values (device and dtype); indices and counts follow to the device only."""
        values = self.values.to(*args, **kwargs)
        counts = None if self.counts is None else self.counts.to(values.device)
        return replace(self, values=values, indices=self.indices.to(values.device), counts=counts)

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return f"SparseCode({list(self.shape)}, k={self.k}, dtype={self.values.dtype}, device={self.device})"


def pack_rows(row: Tensor, column: Tensor, n_rows: int, least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (row, column) [M], sorted by row → indices [N, K], counts [N] and the flat slot [M] of each entry.

    K is the most entries that a row has, or `least` if that is more. Unused slots of `indices` hold 0.
    """
    counts = torch.bincount(row, minlength=n_rows)
    k = max(int(counts.max()) if row.numel() else 0, least)
    first = counts.cumsum(0) - counts
    slots = row * k + torch.arange(row.numel(), device=row.device) - first[row]
    indices = torch.zeros(n_rows * k, dtype=torch.int64, device=row.device)
    indices[slots] = column
    return indices.view(n_rows, k), counts, slots
