"""The report: one page from a results dict, hostile text kept harmless, missing parts left out."""

import builtins
import copy
import math
import re
from html.parser import HTMLParser

import pytest

from fastsae import figures, report
from fastsae.errors import MissingDependencyError
from fastsae.visible import visible

pytest.importorskip("matplotlib")

VOID = {"meta", "img", "br", "link"}
HOSTILE = "<script>alert('x')</script>"


def quality(scale: float = 1.0) -> dict:
    return {
        "lm": {
            "val_loss": 3.2 * scale, "unigram": 6.7, "bigram": 3.9, "tokens": 16e6,
            "parameters": 900_000, "seconds": 600.0,
        },
        "train": {"tokens": 4_000_000, "l0": 12.3, "fve": 0.8, "dead": 0.03},
        "eval": {
            "tokens": 100_000, "fve": 0.81, "l0": 12.0, "dead": 0.04, "ce_raw": 3.2, "ce_spliced": 3.4,
            "ce_zero": 4.8, "ce_mean": 4.1, "recovered_zero": 0.875, "recovered_mean": 0.777,
            "histogram": [1, 4, 20, 60, 30, 5], "histogram_edges": [-6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0],
        },
    }  # fmt: skip


def category(name: str = "Arabic", feature: int = 7) -> dict:
    edges = [float(i) for i in range(11)]
    words = ["مرح", "با", " ", "\ufffd", "<D8>", "\n", "\x00", "\u202e", HOSTILE, "🙂"]
    return {
        "name": name, "base_rate": 0.006, "feature": feature, "pearson": 0.82, "pearson_clipped": 0.7, "neuron": 3,
        "neuron_pearson": 0.4, "advantage": 0.42, "density": 0.008, "max": 10.0, "specificity": 0.8,
        "specificity_upper": 0.99, "lift_upper": 165.0, "recall": 0.7,
        "bins": {
            "edges": edges,
            "inside": [round(300 * math.exp(-((x - 4) ** 2) / 8)) for x in range(10)],
            "outside": [round(400 * math.exp(-x)) for x in range(10)],
        },
        "ablation": {"inside": 0.31, "beside": -0.02, "outside": 0.0003, "top": 2.5, "tokens_inside": 812},
        "pinning": {
            "unpinned": 0.004, "pinned": 0.62, "neuron": 0.05, "value": 10.0, "neuron_value": 4.0, "prefix": "1,2,3",
            "samples": {
                "unpinned": ["the cat & the <b>dog</b>"], "pinned": ["مرحبا بكم " + HOSTILE], "neuron": ["\ufffdabc"],
            },
        },
        "match": {"feature": 99, "pearson": 0.88, "held_out": 0.84, "logit_pearson": 0.71},
        "logits": {
            "top": [[HOSTILE, 2.0], ["ال", 1.5]], "bottom": [[" the", -1.0], ["\x07", -0.9]],
            "edges": [-2.0, -1.0, 0.0, 1.0, 2.0], "inside": [0, 1, 5, 30], "outside": [20, 700, 600, 3],
        },
        "neurons": [[3, 0.4], [8, -0.3]],
        "contexts": [
            {"tokens": words, "activations": [0.0, 9.5, 0.0, 3.0, 2.0, 0.0, 0.0, 0.0, 1.0, 0.0], "at": 1}
            for _ in range(20)
        ],
    }  # fmt: skip


