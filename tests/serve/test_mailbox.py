"""When the mailbox of an answer wakes its reader: the first and the last at once, tokens between them some milliseconds apart."""

import asyncio

from megatron_omni.generation.request import FinishedEvent, TokenEvent, Usage
from megatron_omni.serve.engine_client import Mailbox

TOKENS = [TokenEvent(name="a", sample=0, id=id, text=str(id)) for id in range(4)]
END = FinishedEvent(name="a", sample=0, reason="stop", usage=Usage(prompt=1, cached=0, completion=4))


def test_the_first_and_the_last_wake_their_reader_at_once() -> None:
    async def read() -> None:
        box = Mailbox(1, token_seconds=60.0)
        box.put(TOKENS[0], {})
        assert await box.take(5.0) == TOKENS[:1]
        box.put(TOKENS[1], {})
        box.put(TOKENS[2], {})
        assert await box.take(0.01) == []
        box.put(END, {})
        assert await box.take(5.0) == [*TOKENS[1:3], END]

    asyncio.run(read())


def test_tokens_within_the_time_come_together() -> None:
    async def read(token_seconds: float) -> None:
        box = Mailbox(1, token_seconds=token_seconds)
        box.put(TOKENS[0], {})
        assert await box.take(5.0) == TOKENS[:1]
        reader = asyncio.create_task(box.take(5.0))
        for token in TOKENS[1:]:
            box.put(token, {})
            await asyncio.sleep(0)
        assert await reader == TOKENS[1 : 4 if token_seconds else 2]

    asyncio.run(read(0.05))
    asyncio.run(read(0.0))
