"""Checkpoints of passes: whole or absent, and of one pass alone."""

import numpy as np
import pytest

import fastsae
from fastsae.analysis.checkpoint import Checkpoint, dictionary_digest
from fastsae.errors import FastSAEError


class Counted:
    def __init__(self, n: int = 0) -> None:
        self.seen = np.arange(n)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"seen": self.seen}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        self.seen = arrays["seen"]


def test_parts_come_back_with_the_batches_that_they_have_seen(tmp_path):
    about = {"documents": "abc", "rank": (0, 2)}
    assert Checkpoint(tmp_path / "pass.npz", about).resume({"a": Counted()}, resume=False) == 0
    Checkpoint(tmp_path / "pass.npz", about).save({"a": Counted(3), "b/c": Counted(5)}, 7)
    found = {"a": Counted(), "b/c": Counted()}
    checkpoint = Checkpoint(tmp_path / "pass.npz", about)
    assert checkpoint.resume(found, resume=True) == 7
    assert [len(part.seen) for part in found.values()] == [3, 5]
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_what_is_of_another_pass_or_damaged_is_refused(tmp_path):
    path = tmp_path / "pass.npz"
    Checkpoint(path, {"documents": "abc"}).save({"a": Counted(3)}, 7)
    with pytest.raises(FastSAEError, match="unfinished pass: resume it"):
        Checkpoint(path, {"documents": "abc"}).resume({"a": Counted()}, resume=False)
    with pytest.raises(FastSAEError, match="its documents is abc, and xyz here"):
        Checkpoint(path, {"documents": "xyz"}).resume({"a": Counted()}, resume=True)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FastSAEError, match="damaged: remove the file to start"):
        Checkpoint(path, {"documents": "abc"}).resume({"a": Counted()}, resume=True)
    path.write_bytes(b"")
    with pytest.raises(FastSAEError, match="damaged: remove the file to start"):
        Checkpoint(path, {"documents": "abc"}).resume({"a": Counted()}, resume=True)


def test_a_dictionary_is_known_by_its_weights():
    sae = fastsae.SAE(d_in=8, d_sae=16, k=2)
    before = dictionary_digest(sae)
    sae.tokens_since_fired += 5
    assert dictionary_digest(sae) == before == dictionary_digest(fastsae.SAE(d_in=8, d_sae=16, k=2))
    sae.b_dec.data[3] += 1
    assert dictionary_digest(sae) != before
