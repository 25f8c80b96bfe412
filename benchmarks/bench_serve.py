"""What serving costs beside the engine: the same requests through the engine in one process, and over HTTP.

    python -m benchmarks.bench_serve --checkpoint runs/quickstart --json FILE [--streams 32] [--requests 128] [--repeat 3]

Each of ``--streams`` clients sends its next request when the last token of the one before has come; prompts of 32 tokens,
64 to 184 new ones, greedy, streamed; with ``--chunk-ms 0`` every token is a chunk. With ``--equal`` all answers have
128: then those that began together end together, and all clients send their next request at one moment, as no clients in
the world do.

The engine's process has one core, HTTP and the client the other one. Both ways are taken in turn ``--repeat`` times,
medians are written: ``tokens_per_s`` by the wall clock less the time that the engine's process was ready and waited for
its core (/proc/PID/schedstat: what other programs took), and ``tokens_per_cpu_s``, tokens for each second that it
computed. ``overhead`` is the share of the engine's tokens that serving costs, ``seconds_waited`` says how busy the
machine was. ``tokens_per_step`` is 32 where all streams always have a token to compute: over HTTP a stream misses the
steps between its last token and the arrival of its next request, which takes ``queue_ms`` from its first byte to its
first step. ``http_``, ``builders_`` and ``client_cpu_us_per_token`` is what the others compute for a token, all on the
second core. Needs two cores of a Linux machine; the first two are taken.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

PROMPT_TOKENS, NEW_TOKENS = 32, range(64, 185)
EQUAL_TOKENS = 128
ENGINE_CORE, HTTP_CORE = 0, 1


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, the same for both ways."""

    streams: int
    requests: int
    equal: bool
    chunk_ms: float = 10.0

    def asked(self, number: int, vocab_size: int) -> list[tuple[list[int], int]]:
        """Random prompts, and how many tokens each is answered with."""
        pick, lengths = random.Random(0), random.Random(1)
        return [
            (
                [pick.randrange(vocab_size // 2, vocab_size) for _ in range(PROMPT_TOKENS)],
                EQUAL_TOKENS if self.equal else lengths.choice(NEW_TOKENS),
            )
            for _ in range(number)
        ]


def measure_direct(checkpoint: Path, load: Load) -> dict[str, float]:
    """In this process: the engine alone."""
    os.sched_setaffinity(0, {ENGINE_CORE})
    from megatron_omni.platform.device import install

    install()
    from megatron_omni.generation.engine import Engine, EngineLimits
    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.generation.request import FinishedEvent, Request

    opened = open_checkpoint(checkpoint)
    builder = opened.builder
    limits = EngineLimits(max_running=load.streams)
    with Engine(opened.load_model(), tokenizer=builder.tokenizer, pg=opened.pg, limits=limits) as engine:
        for measured in (False, True):
            asked = load.asked(load.requests if measured else load.streams, builder.tokenizer.vocab_size)
            waiting = [
                Request(name=str(i), prompt=builder.build_text(ids), max_new_tokens=length, ignore_eos=True, text=True)
                for i, (ids, length) in enumerate(asked)
            ]
            before = _clocks(os.getpid())
            tokens = running = steps = 0
            while waiting or engine.busy:
                while waiting and running < load.streams:
                    engine.submit(waiting.pop())
                    running += 1
                steps += 1
                for event in engine.step():
                    if isinstance(event, FinishedEvent):
                        tokens += event.usage.completion
                        running -= 1
    return _outcome(tokens, before, _clocks(os.getpid())) | {"tokens_per_step": tokens / steps}


async def one_stream(port: int, model: str, waiting: list[tuple[list[int], int]]) -> int:
    """Requests one after the other over one connection; tokens that came. No client's library: it would be measured."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    tokens = 0
    while waiting:
        ids, length = waiting.pop()
        body = json.dumps({
            "model": model, "prompt": ids, "max_tokens": length, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        said = await reader.read(1 << 16)
        if not said.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answers {said[:2000]!r}")
        while not said.endswith(b"0\r\n\r\n"):  # the last chunk of the response
            part = await reader.read(1 << 16)
            if not part:
                raise RuntimeError("the server closed the connection in the middle of an answer")
            said = said[-4096:] + part
        tokens += int(re.findall(rb'"completion_tokens": (\d+)', said)[-1])
    writer.close()
    return tokens


def measure_http(checkpoint: Path, load: Load) -> dict[str, float]:
    """A server on the one core, HTTP and this process on the other."""
    words = [
        sys.executable,
        "-m",
        "megatron_omni.cli.serve",
        str(checkpoint),
        "--port",
        "0",
        "--max-running",
        str(load.streams),
        "--chunk-ms",
        str(load.chunk_ms),
    ]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = re.search(r"serving (\S+) at http://127.0.0.1:(\d+)/", server.stdout.readline())
        assert said is not None, "the server did not start"
        model, port = said[1], int(said[2])
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/ready")
                break
            except OSError:
                time.sleep(0.2)
        engine = psutil.Process(server.pid)
        _pin(engine.pid, ENGINE_CORE)
        for process in engine.children(recursive=True):
            _pin(process.pid, HTTP_CORE)
        os.sched_setaffinity(0, {HTTP_CORE})
        vocab_size = _vocab_size(checkpoint)

        async def run(waiting: list[tuple[list[int], int]]) -> int:
            return sum(await asyncio.gather(*(one_stream(port, model, waiting) for _ in range(load.streams))))

        asyncio.run(run(load.asked(load.streams, vocab_size)))
        (http,) = (child for child in engine.children() if "megatron_omni.serve.http" in child.cmdline())
        others = {"http": [http], "builders": http.children(recursive=True), "client": [psutil.Process()]}

        def seconds() -> dict[str, float]:
            return {name: sum(sum(p.cpu_times()[:2]) for p in processes) for name, processes in others.items()}

        before, others_before, counted = _clocks(engine.pid), seconds(), _metrics(port)
        tokens = asyncio.run(run(load.asked(load.requests, vocab_size)))
        after, others_after, counts = _clocks(engine.pid), seconds(), _metrics(port)
        steps, asked, waited = (
            counts[name] - counted[name]
            for name in ("omni:batch_tokens_count", "omni:request_queue_time_seconds_count",
                         "omni:request_queue_time_seconds_sum")
        )  # fmt: skip
        return (
            _outcome(tokens, before, after)
            | {"tokens_per_step": tokens / steps, "queue_ms": waited / asked * 1e3}
            | {f"{name}_cpu_us_per_token": (others_after[name] - others_before[name]) / tokens * 1e6 for name in others}
        )
    finally:
        server.terminate()
        server.wait()
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _metrics(port: int) -> dict[str, float]:
    """What the server says of itself."""
    lines = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def _pin(pid: int, core: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def _clocks(pid: int) -> tuple[float, float, float]:
    """Seconds by the wall clock, on a core, and ready but waiting for one, of a process' main thread."""
    computed, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    return time.perf_counter(), computed / 1e9, waited / 1e9


def _outcome(tokens: int, before: tuple[float, float, float], after: tuple[float, float, float]) -> dict[str, float]:
    wall, computed, waited = (b - a for a, b in zip(before, after))
    return {"tokens": tokens, "seconds": wall - waited, "cpu_seconds": computed, "seconds_waited": waited}


def _vocab_size(checkpoint: Path) -> int:
    from megatron_omni.checkpoint.commit import find
    from megatron_omni.checkpoint.distributed import tokenizer_path
    from megatron_omni.data.tokenizer import load_tokenizer

    directory = find(checkpoint)
    assert directory is not None
    return load_tokenizer(tokenizer_path(directory)).vocab_size


def main() -> None:
    """Measure both ways in turn and write the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--equal", action="store_true", help=f"all answers have {EQUAL_TOKENS} tokens")
    parser.add_argument(
        "--chunk-ms", type=float, default=10.0, help="of the server (default 10; 0: each token a chunk)"
    )
    parser.add_argument(
        "--direct", action="store_true", help="this process is the engine's (used by the command itself)"
    )
    options = parser.parse_args()
    load = Load(streams=options.streams, requests=options.requests, equal=options.equal, chunk_ms=options.chunk_ms)
    if options.direct:
        print(json.dumps(measure_direct(options.checkpoint, load)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    taken: dict[str, list[dict[str, float]]] = {"engine": [], "http": []}
    words = [sys.executable, "-m", "benchmarks.bench_serve", "--direct", "--checkpoint", str(options.checkpoint)]
    words += ["--streams", str(options.streams), "--requests", str(options.requests), *["--equal"] * options.equal]
    for _ in range(options.repeat):
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        taken["engine"].append(json.loads(done.stdout.splitlines()[-1]))
        taken["http"].append(measure_http(options.checkpoint, load))
    rows: list[dict[str, Any]] = []
    vocab_size = _vocab_size(options.checkpoint)
    for way, runs in taken.items():
        wanted = sum(length for _, length in load.asked(load.requests, vocab_size))
        assert {run["tokens"] for run in runs} == {wanted}, "not every token came"
        row: dict[str, Any] = {
            "model": str(options.checkpoint), "streams": load.streams, "requests": load.requests, "equal": load.equal,
            "chunk_ms": load.chunk_ms, "way": way,
            "tokens_per_s": round(statistics.median(run["tokens"] / run["seconds"] for run in runs), 1),
            "tokens_per_cpu_s": round(statistics.median(run["tokens"] / run["cpu_seconds"] for run in runs), 1),
        }  # fmt: skip
        others = [name for name in runs[0] if name not in ("tokens", "seconds", "cpu_seconds", "seconds_waited")]
        row |= {name: round(statistics.median(run[name] for run in runs), 1) for name in others}
        row["seconds_waited"] = round(statistics.median(run["seconds_waited"] for run in runs), 2)
        rows.append(row)
        row["overhead"] = round(1 - row["tokens_per_s"] / rows[0]["tokens_per_s"], 3)
        row["cpu_overhead"] = round(1 - row["tokens_per_cpu_s"] / rows[0]["tokens_per_cpu_s"], 3)
        print(row)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
