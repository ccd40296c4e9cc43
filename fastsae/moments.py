"""Where Adam's running means live: whole, in bfloat16, in 8 bits, or one number for a row.

What is not fp32 is rounded up or down at random, so that it is right on average: β₂ = 0.999 changes a mean by a
thousandth a step, which rounding to the nearest of bfloat16's 256 steps between powers of two would drop every time.

Axes: F dictionary size, D width, B rows at a time.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

State = Literal["fp32", "bf16", "8bit", "rowwise"]
Rows = slice | Tensor
"""Which rows: a range, or [B] int64."""

QUANTISED = 256  # neighbouring elements of a row that share a scale


class Whole:
    """[F, D] in fp32 (or float64), or in bfloat16."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"": self.data}

    def read(self, at: Rows) -> Tensor:
        """[B, D] in fp32 or more; a view where at is a range and nothing has to be converted."""
        rows = self.data[at]
        return rows.float() if rows.dtype == torch.bfloat16 else rows

    def write(self, at: Rows, value: Tensor, generator: torch.Generator | None) -> None:
        """Overwrites value."""
        if self.data.dtype == torch.bfloat16:
            self.data[at] = to_bfloat16_(value, generator)
        elif isinstance(at, Tensor) or value.data_ptr() != self.data[at].data_ptr():
            self.data[at] = value

    def reset(self, at: Tensor) -> None:
        self.data[at] = 0


class EightBit:
    """[F, D] in 8 bits, with an fp32 scale, the largest magnitude, for every 256 neighbours of a row.

    x = ± scale · (c / 127)² with a sign, scale · (c / 255)⁴ without: steps of 2 % at the top and a range of 10⁴ or 10⁹
    below it. Linear steps would round the small second moments of a row to 0, and its updates to ∞; so without a sign
    nothing is rounded to 0 at all, which a few elements 10⁴ times as large as their neighbours would make of those.
    """

    def __init__(self, shape: tuple[int, int], signed: bool, device: torch.device) -> None:
        self.signed = signed
        self.codes = torch.zeros(shape, dtype=torch.int8 if signed else torch.uint8, device=device)
        self.scales = torch.zeros(shape[0], -(-shape[1] // QUANTISED), device=device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def _each(self, scales: Tensor) -> Tensor:
        """[B, D] from a scale for each block [B, ⌈D / 256⌉]."""
        if scales.shape[1] == 1:
            return scales
        return scales.repeat_interleave(QUANTISED, dim=1)[:, : self.codes.shape[1]]

    def read(self, at: Rows) -> Tensor:
        c = self.codes[at].float()
        share = c * c.abs() / 127**2 if self.signed else (c / 255).square_().square_()
        return share.mul_(self._each(self.scales[at]))

    def write(self, at: Rows, value: Tensor, generator: torch.Generator | None) -> None:
        D = value.shape[1]
        most = 127 if self.signed else 255
        padded = nnf.pad(value, (0, -D % QUANTISED)) if D > QUANTISED else value
        scales = padded.unflatten(1, (-1, min(QUANTISED, padded.shape[1]))).abs().amax(-1)
        self.scales[at] = scales
        share = value.abs().div_(self._each(scales).clamp_min(torch.finfo(torch.float32).tiny)).clamp_(max=1)
        c = (share.sqrt() if self.signed else share.sqrt().sqrt_()).mul_(most).floor_()
        low, high = (self._share(c, most), self._share(c + 1, most))
        noise = torch.rand(c.shape, generator=generator, device=c.device)
        # Up with the probability that makes the mean right in the values, not in the codes, whose steps are uneven.
        c.add_(noise < share.sub_(low).div_(high.sub_(low))).clamp_(min=0 if self.signed else 1, max=most)
        self.codes[at] = (c.copysign_(value) if self.signed else c).to(self.codes.dtype)

    def _share(self, c: Tensor, most: int) -> Tensor:
        share = (c / most).square_()
        return share if self.signed else share.square_()

    def reset(self, at: Tensor) -> None:
        self.codes[at] = 0
        self.scales[at] = 0


class PerRow:
    """One fp32 number for a row of D: [F]. What is written is the mean over the row."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.data = torch.zeros(shape[0], device=device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"": self.data}

    def read(self, at: Rows) -> Tensor:
        """[B, 1]."""
        return self.data[at][:, None]

    def write(self, at: Rows, value: Tensor, generator: torch.Generator | None) -> None:
        self.data[at] = value.squeeze(1)

    def reset(self, at: Tensor) -> None:
        self.data[at] = 0


Moment = Whole | EightBit | PerRow


def first_moment(state: State, shape: tuple[int, int], wide: torch.dtype, device: torch.device) -> Moment:
    """Of gradients. With "rowwise" in bfloat16: a mean over the row would say nothing."""
    if state == "8bit":
        return EightBit(shape, True, device)
    return Whole(shape, wide if state == "fp32" else torch.bfloat16, device)


def second_moment(state: State, shape: tuple[int, int], wide: torch.dtype, device: torch.device) -> Moment:
    """Of squared gradients."""
    if state == "8bit":
        return EightBit(shape, False, device)
    if state == "rowwise":
        return PerRow(shape, device)
    return Whole(shape, wide if state == "fp32" else torch.bfloat16, device)


def to_bfloat16_(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """fp32 value rounded to one of its two neighbours in bfloat16, to the nearer one more often: right on average.

    Overwrites value. The low 16 bits are thrown away after a random number of 16 bits has been added.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    bits.add_(noise).bitwise_and_(-(1 << 16))
    return value.bfloat16()
