"""A server with OpenAI's API on loopback that misbehaves on purpose, and otherwise answers by a rule."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (status, headers, body) of an answer; a body that is a dict is sent as JSON, a string as it is.
Answer = tuple[int, dict[str, str], Any]
Behaviour = Callable[[dict[str, Any]], Answer]


def ok(text: str, finish: str = "stop", usage: bool = True) -> Answer:
    body: dict[str, Any] = {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
    }  # fmt: skip
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return 200, {}, body


def error(status: int, message: str = "no", headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    return status, headers or {}, {"error": {"message": message, "type": "t", **fields}}


def oracle(request: dict[str, Any]) -> Answer:
    """Knows that the feature is on at tokens with an Arabic letter."""
    question = next(m["content"] for m in reversed(request["messages"]) if "Excerpts" in m["content"])
    system = request["messages"][0]["content"]
    if "Say in one short sentence" in system:
        return ok("Tokens in Arabic script.")
    lines = []
    for number, line in re.findall(r"^(\d+): (.*)$", question, flags=re.MULTILINE):
        tokens = re.findall(r"(«?)(\"(?:[^\"\\]|\\.)*\")", line)
        on = [any("\u0600" <= char <= "\u06ff" for char in json.loads(token)) for _, token in tokens]
        marked = [bool(mark) for mark, _ in tokens]
        if "predict how strongly" in system:
            lines.append(f"{number}: " + ", ".join(f"{t[1]} {8 * o}" for t, o in zip(tokens, on, strict=True)))
        elif "marked «so»" in system:
            lines.append(f"{number}: {'yes' if marked == on else 'no'}")
        else:
            lines.append(f"{number}: {'yes' if any(on) else 'no'}")
    return ok("\n".join(lines))


class Server:
    """url; seen: the requests' bodies; at_once: the most requests that were answered at the same time."""

    def __init__(self, url: str) -> None:
        self.url, self.seen, self.keys = url, list[dict[str, Any]](), list[str]()
        self.times: list[float] = []
        self.now = self.at_once = 0


@contextmanager
def serving(*behaviours: Behaviour | Answer, then: Behaviour = oracle, delay: float = 0.0) -> Iterator[Server]:
    """Answers the first requests by the behaviours in turn, every other by `then`. delay: seconds before an answer."""
    waiting, lock = list(behaviours), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                server.seen.append(body)
                server.keys.append(self.headers.get("authorization", ""))
                server.times.append(time.monotonic())
                behaviour = waiting.pop(0) if waiting else then
                server.now += 1
                server.at_once = max(server.at_once, server.now)
            try:
                time.sleep(delay)
                status, headers, answer = behaviour(body) if callable(behaviour) else behaviour
            finally:
                with lock:
                    server.now -= 1
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            try:
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client did not wait
                pass

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
