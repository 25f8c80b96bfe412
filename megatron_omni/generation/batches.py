"""Many prompts answered by the engine, on every layout: what training, evaluation and the command line call.

Prompts are dealt in turn to the data-parallel ranks; the leader of each replica builds its own, a few ahead of what the
engine computes, so that few media are in memory. A window of prompts at a time, all ranks learn all answers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_omni.data.sample import Sample
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.request import (
    GREEDY,
    Alternatives,
    BlockEvent,
    Event,
    FinishedEvent,
    FinishReason,
    PromptEvent,
    Request,
    Sampling,
    Usage,
    Wanted,
)
from megatron_omni.generation.sampling import derived_seed
from megatron_omni.parallel.groups import replica
from megatron_omni.parallel.sharing import PeerFailed

PROMPTS_PER_WINDOW = 8
"""Prompts of a window for each answer that is computed together."""


@dataclass(kw_only=True)
class Result:
    """A finished answer."""

    name: str
    sample: int
    ids: list[int] = field(default_factory=list)
    """Its chosen tokens without the one that ended it."""
    blocks: list[BlockEvent] = field(default_factory=list)
    """What its pictures are drawn from, in their order."""
    end_id: int | None = None
    """The token that ended it, where one did."""
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens, the one that ended it included; empty unless asked for."""
    top: list[Alternatives] = field(default_factory=list)
    near_edge: int = 0
    """Tokens that were drawn near an edge; counted where log-probabilities are asked for."""
    prompt_logprobs: tuple[float, ...] = ()
    """Of tokens 1, 2, ... of the prompt; empty unless asked for."""
    text: str = ""
    reasoning: str = ""
    reason: FinishReason = "stop"
    stop: int | str | None = None
    usage: Usage | None = None
    routes: Tensor | None = None
    """[tokens, MoE layers x bytes] uint8 of prompt and answer but its last token; None unless asked for."""

    def add(self, event: Event) -> None:
        """Take over what an event says."""
        if isinstance(event, PromptEvent):
            self.prompt_logprobs = event.logprobs
            return
        if isinstance(event, BlockEvent):
            self.blocks.append(event)
            return
        self.text += event.text
        self.reasoning += event.reasoning
        if isinstance(event, FinishedEvent):
            self.reason, self.stop, self.usage = event.reason, event.stop, event.usage
            self.routes = None if event.routes is None else torch.from_numpy(event.routes)
            return
        if event.is_end:
            self.end_id = event.id
        else:
            self.ids.append(event.id)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
            self.top.append(event.top)
            self.near_edge += event.near_edge


