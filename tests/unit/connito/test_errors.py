from __future__ import annotations

import pytest
from connito.errors import ConnitoError, Fatal, Invalid, NotFound, Retry, VerificationFailed
from connito.v1 import reasons_pb2
from connito.wire.enums import reason_name


def test_each_meaning_has_the_exit_code_that_users_rely_on() -> None:
    codes = {error: error.exit_code for error in (Invalid, NotFound, Retry, VerificationFailed, Fatal)}
    assert codes == {Invalid: 3, NotFound: 4, Retry: 5, VerificationFailed: 6, Fatal: 1}


def test_retry_carries_its_delay_and_invalid_its_reason() -> None:
    assert Retry("later", after=2.5).after == 2.5
    assert Invalid("no").reason == reasons_pb2.REASON_MALFORMED
    assert NotFound("gone", reason=reasons_pb2.REASON_ARTIFACT_MISSING).reason == reasons_pb2.REASON_ARTIFACT_MISSING
    assert isinstance(VerificationFailed("x"), ConnitoError)


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (reasons_pb2.REASON_UNSPECIFIED, ""),
        (reasons_pb2.REASON_LATE_REVEAL, "late-reveal"),
        (reasons_pb2.REASON_COPY, "copy"),
    ],
)
def test_reasons_are_shown_as_words(reason: reasons_pb2.Reason.ValueType, name: str) -> None:
    assert reason_name(reason) == name
