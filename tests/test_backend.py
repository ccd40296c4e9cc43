"""Which backend runs: kernels where they are asked for and can run, never torch in their stead without saying so."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import fastsae
from fastsae import cpu, gpu, ops
from fastsae.autoencode import autoencode
from fastsae.codes import SparseCode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [
    {"activation": "topk", "k": 4},
    {"activation": "relu", "l1_coefficient": 1.0},
    {"activation": "batchtopk", "k": 4},
    {"activation": "jumprelu", "bandwidth": 0.5, "init_threshold": 0.3},
]


misused: Any = ops.encode_topk  # with arguments that a type checker would refuse


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that were launched."""
    names: list[str] = []
    from fastsae.kernels import batch_cut, decode, dense_rows, encode, exact, repair, row_update, select, weight_grad

    for module in (batch_cut, decode, dense_rows, encode, exact, repair, row_update, select, weight_grad):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)

            class Counted:
                def __init__(self, kernel, name):
                    self.kernel, self.name = kernel, name

                def __getitem__(self, grid):
                    names.append(self.name)
                    return self.kernel[grid]

            monkeypatch.setattr(module, name, Counted(kernel, name))
    monkeypatch.setattr(gpu, "interpreted", lambda: DEVICE == "cpu")
    return names


def make(options: dict, backend: str, **more) -> tuple[fastsae.SAE, torch.Tensor]:
    sae = fastsae.SAE(d_in=16, d_sae=64, **options, backend=backend, device=DEVICE, **more)
    sae.b_enc.data -= 0.5
    return sae, torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("options", OPTIONS)