def answered(
    engine: Engine,
    requests: Iterable[Request],
    *,
    ready: Callable[[], bool] = lambda: True,
    refused: Callable[[Request, ValueError], None] | None = None,
    most_waiting: int | None = None,
    before_step: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Results as answers finish, on the leader; ``requests`` are taken a few ahead of what is computed.

    ``ready`` says whether the next request is there; while it is not, what runs goes on. ``refused`` is told of a request
    that the engine cannot take; without it that is a ValueError here. Of those that it took ``most_waiting`` wait for
    their turn (default: as many as are computed together). ``before_step`` is called before every step of the engine.
    FloatingPointError where logits are not finite. The other ranks of the replica are in ``engine.follow()``; with
    expert parallelism all leaders call this together, some perhaps without a request.
    """
    results: dict[tuple[str, int], Result] = {}
    left = iter(requests)
    most_waiting = min(most_waiting or engine.limits.max_running, engine.limits.max_running)
    more = True
    while True:
        # Without work of its own a leader waits for a request here: the others would take a step without one for the end.
        while more and (state := engine.state()).waiting < most_waiting:
            if (state.waiting or state.running) and not ready():
                break
            request = next(left, None)
            more = request is not None
            if request is not None:
                try:
                    engine.submit(request)
                except ValueError as error:
                    if refused is None:
                        raise
                    refused(request, error)
        before_step()
        for event in engine.step():
            if isinstance(event, FinishedEvent) and event.reason == "error":
                raise FloatingPointError(event.message)
            key = event.name, 0 if isinstance(event, PromptEvent) else event.sample
            results.setdefault(key, Result(name=event.name, sample=key[1])).add(event)
            if isinstance(event, FinishedEvent):
                yield results.pop(key)
        if not engine.busy and not more:
            return


def generate(
    model: nn.Module,
    prompts: Sequence[Sample],
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    pg: ProcessGroupCollection,
    sampling: Sampling = GREEDY,
    rows: Sequence[int] | None = None,
    limits: EngineLimits | None = None,
) -> list[list[int]]:
    """Token ids of the answer to each of this replica's prompts, without the token that ended it; on all of its ranks.

    ``rows`` names the prompts for the sampler (default: their number in the list), so that an answer does not depend on
    what is asked beside it. All ranks call this together, with expert parallelism those of all replicas. ValueError for
    a prompt that cannot be answered, FloatingPointError where logits are not finite; on the ranks that only hear of it
    PeerFailed.
    """
    names = list(range(len(prompts)) if rows is None else rows)
    assert len(names) == len(prompts), "one row name for each prompt"
    wanted = Wanted(max_new_tokens=max_new_tokens, sampling=sampling)
    requests = (_request(str(i), prompt, name, wanted) for i, (name, prompt) in enumerate(zip(names, prompts)))
    with Engine(model, tokenizer=tokenizer, pg=pg, limits=limits) as engine:
        given = _led(engine, requests, pg, over_replicas=False)
    return [given[i][0].ids for i in range(len(prompts))]


def generate_windows(
    model: nn.Module,
    build_prompt: Callable[[int], Sample | None],
    prompts: range,
    *,
    wanted: Wanted | Callable[[int, Sample], Wanted],
    tokenizer: Tokenizer,
    pg: ProcessGroupCollection,
    batch_size: int = 32,
    limits: EngineLimits | None = None,
) -> Iterator[tuple[range, dict[int, list[Result]]]]:
    """The answers to some prompts at a time, the same on every rank; all ranks call this together.

    ``wanted`` is the same of all prompts, or said of each.

    Yields the numbers of a window and by number the samples of its answer. ``build_prompt(n)`` is called once for each n
    of ``prompts``, by the leader of one replica; None leaves the prompt out. A prompt's number names it for the sampler,
    so that an answer depends on nothing else that is asked. ``batch_size`` samples are computed together. Errors as in
    :func:`generate`, and whatever ``build_prompt`` raises.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    limits = replace(limits or EngineLimits(), max_running=batch_size)
    limits = replace(limits, max_batch_tokens=max(limits.max_batch_tokens, 2 * batch_size))
    rank, ranks = pg.dp.rank(), pg.dp.size()
    window = batch_size * ranks * PROMPTS_PER_WINDOW
    with Engine(model, tokenizer=tokenizer, pg=pg, limits=limits) as engine:
        for start in range(0, len(prompts), window):
            numbers = prompts[start : start + window]
            requests = (
                _request(str(n), prompt, n, wanted)
                for n in numbers[rank::ranks]
                if (prompt := build_prompt(n)) is not None
            )
            yield numbers, _led(engine, requests, pg)


def generate_all(
    model: nn.Module,
    build_prompt: Callable[[int], Sample | None],
    num_prompts: int,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    **settings: object,
) -> dict[int, list[int]]:
    """Token ids of the answer to every prompt, by its number: all windows of :func:`generate_windows`."""
    wanted = Wanted(max_new_tokens=max_new_tokens, sampling=sampling)
    windows = generate_windows(model, build_prompt, range(num_prompts), wanted=wanted, **settings)  # type: ignore[arg-type]
    return {n: samples[0].ids for _, answers in windows for n, samples in answers.items()}


def _request(name: str, prompt: Sample, row: int, wanted: Wanted | Callable[[int, Sample], Wanted]) -> Request:
    wanted = wanted(row, prompt) if callable(wanted) else wanted
    seed = derived_seed(wanted.sampling.seed, row)
    return Request.of(replace(wanted, sampling=replace(wanted.sampling, seed=seed)), name=name, prompt=prompt)


def _led(
    engine: Engine, requests: Iterable[Request], pg: ProcessGroupCollection, *, over_replicas: bool = True
) -> dict[int, list[Result]]:
    """Samples of the answers by the number that names them, on every rank.

    A leader whose requests cannot be built, taken or answered raises its error when the ranks that wait for its answers
    know of it, and PeerFailed is raised there.
    """
    answers: dict[int, list[Result]] | None = None
    try:
        if engine.leads:
            with engine.leading():
                found = sorted(answered(engine, requests), key=lambda result: result.sample)
            answers = {}
            for result in found:
                answers.setdefault(int(result.name), []).append(result)
        else:
            engine.follow()
            answers = {}
    except Exception as error:
        if not engine.broken:
            with suppress(PeerFailed):
                shared(None, pg, over_replicas=over_replicas)
        raise error
    return shared(answers, pg, over_replicas=over_replicas)


def shared[K, T](mine: dict[K, T] | None, pg: ProcessGroupCollection, *, over_replicas: bool = True) -> dict[K, T]:
    """What the leaders of all replicas have, or that of this one, on every rank; all of them call this together.

    PeerFailed on all of them where a leader has None: it failed.
    """
    whole = mine
    if replica(pg).rank() == 0 and over_replicas and pg.dp.size() > 1:
        parts: list[dict[K, T] | None] = [None] * pg.dp.size()
        dist.all_gather_object(parts, mine, group=pg.dp)
        found = [part for part in parts if part is not None]
        whole = {n: value for part in found for n, value in part.items()} if len(found) == len(parts) else None
    if replica(pg).size() > 1:
        box = [whole]
        dist.broadcast_object_list(box, group=replica(pg), group_src=0)
        whole = box[0]
    if whole is None:
        raise PeerFailed("the leader of a replica failed, and says why")
    return whole
