"""The page on which an expert is tried, without a script: what a reader wrote is there again, whatever became of it."""

from __future__ import annotations

from collections.abc import Sequence
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
from services.console.tries import Saving

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
        self.measured: list[tuple[list[str], str]] = []
        self.said: dict[str, float | str] = {"tiny+medical-1": 3.25}

    async def offer(self, expert: str) -> Offer:
        return self._offer

    async def answers(self, offer: Offer, asked: Asked) -> dict[str, Piece]:
        if self._found is not None:
            raise self._found
        self.asked.append(asked)
        return {side: Piece(side, "so it goes") for side in offer.models}

    async def losses(self, models: Sequence[str], text: str) -> dict[str, float | str]:
        self.measured.append((list(models), text))
        return {"tiny": 3.5, **self.said}


def request_of(path: str, form: dict[str, str]) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": urlencode(form).encode()}

    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "headers": [],
        "path_params": {"expert": "medical-1"}, "server": ("127.0.0.1", 80), "scheme": "http",
    }  # fmt: skip
    return Request(scope, receive)


def console_of(trial: Trial) -> Console:
    story = a_run()
    end(story)
    feed = SimpleNamespace(
        runs={RUN: story.facts}, roster=Roster({"operator": frozenset({"UOPERATOR"})}), clock=lambda: story.now, letters=[],
        connection=Connection(True, True, 0), bus=SimpleNamespace(identity=SimpleNamespace(public="UME")),
    )  # fmt: skip
    return Console(cast(Feed, feed), Access(""), Artifacts(None), ExpertFigures(None, lambda: None), trial)


async def tried(trial: Trial, **form: str) -> str:
    """The page that answers a form."""
    answer = await console_of(trial).tries.answer(request_of("/library/medical-1/try", {**FORM, **form}))
    return bytes(answer.body).decode()


async def measured(trial: Trial, **form: str) -> str:
    """The page on which experts are measured by an example."""
    answer = await console_of(trial).tries.example(request_of("/library/example", {"text": "A <b>word</b>", **form}))
    return bytes(answer.body).decode()


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


async def test_experts_are_measured_by_an_example() -> None:
    trial = Server(OFFER)
    page = await measured(trial)
    assert trial.measured == [(["tiny", "tiny+medical-1"], "A <b>word</b>")]
    assert ">-0.2500<" in page
    assert "3.5000 → 3.2500" in page
    assert "A &lt;b&gt;word&lt;/b&gt;</textarea>" in page


def test_what_has_no_loss_comes_last_with_its_reason() -> None:
    row: Any = SimpleNamespace(expert_id="medical-1")
    assert Saving.of(row, 3.5, "it is yanked") == Saving(row, problem="it is yanked")
    assert Saving.of(row, "too late", 3.5) == Saving(row, problem="too late")


async def test_a_measurement_without_a_figure_is_a_sentence() -> None:
    trial = Server(OFFER)
    trial.said = {"tiny+medical-1": "The server refuses: <yanked>"}
    page = await measured(trial)
    assert 'role="alert">The server refuses: &lt;yanked&gt;' in page


@pytest.mark.parametrize(
    ("trial", "form", "said"),
    [
        (Server(OFFER), {"text": " "}, "There is no text to measure."),
        (Server(OFFER), {"text": "x" * 1001}, "The text has 1,001 characters; measure at most 1,000."),
        (Server(OFFER), {"domain": "law"}, "None of these experts is served: CONNITO_CONSOLE_SERVE_URL"),
        (Server(Offer(problem="No server answers.")), {}, "None of these experts is served"),
    ],
)
async def test_an_example_that_nobody_can_measure_is_kept_and_told_why(
    trial: Server, form: dict[str, str], said: str
) -> None:
    page = await measured(trial, **form)
    assert f'role="alert">{said}' in page
    assert "</textarea>" in page
    assert trial.measured == []
