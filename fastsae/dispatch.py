"""What is asked of the operands of `ops`, and whether kernels or torch operations run on them."""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

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
    check_alike(bias, threshold=threshold)
    if not 0 <= bandwidth < float("inf"):
        raise DataError(f"bandwidth must be a finite number ≥ 0, got {bandwidth}")


def check_alike(like: Tensor, **given: Tensor) -> None:
    """Raises DataError for a tensor that has not the shape, dtype and device of `like`."""
    for name, t in given.items():
        if (t.shape, t.dtype, t.device) != (like.shape, like.dtype, like.device):
            raise DataError(
                f"expected {name} {list(like.shape)} in {like.dtype} on {like.device}, got {list(t.shape)} in "
                f"{t.dtype} on {t.device}; .to() converts dtype and device"
            )


def check_dead(dead: Tensor | None, is_dead: Tensor | None, k_aux: int, bias: Tensor) -> None:
    """What AuxK is given, but for the range of dead, which would wait for the device."""
    if (dead is None) != (is_dead is None):
        raise DataError("dead and is_dead go together, got one of them")
    if dead is None or is_dead is None:
        return
    if dead.ndim != 1 or dead.dtype != torch.int64 or is_dead.shape != bias.shape or is_dead.dtype != torch.bool:
        raise DataError(
            f"expected dead [S] in int64 and is_dead [{bias.numel()}] in bool, got {list(dead.shape)} in {dead.dtype} "
            f"and {list(is_dead.shape)} in {is_dead.dtype}"
        )
    if k_aux < 1:
        raise DataError(f"k_aux must be at least 1 where there are dead latents to choose among, got {k_aux}")


def check_k(k: int, among: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= among:
        raise DataError(f"expected k in 1 … {among}, the number of features to choose among, got {k}")


def check_indices(code: SparseCode) -> None:
    """Raises DataError if a used slot of code names no feature, or counts no slots. Waits for the device."""
    if code.counts is not None and code.counts.numel():
        if code.counts.is_floating_point() or code.counts.dtype == torch.bool:
            raise DataError(f"expected integer counts, got {code.counts.dtype}")
        least, most = (int(bound) for bound in code.counts.aminmax())
        if least < 0 or most > code.k:
            raise DataError(f"expected counts in 0 … {code.k}, the slots of a row, got some from {least} to {most}")
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
    if backend not in get_args(Backend):
        raise DataError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
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
