"""What is asked of the operands of `ops`, and whether kernels or torch operations run on them."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from fastsae.codes import SparseCode
from fastsae.errors import DataError

Backend = Literal["auto", "triton", "torch"]


def check_encode(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None, check_finite: bool) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise DataError(
            f"expected x [N, D] and weight [F, D] of one width, got {tuple(x.shape)} and {tuple(weight.shape)}; "
            "flatten the leading axes of x into N"
        )
    if bias.shape != weight.shape[:1]:
        raise DataError(f"expected bias [{weight.shape[0]}], one for each row of weight, got {tuple(bias.shape)}")
    if centre is not None and centre.shape != weight.shape[1:]:
        raise DataError(f"expected centre [{weight.shape[1]}], as wide as x, got {tuple(centre.shape)}")
    given = {"x": x, "weight": weight, "bias": bias} | ({} if centre is None else {"centre": centre})
    for what, kind in (("dtype", "floating-point dtype"), ("device", "device")):
        found = {name: getattr(t, what) for name, t in given.items()}
        if len(set(found.values())) > 1 or (what == "dtype" and not x.is_floating_point()):
            listed = ", ".join(f"{name} {value}" for name, value in found.items())
            raise DataError(f"expected one {kind} for all, got {listed}; convert with .to()")
    if check_finite and not bool(torch.isfinite(x).all()):
        rows = int((~torch.isfinite(x).all(1)).sum())
        raise DataError(f"expected finite activations, got {rows} of {x.shape[0]} rows with NaN or infinity; drop them")


def check_threshold(threshold: Tensor, bias: Tensor, bandwidth: float) -> None:
    if threshold.shape != bias.shape or threshold.device != bias.device:
        raise DataError(
            f"threshold must be [{bias.numel()}] on {bias.device}, one for each feature, "
            f"got {tuple(threshold.shape)} on {threshold.device}"
        )
    if bandwidth < 0:
        raise DataError(f"bandwidth must be 0 or more, got {bandwidth}")


def check_k(k: int, among: int) -> None:
    if not 1 <= k <= among:
        raise DataError(f"expected k in 1 … {among}, the number of features to choose among, got {k}")


def check_indices(code: SparseCode) -> None:
    """Raises DataError if a used slot of code names no feature. Waits for the device."""
    if code.indices.is_floating_point() or code.indices.dtype == torch.bool:
        raise DataError(f"expected integer indices, got {code.indices.dtype}")
    if code.indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.where(code.valid(), code.indices, 0).aminmax())
    if low < 0 or high >= code.d_sae:
        raise DataError(f"expected indices in 0 … {code.d_sae - 1}, got some from {low} to {high}")


def use_triton(backend: Backend | str, w: Tensor, product: bool = False, k: int = 0) -> bool:
    """Whether the kernels run: where they can, for auto on a CUDA device; for triton it is an error where they cannot.

    product: whether the kernels multiply matrices, which Triton's interpreter gets wrong in bfloat16.
    """
    if backend == "torch" or (backend == "auto" and w.device.type != "cuda"):
        return False
    problem = _no_kernels(w, product, k)
    if problem is not None and backend == "triton":
        raise DataError(f"backend='triton' needs {problem}; use backend='auto' or 'torch'")
    return problem is None


def _no_kernels(w: Tensor, product: bool, k: int) -> str | None:
    """What the kernels would need, and what there is instead; None if there are kernels for w."""
    if importlib.util.find_spec("triton") is None:
        return "Triton, which is not installed (pip install triton)"
    from fastsae import gpu

    if w.dtype not in gpu.DTYPES:
        return f"float32, bfloat16 or float16, got {w.dtype}"
    if k > gpu.MOST_K:
        return f"k of at most {gpu.MOST_K}, got {k}"
    if w.device.type == "cuda":
        if torch.version.hip is not None:
            return f"an NVIDIA GPU, got {torch.cuda.get_device_name(w.device)}"
        major, minor = torch.cuda.get_device_capability(w.device)
        return None if major >= 8 else f"compute capability 8.0 or higher, got {major}.{minor}"
    if w.device.type != "cpu" or not gpu.interpreted():
        return f"a CUDA device, or TRITON_INTERPRET=1 in the environment to try it on the CPU; got {w.device}"
    if product and w.dtype == torch.bfloat16:
        return "a CUDA device for bfloat16, of which Triton's interpreter gets products wrong; float32 works there"
    return None
