"""Rows that need more slots than there are: made without, on the device, exactly; and room that is learnt meanwhile."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import fastsae
from fastsae import capacity, gpu
from fastsae.autoencode import Autoencoded, autoencode
from tests.encode_case import DEVICE
from tests.test_autoencode import close, dense, problem, pulled


def run(p, rule: str, room: int, weighted: bool = False, most: int | None = None) -> Autoencoded:
    return autoencode(
        p["x"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], rule=rule, target=p["target"], weighted=weighted,
        threshold=p["threshold"] if rule == "jumprelu" else None, bandwidth=0.2, backend="triton", room=room, most=most,
    )  # fmt: skip


def room_with(slots: int, groups: int) -> int:
    """Of a caller whose calls so far needed few slots."""
    room = capacity.new_room()
    known = capacity.room_of(room)
    known.slots, known.groups, known.needed = slots, groups, 1
    return room


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("rule", "N", "D", "F", "slots", "groups", "shift"),
    [
        ("relu", 5, 16, 40, 64, 0, -0.5),  # too few groups
        ("relu", 21, 17, 70, 18, 64, -0.5),  # too few slots, in some rows
        ("relu", 3, 16, 90, 1, 64, 0.0),
        ("jumprelu", 21, 17, 70, 20, 64, 0.0),
        ("jumprelu", 5, 16, 40, 1, 64, 0.0),
    ],
)
def test_open_rows_and_others_against_float64(rule, N, D, F, slots, groups, shift, weighted):
    p = problem(N, D, F, torch.float32, shift=shift)
    exact = {name: t.detach().double().requires_grad_() for name, t in p.items()}
    want = dense(exact, rule, 1, True, weighted, 0.2, None, 0)
    made = run(p, rule, room_with(slots, groups), weighted)
    n_open = int(made.is_open.sum())
    assert 0 < n_open and (n_open < N or slots != 18) and made.code(F) is None
    f = want.pop()
    l0 = made.l0 if rule == "jumprelu" else made.l0[:0]
    got = [made.x_hat, made.error, made.l1, l0, made.aux]
    for name, g, w in zip(("x_hat", "error", "l1", "l0", "aux"), got, want, strict=True):
        close(name, g, w, 1e-5)
    assert torch.equal(made.l0.long(), (f > 0).sum(1)) and torch.equal(made.fired.long(), (f > 0).sum(0))
    mine, truth = pulled(got, p), pulled(want, exact)
    for name in truth:
        close(f"gradient of {name}", mine[name], truth[name], 3e-5)
    again = run(p, rule, room_with(slots, groups), weighted)
    assert all(torch.equal(a, b) for a, b in zip(again[:4], made[:4], strict=True)), "same bits"


def test_without_a_target():
    p = problem(5, 16, 40, torch.float32)
    made = autoencode(p["x"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], rule="relu", backend="triton",
                      room=room_with(2, 64))  # fmt: skip
    plain = autoencode(p["x"], p["weight"], p["bias"], p["w_dec"], p["b_dec"], rule="relu", backend="torch")
    assert made.is_open.any()
    torch.testing.assert_close(made.x_hat, plain.x_hat, rtol=1e-4, atol=1e-5)


def test_room_is_learnt_without_waiting(monkeypatch):
    """The first call learns by collecting again; when codes become denser, rows are open for as many calls as the
    counters are late, and then fit."""
    p = problem(6, 16, 90, torch.float32, shift=-2.0)
    room = capacity.new_room()
    first = run(p, "relu", room)
    known = capacity.room_of(room)
    assert not first.is_open.any() and first.code(90) is not None and known.needed is not None
    monkeypatch.setattr(gpu, "_all_above", None)  # the one that waits
    known.slots = 8
    with torch.no_grad():
        p["bias"] += 2.0
    opened = [int(run(p, "relu", room).is_open.sum()) for _ in range(capacity.DELAY + 2)]
    assert all(opened[: capacity.DELAY]) and not any(opened[capacity.DELAY :]), opened


def test_what_is_too_dense_takes_the_dense_path_and_comes_back():
    p = problem(6, 16, 90, torch.float32)
    room = capacity.new_room()
    assert run(p, "relu", room, most=30).values.shape == (0, 0), "the first call knows at once"
    with torch.no_grad():
        p["bias"] -= 3.0
    shapes = [run(p, "relu", room, most=30).values.shape[0] for _ in range(capacity.DELAY + 2)]
    assert shapes[0] == 0 and shapes[-1] == 6
    with torch.no_grad():
        p["bias"] += 3.0
    shapes = [run(p, "relu", room, most=30).values.shape[0] for _ in range(capacity.DELAY + 2)]
    assert shapes[0] == 6 and shapes[-1] == 0, "meanwhile rows were open"


def test_checkpointing_keeps_shapes():
    """The forward pass that torch runs again in the backward pass makes codes of the same shape, and learns nothing."""
    from torch.utils.checkpoint import checkpoint

    sae = fastsae.SAE(d_in=16, d_sae=64, activation="relu", backend="triton", device=DEVICE)
    x = torch.randn(6, 16, device=DEVICE, requires_grad=True)
    for _ in range(4):
        want = torch.autograd.grad(sae(x).square().sum(), [x, *sae.parameters()])
        out = checkpoint(lambda x: sae(x), x, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        got = torch.autograd.grad(out.square().sum(), [x, *sae.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_room_grows_at_once_and_shrinks_by_halves():
    room = capacity.Capacity(slots=64, groups=32)
    room.fit(50, 20)
    assert (room.slots, room.groups) == (64, 32), "while it fits it stays"
    room.fit(70, None)
    assert (room.slots, room.groups) == (105, 32)
    room.fit(20, 1)
    assert (room.slots, room.groups) == (52, 16)
