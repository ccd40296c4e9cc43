"""AuxK: the error that dead latents leave of what the living ones missed ("Scaling and evaluating sparse autoencoders",
2024, §A.2), and its gradients.

The k best of S dead latents rebuild the residual e = target − x̂: ê = f · w_dec, error[n] = Σ_d (ê[n] − e[n])². k is in
the hundreds or thousands and S not much more, so this is dense algebra over the dead alone, a chunk of rows at a time,
which the backward pass makes again. Nothing waits for the device.

Axes: N tokens, S dead latents, D width, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import cpu
from fastsae.capacity import room_of
from fastsae.gradients import widened


class Dead(NamedTuple):
    """The rows of the dead latents: weight, w_dec [S, D] and bias [S]."""

    weight: Tensor
    bias: Tensor
    w_dec: Tensor


class DeadGradients(NamedTuple):
    """Of weight, w_dec [S, D] and bias [S]; and of the rows x − centre [N, D] where wanted."""

    weight: Tensor
    bias: Tensor
    w_dec: Tensor
    rows: Tensor | None


@torch.library.custom_op("fastsae::dead_latents", mutates_args=())
def dead_latents(tokens_since_fired: Tensor, after: int, room: int) -> tuple[Tensor, Tensor]:
    """Those of F latents that have not fired for `after` tokens: which [S] ascending, and is_dead [F] bool.

    On a CUDA device S is half more than there were dead a few calls ago (`room`, see `capacity`), which needs no wait:
    the list is filled up with living latents, and newly dead ones may be missing from it for those calls.
    """
    is_dead = tokens_since_fired >= after
    if is_dead.device.type == "cpu":
        return is_dead.nonzero().squeeze(1), is_dead
    capacity = room_of(room)
    for (dead,) in capacity.dead_counters.receive():
        capacity.dead = min(dead + dead // 2, is_dead.numel())
    capacity.dead_counters.send(is_dead.sum()[None])
    return (~is_dead).int().argsort(stable=True)[: capacity.dead].sort().values, is_dead


@dead_latents.register_fake
def _(tokens_since_fired, after, room):
    S = torch.library.get_ctx().new_dynamic_size()
    return tokens_since_fired.new_empty(S), torch.empty_like(tokens_since_fired, dtype=torch.bool)


def take(which: Tensor, is_dead: Tensor, weight: Tensor, bias: Tensor, w_dec: Tensor) -> Dead:
    """The latents `which` [S]; those among them that are not dead (there to fill the list up) are never chosen."""
    hidden = torch.where(is_dead[which], bias[which], float("-inf"))
    return Dead(weight[which], hidden, w_dec[which])


def errors(rows: Tensor, e: Tensor, dead: Dead, k: int) -> Tensor:
    """error [N] in fp32 or more, of rows x − centre and e [N, D]; 0 where nothing is dead."""
    error = torch.zeros(rows.shape[0], dtype=torch.promote_types(e.dtype, torch.float32), device=e.device)
    for part, f in _codes(rows, dead, k):
        error[part] = widened(torch.mm(f, dead.w_dec) - e[part]).square().sum(-1)
    return error * torch.isfinite(dead.bias).any()


def gradients(rows: Tensor, e: Tensor, dead: Dead, k: int, pull: Tensor, want_rows: bool) -> DeadGradients:
    """pull [N]: dL/d error. e is a constant, as in the paper."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    d_weight = torch.zeros_like(dead.weight, dtype=wide)
    d_w, d_bias = torch.zeros_like(d_weight), torch.zeros_like(dead.bias, dtype=wide)
    d_rows = torch.zeros_like(rows) if want_rows else None
    for part, f in _codes(rows, dead, k):
        # Without dead latents f is 0 everywhere, and so are the gradients.
        g = (2 * pull[part])[:, None].to(e.dtype) * (torch.mm(f, dead.w_dec) - e[part])
        d_w += torch.mm(f.T, g)
        d_pre = torch.mm(g, dead.w_dec.T).mul_(f > 0)
        d_weight += torch.mm(d_pre.T, rows[part])
        d_bias += d_pre.sum(0, dtype=wide)
        if d_rows is not None:
            torch.mm(d_pre, dead.weight, out=d_rows[part])
    return DeadGradients(d_weight, d_bias, d_w, d_rows)


def _codes(rows: Tensor, dead: Dead, k: int, cut: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The dense code f [R, S] of each chunk of rows: ReLU of the k largest; of equal ones the lower features.

    cut [N]: where to write what lies half way between the k-th and the next."""
    N, S = rows.shape[0], dead.bias.numel()
    height = max(1, min(cpu.CHUNK_ELEMENTS // max(S, 1), -(-N // cpu.CHUNKS)))
    for start in range(0, N if S else 0, height):
        part = slice(start, min(start + height, N))
        f = torch.addmm(dead.bias, rows[part], dead.weight.T).relu_()
        if k < S:
            if cut is not None:
                cut[part] = f.topk(k + 1, dim=-1, sorted=True).values[:, -2:].mean(-1)
            f.mul_(_largest(f, k))
        yield part, f


def _largest(f: Tensor, k: int) -> Tensor:
    """[R, S] bool: the k largest of each row; of equal ones the first."""
    last = f.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    larger, ties = f > last, f == last
    room = k - larger.sum(-1, keepdim=True)
    if f.device.type == "cpu" and bool((ties.sum(-1, keepdim=True) == room).all()):
        return larger | ties  # elsewhere, asking would wait for the device
    return larger | (ties & (ties.cumsum(-1) <= room))


class AuxPull(NamedTuple):
    """What pulls at dead latents, for gradients of any of them: rows x − centre [N, D]; out [N, D], dL/d(f · w_dec) if
    L is Σ_n error[n]; cut [N], which the pre-activation of a chosen latent exceeds. And error [N]."""

    rows: Tensor
    out: Tensor
    cut: Tensor
    error: Tensor


def pull_of(rows: Tensor, e: Tensor, dead: Dead, k: int) -> AuxPull:
    """The errors of `errors`, and what is needed for gradients of some dead latents at a time (`gradients_of`).

    The cut lies half way between the k-th and the next, so that products in other blocks choose the same latents;
    where those two are equal, which real activations do not do, neither has a gradient.
    """
    error = torch.zeros(rows.shape[0], dtype=torch.promote_types(e.dtype, torch.float32), device=e.device)
    out, cut = torch.zeros_like(rows), torch.zeros(rows.shape[0], dtype=rows.dtype, device=rows.device)
    any_dead = torch.isfinite(dead.bias).any()
    for part, f in _codes(rows, dead, k, cut):
        missed = torch.mm(f, dead.w_dec) - e[part]
        error[part] = widened(missed).square().sum(-1)
        out[part] = 2 * missed
    return AuxPull(rows, out * any_dead, cut, error * any_dead)


def gradients_of(pull: AuxPull, some: Dead) -> DeadGradients:
    """Gradients of Σ_n error[n] for some of the dead latents [C]: three products of N·C·D operations."""
    f = torch.addmm(some.bias, pull.rows, some.weight.T).relu_()
    f.mul_(f > pull.cut[:, None])
    d_pre = torch.mm(pull.out, some.w_dec.T).mul_(f > 0)
    return DeadGradients(torch.mm(d_pre.T, pull.rows), d_pre.sum(0), torch.mm(f.T, pull.out), None)
