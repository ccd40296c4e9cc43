"""The kernel of the weights' gradients: pieces, both ways to the dots, rows alone, and the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastsae import gradients
from fastsae.gradients import Pull, WeightGradients
from fastsae.kernels import weight_grad as kernel
from tests.encode_case import DEVICE

SIZES = [(1, 1, 1, 1), (17, 5, 40, 19), (33, 3, 4, 16), (9, 4, 30, 63), (6, 7, 64, 300)]  # N, K, F, D
PENALTIES = ["none", "l1", "weighted", "jumprelu"]


class Case:
    """A random code, of which rows have 0 to K slots in use, with NaN in the others, and what pulls at it."""

    def __init__(
        self, N: int, K: int, F: int, D: int, penalty: str = "none", dtype: torch.dtype = torch.float32
    ) -> None:
        gen = torch.Generator().manual_seed(N + F)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=gen).to(DEVICE, dtype)

        rows = [torch.randperm(max(F, K), generator=gen)[:K] % F for _ in range(N)]
        self.indices = torch.stack(rows).int().to(DEVICE)
        self.counts = torch.randint(0, K + 1, (N,), generator=gen).int().to(DEVICE)
        self.values = randn(N, K).abs().float() + 0.01
        self.threshold = randn(F).abs() * 0.3 if penalty == "jumprelu" else None
        if penalty == "jumprelu":  # entries of the band below the threshold
            self.values[:, ::3] = 0
        self.x, g, self.w_dec, self.weight, self.bias = randn(N, D), randn(N, D), randn(F, D), randn(F, D), randn(F)
        self.norms = self.w_dec.norm(dim=1) if penalty == "weighted" else None
        l1 = randn(N).float() if penalty in ("l1", "weighted") else None
        l0 = randn(N).float() if penalty == "jumprelu" else None
        self.pull = Pull(g, l1, l0, randn(N, K).float() if penalty != "none" else None)
        self.unused = torch.arange(K, device=DEVICE) >= self.counts[:, None]
        self.values = self.values.masked_fill(self.unused, float("nan"))

    def truth(self) -> tuple[WeightGradients, Tensor | None]:
        """In float64, by torch operations that tests/test_autoencode.py holds against autograd."""
        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double()

        x, w, b, v, d = (t.double() for t in (self.x, self.weight, self.bias, self.w_dec, self.values))
        pull = Pull(*(wide(t) for t in self.pull))  # type: ignore[arg-type]
        return gradients.of_code(x, d.nan_to_num(), self.indices, self.counts, w, b, v, wide(self.threshold), 0.2,
                                 wide(self.norms), pull, True, False)  # fmt: skip

    def run(self, **how: Any) -> kernel.ByFeature:
        return kernel.weight_grad(self.x, self.values, self.indices, self.counts, self.bias, self.w_dec, self.threshold,
                                  0.2, self.norms, self.pull, **how)  # fmt: skip


def assert_close(made: WeightGradients, want: WeightGradients, tolerance: float) -> None:
    for name, got, right in zip(WeightGradients._fields[:4], made, want, strict=False):
        assert (got is None) == (right is None)
        if got is not None and right is not None:
            error = (got.double() - right).abs().max() / right.abs().max().clamp_min(1e-30)
            assert error <= tolerance, f"{name}: {error:.3g}"


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(size, penalty):
    case = Case(*size, penalty=penalty)
    want, d_rows = case.truth()
    found = case.run()
    assert_close(found.made, want, 1e-5)
    made, dx = kernel.of_code(case.x, case.values, case.indices, case.counts, case.weight, case.bias, case.w_dec,
                              case.threshold, 0.2, case.norms, case.pull, True)  # fmt: skip
    assert d_rows is not None and dx is not None
    torch.testing.assert_close(dx.double(), d_rows, rtol=1e-4, atol=1e-4)
    same = [torch.equal(a, b) for a, b in zip(made, found.made, strict=True) if a is not None and b is not None]
    assert len(same) >= 3 and all(same), "same bits"


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("with_dots", [False, True])
def test_long_features_are_shared_and_rows_cut(penalty, with_dots, monkeypatch):
    """Pieces of 4 tokens of features that fire 25 times; rows cut into slices of 16 where the dots come first."""
    monkeypatch.setattr(kernel, "SPLIT", 4)
    monkeypatch.setattr(kernel, "SLICE", 16)
    case = Case(33, 3, 4, 40, penalty=penalty)
    assert int(torch.bincount(case.indices[~case.unused].long()).max()) > 8
    assert_close(case.run(with_dots=with_dots).made, case.truth()[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Sums are fp32: what is left is the rounding of the result."""
    case = Case(17, 5, 40, 19, penalty="weighted", dtype=dtype)
    made = case.run().made
    assert made.w_dec.dtype == made.bias.dtype == dtype
    # The interpreter cuts to bfloat16 where a GPU rounds.
    assert_close(made, case.truth()[0], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_rows_alone_are_those_of_the_dense_gradients(penalty):
    case = Case(9, 4, 60, 16, penalty=penalty)
    operands = (case.x, case.values.nan_to_num(), case.indices, case.counts, case.weight, case.bias, case.w_dec,
                case.threshold, 0.2, case.norms, case.pull, False)  # fmt: skip
    for triton in (True, False):
        (dense, _), (rows, _) = (gradients.of_code(*operands, triton, compact) for compact in (False, True))
        assert dense.features is None and rows.features is not None
        fired = rows.features < 60
        assert torch.equal(rows.features[fired], case.indices[~case.unused].long().unique())
        assert len(rows.features) == len(rows.w_dec) == (36 if triton else int(fired.sum()))
        for a, b in zip(rows[:4], dense[:4], strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert torch.equal(a[fired], b[rows.features[fired]])
                rest = torch.ones(60, dtype=torch.bool, device=DEVICE).index_fill_(0, rows.features[fired], False)
                assert not b[rest].any(), "features that did not fire have zeros"


@pytest.mark.parametrize("rows", [False, True])
def test_pieces_cover_every_entry_once(rows, monkeypatch):
    monkeypatch.setattr(kernel, "SPLIT", 4)
    case = Case(33, 3, 7, 1)
    order, pieces, split, features = kernel.by_feature(case.indices, case.counts, 7, rows)
    flat, used = case.indices.reshape(-1), (~case.unused).reshape(-1)
    entries: dict[int, list[int]] = {}
    lengths = []
    slots = []
    for f, row, start, stop, slot in pieces.tolist():
        if f < 7:
            assert 0 <= stop - start <= 4 and features[row] == f
            lengths.append(stop - start)
            entries.setdefault(f, []).extend(order[start:stop].tolist())
            slots += [slot] * (slot >= 0)
    for f in range(7):
        assert sorted(entries.get(f, [])) == ((flat == f) & used).nonzero().squeeze(1).tolist()
    assert lengths == sorted(lengths, reverse=True), "longest first"
    shared = [range(first, first + number) for _, _, first, number in split.tolist() if number > 1]
    assert sorted(slots) == sorted(slot for piece in shared for slot in piece) == list(range(len(slots))) and slots


def test_no_tokens():
    case = Case(5, 2, 6, 8)
    none = case.x[:0]
    code = case.values[:0], case.indices[:0], case.counts[:0]
    made = kernel.weight_grad(none, *code, case.bias, case.w_dec, None, 0.0, None, Pull(none)).made
    assert made.w_dec.shape == (6, 8) and not made.w_dec.any() and not made.weight.any() and not made.bias.any()
