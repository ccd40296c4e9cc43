"""Encode: the product x · W_encᵀ, of which only the best of every group of 32 features is written.

The epilogue adds the bias and keeps, of each group, the R largest entries and where they stood; [N, F] never exists.
What may have been hidden behind them is found by `select` (the certificate) and computed by `repair`.

Two encoders write the same: `encode_fused`, one kernel; and `encode_chunked`, cuBLAS over chunks of features that stay
in the L2 cache, and a pass over each chunk. The second takes any width; the first, multiples of 16.

Group g of G = ⌈F / 32⌉ holds features g, g + G, g + 2 G, …, not 32 neighbours. Matryoshka prefixes are then spread over
all groups, and in a tile of 256 columns the 32 members of a group lie 8 columns apart, which in the layout of the
tensor cores is one thread's share: the reduction needs no exchange between threads.

Entries keep all their 32 bits. Packing the place into the low bits of the value, the obvious way, saves a tenth of the
registers and an eighth of the traffic, and costs exact values, exact order and a certificate with a margin.

N tokens, F dictionary size, D model width, G groups of 32 features, R entries kept of each.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 32


class Tile(NamedTuple):
    """One program's share of the product, and how it is run."""

    BLOCK_N: int
    BLOCK_F: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# By compute capability and kind of product: half (bfloat16, float16), tf32, and ieee (float32 without tensor cores).
# sm_86, which also stands for 89, and 120 have 99 KB of shared memory, 80 has 163, 90 and 100 have 227. Chosen by what
# compiles without a stack, and by the usual sizes; not yet timed on a GPU.
TILES = {
    80: {"half": Tile(128, 128, 64, 8, 3), "tf32": Tile(128, 128, 32, 8, 3), "ieee": Tile(64, 64, 16, 8, 3)},
    86: {"half": Tile(128, 128, 32, 8, 3), "tf32": Tile(128, 128, 16, 8, 3), "ieee": Tile(64, 64, 16, 8, 3)},
    90: {"half": Tile(128, 256, 64, 8, 3), "tf32": Tile(128, 256, 32, 8, 3), "ieee": Tile(64, 64, 16, 8, 3)},
    100: {"half": Tile(128, 128, 64, 8, 4), "tf32": Tile(128, 128, 32, 8, 3), "ieee": Tile(64, 64, 16, 8, 3)},
    120: {"half": Tile(128, 128, 32, 8, 3), "tf32": Tile(128, 128, 16, 8, 3), "ieee": Tile(64, 64, 16, 8, 3)},
}
# Tiles of this many blocks of rows follow one another, so that a block of W_enc is used again while it is in L2.
TILES_N_TOGETHER = 8


