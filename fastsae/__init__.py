"""fastsae: sparse autoencoders for interpretability, whose training step costs little more than its encoder product.

    sae = fastsae.SAE(d_in=512, d_sae=16384, activation="topk", k=32)
    out = sae.loss(x)
    out.loss.backward()

Names are imported when they are first used, so `import fastsae` needs torch, numpy and safetensors only.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsae import analysis, synthetic
    from fastsae.codes import SparseCode
    from fastsae.config import SAEConfig
    from fastsae.dashboard.notebook import show
    from fastsae.errors import FastSAEError
    from fastsae.estimate import estimate
    from fastsae.evaluate import evaluate
    from fastsae.harvest import harvest
    from fastsae.sae import SAE, LossOutput
    from fastsae.step import TrainStep
    from fastsae.store import ActivationStore
    from fastsae.train import TrainConfig, train

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "ActivationStore",
    "FastSAEError",
    "LossOutput",
    "SAEConfig",
    "SparseCode",
    "TrainConfig",
    "TrainStep",
    "analysis",
    "estimate",
    "evaluate",
    "harvest",
    "show",
    "synthetic",
    "train",
]

_HOME = {
    "SAE": "fastsae.sae",
    "SAEConfig": "fastsae.config",
    "LossOutput": "fastsae.sae",
    "SparseCode": "fastsae.codes",
    "FastSAEError": "fastsae.errors",
    "ActivationStore": "fastsae.store",
    "TrainConfig": "fastsae.train",
    "TrainStep": "fastsae.step",
    "show": "fastsae.dashboard.notebook",
}
# Modules that are named after the one function that people want from them: fastsae.train(...) calls it.
_VERBS = ("train", "harvest", "evaluate", "estimate")
_MODULES = (*_VERBS, "analysis", "synthetic")


class _Verb(ModuleType):
    """A module that is called as the function of its own name: `fastsae.train(...)` is `fastsae.train.train(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """Whatever imports a verb's module first, Python stores it here as an attribute, and here it becomes callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and type(value) is ModuleType:
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastsae.{name}")
    raise AttributeError(f"module 'fastsae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
