"""The page on which an expert is tried, without a script: what a reader wrote is there again, whatever became of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlencode

import pytest
from connito.errors import Retry
from connito.wire.roster import Roster
from starlette.requests import Request

from services.console.access import Access
from services.console.artifacts import Artifacts
from services.console.figures import ExpertFigures
from services.console.pages import Console
from services.console.state import Connection, Feed
from services.console.trial import MAX_TEXT, Asked, Offer, Piece, Trial

from .world import RUN, a_run, end

OFFER = Offer({"base": "tiny", "expert": "tiny+medical-1"})
FORM = {"text": "\r\nA <b>word</b>\r\nand more", "tokens": "32", "words": "drawn"}
SHOWN = "\n\nA &lt;b&gt;word&lt;/b&gt;\nand more</textarea>"


class Server(Trial):
    """A server of experts by what it offers, and what comes of asking."""

    def __init__(self, offer: Offer, found: Retry | None = None) -> None:
        super().__init__()
        self._offer, self._found = offer, found
        self.asked: list[Asked] = []

    async def offer(self, expert: str) -> Offer:
        return self._offer

    async def answers(self, offer: Offer, asked: Asked) -> dict[str, Piece]:
        if self._found is not None:
            raise self._found
        self.asked.append(asked)
        return {side: Piece(side, "so it goes") for side in offer.models}


async def tried(trial: Trial, **form: str) -> str:
    """The page that answers a form."""
    story = a_run()
    end(story)
    feed = SimpleNamespace(
        runs={RUN: story.facts}, roster=Roster({"operator": frozenset({"UOPERATOR"})}), clock=lambda: story.now, letters=[],
        connection=Connection(True, True, 0), bus=SimpleNamespace(identity=SimpleNamespace(public="UME")),
    )  # fmt: skip
    console = Console(cast(Feed, feed), Access(""), Artifacts(None), ExpertFigures(None, lambda: None), trial)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": urlencode({**FORM, **form}).encode()}

    path = "/library/medical-1/try"
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "headers": [],
        "path_params": {"expert": "medical-1"}, "server": ("127.0.0.1", 80), "scheme": "http",
    }  # fmt: skip
    return bytes((await console._try(Request(scope, receive))).body).decode()


async def test_lines_go_on_as_the_reader_wrote_them() -> None:
    trial = Server(OFFER)
    page = await tried(trial)
    assert trial.asked == [Asked("\nA <b>word</b>\nand more", 32, True)]
    assert SHOWN in page
    assert "so it goes" in page
    # An end of line is one character, as in the page's own count.
    await tried(trial, text="x\r\n" * (MAX_TEXT // 2))
    assert len(trial.asked[1].text) == MAX_TEXT


@pytest.mark.parametrize(
    ("trial", "form", "said"),
    [
        (Server(OFFER), {"tokens": "9999"}, "An answer has 32, 64, 128 tokens."),
        (
            Server(OFFER),
            {"text": FORM["text"].rjust(MAX_TEXT + 9)},
            "The text has 4,007 characters; try at most 4,000.",
        ),
        (Server(OFFER, Retry("Others are trying.")), {}, "Others are trying."),
        (Server(Offer(problem="No server answers.")), {}, "No server answers."),
    ],
)
async def test_a_refused_text_is_not_lost(trial: Trial, form: dict[str, str], said: str) -> None:
    page = await tried(trial, **form)
    assert f'<p class="empty">{said}</p>' in page
    assert SHOWN[1:] in page
    assert '<option value="drawn" selected>' in page


async def test_a_text_of_nothing_can_be_written_again() -> None:
    page = await tried(Server(OFFER), text=" ")
    assert "There is no text to go on with." in page
    assert "</textarea>" in page
