"""One page of the rollouts of an iteration: prompts with their media, responses sorted by reward, advantages.

With an earlier iteration (of this run or of another) the page also shows what the policy then answered to the same
records, and how the means have changed. One static file, its media beside it in ``media/``, as page.py has it; texts are
cut at ``MOST_CHARACTERS``, the rollouts' files have them whole.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_omni.config.thinking import THINK, THINK_END
from megatron_omni.evaluation.page import save_page, shown_medium
from megatron_omni.evaluation.page_media import PageMedia
from megatron_omni.rewards.rollouts import Rollout, iterations, read_rollouts

MOST_CHARACTERS = 6000
"""Of one text."""
_TEMPLATE = Path(__file__).with_name("rollouts_page.html")
Moment = tuple[Path, int]
"""A run directory and an iteration of it."""


def last_iteration(run_dir: Path) -> int:
    """ValueError for a run without rollouts."""
    known = iterations(run_dir)
    if not known:
        raise ValueError(f"{run_dir}: no rollouts; a run of task reinforce writes them into {run_dir}/rollouts")
    return known[-1]


def write_rollouts_page(page: Path, now: Moment, before: Moment | None = None) -> Path:
    """Write the page of an iteration, against an earlier one where given; its path. ValueError where one is not there."""
    media = PageMedia(page.parent)
    mine = _by_prompt(read_rollouts(*now))
    earlier = _by_prompt(read_rollouts(*before)) if before is not None else []
    then = {group[0].place: group for group in earlier}
    data = {
        "run": str(now[0]),
        "iteration": now[1],
        "before": None if before is None else {"run": str(before[0]), "iteration": before[1]},
        "figures": _figures(mine, earlier),
        "groups": [_group(group, then.get(group[0].place), media) for group in mine],
    }
    return save_page(page, _TEMPLATE, data)


def _by_prompt(rollouts: Iterable[Rollout]) -> list[list[Rollout]]:
    return [list(group) for _, group in groupby(rollouts, key=lambda one: one.prompt)]


def _figures(mine: Sequence[Sequence[Rollout]], earlier: Sequence[Sequence[Rollout]]) -> list[dict[str, Any]]:
    """Rows of the table at the top."""
    now, then = _measured(mine), _measured(earlier)
    return [{"name": name, "now": value, "before": then.get(name)} for name, value in now.items()]


def _measured(groups: Sequence[Sequence[Rollout]]) -> dict[str, float | None]:
    rollouts = [one for group in groups for one in group]
    if not rollouts:
        return {}
    names = dict.fromkeys(name for one in rollouts for name in one.rewards)
    found = {"reward": _mean(one.total for one in rollouts)}
    found |= {f"reward/{name}": _mean(one.rewards.get(name) for one in rollouts) for name in names}
    return found | {
        "groups with a spread": _mean(float(_has_spread(group)) for group in groups),
        "left out": _mean(float(one.total is None) for one in rollouts),
        "cut": _mean(float(one.finish == "length") for one in rollouts),
        "tokens": _mean(float(one.tokens) for one in rollouts),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return statistics.fmean(given) if given else None


def _has_spread(group: Sequence[Rollout]) -> bool:
    return len({one.total for one in group if one.total is not None}) > 1


def _group(group: Sequence[Rollout], earlier: Sequence[Rollout] | None, media: PageMedia) -> dict[str, Any]:
    first = group[0]
    return {
        "prompt": first.prompt, "source": first.source, "record": first.record, "id": first.id, "where": first.where,
        "turns": [{"role": turn["role"], "text": _cut(turn["content"])} for turn in first.turns],
        "media": [shown_medium(media.show(item["kind"], item["path"])) for item in first.media],
        "solution": _solution(first.solution),
        "mean": _mean(one.total for one in group), "spread": _has_spread(group),
        "mean_before": None if earlier is None else _mean(one.total for one in earlier),
        "responses": _responses(group), "before": None if earlier is None else _responses(earlier),
    }  # fmt: skip


def _solution(value: Any) -> str | None:
    if value is None:
        return None
    return _cut("\nor ".join(map(str, value)) if isinstance(value, list) else str(value))


def _responses(group: Sequence[Rollout]) -> list[dict[str, Any]]:
    """The best first, those that were left out last."""
    ordered = sorted(group, key=lambda one: (one.total is None, -(one.total or 0.0), one.g))
    return [_response(one) for one in ordered]


def _response(one: Rollout) -> dict[str, Any]:
    thought, ended, answer = one.text.rpartition(THINK_END)
    opened = one.text.lstrip().startswith(THINK)
    if not ended and opened:  # a thought without an end is all thought
        thought, answer = one.text, ""
    has_thought = bool(ended) or opened
    return {
        "g": one.g, "tokens": one.tokens, "finish": one.finish, "total": one.total, "advantage": one.advantage,
        "rewards": dict(one.rewards), "extra": _numbers(one.extra),
        "thought": _cut(thought.strip().removeprefix(THINK).strip()) if has_thought else None,
        "answer": _cut(answer.strip() if has_thought else one.text),
    }  # fmt: skip


def _numbers(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if isinstance(value, int | float | str)}


def _cut(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]} … ({more:,} more characters in rollouts/)"
