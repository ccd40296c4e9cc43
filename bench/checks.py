"""Is it right? Asked before it is timed, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Rounding of one result in the dtype, as a share of its size.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Options of TrainStep whose topk waits for nothing.
TRAIN_STEPS: list[dict[str, Any]] = [
    {}, {"state": "8bit", "clip": 1.0}, {"state": "rowwise", "betas": (0.0, 0.999)},
    {"clip": 1.0, "clip_by": "previous"},
]  # fmt: skip


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


def check_decode(out: Tensor, indices: Tensor, values: Tensor, w_dec: Tensor, slack: float = 2) -> None:
    """32 rows from first to last. Raises WrongResult; NaN is wrong too. slack: times what rounding allows."""
    rows = torch.linspace(0, out.shape[0] - 1, min(32, out.shape[0]), device=out.device).long()
    error = decode_error(out, indices, values, w_dec, rows)
    if not error <= slack:
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


def code_error(values: Tensor, indices: Tensor, counts: Tensor, pre: Tensor, allowed: Tensor, k: int | None) -> float:
    """How far a code is from the exact one of pre [R, F] (float64), in units of allowed [R, 1]; infinite if not a code.

    k: the code shall hold the k largest positive entries of a row; None: all positive ones. An entry may stand for
    another, or be left out, only if the two, or it and 0, are within rounding of each other.
    """
    R, F = pre.shape
    used = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    at = indices.long()
    if bool(((at < 0) | (at >= F)).any()) or bool(values[~used].any()):
        return float("inf")
    chosen = torch.zeros(R, F, dtype=torch.int64, device=pre.device).scatter_add_(1, at, used.long())
    if int(chosen.max()) > 1 or (k is not None and int(counts.max()) > k):
        return float("inf")
    errors = (values.double() - pre.gather(1, at)).abs().masked_fill(~used, 0) / allowed
    worst = errors.max() if errors.numel() else errors.new_zeros(())
    # The largest entry left out may exceed the least that was chosen, or 0 in a row that is not full, by noise.
    left_out = pre.masked_fill(chosen > 0, float("-inf")).max(1, keepdim=True).values
    least = pre.masked_fill(chosen == 0, float("inf")).min(1, keepdim=True).values
    full = torch.zeros_like(counts, dtype=torch.bool) if k is None else counts >= k
    excess = left_out - torch.where(full[:, None], least, 0.0)
    return float(torch.maximum(worst, (excess / allowed).max()))


def allowed_error(x: Tensor, weight: Tensor, rounding: float = ROUNDING[torch.float32]) -> Tensor:
    """[R, 1]: what rounding may do to a sum of D products in fp32, for rows x [R, D] and the longest row of weight."""
    longest = weight.double().norm(dim=1).max()
    return 8 * rounding * x.shape[1] ** 0.5 * (x.double().norm(dim=1, keepdim=True) * longest + 1)


def encode_checks(device: torch.device) -> list[dict[str, Any]]:
    """All four rules with both encoders on ragged sizes: {op, case, error, passed}; error as in code_error."""
    from fastsae import gpu, ops

    rows = []
    cuda = device.type == "cuda"
    dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if cuda else [])]  # bf16 is wrong in the interpreter
    sizes = [(1, 16, 1, 1), (5, 48, 300, 7)] + ([(300, 512, 4096, 20), (129, 768, 24571, 32)] if cuda else [])
    for (N, D, F, k), dtype in ((size, dtype) for size in sizes for dtype in dtypes):
        x, weight = torch.randn(N, D, device=device).to(dtype), torch.randn(F, D, device=device).to(dtype)
        bias = torch.randn(F, device=device).to(dtype)
        pre = x.double() @ weight.double().T + bias.double()
        shifted = (bias.float() - 2 * D**0.5).to(dtype)  # about one in 40 above 0
        sparse = pre - bias.double() + shifted.double()
        # float32 products take tensor cores where that is asked for, which round each factor to 11 bits.
        tf32 = cuda and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        allowed = allowed_error(x, weight, 2.0**-12 if tf32 else ROUNDING[torch.float32])
        every: gpu.Encoder
        for every in ("fused", "chunked"):
            top = gpu.encode_topk(x, weight, bias, k, encoder=every)
            again = gpu.encode_topk(x, weight, bias, k, encoder=every)
            above = gpu.encode_above(x, weight, shifted, F, encoder=every)
            assert above is not None
            batch = gpu.encode_batchtopk(x, weight, bias, k, encoder=every)
            least = float(batch.values[batch.values > 0].min()) if bool((batch.values > 0).any()) else 0.0
            # A batch's code is that of ReLU with its least entry, or a little less, for a threshold.
            errors = {
                "topk": code_error(*top[:3], pre, allowed, k),
                "relu": code_error(*above, sparse, allowed, None),
                "batchtopk": code_error(batch.values, batch.indices, batch.counts,
                                        torch.where(pre >= least - allowed, pre, -1.0), 2 * allowed, None),
            }  # fmt: skip
            same = all(torch.equal(a, b) for a, b in zip(top[:3], again[:3], strict=True))
            for rule, error in errors.items():
                rows.append({"op": "encode", "case": f"{rule} {every} N {N} D {D} F {F} k {k} {dtype}", "error": error,
                             "same_bits_twice": same, "passed": error <= 1 and same})
        threshold = torch.rand(F, device=device).to(dtype)
        code = ops.encode_jumprelu(x, weight, shifted, threshold, F, backend="triton")
        assert code is not None and code.counts is not None
        jumped = torch.where(sparse > threshold.double(), sparse, -1.0)
        near = (sparse - threshold.double()).abs() < allowed  # either side of the threshold is right there
        dense = code.to_dense().double()
        wrong = ((dense - jumped.clamp_min(0)).abs() / allowed).masked_fill(near, 0).max()
        rows.append({"op": "encode", "case": f"jumprelu N {N} D {D} F {F} {dtype}", "error": float(wrong),
                     "passed": float(wrong) <= 1})
    return rows


# Rules with codes of any length are also checked with rows that do not fit into their slots.
STEPS = [("topk", False), *itertools.product(("relu", "batchtopk", "jumprelu"), (False, True))]


def leave_open(sae: Any) -> None:
    """Lets the next call find room for few entries a row, as after codes that were sparser."""
    from fastsae.capacity import Counters, room_of

    known = room_of(sae.room)
    known.slots, known.groups, known.needed, known.counters = 6, 32, 1, Counters()


def step_checks(device: torch.device) -> list[dict[str, Any]]:
    """x̂ and all gradients of SAE.loss on the device in float32 against the same SAE in float64 on the CPU."""
    from fastsae.sae import SAE

    rows = []
    for activation, opened in STEPS:
        options: Any = {"d_in": 48, "d_sae": 512, "activation": activation, "k": 8, "l1_coefficient": 0.1, "seed": 3,
                        "init_threshold": 0.5, "bandwidth": 0.2}  # fmt: skip
        sae = SAE(**options, backend="triton" if opened else "auto", device=device)
        exact = SAE(**options, dtype="float64")
        exact.load_state_dict({name: value.double().cpu() if value.is_floating_point() else value.cpu()
                               for name, value in sae.state_dict().items()})
        x = torch.randn(97 if device.type == "cuda" or not opened else 17, 48, device=device)
        if opened:
            leave_open(sae)
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
        missing = opened and not bool(out.made.is_open.any())  # then nothing was checked
        for name, (ours, theirs) in pairs.items():
            error = float("nan")
            if not missing and ours is not None and theirs is not None:
                ours, theirs = ours.detach().double().cpu(), theirs.detach()
                error = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
            rows.append({"op": "step", "case": f"{activation}{' open rows' if opened else ''} {name}", "error": error,
                         "passed": error < 1e-4})
    return rows


def train_step_checks(device: torch.device) -> list[dict[str, Any]]:
    """Losses of some steps of TrainStep by the kernels, in float32, against those in float64 on the CPU; of small
    states only that the loss stays near."""
    from fastsae.sae import SAE
    from fastsae.step import TrainStep

    rows, steps = [], 20 if device.type == "cuda" else 2
    d_sae = 512 if device.type == "cuda" else 64  # each latent is a program, of which the interpreter makes 30 a second
    kinds: list[tuple[str, dict[str, Any]]] = [(rule, {}) for rule in ("topk", "relu", "batchtopk", "jumprelu")]
    kinds += [("topk", {"state": state}) for state in ("bf16", "8bit", "rowwise")]
    kinds += [("topk", {"betas": (0.0, 0.99)}), ("topk", {"clip": 1.0})]
    if device.type == "cpu":  # the interpreter is slow; tests/test_row_update.py has them all
        kinds = [kinds[0], kinds[1], kinds[5], kinds[8]]
    for activation, how in kinds:
        options: Any = {"d_in": 48, "d_sae": d_sae, "activation": activation, "k": 4, "l1_coefficient": 0.1, "seed": 3,
                        "init_threshold": 1.5, "bandwidth": 0.2, "dead_after_tokens": 9, "k_aux": 8}  # fmt: skip
        found = []
        x = torch.randn(97 if device.type == "cuda" else 3, 48)
        for where, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
            backend = "triton" if dtype == torch.float32 else "torch"
            sae = SAE(**options, dtype=dtype, backend=backend, device=where)
            with torch.no_grad():
                sae.encoder.bias.fill_(-1.5 if activation == "relu" else 0.0)
            step = TrainStep(sae, lr=1e-3, **({k: v for k, v in how.items() if dtype == torch.float32 or k != "state"}))
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                losses = [step(x.to(where, dtype)).loss for _ in range(steps)]
            finally:
                torch.set_float32_matmul_precision(before)
            found.append(torch.stack(losses).double().cpu())
        error = float((found[0] / found[1] - 1).abs().max())
        passed = error < (0.02 if "state" in how else 1e-3)
        rows.append({"op": "TrainStep", "case": f"{activation} {how or ''}".strip(), "error": error, "passed": passed})
    return rows


def no_wait_checks(device: torch.device) -> list[dict[str, Any]]:
    """On a GPU: a step of each rule does not wait, and can be captured in a CUDA graph whose replay gives the same
    bits; nor does TrainStep with topk. {op, case, error (of the graph's gradients), passed}."""
    from fastsae.sae import SAE

    rows: list[dict[str, Any]] = []
    if device.type != "cuda":
        return rows
    for activation, opened in STEPS:
        options: Any = {"activation": activation, "k": 8, "max_l0": 512, "init_threshold": 0.5}
        sae = SAE(d_in=64, d_sae=512, **options, device=device)
        x = torch.randn(128, 64, device=device)

        def step(sae: SAE = sae, x: Tensor = x, opened: bool = opened) -> None:
            if opened:
                leave_open(sae)
            sae.zero_grad(set_to_none=True)
            sae.loss(x).loss.backward()

        for _ in range(4):  # compiles, and learns how much room a code takes
            step()
        torch.cuda.synchronize()
        name = f"{activation}{' with open rows' if opened else ''}"
        rows.append(does_not_wait(name, step))
        wanted = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
        case = f"{name} in a CUDA graph"
        try:
            graph = torch.cuda.CUDAGraph()
            sae.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                step()
            graph.replay()
            torch.cuda.synchronize()
            found = [p.grad for p in sae.parameters() if p.grad is not None]
            error = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
            passed = error == 0
        except RuntimeError as problem:
            case, error, passed = f"{case}: {problem}", float("nan"), False
        rows.append({"op": "step", "case": case, "error": error, "passed": passed})
    return rows + [does_not_wait(f"TrainStep {how}", train_step_of(how, device)) for how in TRAIN_STEPS]


def train_step_of(how: dict[str, Any], device: torch.device) -> Callable[[], object]:
    """A step of topk with AuxK, after some that compile and learn how much room the dead take."""
    from fastsae.sae import SAE
    from fastsae.step import TrainStep

    step = TrainStep(SAE(d_in=64, d_sae=512, k=8, dead_after_tokens=256, device=device), lr=1e-4, **how)
    x = torch.randn(128, 64, device=device)
    for _ in range(6):
        step(x)
    torch.cuda.synchronize()
    return lambda: step(x)


def does_not_wait(name: str, call: Callable[[], object]) -> dict[str, Any]:
    """A row: whether torch sees nothing in call that waits for the GPU."""
    case, passed = f"{name} does not wait", True
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as problem:
        case, passed = f"{case}: {problem}", False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"op": "step", "case": case, "error": 0.0, "passed": passed}
