"""Puts the right torch into the virtual environment whose Python runs this: `python .ci/install_torch.py [pip args]`.

With an NVIDIA GPU that is the CUDA build, several GB with its libraries; everywhere else a CPU build, under 1 GB.
On Linux a plain `pip install torch` gives the CUDA build whatever the machine, and that build does not even import
without its libraries. So pip is asked first what it would install; if that is a CUDA build, uv, which knows where
torch's CPU builds are kept, installs one. Arguments, if given, go to pip as they are, and nothing is decided here.
"""

import json
import shutil
import subprocess
import sys

CPU_TORCH = "torch==2.13.0"  # the version that the tests are run with; the package itself asks for no version

NO_CPU_BUILD = f"""
No CPU build of {CPU_TORCH} could be installed for this Python ({sys.version.split()[0]}); the reason is above.
Say yourself where torch comes from, with any arguments of pip install, and run make again:
    make TORCH_INSTALL='path/to/torch-cpu.whl' …
    make TORCH_INSTALL='--index-url ADDRESS torch' …   the address is on pytorch's "Get started" page
    make TORCH_INSTALL='torch' …   what pip prefers: on Linux several GB with CUDA; it runs without a GPU too
"""


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


def is_cuda_build(report: dict) -> bool:
    """Does pip's installation report (--report, format 1) promise a torch that needs CUDA's libraries?"""
    torch = next(item["metadata"] for item in report["install"] if item["metadata"]["name"] == "torch")
    return any(need.startswith(("nvidia-", "cuda-")) for need in torch.get("requires_dist", []))


def pip_install(*args: str) -> int:
    return subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *args])


def pip_offers_cpu_build() -> bool:
    """Asks pip what it would take, without downloading it (pip >= 23.3 reads the wheel's metadata alone)."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed",
         "--only-binary=:all:", "--report", "-", CPU_TORCH],
        stdout=subprocess.PIPE, text=True,
    )
    return asked.returncode == 0 and not is_cuda_build(json.loads(asked.stdout))


def install_cpu_build_with_uv() -> int:
    if pip_install("uv"):
        return 1
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    return subprocess.call([*uv, "--torch-backend=cpu", CPU_TORCH])


def main(args: list[str]) -> int:
    if args:
        print(f"torch: pip install {' '.join(args)}, as asked", flush=True)
        return pip_install(*args)
    if sys.platform != "linux":
        print("torch: the build for this system", flush=True)
        return pip_install("torch")
    if has_nvidia_gpu():
        print("torch: nvidia-smi shows a GPU, so the CUDA build, several GB", flush=True)
        return pip_install("torch")
    if pip_offers_cpu_build():
        print(f"torch: no NVIDIA GPU, so {CPU_TORCH}, of which pip has a CPU build", flush=True)
        failed = pip_install(CPU_TORCH)
    else:
        print(f"torch: no NVIDIA GPU, and pip has no CPU build of {CPU_TORCH}: uv gets it (about 200 MB)", flush=True)
        failed = install_cpu_build_with_uv()
    if failed:
        print(NO_CPU_BUILD, file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
