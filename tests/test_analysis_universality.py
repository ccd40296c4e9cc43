"""Best matches through sparse codes, against the correlation of dense columns."""

import numpy as np
import torch

from fastsae.analysis.collect import Sparse, feature_pearson
from fastsae.analysis.universality import Matcher


def sparse(dense: torch.Tensor) -> Sparse:
    """[n, F] → its columns' entries."""
    entries = dense.T.nonzero()
    counts = torch.bincount(entries[:, 0], minlength=dense.shape[1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Sparse(offsets, entries[:, 1].int(), dense.T[dense.T > 0])


def test_matches_are_correlations_of_columns():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.relu(torch.randn(300, size, generator=generator) - 1) for size in (6, 9))
    b[:, 4] = 0  # dead
    b[:, 7] = 3 * a[:, 2]
    a[150:, 5] = 0
    codes, matcher = sparse(a), Matcher(sparse(b), 300)
    for feature in range(6):
        found = matcher.pearson(*codes.of(feature))
        with np.errstate(invalid="ignore"):
            wanted = [np.corrcoef(a[:, feature], b[:, other])[0, 1] for other in range(9)]
        np.testing.assert_allclose(found, np.nan_to_num(wanted), atol=1e-6)
    assert int(matcher.pearson(*codes.of(2)).argmax()) == 7
    everywhere = torch.ones(300, dtype=torch.bool)
    wanted = feature_pearson(sparse(b), a[:, :1], everywhere)[:, 0]
    torch.testing.assert_close(matcher.pearson(*codes.of(0)), wanted)


def test_a_feature_that_never_fires_matches_nothing():
    matcher = Matcher(sparse(torch.eye(5)), 5)
    found = matcher.pearson(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert found.tolist() == [0.0] * 5