def results() -> dict:
    return {
        "hook": "transformer.h.0.mlp.act", "d_in": 512, "d_sae": 4096, "tokens": 200_000, "documents": 300,
        "quality": {"scale": "laptop", "a": quality(), "b": quality(1.01)},
        "categories": [category(), category("Han / kana", 12)],
        "universality": {"features": 0.6, "neurons": 0.4, "count": 200},
        "goals": [
            {"name": "L0", "goal": "≤ 20", "value": "12.0", "met": True},
            {"name": f"dead {HOSTILE}", "goal": "≤ 10 %", "value": "14.0%", "met": False},
        ],
    }  # fmt: skip


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_and_figures(tmp_path):
    path = report.write(results(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    images = page.all("img")
    assert len(images) >= 8
    for image in images:
        assert "/" not in image["src"] and image["alt"]
        data = (path.parent / image["src"]).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 2000
    assert {p.name for p in path.parent.glob("*.png")} == {image["src"] for image in images}


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = Page(report.write(results(), tmp_path).read_text(encoding="utf-8"))
    assert not page.all("link") and not page.all("script")
    for _, attrs in page.tags:
        for key in ("src", "href"):
            assert not re.match(r"(https?:)?//", attrs.get(key) or "")


def test_links_lead_to_parts_of_the_page(tmp_path):
    page = Page(report.write(results(), tmp_path).read_text(encoding="utf-8"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert links[0] == "index.html"  # the site, written beside it
    assert links[1:] and {link.removeprefix("#") for link in links[1:]} <= set(ids)


def test_text_of_tokens_and_models_is_harmless(tmp_path):
    text = report.write(results(), tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and HOSTILE in page.text
    assert not page.all("b") and "<b>dog</b>" in page.text
    for raw in ("\x00", "\x07", "\u202e"):  # controls, and the override that would turn the line around
        assert raw not in text
    assert "<D8>" in page.text and "\ufffd" in page.text


def test_the_figures_are_stated(tmp_path):
    page = Page(report.write(results(), tmp_path).read_text(encoding="utf-8"))
    for figure in ("0.82", "0.40", "0.74", "165×", "+2.50", "62.0%", "0.88", "3.200", "87.5%", "missed", "met"):
        assert figure in page.text, figure


def test_marks_stand_for_what_cannot_be_seen():
    assert visible("a\n\t\x00") == "a⏎⇥␀"
    assert visible("\u202eabc\ud800") == "‹U+202E›abc‹U+D800›"
    assert visible("می\u200cخواهم\ufffd\u00a0🙂") == "می\u200cخواهم\ufffd\u00a0🙂"


def test_shares_are_whole_only_when_they_are():
    assert [figures._percent(x) for x in (0, 1e-6, 0.5, 0.9999, 1)] == ["0%", "1%", "50%", "99%", "100%"]


def test_paper_and_runs_stand_side_by_side(tmp_path):
    case = results()
    case["quality"]["a"]["eval"]["ce_mean"] = None
    page = Page(report.write(case, tmp_path).read_text(encoding="utf-8"))
    for figure in ("79 %", "4.9", "0.91", "0.74", "0.13 %", "6.1 nats", "1,2,3"):
        assert figure in page.text, figure
    assert "None" not in page.text


def test_negative_correlations_are_drawn_and_written(tmp_path):
    case = results()
    case["categories"][0] |= {"pearson": -0.2, "advantage": -0.6}
    assert "−0.20" in Page(report.write(case, tmp_path).read_text(encoding="utf-8")).text


def test_shading_follows_the_activation(tmp_path):
    page = Page(report.write(results(), tmp_path).read_text(encoding="utf-8"))
    shades = {a["title"]: a.get("style", "") for a in page.all("span") if "title" in a}
    assert shades["0.00"] == ""
    strength = {value: float(re.findall(r"[\d.]+", style)[-1]) for value, style in shades.items() if style}
    assert strength["9.50"] > strength["3.00"] > strength["1.00"] > 0


def test_the_agreement_of_attribution_with_ablation_is_told_where_it_is_known(tmp_path):
    case = results()
    case["categories"] = [category()]
    assert "foretells" not in Page(report.write(case, tmp_path / "without").read_text(encoding="utf-8")).text
    for r, shown in ((-0.5, "with r −0.50,"), (None, "with r –,")):
        agreement = {"pearson": r, "spearman": 0.4, "same_sign": 0.9, "places": 64}
        case["categories"][0]["ablation"]["agreement"] = agreement
        page = Page(report.write(case, tmp_path / str(r)).read_text(encoding="utf-8")).text
        assert f"At 64 single tokens gradient × activation foretells that {shown} and its sign at 90% of them." in page


@pytest.mark.parametrize("part", ["ablation", "pinning", "match", "logits"])
def test_missing_parts_are_left_out(tmp_path, part):
    case = results()
    case["categories"] = [category()]
    whole = Page(report.write(case, tmp_path / "whole").read_text(encoding="utf-8")).text
    case["categories"][0][part] = None
    without = Page(report.write(case, tmp_path / "without").read_text(encoding="utf-8")).text
    assert "None" not in without and len(without) < len(whole)
    sign = {"ablation": "Set to zero", "pinning": "pinned at", "match": "0.88", "logits": "likelier"}[part]
    assert sign in whole and sign not in without


def test_hardly_any_results(tmp_path):
    bare = results() | {"quality": {}, "categories": [], "universality": None, "goals": []}
    page = Page(report.write(bare, tmp_path).read_text(encoding="utf-8"))
    assert page.all("img") == [] and "transformer.h.0.mlp.act" in page.text and "None" not in page.text


def test_one_run_and_empty_bins(tmp_path):
    case = results()
    del case["quality"]["b"]
    case["categories"][0]["bins"] = {"edges": [0.0, 1.0], "inside": [0], "outside": [0]}
    case["categories"][0]["contexts"] = []
    assert Page(report.write(case, tmp_path).read_text(encoding="utf-8")).all("img")


def test_results_are_not_changed(tmp_path):
    case = results()
    before = copy.deepcopy(case)
    report.write(case, tmp_path)
    assert case == before


def test_without_matplotlib(tmp_path, monkeypatch):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match="matplotlib") as caught:
        report.write(results(), tmp_path)
    assert "\n" not in str(caught.value) and "pip install" in str(caught.value)
