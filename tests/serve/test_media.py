"""Media of requests: what a data: URL may be, and that no address is reached that is not allowed."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

import pytest

from megatron_omni.serve import media
from megatron_omni.serve.errors import ApiError
from megatron_omni.serve.jobs import Medium
from megatron_omni.serve.media import Link, data_url_bytes, is_public, read_medium
from megatron_omni.serve.settings import Settings


def refusal(work: Callable[[], Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    return caught.value


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("data:image/png;base64,aGk=", b"hi"), ("data:;base64,aGk=", b"hi"), ("DATA:image/svg+xml;BASE64,aGk=", b"hi"),
        ("data:audio/wav;codecs=1;base64,aG k=\n", b"hi"), ("data:,a%20b", b"a b"), ("data:text/plain,x", b"x"),
    ],
)  # fmt: skip
def test_data_urls(url: str, data: bytes) -> None:
    assert data_url_bytes(url, 10, "here") == data


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,%%%", "invalid_base64"), ("data:image/png;base64,aGk", "invalid_base64"),
        ("data:image/png", "invalid_url"), ("data:;base64,é", "invalid_base64"), ("data:" + ";a=b" * 10_000, "invalid_url"),
        ("data:;base64," + "A" * 100, "media_too_large"), ("data:," + "a" * 100, "media_too_large"),
    ],
)  # fmt: skip
def test_bad_data_urls_are_named(url: str, code: str) -> None:
    error = refusal(lambda: data_url_bytes(url, 10, "messages[0].content[1].image_url.url"))
    assert (error.status, error.code, error.param) == (400, code, "messages[0].content[1].image_url.url")
    assert len(error.message) < 300


ADDRESSES = {
    "8.8.8.8": True, "2606:4700:4700::1111": True, "127.0.0.1": False, "10.1.2.3": False, "192.168.0.1": False,
    "172.16.0.1": False, "169.254.169.254": False, "0.0.0.0": False, "100.64.0.1": False, "224.0.0.1": False,
    "255.255.255.255": False, "240.0.0.1": False, "::1": False, "::": False, "fe80::1%eth0": False, "fd00::1": False,
    "::ffff:127.0.0.1": False, "::ffff:8.8.8.8": True, "64:ff9b::7f00:1": False, "2002:7f00:1::": False,
    "2001:0:7f00:1::": False, "ff02::1": False,
}  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_only_addresses_of_the_open_internet_are_public(address: str) -> None:
    assert is_public(address) is ADDRESSES[address]


LOOPBACK = ("127.0.0.1", "localhost", "2130706433", "127.1", "0x7f000001", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]")


@pytest.mark.parametrize("host", [*LOOPBACK, "localhost."])
@pytest.mark.parametrize("listed", [False, True])
def test_this_machine_is_never_reached(host: str, listed: bool) -> None:
    """Not even where the operator listed the name: the address decides."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        url = f"http://{host}:{trap.getsockname()[1]}/x.png"
        name = urlsplit(url).hostname or ""
        settings = Settings(
            name="m", media_domains=(name.rstrip("."),) if listed else ("example.com",), fetch_seconds=5.0
        )
        error = refusal(lambda: asyncio.run(read_medium(Link("image", "here", url), settings)))
        assert error.status in (400, 403) and error.param == "here"
        assert error.code == ("address_not_allowed" if listed else "domain_not_allowed") or error.status == 400
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("file:///etc/passwd", 400), ("/etc/passwd", 400), ("ftp://example.com/x", 400), ("http://", 400), ("", 400),
        ("http://a:b@example.com/", 400), ("http://example.com:99999/", 400), ("http://[::1/", 400), ("//example.com/x", 400),
        ("http://other.com/x", 403), ("http://example.com.other.com/", 403), ("http://169.254.169.254/latest", 403),
    ],
)  # fmt: skip
def test_other_urls_are_refused(url: str, status: int) -> None:
    settings = Settings(name="m", media_domains=("example.com",))
    assert refusal(lambda: asyncio.run(read_medium(Link("image", "here", url), settings))).status == status


def answered(reply: bytes | list[bytes], *, limit: int = 1000, seconds: float = 5.0) -> bytes:
    """What a fetch makes of a real server's reply, given its open connection: the part behind the test of addresses."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        assert request.startswith(b"GET /x.png?a=b HTTP/1.1\r\nHost: example.com\r\n") and b"identity" in request
        for part in [reply] if isinstance(reply, bytes) else reply:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.close()

    async def fetch() -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
            url = urlsplit("http://example.com/x.png?a=b")
            try:
                async with asyncio.timeout(seconds):
                    return await media._get(reader, writer, url, limit, Link("image", "here", ""))
            finally:
                writer.close()

    work: Coroutine[Any, Any, bytes] = fetch()
    return asyncio.run(work)


def test_a_fetch_reads_one_whole_response() -> None:
    assert answered(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello") == b"hello"
    chunked = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n"]
    assert answered(chunked) == b"abc"


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n", "media_unreachable"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "media_unreachable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", "media_too_large"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"7d0\r\n" + b"a" * 2000], "media_too_large"),
    ],
)
def test_a_fetch_follows_nothing_and_stops_at_the_limit(reply: Any, code: str) -> None:
    assert refusal(lambda: answered(reply)).code == code


def test_the_bytes_of_a_medium_keep_their_place() -> None:
    medium = asyncio.run(read_medium(Link("audio", "messages[0]", "data:;base64,aGk="), Settings(name="m")))
    assert medium == Medium(kind="audio", param="messages[0]", data=b"hi")
    assert "holds no bytes" in refusal(
        lambda: asyncio.run(read_medium(Link("audio", "here", "data:,"), Settings(name="m")))
    ).message  # fmt: skip


def test_a_drip_ends_at_the_deadline() -> None:
    drip = [b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", *[b"a"] * 100]
    with pytest.raises(TimeoutError):
        answered(drip, seconds=0.5)
