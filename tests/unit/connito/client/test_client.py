"""A client says what it lacks, by the errors that the command line has exit codes for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from connito import Client
from connito.errors import Invalid, NotFound, Retry
from connito.v1 import services_pb2
from connito.v1.run_pb2 import RunSpec
from connito.wire.envelope import check
from connito.wire.identity import Identity


def test_a_client_without_the_librarys_address_says_how_to_give_it() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Invalid, match=r"library='host:port', or use Client.local\(\)"):
        client.library.list()


def test_a_client_without_the_coordinators_address_says_how_to_give_it() -> None:
    with (
        Client(library="127.0.0.1:1", identity=Identity.generate()) as client,
        pytest.raises(Invalid, match="coordinator='host:port'"),
    ):
        client.job.list()


def test_a_search_for_no_expert_is_refused() -> None:
    with Client(library="127.0.0.1:1") as client, pytest.raises(Invalid, match="limit is -5; ask for 1 or more"):
        client.library.search("law", limit=-5)


def test_a_command_needs_a_key() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Invalid, match="identity="):
        client.job.cancel("some-run")


def test_a_status_that_no_expert_can_have_is_refused_with_those_it_can() -> None:
    client = Client(library="127.0.0.1:1", identity=Identity.generate())
    with pytest.raises(Invalid, match="deprecated, yanked, restored"):
        client.library.mark("some-expert", "splendid", "because")


def test_a_service_that_does_not_answer_is_named_with_where_it_was_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connito.client.connection.DEADLINE_SECONDS", 0.2)
    with (
        Client("127.0.0.1:1", identity=Identity.generate()) as client,
        pytest.raises(Retry, match=r"coordinator at 127\.0\.0\.1:1 did not .*doctor"),
    ):
        client.job.list()


def test_without_a_platform_the_command_that_starts_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONNITO_NATS_URL", raising=False)
    with pytest.raises(NotFound, match="connito up"):
        Client.local(tmp_path)


STATUS = services_pb2.RunStatus(spec=RunSpec(run="r1"), miners=["UAAA", "UABB"])


def get_run(request: Any, context: grpc.ServicerContext) -> Any:
    if request.run != "r1":
        context.abort(grpc.StatusCode.NOT_FOUND, f"there is no run {request.run!r}")
    return services_pb2.GetRunResponse(status=STATUS)


def list_experts(request: Any, context: grpc.ServicerContext) -> Any:
    """Three experts on two pages."""
    names, after = (["c"], "") if request.page_token else (["a", "b"], "2")
    found = [services_pb2.ExpertSummary(expert_id=name) for name in names]
    return services_pb2.ListExpertsResponse(experts=found, next_page_token=after)


def get_expert(request: Any, context: grpc.ServicerContext) -> Any:
    summary = services_pb2.ExpertSummary(expert_id=request.expert_id)
    record, status, reason = '{"domain": "law"}', "yanked", "leak"
    return services_pb2.GetExpertResponse(expert=summary, record_json=record, status=status, reason=reason)


def handlers(service: str, **methods: Callable[[Any, grpc.ServicerContext], Any]) -> Any:
    """Serve unary methods by their name; requests and answers are those of services.proto."""
    made = {
        name: grpc.unary_unary_rpc_method_handler(
            method, getattr(services_pb2, f"{name}Request").FromString, lambda answer: answer.SerializeToString()
        )
        for name, method in methods.items()
    }
    return grpc.method_handlers_generic_handler(f"connito.v1.{service}", made)


@pytest.fixture
def served() -> Iterator[tuple[Client, list[str]]]:
    """A client of a coordinator that knows one run and of a library of three experts, and the runs that it cancelled."""
    cancelled: list[str] = []

    def create(request: Any, context: grpc.ServicerContext) -> Any:
        return services_pb2.CreateRunResponse(run=check(request.envelope, "rpc.CreateRun").read(RunSpec).run)

    def cancel(request: Any, context: grpc.ServicerContext) -> Any:
        command = check(request.envelope, "rpc.CancelRun").read(services_pb2.CancelRunCommand)
        cancelled.append(command.run)
        return services_pb2.CancelRunResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    runs = services_pb2.ListRunsResponse(runs=[STATUS])
    coordinator = handlers(
        "RunService", ListRuns=lambda request, context: runs, GetRun=get_run, CreateRun=create, CancelRun=cancel
    )
    library = handlers("LibraryService", ListExperts=list_experts, GetExpert=get_expert)
    server.add_generic_rpc_handlers((coordinator, library))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with Client(address, address, Identity.generate()) as client:
        yield client, cancelled
    server.stop(None)


def test_the_verbs_of_a_job_reach_the_coordinator(served: tuple[Client, list[str]]) -> None:
    client, cancelled = served
    assert client.job.submit(RunSpec(run="mine")).to_json() == {"run": "mine"}
    assert [status.spec.run for status in client.job.list()] == ["r1"]
    assert client.job.show("r1") == STATUS
    client.job.cancel("r1", "enough")
    assert cancelled == ["r1"]
    with pytest.raises(NotFound, match="there is no run 'r2'"):
        client.job.show("r2")


def test_a_miner_is_named_by_the_beginning_of_its_key(served: tuple[Client, list[str]]) -> None:
    client, _ = served
    assert client.job.miner("UAB") == "UABB"
    with pytest.raises(Invalid, match="the keys of 2 miners begin with 'UA'"):
        client.job.miner("UA")
    with pytest.raises(NotFound, match="no miner's key begins"):
        client.job.miner("UX")


def test_the_library_is_read_page_by_page(served: tuple[Client, list[str]]) -> None:
    client, _ = served
    assert [expert.expert_id for expert in client.library.list()] == ["a", "b", "c"]
    with pytest.raises(Invalid, match="a is no record of a library expert"):
        client.library.show("a")  # Its record holds a domain and nothing else.
    assert client.library.standing("a").reason == "leak"


def test_an_interpreter_shows_whose_client_it_is() -> None:
    identity = Identity.generate()
    assert repr(Client()) == "<Client, without a key>"
    assert identity.public[:8] in repr(Client(identity=identity))
