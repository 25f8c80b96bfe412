"""One question to an OpenAI-compatible endpoint, with a time limit that holds for all of it.

``http.client``'s own time-out is one for each read, so that a server that sends a byte a second is never late: here the
connection is closed from outside when the time is up. Proxies are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``).
"""

import contextlib
import email.utils
import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from megatron_omni.foreign import ForeignError, parse_json

MOST_BYTES = 1 << 22
"""Of an answer."""
PATH = "/chat/completions"
FINAL = frozenset({401, 402, 403, 404, 405})
"""Statuses that no other try and no other prompt would change: the address, the key or the account is wrong."""
_AGAIN = frozenset({408, 409, 425, 429})


class NoAnswer(Exception):
    """A try that failed; ``again``: whether another may help, not before ``after_seconds`` (``Retry-After``)."""

    def __init__(self, problem: str, *, again: bool = True, after_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.again, self.after_seconds = again, after_seconds


class EndpointError(ValueError):
    """The endpoint refuses every question; the message names status and fix."""


class Endpoint:
    """Where questions go. Used by many threads at once; each question has a connection of its own."""

    def __init__(self, url: str, *, key: str | None, timeout_seconds: float) -> None:
        """``url`` as for OpenAI's client (``https://host/v1``)."""
        parts = urlsplit(url)
        assert parts.scheme in ("http", "https") and parts.hostname
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix(PATH) + PATH
        self._scheme, self._key, self._seconds = parts.scheme, key, timeout_seconds

    def ask(self, body: Mapping[str, Any]) -> str:
        """The text of the first choice. NoAnswer for a try that failed, EndpointError for what no try will change."""
        connection = self._connection()
        was_cut, held = threading.Event(), list[socket.socket]()
        late = threading.Timer(self._seconds, _cut, (held, was_cut))
        late.daemon = True
        late.start()
        try:
            headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.connect()
            held.append(connection.sock)  # which the connection forgets when it has read the headers
            connection.request("POST", self._path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            data = response.read(MOST_BYTES + 1)
            if response.length and len(data) <= MOST_BYTES:
                raise http.client.IncompleteRead(data, response.length)
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = (
                f"no answer within {self._seconds:g} s" if was_cut.is_set() else f"{type(error).__name__}: {error}"
            )
            raise NoAnswer(problem) from error
        finally:
            late.cancel()
            connection.close()
        if was_cut.is_set():  # without a length, an answer that was cut looks whole
            raise NoAnswer(f"no answer within {self._seconds:g} s")
        return _text(response.status, response.headers.get("Retry-After"), data)

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        proxy = None if proxy_bypass(self._host) else getproxies().get(self._scheme)
        if not proxy:
            return kind(self._host, self._port, timeout=self._seconds)
        through = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        connection = kind(through.hostname or "", through.port or 80, timeout=self._seconds)
        connection.set_tunnel(self._host, self._port)
        return connection


def _cut(held: list[socket.socket], was_cut: threading.Event) -> None:
    """Whoever reads from the socket, in another thread, gets an error or the end. Connecting has a time-out of its own."""
    was_cut.set()
    for one in held:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def _text(status: int, retry_after: str | None, data: bytes) -> str:
    if status in FINAL:
        shown = data[:200].decode("utf-8", "replace").strip()
        raise EndpointError(f"answers {status} ({http.client.responses.get(status, 'unknown')}): {shown}")
    if status != 200:
        again = status in _AGAIN or status >= 500
        raise NoAnswer(f"status {status}", again=again, after_seconds=_seconds(retry_after))
    if len(data) > MOST_BYTES:
        raise NoAnswer(f"an answer of more than {MOST_BYTES:,} bytes")
    try:
        text = parse_json(data, "the answer")["choices"][0]["message"]["content"]
    except (ForeignError, LookupError, TypeError) as error:
        raise NoAnswer(f"no chat completion: {error}") from error
    if not isinstance(text, str):
        raise NoAnswer("no chat completion: its content is no text")
    return text


def _seconds(retry_after: str | None) -> float:
    """``Retry-After`` is a number of seconds or a date."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
