"""What stands before every path: keys, the Host header, and headers that browsers obey.

A key, where keys are asked for, must come with every path but those of ``OPEN``; digests are compared, all of them, in
constant time. Without keys the Host header must be an address, localhost or a name that the operator listed: a page of
somebody else's that makes a browser resolve its own name to this machine (DNS rebinding) gets nothing. No header of CORS
is ever sent, so browsers let no page but this server's own read an answer.
"""

import hashlib
import ipaddress
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_omni.serve.errors import ApiError

OPEN = ("/", "/health", "/ready")
"""The page asks for the key itself; load balancers have none."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], allowed_hosts: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in api_keys]
        self._hosts = {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, _with_headers(send))
            return
        await self._app(scope, receive, _with_headers(send))

    def _check(self, path: str, headers: Headers) -> None:
        if not self._digests:
            if not self._is_known(headers.get("host", "")):
                raise ApiError(
                    403, f"the Host header names {headers.get('host', '')[:100]!r}, which this server does not go by: "
                    "use its address, or start it with --allowed-hosts or a key", code="host_not_allowed",
                )  # fmt: skip
        elif path not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            given = _digest(key.strip())
            same = [secrets.compare_digest(given, digest) for digest in self._digests]
            if kind.lower() != "bearer" or not any(same):
                raise ApiError(
                    401, "no valid key: send the header Authorization: Bearer KEY", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip

    def _is_known(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        if name == "localhost" or name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
        await send(message)

    return sending
