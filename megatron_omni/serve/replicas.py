"""One engine for each replica of the model, as rank 0 sees them: requests are dealt out, events come back, all in step.

Each turn rank 0 sends every replica's leader its new requests and cancellations, all of them take a step of their
engines, and rank 0 gathers what happened. So expert-parallel replicas, which meet in every MoE layer, need nothing else,
and a single replica sends no message. A request goes to the replica with the fewest unfinished samples.

Where something fails between two messages, all ranks hear of it in the next one and stop: ``turn`` raises, then
``close(failed=True)`` makes PeerFailed of what the other ranks wait for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum, auto

import torch.distributed as dist

from megatron_omni.generation.engine import Engine
from megatron_omni.generation.request import EngineState, Event, FinishedEvent, Request, StepFacts
from megatron_omni.parallel.sharing import PeerFailed
from megatron_omni.serve.link import Cancel, Pause, Resume

Command = Request | Cancel | Pause | Resume


class _Word(Enum):
    """What rank 0 gives out in place of commands."""

    END = auto()
    FAILED = auto()


Word = list[Command] | _Word


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What happened in a step."""

    events: list[Event]
    refused: list[tuple[str, str]]
    """Names of requests that an engine did not take, and why."""
    state: EngineState
    steps: tuple[StepFacts, ...] = ()
    """Of each replica that computed something."""


class Replicas:
    """All engines, on rank 0; ``group`` are the leaders of the replicas, rank 0 the first of them."""

    def __init__(self, engine: Engine, group: dist.ProcessGroup) -> None:
        self._engine, self._group = engine, group
        self._unfinished: dict[str, tuple[int, int]] = {}
        """Name of a request -> its replica and its samples that have not ended."""
        self._paused: set[str] = set()
        """Names among them of which nothing is to be computed."""
        self._load = [0] * group.size()
        self._broken = False
        """A message to the other replicas is under way, or failed."""

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return self._engine.busy or len(self._unfinished) > len(self._paused)

    def turn(self, commands: Sequence[Command]) -> Turn:
        """Hand over commands and take a step."""
        orders: list[list[Command]] = [[] for _ in self._load]
        for command in commands:
            orders[self._replica_of(command)].append(command)
        if len(self._load) == 1:
            return self._merged([_take_turn(self._engine, orders[0])])
        self._broken = True
        mine = _scattered(self._group, orders)
        assert isinstance(mine, list)
        turn, error = _turn_or_failure(self._engine, mine)
        turns: list[Turn | None] = [None] * len(self._load)
        dist.gather_object(turn, turns, group=self._group, group_dst=0)
        self._broken = False
        if error is not None:
            raise error
        if None in turns:
            raise PeerFailed("the leader of another replica failed")
        return self._merged([turn for turn in turns if turn is not None])

    def close(self, *, failed: bool = False) -> None:
        """Let the other ranks go; ``failed``: they end with PeerFailed, unless a message to them is what failed."""
        if failed and (self._broken or self._engine.broken):
            return
        if len(self._load) > 1:
            word: Word = _Word.FAILED if failed else _Word.END
            _scattered(self._group, [word] * len(self._load))
        if failed:
            self._engine.give_up()
        self._engine.close()

    def _replica_of(self, command: Command) -> int:
        if not isinstance(command, Request):
            if command.name in self._unfinished and isinstance(command, Pause):
                self._paused.add(command.name)
            else:  # what is cancelled ends in this turn
                self._paused.discard(command.name)
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
        state = turns[0].state
        if len(turns) > 1:
            names = [field.name for field in fields(EngineState)]
            state = EngineState(**{name: sum(getattr(turn.state, name) for turn in turns) for name in names})
        steps = tuple(step for turn in turns for step in turn.steps)
        return Turn(events=events, refused=refused, state=state, steps=steps)

    def _ended(self, name: str, samples: int) -> None:
        replica, left = self._unfinished.pop(name)
        self._load[replica] -= samples
        if left > samples:
            self._unfinished[name] = replica, left - samples
        else:
            self._paused.discard(name)


class NoEngine:
    """In the place of engines where a server only speaks: it has nothing to compute, and tells that it lives."""

    busy = False

    def turn(self, commands: Sequence[Command]) -> Turn:
        """Nothing happens."""
        nothing = EngineState(**{field.name: 0 for field in fields(EngineState)})
        return Turn(
            events=[], refused=[(command.name, "this server only speaks") for command in commands], state=nothing
        )

    def close(self, *, failed: bool = False) -> None:
        """Nothing ends."""


def take_part(engine: Engine, group: dist.ProcessGroup) -> None:
    """The leader of another replica than rank 0's: turn after turn, until rank 0 closes. PeerFailed where it failed."""
    error: Exception | None = None
    with engine:
        while isinstance(word := _scattered(group, None), list):
            turn, error = _turn_or_failure(engine, word)
            dist.gather_object(turn, None, group=group, group_dst=0)
        if error is not None:
            raise error
        if word is _Word.FAILED:
            raise PeerFailed("rank 0 failed")


def _scattered(group: dist.ProcessGroup, words: Sequence[Word] | None) -> Word:
    """This replica's part of what rank 0 gives out."""
    mine: list[Word] = [_Word.END]
    dist.scatter_object_list(mine, None if words is None else list(words), group=group, group_src=0)
    return mine[0]


def _turn_or_failure(engine: Engine, commands: Sequence[Command]) -> tuple[Turn | None, Exception | None]:
    """What happened in a step, or why it failed; raises where the other ranks cannot be told."""
    try:
        return _take_turn(engine, commands), None
    except Exception as error:
        if engine.broken:
            raise
        engine.give_up()
        return None, error


def _take_turn(engine: Engine, commands: Sequence[Command]) -> Turn:
    refused = []
    for command in commands:
        match command:
            case Cancel():
                engine.cancel(command.name)
            case Pause():
                engine.pause(command.name)
            case Resume():
                engine.resume(command.name)
            case Request():
                try:
                    engine.submit(command)
                except ValueError as error:
                    refused.append((command.name, str(error)))
    events = engine.step()
    steps = (engine.last_step,) if engine.last_step.tokens else ()
    return Turn(events=events, refused=refused, state=engine.state(), steps=steps)
