"""The routes. A page is a template and what it shows; asked for as an event stream, the same address sends the page's
live part again whenever it looks different."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from connito.render import formats
from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views import words
from connito.views.leaderboard import leaderboard
from connito.views.run_report import miner_name
from connito.views.sentences import detail_of
from connito.views.standings import validator_rows
from connito.wire.enums import plain_name, reason_name
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key
from connito.wire.private import is_public
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from . import charts, experts, login, views
from .access import Access, Guard
from .artifacts import Artifacts
from .figures import ExpertFigures
from .heatmap import FigureMap, Heatmap, figure_map, heatmap
from .history import Moment, replay
from .lineage import lineage
from .shown import Shown
from .sign_in import ASK_SECONDS
from .state import Feed
from .trial import Trial
from .tries import Tries
from .waterfall import waterfall
from .why import why

HERE = Path(__file__).parent
# A browser gets at most this many pictures a second, and a sign of life this often.
SOONEST_SECONDS = 0.25
HEARTBEAT_SECONDS = 5.0
LEADERBOARD = "/leaderboard"


Page = Callable[[Request], Shown]


class Console:
    """The pages over one feed."""

    def __init__(
        self, feed: Feed, access: Access, artifacts: Artifacts, figures: ExpertFigures, trial: Trial, *,
        secure_cookie: bool = False,
    ) -> None:  # fmt: skip
        self.feed, self.access, self.artifacts, self.figures = feed, access, artifacts, figures
        self.tries = Tries(artifacts, trial, self._experts, self._render)
        self._secure_cookie = secure_cookie
        self._board: tuple[int, Mapping[str, Any]] | None = None
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self._templates.filters.update(
            clock=formats.moment, iso=_iso, loss=formats.loss, signed=formats.change, duration=formats.duration,
            size=formats.size, code=reason_name, gate=words.gate, in_words=words.in_words, clause=words.clause,
            detail=detail_of, status=_status,
        )  # fmt: skip

    def app(self) -> ASGIApp:
        """Return the application, behind its guard."""
        pages: dict[str, Page] = {
            "/": self._runs,
            "/runs/{run}": self._run,
            "/runs/{run}/selection": self._selection,
            "/runs/{run}/lineage": self._lineage,
            "/runs/{run}/why/{cycle:int}/{miner}": self._why,
            "/library": self._library,
            "/library/compare": self._compare,
            "/library/demand": self._demand,
            "/dead-letters": self._dead_letters,
            "/bus": self._bus,
        }
        routes: list[Route | Mount] = [Route(path, self._endpoint(page)) for path, page in pages.items()]
        routes += [
            Route(LEADERBOARD, self._leaderboard),
            Route("/runs/{run}/verify/{version:int}", self._verify, methods=["POST"]),
            *self.tries.routes(),
            *login.routes(self.access, self._templates.get_template("login.html").render, secure=self._secure_cookie),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ]
        return Guard(Starlette(routes=routes, exception_handlers={HTTPException: self._problem}), self.access)

    # One page, three ways to send it: whole, as a stream, or as the answer that there is none.

    def _endpoint(self, page: Page) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            shown = page(request)
            if request.headers.get("accept", "").startswith("text/event-stream"):
                headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
                return StreamingResponse(self._events(page, request), media_type="text/event-stream", headers=headers)
            return HTMLResponse(self._render("page.html", request, shown))

        return answer

    async def _events(self, page: Page, request: Request) -> AsyncIterator[str]:
        """Yield `live` events with the page's live part, each with the server's clock as its id; comments in between."""
        before, seen = "", -1
        # Who reads is asked again with the next request, which the page makes at once.
        until = time.monotonic() + ASK_SECONDS if "viewer" in request.scope else math.inf
        while not self.feed.closed and time.monotonic() < until:
            seen = self.feed.version
            html = self._render("live.html", request, page(request))
            now = f"id: {self.feed.clock()}\n"
            if html != before:
                data = "".join(f"data: {line}\n" for line in html.splitlines())
                yield f"{now}event: live\n{data}\n"
                before = html
            else:
                yield f"{now}event: alive\ndata:\n\n"
            await asyncio.sleep(SOONEST_SECONDS)
            await self.feed.changed(seen, HEARTBEAT_SECONDS)

    def _render(self, template: str, request: Request, shown: Shown) -> str:
        return self._templates.get_template(template).render(
            page=shown,
            path=request.url.path,
            here=str(request.url.path) + (f"?{request.url.query}" if request.url.query else ""),
            now=self.feed.clock(),
            connection=self.feed.connection,
            letters=len(self.feed.letters) if _whole(request) else 0,
            logged_in=bool(self.access.token or self.access.sign_in),
            charts=charts,
            **shown.values,
        )

    async def _problem(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if request.url.path.startswith("/static/"):
            # Also answered to those who have shown no token.
            return PlainTextResponse(f"{error.detail}\n", error.status_code)
        shown = Shown("problem.html", str(error.status_code), {"detail": error.detail}, live=False)
        return HTMLResponse(self._render("page.html", request, shown), error.status_code, error.headers)

    # Pages.

    def _runs(self, request: Request) -> Shown:
        runs = {run: facts for run, facts in self.feed.runs.items() if _sees(request, facts)}
        return Shown("runs.html", "Runs", {"runs": views.run_rows(runs, self.feed.clock(), self.feed.roster.stake)})

    def _run(self, request: Request) -> Shown:
        facts, frame, now = self._facts(request)
        cycle = _cycle(request, facts)
        values = {
            "cycle": cycle,
            "curves": views.curves(facts),
            "bars": waterfall(facts, cycle, now),
            "miners": views.miner_rows(facts, cycle),
            "validators": validator_rows(facts, cycle),
            "board": leaderboard([facts], cycle),
            "merge": next((v for v in lineage(facts) if v.published and v.published.cycle == cycle), None),
            "made": [name for name, fact in facts.deposits.items() if self._seen(request)(facts, fact.message)],
            "name": partial(miner_name, facts),
        }
        return self._of_run("run.html", facts, frame, now, values)

    def _selection(self, request: Request) -> Shown:
        facts, frame, now = self._facts(request)
        grid = heatmap(facts)
        values = {"grid": grid, "use": None, "change": None, "version": 0}
        if grid is not None:
            values |= self._about_experts(facts, grid)
        return self._of_run("selection.html", facts, frame, now, values)

    def _about_experts(self, facts: RunFacts, grid: Heatmap) -> dict[str, Any]:
        """Return the use and change of experts as charts, or a sentence on why there are none."""
        newest = facts.latest_version
        use: FigureMap | str = "It is not in the log."
        if facts.require_selection().report.digest:
            found = self.figures.use(facts.require_selection().report)
            use = found if isinstance(found, str) else figure_map("share of the probe", found)
        change: FigureMap | str = "No version has been published yet."
        if newest is not None:
            found = self.figures.change(grid.experts(), facts.require_selection().initial_state, newest.state)
            change = found if isinstance(found, str) else figure_map("relative change since the base", found)
        return {"use": use, "change": change, "version": 0 if newest is None else newest.version}

    def _lineage(self, request: Request) -> Shown:
        facts, frame, now = self._facts(request)
        return self._of_run(
            "lineage.html", facts, frame, now, {"versions": lineage(facts), "store": self.artifacts.available}
        )

    def _why(self, request: Request) -> Shown:
        facts, frame, now = self._facts(request)
        found = why(facts, request.path_params["cycle"], request.path_params["miner"])
        if found is None:
            raise HTTPException(404, "The log holds nothing about this miner in this cycle.")
        return self._of_run("why.html", facts, frame, now, {"why": found})

    def _seen(self, request: Request) -> experts.Sees:
        """Return which experts the reader, or else the console's key, may see; those of others that are not public it does
        not name.
        """
        if (viewer := request.scope.get("viewer")) is not None:
            return experts.seen_as(viewer)
        return experts.seen_by(self.feed.bus.identity.public, self.feed.roster)

    def _experts(self, request: Request) -> list[experts.ExpertRow]:
        return experts.expert_rows(self.feed.runs, self._seen(request))

    async def _leaderboard(self, request: Request) -> Response:
        """Return what everybody earned in public runs: the same for everybody, whatever else they may see, and no stream,
        which a stranger could hold open.
        """
        if self._board is None or self._board[0] != self.feed.version:
            runs = [facts for facts in self.feed.runs.values() if facts.spec is not None and is_public(facts.spec)]
            self._board = self.feed.version, {"places": leaderboard(runs), "runs": len(runs), "short": short_key}
        shown = Shown("leaderboard.html", "Leaderboard", self._board[1], live=False)
        return HTMLResponse(self._render("page.html", request, shown))

    def _library(self, request: Request) -> Shown:
        asked, rows = request.query_params, self._experts(request)
        wanted = experts.wanted(asked)
        values = {
            "experts": experts.matching(rows, wanted), "wanted": wanted, "total": len(rows),
            "domains": sorted({row.domain for row in rows}), "bases": sorted({row.base for row in rows if row.base}),
        }  # fmt: skip
        return Shown("library.html", "Library", values)

    def _demand(self, request: Request) -> Shown:
        return Shown("demand.html", "Demand", {"domains": experts.wanted_next(self.feed.runs, self._seen(request))})

    def _compare(self, request: Request) -> Shown:
        wanted = request.query_params.getlist("id")
        rows = [row for row in self._experts(request) if row.expert_id in wanted]
        values = {"experts": rows, "domains": experts.comparison(rows)}
        return Shown("compare.html", "Comparison", values)

    async def _verify(self, request: Request) -> Response:
        """Return whether the store holds the bytes of a version."""
        login.own_pages_only(request)
        facts, _, _ = self._facts(request)
        number, run = request.path_params["version"], facts.run
        ref = _state_of(facts, number)
        if ref is None or not self.artifacts.available:
            raise HTTPException(404, "There is no such version, or the console has no credentials for the store.")
        values = {"run": run, "version": number, "ref": ref, "check": await self.artifacts.verify(ref)}
        return HTMLResponse(self._render("page.html", request, Shown("verified.html", run, values, live=False)))

    def _dead_letters(self, request: Request) -> Shown:
        _only_whole(request)
        return Shown("dead_letters.html", "Dead letters", {"rows": self.feed.letters[::-1]})

    def _bus(self, request: Request) -> Shown:
        _only_whole(request)
        values = {"streams": self.feed.streams, "rejected": self.feed.rejected}
        return Shown("bus.html", "Bus", values)

    def _of_run(
        self, template: str, facts: RunFacts, moment: Moment | None, now: int, values: Mapping[str, Any]
    ) -> Shown:
        frame = {
            "head": views.head(facts, now, self.feed.roster.stake),
            "moment": moment,
            "at": _query(at=moment.position if moment else None),
        }
        return Shown(template, facts.run, {**frame, "link": _query, **values}, live=moment is None)

    def _facts(self, request: Request) -> tuple[RunFacts, Moment | None, int]:
        """Return the run, now or at the point of its past that `?at=` names, and the time it is there."""
        run = request.path_params["run"]
        facts = self.feed.runs.get(run)
        if facts is None or facts.spec is None or not _sees(request, facts):
            if not self.feed.connection.caught_up:
                raise HTTPException(503, "The log is still being read.", {"Refresh": "2"})
            raise HTTPException(404, "There is no such run.")
        at = request.query_params.get("at", "")
        if not at.isdecimal() or len(at) > 9:
            return facts, None, self.feed.clock()
        past, moment = replay(facts, int(at))
        if past.spec is None:
            raise HTTPException(404, "At this point the run had not been created.")
        return past, moment, moment.time_unix_ms


def _whole(request: Request) -> bool:
    """Return whether the reader sees the installation, and not only what is public or of an organisation."""
    viewer = request.scope.get("viewer")
    return viewer is None or viewer.everything


def _sees(request: Request, facts: RunFacts) -> bool:
    """Return whether a run is shown to the reader: whoever has no name of their own sees what the console sees."""
    viewer = request.scope.get("viewer")
    return viewer is None or experts.seen_as(viewer)(facts, None)


def _only_whole(request: Request) -> None:
    if not _whole(request):
        raise HTTPException(404, "Operators see this page.")


def _state_of(facts: RunFacts, number: int) -> ArtifactRef | None:
    """Return the rows of a version; those of version 0 are the base's."""
    if number == 0:
        return None if facts.selection is None else facts.selection.initial_state
    return next((found.state for found in facts.versions.values() if found.version == number), None)


def _cycle(request: Request, facts: RunFacts) -> int:
    """Return the cycle asked for, if there is one of that number, else the current one."""
    asked = request.query_params.get("cycle", "")
    number = int(asked) if asked.isdecimal() and len(asked) < 6 else 0
    return number if 1 <= number <= facts.cycle else facts.cycle


def _query(**values: object) -> str:
    """Return `?a=1&b=2` of those values that are not None; the empty string when there are none."""
    given = {key: value for key, value in values.items() if value is not None}
    return f"?{urlencode(given)}" if given else ""


def _status(verdict: cycle_pb2.Verdict | None) -> str:
    return "not judged yet" if verdict is None else plain_name(cycle_pb2.VerdictStatus, verdict.status)


def _iso(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")
