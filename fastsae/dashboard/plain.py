"""Values ready for JSON."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """The same in lists, dicts, strings, bools and numbers of Python; what is not finite becomes None, as JSON has no
    such numbers. Strings lose lone surrogates, which UTF-8 cannot carry."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return value
