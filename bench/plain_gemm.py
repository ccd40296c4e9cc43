"""A matrix product in Triton that writes all of it: `encode` without its epilogue, with the same tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.encode import product, tile_of, tile_options


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, out_ptr,  # [N, D], [F, D], [N, F]
    N, F, stride_xn, stride_wf, stride_on,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
):
    tile_n, tile_f = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F), TOGETHER)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = product(x_ptr, w_ptr, tl.where(rows < N, rows, 0), tl.where(columns < F, columns, 0), stride_xn, stride_wf,
                  D, PRECISION, BLOCK_N, BLOCK_F, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * stride_on + columns[None, :]
    mask = (rows < N)[:, None] & (columns < F)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def gemm(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x · weightᵀ [N, F] in x's dtype, summed in fp32."""
    (N, D), F = x.shape, weight.shape[0]
    out = torch.empty(N, F, dtype=x.dtype, device=x.device) if out is None else out
    options = tile_options(x)
    with torch.cuda.device_of(x):
        gemm_kernel[(triton.cdiv(N, options["BLOCK_N"]) * triton.cdiv(F, options["BLOCK_F"]),)](
            x, weight, out, N, F, x.stride(0), weight.stride(0), out.stride(0), D=D, **options
        )
    return out
