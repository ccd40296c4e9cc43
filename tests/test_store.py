"""The activation store: what goes in comes out, shuffled; what is not whole is refused."""

import errno
import json
import pickle
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fastsae import store_writer
from fastsae.errors import FastSAEError
from fastsae.store import ActivationStore, MemoryStore
from fastsae.store_writer import StoreWriter, check_space

D, N, SHARD = 6, 1000, 128


def rows(n: int = N, start: int = 0) -> tuple[torch.Tensor, ...]:
    """Row number r: token id r, document r // 50, position r % 50, and an activation that depends on r alone."""
    number = torch.arange(start, start + n)
    x = torch.sin(number[:, None] * torch.arange(1, D + 1) * 0.1) + 0.5
    return x.float(), number, number // 50, number % 50


def write(path: Path, n: int = N, dtype: str = "float32", seed: int = 0, **options) -> ActivationStore:
    with StoreWriter(path, D, dtype, {"hook": "h"}, seed, SHARD, **options) as writer:  # type: ignore[arg-type]
        for start in range(writer.rows_written, n, 37):
            writer.add(*rows(min(37, n - start), start))
    return ActivationStore(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_row_comes_back_once_with_its_token(tmp_path, dtype):
    store = write(tmp_path / "s", dtype=dtype)
    assert (store.count, store.width, store.dtype) == (N, D, getattr(torch, dtype))
    batches = list(store.batches(64, epochs=1, drop_last=False))
    x, ids, documents, positions = (torch.cat(column) for column in zip(*batches, strict=True))
    order = ids.argsort()
    want, numbers, want_documents, want_positions = rows()
    assert x.dtype == torch.float32
    assert torch.equal(ids[order], numbers)
    assert torch.equal(x[order], want.to(store.dtype).float())
    assert torch.equal(documents[order], want_documents)
    assert torch.equal(positions[order], want_positions)
    assert torch.equal(store.read(0, N).token_ids.sort().values, numbers)


def test_statistics_are_those_of_the_rows(tmp_path):
    store = write(tmp_path / "s")
    x = rows()[0].double()
    torch.testing.assert_close(store.mean, x.mean(0).float())
    torch.testing.assert_close(store.variance, x.var(0, correction=0).float())
    assert store.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-6)
    assert store.meta == {"hook": "h"}
    memory = MemoryStore(rows()[0])
    torch.testing.assert_close(memory.variance, store.variance)
    assert memory.mean_norm == pytest.approx(store.mean_norm)


