"""The site in Chromium, from the disk and from a plain server: what a reader does, and that nothing complains."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench import site_case
from fastsae.dashboard import data, site
from fastsae.dashboard.facts import Facts
from tests import browser_case
from tests.browser_case import F, Reader, needs_chromium

pytestmark = needs_chromium
PAGES = ("#/", "#/features", "#/feature/7", "#/feature/49", "#/compare", "#/live", "#/feature/99999", "#/nowhere")


@pytest.fixture(scope="module")
def served(report: Path) -> Iterator[str]:
    yield from browser_case.plainly_served(report)


@pytest.mark.parametrize("from_disk", [True, False], ids=["disk", "server"])
def test_every_page_opens_without_a_complaint(browser, report, served, from_disk):
    reader = Reader(browser, (report / "index.html").as_uri() if from_disk else served)
    for route in PAGES:
        page = reader.go(route)
        reader.draw_all()
        assert page.evaluate("document.querySelectorAll('main .chart:not(:has(.main-svg))').length") == 0, route
    reader.context.close()
    assert reader.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(browser, report, dark):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    for width in (1280, 400):
        # The page forbids inline scripts, and axe is one.
        reader = Reader(browser, (report / "index.html").as_uri(), width=width, dark=dark, bypass_csp=True)
        for route in PAGES:
            page = reader.go(route)
            reader.draw_all()
            found = axe.Axe().run(page).response["violations"]
            serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
            assert serious == [], (route, width)
        reader.context.close()


@pytest.mark.parametrize("route", PAGES)
def test_a_telephones_width_is_enough(browser, report, route):
    reader = Reader(browser, (report / "index.html").as_uri(), width=400)
    page = reader.go(route)
    reader.draw_all()
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    reader.context.close()


def test_the_overview_draws_densities_map_and_splitting(reader: Reader, facts: Facts):
    page = reader.go("#/")
    assert "Too rare in one half of the text to be looked at: hex <b> (3 and 1,200 tokens)." in page.inner_text("main")
    assert page.text_content("h1") == f"{F} features of model.layers.3.mlp"
    reader.draw_all()
    drawn = page.evaluate("""() => {
        const canvas = document.querySelector('canvas.map');
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return pixels.filter((v, i) => i % 4 === 3 && v > 0).length;
    }""")
    assert drawn > F  # pixels
    fills = "(all) => all.filter((p) => p.getBoundingClientRect().height > 0).map((p) => getComputedStyle(p).fill)"
    painted = page.locator("[aria-label='Histogram of feature densities'] .bars path").evaluate_all(fills)
    hot, bar = "rgb(213, 94, 0)", "rgb(74, 127, 165)"
    low, healthy = (data.density_histogram(facts)[name] for name in ("ultra_low", "healthy"))
    assert (painted.count(hot), painted.count(bar)) == (sum(map(bool, low)), sum(map(bool, healthy)))
    page.click("figure:has([aria-label='Histogram of feature densities']) summary")
    rows = page.locator("section:has-text('How often features fire') tbody tr")
    total = sum(int(rows.nth(i).locator("td").nth(1).inner_text()) for i in range(rows.count()))
    assert total == sum(healthy)
    assert page.locator(".splitting option").count() == F // 4


def test_a_map_that_is_used_by_keys_opens_a_feature(reader: Reader):
    page = reader.go("#/")
    reader.draw_all()
    page.focus("canvas.map")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    number = page.inner_text("#tip").split()[1]
    page.keyboard.press("Enter")
    page.wait_for_selector(f"h1:has-text('Feature {number}')")


def test_the_map_zooms_with_ctrl_and_lets_the_page_scroll_without(reader: Reader):
    page = reader.go("#/")
    reader.draw_all()
    canvas = page.locator("canvas.map")
    canvas.scroll_into_view_if_needed()
    pixels = "(canvas) => canvas.toDataURL()"
    before, top = canvas.evaluate(pixels), page.evaluate("scrollY")
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 5, box["y"] + 150)  # where no feature is, so none gets its ring
    page.mouse.wheel(0, -100)
    page.wait_for_timeout(200)
    assert canvas.evaluate(pixels) == before and page.evaluate("scrollY") < top
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_timeout(200)
    assert canvas.evaluate(pixels) != before


def test_a_feature_shows_the_card(reader: Reader, facts: Facts):
    page = reader.go("#/feature/7")
    card = data.feature_card(facts, 7)
    lines = page.locator(".windows >> nth=0 >> .window")
    assert lines.count() == 20 == page.locator(".windows >> nth=-1 >> .window").count()
    for n in (0, 5, 19):
        window = card["top"][n]
        whole = "".join(t for i, t in enumerate(window["tokens"]) if i not in window["parts"])
        assert lines.nth(n).text_content().removeprefix("◌") == whole
    value = card["top"][3]["activations"][card["top"][3]["at"]]
    lines.nth(3).focus()
    assert float(page.inner_text("#tip")) == pytest.approx(value, rel=0.01)
    assert page.locator(".windows").count() == 2 + sum(bool(part["windows"]) for part in card["intervals"])
    shown = [text.replace("−", "-") for text in page.locator(".pair .facts >> nth=0").locator("li").all_inner_texts()]
    weights = [weight for _, weight in card["logits"]["top"]]
    assert [float(text.split("\n")[-1]) for text in shown] == pytest.approx(weights, abs=6e-3)
    assert f"feature {card['match']['feature']}" in page.inner_text("aside")


def test_arrow_keys_move_through_a_window_the_way_it_is_read(reader: Reader, facts: Facts):
    page = reader.go("#/feature/7")
    directions = page.locator(".window").evaluate_all("(all) => all.map((p) => p.dir)")
    assert {"rtl", "ltr"} <= set(directions)
    line = page.locator(".window").nth(directions.index("rtl"))
    line.focus()
    here = "(p) => [...p.children].findIndex((span) => span.hasAttribute('data-here'))"
    before = line.evaluate(here)
    page.keyboard.press("ArrowLeft")
    assert line.evaluate(here) == before + 1
    page.keyboard.press("Escape")
    assert line.evaluate(here) == -1 and not page.is_visible("#tip")


def test_hostile_tokens_show_as_themselves(reader: Reader):
    page = reader.go("#/feature/0")
    seen = ""
    for f in range(12):
        page.goto(f"{reader.address}#/feature/{f}")
        page.wait_for_selector(f"h1:has-text('Feature {f}')")
        seen += page.inner_text("main")
        assert page.evaluate("document.querySelectorAll('main script, main img, main b').length") == 0
    for token in ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;", "<b>lines</b>", "‹U+202E›"):
        assert token in seen


@pytest.mark.parametrize("route", [
    "#/feature/<img src=x onerror=alert(1)>", "#/feature/1e3", "#/feature/-1", "#/feature/",
    "#/feature/../../etc/passwd", "#/constructor", "#/__proto__/1",
    "#/features?q=<script>alert(1)</script>&sort=__proto__&cluster=x&proxy=<b>",
])  # fmt: skip
def test_addresses_that_mean_nothing(reader: Reader, route: str):
    page = reader.go(route)
    assert page.locator("main h1").count() == 1
    assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0


def test_light_and_dark(browser, report):
    colours = {}
    for dark in (False, True):
        reader = Reader(browser, (report / "index.html").as_uri(), dark=dark)
        page = reader.go("#/feature/7")
        colours[dark] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        colours["after", dark] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.reload()
        page.wait_for_selector("main h1")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours["after", dark]
        reader.context.close()
    assert colours[False] == colours["after", True] != colours[True] == colours["after", False]


def test_a_file_that_was_not_copied_is_named(browser, report, tmp_path):
    shutil.copytree(report, tmp_path / "copy")
    (tmp_path / "copy" / "data" / "cards-0.js").unlink()
    reader = Reader(browser, (tmp_path / "copy" / "index.html").as_uri())
    page = reader.go("#/feature/3")
    assert "data/cards-0.js is missing" in page.inner_text("[role=alert]")
    reader.context.close()


def test_a_file_that_was_cut_short_is_named(browser, report, tmp_path):
    shutil.copytree(report, tmp_path / "copy")
    data_of = tmp_path / "copy" / "data"
    whole = (data_of / "cards-0.js").read_text(encoding="utf-8")
    (data_of / "cards-0.js").write_text(whole[: len(whole) // 2], encoding="utf-8")
    other = (data_of / "cards-2.js").read_text(encoding="utf-8").replace('"cards-2"', '"cards-1"', 1)
    (data_of / "cards-1.js").write_text(other, encoding="utf-8")
    reader = Reader(browser, (tmp_path / "copy" / "index.html").as_uri())
    page = reader.go("#/feature/200")
    for f, message in ((3, "data/cards-0.js is damaged"), (64, "data/cards-1.js does not hold feature 64")):
        page.goto(f"{reader.address}#/feature/{f}")
        page.wait_for_selector(f"[role=alert]:has-text('{message}')", timeout=5000)
    (data_of / "cards-0.js").write_text(whole, encoding="utf-8")
    page.goto(f"{reader.address}#/feature/4")  # mended: asked for again
    page.wait_for_selector("h1:has-text('Feature 4')")
    reader.context.close()


def test_the_last_few_files_of_cards_are_kept(browser, facts, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "_CARDS", 16)
    site.write_site(tmp_path, facts, show_progress=False)
    reader, asked = Reader(browser, (tmp_path / "index.html").as_uri()), []
    reader.page.on("request", lambda request: asked.append(request.url.rsplit("/", 1)[1]))
    page = reader.go("#/features")

    def look(file: int) -> list[str]:
        asked.clear()
        page.goto(f"{reader.address}#/feature/{16 * file}")
        page.wait_for_selector(f"h1:has-text('Feature {16 * file}')")
        return [name for name in asked if not name.startswith("plotly")]

    for file in range(13):
        assert look(file) == [f"cards-{file}.js"]
    assert look(1) == [] == look(12) and look(13) == ["cards-13.js"]
    assert look(1) == [] and look(2) == ["cards-2.js"]  # of those kept, 2 was looked at longest ago
    asked.clear()
    page.goto(reader.address + "#/features")
    page.wait_for_selector(".row")
    assert asked == []
    assert page.locator("head script[src^='data/cards']").count() == 0
    reader.context.close()
    assert reader.complaints == []


def test_pages_that_went_are_let_go_of(reader: Reader):
    page = reader.go("#/feature/0")
    devtools = page.context.new_cdp_session(page)

    def nodes() -> int:
        devtools.send("HeapProfiler.collectGarbage")
        return devtools.send("Memory.getDOMCounters")["nodes"]

    page.wait_for_selector(".chart .main-svg").dispose()
    first = nodes()
    for f in range(1, 12):
        page.evaluate(f"location.hash = '#/feature/{f}'")
        page.wait_for_selector(f"h1:text-is('Feature {f}')").dispose()  # a handle would hold the page
        page.wait_for_selector(".chart .main-svg").dispose()
    assert nodes() < 5 * first


def test_charts_and_map_follow_light_and_dark(reader: Reader):
    page = reader.go("#/feature/7")
    page.wait_for_selector(".chart .main-svg")
    fill = "getComputedStyle(document.querySelector('.chart .bars path')).fill"
    before = page.evaluate(fill)
    page.click("#theme")
    page.wait_for_timeout(300)
    assert page.evaluate(fill) != before
    reader.go("#/")
    reader.draw_all()
    picture = "document.querySelector('canvas.map').toDataURL()"
    before = page.evaluate(picture)
    page.click("#theme")
    page.wait_for_timeout(100)
    assert page.evaluate(picture) != before


def test_a_page_that_comes_late_does_not_cover_the_one_asked_for_after_it(browser, served):
    reader, held = Reader(browser, served), []
    reader.page.route("**/cards-0.js", lambda route: held.append(route))
    page = reader.go("#/features")
    page.click("[data-sort=density]")
    address = page.evaluate("location.hash")
    page.evaluate("location.hash = '#/feature/3'")
    page.fill("#q", "cat")  # the list is still to be seen, its address is not its own any more
    assert page.evaluate("location.hash") == "#/feature/3"
    page.evaluate("location.hash = '#/feature/200'")
    page.wait_for_selector("h1:has-text('Feature 200')")
    (late,) = held
    late.continue_()
    page.wait_for_timeout(300)
    assert page.text_content("h1") == "Feature 200" == page.title()
    page.go_back()
    page.wait_for_selector("h1:text-is('Feature 3')")
    page.go_back()
    page.wait_for_selector("h1:has-text('Features')")
    assert page.evaluate("location.hash") == address
    reader.context.close()
    assert reader.complaints == []


def test_a_feature_without_ablation_says_so(browser, tmp_path):
    few = site_case.facts(60)
    windows = [np.linspace(-1, 1, len(example.token_ids)) for example in few.cards.top(7, data.TOP)]
    few.effects[7] = windows
    site.write_site(tmp_path, few, show_progress=False)
    reader = Reader(browser, (tmp_path / "index.html").as_uri())
    words = "Ablation was not measured for this feature."
    assert words not in reader.go("#/feature/7").inner_text("main")
    assert reader.page.locator(".choice button").count() == 2
    reader.page.goto(reader.address + "#/feature/8")
    reader.page.wait_for_selector("h1:has-text('Feature 8')")
    assert words in reader.page.inner_text("main") and reader.page.locator(".choice button").count() == 0
    reader.context.close()


def test_the_map_is_coloured_by_cluster_density_or_category(reader: Reader, facts: Facts):
    page = reader.go("#/")
    reader.draw_all()
    pictures = []
    for name in ("cluster", "density", "category"):
        page.select_option("#map-colour", name)
        pictures.append(page.evaluate("document.querySelector('canvas.map').toDataURL()"))
        assert page.locator(".clusters .tag").count() > 0
    assert len(set(pictures)) == 3
    columns = data.feature_map(facts)
    assert columns is not None
    assert columns["category"] == [None if p < 0 else p for p in facts.best_proxy.tolist()]
    followed = sum(r is not None and r >= 0.2 for r in columns["r"])
    told = [int(text.rsplit(": ", 1)[1]) for text in page.locator(".clusters .tag").all_inner_texts()]
    assert sum(told) == followed
    page.locator(".clusters .tag").first.click()
    page.wait_for_selector("#proxy")
    assert page.locator("#proxy").input_value() in facts.cards.survey.proxies
