"""The same feature in another run: best match by activations on the same tokens.

Axes: n tokens, F features of the other dictionary, K active features per token.
"""

import torch
from torch import Tensor

from fastsae.analysis.collect import Sparse, pearson


class Matcher:
    """Pearson's r of a feature, from wherever, with all features of one dictionary.

    The dictionary's codes are turned to token-major order once. A feature that is active on m tokens then costs m · K
    operations, where a pass over all codes would cost n · K: a thousand times more for a rare feature.
    """

    def __init__(self, codes: Sparse, n: int) -> None:
        self.n, self.size = n, len(codes.offsets) - 1
        features = torch.repeat_interleave(torch.arange(self.size, dtype=torch.int32), codes.offsets.diff())
        order = codes.tokens.argsort(stable=True)
        self._features, self._values = features[order], codes.values[order]
        self._offsets = torch.zeros(n + 1, dtype=torch.int64)
        self._offsets[1:] = torch.bincount(codes.tokens, minlength=n).cumsum(0)
        self._sum = codes.sums()
        self._squares = Sparse(codes.offsets, codes.tokens, codes.values.double() ** 2).sums()

    def pearson(self, tokens: Tensor, values: Tensor) -> Tensor:
        """r with every feature, [F] float64, of what is `values` [m] on `tokens` [m] and 0 on the other n − m."""
        counts = self._offsets[tokens + 1] - self._offsets[tokens]
        begin = self._offsets[tokens] - (counts.cumsum(0) - counts)
        place = torch.arange(int(counts.sum())) + begin.repeat_interleave(counts)
        products = self._values[place].double() * values.double().repeat_interleave(counts)
        together = torch.bincount(self._features[place], weights=products, minlength=self.size)
        y = values.double()
        return pearson(
            together[:, None], self._sum, self._squares, y.sum()[None], y.square().sum()[None], float(self.n)
        )[:, 0]
