"""The connection of a client: uvicorn's HTTP/1.1, with a limit on how long a request may take to come.

uvicorn waits for ever for the rest of a head, and for a body that nobody reads: a few bytes a minute hold a connection
and its descriptor. Here the head must be whole ``PATIENCE_SECONDS`` after the connection was made or after its first
byte, and what is left of a body that was answered before it had come (an error) after as long. Bodies that are read have
their own limit (intake.py), connections without a request uvicorn's (keep-alive).
"""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_omni.serve.errors import ApiError


def patient_protocol(seconds: float) -> type[H11Protocol]:
    """A protocol for uvicorn whose clients have so many seconds for the head of a request."""
    return type("PatientProtocol", (_Patient,), {"patience_seconds": seconds})


class _Patient(H11Protocol):
    patience_seconds: float
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_the_rest()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE:
            self._expect_the_rest()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and not self._is_left_over():
            self._forget()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_left_over() and not self.transport.is_closing():
            self._expect_the_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP, in the form of all errors."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _is_left_over(self) -> bool:
        """Whether the body of a request comes that has its answer."""
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)

    def _expect_the_rest(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.patience_seconds, self._on_deadline)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(ApiError(408, f"the head of the request was not whole after {self.patience_seconds:g} s",
                                  code="head_too_slow"))  # fmt: skip
        elif self.conn.their_state is h11.IDLE or self._is_left_over():  # it never sent anything, or has its answer
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Say it, where an answer has not begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
