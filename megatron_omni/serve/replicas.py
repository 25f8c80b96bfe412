"""One engine for each replica of the model, as rank 0 sees them: requests are dealt out, events come back, all in step.

Each turn rank 0 sends every replica's leader its new requests and cancellations, all of them take a step of their
engines, and rank 0 gathers what happened. So expert-parallel replicas, which meet in every MoE layer, need nothing else,
and a single replica sends no message. A request goes to the replica with the fewest unfinished samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch.distributed as dist

from megatron_omni.generation.engine import Engine
from megatron_omni.generation.request import EngineState, Event, FinishedEvent, Request
from megatron_omni.serve.link import Cancel

Command = Request | Cancel


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What happened in a step."""

    events: list[Event]
    refused: list[tuple[str, str]]
    """Names of requests that an engine did not take, and why."""
    state: EngineState


class Replicas:
    """All engines, on rank 0; ``group`` are the leaders of the replicas, rank 0 the first of them."""

    def __init__(self, engine: Engine, group: dist.ProcessGroup) -> None:
        self._engine, self._group = engine, group
        self._unfinished: dict[str, tuple[int, int]] = {}
        """Name of a request -> its replica and its samples that have not ended."""
        self._load = [0] * group.size()

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return self._engine.busy or bool(self._unfinished)

    def turn(self, commands: Sequence[Command]) -> Turn:
        """Hand over commands and take a step."""
        orders: list[list[Command]] = [[] for _ in self._load]
        for command in commands:
            orders[self._replica_of(command)].append(command)
        if len(self._load) == 1:
            turns = [_take_turn(self._engine, orders[0])]
        else:
            mine = _take_turn(self._engine, _scattered(self._group, orders) or [])
            gathered: list[Turn] = [mine] * len(self._load)
            dist.gather_object(mine, gathered, group=self._group, group_dst=0)
            turns = gathered
        return self._merged(turns)

    def close(self) -> None:
        """Let the other ranks go."""
        if len(self._load) > 1:
            _scattered(self._group, [None] * len(self._load))
        self._engine.close()

    def _replica_of(self, command: Command) -> int:
        if isinstance(command, Cancel):
            return self._unfinished.get(command.name, (0, 0))[0]
        replica = min(range(len(self._load)), key=self._load.__getitem__)
        self._unfinished[command.name] = replica, command.n
        self._load[replica] += command.n
        return replica

    def _merged(self, turns: Sequence[Turn]) -> Turn:
        events = [event for turn in turns for event in turn.events]
        refused = [pair for turn in turns for pair in turn.refused]
        for event in events:
            if isinstance(event, FinishedEvent):
                self._ended(event.name, 1)
        for name, _ in refused:
            self._ended(name, self._unfinished[name][1])
        names = [field.name for field in fields(EngineState)]
        state = EngineState(**{name: sum(getattr(turn.state, name) for turn in turns) for name in names})
        return Turn(events=events, refused=refused, state=state)

    def _ended(self, name: str, samples: int) -> None:
        replica, left = self._unfinished.pop(name)
        self._load[replica] -= samples
        if left > samples:
            self._unfinished[name] = replica, left - samples


def take_part(engine: Engine, group: dist.ProcessGroup) -> None:
    """The leader of another replica than rank 0's: turn after turn, until rank 0 closes."""
    while (commands := _scattered(group, None)) is not None:
        dist.gather_object(_take_turn(engine, commands), None, group=group, group_dst=0)
    engine.close()


def _scattered(group: dist.ProcessGroup, orders: Sequence[list[Command] | None] | None) -> list[Command] | None:
    """This replica's part of what rank 0 gives out; None at the end."""
    mine: list[list[Command] | None] = [None]
    dist.scatter_object_list(mine, None if orders is None else list(orders), group=group, group_src=0)
    return mine[0]


def _take_turn(engine: Engine, commands: Sequence[Command]) -> Turn:
    refused = []
    for command in commands:
        if isinstance(command, Cancel):
            engine.cancel(command.name)
            continue
        try:
            engine.submit(command)
        except ValueError as error:
            refused.append((command.name, str(error)))
    return Turn(events=engine.step(), refused=refused, state=engine.state())
