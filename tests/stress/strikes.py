"""What goes wrong in a fault trial (faults.py): each hook makes one rank of a run of ``STEPS`` steps fail in its way.

A hook is called on the victim, before it trains, with the trial's dice; ``damage`` spoils a checkpoint on disk.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training import loop
from megatron_omni.training.setup import Run

STEPS, INTERVAL = 9, 3
"""Of a run, and between its checkpoints."""

Hook = Callable[[Run, random.Random], None]


def at_step(run: Run, step: int, action: Callable[[], None]) -> None:
    """Do something while the data of ``step`` is read."""
    assert run.loader is not None
    read = run.loader.next_step

    def next_step() -> Any:
        if run.state.step + 1 == step:
            action()
        return read()

    run.loader.next_step = next_step  # type: ignore[method-assign]


def die_soon(dice: random.Random) -> None:
    """SIGKILL to this process after up to a third of a second."""
    timer = threading.Timer(dice.uniform(0.0, 0.33), os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def kill(run: Run, dice: random.Random) -> None:
    """Die at a random time: in three of five cases from the start of a save on, else from the start of a step on."""
    if dice.random() < 0.6:
        number = dice.randint(1, STEPS // INTERVAL)
        begin, saves = loop.begin_save, [0]

        def begin_save(*args: Any, **settings: Any) -> Any:
            saves[0] += 1
            if saves[0] == number:
                die_soon(dice)
            return begin(*args, **settings)

        loop.begin_save = begin_save
    else:
        at_step(run, dice.randint(1, STEPS), lambda: die_soon(dice))


def sigterm(run: Run, dice: random.Random) -> None:
    number = dice.choice([signal.SIGTERM, signal.SIGUSR1])
    at_step(run, dice.randint(1, STEPS - 1), lambda: os.kill(os.getpid(), number))


def stop_whole(run: Run, dice: random.Random) -> None:
    at_step(run, dice.randint(1, STEPS), lambda: os.kill(os.getpid(), signal.SIGSTOP))


def loop_forever(run: Run, dice: random.Random) -> None:
    def forever() -> None:
        while True:
            time.sleep(0.1)

    at_step(run, dice.randint(1, STEPS), forever)


def non_finite(run: Run, dice: random.Random) -> None:
    """Gradients of three steps in a row, from one after a checkpoint on."""
    first = 1 + INTERVAL * dice.randrange(STEPS // INTERVAL)
    value = dice.choice([float("nan"), float("inf")])
    weight = unwrap_model(run.model).get_parameter("language.decoder.layers.0.input_layernorm.weight")

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grad, value) if first <= run.state.step < first + 3 else grad

    weight.register_hook(spoil)


def failing_data(run: Run, dice: random.Random, *, times: int = 1_000_000) -> None:
    """From a random sample on, a thread that prepares data ends with an error that is no record's fault."""
    assert run.loader is not None
    build, calls, first = run.loader.builder.build_sample, [0], dice.randint(1, 8 * STEPS // 2)

    def build_sample(*args: Any, **settings: Any) -> Any:
        calls[0] += 1
        if first <= calls[0] < first + times:
            raise MemoryError("the thread is out of memory")
        return build(*args, **settings)

    run.loader.builder.build_sample = build_sample  # type: ignore[method-assign]


def dead_worker(run: Run, dice: random.Random) -> None:
    """One thread dies, once."""
    failing_data(run, dice, times=1)


def damage(directory: Path, dice: random.Random) -> str:
    """Spoil one file of a checkpoint; what was done."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    victim = dice.choice(files)
    data = victim.read_bytes()
    how = dice.choice(["flip", "flip", "truncate", "truncate", "empty", "delete", "garbage", "swap", "extra"])
    match how:
        case "flip":
            position, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
            victim.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
        case "truncate":
            victim.write_bytes(data[: dice.randrange(len(data))])
        case "empty":
            victim.write_bytes(b"")
        case "delete":
            victim.unlink()
        case "garbage":
            victim.write_bytes(data + dice.randbytes(dice.randint(1, 100)))
        case "swap":
            shards = sorted(directory.glob("*.distcp"))
            first, second = (path.read_bytes() for path in shards[:2])
            shards[0].write_bytes(second)
            shards[1].write_bytes(first)
        case "extra":
            (directory / "__7_0.distcp").write_bytes(data)
    return f"{how} {victim.name}"


def nothing(run: Run, dice: random.Random) -> None:
    """The disk is the fault."""


HOOKS: dict[str, Hook] = {
    "kill_one": kill,
    "kill_all": kill,
    "sigterm": sigterm,
    "hang_stopped": stop_whole,
    "hang_looping": loop_forever,
    "non_finite": non_finite,
    "dead_worker": dead_worker,
    "failing_data": failing_data,
    "disk_full": nothing,
}
