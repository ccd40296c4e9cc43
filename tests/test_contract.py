"""The calls that clients rely on, as the design writes them, in the places where clients make them."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, start_processes
from torch.nn.parallel import DistributedDataParallel

import fastsae

OPTIONS = [
    {"activation": "topk", "k": 8},
    {"activation": "relu", "l1_coefficient": 1.0},
    {"activation": "relu", "l1_coefficient": 1.0, "max_l0": 2},  # always on the dense path
    {"activation": "batchtopk", "k": 8},
    {"activation": "jumprelu", "init_threshold": 0.3},
]
BY_ROW = [options for options in OPTIONS if options["activation"] != "batchtopk"]  # which chooses over the batch


def make(options: dict, **more) -> fastsae.SAE:
    return fastsae.SAE(d_in=16, d_sae=128, **options, **more)


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(30, 16), (3, 10, 16), (2, 3, 5, 16), (16,)])
def test_every_call_on_every_shape(options, shape, tmp_path) -> None:
    sae, x = make(options), data(*shape)
    x_hat, f = sae(x), sae.encode(x)
    assert x_hat.shape == x.shape and f.shape == (*shape[:-1], 128) and sae.decode(f).shape == x.shape
    if "max_l0" not in options:
        code = sae.encode_sparse(x)
        assert isinstance(code, fastsae.SparseCode) and code.shape == f.shape
        torch.testing.assert_close(sae.decode(code), x_hat)
    out = sae.loss(x)
    assert isinstance(out, fastsae.LossOutput)
    for scalar in (out.loss, out.mse, out.sparsity, out.aux, out.l0, out.fve):
        assert scalar.shape == () and scalar.dtype == torch.float32
    assert out.x_hat.shape == x.shape
    out.loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in sae.parameters())

    sae.save_pretrained(tmp_path)
    assert torch.equal(fastsae.SAE.from_pretrained(tmp_path)(x), sae(x))


def test_names_shapes_and_storage() -> None:
    sae = make(OPTIONS[0])
    assert {name: tuple(p.shape) for name, p in sae.named_parameters()} == {
        "W_dec": (128, 16), "b_dec": (16,), "encoder.weight": (128, 16), "encoder.bias": (128,)
    }  # fmt: skip
    assert sae.W_enc.shape == (16, 128) and sae.W_enc.data_ptr() == sae.encoder.weight.data_ptr()
    assert sae.b_enc is sae.encoder.bias and sae.device.type == "cpu" and sae.dtype == torch.float32
    assert sae.cfg == fastsae.SAEConfig(d_in=16, d_sae=128, activation="topk", k=8)


@pytest.mark.parametrize("options", OPTIONS)
def test_without_gradients(options) -> None:
    sae, x = make(options), data(30, 16)
    with torch.no_grad():
        assert not sae(x).requires_grad and not sae.loss(x).loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(sae(x), sae(x).clone())
        assert not sae.loss(x).loss.requires_grad
    frozen = make(options).requires_grad_(False)
    x.requires_grad_()
    frozen.loss(x).loss.backward()
    assert x.grad is not None and x.grad.any() and all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize("options", OPTIONS)
def test_encode_decode_and_values_are_differentiable(options) -> None:
    sae, x = make(options), data(5, 16).requires_grad_()
    (a,) = torch.autograd.grad(sae(x).square().sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(sae.decode(sae.encode(x)).square().sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if "max_l0" not in options:
        code = sae.encode_sparse(x)
        (c,) = torch.autograd.grad(code.values.square().sum(), x, retain_graph=True)
        (d,) = torch.autograd.grad(sae.encode(x).square().sum(), x)
        torch.testing.assert_close(c, d, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_in_a_sequential_with_an_optimizer(options) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), make(options), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = data(2, 32, 16), data(2, 32, 4, seed=1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_with_torch_optim_lowers_the_loss(options, optimizer) -> None:
    sae, x = make(options), data(256, 16)
    steps = optimizer(sae.parameters(), lr=2e-3)
    first = sae.loss(x).loss.item()
    for _ in range(60):
        steps.zero_grad()
        sae.loss(x).loss.backward()
        steps.step()
    assert sae.loss(x).loss.item() < 0.9 * first


@pytest.mark.parametrize("options", BY_ROW)
def test_gradients_accumulate(options) -> None:
    sae, x = make(options), data(32, 16)
    sae.loss(x).loss.backward()
    whole = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    for half in x.split(16):
        (sae.loss(half).loss / 2).backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_copies_and_states(options) -> None:
    sae, x = make(options), data(9, 16)
    sae.set_input_normalisation(torch.ones(16), 0.5)
    sae.loss(x)
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(other(x), sae(x)) and other.cfg == sae.cfg
        other.W_dec.data.zero_()
        assert sae.W_dec.any()
    fresh = make(options, seed=1)
    assert not torch.equal(fresh(x), sae(x))
    fresh.load_state_dict(sae.state_dict())
    assert torch.equal(fresh(x), sae(x)) and torch.equal(fresh.tokens_since_fired, sae.tokens_since_fired)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_another_dtype(options, dtype) -> None:
    sae, x = make(options).to(dtype), data(9, 16)
    assert sae.dtype == dtype and sae.tokens_since_fired.dtype == torch.int64
    assert sae.encode(x).dtype == dtype
    assert sae(x).dtype == torch.float32, "x̂ has x's dtype"
    out = sae.loss(x.to(dtype))
    out.loss.backward()
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and out.x_hat.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == dtype for p in sae.parameters())


@pytest.mark.parametrize("options", OPTIONS)
def test_bf16_activations_into_a_float32_sae_and_autocast(options) -> None:
    sae, x = make(options), data(9, 16)
    out = sae(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), sae(x), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sae.loss(x)
        inside.loss.backward()
    torch.testing.assert_close(inside.loss, sae.loss(x).loss, rtol=2e-2, atol=1e-2)


class Activations(torch.utils.data.Dataset):
    """A dataset that encodes in the worker, which receives the SAE by pickling."""

    def __init__(self, sae: fastsae.SAE, x: Tensor) -> None:
        self.sae, self.x = sae, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(1)
        with torch.no_grad():
            return self.sae.encode(self.x[i])


def test_in_a_dataloader_worker() -> None:
    sae, x = make(OPTIONS[0]), data(6, 16)
    loader = torch.utils.data.DataLoader(
        Activations(sae, x), batch_size=3, num_workers=1, multiprocessing_context="spawn"
    )
    torch.testing.assert_close(torch.cat(list(loader)), sae.encode(x).detach())


def ddp_worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/port", rank=rank, world_size=world)
    for options in BY_ROW:
        sae, alone, x = make(options), make(options), data(8 * world, 16)
        mine = x[rank * 8 : (rank + 1) * 8]
        ddp = DistributedDataParallel(sae)
        (ddp(mine) - mine).square().sum(-1).mean().backward()
        (alone(x) - x).square().sum(-1).mean().backward()
        for (name, p), q in zip(sae.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    Path(folder, f"equal-{rank}").touch()
    torch.distributed.barrier()
    # gloo has threads that may abort the process while the interpreter is taken down around them.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_distributed_data_parallel(tmp_path) -> None:
    """A gradient that differs fails at once; a process that gloo aborts (SIGABRT, seen once) is tried again."""
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        try:
            start_processes(ddp_worker, args=(2, str(folder)), nprocs=2, start_method="spawn")
        except ProcessExitedException as error:
            if error.signal_name != "SIGABRT":
                raise
        if {path.name for path in folder.glob("equal-*")} == {"equal-0", "equal-1"}:
            return
    pytest.fail("gloo aborted three times")


def run_python(code: str) -> str:
    here = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_needs_torch_numpy_and_safetensors_only() -> None:
    out = run_python(
        "import sys, torch, numpy, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "import fastsae\n"
        "sae = fastsae.SAE(d_in=4, d_sae=8, k=2)\n"
        "sae.loss(torch.randn(3, 4)).loss.backward()\n"
        "import sysconfig\n"
        "site = sysconfig.get_paths()['purelib']\n"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before\n"
        "       if site in (getattr(sys.modules[n], '__file__', None) or '')}\n"
        # What torch brings, or imports where it finds it.
        "print(sorted(new - {'fastsae', 'torch', 'numpy', 'safetensors', 'sympy', 'mpmath', 'triton'}))\n"
    )
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import fastsae",
        "import fastsae.train, fastsae.evaluate, fastsae.harvest, fastsae",
        "from fastsae.train import TrainConfig\nimport fastsae",
    ],
)
def test_the_verbs_are_called_on_the_package_whatever_was_imported_first(imports) -> None:
    code = imports + (
        "\nfor verb in ('train', 'harvest', 'evaluate'):\n"
        "    assert callable(getattr(fastsae, verb)), verb\n"
        "from fastsae.train import TrainConfig\n"
        "import fastsae.train as module\n"
        "assert module.TrainConfig is TrainConfig is fastsae.TrainConfig\n"
        "try:\n"
        "    fastsae.train(None, preset='topk', config=TrainConfig())\n"
        "except fastsae.FastSAEError as error:\n"
        "    print(error)\n"
    )
    assert "got both" in run_python(code)
    assert "train" in dir(fastsae) and "SAE" in dir(fastsae)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        fastsae.absent  # noqa: B018


def test_the_readme_example_runs_as_printed(tmp_path, monkeypatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 13 and "fastsae.SAE(" in example
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["sae"].cfg.k == 32 and names["code"].shape == (4096, 4096)
    assert names["out"].loss.isfinite() and sorted(p.name for p in (tmp_path / "my-sae").iterdir())
