"""Pages on which a reader's text goes to the server of experts: one expert beside its base, and many by example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from connito.errors import Invalid, Retry
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from . import login
from .artifacts import Artifacts
from .cards import as_html, effects
from .experts import ExpertRow, Family, family, matching, wanted
from .shown import Shown
from .trial import (
    EXAMPLE_TEXT,
    LENGTHS,
    MAX_FORM_BYTES,
    MAX_TEXT,
    SIDES,
    Asked,
    Offer,
    Piece,
    Trial,
    as_events,
    example_of,
)

# Experts that one example is measured with: each takes a forward pass of the server, one after the other.
MOST = 12


@dataclass(frozen=True)
class Saving:
    """The losses of an example without and with an expert, in nats per token; or `problem`, why there are none."""

    row: ExpertRow
    before: float = 0.0
    after: float = 0.0
    problem: str = ""

    @classmethod
    def of(cls, row: ExpertRow, before: float | str, after: float | str) -> Saving:
        """Return what the server says of a base and an expert."""
        if isinstance(before, str):
            return cls(row, problem=before)
        return cls(row, problem=after) if isinstance(after, str) else cls(row, before, after)


class Tries:
    """The pages of one console. `rows`: the experts that a reader may see; `render`: a page as text."""

    def __init__(
        self, artifacts: Artifacts, trial: Trial, rows: Callable[[Request], list[ExpertRow]],
        render: Callable[[str, Request, Shown], str],
    ) -> None:  # fmt: skip
        self._artifacts, self._trial, self._rows, self._render = artifacts, trial, rows, render

    def routes(self) -> list[Route]:
        """Return the places of these pages."""
        return [
            Route("/library/example", self.example, methods=["GET", "POST"]),
            Route("/library/{expert}", self.expert),
            Route("/library/{expert}/try", self.answer, methods=["POST"]),
        ]

    async def expert(self, request: Request) -> Response:
        """Return an expert's page."""
        row, relatives = self._row(request)
        return await self._show_expert(request, row, relatives, await self._offer(row))

    async def answer(self, request: Request) -> Response:
        """Return the answers of an expert and its base to a reader's text: as they come, or on the page in whole."""
        login.own_pages_only(request)
        row, relatives = self._row(request)
        offer, streams = await self._offer(row), request.headers.get("accept", "").startswith("text/event-stream")
        form = await login.form(request, MAX_FORM_BYTES)
        try:
            if offer.problem:
                raise Invalid(offer.problem)
            asked = Asked.read(form)
            if streams:
                headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
                pieces = as_events(self._trial.pieces(offer, asked))
                return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)
            answers = await self._trial.answers(offer, asked)
            return await self._show_expert(request, row, relatives, offer, asked, answers)
        except (Invalid, Retry) as error:
            if streams:
                return PlainTextResponse(str(error), 400 if isinstance(error, Invalid) else 503)
            return await self._show_expert(request, row, relatives, Offer(offer.models, str(error)), Asked.kept(form))

    async def example(self, request: Request) -> Response:
        """Return what the experts that a search finds would save on a reader's text, or the page that asks for it."""
        form: Mapping[str, str] = dict(request.query_params)
        if request.method == "POST":
            login.own_pages_only(request)
            form = await login.form(request, MAX_FORM_BYTES)
        search = wanted(form)
        found = [row for row in matching(self._rows(request), search) if not row.withdrawn]
        text, problem, savings, left = Asked.kept(form).text, "", list[Saving](), 0
        try:
            if request.method == "POST":
                savings, left = await self._savings(example_of(text), found)
        except (Invalid, Retry) as error:
            problem = str(error)
        values = {
            "text": text, "most": EXAMPLE_TEXT, "wanted": search, "problem": problem, "savings": savings, "left": left,
            "found": len(found), "serve": self._trial.url,
        }  # fmt: skip
        return HTMLResponse(self._render("page.html", request, Shown("example.html", "By example", values, live=False)))

    async def _savings(self, text: str, rows: Sequence[ExpertRow]) -> tuple[list[Saving], int]:
        """Return savings, the largest first, and how many of the served experts were not tried. Raises `Invalid`, `Retry`."""
        offers = [(row, offer) for row in rows if not (offer := await self._trial.offer(row.expert_id)).problem]
        if not offers:
            raise Invalid("None of these experts is served" + (f" at {self._trial.url}." if self._trial.url else ": "
                          "CONNITO_CONSOLE_SERVE_URL names the console a `connito serve`."))  # fmt: skip
        measured = offers[:MOST]
        bases = [offer.models["base"] for _, offer in measured]
        names = list(dict.fromkeys([*bases, *(offer.models["expert"] for _, offer in measured)]))
        losses = await self._trial.losses(names, text)
        found = [Saving.of(row, *(losses[offer.models[side]] for side in SIDES)) for row, offer in measured]
        found.sort(key=lambda saving: (bool(saving.problem), saving.after - saving.before))
        if found[0].problem:
            raise Invalid(found[0].problem)
        return found, len(offers) - len(measured)

    def _row(self, request: Request) -> tuple[ExpertRow, Family]:
        rows = self._rows(request)
        row = next((row for row in rows if row.expert_id == request.path_params["expert"]), None)
        if row is None:
            raise HTTPException(404, "There is no such expert in this library.")
        return row, family(row, rows)

    async def _offer(self, row: ExpertRow) -> Offer:
        if row.withdrawn:
            return Offer(problem="It is withdrawn: nobody may use it any more.")
        return await self._trial.offer(row.expert_id)

    async def _show_expert(
        self, request: Request, row: ExpertRow, relatives: Family, offer: Offer, asked: Asked | None = None,
        answers: Mapping[str, Piece] | None = None,
    ) -> Response:  # fmt: skip
        about = await self._artifacts.about(row.record)
        commands = [f"connito library export {row.expert_id} --out expert", f"connito library verify {row.expert_id}"]
        values: dict[str, Any] = {
            "expert": row, "card": as_html(about.card), "commands": [] if row.withdrawn else commands,
            "effects": effects(about.record), "family": relatives, "offer": offer, "serve": self._trial.url,
            "asked": asked or Asked(""), "answers": answers or {}, "lengths": LENGTHS, "most": MAX_TEXT,
        }  # fmt: skip
        return HTMLResponse(self._render("page.html", request, Shown("expert.html", row.expert_id, values, live=False)))