@triton.jit
def feature_of(group, place, SPAN):
    """The feature at a place, 0 … 31, of a group: groups are interleaved within spans of SPAN groups."""
    return (group // SPAN) * (32 * SPAN) + group % SPAN + place * SPAN


@triton.jit
def keep_best(z, groups, rows, n_rows, n_groups, best_ptr, place_ptr, stride_br, stride_bn, R: tl.constexpr):
    """Writes the R largest positive entries of z [BLOCK_N, 32, GROUPS] over its middle axis, and their places.

    Of equal entries the lower place comes first. 0 stands for none.
    """
    at = tl.arange(0, 32)[None, :, None]
    where = rows.to(tl.int64)[:, None] * stride_bn + groups[None, :]
    mask = (rows < n_rows)[:, None] & (groups < n_groups)[None, :]
    z = tl.where(z > 0, z, 0.0)  # NaN is not positive
    for r in tl.static_range(R):
        top = tl.max(z, axis=1)  # [BLOCK_N, GROUPS]
        place = tl.min(tl.where(z == top[:, None, :], at, 32), axis=1)
        tl.store(best_ptr + where, top, mask=mask)
        tl.store(place_ptr + where, place.to(tl.uint8), mask=mask)
        where += stride_br  # not r * stride_br, a product in 32 bits where the stride alone fits
        if r + 1 < R:
            z = tl.where(at == place[:, None, :], 0.0, z)


@triton.jit
def tile_of(pid, tiles_n, tiles_f, TOGETHER: tl.constexpr):
    """Which tile a program makes: TOGETHER blocks of rows follow one another for a block of features."""
    first_n = (pid // (TOGETHER * tiles_f)) * TOGETHER
    together = tl.minimum(tiles_n - first_n, TOGETHER)
    return first_n + (pid % (TOGETHER * tiles_f)) % together, (pid % (TOGETHER * tiles_f)) // together


@triton.jit
def product(
    x_ptr, w_ptr, x_rows, w_rows, stride_xn, stride_wf,  # [N, D], [F, D], [BLOCK_N], [BLOCK_F]
    # D is constant so that the loop is a `for`, which is pipelined; the interpreter takes no other bounds in one.
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """⟨x[x_rows], w[w_rows]⟩ in fp32: [BLOCK_N, BLOCK_F]."""
    d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + x_rows.to(tl.int64)[:, None] * stride_xn + d[None, :]
    w_at = w_ptr + w_rows.to(tl.int64)[:, None] * stride_wf + d[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        x = tl.load(x_at, mask=d[None, :] < D - start, other=0.0)
        w = tl.load(w_at, mask=d[None, :] < D - start, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        x_at += BLOCK_D
        w_at += BLOCK_D
    return acc


@triton.jit
def encode_kernel(
    x_ptr, w_ptr, bias_ptr,  # [N, D], [F, D], [F]
    best_ptr, place_ptr,  # [R, N, G], [R, N, G]
    N, F, G,
    stride_xn, stride_wf, stride_br, stride_bn,
    D: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK_F // 32
    tile_n, tile_f = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(G, GROUPS), TOGETHER)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, BLOCK_F)
    group = tile_f * GROUPS + column % GROUPS
    features = group + (column // GROUPS) * G  # [BLOCK_F]
    valid = (features < F) & (group < G)
    # Rows and features past the end are computed from the first ones and never written: no mask for them in the loop.
    acc = product(x_ptr, w_ptr, tl.where(rows < N, rows, 0), tl.where(valid, features, 0), stride_xn, stride_wf,
                  D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
    acc += tl.load(bias_ptr + features, mask=valid, other=float("-inf"))[None, :]
    z = tl.reshape(acc, [BLOCK_N, 32, GROUPS])
    groups = tile_f * GROUPS + tl.arange(0, GROUPS)
    keep_best(z, groups, rows, N, G, best_ptr, place_ptr, stride_br, stride_bn, R)


@triton.jit
def group_kernel(
    z_ptr,  # [N, C]
    best_ptr, place_ptr,  # [R, N, G], [R, N, G]; pointing at this chunk's first group
    N, C, SPAN,
    stride_zn, stride_br, stride_bn,
    R: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[None, :] + tl.arange(0, 32)[:, None] * SPAN  # [32, GROUPS]
    valid = (columns < C) & (groups < SPAN)[None, :]
    at = rows.to(tl.int64)[:, None, None] * stride_zn + columns[None, :, :]
    z = tl.load(z_ptr + at, mask=(rows < N)[:, None, None] & valid[None, :, :], other=0.0)
    keep_best(z, groups, rows, N, SPAN, best_ptr, place_ptr, stride_br, stride_bn, R)


class Groups(NamedTuple):
    """What an encoder leaves of the product: best [R, N, G] fp32 and place [R, N, G] uint8, descending over R.

    Groups are interleaved within spans of `span` groups, see `feature_of`. 0 in best: no positive entry.
    """

    best: Tensor
    place: Tensor
    span: int


def generation(device: torch.device) -> int:
    """The key of TILES for a device. A newer one than we know takes the smallest tiles."""
    if device.type != "cuda":
        return 90  # the interpreter
    major, minor = torch.cuda.get_device_capability(device)
    return {8: 80 if minor == 0 else 86, 9: 90, 10: 100, 11: 100, 12: 120}.get(major, 86)


def product_kind(dtype: torch.dtype) -> str:
    """half, tf32 or ieee: float32 follows torch.get_float32_matmul_precision, as in torch's own products."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def input_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision for a dtype. Half precision ignores it."""
    return "ieee" if product_kind(dtype) == "ieee" else "tf32"


def tile_options(x: Tensor) -> dict[str, Any]:
    """The tile for x's device and dtype, as arguments of a launch."""
    tile = TILES[generation(x.device)][product_kind(x.dtype)]
    return {**tile._asdict(), "TOGETHER": TILES_N_TOGETHER, "PRECISION": input_precision(x.dtype)}


def fits_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes and lie multiples of 16 elements apart.

    Triton looks for these two when a kernel is launched. Without them it loads elements one by one, not by
    asynchronous copies, and the tiles spill.
    """
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in (x, weight))


def encode_fused(x: Tensor, weight: Tensor, bias: Tensor, r: int) -> Groups:
    """The r best of every group of x · weightᵀ + bias. x: [N, D] and weight: [F, D] of one dtype, bias: [F] fp32.

    Unchecked: rows contiguous and aligned, see `fits_fused`. Writes 5 r N F / 32 bytes.
    """
    (N, D), F = x.shape, weight.shape[0]
    G = triton.cdiv(F, GROUP)
    found = _empty(r, N, G, G, x.device)
    options = tile_options(x)
    grid = (triton.cdiv(N, options["BLOCK_N"]) * triton.cdiv(G, options["BLOCK_F"] // GROUP),)
    with torch.cuda.device_of(x):
        encode_kernel[grid](
            x, weight, bias, found.best, found.place,
            N, F, G, x.stride(0), weight.stride(0), found.best.stride(0), found.best.stride(1),
            D=D, R=r, **options,
        )
    return found


# Bytes of the product that are in the cache at a time: about the L2 of sm_90. Not yet tuned on a GPU.
CHUNK_BYTES = 32 << 20
GROUP_BLOCK_N, GROUP_BLOCK_GROUPS, GROUP_WARPS = 4, 32, 4


def encode_chunked(x: Tensor, weight: Tensor, bias: Tensor, r: int) -> Groups:
    """As encode_fused, from torch's matrix product, a chunk of features at a time. Any width and alignment."""
    N, F = x.shape[0], weight.shape[0]
    # A fifth of the features at most, so that small problems too never hold [N, F].
    span = max(1, min(CHUNK_BYTES // (4 * GROUP * max(N, 1)), triton.cdiv(F, 5 * GROUP)))
    chunks = triton.cdiv(F, span * GROUP)
    found = _empty(r, N, chunks * span, span, x.device)
    with torch.cuda.device_of(x):
        for chunk in range(chunks):
            part = slice(chunk * span * GROUP, min((chunk + 1) * span * GROUP, F))
            z = _product(x, weight[part], bias[part])
            grid = (triton.cdiv(N, GROUP_BLOCK_N), triton.cdiv(span, GROUP_BLOCK_GROUPS))
            group_kernel[grid](
                z, found.best[:, :, chunk * span :], found.place[:, :, chunk * span :],
                N, z.shape[1], span, z.stride(0), found.best.stride(0), found.best.stride(1),
                R=r, BLOCK_N=GROUP_BLOCK_N, GROUPS=GROUP_BLOCK_GROUPS,
                num_warps=GROUP_WARPS,
            )
    return found


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x · weightᵀ + bias in fp32, under autocast too: bf16 would round neighbours of a row's K-th entry onto it."""
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype != torch.float32 and x.device.type == "cuda":
            return torch.mm(x, weight.T, out_dtype=torch.float32).add_(bias)
        return torch.addmm(bias, x.float(), weight.float().T)


def _empty(r: int, n: int, groups: int, span: int, device: torch.device) -> Groups:
    best = torch.empty(r, n, groups, dtype=torch.float32, device=device)
    return Groups(best, torch.empty(r, n, groups, dtype=torch.uint8, device=device), span)
