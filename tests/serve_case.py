"""A report of a small model for the tests of the server, and hostile strings to ask it about."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from fastsae.analysis.cards import Cards
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.passes import take_survey
from fastsae.analysis.stream import Source
from fastsae.analysis.universality import match
from fastsae.dashboard.facts import Facts
from fastsae.dashboard.live import Live
from fastsae.dashboard.site import write_site
from fastsae.sae import SAE
from tests.analysis_case import HOOK, case, documents

TEXTS = documents(40)
CONTEXT = 32


def sources() -> tuple[Source, Source, Any]:
    """Two dictionaries with their models, and the tokenizer of both."""
    sae, model, tokenizer = case()
    other, other_model, _ = case(seed=1)
    return Source(sae, model, HOOK), Source(other, other_model, HOOK), tokenizer


def make_report(folder: Path) -> None:
    """What `fastsae analyze` leaves of the small case: site, survey.npz, match.json."""
    source, other, tokenizer = sources()
    (survey,) = take_survey(
        source, tokenizer, TEXTS, categories=("Arabic", "base64"), context=CONTEXT, show_progress=False
    )
    found = match(
        source, other, tokenizer, TEXTS, context=CONTEXT, shuffled_control=False, logit_contexts=0, show_progress=False
    )
    facts = Facts(Cards(survey), TokenBytes.of(tokenizer), hook=HOOK, match=found)
    write_site(folder, facts, show_progress=False)
    survey.save(folder / "survey.npz")
    found.save(folder / "match.json")


def make_live(maximum: Any) -> Live:
    source, other, tokenizer = sources()
    return Live(source, tokenizer, TEXTS, maximum=maximum, context=CONTEXT, other=other, name="tiny")


def save_run(folder: Path) -> tuple[Path, Path]:
    """(dictionary, model) in folders, as the command line takes them."""
    source, _, tokenizer = sources()
    assert isinstance(source.sae, SAE)
    source.sae.save_pretrained(folder / "sae")
    source.model.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    return folder / "sae", folder / "lm"


_PIECES = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg/onload=alert(1)>",
    "</textarea>",
    "{{7*7}}",
    "${7*7}",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "';DROP TABLE features;--",
    "%00",
    "\0",
    "\x1b[31m",
    "\x07\x08\x7f",
    "\r\n",
    "\u202e\u2066\u2069",
    "\u200b\ufeff",
    "\ud800",
    "\udfff\ud800",
    "\U0001f469\u200d\U0001f680",
    "\u0301" * 30,
    "قطة",
    "‹D8›",
    "../../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "%2e%2e%2f",
    "....//",
    "/etc/passwd",
    "file:///etc/passwd",
    "C:\\",
    "~root",
    "\x85\u2028\u2029",
    "NaN",
    "Infinity",
    "-1",
    "1e999",
    "9" * 400,
    "0x10",
    "null",
    "[]",
    "regex:",
    "regex:(",
    "regex:(a+)+$",
    "regex:" + "(" * 150,
    "regex:a{1,60000}{1,60000}",
    "regex:\\p{Nope}",
    "regex:(?R)",
    "tokens:",
    "tokens:,",
    "ids:99999999999999999999",
    "ids:-1",
    "x=regex:.",
    "=",
    ":",
    "proxy:",
    "<|end|>",
    "%s%n%x",
    "\\",
    "\\u0000",
    "a" * 5000,
    " ",
    "\t",
    "",
]


def hostile(n: int = 1000, seed: int = 0) -> list[str]:
    """n strings: each piece alone, then mixtures of them, and a line of a megabyte."""
    draw = random.Random(seed)
    made = [*_PIECES, "x" * 1_000_000, "<b>" * 400_000]
    while len(made) < n:
        made.append("".join(draw.choices(_PIECES, k=draw.randint(2, 4))))
    return made[:n]


LOCAL = "http://127.0.0.1"


def finished(client: Any, job: dict, seconds: float = 60) -> dict:
    """The job when it is over."""
    end = time.monotonic() + seconds
    while job["state"] in ("waiting", "running"):
        assert time.monotonic() < end, job
        time.sleep(0.01)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


def post(client: Any, path: str, asked: Any) -> Any:
    """As a page sends it: JSON in ASCII, which can carry half a surrogate pair."""
    return client.post(f"/api/{path}", content=json.dumps(asked), headers={"content-type": "application/json"})
