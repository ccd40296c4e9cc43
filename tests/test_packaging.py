"""What is installed, what importing needs, and what no file of the repository may say."""

import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALLER = runpy.run_path(str(ROOT / ".ci" / "install_torch.py"))


def python(program: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter that starts in the checkout, as a newcomer's does."""
    return subprocess.run([sys.executable, *flags, "-c", program], cwd=cwd, capture_output=True, text=True)


# --- kernels/ ------------------------------------------------------------------------------------------------------


def test_kernels_is_no_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"


def test_fastsae_kernels_is_a_link():
    link = ROOT / "fastsae" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"


def test_the_link_is_committed_as_a_link():
    listed = subprocess.run(["git", "ls-files", "-s", "fastsae/kernels"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    assert listed.stdout.startswith("120000 ")


def test_transformers_works_from_a_checkout():
    pytest.importorskip("transformers")
    done = python("from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)")
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_kernels_are_imported_under_one_name():
    """`kernels.decode` would be a second module object beside `fastsae.kernels.decode`."""
    pattern = re.compile(r"^\s*(?:from|import)\s+kernels\b", re.MULTILINE)
    sources = [path for folder in ("fastsae", "bench", "tests", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 10
    assert [str(path) for path in sources if pattern.search(path.read_text(encoding="utf-8"))] == []


# --- what is built -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of a copy of the checkout, built without network: with the setuptools that is installed."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77 to build without an environment of its own")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "fastsae", "kernels"):
        subprocess.run(["cp", "-RP", str(ROOT / name), str(copy)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
         "--wheel-dir", str(folder), str(copy)],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("fastsae-*.whl")))


def test_wheel_holds_every_module(wheel):
    names = set(wheel.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastsae").rglob("*.py") if "kernels" not in p.parts}
    kernels = {f"fastsae/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").glob("*.py")}
    assert "fastsae/kernels/decode.py" in kernels
    assert modules | kernels <= names


def test_wheel_holds_the_data_beside_the_modules(wheel):
    names = set(wheel.namelist())
    kept = {".py", ".pyc"}
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastsae").rglob("*") if p.is_file()
            and p.suffix not in kept and "kernels" not in p.parts}
    assert any(name.startswith("fastsae/data/") for name in data), "the built-in corpus"
    assert data <= names


def test_wheel_holds_nothing_else(wheel):
    """No top-level kernels, bench or tests, which would land among everybody's packages."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"fastsae", next(top for top in tops if top.endswith(".dist-info"))}


def test_wheel_imports_its_kernels(wheel, tmp_path):
    pytest.importorskip("triton")
    wheel.extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastsae; from fastsae.kernels import decode; "
        f"assert fastsae.__file__.startswith({str(tmp_path)!r}), fastsae.__file__; print(decode.__name__)"
    )
    done = python(program, cwd=tmp_path)
    assert done.stdout.strip() == "fastsae.kernels.decode", done.stderr


def test_wheel_has_the_command_and_the_licence(wheel):
    info = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "fastsae = fastsae.__main__:main" in wheel.read(info).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_version_is_one(wheel):
    import fastsae

    assert Path(str(wheel.filename)).name.startswith(f"fastsae-{fastsae.__version__}-")


# --- what importing needs ------------------------------------------------------------------------------------------

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Block())
"""
EXTRAS = ("triton", "transformers", "tokenizers", "huggingface_hub", "tyro", "rich", "matplotlib", "scipy", "pytest")
USE = """
import torch, fastsae
sae = fastsae.SAE(d_in=8, d_sae=32, activation="topk", k=4)
out = sae.loss(torch.randn(16, 8))
out.loss.backward()
fastsae.TrainConfig, fastsae.ActivationStore, fastsae.harvest, fastsae.train, fastsae.evaluate
print("works")
"""


@pytest.mark.parametrize("blocked", [("triton",), EXTRAS], ids=["without Triton", "with the core alone"])
def test_import_and_train_a_step(blocked):
    done = python(BLOCK.format(blocked=blocked) + USE)
    assert done.stdout.strip() == "works", done.stderr


def test_import_loads_nothing_heavy():
    program = f"import sys, fastsae; print([name for name in {EXTRAS!r} if name in sys.modules])"
    done = python(program)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_changes_no_global_state():
    program = (
        "import os, torch, random; before = (dict(os.environ), torch.get_rng_state().tolist(), random.getstate(), "
        "torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()); import fastsae; "
        "after = (dict(os.environ), torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), "
        "torch.get_default_dtype(), torch.get_float32_matmul_precision()); print(before == after)"
    )
    done = python(program)
    assert done.stdout.strip() == "True", done.stdout + done.stderr


# --- how torch is chosen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "cuda"),
    [
        (["filelock", "sympy>=1.13", 'pyyaml; extra == "pyyaml"'], False),
        (["filelock", 'cuda-toolkit[cublas]==13.0.3; platform_system == "Linux"'], True),
        (["nvidia-cudnn-cu12==9.1; platform_system == 'Linux'", "sympy"], True),
    ],
)
def test_a_cuda_build_is_known_by_its_needs(needs, cuda):
    report = {"install": [{"metadata": {"name": "torch", "version": "2.13.0", "requires_dist": needs}}]}
    assert INSTALLER["is_cuda_build"](report) is cuda


# --- what no file says ---------------------------------------------------------------------------------------------

# Written in pieces, so that this file passes its own test.
FORBIDDEN = [
    "/" + "work/", "/" + "opt/", "/" + "root/", "/" + "home/", "/" + "Users/", ".." + "/shared",
    "pypi" + ".org", "python" + "hosted", "registry" + ".npmjs", "deb." + "debian", "download." + "pytorch",
    "/tmp" + "/plan",
]
DATA = (".xz", ".gz", ".png", ".safetensors", ".bin")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_file_names_a_machine_or_a_registry():
    found, read = [], 0
    for path in tracked():
        if path.is_symlink() or path.suffix in DATA or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        read += 1
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert read > 20 and found == []


def test_modules_are_short():
    """Around 400 lines a file: past it a file has two subjects."""
    long = {str(p.relative_to(ROOT)): n for p in tracked() if p.suffix == ".py" and p.is_file() and not p.is_symlink()
            if (n := len(p.read_text(encoding="utf-8").splitlines())) > 450}
    assert long == {}


def test_no_file_is_large():
    """The repository is cloned by every newcomer: nothing over 8 MB, 32 MB in all."""
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked() if path.is_file()}
    assert {name: size for name, size in sizes.items() if size > 8 * 2**20} == {}
    assert sum(sizes.values()) < 32 * 2**20
