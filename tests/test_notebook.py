"""A feature's card in a notebook: escaped, and by itself."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import fastsae
from bench import site_case
from fastsae.dashboard import data, notebook, site
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


def test_a_card_has_scores_proxies_and_effects(facts: Facts):
    effects = {3: [np.full(len(example.token_ids), -0.25) for example in facts.cards.top(3, 20)]}
    html = fastsae.show(3, replace(facts, effects=effects))._repr_html_()
    assert "simulation ρ 0.4 · detection 0.8" in html and "ΔNLL −0.250" in html
    text = Notebook(html).text
    first = data.feature_card(facts, 3)["proxies"][0]
    assert f"Proxies{first[0]}r " in text


def test_the_report_need_be_named_once(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notebook, "_last", "report")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastSAEError, match="no report in report"):
        fastsae.show(3)
    named = fastsae.show(3, report)
    assert fastsae.show(3).card == named.card


def test_show_names_what_is_missing(tmp_path: Path):
    with pytest.raises(FastSAEError, match="make one with fastsae analyze"):
        fastsae.show(3, tmp_path)
