"""What a reader of the site waits for, in milliseconds, in a headless Chromium that playwright drives.

Every measurement begins in a new context, whose caches are empty. A page counts as there when what it is for has come
into the document and two frames have begun since: it has been painted then.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

# In every page before its own scripts. `until` looks again at each change of the document, not at intervals.
_SCRIPT = """(() => {
  const painted = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const until = (there) => new Promise((done, fail) => {
    const watcher = new MutationObserver(look);
    const late = setTimeout(() => { watcher.disconnect(); fail(new Error("it did not come in 60 s")); }, 60000);
    watcher.observe(document, { childList: true, subtree: true });
    look();
    function look() { if (there()) { watcher.disconnect(); clearTimeout(late); done(); } }
  });
  /** ms from `act` until what was promised has been painted. */
  const timed = async (act, there) => {
    const start = performance.now();
    act();
    await there;
    await painted();
    return performance.now() - start;
  };
  const since = (there) => until(there).then(painted).then(() => performance.now());  // the address was asked for
  const heading = () => document.querySelector("main h1");
  const strongest = (f) => heading()?.textContent === `Feature ${f}` && document.querySelector("main .windows .window");
  const redrawn = () => new Promise((done, fail) => {
    const late = setTimeout(() => fail(new Error("the list was not drawn again in 60 s")), 60000);
    new MutationObserver((changes, watcher) => {
      if (!changes.some(({ target }) => target.matches?.(".rows"))) return;
      watcher.disconnect();
      clearTimeout(late);
      done();
    }).observe(document.querySelector("main"), { childList: true, subtree: true });
  });
  const changed = (selector, value, event) => timed(() => {
    const control = document.querySelector(selector);
    control.value = value;
    control.dispatchEvent(new Event(event, { bubbles: true }));
  }, redrawn());
  window.bench = {
    overview: since(heading),
    opened: (f) => since(() => strongest(f)),
    firstPaint: () => new Promise((done) => new PerformanceObserver((list) => {
      const [entry] = list.getEntriesByName("first-contentful-paint");
      if (entry) done(entry.startTime);
    }).observe({ type: "paint", buffered: true })),
    feature: (f) => timed(() => { location.hash = `#/feature/${f}`; }, until(() => strongest(f))),
    list: () => timed(() => { location.hash = "#/features"; }, until(() => document.querySelector("main .rows .row"))),
    search: (text) => changed("#q", text, "input"),
    sort: (name) => changed("#sort", name, "change"),
  };
})();"""

Times = dict[str, list[float]]


def missing() -> str | None:
    """What is not installed that this needs, and how to get it, in one line; None where all is there."""
    if find_spec("playwright") is None:
        return "playwright is missing: pip install 'fastsae[dev]'"
    if chromium() is None:
        return "there is no chromium on the PATH: apt install chromium"
    return None


def chromium() -> str | None:
    """The browser of the system; none is downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def started() -> Iterator[Any]:
    """A browser that has opened an empty page already: its own start is not the site's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        browser.new_context().new_page().goto("about:blank")
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, rest: bool = True) -> Iterator[Any]:
    """A page in a context of its own. rest: what it loads later has been loaded too. Raises RuntimeError at the end
    where the page complained."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, complaints = context.new_page(), []
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.add_init_script(_SCRIPT)
    page.goto(address)
    page.evaluate("bench.overview")
    if rest:
        page.wait_for_load_state("networkidle")
    yield page
    context.close()
    if complaints:
        raise RuntimeError(f"{address} complains: {complaints[0]}")


def overview(browser: Any, address: str, rounds: int) -> Times:
    """first paint: of anything. overview: of its heading, with what stands below it."""
    times: Times = {"first paint": [], "overview": []}
    for _ in range(rounds):
        with opened(browser, address, rest=False) as page:
            times["first paint"].append(page.evaluate("bench.firstPaint()"))
            times["overview"].append(page.evaluate("bench.overview"))
    return times


def features(browser: Any, address: str, numbers: list[list[int]]) -> Times:
    """feature page: from a page that is open to the strongest example of another feature; those of each list in one
    context, one after another. feature page, opened first: the first of each list by its address, in a new context."""
    times: Times = {"feature page": [], "feature page, opened first": []}
    for some in numbers:
        with opened(browser, address) as page:
            times["feature page"] += [page.evaluate("(f) => bench.feature(f)", f) for f in some]
        with opened(browser, f"{address}#/feature/{some[0]}", rest=False) as page:
            times["feature page, opened first"].append(page.evaluate("(f) => bench.opened(f)", some[0]))
    return times


def lists(browser: Any, address: str, rounds: int, searches: dict[str, int], sorts: dict[str, list[int]]) -> Times:
    """list: from the overview to its rows. search, sort: until the rows are the new ones.

    searches: text → how many features it finds; never two that find nothing in a row, as no row would change. sorts:
    column → the features that may stand first, none where that is the browser's to say (texts). Raises RuntimeError
    where the list shows something else: what is wrong is not timed.
    """
    times: Times = {"list": [], "search": [], "sort": []}
    for _ in range(rounds):
        with opened(browser, address) as page:
            times["list"].append(page.evaluate("bench.list()"))
            for name, first in sorts.items():
                times["sort"].append(page.evaluate("(name) => bench.sort(name)", name))
                shown = int(page.inner_text(".row .f >> nth=0"))
                if first and shown not in first:
                    raise RuntimeError(f"sorted by {name}, the list begins with {shown}, not with one of {first[:5]}")
            for text, found in searches.items():
                times["search"].append(page.evaluate("(text) => bench.search(text)", text))
                said = page.inner_text("main [role=status] >> nth=0")
                if int(said.split()[0].replace(",", "")) != found:
                    raise RuntimeError(f"a search for {text!r} says {said!r}, {found} was expected")
    return times


def heap(browser: Any, address: str, numbers: list[int]) -> tuple[float, float]:
    """MB of JavaScript's heap that are in use on the overview, and after the pages of so many features."""
    with opened(browser, address) as page:
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")

        def used() -> float:
            session.send("HeapProfiler.collectGarbage")
            metrics = session.send("Performance.getMetrics")["metrics"]
            return next(one["value"] for one in metrics if one["name"] == "JSHeapUsedSize") / 1e6

        before = used()
        for f in numbers:
            page.evaluate("(f) => bench.feature(f)", f)
        return before, used()
