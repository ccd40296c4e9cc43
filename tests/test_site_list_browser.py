"""The list of features in Chromium: searched, sorted, walked through by keys, come back to."""

import pytest

from fastsae.dashboard import data
from fastsae.dashboard.facts import Facts
from tests.browser_case import F, Reader, needs_chromium

pytestmark = needs_chromium


def test_search_sort_and_open(reader: Reader, facts: Facts):
    page = reader.go("#/features")
    assert page.inner_text("[role=status] >> nth=0") == f"{F} features"
    assert page.locator(".row").count() < 60  # only those in view
    page.select_option("#sort", "density")
    density = facts.cards.density()
    first = int(page.inner_text(".row .f >> nth=0"))
    assert density[first] == pytest.approx(density.max(), rel=1e-2)
    page.click(".heads [data-sort=feature]")
    assert [page.inner_text(f".row .f >> nth={i}") for i in range(4)] == ["0", "1", "2", "3"]
    page.fill("#q", "number 27,")
    assert page.locator(".row .f").all_inner_texts() == ["27", "127", "227"]
    page.fill("#q", "LINES  number سجادة")  # in any order, and in capitals
    expected = sum("سجادة" in said for said in data.feature_rows(facts)["explanation"])
    assert page.inner_text("[role=status] >> nth=0") == f"{expected} of {F} features" and expected
    page.fill("#q", "شيء غير موجود")
    assert page.locator(".row").count() == 0 and page.inner_text("[role=status] >> nth=0") == f"0 of {F} features"
    page.fill("#q", "قطة")  # Arabic, in explanations
    texts = [data.feature_rows(facts)["explanation"][f] for f in range(F)]
    tokens = data.feature_rows(facts)["token"]
    expected = sum("قطة" in text or "قطة" in token for text, token in zip(texts, tokens, strict=True))
    assert page.inner_text("[role=status] >> nth=0") == f"{expected} of {F} features"
    page.fill("#q", "27")
    assert page.inner_text(".row .f >> nth=0") == "27"  # the number itself first
    page.click(".row a >> nth=0")
    page.wait_for_selector("h1:has-text('Feature 27')")
    page.go_back()
    page.wait_for_selector("h1:has-text('Features')")
    assert page.input_value("#q") == "27"


def test_the_list_by_keys_and_to_its_end(reader: Reader):
    page = reader.go("#/features?sort=feature&down=0")
    page.focus(".scroller")
    page.keyboard.press("End")
    page.wait_for_selector(f".row.focused:has-text('{F - 1}')")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"h1:has-text('Feature {F - 2}')")


def test_a_screen_reader_is_told_which_row_the_arrow_keys_reach(reader: Reader):
    page = reader.go("#/features?sort=feature&down=0")
    page.focus(".scroller")
    here = "document.getElementById(document.querySelector('.scroller').getAttribute('aria-activedescendant'))"
    for key, row in (("ArrowDown", 1), ("ArrowDown", 2), ("End", F - 1), ("ArrowUp", F - 2)):
        page.keyboard.press(key)
        page.wait_for_selector(f".row.focused:has-text('{row}')")
        found = page.evaluate(f"(it => [it.role, it.ariaSelected, it.ariaPosInSet, it.href])({here})")
        assert found[:3] == ["option", "true", str(row + 1)] and found[3].endswith(f"#/feature/{row}")
        assert page.locator("[aria-selected]").count() == 1
    page.evaluate("document.querySelector('.scroller').scrollTop = 0")
    page.wait_for_selector(".scroller:not([aria-activedescendant])")  # its row is no element now


def test_who_goes_back_to_the_list_finds_it_as_it_was(reader: Reader):
    page = reader.go("#/features?sort=feature&down=0")
    page.fill("#q", "number")
    page.evaluate("document.querySelector('.scroller').scrollTop = 4000")
    row = page.locator(".row a", has_text="number 95,")
    row.click()
    page.wait_for_selector("h1:has-text('Feature 95')")
    page.go_back()
    page.wait_for_selector("h1:has-text('Features')")
    assert page.evaluate("document.querySelector('.scroller').scrollTop") == 4000 and row.is_visible()
    assert page.input_value("#q") == "number" and page.input_value("#sort") == "feature"
    page.focus(".scroller")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"h1:has-text('Feature {F - 1}')")
    page.go_back()
    page.wait_for_selector(f".scroller:focus .row.focused:has-text('{F - 1}')")  # the keys go on from there
    page.goto(reader.address + "#/features?sort=feature")
    page.wait_for_selector(f".row:has-text('{F - 1}')")
    assert page.evaluate("document.querySelector('.scroller').scrollTop") == 0  # a visit of its own


def test_a_search_that_finds_nothing_says_where_it_looked(reader: Reader):
    page = reader.go("#/features?q=" + "nowhere")
    assert page.locator(".row").count() == 0
    assert "not examples" in page.inner_text(".scroller + .note")
    page.fill("#q", "")
    assert not page.is_visible(".scroller + .note")
    for asked in ("27", "feature 27", "#27"):
        page.fill("#jump input", asked)
        page.press("#jump input", "Enter")
        page.wait_for_selector("h1:text-is('Feature 27')")
        page = reader.go("#/features")
