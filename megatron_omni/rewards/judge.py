"""The reward ``judge``: a model behind any OpenAI-compatible endpoint reads the answer and ends with ``SCORE: x``.

Temperature 0. A try has ``timeout_seconds`` in all, there are ``tries`` of them with exponential back-off, jitter and
``Retry-After``, ``concurrency`` at once, and ``batch_seconds`` for the batch. What has no score then is None, never 0, and
counted as ``unanswered``: a judge that is down must not teach that good answers are bad. Scores are kept in the run
directory (``judge_cache.py``). The key is read from the environment variable that the recipe names; a key in the recipe
would be in every copy of it, and is refused.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_omni.rewards.answer import Value, Values, answer_text, references
from megatron_omni.rewards.endpoint import Endpoint, EndpointError, NoAnswer
from megatron_omni.rewards.judge_cache import JudgeCache

CORRECT = """You grade an answer to a question.

Question:
{prompt}

Reference answer (may be missing):
{solution}

Answer to grade:
{answer}

Say in a few sentences whether the answer is right and complete. Then write, as the last line and nothing after it,
SCORE: x
where x is a number from 0 (wrong) to 1 (right)."""
CONSISTENT = """Here are the thought and the solution that a model gave to a question.

Question:
{prompt}

Thought and solution:
{completion}

