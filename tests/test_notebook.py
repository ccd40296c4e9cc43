"""A feature's card in a notebook: escaped, and by itself."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastsae
from bench import site_case
from fastsae.dashboard import site
from fastsae.dashboard.facts import Facts
from fastsae.errors import FastSAEError


@pytest.fixture(scope="module")
def facts() -> Facts:
    return site_case.facts(150)


@pytest.fixture(scope="module")
def report(facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    site.write_site(out, facts, show_progress=False)
    return out


class Notebook(HTMLParser):
    """Tags and attributes that were opened, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.depth = 0
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.depth += 1

    def handle_endtag(self, tag) -> None:
        self.depth -= 1

    def handle_data(self, data) -> None:
        self.text += data


def test_a_notebooks_card_is_escaped_and_stands_by_itself(report: Path, facts: Facts):
    all_text = ""
    for f in range(40):
        html = fastsae.show(f, report)._repr_html_()
        assert html == fastsae.show(f, facts)._repr_html_()
        found = Notebook(html)
        assert found.depth == 0
        assert found.tags <= {"div", "p", "span", "bdi", "svg", "rect", "title", "details", "summary"}
        assert not any(name.startswith("on") or name in ("src", "href") for name in found.attributes)
        all_text += found.text
    for hostile in ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;", "<b>lines</b>"):
        assert hostile in all_text
    assert repr(fastsae.show(3, report)).startswith("feature 3: density")


def test_show_names_what_is_missing(tmp_path: Path):
    with pytest.raises(FastSAEError, match="make one with fastsae analyze"):
        fastsae.show(3, tmp_path)
