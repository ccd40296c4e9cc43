"""The live page in Debian's Chromium, on a server that runs: what a reader does, and that nothing complains.

Needs playwright and a chromium on the PATH (apt install chromium); skipped where one is missing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from bench import site_case
from fastsae.dashboard import site
from fastsae.dashboard.server import create_app
from tests.browser_case import Reader, needs_chromium, reading
from tests.test_serve import dense

uvicorn = pytest.importorskip("uvicorn")
pytestmark = needs_chromium
TABS = ("", "/steer", "/proxy", "/compare")


def serving(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def served(folder: Path, live: Any) -> Iterator[str]:
    yield from serving(create_app(folder, live))


@pytest.fixture
def reader(browser: Any, served: str) -> Iterator[Reader]:
    yield from reading(browser, served)


def read(page: Any, text: str) -> None:
    page.fill("textarea", text)
    page.click("button.primary")
    page.wait_for_selector(".reading")


def test_a_text_in_two_scripts_shows_what_fires(reader: Reader):
    page = reader.go("#/live")
    text = "the cat قطة"
    read(page, text)
    assert page.text_content(".reading") == text  # each letter is two tokens, shown as one
    f = dense(text)
    assert f"{int((f > 0).any(0).sum())} features fire" in page.text_content(".live h2 >> nth=-1")
    chosen = int(page.text_content("tr[data-chosen] th"))
    shaded = page.eval_on_selector_all(".reading span", "all => all.map((one) => one.classList.contains('on'))")
    on = f[:, chosen] > 0
    assert shaded == on[:8].tolist() + on[8:].reshape(-1, 2).any(1).tolist()
    page.click("tbody tr:nth-child(3) button")
    other = int(page.text_content("tr[data-chosen] th"))
    assert other != chosen
    page.hover(".reading span >> nth=0")
    assert page.text_content("#tip").startswith(f"feature {other}: ")
    page.focus(".reading")
    page.keyboard.press("ArrowRight")
    assert page.text_content("aside h2").strip() == "On h"
    strongest = int(f[1].argmax())
    assert page.text_content("aside li a") == f"feature {strongest}"
    page.click("aside li a")
    page.wait_for_selector(f"h1:has-text('Feature {strongest}')")


def test_hostile_text_shows_as_itself(reader: Reader):
    page = reader.go("#/live")
    text = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    read(page, text)
    assert page.text_content(".reading") == text
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    page.fill("textarea", "")
    page.click("button.primary")
    assert "at least 1" in page.text_content("[role=alert]")
    reader.complaints = [c for c in reader.complaints if "422" not in c]  # Chromium tells of every refusal


def test_steering_from_a_feature_s_page(reader: Reader):
    page = reader.go("#/feature/7")
    assert "null" not in page.text_content("main")
    page.click("text=Pin it or switch it off")
    page.wait_for_selector(".edits")
    assert page.locator(".edits li").count() == 1 and page.input_value(".edits input >> nth=0") == "7"
    page.fill("textarea", "the <b>cat</b>")
    page.fill("label:has-text('tokens') input", "12")
    page.click("text=another feature")
    page.fill(".edits li:last-child input >> nth=0", "9")
    page.select_option(".edits li:last-child select", "ablate")
    page.click("text=Write")
    page.wait_for_selector(".texts")
    assert page.locator(".written").count() == 4
    assert page.text_content(".texts h2 >> nth=1").endswith(", 9 off")
    assert all(words.startswith("the <b>cat</b>") for words in page.locator(".written").all_text_contents())
    assert page.locator(".written b").count() == 4  # ours, around the prompt


def test_a_row_without_a_number_makes_way_for_the_feature_that_is_brought(reader: Reader):
    page = reader.go("#/live/steer")
    assert page.input_value(".edits input >> nth=0") == ""
    page.select_option(".edits select >> nth=0", "add")
    reader.go("#/feature/7")
    page.click("text=Pin it or switch it off")
    page.wait_for_selector(".edits")
    assert [field.input_value() for field in page.locator(".edits label input").all()] == ["7"]
    page.evaluate("location.hash = '#/live/steer?features=9'")
    page.wait_for_selector(".edits li:nth-child(2)")
    assert [field.input_value() for field in page.locator(".edits label input").all()] == ["7", "9"]


def test_a_feature_that_never_fired_takes_a_value(reader: Reader, live: Any):
    page = reader.go("#/live/steer?features=3")
    highest, live.maximum[3] = float(live.maximum[3]), 0.0
    try:
        page.fill("label:has-text('tokens') input", "4")
        page.click("text=Write")
        page.wait_for_selector("[role=alert]:has-text('give a value, not a multiple')")
        page.select_option("select[aria-label=in]", "value")
        page.fill("input[aria-label=activation]", "1.5")
        page.click("text=Write")
        page.wait_for_selector(".texts")
        assert page.text_content(".texts h2 >> nth=1") == "Feature 3 at 1.50"
        page.select_option(".edits select >> nth=0", "ablate")
        assert not page.is_visible("select[aria-label=in]")
    finally:
        live.maximum[3] = highest
    reader.complaints = [c for c in reader.complaints if "400" not in c]


def test_steering_after_a_proxy_was_scored(reader: Reader):
    page = reader.go("#/live/proxy")
    page.fill("input[list]", "Arabic")
    page.click("text=Score every feature")
    page.wait_for_selector("tbody")
    page.evaluate("location.hash = '#/live/steer?features=3'")
    page.fill("label:has-text('tokens') input", "4")
    page.click("text=Write")
    page.wait_for_selector(".texts")


def test_a_double_click_asks_once(reader: Reader):
    asked: list[str] = []
    reader.page.on("request", lambda it: asked.append(it.url) if it.method == "POST" else None)
    page = reader.go("#/live/steer?features=3")
    page.fill("label:has-text('tokens') input", "4")
    page.dblclick("text=Write")
    page.wait_for_selector(".texts")
    page.evaluate("for (const _ of [1, 2, 3]) document.querySelector('main form').requestSubmit()")
    page.wait_for_selector("button.primary:enabled")
    assert len(asked) == 2
    page = reader.go("#/live")
    page.fill("textarea", "the cat")
    page.evaluate("document.querySelector('main form').requestSubmit()")
    page.press("textarea", "Control+Enter")
    page.wait_for_selector(".reading")
    assert len(asked) == 3


def test_a_job_whose_number_comes_late_is_cancelled(reader: Reader, live: Any):
    held: list[Any] = []
    page = reader.go("#/live/steer?features=3")
    page.route("**/api/steer", lambda route: held.append(route) if not held else route.continue_())
    page.fill("label:has-text('tokens') input", "4")
    page.click("text=Write")
    page.evaluate("location.hash = '#/live'")
    page.wait_for_selector(".tabs [aria-current]:text-is('Read a text')")
    page.evaluate("location.hash = '#/live/steer'")
    page.wait_for_selector(".progress")
    page.click("text=Write")
    page.wait_for_selector(".texts")
    with page.expect_request(lambda it: it.method == "DELETE"):
        held[0].continue_()
    assert page.is_visible(".texts")


def test_the_answer_to_the_last_text_stays(reader: Reader):
    held: list[Any] = []
    page = reader.go("#/live")
    page.route("**/api/activations", lambda route: held.append(route) if not held else route.continue_())
    page.fill("textarea", "the red ball")
    page.click("button.primary")
    page.evaluate("location.hash = '#/live/steer'")
    page.wait_for_selector(".edits")
    page.evaluate("location.hash = '#/live'")
    page.wait_for_selector("textarea[aria-label='Text to read']")
    read(page, "a cat")
    with page.expect_response("**/api/activations"):
        held[0].continue_()
    page.wait_for_timeout(200)
    assert page.text_content(".reading") == "a cat"
    page.evaluate("location.hash = '#/live/steer'")
    page.wait_for_selector(".edits")
    page.evaluate("location.hash = '#/live'")
    page.wait_for_selector(".reading")
    assert page.text_content(".reading") == "a cat"  # at the next visit too


def test_a_poll_that_fails_is_tried_again(reader: Reader, live: Any):
    failed: list[Any] = []

    def fail_twice(route: Any) -> None:
        failed.append(route)
        if len(failed) in (2, 3):
            route.abort()
        else:
            route.continue_()

    slow = live.source.model.register_forward_hook(lambda *_: time.sleep(0.03))
    try:
        page = reader.go("#/live/steer?features=3")
        page.route("**/api/jobs/*", fail_twice)
        page.fill("label:has-text('tokens') input", "40")
        page.click("text=Write")
        page.wait_for_selector("text=asking again")
        page.wait_for_selector(".texts")
    finally:
        slow.remove()
    assert len(failed) > 3
    reader.complaints = [c for c in reader.complaints if "ERR_FAILED" not in c]


def test_a_long_job_shows_its_progress_is_cancelled_and_survives_a_visit_elsewhere(reader: Reader, live: Any):
    slow = live.source.model.register_forward_hook(lambda *_: time.sleep(0.03))
    try:
        page = reader.go("#/live/steer")
        page.fill(".edits input >> nth=0", "0")
        page.fill("label:has-text('tokens') input", "200")
        page.click("text=Write")
        page.wait_for_selector("progress[value]")
        reader.go("#/features")
        page = reader.go("#/live/steer")
        page.click("text=Cancel")
        page.wait_for_selector("text=Cancelled.")
    finally:
        slow.remove()


def test_proxies_and_comparison(reader: Reader):
    page = reader.go("#/live/proxy")
    page.fill("input[list]", "vowels=regex:[aeiou]")
    page.click("text=Score every feature")
    page.wait_for_selector("tbody")
    assert page.text_content("section h2").startswith("vowels: ") and page.locator("tbody tr").count() == 20
    page.fill("input[list]", "Thai")
    page.click("text=Score every feature")
    page.wait_for_selector("text=tokens belong to Thai")
    page = reader.go("#/live/compare")
    page.click("button.primary")
    page.wait_for_selector("tbody")
    assert page.text_content("section h2").startswith("Median r ") and page.locator("tbody tr").count() == 40


def test_the_list_of_features_is_sorted_by_a_score(reader: Reader, served: str):
    page = reader.go("#/live/proxy")
    page.fill("input[list]", "vowels=regex:[aeiou]")
    page.click("text=Score every feature")
    page.click("text=All features by this score")
    page.wait_for_selector(".row")
    asked = {"sort": "proxy:vowels", "descending": "true"}
    rows = page.request.get(f"{served}api/features", params=asked).json()["rows"]
    shown = [(str(row["feature"]), f"vowels {row['proxy:vowels']:.2f}".replace("-", "−")) for row in rows[:10]]
    for again in (False, True):  # after a reload the server still knows
        if again:
            page.reload()
            page.wait_for_selector(".row")
        assert page.input_value("#sort") == "proxy:vowels"
        assert page.locator(".row .f").all_inner_texts()[:10] == [f for f, _ in shown]
        scores = [" ".join(text.split()) for text in page.locator(".row .proxy").all_inner_texts()[:10]]
        assert scores == [r for _, r in shown] and "false" not in page.inner_text("main")
    page.click("[data-sort=score]")  # the head of this column
    assert page.inner_text(".row .f >> nth=0") == str(rows[-1]["feature"])
    page.evaluate("location.hash = '#/features?sort=proxy:sheep'")
    page.wait_for_selector("text=There are no scores of sheep here any more")
    reader.complaints = [c for c in reader.complaints if "404" not in c]


def test_the_page_and_the_api_find_the_same(browser: Any, tmp_path: Path):
    site.write_site(tmp_path, site_case.facts(150), show_progress=False)
    for address in serving(create_app(tmp_path, None)):
        reader = Reader(browser, address)
        page = reader.go("#/features?sort=density&down=1")
        numbers = ("17", "1", "007", "149", "150", "9" * 40, "number 17,", "17 cat")
        for text in (*numbers, "LINES cat", "cat lines", "قطة", "ara", "<b>", " "):
            page.fill("#q", text)
            asked = {"search": text, "sort": "density", "descending": "true", "limit": "150"}
            found = page.request.get(f"{address}api/features", params=asked).json()
            total = page.inner_text("main [role=status] >> nth=0").split(" ")[0]
            assert total == str(found["total"]), text
            first = [str(row["feature"]) for row in found["rows"][:8]]
            assert page.locator(".row .f").all_inner_texts()[:8] == first, text
        reader.context.close()
        assert reader.complaints == []


def test_without_a_model_it_says_why(browser: Any, folder: Path):
    for address in serving(create_app(folder, None, note="the model moved out")):
        reader = Reader(browser, address)
        page = reader.go("#/live")
        assert page.text_content(".note") == "the model moved out"
        assert page.locator("textarea").count() == 0
        page = reader.go("#/live/proxy")  # of which the report answers some
        assert "false" not in page.text_content("main")
        page.fill("input[list]", "Arabic")
        page.click("text=Score every feature")
        page.wait_for_selector("tbody")
        reader.context.close()
        assert reader.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_a_telephone_is_wide_enough(browser: Any, served: str, scheme: Any):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    for width in (1280, 400):
        # The page forbids inline scripts, and axe is one.
        reader = Reader(browser, served, width=width, color_scheme=scheme, bypass_csp=True)
        for tab in TABS:
            page = reader.go(f"#/live{tab}")
            if tab == "":
                read(page, "the cat قطة sat")
            elif tab == "/compare":
                page.click("button.primary")
                page.wait_for_selector("tbody")
            assert page.evaluate("document.documentElement.scrollWidth") == width, tab
            found = axe.Axe().run(page).response["violations"]
            serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
            assert serious == [], (tab, width)
        reader.context.close()
