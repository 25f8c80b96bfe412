"""Rewards of a batch of completions: every function called once, its values checked, the weighted sum.

    total = sum of weight x value over the functions that gave one

A total is None, and the completion is left out of its group's mean and of the loss, where
 * no function gave a value,
 * a function abstained on it and not on the others of its group (a judge that did not answer): without that part it could
   not be compared with them,
 * none of the functions that judge content gave a value (a record without a usable solution), although there are such
   functions: a group must not be trained on its format alone.

Whatever a function raises, and a list of the wrong length or a value that is no finite number, is a ``RewardError``, which
names function, record and value and ends the run.
"""

import asyncio
import inspect
import math
import numbers
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_omni.config.objectives import ReinforceConfig, RewardConfig
from megatron_omni.rewards.answer import Value, Values
from megatron_omni.rewards.load import ARGUMENTS, Reward, open_reward

LONGEST_SECONDS = 1800.0
"""A function that has not given its values by then never will; its thread is left behind, which ends with the process."""
UNANSWERED = "unanswered"
"""Count of a service: completions that it gave no score after all its tries."""
_SHOWN_CHARACTERS = 200


class RewardError(ValueError):
    """A reward function failed; the message names it, the record and the value."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of N completions. Plain numbers: ranks may send it to each other."""

    totals: Values
    """[N]; None: left out."""
    values: dict[str, Values]
    """By function, each [N]; a function that is there twice is ``judge`` and ``judge_2``."""
    counts: dict[str, int] = field(default_factory=dict)
    """What went wrong outside the functions' values: ``accuracy/hung``, ``judge/unanswered``."""

    @property
    def unanswered_share(self) -> float:
        """Largest share of the completions to which an outside service gave no score."""
        missing = [count for name, count in self.counts.items() if name.endswith(f"/{UNANSWERED}")]
        return max(missing, default=0) / max(len(self.totals), 1)

    def metrics(self) -> dict[str, float]:
        """``reward/mean``, ``reward/spread`` (population), ``reward/left_out`` and for every function ``reward/<name>``,
        its ``/spread`` and the share on which it ``/abstained``; and the counts. No mean of no values."""
        found = {f"reward/{name}": float(count) for name, count in self.counts.items()}
        for name, values in {"": self.totals, **self.values}.items():
            given = [value for value in values if value is not None]
            at = f"reward/{name}" if name else "reward"
            if given:
                found[at if name else "reward/mean"] = statistics.fmean(given)
                found[f"{at}/spread"] = statistics.pstdev(given)
            if values:
                found[f"{at}/{'abstained' if name else 'left_out'}"] = 1 - len(given) / len(values)
        return found


def join(parts: Sequence[Scores]) -> Scores:
    """Of several ranks, in their order."""
    assert parts
    counts: dict[str, int] = {}
    for part in parts:
        for name, count in part.counts.items():
            counts[name] = counts.get(name, 0) + count
    return Scores(
        totals=[total for part in parts for total in part.totals],
        values={name: [value for part in parts for value in part.values[name]] for name in parts[0].values},
        counts=counts,
    )


def columns_of(extras: Sequence[Mapping[str, Any]], answers: Sequence[str | None]) -> dict[str, list[Any]]:
    """Columns [N] from the further keys of N records; null where a record lacks one. ``solution`` falls back to the
    record's last answer. ValueError for a column with the name of an argument."""
    names = dict.fromkeys(name for extra in extras for name in extra)
    for name in names:
        if name in ARGUMENTS:
            raise ValueError(f"the records have a column {name!r}, which is an argument of rewards; rename the column")
    columns = {name: [extra.get(name) for extra in extras] for name in names}
    if "solution" in names or any(answer is not None for answer in answers):
        given = columns.get("solution", [None] * len(extras))
        columns["solution"] = [answer if cell is None else cell for cell, answer in zip(given, answers, strict=True)]
    return columns