def test_a_batch_mixes_the_whole_store(tmp_path):
    store = write(tmp_path / "s", n=4096)
    batch = next(store.batches(512))
    shards = torch.bincount(batch.token_ids // SHARD, minlength=32)
    assert (shards > 0).sum() >= 12  # 16 blocks of 32 rows out of 32 shards
    same_context = batch.documents[1:] == batch.documents[:-1]  # in written order: 98 % of neighbours
    assert same_context.float().mean() < 0.6


def test_epochs_differ_and_seeds_differ(tmp_path):
    store = write(tmp_path / "s")
    a, b = (torch.cat([batch.token_ids for batch in store.batches(50, seed=s, epochs=1)]) for s in (0, 1))
    twice = torch.cat([batch.token_ids for batch in store.batches(50, seed=0, epochs=2)])
    assert torch.equal(twice[:N], a)
    assert not torch.equal(twice[N:], a)
    assert not torch.equal(a, b)
    assert torch.equal(twice[N:].sort().values, torch.arange(N))


@pytest.mark.parametrize("start", [0, 1, 7, 8, 20])
def test_a_resumed_reader_goes_on_exactly(tmp_path, start):
    for store in (write(tmp_path / "s"), MemoryStore(rows()[0])):
        want = [batch.x for batch in store.batches(128, epochs=3)]
        got = [batch.x for batch in store.batches(128, epochs=3, start_step=start)]
        assert len(want) == 3 * (N // 128) and len(got) == len(want) - start
        assert all(torch.equal(a, b) for a, b in zip(got, want[start:], strict=True))


def test_a_batch_larger_than_the_store_is_refused(tmp_path):
    with pytest.raises(FastSAEError, match="needs at least as many"):
        next(write(tmp_path / "s").batches(N + 1))


def test_sample_is_distinct_rows(tmp_path):
    assert write(tmp_path / "s").sample(10**6).unique(dim=0).shape == (N, D)


def test_a_store_travels_to_another_process(tmp_path):
    store = write(tmp_path / "s")
    first = next(store.batches(16)).x
    assert torch.equal(next(pickle.loads(pickle.dumps(store)).batches(16)).x, first)


@pytest.mark.parametrize("stop", [0, 100, 256, 300, 999])
def test_interrupted_and_resumed_gives_equal_bytes(tmp_path, stop):
    whole = write(tmp_path / "whole", seed=3)
    writer = StoreWriter(tmp_path / "cut", D, "float32", {"hook": "h"}, 3, SHARD)
    for start in range(0, stop, 37):
        writer.add(*rows(min(37, N - start), start))
    del writer
    with pytest.raises(FastSAEError, match="unfinished.*resume"):
        ActivationStore(tmp_path / "cut")
    resumed = write(tmp_path / "cut", seed=3, resume=True)
    names = sorted(file.name for file in whole.path.iterdir())
    assert sorted(file.name for file in resumed.path.iterdir()) == names
    for name in names:
        assert (whole.path / name).read_bytes() == (resumed.path / name).read_bytes(), name


def test_a_run_that_failed_at_its_index_resumes(tmp_path):
    store = write(tmp_path / "s")
    index = (tmp_path / "s/index.json").read_bytes()
    (tmp_path / "s/index.json").unlink()
    write(tmp_path / "s", resume=True)
    assert (store.path / "index.json").read_bytes() == index


def test_used_folders_are_refused(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(FastSAEError, match="finished store"):
        write(tmp_path / "s", resume=True)
    with pytest.raises(FastSAEError, match="another run.*seed"):
        write(tmp_path / "s", seed=1, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(FastSAEError, match="choose another"):
        write(tmp_path / "other")


def test_what_is_no_store_or_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(FastSAEError, match="no activation store"):
        ActivationStore(tmp_path / "nowhere")
    with pytest.raises(FastSAEError, match="no activation store"):
        ActivationStore(tmp_path)
    store = write(tmp_path / "s")
    shard = store.path / "shard-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(FastSAEError, match="damaged.*harvest"):
        ActivationStore(tmp_path / "s")
    shard.write_bytes(data)
    index = json.loads((store.path / "index.json").read_text())
    (store.path / "index.json").write_text(json.dumps(index | {"version": 99}))
    with pytest.raises(FastSAEError, match="version 99.*update"):
        ActivationStore(tmp_path / "s")


def test_values_that_cannot_be_stored_are_refused(tmp_path):
    x, ids, documents, positions = rows(10)
    x[7, 2] = 70_000
    StoreWriter(tmp_path / "b", D, "bfloat16").add(x, ids, documents, positions)
    with pytest.raises(FastSAEError, match=r"7e\+04 \(document 0, token 7\) does not fit float16: store bfloat16"):
        StoreWriter(tmp_path / "h", D, "float16").add(x, ids, documents, positions)
    x[7, 2] = float("nan")
    with pytest.raises(FastSAEError, match="NaN or infinity at document 0, token 7"):
        StoreWriter(tmp_path / "f", D).add(x, ids, documents, positions)
    with pytest.raises(FastSAEError, match="NaN"):
        MemoryStore(x)
    with pytest.raises(FastSAEError, match=r"shape \[N, 6\], got \[10, 5\]"):
        StoreWriter(tmp_path / "w", D).add(x[:, :5], ids, documents, positions)
    with pytest.raises(FastSAEError, match="nothing to store"):
        StoreWriter(tmp_path / "e", D).close()


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    real, calls = store_writer.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(store_writer, "save_file", full)
    with pytest.raises(FastSAEError, match="No space left on device; free some space and resume"):
        write(tmp_path / "s")
    assert {file.suffix for file in (tmp_path / "s").iterdir()} == {".json", ".safetensors"}
    assert len(list((tmp_path / "s").glob("shard-*"))) == 2  # those that were whole
    assert write(tmp_path / "s", resume=True).count == N


def test_too_little_space_is_known_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    check_space(tmp_path / "new/store", 1000, 100, "float32")
    with pytest.raises(FastSAEError, match="take 0.01 GB as float32.*0.00 GB free"):
        check_space(tmp_path / "new/store", 20_000, 100, "float32")
