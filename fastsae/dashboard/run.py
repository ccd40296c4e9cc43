"""From a report's folder to a server that runs: what it was made of, the model, the socket."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket as sockets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsae.analysis.checkpoint import dictionary_digest, model_digest
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.stream import Source
from fastsae.dashboard.guard import LOOPBACK
from fastsae.dashboard.live import Live
from fastsae.dashboard.stored import Stored
from fastsae.errors import FastSAEError, MissingDependencyError
from fastsae.files import RUN_FILE, found_from
from fastsae.lm import MLP_HOOK


@dataclass(frozen=True)
class Inputs:
    """What live questions need. given: whether somebody named the dictionary or the model: what is wrong with them is
    an error then; what a report merely remembers may be gone."""

    sae: Path | None = None
    model: str | None = None
    hook: str | None = None
    text: str | None = None
    text_field: str = "text"
    other_sae: Path | None = None
    other_model: str | None = None
    other_hook: str | None = None
    given: bool = False

    @classmethod
    def of_report(cls, report: Path) -> Inputs:
        """What the run that wrote the report read; empty where it does not say."""
        try:
            run = json.loads((report / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls()
        if not isinstance(run, dict):
            return cls()
        if run.get("kind") == "demo":
            a, b = (cls(report / f"sae-{name}", str(report / f"lm-{name}")) for name in "ab")
            return replace(a, hook=MLP_HOOK, text="builtin", other_sae=b.sae, other_model=b.model)
        if run.get("kind") != "analysis":
            return cls()
        paths = ("sae", "other_sae", "model", "other_model", "text")
        told: dict[str, Any] = {name: found_from(report, run[name]) for name in paths if isinstance(run.get(name), str)}
        told |= {name: run[name] for name in ("hook", "text_field") if isinstance(run.get(name), str)}
        for name in ("sae", "other_sae"):
            if name in told:
                told[name] = Path(told[name])
        return cls(**told)

    def but(self, **options: Any) -> Inputs:
        """The same with the options that are not None. Raises FastSAEError for a dictionary without a model."""
        named = {name: value for name, value in options.items() if value is not None}
        # The model that is remembered belongs to the dictionary that is remembered.
        if "sae" in named and "model" not in named and self.model is None:
            raise FastSAEError("sae needs the model it was trained on: give --model too")
        if "model" in named and "sae" not in named and self.sae is None:
            raise FastSAEError("model needs a dictionary that was trained on it: give --sae too")
        return replace(self, **named, given="sae" in named or "model" in named)


def open_live(stored: Stored, inputs: Inputs) -> tuple[Live | None, str | None]:
    """(live, what to bear in mind or None), or (None, why there is none). Raises FastSAEError where what was named on
    purpose cannot be had."""
    if inputs.sae is None or inputs.model is None:
        return None, "live questions are off: the report does not say what it was made of; give --sae and --model"
    try:
        live = _live(stored, inputs, inputs.sae, inputs.model)
        return live, _doubt(stored, live)
    except (FastSAEError, OSError) as error:
        if inputs.given:
            raise
        reason = " ".join(str(error).split())
        return None, f"live questions are off: {reason}; give --sae and --model"


def _live(stored: Stored, inputs: Inputs, sae: Path, model: str) -> Live:
    from fastsae import corpus
    from fastsae.inputs import load_beside, load_model, load_sae

    hook = inputs.hook or MLP_HOOK
    dictionary = load_sae(sae, model, hook)
    network, tokenizer = load_model(model)
    if stored.tokenizer not in (None, TokenBytes.of(tokenizer).digest):
        raise FastSAEError(f"the report was made with another tokenizer than {model}'s: give the report's own model")
    other = None
    if inputs.other_sae is not None:
        own = inputs.other_model in (None, model)
        second = network if own else load_beside(str(inputs.other_model), tokenizer, model)
        beside = inputs.other_hook or hook
        other = Source(load_sae(inputs.other_sae, inputs.other_model or model, beside), second, beside)
    documents = corpus.load(inputs.text or "builtin", "heldout", inputs.text_field)
    return Live(
        Source(dictionary, network, hook), tokenizer, documents, maximum=stored.maximum, context=stored.context or 128,
        other=other, name=Path(model).name,
    )  # fmt: skip


def _doubt(stored: Stored, live: Live) -> str | None:
    """What is asked of is not what the report was made of."""
    of, source = stored.of, live.source
    here = {"dictionary": dictionary_digest(source.sae), "hook": source.hook}
    if "rows" not in of:  # the survey of a store knows the model's name alone
        here["model"] = model_digest(source.model)
    other = [name for name, value in here.items() if of.get(name) not in (None, value)]
    if not other:
        return None
    what = " and ".join("module" if name == "hook" else name for name in other)
    return (
        f"this is another {what} than the report was made of: what fires here need not be what its pages show, and "
        "multiples are of its maxima"
    )


# --- the socket -----------------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def listening(host: str, port: int) -> Iterator[sockets.socket]:
    """A socket that listens, before anything slow begins. Raises FastSAEError for an address that is not to be had."""
    if not 0 <= port <= 65535:
        raise FastSAEError(f"port must be from 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, where = sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise FastSAEError(f"expected the address of this machine as host, got {host!r}: 127.0.0.1 is usual") from None
    with sockets.socket(family, kind, protocol) as made:
        made.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            made.bind(where)
            made.listen(128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise FastSAEError(f"port {port} of {host} is in use: choose another one with --port, or 0") from None
            raise FastSAEError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
        yield made


def address(socket: sockets.socket) -> str:
    """http://HOST:PORT/."""
    host, port = socket.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def names(host: str, allowed: Sequence[str] = ()) -> tuple[str, ...]:
    """Under which names a server on this address may be called: those of this machine, and those allowed."""
    own = () if is_loopback(host) else (sockets.gethostname(), f"{sockets.gethostname()}.local")
    return (*LOOPBACK, host, *own, *allowed)


def serve(
    stored: Stored, live: Live | None, note: str | None, host: str, socket: sockets.socket,
    allowed: Sequence[str] = (),
) -> None:  # fmt: skip
    """Answers until Ctrl-C, under names of this machine and those allowed (see Guard)."""
    from fastsae.dashboard.server import create_app

    try:
        import uvicorn
    except ImportError:
        raise MissingDependencyError("fastsae serve needs fastapi and uvicorn: pip install 'fastsae[all]'") from None
    app = create_app(
        stored.folder, live, stored=stored, note=note, hosts=names(host, allowed), addresses=not is_loopback(host)
    )
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    try:
        uvicorn.Server(settings).run(sockets=[socket])
    except KeyboardInterrupt:
        pass  # the way it is meant to end
