"""Pages in Debian's Chromium, for the tests of the site and of the server: needs playwright (in the extra dev) and a
chromium on the PATH (apt install chromium); skipped where one is missing.
"""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import site_case
from bench.browse import missing
from fastsae.dashboard.facts import Facts

needs_chromium = pytest.mark.skipif(missing() is not None, reason=str(missing()))
F = 300


class Reader:
    """A page, and what it complained of. address: what stands before the route."""

    def __init__(self, browser: Any, address: str, width: int = 1280, dark: bool = False, **options: Any) -> None:
        options = {"color_scheme": "dark" if dark else "light", **options}
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page, self.address, self.complaints = self.context.new_page(), address, []
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", lambda d: (self.complaints.append(d.message), d.dismiss()))
        self.page.on("request", self._ask)

    def _ask(self, request: Any) -> None:
        if not request.url.startswith((self.address.rsplit("/", 1)[0], "data:")):
            self.complaints.append(f"asked for {request.url}")

    def go(self, route: str) -> Any:
        self.page.goto(self.address + route)
        self.page.wait_for_selector("main h1")
        return self.page

    def draw_all(self) -> None:
        """Scrolls through, as charts are drawn when they come near."""
        for _ in range(12):
            self.page.mouse.wheel(0, 700)
            self.page.wait_for_timeout(60)
        self.page.wait_for_timeout(300)


def reading(browser: Any, address: str) -> Iterator[Reader]:
    """A reader who complained of nothing at the end."""
    made = Reader(browser, address)
    yield made
    made.context.close()
    assert made.complaints == []


def facts() -> Facts:
    """Of F features, the seventh of which is Arabic from end to end."""
    made = site_case.facts(F)
    top = made.cards.survey.top
    top.ids.rows[top.of(7)[0]] = 2 + len(site_case.HOSTILE) + site_case.WORDS.index("قطة")
    return made


def plainly_served(report: Path) -> Iterator[str]:
    """Address of the site on a server that knows nothing of it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(report)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/index.html"
    server.shutdown()
