"""The error taxonomy: what an exception means for the message, the command or the process that met it.

Three meanings, one to one with what happens to a message on the bus:

========== ===================================== ==============================================
exception  on the bus                            on the command line
========== ===================================== ==============================================
`Retry`    negative acknowledgement with delay   exit 5, unavailable
`Invalid`  a fact with the reason, DLQ, ack      exit 3, invalid input (or the code given)
`Fatal`    the process ends, its supervisor acts exit 1
========== ===================================== ==============================================
"""

from __future__ import annotations

from connito.v1 import reasons_pb2 as reasons


class ConnitoError(Exception):
    """Base of the errors that carry a meaning. The text says what, why and what to do next."""

    exit_code = 1


class Retry(ConnitoError):  # noqa: N818 - reads as the verdict it is
    """A passing fault: the same thing may succeed after `after` seconds."""

    exit_code = 5

    def __init__(self, message: str, *, after: float = 1.0) -> None:
        super().__init__(message)
        self.after = after


class Invalid(ConnitoError):  # noqa: N818
    """The input is wrong and will stay wrong. `reason` is shown to whoever sent it.

    `after`: a quota is used up, and the same may be asked again in so many seconds. `about`: the tensor at fault.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        reason: reasons.Reason.ValueType = reasons.REASON_MALFORMED,
        after: float = 0.0,
        about: str = "",
    ) -> None:
        super().__init__(message)
        self.reason, self.after, self.about = reason, after, about


class NotFound(Invalid):
    """The requested object does not exist."""

    exit_code = 4


class VerificationFailed(Invalid):
    """A digest, signature or recomputed value differs from what was claimed."""

    exit_code = 6


class ValidatorAtFault(VerificationFailed):
    """Verification failed of what validators signed; what the operator's services made of it holds."""

    exit_code = 7


class MinerAtFault(VerificationFailed):
    """Verification failed of what miners signed; what everybody else made of it holds."""

    exit_code = 8


class Fatal(ConnitoError):  # noqa: N818
    """The process cannot go on: broken configuration, lost lease, violated invariant."""
