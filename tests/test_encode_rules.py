"""ReLU, JumpReLU and BatchTopK in kernels, which have rows of any length: against float64, with both encoders."""

import pytest
import torch

pytest.importorskip("triton")

from fastsae import gpu, ops, reference
from fastsae.capacity import Capacity
from fastsae.kernels import repair, select
from tests.encode_case import DEVICE, close, dense, integers, make, with_encoders


@pytest.mark.parametrize(
    ("N", "D", "F", "shift", "encoder"),
    with_encoders((17, 16, 300, -7.0), (3, 17, 63, 0.0), (2, 16, 1000, 0.0), (1, 16, 1, 1.0)),
)
def test_relu(N, D, F, shift, encoder):
    """From sparse to half dense, where every group fails and the slots grow."""
    x, weight, bias = make(N, D, F, shift=shift)
    found = gpu.encode_above(x, weight, bias, F, encoder=encoder)
    assert found is not None
    close(found, reference.encode_relu(x.double(), weight.double(), bias.double()), x, weight)


def test_relu_says_when_a_row_is_too_dense():
    x, weight, bias = make(3, 16, 200)
    most = int((reference.encode_relu(x, weight, bias) > 0).sum(1).max())
    assert gpu.encode_above(x, weight, bias, most - 1) is None
    found = gpu.encode_above(x, weight, bias, most)
    assert found is not None and int(found.counts.max()) == most


def test_capacity_is_remembered():
    """The first code of its kind is collected until it fits, the next ones once."""
    x, weight, bias = make(3, 16, 200)
    capacity, times = Capacity(slots=8, groups=1), []
    collect = select.collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "collect", lambda *given: times.append(given[2:]) or collect(*given))
        first = gpu.encode_above(x, weight, bias, 200, capacity=capacity)
        n = len(times)
        again = gpu.encode_above(x, weight, bias, 200, capacity=capacity)
    assert n > 1 and len(times) == n + 1
    assert first is not None and again is not None and torch.equal(first.counts, again.counts)
    assert torch.equal(dense(first, 200), dense(again, 200))
    # A sparser code later: the room is given back.
    for _ in range(40):
        gpu.encode_above(x[:1], weight, bias - 100, 200, capacity=capacity)
    assert (capacity.slots, capacity.groups) == (8, 8)


def test_a_dense_code_is_refused_before_it_is_repaired(monkeypatch):
    def never(*given):
        raise AssertionError("repaired")

    monkeypatch.setattr(repair, "repair", never)
    x, weight, bias = make(2, 16, 400)
    assert gpu.encode_above(x, weight, bias, 20) is None


@pytest.mark.parametrize("bandwidth", [0.0, 0.5])
def test_jumprelu(bandwidth):
    x, weight, bias = make(7, 16, 300)
    threshold = torch.rand(300, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 4 + 2
    wanted = reference.encode_jumprelu(x.double(), weight.double(), bias.double(), threshold.double())
    code = ops.encode_jumprelu(x, weight, bias, threshold, 300, bandwidth=bandwidth, backend="triton")
    assert code is not None and code.counts is not None
    assert (code.to_dense().double() - wanted).abs().max() < 1e-4
    margins = reference.pre_activations(x.double(), weight.double(), bias.double()) - threshold
    assert torch.equal(code.counts.long(), (margins > -bandwidth / 2).sum(1)), "those in the band are in the code"
    assert torch.equal(code.l0(), (wanted > 0).sum(1)), "and do not count as active"


@pytest.mark.parametrize(
    ("N", "D", "F", "k", "encoder"),
    with_encoders((17, 16, 300, 3), (1, 16, 1, 1), (5, 17, 63, 63), (4, 16, 700, 9)),
)
def test_batchtopk(N, D, F, k, encoder):
    x, weight, bias = make(N, D, F)
    wanted = reference.encode_batchtopk(x.double(), weight.double(), bias.double(), k)
    close(gpu.encode_batchtopk(x, weight, bias, k, encoder=encoder), wanted, x, weight)


def test_batchtopk_ties_go_to_earlier_rows_and_lower_features():
    x, weight, bias = integers(6, 16, 80)
    wanted = reference.encode_batchtopk(x.double(), weight.double(), bias.double(), 3)
    assert torch.equal(dense(gpu.encode_batchtopk(x, weight, bias, 3), 80), wanted)
    assert torch.equal(ops.encode_batchtopk(x, weight, bias, 3, backend="torch").to_dense().double(), wanted)


def test_batchtopk_may_take_all_from_one_row():
    x, weight, bias = make(4, 16, 400)
    bias -= 100
    x[2] = 0
    bias[:] = torch.where(torch.arange(400, device=DEVICE) % 2 == 0, 1.0, -1.0) * torch.rand(400, device=DEVICE)
    x[[0, 1, 3]] *= 0
    x[2] = 10 * weight[4]
    wanted = reference.encode_batchtopk(x.double(), weight.double(), bias.double(), 30)
    close(gpu.encode_batchtopk(x, weight, bias, 30), wanted, x, weight)