def test_triton_launches_kernels_and_agrees_with_torch(options, launches, monkeypatch):
    (sae, x), (plain, _) = make(options, "triton"), make(options, "torch")
    plain_out = plain.loss(x)
    plain_out.loss.backward()
    assert launches == []
    with monkeypatch.context() as patch:
        for name in ("encode_topk", "encode_relu", "encode_batchtopk", "by_token", "by_feature", "weighted_rows"):
            patch.setattr(cpu, name, None)  # whoever calls it fails
        out = sae.loss(x)
        out.loss.backward()
    wanted = {"encode_kernel", "collect_kernel", "repair_kernel", "decode_kernel", "weight_grad_kernel"}
    wanted |= {"count_slots_kernel"} if options["activation"] == "batchtopk" else set()
    assert wanted <= set(launches)
    torch.testing.assert_close(out.loss, plain_out.loss)
    for (name, p), q in zip(sae.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(sae.encode(x), plain.encode(x))
    torch.testing.assert_close(sae(x), plain(x))
    assert sae.encode_sparse(x).shape == (5, 3, 64)


def test_the_dense_path_is_the_one_exception(launches):
    sae, x = make({"activation": "relu", "max_l0": 1}, "triton")
    out = sae.loss(x)
    assert out.code is None and "encode_kernel" in launches and "decode_kernel" not in launches


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA tensors take the kernels")
def test_auto_takes_torch_on_the_cpu(launches):
    sae, x = make(OPTIONS[0], "auto")
    sae.loss(x)
    assert launches == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, b: ops.encode_topk(x, w, b, 0), "k in 1 … 50.*got 0"),
        (lambda x, w, b: ops.encode_topk(x, w, b, 51), "k in 1 … 50.*got 51"),
        (lambda x, w, b: ops.encode_topk(x[:, :3], w, b, 4), r"one width, got \(6, 3\) and \(50, 4\)"),
        (lambda x, w, b: ops.encode_topk(x[None], w, b, 4), "flatten"),
        (lambda x, w, b: ops.encode_relu(x, w, b[:9], 50), r"bias \[50\]"),
        (lambda x, w, b: ops.encode_relu(x, w, b, 50, torch.zeros(3)), r"centre \[4\]"),
        (lambda x, w, b: ops.encode_topk(x.double(), w, b, 4), "dtype for all, got x torch.float64"),
        (lambda x, w, b: ops.encode_topk(x.to("meta"), w, b, 4), "device for all, got x meta"),
        (lambda x, w, b: ops.encode_batchtopk(x, w, b, 99), "k in 1 … 50"),
        (lambda x, w, b: ops.encode_jumprelu(x, w, b, b[:3], 50), r"expected threshold \[50\]"),
        (lambda x, w, b: ops.encode_jumprelu(x, w, b, b, 50, bandwidth=-1), "bandwidth must be a finite number"),
        (lambda x, w, b: ops.encode_topk(x / 0, w, b, 4, check_finite=True), "6 of 6 rows with NaN or infinity"),
        (lambda x, w, b: ops.encode_topk(x.double(), w.double(), b.double(), 4, backend="triton"), "got torch.float64"),
        (lambda x, w, b: gpu.encode_topk(x[:, 1:], w[:, 1:].contiguous(), b, 4, encoder="fused"), "16 bytes"),
        (lambda x, w, b: ops.decode(SparseCode(x, x.int(), 50), w[:9]), r"w_dec \[50, D\].*got \(9, 4\)"),
        (lambda x, w, b: ops.decode(SparseCode(x, x.int() + 50, 50), w), "indices in 0 … 49"),
        (lambda x, w, b: ops.decode(SparseCode(x, x.int(), 50, b[:6].int() + 9), w), "counts in 0 … 4"),
        (lambda x, w, b: ops.decode(SparseCode(x, x.int(), 50), w.to("meta")), "w_dec on the code's device"),
        (lambda x, w, b: ops.decode(x, w), "a SparseCode, got Tensor"),
        (lambda x, w, b: misused(x, w, b, 4, backend="trition"), "one of 'auto', 'triton', 'torch'"),
        (lambda x, w, b: misused(x, w, b, 2.5), "k in 1 … 50"),
        (lambda x, w, b: ops.encode_jumprelu(x, w, b, b.half(), 50), r"expected threshold \[50\] in torch.float32"),
        (lambda x, w, b: autoencode(x, w, b, w.half(), x[0], rule="relu"), r"expected w_dec \[50, 4\] in torch.fl"),
        (lambda x, w, b: autoencode(x, w, b, w, x[0], rule="relu", target=x.double()), "expected target"),
        (lambda x, w, b: autoencode(x, w, b, w, x[0], rule="relu", most=-1), "most must be at least 1"),
        (lambda x, w, b: autoencode(x, w, b, w, x[0], rule="topk", k=2, dead=b.long()[:3]), "go together"),
        (lambda x, w, b: autoencode(x, w, b, w, x[0], rule="topk", k=2, dead=b.long()[:3], is_dead=b.bool(), k_aux=0),
         "k_aux must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_kernel(call, message, launches):
    x, w, b = torch.randn(6, 4, device=DEVICE), torch.randn(50, 4, device=DEVICE), torch.zeros(50, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        call(x, w, b)
    assert launches == []


def test_more_k_than_there_are_kernels_for():
    x, w, b = torch.randn(2, 4, device=DEVICE), torch.randn(600, 4, device=DEVICE), torch.zeros(600, device=DEVICE)
    with pytest.raises(ValueError, match="k of at most 512, got 513"):
        ops.encode_topk(x, w, b, 513, backend="triton")
    assert ops.encode_topk(x, w, b, 513, backend="auto").k == 513


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's limits")
def test_bfloat16_is_refused_in_the_interpreter():
    sae, x = make(OPTIONS[0], "triton", dtype="bfloat16")
    with pytest.raises(ValueError, match="interpreter gets products wrong"):
        sae.loss(x)


def test_indices_out_of_range_are_refused_in_decode(launches):
    sae, x = make(OPTIONS[0], "triton")
    code = sae.encode_sparse(x).detach()
    launches.clear()
    code.indices[1, 2] = 64
    with pytest.raises(ValueError, match=r"0 … 63, got some from 0 to 64"):
        sae.decode(code)
    assert launches == []


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=kept | environment, capture_output=True, text=True
    )


STEP = (
    "import torch, fastsae\n"
    "sae = fastsae.SAE(d_in=8, d_sae=64, k=4, backend={backend!r})\n"
    "print(float(sae.loss(torch.ones(3, 8)).fve))\n"
)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_triton_on_the_cpu_needs_the_interpreter():
    refused = python(STEP.format(backend="triton"))
    assert refused.returncode == 1 and "backend='triton' needs a CUDA device, or TRITON_INTERPRET=1" in refused.stderr
    assert python(STEP.format(backend="triton"), TRITON_INTERPRET="1").returncode == 0


def test_import_and_cpu_use_without_triton():
    program = "import sys; sys.modules['triton'] = None\n" + STEP.format(backend="auto")
    done = python(program)
    assert done.returncode == 0, done.stderr
    missing = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
    )
    refused = python(missing + STEP.format(backend="triton"))
    assert "backend='triton' needs Triton, which is not installed" in refused.stderr
