"""What comes in: bodies within their limits, places at the door, clients that leave or do not read."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.datastructures import Headers

from megatron_omni.serve import intake
from megatron_omni.serve.errors import ApiError
from megatron_omni.serve.intake import ClientGone, Door, read_body, read_json, while_connected, within
from megatron_omni.serve.metrics import Metrics
from megatron_omni.serve.settings import Settings

JSON = Headers({"content-type": "application/json; charset=utf-8"})


def door(**limits: float) -> Door:
    return Door(Settings(name="m", **limits), Metrics())  # type: ignore[arg-type]


def sending(*parts: bytes, seconds: float = 0.0, ends: bool = True) -> Callable[[], Awaitable[dict[str, Any]]]:
    """A client that sends these parts of a body, so many seconds apart."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if ends:
        messages[-1]["more_body"] = False
    else:
        messages.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(seconds)
        return messages.pop(0)

    return receive


def refused(work: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(work)
    return caught.value


def test_a_body_comes_in_parts() -> None:
    with door().place() as place:
        assert asyncio.run(read_json(JSON, sending(b'{"a"', b": 1}"), place, 100)) == {"a": 1}
        large = b'"' + b"a" * (2 << 20) + b'"'
        assert len(asyncio.run(read_json(JSON, sending(large), place, 4 << 20))) == 2 << 20


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"), (b"\xff", "not UTF-8"), (b'{"a": 1, "a": 2}', "twice"), (b'"\\ud800"', "surrogate"),
        (b"[" * 9999, "JSON"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_said(body: bytes, said: str) -> None:
    with door().place() as place:
        error = refused(read_json(JSON, sending(body), place, 1 << 20))
    assert error.status == 400 and error.code == "invalid_json" and said in error.message


def test_a_body_that_is_too_large_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_DISCARDED_BYTES", 200)
    with door().place() as place:
        promised = Headers({"content-length": "101"})
        assert refused(read_body(promised, sending(b"a little"), place, 100)).status == 413
        parts = sending(*[b"a" * 60] * 6, b"never read")
        assert refused(read_body(Headers({}), parts, place, 100)).status == 413
        assert asyncio.run(parts())["body"] == b"never read", "two were read, and four thrown away"


def test_a_body_that_drips_is_refused() -> None:
    start = time.monotonic()
    with door(patience_seconds=0.3).place() as place:
        error = refused(read_body(Headers({}), sending(*[b"a"] * 100, seconds=0.05), place, 1000))
    assert error.status == 408 and time.monotonic() - start < 5.0


def test_a_client_that_leaves_while_it_sends_is_gone() -> None:
    with door().place() as place, pytest.raises(ClientGone):
        asyncio.run(read_body(Headers({}), sending(b"a", ends=False), place, 100))


def test_places_and_bytes_are_counted_until_they_are_free() -> None:
    counted = door(max_waiting=2, max_waiting_bytes=100)
    with counted.place() as first:
        first.hold(60)
        with counted.place() as second:
            with pytest.raises(ApiError) as full, counted.place():
                pass
            assert full.value.status == 429 and full.value.headers["Retry-After"]
            with pytest.raises(ApiError, match="memory"):
                second.hold(41)
            second.hold(40)
            first.starts()
            with counted.place():
                assert counted.waiting == 2
        assert (counted.waiting, counted.num_bytes) == (0, 60)
        first.hold(10)
        assert counted.num_bytes == 10
    assert (counted.waiting, counted.num_bytes) == (0, 0)
    with counted.place() as alone:
        alone.hold(1000)  # one that is alone may be larger than all together may be


def test_work_ends_when_the_client_leaves() -> None:
    ended = []

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
            return "done"
        finally:
            ended.append(seconds)

    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def failing() -> None:
        raise ApiError(400, "no")

    with pytest.raises(ClientGone):
        asyncio.run(while_connected(sending(b"", ends=False), work(30)))
    assert ended == [30]
    assert asyncio.run(while_connected(never, work(0))) == "done"
    assert refused(while_connected(never, failing())).status == 400


def test_a_client_that_does_not_read_is_gone() -> None:
    with pytest.raises(ClientGone):
        asyncio.run(within(0.05, asyncio.sleep(30)))
