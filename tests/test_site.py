"""The site's files and the functions behind them, against plain numpy, the model's own parts, and an HTML parser."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsae
from bench import site_case
from fastsae.analysis.cards import Cards
from fastsae.analysis.evidence import CHOOSE, SCORE
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.logit_map import LogitMap
from fastsae.analysis.passes import take_survey
from fastsae.analysis.proxies import proxies
from fastsae.analysis.stream import Source
from fastsae.analysis.text import Text
from fastsae.dashboard import data, site
from fastsae.dashboard.facts import (
    FOLLOWS,
    Explained,
    Facts,
    explanations_of,
    logits_of,
    neighbours_of,
    ultra_low_of,
    window_effects,
)
from fastsae.dashboard.spelling import Spelling
from fastsae.errors import FastSAEError
from tests import analysis_case

F = 150
LARGEST = 2_000_000  # bytes of a file
BANNED = (
    ".innerHTML", ".outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "http://", "https://",
)  # fmt: skip


@pytest.fixture(scope="module")
def facts() -> Facts:
    return site_case.facts(F)


@pytest.fixture(scope="module")
def report(facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    site.write_site(out, facts, show_progress=False)
    return out


def put(path: Path) -> Any:
    """The value of a data file, which must be one call with the file's own name and one JSON value."""
    name, value = re.fullmatch(r'fastsae\.put\("([a-z0-9-]+)",(.*)\);\n', path.read_text("utf-8"), re.DOTALL).groups()  # type: ignore[union-attr]
    assert name == path.stem
    return json.loads(value)


# --- files ----------------------------------------------------------------------------------------------------------


