"""`fastsae serve`: a report's site, and an API that answers the same questions, and live ones to the model.

    uvicorn.run(create_app(Path("report"), live))

Answers are JSON, described by OpenAPI at /api/openapi.json. What is wrong with a question is told in one line,
{"detail": …}, with status 4xx. Everything under /api is what the site's pages ask, so a notebook can ask it too.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np

import fastsae
from fastsae.analysis.universality import Match
from fastsae.dashboard import schemas
from fastsae.dashboard.guard import LOOPBACK, PAGE_POLICY, Guard
from fastsae.dashboard.jobs import Job, Jobs, QueueFullError, UnknownJobError
from fastsae.dashboard.live import BusyError, Live
from fastsae.dashboard.pages import TYPES, file_of
from fastsae.dashboard.plain import plain
from fastsae.dashboard.proxy_scores import ProxySums
from fastsae.dashboard.stored import Stored, UnknownFeatureError, matched, selected
from fastsae.errors import FastSAEError, MissingDependencyError

try:
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException as PlainHTTPException
except ImportError:
    raise MissingDependencyError("fastsae serve needs fastapi and uvicorn: pip install 'fastsae[all]'") from None

STATIC = Path(__file__).parent / "static"
OFF = "live questions are off: start fastsae serve with --sae and --model"
_SCORED = 16  # proxies whose scores are kept to sort by


class NotLiveError(FastSAEError):
    """A question to the model, where the server has none."""


class Server:
    """What the routes share. note: why there is no live, or what to bear in mind of it."""

    def __init__(self, stored: Stored, live: Live | None, note: str | None, jobs: Jobs) -> None:
        self.stored, self.live, self.note, self.jobs = stored, live, note, jobs
        self.scored: dict[str, np.ndarray] = {}  # name of a proxy → r of every feature [F]
        self._scoring = threading.Lock()  # of `scored`: requests and jobs are of several threads
        self.match: Match | None = None  # the last live comparison

    def must_live(self) -> Live:
        """Raises NotLiveError."""
        if self.live is None:
            raise NotLiveError(self.note or OFF)
        return self.live

    def columns(self) -> dict[str, np.ndarray]:
        """Of the list of features, with those of proxies that were asked for."""
        with self._scoring:
            return {**self.stored.columns, **{f"proxy:{name}": r for name, r in self.scored.items()}}

    def proxy(self, asked: schemas.ProxyAsked) -> Job:
        """Answered from the report where it knows the proxy, else by a job."""
        known = {name.casefold(): p for p, name in enumerate(self.stored.proxies)}
        p = known.get(asked.name.strip().casefold())
        if p is not None:
            name = self.stored.proxies[p]
            if (sums := self.stored.proxy_sums(p)) is not None:
                scores = self._scores(name, sums)
                return self.jobs.finished("proxies", "tokens", {"name": name, "source": "report", **scores})
        live = self.must_live()
        name = live.proxy(asked.name).name  # told now, not when its turn comes

        def work(job: Job) -> dict:
            sums = live.score_proxy(job, asked.name, asked.tokens)
            return {"name": name, "source": "text", **self._scores(name, sums)}

        return self.jobs.submit("proxies", "tokens", work)

    def _scores(self, name: str, sums: ProxySums) -> dict:
        sums.check(name)
        r = sums.pearson()
        with self._scoring:
            self.scored.pop(name, None)
            while len(self.scored) >= _SCORED:
                self.scored.pop(next(iter(self.scored)))
            self.scored[name] = r
        return sums.table()

    def steer(self, asked: schemas.SteerAsked) -> Job:
        live = self.must_live()
        edits = live.edits([(e.feature, e.mode, e.value, e.multiple) for e in asked.edits])
        live.check_prompts(asked.prompts)

        def work(job: Job) -> dict:
            return live.steer(
                job, edits, asked.prompts, tokens=asked.tokens, samples=asked.samples,
                temperature=asked.temperature, seed=asked.seed,
            )  # fmt: skip

        return self.jobs.submit("steer", "tokens", work)

    def compare(self, asked: schemas.CompareAsked) -> Job:
        live = self.must_live()
        if live.other is None:
            raise NotLiveError("there is no other dictionary: start fastsae serve with --other-sae")

        def work(job: Job) -> dict:
            self.match = live.compare(job, asked.tokens)
            return plain({"tokens": self.match.tokens, "medians": self.match.medians()})

        return self.jobs.submit("compare", "tokens", work)


def create_app(
    report: Path,
    live: Live | None = None,
    *,
    stored: Stored | None = None,
    note: str | None = None,
    hosts: Sequence[str] | None = LOOPBACK,
    addresses: bool = False,
) -> FastAPI:
    """The application. report: folder that `fastsae analyze` wrote. stored: the same, read already. note: why live is
    None, or what to bear in mind of it. hosts, addresses: names under which the server may be called (see Guard).

    Raises FastSAEError for a folder without a report.
    """
    stored = stored or Stored(report)
    jobs = Jobs()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        jobs.close()

    app = FastAPI(
        title="fastsae", version=fastsae.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url="/api/openapi.json", description="Features of a dictionary, and live questions to its model.",
    )  # fmt: skip
    server = Server(stored, live, note, jobs)
    app.state.server = server
    _add_errors(app)
    _add_stored(app, server)
    _add_live(app, server)
    _add_jobs(app, server)
    _add_pages(app, report)
    app.add_middleware(Guard, hosts=hosts, addresses=addresses, body=schemas.BODY_BYTES)
    return app


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": schemas.ErrorMessage} for code in (400, *codes)}


def _add_errors(app: FastAPI) -> None:
    statuses = {UnknownFeatureError: 404, UnknownJobError: 404, NotLiveError: 409, BusyError: 429, QueueFullError: 429}

    @app.exception_handler(FastSAEError)
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        status = next((code for kind, code in statuses.items() if isinstance(error, kind)), 400)
        return JSONResponse({"detail": plain(str(error))}, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        parts = []
        for one in error.errors()[:3]:  # without what was sent: that may be a megabyte
            where = ".".join(str(p)[:40] for p in one["loc"] if p not in ("body", "query", "path"))
            parts.append(f"{where}: {one['msg']}" if where else str(one["msg"]))
        return JSONResponse({"detail": plain("; ".join(parts)[:500])}, 422)

    @app.exception_handler(PlainHTTPException)
    async def plainly(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, PlainHTTPException)
        return JSONResponse({"detail": str(error.detail)}, error.status_code, headers=error.headers)


_Search = Annotated[str, Query(max_length=schemas.SEARCH_CHARACTERS)]
_Sort = Annotated[str, Query(max_length=schemas.PROXY_CHARACTERS + 10)]
_Offset = Annotated[int, Query(ge=0, le=schemas.FEATURE)]
_Limit = Annotated[int, Query(ge=1, le=schemas.PAGE)]
_INVALID = {422: {"model": schemas.ErrorMessage}}


def _add_stored(app: FastAPI, server: Server) -> None:
    @app.get("/api/overview", tags=["report"])
    def overview() -> dict[str, Any]:
        """What the site's first page tells: sizes, quality, the histogram of densities."""
        return server.stored.overview

    @app.get("/api/features", tags=["report"], responses={**_refusals(), **_INVALID})
    def features(
        sort: _Sort = "feature", descending: bool = False, search: _Search = "", offset: _Offset = 0,
        limit: _Limit = 100,
    ) -> schemas.Rows:  # fmt: skip
        """The list of features: sorted by a column, those that a search finds, a page of it. A proxy whose scores were
        asked for is a column too: sort=proxy:NAME.

        search: words between spaces, each of which must occur, in capitals or not, in the feature's explanation, token
        or category. A number alone also finds the feature of that number, which comes first. The page's search has the
        same rule."""
        found = selected(server.columns(), sort=sort, descending=descending, search=search, offset=offset, limit=limit)
        return schemas.Rows(**found)

    @app.get("/api/features/{feature}", tags=["report"], responses={**_refusals(404), **_INVALID})
    def card(feature: int) -> dict[str, Any]:
        """The card of one feature: examples, histogram, scores, neighbours."""
        return server.stored.card(feature)

    @app.get("/api/proxies", tags=["report"], responses={**_refusals(404), **_INVALID})
    def scores(name: Annotated[str, Query(max_length=schemas.PROXY_CHARACTERS)]) -> dict[str, Any]:
        """pearson: r of every feature with a proxy that was asked for (POST), on all text that was read for it."""
        if (pearson := server.scored.get(name)) is None:
            raise HTTPException(404, "no scores of this proxy are kept: ask for them with POST")
        return {"name": name, "pearson": plain(np.round(pearson, 4))}

    @app.get("/api/compare", tags=["report"], responses={**_refusals(404), **_INVALID})
    def compared(
        sort: _Sort = "pearson", descending: bool = True, search: _Search = "", offset: _Offset = 0,
        limit: _Limit = 100,
    ) -> schemas.Compared:  # fmt: skip
        """Every feature beside its match in the other dictionary: of the last live comparison, else of the report.
        search: the number of a feature."""
        match = server.match or server.stored.match
        if match is None:
            raise HTTPException(404, "the report holds no comparison: analyze with --other-sae, or run fastsae match")
        found = selected(matched(match), sort=sort, descending=descending, search=search, offset=offset, limit=limit)
        return schemas.Compared(**found, tokens=match.tokens, medians=plain(match.medians()))


