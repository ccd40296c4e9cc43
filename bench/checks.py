"""Is it right? Asked before it is timed, against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rounding of one result in the dtype, as a share of its size.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class WrongResult(RuntimeError):
    """A kernel's result is off by more than rounding explains; it is not timed."""


def decode_error(out: Tensor, indices: Tensor, values: Tensor, w_dec: Tensor, rows: Tensor) -> float:
    """The largest error of out[rows] against float64, in units of what rounding of sums and result allows."""
    gathered = w_dec[indices[rows].long()].double()  # [R, K, D]
    weights = values[rows].double()[..., None]
    expected, size = (gathered * weights).sum(1), (gathered * weights).abs().sum(1)
    allowed = size * ((indices.shape[1] + 1) * ROUNDING[torch.float32] + ROUNDING[w_dec.dtype])
    allowed += torch.finfo(w_dec.dtype).smallest_normal * torch.finfo(w_dec.dtype).eps  # the last bit of subnormals
    return float(((out[rows].double() - expected).abs() / allowed).max())


def check_decode(out: Tensor, indices: Tensor, values: Tensor, w_dec: Tensor) -> None:
    """32 rows from first to last. Raises WrongResult; NaN is wrong too."""
    rows = torch.linspace(0, out.shape[0] - 1, min(32, out.shape[0]), device=out.device).long()
    error = decode_error(out, indices, values, w_dec, rows)
    if not error <= 2:
        raise WrongResult(f"decode is off by {error:.3g} times what rounding allows")


def decode_checks(device: torch.device) -> list[dict[str, Any]]:
    """The Triton kernel on small and ragged sizes: {op, case, error, passed}; error as in decode_error."""
    from fastsae.kernels.decode import decode

    rows = []
    # The interpreter cuts to bf16 where a GPU rounds, so a dry run leaves bf16 out.
    dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if device.type == "cuda" else [])]
    for N, K, F, D in [(1, 1, 1, 1), (17, 5, 40, 63), (7, 64, 507, 507), (3, 3, 9, 4099), (2048, 63, 507, 129)]:
        if device.type == "cpu" and N > 17:
            continue  # minutes in the interpreter
        for dtype in dtypes:
            indices = torch.randint(0, F, (N, K), device=device, dtype=torch.int32)
            values, w_dec = torch.randn(N, K, device=device), torch.randn(F, D, device=device).to(dtype)
            counts = torch.randint(0, K + 1, (N,), device=device)
            unused = torch.arange(K, device=device) >= counts[:, None]
            poisoned = values.masked_fill(unused, float("nan"))
            every = torch.arange(N, device=device)
            out = decode(indices, poisoned, w_dec, counts)
            error = decode_error(out, indices, values.masked_fill(unused, 0), w_dec, every)
            error = max(error, decode_error(decode(indices, values, w_dec), indices, values, w_dec, every))
            same = torch.equal(out, decode(indices, poisoned, w_dec, counts))
            rows.append({"op": "decode", "case": f"N {N} K {K} F {F} D {D} {dtype}", "error": error,
                         "same_bits_twice": same, "passed": error <= 1 and same})
    return rows


def step_checks(device: torch.device) -> list[dict[str, Any]]:
    """x̂ and all gradients of SAE.loss on the device in float32 against the same SAE in float64 on the CPU."""
    from fastsae.sae import SAE

    rows = []
    for activation in ("topk", "relu"):
        options: Any = {"d_in": 48, "d_sae": 512, "activation": activation, "k": 8, "l1_coefficient": 0.1, "seed": 3}
        sae, exact = SAE(**options, device=device), SAE(**options, dtype="float64")
        exact.load_state_dict({name: value.double().cpu() if value.is_floating_point() else value.cpu()
                               for name, value in sae.state_dict().items()})
        x = torch.randn(97, 48, device=device)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # tf32 may choose other latents, which is no error of ours
        try:
            out = sae.loss(x)
            out.loss.backward()
        finally:
            torch.set_float32_matmul_precision(before)
        wanted = exact.loss(x.double().cpu())
        wanted.loss.backward()
        pairs = {"x_hat": (out.x_hat, wanted.x_hat)}
        pairs |= {name: (p.grad, q.grad) for (name, p), q in zip(
            sae.named_parameters(), exact.parameters(), strict=True)}
        for name, (ours, theirs) in pairs.items():
            error = float("nan")
            if ours is not None and theirs is not None:
                ours, theirs = ours.detach().double().cpu(), theirs.detach()
                error = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
            rows.append({"op": "step", "case": f"{activation} {name}", "error": error, "passed": error < 1e-4})
    return rows
