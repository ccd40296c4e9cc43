"""Saves of tensors: whole or not at all, in Hugging Face's files, without a second copy in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastsae import SAE, checkpoint, shards, tensorfile
from fastsae.errors import CheckpointError
from fastsae.tensorfile import DTYPES

ROOT = Path(__file__).parents[1]


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits at all, NaNs with payloads among them; bools are 0 or 1."""
    generator = torch.Generator().manual_seed(len(shape))
    size = torch.empty(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape)


def everything() -> dict[str, torch.Tensor]:
    shapes = [(), (5,), (3, 0), (3, 7)]
    tensors = {f"{name}.{len(shape)}": random(dtype, *shape) for name, dtype in DTYPES.items() for shape in shapes}
    base = random(torch.float32, 40, 30)
    return tensors | {"transposed": base.T, "strided": base[::3, 1::2], "expanded": base[:1].expand(9, 30)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a, b) -> None:
    assert set(a) == set(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert bits(a[name]) == bits(b[name]), name


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("piece", [16, 64, tensorfile.PIECE_BYTES])
@pytest.mark.parametrize("shard_bytes", [300, shards.SHARD_BYTES])
def test_what_is_read_is_what_was_written(tmp_path, monkeypatch, piece, shard_bytes) -> None:
    monkeypatch.setattr(tensorfile, "PIECE_BYTES", piece)
    tensors, about = everything(), {"step": 3, "loss": float("nan"), "naïve": [1, None]}
    shards.write(tmp_path / "a" / "b", tensors, about, shard_bytes=shard_bytes)
    assert_same(shards.read(tmp_path / "a" / "b"), tensors)
    assert str(shards.about(tmp_path / "a" / "b")) == str(about)
    into = {name: torch.zeros_like(t) for name, t in tensors.items()}  # keeps the strides of the transposed one
    into["strided"] = torch.zeros(90, 90)[:14, 2:32:2]
    assert not into["strided"].is_contiguous() and not into["transposed"].is_contiguous()
    assert shards.read(tmp_path / "a" / "b", into)["strided"] is into["strided"]
    assert_same(into, tensors)


def test_the_bytes_are_those_of_safetensors(tmp_path) -> None:
    tensors, about = everything(), {"step": 3}
    shards.write(tmp_path, tensors, about)
    assert files(tmp_path) == ["about.json", "state.safetensors"]
    assert_same(load_file(tmp_path / "state.safetensors"), tensors)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about.json"]) == about
    few = {"b": random(torch.float32, 3, 3), "a": random(torch.float32, 2), "n": random(torch.int64, 4)}
    shards.write(tmp_path / "few", few, about)
    save_file(few, tmp_path / "theirs", metadata={"about.json": json.dumps(about, indent=1)})
    assert (tmp_path / "few" / "state.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_files_of_safetensors_are_read(tmp_path) -> None:
    tensors = {name: t.contiguous() for name, t in everything().items()}
    save_file(tensors, tmp_path / "state.safetensors")
    assert_same(shards.read(tmp_path), tensors)
    assert not shards.exists(tmp_path)
    with pytest.raises(CheckpointError, match="has no about.json"):
        shards.about(tmp_path)


def test_parameters_and_views_that_share_memory(tmp_path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    shards.write(tmp_path, {"w": weight, "again": weight.T}, {})
    into = torch.nn.Parameter(torch.zeros(4, 3))
    shards.read(tmp_path, {"w": into, "again": torch.zeros(3, 4)})
    assert torch.equal(into, weight)
    wave = torch.randn(3, dtype=torch.complex64)
    shards.write(tmp_path, {"conjugate": wave.conj()}, {})
    assert torch.equal(shards.read(tmp_path)["conjugate"], wave.conj())
    shards.write(tmp_path, {}, {"step": 0})
    assert shards.read(tmp_path) == {} and shards.about(tmp_path) == {"step": 0}
    assert str(shards.entries(tmp_path)) == "{}"


def test_shards_are_hugging_faces(tmp_path) -> None:
    sizes = {"a": 10, "b": 10, "large": 100, "c": 10, "empty": 0, "d": 15}  # of four bytes
    tensors = {name: random(torch.float32, n) for name, n in sizes.items()}
    shards.write(tmp_path, tensors, {"step": 1}, shard_bytes=100)
    assert files(tmp_path) == ["about.json", *(f"state-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
                               "state.safetensors.index.json"]  # fmt: skip
    index = json.loads((tmp_path / "state.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 145}
    parts = [load_file(tmp_path / f"state-0000{i}-of-00003.safetensors") for i in (1, 2, 3)]
    assert [sorted(part) for part in parts] == [["a", "b"], ["large"], ["c", "d", "empty"]]
    assert index["weight_map"] == {n: f"state-0000{i + 1}-of-00003.safetensors" for i, p in enumerate(parts) for n in p}
    assert_same(parts[0] | parts[1] | parts[2], tensors)
    assert {name: entry.shape[0] for name, entry in shards.entries(tmp_path).items()} == sizes
    shards.write(tmp_path, {"a": tensors["a"]}, {"step": 2})
    assert files(tmp_path) == ["about.json", "state.safetensors"]


@pytest.mark.parametrize("shard_bytes", [4000, shards.SHARD_BYTES])
def test_a_dictionary_in_shards(tmp_path, shard_bytes) -> None:
    sae = SAE(d_in=16, d_sae=64, activation="batchtopk", k=4)
    checkpoint.save(sae, tmp_path / "a", shard_bytes=shard_bytes)
    assert len(list((tmp_path / "a").glob("sae*.safetensors"))) == (4 if shard_bytes == 4000 else 1)
    again = SAE.from_pretrained(tmp_path / "a")
    assert again.cfg == sae.cfg and all(p.requires_grad for p in again.parameters())
    assert_same(again.state_dict(), sae.state_dict())
    checkpoint.save(again, tmp_path / "b", shard_bytes=shard_bytes)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_config_with_files_of_another_dictionary(tmp_path) -> None:
    SAE(d_in=16, d_sae=64).save_pretrained(tmp_path / "a")
    tensors = {name: t[:7] if t.ndim else t for name, t in SAE(d_in=16, d_sae=64).state_dict().items()}
    save_file(tensors, tmp_path / "a" / "sae.safetensors")
    with pytest.raises(CheckpointError, match=r"W_dec should have shape \(64, 16\), found \(7, 16\)"):
        SAE.from_pretrained(tmp_path / "a")


# --- whole or not at all --------------------------------------------------------------------------------------------

CRASHES = """
import os, sys, torch
from pathlib import Path
from fastsae import shards

torch.set_num_threads(1)
folder = Path(sys.argv[1])
save = lambda step, limit: shards.write(
    folder, {n: torch.full((9,), 1.0 * step) for n in "abcdef"}, {"step": step}, shard_bytes=limit)

def crashes(n, work):
    # Whether a process that dies right before its n-th dealing with the file system dies in `work`.
    child = os.fork()
    if child == 0:
        left = n
        def hook(event, args):
            nonlocal left
            if event == "open" or event.startswith(("os.", "shutil.")):
                left -= 1
                if left == 0:
                    os._exit(9)
        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

def whole():
    assert shards.exists(folder)
    step = shards.about(folder)["step"]
    tensors = shards.read(folder)
    assert set(tensors) == set("abcdef") and all((t == step).all() for t in tensors.values()), (step, tensors)
    names = {p.name for p in folder.iterdir()} - {".state.part"}
    assert names == (old_files if step == 1 else new_files), names
    return step

def files_of(step, limit):
    save(step, limit)
    return {p.name for p in folder.iterdir()}

for old, new in [(80, 10**9), (10**9, 80), (40, 80), (80, 80), (10**9, 10**9)]:
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("not ours")
    new_files, old_files = files_of(2, new), files_of(1, old)
    n, seen = 1, []
    while crashes(n, lambda: save(2, new)):
        if n % 2:  # dies once more, while it is recovered
            crashes(1 + n % 11, lambda: shards.about(folder))
        seen.append(whole())
        save(1, old)
        assert {p.name for p in folder.iterdir()} == old_files, "leftovers"
        n += 1
    assert seen == sorted(seen) and set(seen) == {1, 2} and len(seen) > 12, seen
    assert (folder / "notes.txt").read_text() == "not ours"
print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_crash_at_any_moment_leaves_the_old_save_or_the_new(tmp_path) -> None:
    assert run(CRASHES, tmp_path / "state").strip() == "whole"


def run(script: str, *args: object) -> str:
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Full:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room: list[int]) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, data) -> int:
        self.room[0] -= len(data)
        if self.room[0] < 0:
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 300, 700, 1000, 1300])
def test_a_full_disk_leaves_the_old_save(tmp_path, monkeypatch, room) -> None:
    shards.write(tmp_path / "old", {"a": torch.ones(50)}, {"step": 1})
    left = [room]
    monkeypatch.setattr(tensorfile, "open", lambda *args: Full(open(*args), left), raising=False)
    monkeypatch.setattr(shards, "open", lambda *args, **kwargs: Full(open(*args, **kwargs), left), raising=False)
    for folder in ("old", "new"):
        left[0] = room
        with pytest.raises(CheckpointError, match=f"could not write to .*{folder}: No space left on device; free some"):
            shards.write(tmp_path / folder, {n: torch.ones(50) for n in "abcd"}, {"step": 2}, shard_bytes=400)
    monkeypatch.undo()
    assert files(tmp_path) == ["old"] and files(tmp_path / "old") == ["about.json", "state.safetensors"]
    assert shards.about(tmp_path / "old") == {"step": 1} and shards.read(tmp_path / "old")["a"].sum() == 50


def test_a_limit_of_the_system_is_an_error_of_one_line(tmp_path) -> None:
    """The kernel itself refuses, in the middle of a tensor; Python ignores SIGXFSZ."""
    resource = pytest.importorskip("resource")
    shards.write(tmp_path, {"a": torch.ones(50)}, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not write to .*: File too large"):
            shards.write(tmp_path, {"a": torch.ones(500_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == ["about.json", "state.safetensors"] and shards.about(tmp_path) == {"step": 1}


def test_an_interrupt_leaves_the_old_save(tmp_path, monkeypatch) -> None:
    shards.write(tmp_path, {"a": torch.ones(5)}, {"step": 1})

    def interrupt(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensorfile, "_write_data", interrupt)
        shards.write(tmp_path, {"a": torch.zeros(5)}, {"step": 2})
    assert files(tmp_path) == ["about.json", "state.safetensors"] and shards.about(tmp_path) == {"step": 1}


def test_what_cannot_be_saved(tmp_path) -> None:
    for tensor in (torch.zeros(2, dtype=torch.complex128), torch.zeros(2, 2).to_sparse()):
        with pytest.raises(CheckpointError, match="odd is torch.* which a safetensors file cannot hold"):
            shards.write(tmp_path / "new", {"odd": tensor}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write to .*file: "):
        shards.write(tmp_path / "file", {}, {})
    assert files(tmp_path) == ["file"]


# --- errors of reading ----------------------------------------------------------------------------------------------


def test_files_that_are_missing_or_damaged(tmp_path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    shards.write(good, {n: torch.ones(50) for n in "abc"}, {"step": 1}, shard_bytes=200)
    second, index = "state-00002-of-00003.safetensors", "state.safetensors.index.json"
    whole = (good / second).read_bytes()

    def refused(match: str, file: str, content: bytes | None) -> None:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        if content is None:
            (bad / file).unlink()
        else:
            (bad / file).write_bytes(content)
        into = {n: torch.zeros(50) for n in "abc"}
        with pytest.raises(CheckpointError, match=match) as error:
            shards.read(bad, into)
        assert "\n" not in str(error.value) and not any(t.any() for t in into.values())

    refused(f"has no {second}, which {index} names", second, None)
    refused("has no state.safetensors; the save was cut short", index, None)
    for cut in (0, 7, 50, len(whole) - 1):
        refused(f"{second} cannot be read", second, whole[:cut])
    refused(f"header says {len(whole)} bytes, the file has {len(whole) + 1}", second, whole + b"x")
    refused("cut short or no safetensors file", second, b"PK\x03\x04 a zip of some kind, not a file of tensors")
    refused("its header is damaged", second, whole[:8] + b"[" + whole[9:])
    refused("its header is damaged or of a type unknown here: 'F99'", second, whole.replace(b'"F32"', b'"F99"'))
    refused("shape and place of b disagree", second, whole.replace(b"[50]", b"[51]"))
    refused("shape and place of b disagree", second, whole.replace(b"[0,200]", b"[1,201]"))
    refused("disagree about b", second, (good / second.replace("2-", "1-")).read_bytes().replace(b'"a"', b'"z"'))
    refused(f"{index} is not JSON", index, b"{")
    refused(f"{index} holds list, expected an object", index, b"[]")
    refused("has no weight_map", index, b'{"weight_map": {"a": "../elsewhere.safetensors"}}')
    refused("about.json come from different saves", "about.json", b'{"step": 2}')
    refused("has no about.json", "about.json", None)
    with pytest.raises(CheckpointError, match="has no state.safetensors"):
        shards.read(tmp_path / "absent")


def test_tensors_that_do_not_fit(tmp_path) -> None:
    shards.write(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(4)}, {})

    def refused(match: str, **into: torch.Tensor) -> None:
        with pytest.raises(CheckpointError, match=match):
            shards.read(tmp_path, into)
        assert not any(t.any() for t in into.values())

    b = torch.zeros(4)
    refused(r"a should be torch.float32 \(3, 2\), found torch.float32 \(2, 3\)", a=torch.zeros(3, 2), b=b)
    refused(r"a should be torch.float16 \(2, 3\), found torch.float32 \(2, 3\)", a=torch.zeros(2, 3).half(), b=b)
    refused(r"a should be absent, found torch.float32 \(2, 3\)", b=b)
    refused(r"c should be torch.float32 \(4,\), found no such tensor", a=torch.zeros(2, 3), b=b, c=b)


# --- memory ---------------------------------------------------------------------------------------------------------

MEMORY = """
import json, sys, torch
from fastsae import SAE, SAEConfig, checkpoint, shards

def memory(line):
    return next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(line)) * 1024 / 1e6

def grown(work):
    # MB at the peak of `work` beyond what there was before it
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = memory("VmRSS:")
    kept = work()
    return memory("VmHWM:") - before

folder, D, F = sys.argv[1], 1024, 50_000
w = torch.ones(F, D)  # 205 MB
tensors = {"w": w, "strided": torch.ones(D, F).T}  # the other in rows as a transposed product leaves them
shards.write(folder + "/warm", {"w": torch.ones(3), "s": torch.ones(3, 3).T}, {})
shards.read(folder + "/warm")
into = {"w": torch.ones(F, D), "strided": torch.ones(D, F).T}
found = {"write": grown(lambda: shards.write(folder + "/a", tensors, {}))}
found["write shards"] = grown(lambda: shards.write(folder + "/a", tensors, {}, shard_bytes=10**8))
found["read into"] = grown(lambda: shards.read(folder + "/a", into))
assert all(torch.equal(into[n], tensors[n]) for n in into)
del into, tensors
found["read"] = grown(lambda: shards.read(folder + "/a")) - 2 * w.nbytes / 1e6
sae = SAE(d_in=D, d_sae=F)
found["save_pretrained"] = grown(lambda: sae.save_pretrained(folder + "/sae"))
found["from_pretrained"] = grown(lambda: SAE.from_pretrained(folder + "/sae")) - 2 * w.nbytes / 1e6
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="asks Linux for the peak of memory")
def test_no_second_copy_in_memory(tmp_path) -> None:
    found = json.loads(run(MEMORY, tmp_path))
    # tensorfile.PIECE_BYTES are 64 MB, for what is not contiguous.
    assert all(megabytes < 100 for megabytes in found.values()), found
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.gpu
def test_a_gpus_tensors_through_a_small_buffer(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tensorfile, "PIECE_BYTES", 10_000)
    tensors = {"w": torch.randn(300, 70, device="cuda"), "t": torch.randn(300, 70, device="cuda").T.bfloat16()}
    shards.write(tmp_path, tensors, {})
    for again in (shards.read(tmp_path, device="cuda"), shards.read(tmp_path, {n: t + 1 for n, t in tensors.items()})):
        assert all(again[n].is_cuda and torch.equal(again[n], t) for n, t in tensors.items())
    assert_same(shards.read(tmp_path), {n: t.cpu() for n, t in tensors.items()})