def _add_live(app: FastAPI, server: Server) -> None:
    refused = {**_refusals(409, 413, 429), **_INVALID}

    @app.get("/api/status", tags=["live"])
    def status() -> schemas.Status:
        """Whether questions to the model can be asked."""
        live = server.live
        return schemas.Status(
            live=live is not None, note=server.note or (None if live is not None else OFF),
            about={} if live is None else live.describe(), version=fastsae.__version__,
        )  # fmt: skip

    @app.post("/api/activations", tags=["live"], responses=refused)
    def activations(asked: schemas.TextAsked) -> schemas.Activations:
        """Which features fire on which token of a text."""
        return schemas.Activations(**server.must_live().activations(asked.text))

    @app.post("/api/steer", tags=["live"], status_code=202, responses=refused)
    def steer(asked: schemas.SteerAsked) -> schemas.JobStatus:
        """Continuations without and with features edited, side by side: a job."""
        return _status(server, server.steer(asked))

    @app.post("/api/proxies", tags=["live"], status_code=202, responses=refused)
    def proxies(asked: schemas.ProxyAsked) -> schemas.JobStatus:
        """Every feature's score against a proxy: a job, done at once where the report knows the proxy."""
        return _status(server, server.proxy(asked))

    @app.post("/api/compare", tags=["live"], status_code=202, responses=refused)
    def compare(asked: schemas.CompareAsked) -> schemas.JobStatus:
        """Looks for every feature in the other dictionary: a job, after which GET /api/compare has its rows."""
        return _status(server, server.compare(asked))


