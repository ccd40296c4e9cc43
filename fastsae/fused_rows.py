"""The update of `TrainStep` in kernels: of what `row_blocks` and `row_adam` do in torch operations, on CUDA tensors.

Axes: N tokens, K slots, F dictionary size, D width, S dead latents, C of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsae import auxk
from fastsae.dispatch import use_triton
from fastsae.gradients import Pull, sum_at
from fastsae.moments import EightBit, Moment, PerRow, Whole
from fastsae.row_adam import AdamOptions, RowAdam
from fastsae.row_blocks import Dead, Part, Weights, join

if TYPE_CHECKING:
    from fastsae.kernels.row_update import Extra, Matrix
    from fastsae.kernels.weight_grad import Pieces

# Elements of the rows of gradients that AuxK adds, at a time: dead latents may be very many.
EXTRA_ELEMENTS = 1 << 26


def fits(given: Weights, parts: list[Part], backend: str) -> bool:
    """Whether the kernels can do this update: they run here, every row has its code, and rows fit the registers."""
    if not parts or not all(part.has_code for part in parts) or not use_triton(backend, given.weight):
        return False
    from fastsae.kernels import weight_grad

    whole = given.weight.is_contiguous() and given.w_dec.is_contiguous() and given.weight.dtype != torch.float64
    return whole and given.w_dec.shape[1] <= weight_grad.WIDEST


class FusedRows:
    """The gradients of one update by the kernels. Vectors are made at once: d_bias, d_threshold [F]."""

    def __init__(self, given: Weights, parts: list[Part], dead: list[Dead], last: Tensor | None) -> None:
        from fastsae.kernels import weight_grad

        joined = join(parts)
        assert joined is not None
        self.given, self.dead, self.last = given, dead, last
        self.values, self.g, self.x = joined.values.contiguous(), _rows(joined.out), _rows(joined.rows)
        also = torch.cat([one.which for one in self.dead]) if self.dead else None
        lazy = last is not None
        found = weight_grad.weight_grad(
            joined.rows, self.values, joined.indices, joined.counts, given.bias, given.w_dec, given.threshold,
            given.bandwidth, given.norms, Pull(self.g, joined.l1, joined.l0), compact=lazy, with_rows=False,
            also=also if lazy else None,
        )  # fmt: skip
        self.code, self.d_pre, made = found.code, found.d_pre, found.made
        F = given.bias.numel()

        def spread(t: Tensor | None) -> Tensor | None:
            """From the rows of the code to all features; the last row takes what belongs to none."""
            if t is None or made.features is None:
                return t
            return t.new_zeros(F + 1).index_copy_(0, made.features, t)[:F]

        d_bias = spread(made.bias)
        assert d_bias is not None
        self.d_bias, self.d_threshold = d_bias, spread(made.threshold)
        self.of_norms = spread(made.w_dec) if given.norms is not None and joined.l1 is not None else None
        for one in self.dead:
            for start in range(0, one.which.numel(), self._together):
                which = one.which[start : start + self._together]
                self.d_bias += sum_at(which, self._of_dead(one, which).bias, F, self.d_bias)

    @property
    def _together(self) -> int:
        return max(1, EXTRA_ELEMENTS // self.given.w_dec.shape[1])

    def _of_dead(self, one: Dead, which: Tensor) -> auxk.DeadGradients:
        given = self.given
        return auxk.gradients_of(one.pull, auxk.take(which, one.is_dead, given.weight, given.bias, given.w_dec))

    def run(
        self, states: tuple[RowAdam, RowAdam], options: AdamOptions, unit: bool, seed: int, norms: Tensor,
        square: Tensor | None, update: bool,
    ) -> None:  # fmt: skip
        """One step, which writes the norms [F] of the decoder's rows too; or, without update, square [F] alone: the
        squared gradients of each feature in both matrices."""
        from fastsae.kernels import row_update as kernel

        factor = torch.ones((), device=norms.device) if options.factor is None else options.factor.float()
        adam = kernel.Adam(options.lr, options.beta1, options.beta2, options.eps,
                           1 - options.lr * options.weight_decay, options.t, seed, factor)  # fmt: skip
        w_dec, weight = (_matrix(state, self.given.bias.numel()) for state in states)
        for code, extra in self._launches():
            kernel.row_update(
                code, self.values, self.d_pre, self.g, self.x, w_dec, weight, adam, state=states[0].state,
                stochastic=states[0].stochastic, unit=unit, norms=norms, of_norms=self.of_norms, extra=extra,
                last=self.last, square=square, update=update,
            )  # fmt: skip

    def _launches(self) -> Iterator[tuple[Pieces, Extra | None]]:
        """The code, and what AuxK adds; in several parts if dead latents are many, each feature in one of them."""
        from fastsae.kernels import row_update as kernel

        code, F = self.code, self.given.bias.numel()
        if not self.dead:
            yield code, None
            return
        is_dead = torch.stack([one.is_dead for one in self.dead]).any(0)
        listed = torch.cat([one.which for one in self.dead]).unique() if len(self.dead) > 1 else self.dead[0].which
        phase = torch.full((F + 1,), 0, device=is_dead.device)
        starts = range(0, listed.numel(), self._together)
        for i, start in enumerate(starts):
            phase[listed[start : start + self._together]] = i
        for i, start in enumerate(starts or [0]):
            which = listed[start : start + self._together]
            row = torch.full((F,), -1, dtype=torch.int32, device=is_dead.device)
            row[which] = torch.arange(which.numel(), dtype=torch.int32, device=is_dead.device)
            sums = [torch.zeros(which.numel(), self.x.shape[1], device=is_dead.device) for _ in range(2)]
            for one in self.dead:
                found = self._of_dead(one, which)
                for whole, part in zip(sums, (found.w_dec, found.weight), strict=True):
                    whole += part
            pieces, split = code.pieces.clone(), code.split.clone()
            pieces[:, 0] = torch.where(phase[pieces[:, 0]] == i, pieces[:, 0], F)
            split[:, 3] = torch.where(phase[split[:, 0]] == i, split[:, 3], 0)
            yield code._replace(pieces=pieces, split=split), kernel.Extra(row, *sums)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _matrix(state: RowAdam, first: int) -> Matrix:
    """Of the first latents."""
    from fastsae.kernels.row_update import Matrix

    def of(moment: Moment | None) -> tuple[Tensor | None, Tensor | None]:
        if isinstance(moment, EightBit):
            return moment.codes, moment.scales
        return (moment.data if isinstance(moment, (Whole, PerRow)) else None), None

    tensors = state.weight, state.copy, *of(state.m), *of(state.v)
    return Matrix(*(None if t is None else t[:first] for t in tensors))  # type: ignore[arg-type]
