"""The process that speaks HTTP: ``python -m megatron_omni.serve.http LINK SOCKET [SPEAKER] [PAINTER]``, started by
``megatron-omni serve``.

LINK and SOCKET are inherited descriptors: of the pair of sockets to the engine's process, and of the port that is
listened at; SPEAKER and PAINTER those to what makes sound and what draws, - where there is none. It takes no signals: the
engine's process says when to stop, and its end is this one's.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

from megatron_omni.config.outcome import EXIT_FAILURE

_FLUSH_SECONDS = 5
"""For last words to clients, when the time is over."""


def main(words: list[str]) -> int:
    """Serve until the engine's process says stop, or ends; the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    link, listening = Connection(int(words[0])), socket.socket(fileno=int(words[1]))
    speaker, painter = (Connection(int(word)) if word != "-" else None for word in (*words[2:], "-", "-")[:2])
    return asyncio.run(serve(link, listening, speaker, painter))


async def serve(
    link: Connection, listening: socket.socket, speaker: Connection | None, painter: Connection | None = None
) -> int:
    """Answer requests at ``listening``; the exit status."""
    import uvicorn

    from megatron_omni.serve.app import application
    from megatron_omni.serve.builders import Builders
    from megatron_omni.serve.connection import patient_protocol
    from megatron_omni.serve.engine_client import EngineClient
    from megatron_omni.serve.errors import unavailable
    from megatron_omni.serve.metrics import Metrics
    from megatron_omni.serve.picture_client import PictureClient
    from megatron_omni.serve.server import Server
    from megatron_omni.serve.settings import Settings
    from megatron_omni.serve.speech_client import SpeechClient

    class QuietServer(uvicorn.Server):
        """Leaves signals alone."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    settings: Settings = link.recv()
    metrics = Metrics()
    engine = EngineClient(link, happened=metrics.happened, paused=metrics.paused.inc)
    speech = SpeechClient(speaker) if speaker is not None else None
    pictures = PictureClient(painter) if painter is not None else None
    server = Server(settings, engine, metrics, speech, pictures)
    config = uvicorn.Config(
        application(server),
        http=patient_protocol(settings.patience_seconds),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    http = QuietServer(config)
    serving = asyncio.create_task(http.serve(sockets=[listening]))

    async def start_builders() -> None:
        await engine.opened.wait()
        if engine.recipe is None:
            await asyncio.Event().wait()
        assert engine.recipe is not None
        builders = Builders(engine.recipe, number=settings.builders, seconds=settings.build_seconds)
        try:
            await builders.start()
            server.builders = builders
            await asyncio.Event().wait()  # until cancelled: that it ends is an error
        finally:
            builders.close()

    async def stop_when_told() -> None:
        await engine.told_to_drain.wait()
        await server.door.until_empty(engine.grace_seconds)
        engine.end_all(unavailable("the server stops", code="shutting_down"))
        await server.door.until_empty(_FLUSH_SECONDS)

    async def until_speaker_ends() -> None:
        if speech is None:
            await asyncio.Event().wait()
        else:
            await engine.opened.wait()
            await speech.until_it_ends(server.facts.tokenizer)

    async def until_painter_ends() -> None:
        await (pictures.ended if pictures is not None else asyncio.Event()).wait()

    works = (stop_when_told(), engine.ended.wait(), start_builders(), until_speaker_ends(), until_painter_ends())
    tasks = [asyncio.ensure_future(work) for work in works]
    done, _ = await asyncio.wait([*tasks, serving], return_when=asyncio.FIRST_COMPLETED)
    helpers = [helper for helper in (speech, pictures) if helper is not None]
    helper_failed = next((helper.failed for helper in helpers if helper.failed is not None), "")
    failed = engine.failed is not None or bool(helper_failed)
    if failed:
        await server.door.until_empty(_FLUSH_SECONDS)  # every stream gets its last event
    http.should_exit = True
    await serving
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
    engine.close(speaker_failed=helper_failed)
    for helper in helpers:
        helper.close()
    return EXIT_FAILURE if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