def _add_jobs(app: FastAPI, server: Server) -> None:
    refused = {**_refusals(404), **_INVALID}

    @app.get("/api/jobs/{job}", tags=["jobs"], responses=refused)
    def look(job: str) -> schemas.JobStatus:
        """How far a job is, and its result once it is done."""
        return _status(server, server.jobs.get(job))

    @app.delete("/api/jobs/{job}", tags=["jobs"], responses=refused)
    def cancel(job: str) -> schemas.JobStatus:
        """Cancels a job: one that waits at once, one that runs at its next step."""
        return _status(server, server.jobs.cancel(job))


def _status(server: Server, job: Job) -> schemas.JobStatus:
    state = job.state
    return schemas.JobStatus.model_construct(
        id=job.id, kind=job.kind, state=state, unit=job.unit, done=job.done, total=job.total,
        ahead=server.jobs.ahead(job), seconds=round(job.seconds, 3), result=job.result if state == "done" else None,
        error=job.error if state == "failed" else None,
    )  # fmt: skip


def _add_pages(app: FastAPI, report: Path) -> None:
    @app.api_route("/api/{path:path}", methods=["GET", "POST", "DELETE", "PUT", "PATCH"], include_in_schema=False)
    def nothing(path: str) -> Response:
        raise HTTPException(404, "there is no such question: see /api/openapi.json")

    @app.get("/{path:path}", include_in_schema=False)
    def page(path: str) -> Response:
        if path == "assets/server.js":
            return Response("fastsae.server = true;\n", media_type=TYPES[".js"], headers={"cache-control": "no-cache"})
        found = file_of(report, path or "index.html")
        if path in ("assets/live.js", "assets/live.css"):  # of this server's version, whose answers they read
            found = file_of(STATIC, path.removeprefix("assets/"))
        if found is None:
            raise HTTPException(404, "there is no such page")
        headers = {"cache-control": "no-cache"}
        if found.name == "report.html":
            headers["content-security-policy"] = PAGE_POLICY
        return FileResponse(found, media_type=TYPES[found.suffix.lower()], headers=headers)
