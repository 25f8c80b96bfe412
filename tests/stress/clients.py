"""Many clients of one server for some minutes: random questions, media, nonsense and disconnects (`make stress-serve`).

    python -m tests.stress.clients [--clients 200] [--minutes 5]

A tiny model is trained, its greedy answers are taken down, then OpenAI's clients ask at random: short and long requests,
with and without media and streams, bad ones, some that are left at a random chunk. At the end nothing may be left: no
place in the cache, no descriptor, no memory beyond 5 %, and SIGTERM lets the running answers end. Prints what was counted;
status 1 where something was wrong.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil

from megatron_omni.platform.device import install

install()

from tests.serve.harness import Running, serving  # noqa: E402
from tests.serve.test_server import QUESTIONS, ask, direct_answers, mixed  # noqa: E402
from tests.trained import Trained, train_tiny  # noqa: E402

PATIENCE_SECONDS = 300.0


def idle(server: Running) -> None:
    """Wait until nothing runs."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        now = server.metrics()
        if not any(
            now[f"omni:{name}"] for name in ("num_requests_running", "num_requests_waiting", "num_samples_waiting")
        ):
            return
        assert time.monotonic() < deadline, f"stuck: {now}"
        time.sleep(0.2)


def held(server: Running) -> tuple[int, int]:
    """(descriptors, bytes of memory) of all processes."""
    me = psutil.Process(server.ranks[0].pid)
    family = [me, *me.children(recursive=True)]
    return sum(p.num_fds() for p in family), sum(p.memory_full_info().uss for p in family)


async def one_client(
    server: Running, trained: Trained, answers: list[str], seed: int, until: float, seen: Counter[str], wrong: list[str]
) -> None:
    """Asks again and again until the time is over."""
    pick = random.Random(seed)
    client = server.async_client(max_retries=0, timeout=PATIENCE_SECONDS)
    while time.monotonic() < until:
        number = pick.randrange(len(answers))
        content: Any = [*QUESTIONS, mixed(trained)][number]
        kind = pick.choices(["whole", "stream", "leave", "long", "bad"], [3, 4, 2, 1, 1])[0]
        try:
            if kind == "bad":
                bad: dict[str, Any] = pick.choice(
                    [{"temperature": "hot"}, {"messages": []}, {"model": "x"}, {"extra_body": {"what": 1}}]
                )
                await client.chat.completions.create(**(ask(content) | bad))
                wrong.append(f"{bad} was answered")
            elif kind == "long":
                settings = {"max_completion_tokens": 150, "temperature": 1.0, "extra_body": {"ignore_eos": True}}
                await client.chat.completions.create(**ask("red", n=pick.randint(1, 3), **settings))
            elif kind == "whole":
                answer = await client.chat.completions.create(**ask(content))
                if answer.choices[0].message.content != answers[number]:
                    wrong.append(f"{answer.choices[0].message.content!r} for {answers[number]!r}")
            else:
                text = await _streamed(client, content, leave_after=pick.randint(0, 8) if kind == "leave" else None)
                if text is not None and text != answers[number]:
                    wrong.append(f"{text!r} for {answers[number]!r}")
            seen[kind] += 1
        except openai.RateLimitError:
            seen["429"] += 1
            await asyncio.sleep(pick.random())
        except openai.APIStatusError as error:
            seen[str(error.status_code)] += 1
            if not error.type or error.status_code not in (400, 404, 503):
                wrong.append(f"{kind}: {error}")
    await client.close()


async def _streamed(
    client: openai.AsyncOpenAI, content: Any, leave_after: int | None = None, **settings: Any
) -> str | None:
    stream = await client.chat.completions.create(**ask(content, stream=True, **settings))
    text, count = "", 0
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        count += 1
        if leave_after is not None and count > leave_after:
            await stream.close()
            return None
    return text


def main() -> int:
    """Run it; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clients-") as place:
        directory = Path(place)
        trained = train_tiny(directory)
        answers = direct_answers(trained)
        with serving(trained.run_dir, log=directory / "log") as server:
            wrong = trial(server, trained, answers, options.clients, options.minutes * 60)
        if "Traceback" in (log := (directory / "log").read_text()):
            wrong.append(log)
    print("\n".join(wrong[:20]) or "nothing was wrong")
    return 1 if wrong else 0


def trial(server: Running, trained: Trained, answers: list[str], clients: int, seconds: float) -> list[str]:
    """What was wrong. A round of warming up comes before what is measured."""
    wrong: list[str] = []

    async def round_of(duration: float, seen: Counter[str]) -> None:
        until = time.monotonic() + duration
        work = (one_client(server, trained, answers, seed, until, seen, wrong) for seed in range(clients))
        await asyncio.gather(*work)

    asyncio.run(round_of(min(60.0, seconds / 2), Counter()))
    idle(server)
    before = held(server)
    seen: Counter[str] = Counter()
    start = time.monotonic()
    asyncio.run(round_of(seconds, seen))
    took = time.monotonic() - start
    idle(server)
    after = held(server)
    now = server.metrics()
    print(f"{clients} clients, {took:.0f} s: {dict(seen)}; {now['omni:generation_tokens_total']:.0f} tokens in all")
    print(f"descriptors {before[0]} -> {after[0]}, memory {before[1] >> 20} -> {after[1] >> 20} MiB")
    if after[0] > before[0] + 4 or after[1] > 1.05 * before[1]:
        wrong.append("something is left behind")
    if now["omni:kv_cache_usage_perc"] or now["omni:media_bytes_waiting"]:
        wrong.append(f"held: {now}")

    started = now["omni:request_started_total"]

    async def while_it_stops() -> list[str]:
        client = server.async_client(timeout=PATIENCE_SECONDS)
        long = {"max_completion_tokens": 150, "extra_body": {"ignore_eos": True}}
        streams = [asyncio.create_task(_streamed(client, "red", **long)) for _ in range(min(clients, 100))]
        while (await asyncio.to_thread(server.metrics))["omni:request_started_total"] < started + len(streams):
            await asyncio.sleep(0.05)
        os.kill(server.ranks[0].pid, signal.SIGTERM)
        return [text or "" for text in await asyncio.gather(*streams)]

    texts = asyncio.run(while_it_stops())
    if len(set(texts)) != 1 or not texts[0] or server.wait() != [0]:
        wrong.append(f"SIGTERM: {Counter(texts)}, status {server.wait()}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
