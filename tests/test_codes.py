"""SparseCode: what it stands for, and its conversions."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsae.codes import SparseCode
from fastsae.errors import DataError


def random_dense(N: int, F: int, density: float, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.rand(N, F, generator=gen) * (torch.rand(N, F, generator=gen) < density)


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(0, 9), F=st.integers(1, 40), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 99)
)
def test_dense_to_sparse_and_back(N: int, F: int, density: float, seed: int) -> None:
    dense = random_dense(N, F, density, seed)
    code = SparseCode.from_dense(dense)
    assert torch.equal(code.to_dense(), dense)
    assert code.counts is not None and torch.equal(code.counts, (dense != 0).sum(-1))
    assert code.k == (int(code.counts.max()) if N else 0)
    assert torch.equal(code.l0(), (dense != 0).sum(-1)) and torch.equal(code.fired(), (dense > 0).any(0))
    assert not code.values[~code.valid()].any() and not code.indices[~code.valid()].any()

    features = code.by_feature()
    assert features.offsets[0] == 0 and features.offsets[-1] == features.tokens.numel() == int((dense != 0).sum())
    for f in range(F):
        part = slice(int(features.offsets[f]), int(features.offsets[f + 1]))
        assert torch.equal(features.tokens[part], dense[:, f].nonzero().squeeze(1))
        assert torch.equal(features.values[part], dense[:, f][features.tokens[part]])
    assert torch.equal(code.values.reshape(-1)[features.slots], features.values)


def test_leading_axes_are_kept() -> None:
    dense = random_dense(6, 11, 0.4, 0).reshape(2, 3, 11)
    code = SparseCode.from_dense(dense)
    assert code.shape == (2, 3, 11) and code.n_tokens == len(code) == 6 and code.batch_shape == (2, 3)
    assert torch.equal(code.to_dense(), dense)
    one = SparseCode.from_dense(dense[0, 0])
    assert one.shape == (11,) and torch.equal(one.to_dense(), dense[0, 0])


def test_slots_without_counts_are_all_in_use() -> None:
    code = SparseCode(torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 1]], dtype=torch.int32), 4)
    assert code.valid().all() and code.to_dense().tolist() == [[0.0, 0.0, 0.0, 1.0]]
    assert code.by_feature().tokens.tolist() == [0, 0] and code.l0().tolist() == [1]


def test_unused_slots_do_not_disturb_latent_zero() -> None:
    code = SparseCode(torch.tensor([[5.0, 0.0]]), torch.tensor([[0, 0]]), 2, torch.tensor([1]))
    assert code.to_dense().tolist() == [[5.0, 0.0]]
    assert code.by_feature().values.tolist() == [5.0]


def test_both_conversions_carry_gradients() -> None:
    dense = random_dense(4, 9, 0.5, 1).double().requires_grad_()
    back = SparseCode.from_dense(dense).to_dense()
    (gradient,) = torch.autograd.grad((back * torch.arange(9.0)).sum(), dense)
    assert torch.equal(gradient, torch.arange(9.0).double() * (dense != 0))


def test_moves_and_pickles() -> None:
    code = SparseCode.from_dense(random_dense(3, 7, 0.5, 2))
    half = code.to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16 and half.indices.dtype == torch.int64
    again = pickle.loads(pickle.dumps(code))
    assert torch.equal(again.to_dense(), code.to_dense()) and again.shape == code.shape
    assert not code.detach().values.requires_grad and "SparseCode([3, 7]" in repr(code)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((torch.ones(3), torch.ones(3).long(), 4), "values \\[N, K\\]"),
        ((torch.ones(3, 2), torch.ones(3, 1).long(), 4), "same shape"),
        ((torch.ones(3, 2), torch.ones(3, 2).long(), 4, torch.ones(2).long()), "counts must have shape \\(3,\\)"),
        ((torch.ones(3, 2), torch.ones(3, 2).long(), 4, None, (2, 2)), "stands for 4 rows"),
    ],
)
def test_wrong_shapes_are_refused(arguments, message) -> None:
    with pytest.raises(DataError, match=message):
        SparseCode(*arguments)