def test_every_file_is_small_and_every_data_file_is_one_call(report: Path):
    files = [path for path in report.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < LARGEST
    for path in (report / "data").iterdir():
        put(path)
    assert {path.parent.name for path in files} == {report.name, "data", "assets"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.text.append(data)


def test_the_page_runs_nothing_but_files_beside_it(report: Path):
    page = Page((report / "index.html").read_text("utf-8"))
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    empty = hashlib.sha256(b"").digest()
    assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'"
    assert rules["style-src"].split() == ["'self'", f"'sha256-{base64.b64encode(empty).decode()}'"]
    assert rules["img-src"] == "'self' data:" and rules["connect-src"] == "'self'"
    sources = [a["src"] for t, a in page.tags if t == "script"]
    sources += [a["href"] for t, a in page.tags if t == "link" and not str(a["href"]).startswith("data:")]
    assert sources and all((report / str(source)).is_file() for source in sources)
    for tag, attributes in page.tags:
        assert tag != "style" and "style" not in attributes and not any(name.startswith("on") for name in attributes)
        assert tag != "script" or attributes["src"]


def test_our_scripts_make_no_html_of_text_and_ask_no_other_host():
    for path in site.STATIC.glob("*.js"):
        if path.name.startswith("plotly"):
            continue
        code = path.read_text("utf-8")
        for banned in BANNED:
            assert banned not in code, f"{path.name}: {banned}"
        assert len(code.splitlines()) < 400


def test_plotly_is_the_published_file():
    # plotly.js-basic-dist-min 4.1.1 from npm, MIT, unchanged.
    content = (site.STATIC / "plotly-basic.min.js").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
    assert b"v4.1.1" in content[:100] and b"MIT license" in content[:200]


def test_a_second_site_takes_the_place_of_the_first_and_nothing_else(tmp_path: Path):
    (tmp_path / "results.json").write_text("{}")
    site.write_site(tmp_path, site_case.facts(130), show_progress=False)
    site.write_site(tmp_path, site_case.facts(20), show_progress=False)
    assert (tmp_path / "results.json").exists()
    assert [path.name for path in (tmp_path / "data").glob("cards-*")] == ["cards-0.js"]
    assert site.read_overview(tmp_path)["d_sae"] == 20


def test_a_folder_of_somebody_else_stays_as_it_is(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(FastSAEError, match="not part of a site"):
        site.write_site(tmp_path, site_case.facts(5), show_progress=False)
    assert (tmp_path / "data" / "mine.txt").read_text() == "mine"


def test_without_anything_but_the_survey(tmp_path: Path):
    bare = Facts(Cards(site_case.survey(8, proxies=())), site_case.vocabulary())
    site.write_site(tmp_path, bare, show_progress=False)
    card = site.read_card(tmp_path, 0)
    assert card["logits"] is card["match"] is card["similar"] is card["explanation"] is None and card["top"]
    assert site.read_rows(tmp_path)["proxy"] == [-1] * 8
    assert not any(site.read_overview(tmp_path)["has"].values())


# --- reading it again -----------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(report: Path, facts: Facts):
    for f in (0, 1, 49, 63, 64, F - 1):
        assert site.read_card(report, f) == json.loads(json.dumps(data.feature_card(facts, f)))
    assert site.read_rows(report) == json.loads(json.dumps(data.feature_rows(facts)))
    assert site.read_overview(report) == json.loads(json.dumps(data.overview(facts)))


@pytest.mark.parametrize("f", [-1, F, 10**12, True, "1", 1.0, None])
def test_a_feature_that_is_none(report: Path, f: Any):
    with pytest.raises(FastSAEError, match=f"from 0 to {F - 1}"):
        site.read_card(report, f)


def test_a_feature_that_follows_no_category(facts: Facts):
    r = [half.copy() for half in facts.pearson]
    r[CHOOSE][5], r[SCORE][5] = FOLLOWS - 0.01, 0.9
    r[CHOOSE][6, 2], r[SCORE][6, 2] = 0.8, 0.3
    r[SCORE][6, 4] = 0.7  # better, but not where features are chosen
    changed = replace(facts)
    changed.__dict__["pearson"] = tuple(r)
    rows, names = data.feature_rows(changed), changed.cards.survey.proxies
    assert rows["proxy"][5:7] == [-1, 2] and rows["score"][5:7] == [None, 0.3]
    card = data.feature_card(changed, 6)
    assert card["follows"] == [names[2], 0.3] == card["proxies"][0]
    assert data.feature_card(changed, 5)["follows"] is None
    columns = data.feature_map(changed)
    assert columns is not None and columns["category"][5:7] == [None, 2]


def test_cards_too_large_for_one_file_are_spread_over_several(facts: Facts, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(site, "_LARGEST", 100_000)
    site.write_site(tmp_path, facts, show_progress=False)
    files = list((tmp_path / "data").glob("cards-*.js"))
    assert len(files) > F // 64 + 1 and max(path.stat().st_size for path in files) < 110_000
    assert [site.read_card(tmp_path, f)["feature"] for f in range(F)] == list(range(F))


# --- the figures ----------------------------------------------------------------------------------------------------


def test_a_card_says_what_the_survey_holds(facts: Facts):
    f, survey = 7, facts.cards.survey
    card = data.feature_card(facts, f)
    mine = survey.top.feature.rows == f
    strongest = np.sort(survey.top.value[mine])[::-1]
    shown = [w["activations"][w["at"]] for w in card["top"]]
    np.testing.assert_allclose(shown, strongest, rtol=5e-3)
    weakest = np.sort(survey.bottom.value[survey.bottom.feature.rows == f])
    np.testing.assert_allclose([w["activations"][w["at"]] for w in card["bottom"]], weakest, rtol=5e-3)
    assert len(card["top"]) == 20 and len(card["intervals"]) == 11 and len(card["bottom"]) == 20
    for part in card["intervals"]:
        for window in part["windows"]:
            assert part["low"] * 0.99 <= window["activations"][window["at"]] <= part["high"] * 1.01
            assert len(window["tokens"]) == len(window["activations"]) == 17 and window["at"] == 8
    fires = survey.sums["fires"].sum(0)[f]
    assert card["fires"] == fires and card["density"] == pytest.approx(fires / site_case.TOKENS, rel=5e-3)
    counts = card["histogram"]["counts"]
    assert counts == survey.sums["histogram"].sum(0)[f, : len(counts)].tolist()
    assert card["histogram"]["width"] * len(counts) >= card["max"] * 0.999
    n, halves = site_case.TOKENS / 2, []
    for half in (CHOOSE, SCORE):
        p, s = survey.sums["p"][half], {name: survey.sums[name][half, f] for name in ("f", "ff", "fp")}
        halves.append((n * s["fp"] - s["f"] * p) / np.sqrt((n * s["ff"] - s["f"] ** 2) * (n * p - p**2)))
    order = np.argsort(-halves[CHOOSE])  # scored where they were not chosen
    np.testing.assert_allclose([v for _, v in card["proxies"]], halves[SCORE][order], rtol=6e-3, atol=1e-4)
    assert [name for name, _ in card["proxies"]] == [survey.proxies[i] for i in order]


def test_neighbours_are_those_of_all_cosines():
    sae = fastsae.SAE(d_in=8, d_sae=60, k=3)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(60, 1) + 0.5)
    w = sae.W_dec.detach().numpy().astype(np.float64)
    cosines = w @ w.T / np.linalg.norm(w, axis=1) / np.linalg.norm(w, axis=1)[:, None]
    np.fill_diagonal(cosines, -2)
    found = neighbours_of(sae, k=4)
    np.testing.assert_array_equal(found.features, np.argsort(-cosines, axis=1)[:, :4])
    np.testing.assert_allclose(found.cosine, -np.sort(-cosines, axis=1)[:, :4], rtol=1e-4, atol=1e-5)


def test_logits_leave_the_padding_of_the_vocabulary_out_and_count_every_token():
    generator = torch.Generator().manual_seed(0)
    sae = fastsae.SAE(d_in=6, d_sae=70, k=3)
    unembedding = torch.randn(40, 5, generator=generator)
    matrix = torch.randn(5, 6, generator=generator)
    found = logits_of(LogitMap(matrix, unembedding), sae, entries=37, k=3)
    direct = (unembedding @ matrix @ sae.W_dec.detach().T).T.numpy()
    direct = (direct - np.sort(direct, axis=1)[:, [19]])[:, :37]  # torch's median of an even number is the lower one
    np.testing.assert_array_equal(found.top, np.argsort(-direct, axis=1)[:, :3])
    np.testing.assert_allclose(found.bottom_values, np.sort(direct, axis=1)[:, :3], rtol=1e-4, atol=1e-5)
    for f in range(70):
        counts, _ = np.histogram(direct[f], 40, (found.low[f], found.high[f]))
        assert found.counts[f].sum() == 37 and np.abs(counts - found.counts[f]).sum() <= 2  # one on an edge
    assert (found.high == direct.max(1)).all() or np.allclose(found.high, direct.max(1), atol=1e-5)


def test_parts_of_different_dictionaries_are_refused(facts: Facts):
    with pytest.raises(FastSAEError, match="the survey is of 10 features, logits of 150"):
        Facts(Cards(site_case.survey(10)), facts.bytes_of, logits=facts.logits)


# --- from a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modelled() -> tuple[Source, Any, Text, Cards]:
    sae, model, tokenizer = analysis_case.case()
    texts = analysis_case.documents()
    source = Source(sae.eval(), model, analysis_case.HOOK)
    text = Text(tokenizer, texts, proxies(("Arabic",)))
    options: dict[str, Any] = {"categories": ("Arabic",), "context": 32, "batch_size": 4, "around": 5}
    (survey,) = take_survey(source, tokenizer, texts, text=text, show_progress=False, **options)
    return source, tokenizer, text, Cards(survey)


@torch.no_grad()
def test_effects_of_windows_are_those_of_the_model_without_the_feature(modelled):
    source, tokenizer, text, cards = modelled
    feature = int(cards.density().argmax())
    found = window_effects(source, tokenizer, text, cards, [feature], n=5)[feature]
    sae, model = source.sae, source.model
    for example, change in zip(cards.top(feature, 5), found, strict=True):
        begin = example.position // 31 * 31
        first, last = text.first[example.document : example.document + 2]
        ids = [tokenizer.bos_token_id, *text.ids[first + begin : min(first + begin + 31, last)].tolist()]
        batch = torch.tensor([ids])
        mlp = model.transformer.h[0].mlp

        def nll(edit: bool, mlp=mlp, batch=batch) -> np.ndarray:
            def hook(_module, _inputs, x):
                f = sae.encode(x)[..., feature, None]
                f[:, 0] = 0  # the begin-of-text token is left alone
                return x - f * sae.W_dec[feature] / sae.input_scale

            handle = mlp.act.register_forward_hook(hook) if edit else None
            logits = model(batch).logits[0].double().log_softmax(-1)
            if handle is not None:
                handle.remove()
            return np.array([0.0, *(-logits[i, batch[0, i + 1]] for i in range(batch.shape[1] - 1))])

        place = 1 + example.position - begin - example.at
        expected = (nll(True) - nll(False))[place : place + len(example.token_ids)]
        np.testing.assert_allclose(change, expected, atol=1e-4)
        assert np.abs(change).max() > 1e-3


def test_the_site_of_a_model(modelled, tmp_path: Path):
    source, tokenizer, text, cards = modelled
    feature = int(cards.density().argmax())
    facts = Facts(
        cards, text.bytes_of, hook=source.hook, neighbours=neighbours_of(source.sae),
        ultra_low=ultra_low_of(source.sae, cards),
        effects=window_effects(source, tokenizer, text, cards, [feature]),
    )  # fmt: skip
    site.write_site(tmp_path, facts, show_progress=False)
    card = site.read_card(tmp_path, feature)
    assert all(len(w["effects"]) == len(w["tokens"]) for w in card["top"])
    assert "effects" not in site.read_card(tmp_path, (feature + 1) % 40)["bottom"]
    # The text of a window is the text of the document around that place, letters whole.
    example = cards.top(feature, 1)[0]
    shown = "".join(t for i, t in enumerate(card["top"][0]["tokens"]) if i not in card["top"][0]["parts"])
    document = analysis_case.documents()[example.document]
    assert re.sub("‹..›", "", shown) in document and len(re.sub("‹..›", "", shown)) >= 3


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_character_in_parts_is_told_once():
    vocabulary = site_case.vocabulary()
    spell = Spelling(vocabulary)
    word = 2 + len(site_case.HOSTILE)
    texts, parts = spell.window(np.array([word, 0, 1, word, 1, 0]))
    assert texts == [" the0", "‹D9›", "ق", " the0", "‹82›", "‹D9›"] and parts == [1]
    assert spell.one(0) == "‹D9›"


def test_four_bytes_in_four_tokens_and_a_token_across_characters():
    pieces = ["🙂".encode()[i : i + 1] for i in range(4)] + [b"a" + "ق".encode()[:1], "ق".encode()[1:] + b"b"]
    spell = Spelling(TokenBytes(np.frombuffer(b"".join(pieces), np.uint8), np.cumsum([0, *map(len, pieces)])))
    texts, parts = spell.window(np.array([0, 1, 2, 3, 4, 5]))
    assert texts[3:] == ["🙂", "a", "قb"] and parts == [0, 1, 2]


@pytest.mark.parametrize("text", site_case.HOSTILE)
def test_hostile_tokens_are_shown_and_hide_nothing(text: str):
    vocabulary = site_case.vocabulary()
    number = 2 + site_case.HOSTILE.index(text)
    shown = Spelling(vocabulary).one(number)
    assert all(c.isprintable() or c == " " for c in shown)
    assert "\x7f" not in shown and "\x80" not in shown and "\u202e" not in shown
    printable = "".join(c for c in text if c.isprintable())
    assert "".join(c for c in shown if c in printable).endswith(printable[-5:])


def test_explanations_come_from_the_results():
    results = {"explain": {"summary": {}, "features": [[3, "digits", 0.5, None]]}}
    assert explanations_of(results) == {3: Explained("digits", 0.5, None)}
    assert explanations_of({"explain": None}) == {}


def test_clusters_of_a_map_of_this_dictionary_alone(facts: Facts):
    assert facts.map is not None
    alone = Facts(
        facts.cards, facts.bytes_of, split=facts.split, layer=1, map=replace(facts.map, layer=np.zeros(F, int))
    )
    assert alone.clusters == {f: int(c) for f, c in enumerate(facts.map.clusters) if c >= 0} == facts.clusters


def test_half_a_surrogate_pair_does_not_stop_a_site(tmp_path: Path):
    facts = site_case.facts(3, explanations={0: Explained("half \ud800 a pair")})
    site.write_site(tmp_path, facts, show_progress=False)
    assert site.read_card(tmp_path, 0)["explanation"]["text"].startswith("half ")


def test_size_of_tens_of_thousands_of_features(tmp_path: Path, monkeypatch):
    """What 32,768 features would take, from 256: under 400 MB."""
    monkeypatch.setattr(data, "WIDE_UP_TO", 0)
    site.write_site(tmp_path, site_case.facts(256, V=50_000), show_progress=False)
    size = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    assert size / 256 * 32_768 < 400e6
