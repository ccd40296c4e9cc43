"""What stands before every answer of the server: who may ask, how much may be sent, and the headers of safety."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# The hash is that of an empty style element, which Plotly makes and fills through the CSSOM, as in the site's pages.
_EMPTY = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' {_EMPTY}; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report of one page brings its own style and no script.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware. hosts: names under which the server may be called, None for any; addresses: and under any IP
    address, which is no name that could lead here from elsewhere.

    A page of another site could make a browser call a server on this machine: under a name of its own that leads here
    (so only known names are answered), or across sites (so what changes something must come from a page of ours).
    body: bytes that a request may have.
    """

    def __init__(self, app: Any, hosts: Sequence[str] | None, body: int, addresses: bool = False) -> None:
        self.app, self.hosts, self.body = app, None if hosts is None else {h.lower() for h in hosts}, body
        self.addresses = addresses

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in there]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        refused = self._refused(scope, headers)
        if refused is None and scope["method"] in ("POST", "PUT", "PATCH"):
            body = await self._read(receive)
            if body is None:
                refused = (413, f"a request may have {self.body} bytes, this one has more: send less")
            else:
                receive = _again(body, receive)
        if refused is not None:
            await _refuse(answer, *refused)
            return
        await self.app(scope, receive, answer)

    def _refused(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and _name(host) not in self.hosts and not (self.addresses and _is_address(host)):
            known = ", ".join(sorted(self.hosts)) + (" and IP addresses" if self.addresses else "")
            return 400, f"this server answers to {known} only: open it so, or start it with --allow-host"
        origin = headers.get(b"origin")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin is not None:
            try:
                same = urlsplit(origin.decode("latin-1")).netloc.lower() == host
            except ValueError:
                same = False
            if not same:
                return 403, "requests from pages of other sites are not answered: open the server's own page"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.body:
            return 413, f"a request may have {self.body} bytes, this one has more: send less"
        return None

    async def _read(self, receive: Any) -> bytes | None:
        """The whole body; None where it is too long."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.body:
                return None
            if not message.get("more_body"):
                return b"".join(parts)


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.rsplit(":", 1)[0] if ":" in host else host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(_name(host).strip("[]"))
    except ValueError:
        return False
    return True


def _again(body: bytes, receive: Any) -> Any:
    """A receive that gives the body first."""
    given = False

    async def once() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


async def _refuse(send: Any, status: int, message: str) -> None:
    import json

    body = json.dumps({"detail": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
