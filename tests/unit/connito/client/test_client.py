"""A client says what it lacks, by the errors that the command line has exit codes for."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito import Client
from connito.errors import Invalid, NotFound
from connito.wire.identity import Identity


def test_a_client_without_the_librarys_address_says_how_to_give_it() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Invalid, match=r"library='host:port', or use Client.local\(\)"):
        client.library.list()


def test_a_client_without_the_coordinators_address_says_how_to_give_it() -> None:
    with Client(library="127.0.0.1:1") as client, pytest.raises(Invalid, match="coordinator='host:port'"):
        client.job.list()


def test_a_command_needs_a_key() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Invalid, match="identity="):
        client.job.cancel("some-run")


def test_a_status_that_no_expert_can_have_is_refused_with_those_it_can() -> None:
    client = Client(library="127.0.0.1:1", identity=Identity.generate())
    with pytest.raises(Invalid, match="deprecated, yanked, restored"):
        client.library.mark("some-expert", "splendid", "because")


def test_without_a_platform_the_command_that_starts_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONNITO_NATS_URL", raising=False)
    with pytest.raises(NotFound, match="connito up"):
        Client.local(tmp_path)
