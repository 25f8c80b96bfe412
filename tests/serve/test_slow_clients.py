"""Clients that send or read too slowly: none of them holds a connection, a place or the others up."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.harness import Running, serving
from tests.serve.test_server import ask
from tests.trained import Trained

PATIENCE = 6.0
"""Seconds that this server has for a client."""


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("slow") / "log"
    with serving(trained.run_dir, "--patience-seconds", f"{PATIENCE:g}", log=log) as running:
        yield running
    assert "Traceback" not in log.read_text(), log.read_text()


def connected(server: Running, *, receive_bytes: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    url = urlsplit(server.url)
    client.connect((url.hostname, url.port))
    client.settimeout(0.05)
    return client


def request(body: bytes, *, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def heard(client: socket.socket) -> bytes | None:
    """What the server says now; None where it has closed the connection."""
    try:
        return client.recv(1 << 16) or None
    except TimeoutError:
        return b""
    except ConnectionError:
        return None


def test_what_comes_too_slowly_is_ended(server: Running) -> None:
    """Each of them but the silent one sends a byte a second, and would for ever."""
    begun = {
        "silent": b"",
        "head": b"GET /health HT",
        "second head": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
        "body": request(b"{", length=1000),
        "body that nobody reads": request(b"{", path="/nothing", length=1000),
        "no HTTP": b"hello\r\n\r\n",
    }
    clients = {name: connected(server) for name in begun}
    said = dict.fromkeys(begun, b"")
    start, seconds, next_byte = time.monotonic(), dict.fromkeys(begun, 0.0), 1.0
    for name, client in clients.items():
        client.sendall(begun[name])
    while clients and time.monotonic() - start < 20 * PATIENCE:
        drips = time.monotonic() - start > next_byte
        next_byte += drips
        for name, client in list(clients.items()):
            while new := heard(client):
                said[name] += new
            if new is None:
                seconds[name] = time.monotonic() - start
                clients.pop(name).close()
            elif drips and name != "silent":
                client.sendall(b"a")
    assert not clients, "connections stayed open"
    assert all(s > PATIENCE - 0.5 for name, s in seconds.items() if name != "no HTTP"), seconds
    status = {name: [int(part[:3]) for part in text.split(b"HTTP/1.1 ")[1:]] for name, text in said.items()}
    assert status == {
        "silent": [], "head": [408], "second head": [200, 408], "body": [408], "body that nobody reads": [404],
        "no HTTP": [400],
    }  # fmt: skip
    for name in ("head", "body", "no HTTP"):
        error = json.loads(said[name].partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}


def long_stream(**settings: Any) -> bytes:
    """Asks for eight long answers with many numbers for each token: more than sockets hold."""
    body = ask("red", n=8, max_completion_tokens=200, stream=True, logprobs=True, top_logprobs=20, ignore_eos=True)
    return request(json.dumps(body | settings).encode())


def until_metric(server: Running, name: str, value: float) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while (now := server.metrics())[name] < value:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    return now


def test_a_reader_that_stands_still_is_paused_and_goes_on(server: Running) -> None:
    """Others are answered meanwhile; what it reads in the end is whole."""
    client = connected(server, receive_bytes=4096)
    client.sendall(long_stream())
    until_metric(server, "omni:request_pauses_total", 1)
    other = server.client().chat.completions.create(**ask("blue one two", max_completion_tokens=3))
    assert other.choices[0].message.content
    before = server.metrics()
    assert before["omni:num_requests_running"] == 8
    time.sleep(0.3)
    assert server.metrics()["omni:generation_tokens_total"] == before["omni:generation_tokens_total"] < 1600
    said = b""
    client.settimeout(60)
    while not said.endswith(b"0\r\n\r\n"):
        said += client.recv(1 << 16)
    client.close()
    chunks = [json.loads(line[6:]) for line in said.split(b"\n") if line.startswith(b"data: {")]
    texts, ends = dict.fromkeys(range(8), ""), []
    tokens = dict.fromkeys(range(8), 0)
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["delta"].get("content") or ""
        tokens[choice["index"]] += len((choice["logprobs"] or {}).get("content", ()))
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert ends == ["length"] * 8 and b"data: [DONE]" in said
    assert len(set(texts.values())) == 1 and set(tokens.values()) == {200}


def test_a_reader_that_never_goes_on_is_dropped(server: Running) -> None:
    before = server.metrics()
    client = connected(server, receive_bytes=4096)
    client.sendall(long_stream(messages=[{"role": "user", "content": "green"}]))
    until_metric(server, "omni:request_pauses_total", before["omni:request_pauses_total"] + 1)
    until_metric(server, "omni:aborts_total", before["omni:aborts_total"] + 1)
    deadline = time.monotonic() + 60
    while (now := server.metrics())["omni:num_requests_running"] or now["omni:kv_cache_usage_perc"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    client.close()
