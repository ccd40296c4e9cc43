"""Gaps of a planted feature, against loops over the tokens."""

import numpy as np
import pytest
import torch

from fastsae.analysis.gaps import gaps
from fastsae.analysis.stream import Read, Source, read
from fastsae.codes import SparseCode
from fastsae.errors import FastSAEError
from tests.analysis_case import HOOK, case, documents

F = 6


def planted(seed: int, n: int = 400) -> tuple[Read, torch.Tensor, np.ndarray]:
    """Token 3 and 4 are the category; feature 1 has token 3 only, feature 2 has token 4, feature 5 fires at random."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 10, n)
    dense = np.zeros((n, F), dtype=np.float32)
    dense[:, 1] = np.where(ids == 3, 2.0, 0)
    dense[:, 2] = np.where((ids == 4) & (rng.random(n) < 0.9), 1.0, 0)
    dense[:, 5] = np.where(rng.random(n) < 0.3, 4.0, 0)
    code = SparseCode.from_dense(torch.from_numpy(dense))
    grid = torch.full((4, n // 4 + 1), -1)
    grid[:, 1:] = torch.arange(n).view(4, -1)  # a begin-of-text token before each context
    context = torch.full(grid.shape, 99)
    context[:, 1:] = torch.from_numpy(ids).view(4, -1)
    numbers = torch.arange(n) // (n // 4) + 10 * seed
    places = (torch.from_numpy(ids), numbers, torch.arange(n) % (n // 4))
    reading = Read(*places, grid, context, (torch.zeros(n, 2),), (code,))
    return reading, torch.from_numpy((ids == 3) | (ids == 4)), dense


def test_a_planted_gap():
    batches = [planted(seed) for seed in range(3)]
    found = gaps(((r, inside) for r, inside, _ in batches), 1, F, examples=12, around=3)
    ids = np.concatenate([r.token_ids.numpy() for r, _, _ in batches])
    dense = np.concatenate([d for _, _, d in batches])
    gap = ids == 4
    assert (found.tokens, found.members, found.missed) == (1200, int(((ids == 3) | gap).sum()), int(gap.sum()))
    assert found.recall == pytest.approx((ids == 3).sum() / ((ids == 3) | gap).sum())
    assert [(s.token_id, s.members, s.missed) for s in found.strings] == [(4, gap.sum(), gap.sum())]
    assert found.others[0].feature == 2 and [o.feature for o in found.others] == [2, 5]
    for other in found.others:
        fires = dense[:, other.feature] > 0
        assert other.share == pytest.approx(fires[gap].mean())
        assert other.lift == pytest.approx(fires[gap].mean() / fires.mean())
        assert other.precision == pytest.approx(gap[fires].mean())
        assert other.phi == pytest.approx(np.corrcoef(fires, gap)[0, 1])


def test_features_are_chosen_on_other_tokens_than_they_are_scored_on():
    reading, inside, dense = planted(0)
    ids, scored = reading.token_ids.numpy(), np.arange(400) % 2 == 1
    dense[:, 3] = ids == 4  # exactly the gap
    dense[:, 0] = (ids == 4) & scored  # has it where nobody chooses
    reading = reading._replace(codes=(SparseCode.from_dense(torch.from_numpy(dense)),))
    found = gaps([(reading, inside, torch.from_numpy(scored))], 1, F)
    gap = ids == 4
    members = (ids == 3) | gap
    assert (found.tokens, found.members, found.missed) == (200, (members & scored).sum(), (gap & scored).sum())
    assert [(s.token_id, s.missed) for s in found.strings] == [(4, (gap & scored).sum())]
    assert len(found.examples) == found.missed < 20 and all(e.position % 2 == 1 for e in found.examples)
    best = found.others[0]
    assert (best.feature, best.share, best.precision, best.phi) == (3, 1, 1, pytest.approx(1))
    assert best.lift == pytest.approx(200 / (gap & scored).sum())
    assert [other.feature for other in found.others][:2] == [3, 2] and 0 not in {o.feature for o in found.others}
    for other in found.others:
        fires = dense[scored, other.feature] > 0
        assert other.share == pytest.approx(fires[gap[scored]].mean())
        assert other.precision == pytest.approx(gap[scored][fires].mean())
        assert other.phi == pytest.approx(np.corrcoef(fires, gap[scored])[0, 1])
    one_half = gaps([(reading, inside & torch.from_numpy(scored), torch.from_numpy(scored))], 1, F)
    assert one_half.missed == found.missed and one_half.others == []


def test_windows_are_around_missed_tokens_and_cut_at_begin_of_text():
    batches = [planted(seed) for seed in range(3)]
    found = gaps(((r, inside) for r, inside, _ in batches), 1, F, examples=12, around=3).examples
    assert len(found) == 12 and len({(e.document, e.position) for e in found}) == 12
    assert len({e.document // 10 for e in found}) > 1  # from several batches
    by_document = {
        int(r.documents[n]): (r.token_ids.numpy()[n : n + 100], d[n : n + 100, 1])
        for r, _, d in batches
        for n in range(0, 400, 100)
    }
    for example in found:
        ids, activations = by_document[example.document]
        low, high = max(0, example.position - 3), example.position + 4
        assert example.token_ids.tolist() == ids[low:high].tolist()
        assert example.activations.tolist() == activations[low:high].tolist()
        assert example.token_ids[example.at] == 4 and example.value == 0
    again = gaps(((r, inside) for r, inside, _ in batches), 1, F, examples=12, around=3, seed=1).examples
    assert {(e.document, e.position) for e in again} != {(e.document, e.position) for e in found}


def test_windows_are_drawn_evenly():
    drawn = np.zeros(12)
    for seed in range(300):
        pairs = [planted(s, 40)[:2] for s in range(12)]
        for example in gaps(pairs, 1, F, examples=5, seed=seed).examples:
            drawn[example.document // 10] += 1
    gap = np.array([int((planted(s, 40)[0].token_ids == 4).sum()) for s in range(12)])
    wanted = 1500 * gap / gap.sum()
    assert ((drawn - wanted) ** 2 / np.maximum(wanted, 1)).sum() < 35  # χ² with 11 degrees of freedom


def test_a_real_stream_and_a_feature_that_has_everything():
    sae, model, tokenizer = case()
    reads = list(read([Source(sae, model, HOOK)], tokenizer, documents(6), context=64))
    space = tokenizer(" ", add_special_tokens=False)["input_ids"][0]
    found = gaps([(r, r.token_ids == space) for r in reads], 7, 40)
    dense = torch.cat([sae.encode(r.xs[0]) for r in reads])
    ids = torch.cat([r.token_ids for r in reads])
    assert found.missed == int(((ids == space) & (dense[:, 7] <= 0)).sum())
    best = found.others[0]
    gap = (ids == space) & (dense[:, 7] <= 0)
    assert best.phi == pytest.approx(
        max(float(np.corrcoef(dense[:, f] > 0, gap)[0, 1]) for f in range(40) if f != 7 and (dense[:, f] > 0).any()),
        abs=1e-6,
    )
    whole = gaps([(r, sae.encode(r.xs[0])[:, 7] > 0) for r in reads], 7, 40)
    assert whole.missed == 0 and whole.others == [] and whole.strings == [] and whole.recall == 1
    without = [(r._replace(grid=None, context_ids=None), r.token_ids == space) for r in reads]
    assert gaps(without, 7, 40).examples == [] and gaps(without, 7, 40).missed == found.missed


def test_bad_input():
    reading, inside, _ = planted(0)
    with pytest.raises(FastSAEError, match="from 0 to 5, got 6"):
        gaps([(reading, inside)], 6, F)
    with pytest.raises(FastSAEError, match="each of 400 tokens"):
        gaps([(reading, inside[:3])], 1, F)
    with pytest.raises(FastSAEError, match="each of 400 tokens"):
        gaps([(reading, inside, inside[:3])], 1, F)
    with pytest.raises(FastSAEError, match="got none"):
        gaps([], 1, F)
