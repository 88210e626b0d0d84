"""Statuses of a failed call as the project's errors."""

from __future__ import annotations

import grpc
import pytest
from connito.errors import Fatal, Retry
from connito.service.rpc import error_of
from grpc.aio import AioRpcError, Metadata


@pytest.mark.parametrize("name", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED"])
def test_what_was_broken_off_is_tried_again(name: str) -> None:
    """A busy server cancels a call whose deadline has passed before the caller's own clock says so."""
    assert isinstance(error_of(AioRpcError(grpc.StatusCode[name], Metadata(), Metadata(), name, name)), Retry)


def test_a_fault_of_the_program_is_not() -> None:
    assert isinstance(error_of(AioRpcError(grpc.StatusCode.INTERNAL, Metadata(), Metadata(), "", "")), Fatal)
