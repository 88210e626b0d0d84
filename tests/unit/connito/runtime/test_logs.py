from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from connito.runtime import logs


@pytest.fixture
def json_lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    before, root, level = structlog.get_config(), logging.getLogger().handlers[:], logging.getLogger().level
    logs.setup_logging("sample", "json", "info")
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    structlog.contextvars.clear_contextvars()
    structlog.configure(**before)
    logging.getLogger().handlers[:] = root
    logging.getLogger().setLevel(level)
    logs.use("")


def test_lines_carry_service_run_cycle_and_trace(json_lines: Callable[..., Any]) -> None:
    logs.bind_run("r1", 3)
    trace = logs.new()
    logs.use(trace)
    logs.get_logger("part").info("something happened", count=2)
    (line,) = json_lines()
    assert line["event"] == "something happened"
    assert (line["service"], line["component"], line["run"], line["cycle"], line["count"]) == (
        "sample",
        "part",
        "r1",
        3,
        2,
    )
    assert line["trace_id"] == trace.split("-")[1]


def test_a_command_is_quiet_and_a_program_with_a_log_of_its_own_stays_heard(
    json_lines: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logs, "_kept", [])
    logs.quiet()
    logs.get_logger("part").error("of a command")
    logs.keep_log("serve")
    logs.quiet()
    logs.get_logger("part").info("of a server")
    assert [(line["service"], line["event"]) for line in json_lines()] == [("serve", "of a server")]
    with (tmp_path / "up.jsonl").open("a") as file:
        logs.keep_log("up", file)
        logs.quiet()
        logs.get_logger("part").info("into its file")
    assert json.loads((tmp_path / "up.jsonl").read_text())["event"] == "into its file"


def test_levels_below_are_left_out_and_libraries_speak_the_same(json_lines: Callable[..., Any]) -> None:
    logs.get_logger("part").debug("detail")
    logging.getLogger("some.library").warning("look %s", "here")
    logging.getLogger("some.library").info("chatter")
    assert [(line["component"], line["level"], line["event"]) for line in json_lines()] == [
        ("some.library", "warning", "look here")
    ]


def test_what_is_sent_in_a_trace_belongs_to_it_and_otherwise_begins_one() -> None:
    first = logs.inject({})["traceparent"]
    assert logs.inject({})["traceparent"] != first
    logs.use(logs.extract({"traceparent": first}))
    assert logs.inject({})["traceparent"] == first
    logs.use("")


@pytest.mark.parametrize(
    "value",
    ["", "junk", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "00-" + "a" * 32 + "-" + "1" * 15 + "-01", "a\r\nb"],
)
def test_a_malformed_trace_is_ignored(value: str) -> None:
    assert logs.extract({"traceparent": value}) == ""
    assert logs.extract(None) == ""