class Rewards:
    """The reward functions of a run; ``close`` ends what they keep (child processes, connections)."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        run_dir: str | Path,
        rank: int = 0,
        longest_seconds: float = LONGEST_SECONDS,
    ) -> None:
        """``rank``: of the data-parallel group; each writes a cache of its own in ``run_dir``. ``longest_seconds``: of a
        call. ValueError for functions that are not there or cannot work."""
        self._longest_seconds = longest_seconds
        if not configs:
            raise ValueError("rewards: give at least one function")
        self._rewards: list[tuple[str, Reward]] = []
        try:
            for config in configs:
                reward = open_reward(config, run_dir=Path(run_dir), rank=rank)
                self._rewards.append((self._key(reward.name.rpartition(":")[2]), reward))
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, config: ReinforceConfig, *, run_dir: str | Path, rank: int = 0) -> "Rewards":
        """Those of a recipe; ``overlong: penalize`` is one of them, of weight 1."""
        configs = list(config.rewards)
        if config.overlong == "penalize":
            settings = {"max_new_tokens": config.max_new_tokens, "overlong_tokens": config.overlong_tokens}
            configs.append(RewardConfig(function="overlong", settings=settings))
        return cls(configs, run_dir=run_dir, rank=rank)

    def _key(self, name: str) -> str:
        taken = {key for key, _ in self._rewards}
        return next(key for key in (name, *(f"{name}_{n}" for n in range(2, len(taken) + 3))) if key not in taken)

    @property
    def names(self) -> list[str]:
        """Keys of :attr:`Scores.values`."""
        return [key for key, _ in self._rewards]

    def score(
        self,
        *,
        completions: Sequence[str],
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        finish_reasons: Sequence[str],
        step: int,
        columns: Mapping[str, Sequence[Any]],
        records: Sequence[str] | None = None,
        group_size: int = 1,
    ) -> Scores:
        """Of N completions, of which each ``group_size`` that follow each other answer one prompt. ``records``: the names
        of their records, for messages. RewardError where a function fails."""
        arguments: dict[str, Any] = {
            "completions": list(completions), "prompts": list(prompts), "completion_ids": list(completion_ids),
            "finish_reasons": list(finish_reasons), **{name: list(column) for name, column in columns.items()},
        }  # fmt: skip
        assert all(len(column) == len(completions) for column in arguments.values()), "columns of one length"
        assert len(completions) % group_size == 0
        batch = _Batch(arguments, step, list(records) if records is not None else None)
        limits = [math.inf if reward.is_service else self._longest_seconds for _, reward in self._rewards]
        results = [_within(limit, partial(batch.call, reward)) for (_, reward), limit in zip(self._rewards, limits)]
        waiting = [place for place, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            found = asyncio.run(_all([(results[place], limits[place]) for place in waiting]))
            for place, result in zip(waiting, found):
                results[place] = result
        values: dict[str, Values] = {}
        counts: dict[str, int] = {}
        for (key, reward), result in zip(self._rewards, results):
            if isinstance(result, Exception):
                raise batch.raised(reward, result) from result
            values[key] = batch.checked(reward, result)
            counts |= {f"{key}/{name}": count for name, count in reward.take_counts().items()}
        return Scores(totals=self._totals(values, len(completions), group_size), values=values, counts=counts)

    def _totals(self, values: Mapping[str, Values], count: int, group_size: int) -> Values:
        judges = [key for key, reward in self._rewards if not reward.is_shape]

        def total(place: int) -> Value:
            first = place - place % group_size
            group = range(first, first + group_size)
            given = [key for key in values if values[key][place] is not None]
            missed = [
                key for key in values if key not in given and any(values[key][other] is not None for other in group)
            ]
            if not given or missed or (judges and not any(key in given for key in judges)):
                return None
            return math.fsum(reward.weight * (values[key][place] or 0.0) for key, reward in self._rewards)

        return [total(place) for place in range(count)]

    def close(self) -> None:
        """End what the functions keep. Safe to call twice."""
        for _, reward in self._rewards:
            reward.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _all(waiting: Sequence[tuple[Any, float]]) -> list[Any]:
    """Async functions, each with its limit in seconds, work side by side; what one raises is its result."""

    async def one(result: Any, longest_seconds: float) -> Any:
        try:
            async with asyncio.timeout(longest_seconds if math.isfinite(longest_seconds) else None) as limit:
                return await result
        except TimeoutError as error:
            raise _too_long(longest_seconds) if limit.expired() else error from None

    return await asyncio.gather(*(one(*each) for each in waiting), return_exceptions=True)


def _within(longest_seconds: float, work: Callable[[], Any]) -> Any:
    """What ``work`` gives; with a limit it is done in a thread that may be left behind."""
    if not math.isfinite(longest_seconds):
        return work()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), name="reward", daemon=True)
    thread.start()
    thread.join(longest_seconds)
    return found[0] if found else _too_long(longest_seconds)


def _too_long(seconds: float) -> "_TooLongError":
    return _TooLongError(f"no values within {seconds:g} s; give what it waits for a time-out")


class _TooLongError(Exception):
    """A function hangs."""


class _Batch:
    """The arguments of one call, and what is said of a function that fails on them."""

    def __init__(self, arguments: dict[str, Any], step: int, records: list[str] | None) -> None:
        self._arguments, self._step, self._records = arguments, step, records
        self._count = len(arguments["completions"])

    def call(self, reward: Reward) -> Any:
        """What the function gives: a list, something to await, or what it raised."""
        for name in reward.settings:
            if name in self._arguments:
                return ValueError(f"settings.{name} is a column of the records as well; rename one")
        try:
            return reward.function(**self._arguments, step=self._step)
        except BaseException as error:  # SystemExit, too, is nothing that a function may end the training by
            return error if isinstance(error, Exception) else RuntimeError(repr(error))

    def checked(self, reward: Reward, result: Any) -> Values:
        """A list of finite numbers and None, one a completion."""
        if (
            isinstance(result, str | bytes | Mapping)
            or not hasattr(result, "__len__")
            or not hasattr(result, "__iter__")
        ):
            raise RewardError(
                f"reward {reward.name}: gave {_shown(result)} for {self._count} completions (the first of {self._named(0)}); "
                "give a list with a number or None for each"
            )
        if len(result) != self._count:
            raise RewardError(
                f"reward {reward.name}: gave {len(result)} values for {self._count} completions (the first of "
                f"{self._named(0)}): {_shown(result)}; give one for each, None where it has no opinion"
            )
        return [None if value is None else self._number(reward, place, value) for place, value in enumerate(result)]

    def _number(self, reward: Reward, place: int, value: Any) -> float:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RewardError(
                f"reward {reward.name}: {self._named(place)}: gave {_shown(value)} for the completion "
                f"{_shown(self._arguments['completions'][place])}; give a finite number, or None to abstain"
            )
        return float(value)

    def raised(self, reward: Reward, error: Exception) -> RewardError:
        """Names the first record on which the function fails alone; a service is not asked again."""
        if isinstance(error, _TooLongError):
            return RewardError(
                f"reward {reward.name}: {error} ({self._count} completions, the first of {self._named(0)})"
            )
        if not reward.is_service:
            for place in range(self._count):
                alone = {name: [column[place]] for name, column in self._arguments.items()}
                again = _Batch(alone, self._step, None).call(reward)
                if inspect.isawaitable(again):
                    (again,) = asyncio.run(_all([(again, math.inf)]))
                if isinstance(again, Exception):
                    return RewardError(
                        f"reward {reward.name}: {self._named(place)}: raised {type(again).__name__}: {again} on the "
                        f"completion {_shown(self._arguments['completions'][place])}"
                    )
        return RewardError(
            f"reward {reward.name}: raised {type(error).__name__}: {error} on {self._count} completions (the first of "
            f"{self._named(0)})"
        )

    def _named(self, place: int) -> str:
        return self._records[place] if self._records is not None and self._count else f"completion {place}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
