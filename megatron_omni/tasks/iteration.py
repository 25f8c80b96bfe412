"""An iteration of reinforcement: prompts of several steps, the responses to them, and what their updates need.

A step's micro-batches are planned from prompts alone and are the same sets of prompts on any number of ranks; a group never
leaves its rank. Which response is which row of a micro-batch's [N, T] tensors follows from that: prompts in the order of
the micro-batch, responses in the order of g.

What a checkpoint holds of it stands under the prompts' numbers, so that any layout can read it: ids, rewards, advantages,
old log-probabilities, and routes that the updates replay. Media are decoded again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.batch import OmniBatch, SampleRows
from megatron_omni.config.objectives import ReinforceConfig
from megatron_omni.data.plan import dealt
from megatron_omni.data.prompts import Prompt, PromptLoader, PromptStep
from megatron_omni.data.responses import (
    Group,
    Responses,
    group_samples,
    replaying,
    responses_of,
    routes_of_responses,
    separate_samples,
)
from megatron_omni.parallel.groups import replica
from megatron_omni.parallel.sharing import StepData, share_step, sum_over_ranks
from megatron_omni.tasks.responding import Response
from megatron_omni.training.setup import Run
from megatron_omni.training.step_data import COUNTED, counted, read_together


@dataclass(kw_only=True)
class Drawn:
    """The prompts of an iteration on the leader of a replica, and what they were answered; empty on its other ranks."""

    steps: list[list[list[int]]]
    """As in :class:`Iteration`."""
    prompts: dict[int, Prompt]
    """This replica's, by number."""
    responses: dict[int, list[Response]] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: Sequence[PromptStep]) -> "Drawn":
        """What a loader gave."""
        return cls(
            steps=[step.numbers for step in steps],
            prompts={prompt.number: prompt for step in steps for micro in step.own for prompt in micro},
        )


def replace_dull(run: Run, drawn: Drawn, asked: Sequence[Prompt]) -> list[Prompt] | None:
    """In place of the prompts that were ``asked`` last and whose responses have no spread, the next ones of the order, in the
    order of their numbers: this replica's of them. None, on all ranks, where there is nothing to replace or no more data.
    """
    dull: list[list[int]] = [[]] * dist.get_world_size()
    mine = [p.number for p in asked if not any(response.advantage for response in drawn.responses[p.number])]
    dist.all_gather_object(dull, mine)
    leaving = sorted(number for part in dull for number in part)
    loader = run.loader if isinstance(run.loader, PromptLoader) else None

    def next_ones() -> list[Prompt]:
        assert loader is not None
        coming = dict(zip(leaving, loader.draw_further(len(leaving))))
        fresh = [loader.prompt(coming[number]) for number in mine]
        drawn.prompts |= {prompt.number: prompt for prompt in fresh}
        drawn.steps = [[[coming.get(n, n) for n in micro] for micro in mini] for mini in drawn.steps]
        return fresh

    if not leaving:
        return None
    fresh, end = read_together(None if loader is None else next_ones, device=run.device)
    return None if end is not None else fresh or []


@dataclass(kw_only=True)
class MicroBatch:
    """What the loss of one micro-batch needs, on the ranks of the last stage; N responses, T tokens of the longest."""

    order: list[tuple[int, int]]
    """[N] prompt number and g."""
    where: Responses
    old: Tensor | None = None
    """[N, T] float32 log-probabilities before the first update."""
    reference: Tensor | None = None
    """[N, T] float32 those of the weights of ``init_from``."""
    advantages: Tensor | None = None
    """[N] float64."""
    kept: Tensor | None = None
    """[N] bool."""
    entropy: float = 0.0
    """Summed over all tokens, before the first update."""
    flips: Tensor | None = None
    """[N] layers of their tokens whose routes differ from those of the rollout; None where it told none."""


