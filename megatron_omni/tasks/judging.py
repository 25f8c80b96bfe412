"""What responses are worth: the recipe's reward functions on the leader of every replica, then advantages of each group.

Functions run in a thread: a judge may take minutes, and meanwhile this rank gives signs of life. The others wait outside
any collective (parallel/long_work.py).
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from megatron_omni.config.objectives import ReinforceConfig
from megatron_omni.data.prompts import Prompt, asked
from megatron_omni.data.record import KINDS
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.losses.gspo import advantages
from megatron_omni.parallel.long_work import long_work
from megatron_omni.rewards import Rewards, Scores, columns_of
from megatron_omni.rewards.rollouts import Rollout
from megatron_omni.tasks.figures import Figures, of_responses
from megatron_omni.tasks.responding import Response
from megatron_omni.training.setup import Run

LIVES_SECONDS = 1.0
"""Between two signs of life."""


def judge(
    run: Run,
    rewards: Rewards | None,
    prompts: Sequence[Prompt],
    responses: dict[int, list[Response]],
    *,
    tokenizer: Tokenizer,
    moved: Callable[[], None],
) -> Figures:
    """Give the responses to ``prompts`` rewards and advantages; figures of all replicas, on every rank. All ranks of the run
    together; the leader of each replica has ``rewards``."""
    names = [source.name for source in run.recipe.data.sources]
    with long_work("asking the rewards", measured=False) as work:
        own = Figures()
        if rewards is not None:
            scores = score(rewards, prompts, responses, tokenizer=tokenizer, step=run.state.step + 1, moved=moved)
            set_advantages([responses[prompt.number] for prompt in prompts], run.recipe.reinforce)
            own = of_responses(prompts, responses, scores, names)
        parts = work.exchange(own.plain(), waiting=moved)
    figures = Figures()
    figures.merge(parts)
    return figures


def score(
    rewards: Rewards,
    prompts: Sequence[Prompt],
    responses: dict[int, list[Response]],
    *,
    tokenizer: Tokenizer,
    step: int,
    moved: Callable[[], None],
) -> Scores:
    """Rewards of the responses to ``prompts``, which they are told; in the order of prompts and of g. RewardError where a
    function fails."""
    told = [(prompt, response) for prompt in prompts for response in responses[prompt.number]]
    if not told:
        return Scores(totals=[], values={name: [] for name in rewards.names})
    records = [prompt.record for prompt, _ in told]
    ask = partial(
        rewards.score,
        completions=[text_of(response, tokenizer) for _, response in told],
        prompts=[question(prompt) for prompt, _ in told],
        completion_ids=[response.ids for _, response in told],
        finish_reasons=[response.finish for _, response in told],
        step=step,
        columns=columns_of([record.extra for record in records], [record.answer or None for record in records]),
        records=[record.where for record in records],
        group_size=len(responses[prompts[0].number]),
    )
    scores = _in_thread(ask, moved)
    for place, (_, response) in enumerate(told):
        response.total = scores.totals[place]
        response.values = {name: values[place] for name, values in scores.values.items()}
    return scores


def set_advantages(groups: Iterable[Sequence[Response]], config: ReinforceConfig) -> None:
    """Advantage of every response, and whether it takes part in the loss."""
    for group in groups:
        rewards = torch.tensor([[float("nan") if r.total is None else r.total for r in group]], dtype=torch.float64)
        found = advantages(rewards)
        for response, advantage, kept in zip(group, found.values[0].tolist(), found.kept[0].tolist(), strict=True):
            cut = config.overlong == "mask" and response.finish == "length"
            response.advantage, response.kept = advantage, kept and not cut


def text_of(response: Response, tokenizer: Tokenizer) -> str:
    """What a response says, without the token that ended it."""
    return tokenizer.decode(response.ids)


def question(prompt: Prompt) -> str:
    """The turns of a prompt as text, with markers where media stand."""
    return "\n\n".join(message.content for message in asked(prompt.record).messages if message.role != "system")


def rollout(
    prompt: Prompt, g: int, response: Response, *, iteration: int, source: str, tokenizer: Tokenizer
) -> Rollout:
    """A response as it is written down."""
    record = prompt.record
    files = {kind: iter(record.media(kind)) for kind in KINDS}
    turns = asked(record).messages
    media = [
        {"kind": kind, "path": str(next(files[kind]))}  # type: ignore[index]
        for message in turns
        for kind in message.media()
    ]
    solution: Any = record.extra.get("solution", record.answer or None)
    return Rollout(
        iteration=iteration,
        prompt=prompt.number,
        source=source,
        record=prompt.row,
        id=record.id,
        where=record.where,
        g=g,
        turns=[{"role": message.role, "content": message.content} for message in turns],
        media=media,
        solution=solution,
        text=text_of(response, tokenizer),
        tokens=len(response.ids),
        token_ids=response.ids,
        finish=response.finish,
        rewards=response.values,
        total=response.total,
        advantage=response.advantage if response.kept else None,
        extra={"log_prob": sum(response.log_probs)},
    )


def _in_thread[T](work: Callable[[], T], moved: Callable[[], None]) -> T:
    with ThreadPoolExecutor(1, thread_name_prefix="rewards") as thread:
        future = thread.submit(work)
        while not wait([future], timeout=LIVES_SECONDS).done:
            moved()
        return future.result()
