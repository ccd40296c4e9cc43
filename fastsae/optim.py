"""What surrounds Adam: schedules, clipping, the decoder-norm constraint, the starting point of b_dec.

Axes: F dictionary size, D width, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastsae import cpu
from fastsae.sae import SAE


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """What the peak learning rate is multiplied with in step `step` of `steps` (0-based).

    Linear from 0 over the first `warmup` of the steps (a fraction), linear to 0 over the last `decay` of them.
    """
    up = (step + 1) / max(1.0, warmup * steps)
    down = (steps - step) / max(1.0, decay * steps) if decay else 1.0
    return min(1.0, up, down)


def penalty_factor(step: int, steps: int, warmup: float) -> float:
    """What the sparsity penalty is multiplied with: linear from 0 over the first `warmup` of the steps, then 1."""
    return min(1.0, step / (warmup * steps)) if warmup else 1.0


def k_at(step: int, steps: int, start: int, k: int, anneal: float) -> int:
    """How many latents a token keeps in step `step` of `steps`: from `start`, linearly to k over the first `anneal` of
    the steps (a fraction), then k."""
    if not anneal:
        return k
    return round(k + (start - k) * max(0.0, 1 - step / (anneal * steps)))


@torch.no_grad()
def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a common norm of at most `max_norm`; the norm before, a scalar tensor.

    As `torch.nn.utils.clip_grad_norm_`, but on the CPU gradients below the limit are not written again: at
    F 16384, D 512 that is a pass over 64 MB. Infinite or NaN norms are left for the loss to report.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if norm.device.type != "cpu" or norm > max_norm:  # elsewhere, asking would wait for the device
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
    return norm


class DecoderNorm:
    """Keeps the rows of W_dec at unit norm around an optimizer's step; does nothing if the SAE's norm is "free".

        loss.backward(); norm.project_gradient_(); optimizer.step(); norm.renormalise_()

    Both halves are needed: without the projection Adam's moments collect a component that renormalising throws away
    each time ("Towards Monosemanticity", appendix on training), without the other the norm drifts by Adam's steps.
    """

    def __init__(self, sae: SAE) -> None:
        self.weight = sae.W_dec  # [F, D]
        self.active = sae.cfg.decoder_norm == "unit"

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Drop the part of each row's gradient that is parallel to the row: g ← g − (g·w) w, for unit w."""
        gradient = self.weight.grad
        if not self.active or gradient is None:
            return
        # Two operations over all rows: blocks that fit the cache save nothing, and on a busy machine each operation
        # may wait for a thread to be scheduled.
        gradient.addcmul_(self.weight, cpu.row_dots(gradient, self.weight)[:, None], value=-1)

    @torch.no_grad()
    def renormalise_(self) -> None:
        """Scale every row back to unit norm."""
        if not self.active:
            return
        self.weight.div_(torch.linalg.vector_norm(self.weight, dim=1, keepdim=True).clamp_min_(1e-12))


@torch.no_grad()
def geometric_median(x: Tensor, tolerance: float = 1e-5, max_iterations: int = 100) -> Tensor:
    """The point m with the least Σ_n ‖x[n] − m‖: [D] float32, from x [N, D].

    Weiszfeld's iteration from the mean, until m moves by less than `tolerance` of the mean distance. Unlike the mean it
    is not drawn away by a few tokens with huge norms.
    """
    x = x.float()
    median = x.mean(0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(x - median, dim=1).clamp_min_(1e-12)  # [N]; a row may sit on the median
        weight = distance.reciprocal()
        new = (weight @ x) / weight.sum()
        moved = torch.linalg.vector_norm(new - median)
        median = new
        if moved <= tolerance * distance.mean():
            break
    return median


def default_lr(d_sae: int, steps: int) -> float:
    """Adam's learning rate where none is given: 2e-4 / √(F / 2¹⁴), times √(20,000 / steps) in shorter runs, at most 5.

    The law of the width is that of "Scaling and evaluating sparse autoencoders" (2024), as sparsify and
    dictionary_learning write it. It is meant for runs of 10⁵ steps: in the 800 steps that a laptop has time for, five
    times as much gave a better loss at a lower L0 (one-layer MLP, F 1024: 158 against 170 at L0 13 against 17).
    """
    return 2e-4 / math.sqrt(d_sae / 2**14) * min(5.0, max(1.0, math.sqrt(20_000 / steps)))