Does the thought lead to the solution? Do not judge whether the solution is right: only whether it is what the thought
concludes, without a contradiction or a leap. Say so in a few sentences. Then write, as the last line and nothing after it,
SCORE: x
where x is 1 if it does and 0 if it does not."""
TEMPLATES = {"correct": CORRECT, "consistent": CONSISTENT}
"""By the names that a recipe may give."""
PLACES = ("prompt", "completion", "answer", "solution")
"""What a template may hold in braces."""
_PLACE = re.compile(r"\{([a-z_]+)\}")
_SCORE = re.compile(r"\W*SCORE\W*[:：]\W*?(-?\d+(?:\.\d+)?)\W*", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_KEYS = ("key", "api_key", "token", "secret", "authorization", "password")
_LOOKS_SECRET = re.compile(r"sk[-_]|hf_|gsk_|Bearer\b|(?=.*\d)(?=.*[a-z])[A-Za-z0-9]{32,}")


class Judge:
    """From ``lowest`` to ``highest``; None where the judge gave no score."""

    def __init__(
        self,
        *,
        url: str,
        model: str,
        key_env: str | None = None,
        template: str = "correct",
        lowest: float = 0.0,
        highest: float = 1.0,
        max_tokens: int = 1024,
        body: Mapping[str, Any] | None = None,
        timeout_seconds: float = 60.0,
        tries: int = 3,
        backoff_seconds: float = 1.0,
        concurrency: int = 32,
        batch_seconds: float = 300.0,
        thinking: bool = True,
        run_dir: Path,
        rank: int = 0,
        **refused: Any,
    ) -> None:
        """``template``: ``correct``, ``consistent`` or a text of yours; ``body``: further fields of the request. ValueError
        for settings that cannot work, and for a key among them."""
        _refuse_keys([*refused, *(body or {})])
        if refused:
            raise ValueError(f"rewards: judge has no setting {min(refused)!r}; docs/reinforcement.md has the list")
        _check_url(url)
        template = TEMPLATES.get(template, template)
        _check_places(template)
        numbers = {
            "max_tokens": max_tokens, "timeout_seconds": timeout_seconds, "tries": tries, "concurrency": concurrency,
            "batch_seconds": batch_seconds, "highest - lowest": highest - lowest,
        }  # fmt: skip
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"rewards: judge: {name} = {value}: must be above 0")
        self._url, self._template, self._range = url, template, (lowest, highest)
        self._request = {"model": model, "temperature": 0, "max_tokens": max_tokens, **(body or {})}
        self._endpoint = Endpoint(url, key=_key_of(key_env), timeout_seconds=timeout_seconds)
        self._tries, self._backoff, self._batch_seconds = int(tries), backoff_seconds, batch_seconds
        self._thinking = thinking
        self._threads = ThreadPoolExecutor(int(concurrency), thread_name_prefix="judge")
        self._cache = JudgeCache(run_dir, rank)
        self._counts: dict[str, int] = {}

    async def __call__(
        self,
        *,
        completions: Sequence[str],
        prompts: Sequence[str],
        solution: Sequence[Any] | None = None,
        **_: Any,
    ) -> Values:
        asked = [
            self._body(prompt, said, None if solution is None else solution[place])
            for place, (prompt, said) in enumerate(zip(prompts, completions, strict=True))
        ]
        keys = [JudgeCache.key(self._url, body) for body in asked]
        until = time.monotonic() + self._batch_seconds
        new = {
            key: body for key, body in zip(keys, asked) if self._cache.get(key) is None
        }  # equal answers are one question
        tasks = [asyncio.ensure_future(self._score(key, body, until)) for key, body in new.items()]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=self._batch_seconds, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done() and task.exception() is not None:
                    raise task.exception() or AssertionError
        finally:
            for task in tasks:
                task.cancel()
        values: list[Value] = [self._cache.get(key) for key in keys]
        self._count("unanswered", sum(value is None for value in values))
        return values

    def take_counts(self) -> dict[str, int]:
        """``unanswered`` completions, and ``failed_tries``, since the last call."""
        counts, self._counts = self._counts, {}
        return {"unanswered": 0, "failed_tries": 0, **counts}

    def close(self) -> None:
        """Questions that are under way are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._cache.close()

    def _count(self, name: str, more: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + more

    def _body(self, prompt: str, completion: str, solution: Any) -> dict[str, Any]:
        cells = {
            "prompt": prompt, "completion": completion, "answer": answer_text(completion, self._thinking),
            "solution": "\n".join(references(solution)),
        }  # fmt: skip
        content = _PLACE.sub(lambda place: cells.get(place[1], place[0]), self._template)
        return {**self._request, "messages": [{"role": "user", "content": content}]}

    async def _score(self, key: str, body: Mapping[str, Any], until: float) -> None:
        loop = asyncio.get_running_loop()
        for attempt in range(self._tries):
            try:
                said = await loop.run_in_executor(self._threads, self._endpoint.ask, body)
                self._cache.put(key, self._read(said))
                return
            except EndpointError as error:
                raise ValueError(f"{self._url} {error}; check url, model and the key that key_env names") from error
            except NoAnswer as failed:
                self._count("failed_tries")
                pause = max(failed.after_seconds, self._backoff * 2**attempt * random.uniform(0.5, 1.5))
                if not failed.again or attempt + 1 == self._tries or time.monotonic() + pause > until:
                    return
                await asyncio.sleep(pause)

    def _read(self, said: str) -> float:
        """``SCORE: x`` of the last line that is not empty."""
        lines = said.split("</think>")[-1].strip().splitlines()
        found = _SCORE.fullmatch(lines[-1]) if lines else None
        if found is None:
            raise NoAnswer("the last line is no SCORE: x")
        score, (lowest, highest) = float(found[1]), self._range
        if not lowest <= score <= highest:
            raise NoAnswer(f"SCORE: {found[1]} is not from {lowest:g} to {highest:g}")
        return score


def _refuse_keys(names: Sequence[str]) -> None:
    for name in names:
        if name.lower() in _KEYS or name.lower().endswith(("_key", "_token", "_secret")):
            raise ValueError(
                f"rewards: judge: settings.{name}: a recipe holds no key, it is copied beside every checkpoint; put it into an "
                "environment variable and name that: key_env: JUDGE_KEY"
            )


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits, parts = False, urlsplit("")
    if parts.username or parts.password or parts.query:  # not shown: it may hold a key
        raise ValueError("rewards: judge: url holds a user, password or query; a key goes into the variable of key_env")
    if not fits:
        raise ValueError(f"rewards: judge: url = {url!r}: give http:// or https://, host and path, https://host/v1")


def _check_places(template: str) -> None:
    found = set(_PLACE.findall(template))
    if unknown := found - set(PLACES):
        raise ValueError(f"rewards: judge: template names {{{min(unknown)}}}; it may name {', '.join(PLACES)}")
    if not found & {"completion", "answer"}:
        raise ValueError("rewards: judge: template names neither {completion} nor {answer}: it would grade nothing")


def _key_of(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not _VARIABLE.fullmatch(variable) or _LOOKS_SECRET.match(variable):  # not shown: it may be the key
        raise ValueError(
            "rewards: judge: key_env is the name of an environment variable (JUDGE_KEY), never the key itself"
        )
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ValueError(f"rewards: judge: key_env = {variable}: this environment variable is not set; export it")
    if not value.isascii() or not value.isprintable():
        raise ValueError(f"rewards: judge: the key in {variable} has characters that no HTTP header can hold")
    return value
