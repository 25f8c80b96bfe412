"""Errors as OpenAI's clients read them: a status, and the body {"error": {"message", "type", "param", "code"}}.

A message names the field, what is wrong with its value and what to do. It is short whatever was sent, and holds no path
of the server and no traceback.
"""

from collections.abc import Mapping
from typing import Any

from megatron_omni.foreign import printable

MOST_CHARACTERS = 600
"""Of a message: a request of kilobytes must not get megabytes of complaint."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What ends a request, as the client is told it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        shown = printable(message)
        shown = shown if len(shown) <= MOST_CHARACTERS else shown[:MOST_CHARACTERS] + "..."
        super().__init__(shown)
        self.status, self.message, self.param, self.code = status, shown, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The body of the response, or of the last event of a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, *, code: str, retry_seconds: int = 5) -> ApiError:
    """503: nothing is wrong with the request, and it may be sent again later."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_seconds)})


def not_here(what: str) -> ApiError:
    """501: this server cannot."""
    return ApiError(501, f"this server cannot {what}", code="not_implemented", headers={"X-Should-Retry": "false"})


def server_fault(message: str, *, code: str = "internal_error") -> ApiError:
    """500: our fault, and sending the same again does not help; OpenAI's client obeys the header."""
    return ApiError(500, message, code=code, headers={"X-Should-Retry": "false"})
