"""Adam for some rows of a matrix at a time, so that the gradient of the whole never has to exist.

    m ← β₁ m + (1 − β₁) g     v ← β₂ v + (1 − β₂) g²     w ← w − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

"Adam: A Method for Stochastic Optimization" (2015), algorithm 1; weight decay as in "Decoupled Weight Decay
Regularization" (2019), w ← w − lr · decay · w first. With one v for a row it holds the mean of g² over the row.

Axes: F dictionary size, D width, B rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import cpu
from fastsae.moments import Moment, Rows, State, Whole, first_moment, second_moment, to_bfloat16_


class AdamOptions(NamedTuple):
    """Of one step; t: its number, from 1. factor: what gradients are multiplied with first (clipping), a scalar."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    t: int
    factor: Tensor | None = None

    @property
    def corrections(self) -> tuple[float, float]:
        """1 − β₁ᵗ and 1 − β₂ᵗ."""
        return 1 - self.beta1**self.t, 1 - self.beta2**self.t


class RowAdam:
    """The state of one matrix [F, D] that is updated row by row: its moments and, if its own dtype is narrow, an fp32
    copy (or none, with stochastic rounding)."""

    def __init__(self, weight: Tensor, state: State, beta1: float, stochastic: bool) -> None:
        shape, device = (weight.shape[0], weight.shape[1]), weight.device
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight.detach()
        self.state: State = state
        self.stochastic = stochastic
        self.copy = None if stochastic or weight.dtype == wide else self.weight.to(wide)
        self.m = first_moment(state, shape, wide, device) if beta1 else None
        self.v = second_moment(state, shape, wide, device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint has to hold beside the weight."""
        found = {} if self.copy is None else {"master": self.copy}
        for name, moment in (("m", self.m), ("v", self.v)):
            if moment is not None:
                found |= {f"{name}.{part}".rstrip("."): t for part, t in moment.tensors.items()}
        return found

    def rows(self, at: Rows) -> Tensor:
        """[B, D] in fp32 or more, a view where that is possible."""
        if self.copy is not None:
            return self.copy[at]
        rows = self.weight[at]
        return rows.float() if self.stochastic else rows

    def update(
        self, at: Rows, g: Tensor, options: AdamOptions, unit: bool, silent: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        """One step of the rows `at` with their gradients g [B, D], which are overwritten. unit: whether rows keep norm
        1. silent [B, 1]: for how many steps before this one a row had no gradient and was left alone."""
        w = self.rows(at)
        if options.factor is not None:
            g.mul_(options.factor.to(g.dtype))
        if not self._fused(at, w, g, options, silent):
            self._step(at, w, g.to(w.dtype), options, silent, generator)
        if unit:
            w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min_(1e-12))
        self._put(at, w, generator)

    def _fused(self, at: Rows, w: Tensor, g: Tensor, options: AdamOptions, silent: Tensor | None) -> bool:
        """torch's own kernel, one pass over everything, where it does what is wanted: a range of rows, whole moments
        in w's dtype. Not by way of torch.optim, whose Python takes longer than the kernel for a few rows."""
        m, v = self.m, self.v
        if not (isinstance(at, slice) and isinstance(m, Whole) and isinstance(v, Whole) and silent is None):
            return False
        if {m.data.dtype, v.data.dtype, g.dtype} != {w.dtype}:
            return False
        call = torch.ops.aten._fused_adamw_ if options.weight_decay else torch.ops.aten._fused_adam_
        t = torch.full((), float(options.t), device=w.device)  # torch.tensor would wait for a GPU
        call([w], [g], [m.data[at]], [v.data[at]], [], [t],
             lr=options.lr, beta1=options.beta1, beta2=options.beta2, weight_decay=options.weight_decay,
             eps=options.eps, amsgrad=False, maximize=False)  # fmt: skip
        return True

    def _step(
        self, at: Rows, w: Tensor, g: Tensor, options: AdamOptions, silent: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        first, second = options.corrections
        v = self.v.read(at)
        if silent is not None:
            v = v * options.beta2 ** silent.to(v.dtype)
        square = g.square() if v.shape[1] == g.shape[1] else g.square().mean(1, keepdim=True)
        v = torch.lerp(square, v, options.beta2)
        m = g
        if self.m is not None:
            m = self.m.read(at)
            if silent is not None:
                m = m * options.beta1 ** silent.to(m.dtype)
            m = torch.lerp(g, m, options.beta1)
        if options.weight_decay:
            w.mul_(1 - options.lr * options.weight_decay)
        w.addcdiv_(m.expand_as(w), (v / second).sqrt_().add_(options.eps).expand_as(w), value=-options.lr / first)
        self.v.write(at, v, generator)
        if self.m is not None:
            self.m.write(at, m.clone() if m is g else m, generator)

    def _put(self, at: Rows, w: Tensor, generator: torch.Generator | None) -> None:
        """Writes rows back where w is not a view of them."""
        if self.stochastic:
            self.weight[at] = to_bfloat16_(w, generator)
        elif self.copy is not None:
            if isinstance(at, Tensor):
                self.copy[at] = w
            self.weight[at] = w.to(self.weight.dtype)
        elif isinstance(at, Tensor):
            self.weight[at] = w

    def reset(self, at: Tensor) -> None:
        """Moments of the rows at [B] begin again; rows that were written from outside are taken over."""
        for moment in (self.m, self.v):
            if moment is not None:
                moment.reset(at)
        if self.copy is not None:
            self.copy[at] = self.weight[at].to(self.copy.dtype)


def project_(g: Tensor, w: Tensor) -> Tensor:
    """Drops, in place, the part of each row of g [B, D] that is parallel to that of w, of unit norm: g − (g·w) w."""
    return g.addcmul_(w, cpu.row_dots(g, w)[:, None], value=-1)


__all__ = ["AdamOptions", "Moment", "RowAdam", "project_"]
