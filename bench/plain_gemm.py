"""A matrix product in Triton that writes all of it: `encode` without its epilogue, with the same tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.encode import TILES, TILES_N_TOGETHER, generation, product_kind


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, out_ptr,  # [N, D], [F, D], [N, F]
    N, F, stride_xn, stride_wf, stride_on,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_n, tiles_f = tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F)
    first_n = (pid // (TOGETHER * tiles_f)) * TOGETHER
    together = tl.minimum(tiles_n - first_n, TOGETHER)
    rows = (first_n + (pid % (TOGETHER * tiles_f)) % together) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (pid % (TOGETHER * tiles_f)) // together * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + tl.where(rows < N, rows, 0).to(tl.int64)[:, None] * stride_xn + d[None, :]
    w_at = w_ptr + tl.where(columns < F, columns, 0).to(tl.int64)[:, None] * stride_wf + d[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        x = tl.load(x_at, mask=d[None, :] < D - start, other=0.0)
        w = tl.load(w_at, mask=d[None, :] < D - start, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        x_at += BLOCK_D
        w_at += BLOCK_D
    at = rows.to(tl.int64)[:, None] * stride_on + columns[None, :]
    mask = (rows < N)[:, None] & (columns < F)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def gemm(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x · weightᵀ [N, F] in x's dtype, summed in fp32."""
    (N, D), F = x.shape, weight.shape[0]
    out = torch.empty(N, F, dtype=x.dtype, device=x.device) if out is None else out
    kind = product_kind(x.dtype)
    tile = TILES[generation(x.device)][kind]
    with torch.cuda.device_of(x):
        gemm_kernel[(triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(F, tile.BLOCK_F),)](
            x, weight, out, N, F, x.stride(0), weight.stride(0), out.stride(0),
            D=D, PRECISION="ieee" if kind == "ieee" else "tf32",
            BLOCK_N=tile.BLOCK_N, BLOCK_F=tile.BLOCK_F, BLOCK_D=tile.BLOCK_D, TOGETHER=TILES_N_TOGETHER,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return out