@dataclass(kw_only=True)
class Iteration:
    """One iteration, as a rank sees it."""

    number: int
    steps: list[list[list[int]]]
    """Of each mini-batch its micro-batches on all ranks, as numbers of prompts."""
    responses: dict[int, list[Response]]
    """To this replica's prompts, on all of its ranks."""
    places: dict[int, str] = field(default_factory=dict)
    """Where the records of these prompts are, for messages."""
    next: int = 0
    """The mini-batch that is trained on next."""
    batches: list[StepData] = field(default_factory=list)
    micro_batches: list[list[MicroBatch]] = field(default_factory=list)
    """Of each mini-batch those of this replica."""
    counts: list[dict[str, int]] = field(default_factory=list)
    """Of each mini-batch over all ranks: :data:`COUNTED`, and ``divisor``, its kept responses."""

    @property
    def is_done(self) -> bool:
        """Whether every mini-batch was trained on."""
        return self.next == len(self.steps)

    def own(self, run: Run, mini: int) -> list[list[int]]:
        """The micro-batches of a mini-batch that this replica computes."""
        return dealt(self.steps[mini], rank=run.place.dp_rank, ranks=run.place.dp_size)

    def recut(self, micro_batch_size: int) -> None:
        """The same order of prompts in micro-batches of another size."""
        for mini, micro_batches in enumerate(self.steps):
            numbers = [number for micro in micro_batches for number in micro]
            self.steps[mini] = [numbers[i : i + micro_batch_size] for i in range(0, len(numbers), micro_batch_size)]

    # ---------------------------------------------------------------------------------------- on the device

    def prepare(self, run: Run, prompts: dict[int, Prompt], rows: Mapping[int, SampleRows] | None = None) -> None:
        """Rows of every mini-batch on all ranks of the replica; ``prompts`` are its own, on the leader. ``rows`` are those of
        frozen encoders, by the prompt's number, that the rollout has computed."""
        precision = torch.bfloat16 if run.recipe.optim.precision == "bf16" else torch.float32
        counts: list[int] = []
        for mini in range(len(self.steps)):
            batches, own = None, self.own(run, mini)
            if run.loader is not None:
                batches = [self._rows(run, [prompts[number] for number in micro]) for micro in own]
            step = dict(zip(COUNTED, counted(batches), strict=True))
            counts += (step | {"samples": sum(map(len, own)) if batches is not None else 0}).values()
            data = share_step(
                batches, num_micro_batches=run.num_micro_batches, pg=run.pg, device=run.device, precision=precision
            )
            assert data is not None
            data.keep_rows(rows or {})
            self.batches.append(data)
            order = [[(n, g) for n in micro for g in range(len(self.responses[n]))] for micro in own]
            self.micro_batches.append(
                [
                    MicroBatch(order=names, where=responses_of(batch))
                    for names, batch in zip(order, data.without_media, strict=True)
                ]
            )
        for response in (response for group in self.responses.values() for response in group):
            response.routes = None  # the rows have them
        found = sum_over_ranks(counts, device=run.device)
        width = len(COUNTED)
        self.counts = [dict(zip(COUNTED, found[mini * width : (mini + 1) * width])) for mini in range(len(self.steps))]

    def _rows(self, run: Run, prompts: Sequence[Prompt]) -> OmniBatch:
        assert isinstance(run.loader, PromptLoader)
        groups = [
            (prompt, group)
            for prompt in prompts
            for group in _groups(prompt, self.responses[prompt.number], run.recipe.reinforce, run)
        ]
        return run.loader.collate(groups)

    def settle(self, run: Run) -> None:
        """What the loss needs of rewards, once it is known which responses take part."""
        contributes = replica(run.pg).rank() == 0
        kept: list[int] = []
        for mini in range(len(self.steps)):
            told = [[self.responses[n][g] for n, g in micro.order] for micro in self.micro_batches[mini]]
            kept.append(sum(r.kept for responses in told for r in responses) if contributes else 0)
            for micro, responses in zip(self.micro_batches[mini], told, strict=True):
                values = torch.tensor([r.advantage for r in responses], dtype=torch.float64)
                micro.advantages = values.to(run.device)
                micro.kept = torch.tensor([r.kept for r in responses]).to(run.device)
        for count, divisor in zip(self.counts, sum_over_ranks(kept, device=run.device), strict=True):
            count["divisor"] = divisor

    # ---------------------------------------------------------------------------------------- in a checkpoint

    def state_dict(self, run: Run) -> dict[str, Any]:
        """All of it, of all replicas, on every rank; all ranks together."""
        own: dict[int, list[dict[str, Any]]] = {}
        logs: dict[int, list[dict[str, Tensor]]] = {}
        if replica(run.pg).rank() == 0:
            own = {number: [_plain(response) for response in group] for number, group in self.responses.items()}
            for (number, g), routes in self._routes():
                own[number][g]["routes"] = routes.cpu()
        if run.place.is_last_stage and run.place.is_first:
            for micro in (micro for mini in self.micro_batches for micro in mini):
                for row, (number, _) in enumerate(micro.order):
                    length = len(self.responses[number][len(logs.setdefault(number, []))].ids)
                    found = {"old": micro.old, "reference": micro.reference}
                    logs[number].append({k: v[row, :length].cpu() for k, v in found.items() if v is not None})
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (own, logs))
        responses = {number: group for part, _ in parts for number, group in part.items()}
        for _, part in parts:
            for number, group in part.items():
                for plain, found in zip(responses[number], group, strict=True):
                    plain |= found
        return {"number": self.number, "next": self.next, "steps": self.steps, "responses": responses}

    def _routes(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """(prompt, g) of each response and the routes that are replayed of it; nothing where routing is live."""
        for data, micro_batches in zip(self.batches, self.micro_batches, strict=True):
            for batch, micro in zip(data.without_media, micro_batches, strict=True):
                if batch.routes is not None:
                    yield from zip(micro.order, routes_of_responses(batch.attention, batch.routes), strict=True)

    @classmethod
    def of_state(cls, state: dict[str, Any], run: Run) -> "Iteration":
        """This rank's part of what a checkpoint holds; :meth:`prepare`, :meth:`restore` and :meth:`settle` follow."""
        iteration = cls(number=state["number"], steps=state["steps"], responses={}, next=state["next"])
        iteration.recut(run.recipe.data.micro_batch_size)
        for number in (n for mini in range(len(iteration.steps)) for micro in iteration.own(run, mini) for n in micro):
            iteration.responses[number] = [_response(plain) for plain in state["responses"][number]]
        return iteration

    def restore(self, state: dict[str, Any], run: Run) -> None:
        """Log-probabilities of a checkpoint, where they are needed."""
        if not run.place.is_last_stage:
            return
        for micro in (micro for mini in self.micro_batches for micro in mini):
            plain = [state["responses"][number][g] for number, g in micro.order]
            for name in ("old", "reference"):
                if name in plain[0]:
                    whole = torch.zeros(micro.where.valid.shape, dtype=torch.float32)
                    for row, found in enumerate(plain):
                        whole[row, : len(found[name])] = found[name]
                    setattr(micro, name, whole.to(run.device))


def _groups(prompt: Prompt, responses: Sequence[Response], config: ReinforceConfig, run: Run) -> list[Group]:
    ids = [response.ids for response in responses]
    if config.share_prompt:
        groups = group_samples(prompt, ids, capacity=run.recipe.data.seq_length)
    else:
        groups = separate_samples(prompt, ids)
    routes = [r.routes[: prompt.length - 1 + len(r.ids)] for r in responses if r.routes is not None]
    return replaying(groups, routes) if routes else groups


def _plain(response: Response) -> dict[str, Any]:
    return {
        "ids": torch.tensor(response.ids, dtype=torch.int32),
        "log_probs": torch.tensor(response.log_probs, dtype=torch.float64),
        "finish": response.finish,
        "values": dict(response.values),
        "total": response.total,
        "advantage": response.advantage,
        "kept": response.kept,
    }


def _response(plain: dict[str, Any]) -> Response:
    return Response(
        ids=plain["ids"].tolist(),
        log_probs=plain["log_probs"].tolist(),
        finish=plain["finish"],
        values=dict(plain["values"]),
        total=plain["total"],
        advantage=plain["advantage"],
        kept=plain["kept"],
        routes=plain.get("routes"),
    )
