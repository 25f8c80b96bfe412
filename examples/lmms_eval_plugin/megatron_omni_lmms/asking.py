"""All requests of a task at once, a bounded number of them under way, answers in the order of the requests.

A request that the server refuses (an unreadable picture, a prompt that is too long) is named, counted and answered with
``""``: one bad sample among thousands does not end a run of hours. Anything else that goes wrong does: no key, no server,
an engine that has died.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openai import APIStatusError, AsyncOpenAI

logger = logging.getLogger(__name__)

REFUSED = (400, 413, 415, 422)
"""Statuses that speak of this request alone."""
MAX_RETRIES = 8
"""Of a full queue (429) or a server that is busy (503); the client waits as long as the server says."""


@dataclass
class Question:
    """One request, whose body is made when its turn comes: media of thousands never lie in memory together."""

    name: str
    """For messages: task and number of the document."""
    body: Callable[[], dict[str, Any]]
    """Arguments of ``chat.completions.create``, or of ``completions.create``, without the model."""


class Asker:
    """Asks one server."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "none",
        model: str | None = None,
        concurrency: int = 64,
        timeout: float = 3600.0,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"num_concurrent is {concurrency}; it must be at least 1")
        self._settings: dict[str, Any] = {
            "base_url": base_url, "api_key": api_key, "timeout": timeout, "max_retries": MAX_RETRIES,
        }  # fmt: skip
        self._model, self._concurrency = model, concurrency
        self.refused: list[str] = []
        """Names of the requests that the server refused."""

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """The text of each answer, without what stands before ``</think>``."""

        async def ask(client: AsyncOpenAI, model: str, body: dict[str, Any]) -> str:
            answer = await client.chat.completions.create(model=model, **body)
            return without_thought(answer.choices[0].message.content or "")

        return self._all(questions, ask, refused="")

    def likelihoods(self, pairs: Sequence[tuple[str, str, str]]) -> list[tuple[float, bool]]:
        """For (name, context, continuation): the continuation's log-probability, and whether it is the greedy one."""

        async def ask(client: AsyncOpenAI, model: str, body: dict[str, Any]) -> tuple[float, bool]:
            begins = body.pop("begins")
            answer = await client.completions.create(model=model, **body)
            return _likelihood(answer.choices[0], body["prompt"], begins)

        return self._all([_pair(*pair) for pair in pairs], ask, refused=(float("-inf"), False))

    def _all[T](
        self,
        questions: Sequence[Question],
        ask: Callable[[AsyncOpenAI, str, dict[str, Any]], Awaitable[T]],
        *,
        refused: T,
    ) -> list[T]:
        from tqdm import tqdm  # openai needs it

        async def run() -> list[T]:
            turn, bar = asyncio.Semaphore(self._concurrency), tqdm(total=len(questions), desc="asking")
            async with AsyncOpenAI(**self._settings) as client:
                model = self._model or (await client.models.list()).data[0].id

                async def one(question: Question) -> T:
                    async with turn:
                        try:
                            return await ask(client, model, question.body())
                        except APIStatusError as error:
                            if error.status_code not in REFUSED:
                                raise
                            logger.warning("%s: refused: %s", question.name, error.message)
                            self.refused.append(question.name)
                            return refused
                        finally:
                            bar.update()

                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(one(question)) for question in questions]
                except* Exception as failed:  # the first is the cause, the rest were under way
                    raise failed.exceptions[0] from None
                finally:
                    bar.close()
                return [task.result() for task in tasks]

        before = len(self.refused)
        out = asyncio.run(run())
        if count := len(self.refused) - before:
            logger.warning("%d of %d requests were refused and count as wrong", count, len(questions))
        return out


def without_thought(text: str) -> str:
    """What follows ``</think>``. The server splits a thought off by its tokens; this is for one spelled in other tokens."""
    _, mark, rest = text.rpartition("</think>")
    return rest.lstrip() if mark else text


def _pair(name: str, context: str, continuation: str) -> Question:
    """White space before the continuation belongs to it: a tokenizer joins it with the word that follows."""
    begins = len(context.rstrip())

    def body() -> dict[str, Any]:
        if not context or not continuation:
            raise ValueError(f"{name}: a log-likelihood needs a context and a continuation, neither of them empty")
        return {
            "prompt": context + continuation,
            "begins": begins,
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
            "temperature": 0,
        }

    return Question(name, body)


def _likelihood(choice: Any, prompt: str, begins: int) -> tuple[float, bool]:
    if choice.text != prompt:
        raise ValueError(f"the server's tokenizer changes the text {prompt[:80]!r}: its tokens cannot be told apart")
    tokens = choice.logprobs
    ends = [*tokens.text_offset[1:], len(prompt)]
    total, greedy = 0.0, True
    for logprob, top, end in zip(tokens.token_logprobs, tokens.top_logprobs, ends, strict=True):
        if end > begins and logprob is not None:
            total += logprob
            greedy &= logprob >= max(top.values())
    return total, greedy
