"""The error taxonomy: what an exception means for the message, the command or the process that met it.

Three meanings, one to one with what happens to a message on the bus:

========== ===================================== ==============================================
exception  on the bus                            on the command line
========== ===================================== ==============================================
`Retry`    negative acknowledgement with delay   exit 5, unavailable
`Invalid`  a fact with the reason, DLQ, ack      exit 3, invalid input (or the code given)
`Fatal`    the process ends, its supervisor acts exit 1
========== ===================================== ==============================================

Across them lies another difference. An `Environment` is here and now: it says nothing about what somebody sent, a service
tries again for as long as it takes, and nobody may make a verdict of it. Readers with a command line still get its code.
"""

from __future__ import annotations

from connito.v1 import reasons_pb2 as reasons


class ConnitoError(Exception):
    """Base of the errors that carry a meaning. The text says what, why and what to do next."""

    exit_code = 1


class Environment(ConnitoError):  # noqa: N818 - a fault that is nobody's
    """A fault of what is around this process, here and now. `dependency` names what is to be repaired: store, disk, …"""

    dependency = "peer"
    after = 1.0


class Retry(Environment):
    """A passing fault: the same thing may succeed after `after` seconds."""

    exit_code = 5

    def __init__(self, message: str, *, after: float = 1.0, dependency: str = "peer") -> None:
        super().__init__(message)
        self.after, self.dependency = after, dependency


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


class Unusable(Invalid, Environment):
    """The disk, the credentials or the like of this machine are of no use until somebody acts."""

    def __init__(self, message: str, *, dependency: str, reason: reasons.Reason.ValueType) -> None:
        super().__init__(message, reason=reason, after=1.0)
        self.dependency = dependency


class ObjectMissing(NotFound, Environment):
    """The store lacks an object that it was given; restoring it from a copy is all it takes."""

    dependency = "object"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=reasons.REASON_ARTIFACT_MISSING, after=1.0)


class ObjectDamaged(VerificationFailed, Environment):
    """The store returns other bytes than an object had; restoring it from a copy is all it takes."""

    dependency = "object"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=reasons.REASON_DIGEST_MISMATCH, after=1.0)


class Fatal(ConnitoError):  # noqa: N818
    """The process cannot go on: broken configuration, lost lease, violated invariant."""
