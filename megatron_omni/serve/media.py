"""Media of a request as bytes: from data: URLs, from base64, or fetched from hosts that the operator allowed.

Nothing is decoded here. A fetch goes to an address that was looked at: the name is resolved once, every address of it
must be public, and the connection is made to one of these, so a name that changes its address in between leads nowhere.
Redirects are refused, the encoding is identity, bytes are counted while they come, and one deadline covers it all.
``file:`` and paths are never read.
"""

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

import h11

from megatron_omni.serve.errors import ApiError, bad_request
from megatron_omni.serve.jobs import Kind, Medium
from megatron_omni.serve.settings import Settings

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.ASCII | re.IGNORECASE)
_SPACE = re.compile(r"\s+")
_NAT64, _SIX_TO_FOUR = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2002::/16")
"""Addresses that hold another one inside; ipaddress counts them as global."""
_READ_BYTES = 1 << 16
_ACCEPT = {"image": "image/*", "audio": "audio/*, video/*", "video": "video/*"}


@dataclass(frozen=True)
class Link:
    """A part of a message that names a medium: what it is, where it stands in the request, and where its bytes are."""

    kind: Kind
    param: str
    url: str


async def read_medium(medium: Link, settings: Settings) -> Medium:
    """The bytes of a medium; ApiError where they cannot be had."""
    limit = settings.max_image_bytes if medium.kind == "image" else settings.max_clip_bytes
    if medium.url[:5].lower() == "data:":
        data = await asyncio.to_thread(data_url_bytes, medium.url, limit, medium.param)
    else:
        data = await _fetch_within(medium, limit, settings)
    if not data:
        raise bad_request(f"{medium.param}: holds no bytes", param=medium.param, code="invalid_media")
    return Medium(kind=medium.kind, param=medium.param, data=data)


def data_url_bytes(url: str, limit: int, param: str) -> bytes:
    """What a ``data:`` URL holds; ApiError for one that is wrong or longer than ``limit`` bytes."""
    head = _DATA_URL.match(url[:1024])
    if head is None:
        raise bad_request(f"{param}: is no data: URL; write data:image/png;base64,...", param=param,
                          code="invalid_url")  # fmt: skip
    body = url[head.end() :]
    _check_size(len(body) * 3 // 4 if head[3] else len(body) // 3, limit, param)
    if not head[3]:
        data = unquote_to_bytes(body)
    else:
        try:
            data = base64.b64decode(_SPACE.sub("", body), validate=True)
        except (binascii.Error, ValueError) as error:
            raise bad_request(f"{param}: is not valid base64 ({error})", param=param, code="invalid_base64") from None
    _check_size(len(data), limit, param)
    return data


def _check_size(num_bytes: int, limit: int, param: str) -> None:
    if num_bytes > limit:
        raise bad_request(f"{param}: {num_bytes} bytes, above the limit of {limit}", param=param,
                          code="media_too_large")  # fmt: skip


# ------------------------------------------------------------------------------------------------ fetching


async def _fetch_within(medium: Link, limit: int, settings: Settings) -> bytes:
    url = _checked_url(medium.url, settings.media_domains, medium.param)
    try:
        async with asyncio.timeout(settings.fetch_seconds):
            return await _fetch(url, limit, medium)
    except TimeoutError:
        raise _unreachable(url, f"took longer than {settings.fetch_seconds:g} s", medium.param) from None
    except (OSError, ssl.SSLError, h11.ProtocolError, UnicodeError):  # the details are for nobody outside
        raise _unreachable(url, "could not be read", medium.param) from None


def _checked_url(text: str, domains: Sequence[str], param: str) -> SplitResult:
    """The parts of an http(s) URL to an allowed host; ApiError 400 or 403."""
    try:
        url = urlsplit(text)
        host, _ = url.hostname, url.port
    except ValueError:
        raise bad_request(f"{param}: is no URL", param=param, code="invalid_url") from None
    if url.scheme not in ("http", "https") or not host:
        raise bad_request(f"{param}: send the bytes in a data: URL (data:image/png;base64,...)", param=param,
                          code="invalid_url")  # fmt: skip
    if url.username is not None or url.password is not None:
        raise bad_request(f"{param}: a URL with a name or password is not fetched", param=param, code="invalid_url")
    if host.rstrip(".").lower() not in domains:
        hint = f"allowed are {', '.join(domains)}" if domains else "this server fetches nothing (--media-domains)"
        raise ApiError(403, f"{param}: media are not fetched from {host[:100]!r}; {hint}. Send the bytes in a data: URL",
                       param=param, code="domain_not_allowed")  # fmt: skip
    return url


async def _fetch(url: SplitResult, limit: int, medium: Link) -> bytes:
    host = url.hostname or ""
    port = url.port or (443 if url.scheme == "https" else 80)
    address = await _public_address(host, port, medium.param)
    context = ssl.create_default_context() if url.scheme == "https" else None
    # The address is dialled; the certificate and the Host header stay the name's.
    reader, writer = await asyncio.open_connection(
        address, port, ssl=context, server_hostname=host if context else None
    )
    try:
        return await _get(reader, writer, url, limit, medium)
    finally:
        writer.close()


async def _get(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, url: SplitResult, limit: int, medium: Link
) -> bytes:
    """One GET; the bytes of a response 200."""
    connection = h11.Connection(our_role=h11.CLIENT)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    default_port = {"http": 80, "https": 443}[url.scheme]
    host = url.hostname or ""
    host = f"[{host}]" if ":" in host else host
    headers = [
        ("Host", host if url.port in (None, default_port) else f"{host}:{url.port}"),
        ("User-Agent", "megatron-omni"),
        ("Accept", _ACCEPT[medium.kind]),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
    parts: list[bytes] = []
    total = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response):
            if event.status_code != 200:
                kind = "redirects, which are not followed" if 300 <= event.status_code < 400 else "failed"
                raise _unreachable(url, f"{kind} (status {event.status_code})", medium.param)
            promised = dict(event.headers).get(b"content-length", b"0")
            _check_size(int(promised) if promised.isdigit() else 0, limit, medium.param)
        elif isinstance(event, h11.Data):
            total += len(event.data)
            _check_size(total, limit, medium.param)
            parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            return b"".join(parts)
        elif isinstance(event, h11.ConnectionClosed):
            raise _unreachable(url, "ended before its bytes were there", medium.param)


async def _public_address(host: str, port: int, param: str) -> str:
    """An address of ``host``; ApiError 403 where one of its addresses is not public."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not is_public(address):
            raise ApiError(403, f"{param}: {host[:100]!r} is at an address that is not public", param=param,
                           code="address_not_allowed")  # fmt: skip
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the open Internet: not this machine, its networks, or a way round to them."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64 or ip in _SIX_TO_FOUR or ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not ip.is_unspecified


def _unreachable(url: SplitResult, problem: str, param: str) -> ApiError:
    return bad_request(f"{param}: {url.scheme}://{(url.hostname or '')[:100]} {problem}", param=param,
                       code="media_unreachable")  # fmt: skip
