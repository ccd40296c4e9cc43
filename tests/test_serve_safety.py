"""What the server must not do: read other files, answer other sites, break, or let a question grow without bound."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi")

from fastsae.dashboard import run, schemas
from fastsae.dashboard.live import Live
from fastsae.dashboard.server import create_app
from tests.serve_case import hostile, post

SECRETS = [
    "survey.npz",
    "match.npz",
    ".hidden.js",
    "data/../survey.npz",
    "lm/config.json",
    "data/.hidden.js",
    "../secret.js",
]
SECRETS += [
    "data/../../secret.js",
    "data\\..\\..\\secret.js",
    "//secret.js",
    "data//overview.js",
    "data/link.js",
    "data/elsewhere/secret.js",
]
SECRETS += [
    "/etc/passwd",
    "data/" + "a" * 400 + ".js",
    "data/" + "a/" * 200 + "b.js",
    "data",
    "data/",
    "data/overview.js/",
    "data/\0.js",
]


def raw(
    app: Any, path: str, method: str = "GET", headers: dict | None = None, body: list[bytes] | None = None
) -> tuple[int, dict, bytes]:
    """(status, headers, body) of a path that no client has tidied up."""
    sent: list[Any] = []
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in body or []]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        if not waiting:
            await asyncio.Event().wait()  # a client that stays
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"",
        "root_path": "",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in named.items()],
    }
    asyncio.run(app(scope, receive, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


def test_nothing_outside_the_site_can_be_read(folder: Path, tmp_path: Path):
    # A site of its own, beside what must not be read; the links lead there, not back into the site.
    root, outside = tmp_path / "site", tmp_path / "outside"
    for place in (root / "data", root / "assets", root / "lm", outside):
        place.mkdir(parents=True)
    for name in ("index.html", "data/overview.js", "data/rows-0.js"):
        shutil.copyfile(folder / name, root / name)
    for place in (
        "survey.npz",
        ".hidden.js",
        "data/.hidden.js",
        "lm/config.json",
        "../secret.js",
        "../outside/secret.js",
    ):
        (root / place).write_text("secret", encoding="utf-8")
    (root / "data/link.js").symlink_to(outside / "secret.js")
    (root / "data/elsewhere").symlink_to(outside)
    app = create_app(root)
    for path in SECRETS:
        status, _, body = raw(app, "/" + path)
        assert status == 404 and b"secret" not in body, path
    status, headers, body = raw(app, "/")
    assert (
        status == 200 and body == (root / "index.html").read_bytes() and headers["content-type"].startswith("text/html")
    )
    status, headers, _ = raw(app, "/data/overview.js")
    assert status == 200 and headers["content-type"].startswith("text/javascript")
    assert raw(app, "/assets/server.js")[2] == b"fastsae.server = true;\n"
    assert raw(app, "/assets/live.js")[0] == raw(app, "/assets/live.css")[0] == 200


def test_every_answer_has_the_headers_of_safety(folder: Path):
    app = create_app(folder, None)
    cases = [("/", "GET"), ("/nothing", "GET"), ("/api/status", "GET"), ("/api/nothing", "GET"), ("/api/steer", "POST"),
             ("/api/openapi.json", "GET"), ("/data/overview.js", "GET"), ("/", "POST"), ("/", "TRACE")]  # fmt: skip
    for path, method in cases:
        status, headers, _ = raw(app, path, method)
        assert status < 500, path
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ") and "unsafe" not in policy, path
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in headers and "server" not in headers


def test_pages_of_other_sites_are_not_answered(folder: Path):
    app = create_app(folder, None)
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:8300"):
        status, _, body = raw(app, "/api/status", headers={"host": host})
        assert status == 400 and b"answers to" in body
    for host in ("localhost:8300", "127.0.0.1:8300", "[::1]:8300", "LOCALHOST"):
        assert raw(app, "/api/status", headers={"host": host})[0] == 200
    body = [json.dumps({"name": "Arabic"}).encode()]
    there = {"content-type": "application/json"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9", "http://[", "https://localhost"):
        assert raw(app, "/api/proxies", "POST", {**there, "origin": origin}, body)[0] == 403
    assert raw(app, "/api/proxies", "POST", {**there, "origin": "http://127.0.0.1"}, body)[0] == 202
    # Without a preflight a page may send text/plain only: that is no question.
    assert raw(app, "/api/proxies", "POST", {"content-type": "text/plain"}, body)[0] == 422
    assert raw(create_app(folder, None, hosts=None), "/api/status", headers={"host": "box.lan"})[0] == 200


def test_an_open_address_still_answers_to_known_names_only(folder: Path):
    hosts = run.names("0.0.0.0", ["sae.example.org"])
    app = create_app(folder, None, hosts=hosts, addresses=True)
    for host in ("192.168.1.7:8300", "[fe80::1]:8300", "sae.example.org", socket.gethostname(), "localhost:8300"):
        assert raw(app, "/api/status", headers={"host": host})[0] == 200, host
    for host in ("evil.example", "1.2.3.4.evil.example", "", "999.1.1.1"):  # a name may lead here from anywhere
        status, _, body = raw(app, "/api/status", headers={"host": host})
        assert status == 400 and b"IP addresses only" in body and b"--allow-host" in body, host
    assert run.names("127.0.0.1") == ("127.0.0.1", "localhost", "[::1]", "127.0.0.1")


def test_bodies_are_bounded_with_and_without_their_length(folder: Path):
    app = create_app(folder, None)
    there = {"content-type": "application/json"}
    for headers in (
        {"content-length": str(10**7)},
        {"content-length": "9" * 30},
        {"content-length": "-5"},
        {"content-length": "x"},
    ):
        assert raw(app, "/api/activations", "POST", {**there, **headers}, [b"{}"])[0] == 413
    parts = [b"x" * 65536] * (schemas.BODY_BYTES // 65536 + 1)
    status, _, body = raw(app, "/api/activations", "POST", there, parts)
    assert status == 413 and b"send less" in body


def ask_everywhere(client: Any, text: str) -> list[Any]:
    """The string through every input of the API."""
    part = quote(text[:3000], safe="", errors="surrogatepass")
    edit = {"feature": 1, "value": 1}
    answers = [
        post(client, "activations", {"text": text}),
        post(client, "steer", {"edits": [edit], "prompts": [text], "tokens": 1, "samples": 1}),
        post(client, "steer", {"edits": [{"feature": text, "mode": text}], text: text}),
        post(client, "proxies", {"name": text, "tokens": 1000}),
    ]
    answers += [
        client.get(f"/api/{path}{part}")
        for path in ("features?search=", "features?sort=", "compare?sort=", "features/", "jobs/")
    ]
    answers += [client.get(f"/{part}"), client.get(f"/data/{part}"), client.delete(f"/api/jobs/{part}")]
    answers.append(
        client.post(
            "/api/activations", content=text.encode("utf-8", "replace"), headers={"content-type": "application/json"}
        )
    )
    return answers


def check_hostile(client: Any, strings: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("fastsae.dashboard.live.REGEX_SECONDS", 0.05)
    for text in strings:
        for answer in ask_everywhere(client, text):
            assert answer.status_code < 500, (text[:80], answer.request.url)
            if answer.status_code >= 400:
                detail = answer.json()["detail"]
                assert isinstance(detail, str) and 0 < len(detail) < 1500, (text[:80], detail)
            if answer.headers["content-type"].startswith("application/json"):
                answer.content.decode("utf-8")
            job = answer.json().get("id") if answer.status_code == 202 else None
            if job:
                client.delete(f"/api/jobs/{job}")


def test_hostile_strings_are_answered_or_refused(client: Any, monkeypatch: Any):
    check_hostile(client, hostile(70), monkeypatch)


@pytest.mark.slow
def test_a_thousand_hostile_strings(client: Any, monkeypatch: Any):
    check_hostile(client, hostile(1000)[70:], monkeypatch)


@pytest.mark.slow
def test_no_question_that_openapi_describes_or_forbids_breaks_the_server(folder: Path, live: Live):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    # ASGI transport has no Host of its own.
    app = create_app(folder, live, hosts=None)
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app)
    checks = [schemathesis.checks.not_a_server_error]
    operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        operations += 1

        @settings(
            max_examples=60,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            derandomize=True,
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            case.call_and_validate(checks=checks)

        ask()
    assert operations >= 11
