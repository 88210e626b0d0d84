"""Refusals in the shape that clients of OpenAI's interface read."""

from __future__ import annotations

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request that is not answered: its HTTP status, one sentence, and which parameter it is about."""

    def __init__(self, status: int, message: str, *, code: str = "", param: str = "") -> None:
        """Keep what the client is told."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def document(self) -> dict[str, dict[str, str | None]]:
        """Return the body of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        }
