"""Responses of the model to a batch of prompts, sampled in the training ranks on the weights as they stand.

Every replica answers its own prompts with the one engine (generation/engine.py): G samples of a request share the prompt's
part of the cache. The draws of response g to prompt n are named by the seed of the iteration, n and g, so its ids depend
on nothing else: not on what is computed beside it, nor on the layout. Token in, token out: ids are never decoded and
encoded again.

However long it takes, nobody waits in a collective meanwhile (parallel/long_work.py). A stop signal on any rank ends the
sampling of all: what was sampled is thrown away, and comes again bit for bit when the run goes on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_omni.batch import SampleRows
from megatron_omni.config.objectives import ReinforceConfig
from megatron_omni.data.prompts import Prompt
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.generation.batches import Result, answered
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.request import Request, Sampling, Wanted
from megatron_omni.generation.sampling import derived_seed
from megatron_omni.parallel.long_work import Work, long_work
from megatron_omni.parallel.wrap import gather_weights
from megatron_omni.training.setup import Run
from megatron_omni.training.task import Interrupted

LOOK_SECONDS = 0.5
"""Between two looks at whether another rank was asked to stop."""


@dataclass(kw_only=True)
class Response:
    """One response to a prompt, and what became of it."""

    ids: list[int]
    """Its tokens, the one that ended it included."""
    finish: str
    """``stop`` or ``length``."""
    log_probs: list[float]
    """Of the tokens, as the sampler saw them (at temperature 1)."""
    values: dict[str, float | None]
    """By reward function."""
    near_edge: int = 0
    """Tokens that were drawn near an edge (generation/sampling.py); not kept in a checkpoint."""
    total: float | None = None
    """Reward; None: left out."""
    advantage: float = 0.0
    kept: bool = False
    """Takes part in the loss."""
    routes: Tensor | None = None
    """[n, L n] uint8 of the prompt and of the response but its last token (models/moe/routes.py), until rows are made of
    them; None in a dense model."""


class Stop:
    """Whether any rank was asked to stop; each says so once, and looks at what the others say now and then."""

    def __init__(self, work: Work, asked: Callable[[], bool], moved: Callable[[], None]) -> None:
        self._work, self._asked, self._moved = work, asked, moved
        self._looked = 0.0
        self.seen = self._said = False

    def __call__(self) -> bool:
        """Whether one was."""
        self.look()
        return self.seen

    def look(self) -> None:
        """Say what is new, and hear it; a sign of life as well."""
        self._moved()
        if self._asked() and not self._said:
            self._said = self.seen = True
            self._work.add("stop")
        if not self.seen and (now := time.monotonic()) - self._looked > LOOK_SECONDS:
            self._looked, self.seen = now, self._work.add("stop", 0) > 0


def sample_responses(
    run: Run,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer,
    seed: int,
    rows: dict[int, SampleRows] | None = None,
    stop: Callable[[], bool] = lambda: False,
    moved: Callable[[], None] = lambda: None,
) -> dict[int, list[Response]]:
    """``group_size`` responses to each of this replica's ``prompts``, by the prompt's number, on the leader of the replica;
    {} on its other ranks. All ranks of the run together. Interrupted, on all of them, where one was asked to stop.

    What frozen encoders made of the prompts' media is added to ``rows``, on the ranks of the first stage.
    """
    config = run.recipe.reinforce
    gather_weights(run.model)
    found: dict[int, list[Response]] = {}
    kept: dict[str, SampleRows] = {}
    with (
        long_work("sampling responses", measured=False) as work,
        Engine(
            run.model,
            tokenizer=tokenizer,
            pg=run.pg,
            limits=_limits(config, prompts),
            keep_rows=None if rows is None else kept,
        ) as engine,
    ):
        look = Stop(work, stop, moved)
        if engine.leads:
            with engine.leading():
                for result in _results(engine, prompts, run, seed=seed, stop=look):
                    found.setdefault(int(result.name), []).append(_response(result))
        else:
            engine.follow(look.look)
        stopped = any(work.exchange(look.seen, waiting=look.look))
    if stopped:
        raise Interrupted("asked to stop while responses were sampled: they come again when the run goes on")
    if rows is not None:
        rows |= {int(name): own for name, own in kept.items()}
    return found


def _limits(config: ReinforceConfig, prompts: Sequence[Prompt]) -> EngineLimits:
    longest = max((prompt.length for prompt in prompts), default=1) + config.max_new_tokens
    running = config.max_running
    tokens = max(EngineLimits().max_batch_tokens, 2 * running)
    return EngineLimits(max_running=running, max_batch_tokens=tokens, longest=longest)


def _results(engine: Engine, prompts: Sequence[Prompt], run: Run, *, seed: int, stop: Stop) -> Iterator[Result]:
    """Finished samples, in the order of g for each prompt; after a stop what is left is cancelled."""
    config = run.recipe.reinforce
    wanted = Wanted(
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(temperature=config.temperature),
        n=config.group_size,
        logprobs=0,
        reuse_prefix=False,
        routes=run.recipe.model.moe is not None,
    )
    asked: list[str] = []

    def requests() -> Iterator[Request]:
        for prompt in prompts:
            if stop():
                return
            sampling = replace(wanted.sampling, seed=derived_seed(seed, prompt.number))
            asked.append(str(prompt.number))
            yield Request.of(replace(wanted, sampling=sampling), name=asked[-1], prompt=prompt)

    def look() -> None:
        if stop():
            for name in asked:
                engine.cancel(name)
            asked.clear()

    yield from sorted(answered(engine, requests(), before_step=look), key=lambda result: result.sample)


def _response(result: Result) -> Response:
    ids = result.ids if result.end_id is None else [*result.ids, result.end_id]
    return Response(
        ids=ids,
        finish=result.reason,
        log_probs=result.logprobs,
        values={},
        near_edge=result.near_edge,
        routes=result.routes,
    )
