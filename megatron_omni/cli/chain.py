"""Run a chain of stages: ``python -m megatron_omni.cli.chain recipes/chain.yaml [key=value ...]``.

The plan is printed first. Finished stages are skipped, one that was stopped goes on at its last checkpoint; each runs as
``torchrun --standalone --nproc-per-node N`` or behind ``launcher=...`` (``launcher="srun torchrun --nnodes 8 ..."``). Started
under torchrun itself, rank 0 runs the chain with that torchrun's number of processes and the others leave.

SIGTERM, SIGINT and SIGUSR1 stop the running stage after its current step, with a checkpoint. Exit status: 0 all stages are
finished, 2 bad input, 75 stopped on a signal ("requeue me"), 1 anything else.
"""

import argparse
import fcntl
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from megatron_omni.config.outcome import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_REQUEUE, STOP_MARKER

if TYPE_CHECKING:
    from megatron_omni.chain import Chain, Stage


def main(arguments: list[str] | None = None) -> int:
    """Parse, print the plan, run what is left."""
    parser = argparse.ArgumentParser(
        prog="megatron-omni chain",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("chain", type=Path, help="YAML file that lists the stages")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="fields of every stage's recipe (seed=8), and run_dir= or launcher= of the chain",
    )  # fmt: skip
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="processes of a stage (default: the file's)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; run nothing")
    options = parser.parse_intermixed_args(arguments)
    if int(os.environ.get("RANK", "0")) != 0:
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from megatron_omni.chain import load_chain

    try:
        chain = load_chain(options.chain, options.overrides, nproc_per_node=options.nproc_per_node or _under_torchrun())
        print(describe(chain), flush=True)
        if options.dry_run:
            return 0
        return run(chain)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _under_torchrun() -> int | None:
    """Processes of the torchrun that this process is a rank of; None without one."""
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if local is None:
        return None
    if local != world:
        raise ValueError(
            f"WORLD_SIZE={world} over several machines: run the chain once, on one of them, with launcher=... for its stages"
        )
    return int(local)


def describe(chain: "Chain") -> str:
    """The plan: what each stage loads, trains, freezes and reads, its memory, and how far it is."""
    return "\n".join(
        [f"chain of {len(chain.stages)} stages in {chain.run_dir}"] + [_plan(chain, s) for s in chain.stages]
    )


def _plan(chain: "Chain", stage: "Stage") -> str:
    done = stage.steps_done
    state = "not started" if done is None else "finished" if stage.is_done else f"at step {done} of {stage.steps}"
    origin = ", ".join(f"{role} {word}" for role, word in stage.sources.items()).removeprefix("init_from ")
    if stage.pairs is not None:
        kind, lines = "pairs", _pairing(stage)
    elif stage.recipe is None:
        kind = "upcycling"
        lines = [("starts from", origin), ("writes", f"{len(stage.sources)} routed experts, in the order given")]
    else:
        kind = str(stage.recipe_file)
        lines = [("starts from", origin or "random weights"), *_training(chain, stage)]
    return "\n".join([f"\n{stage.name}: {kind} ({state})", *(f"  {name:<12} {text}" for name, text in lines)])


def _pairing(stage: "Stage") -> list[tuple[str, str]]:
    config = stage.pairs
    assert config is not None
    consistency = config.consistency.function if config.consistency is not None else "the thought ends with the answer"
    lines = [
        ("reads", f"rollouts of {config.rollouts}"),
        ("right", f"{', '.join(config.correct) or 'all rewards of content'} at least {config.correct_at:g}"),
        ("consistent", f"{consistency} (at least {config.consistent_at:g})"),
        ("pairs", f"at most {config.pairs_per_prompt} a prompt, lengths within {config.length_factor:g} times"),
    ]
    return [*lines, *([("teacher", config.demonstrations)] if config.demonstrations is not None else [])]


def _training(chain: "Chain", stage: "Stage") -> list[tuple[str, str]]:
    from megatron_omni.chain import stage_ranks
    from megatron_omni.config.parts import NEW_TOKEN_ROWS, trained_parts
    from megatron_omni.estimate import count_parameters, weight_bytes_per_rank
    from megatron_omni.estimate.hardware import GPUS
    from megatron_omni.estimate.plan import make_plan

    recipe = stage.recipe
    assert recipe is not None
    counts = {part: number for part, number in vars(count_parameters(recipe.model)).items() if number}
    parts = trained_parts(recipe)
    trained = {part: number for part, number in counts.items() if part in parts}
    rows = ", rows of new tokens" if NEW_TOKEN_ROWS in parts else ""
    frozen = [part for part in counts if part not in parts]
    data, ranks = recipe.data, stage_ranks(chain, recipe)
    tokens = recipe.train_iters * data.global_batch_size * data.seq_length
    held = sum(weight_bytes_per_rank(recipe, ranks).values())
    peak = make_plan(recipe, world_size=ranks, gpu=next(iter(GPUS.values()))).peak_bytes
    scale = ", ".join(f"{part} x {factor:g}" for part, factor in recipe.optim.lr_scale.items())
    return [
        ("trains", ", ".join(f"{p} {_count(n)}" for p, n in trained.items()) + rows),
        ("frozen", ", ".join(frozen) or "nothing"),
        ("reads", _reads(stage)),
        ("tokens", f"{'' if data.packing else 'at most '}{_count(tokens)} in {recipe.train_iters:,} steps"),
        ("rate", f"{recipe.optim.lr:g} to {recipe.optim.min_lr:g}, {recipe.optim.lr_decay_style}" + (scale and f"; {scale}")),
        ("memory", f"a rank of {ranks}: {held / 2**30:.2f} GiB held, {peak / 2**30:.2f} at the peak (megatron-omni plan)"),
    ]  # fmt: skip


def _reads(stage: "Stage") -> str:
    assert stage.recipe is not None
    if "data_from" in stage.reads:
        return f"{stage.reads['data_from']}, all alike"
    said = ", ".join(f"{source.name} {source.weight:g}" for source in stage.recipe.data.sources)
    if stage.prompts_from is not None:
        said += f"; without {stage.prompts_from.drop_solved:.0%} of what {stage.prompts_from.rollouts} solved"
    return said


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


class Stopped(Exception):
    """A stop signal came while nothing runs that could save."""


class Signals:
    """Hands stop signals to the running stage."""

    def __init__(self) -> None:
        self.received = False
        self.child: subprocess.Popen[bytes] | None = None
        self._starts = self._missed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.received = True
        if self.child is None:
            if not self._starts:
                raise Stopped
            self._missed = True  # by a process that is about to be there: it must not outlive this one
            return
        # torchrun passes SIGTERM on to its workers and waits for them; of SIGUSR1 it would die.
        self.child.send_signal(signal.SIGTERM)

    def start(self, command: list[str], **settings: Any) -> int:
        """Run a stage, which gets the signals that come from here on; its exit status."""
        self._starts = True
        self.child = subprocess.Popen(command, **settings)
        self._starts = False
        if self._missed:
            self.child.send_signal(signal.SIGTERM)
        status = self.child.wait()
        self.child = None
        return status


def run(chain: "Chain") -> int:
    """Run the stages that are not finished; the exit status."""
    from megatron_omni.chain import check_inputs, check_paths, report, report_file

    check_paths(chain)
    chain.run_dir.mkdir(parents=True, exist_ok=True)
    signals = Signals()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signals)
    with (chain.run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{chain.run_dir}: another chain, or a stage that outlived one, is still at work there"
            ) from error
        try:
            for stage in chain.stages:
                check_inputs(chain, stage)
                if stage.is_done:
                    continue
                if signals.received:  # during the last step of the stage before
                    raise Stopped
                print(f"\n== {stage.name} ==", flush=True)
                status = _make(chain, stage) if stage.recipe is None else _train(chain, stage, signals, lock)
                if status:
                    return status
        except Stopped:
            print("stopped; start the chain again to go on", flush=True)
            return EXIT_REQUEUE
    last = chain.stages[-1]
    where = last.run_dir if last.pairs is not None else last.result
    print(f"\nall {len(chain.stages)} stages are finished: {where}", flush=True)
    if any(s.pairs is not None or (s.recipe is not None and s.recipe.log.eval_interval > 0) for s in chain.stages):
        text = report([chain])
        report_file(chain).write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n\nwritten to {report_file(chain)}", flush=True)
    return 0


def _train(chain: "Chain", stage: "Stage", signals: Signals, lock: TextIO) -> int:
    from megatron_omni.chain import clean_environment, training_command

    assert stage.recipe is not None
    _check_files(chain, stage)
    (stage.run_dir / STOP_MARKER).unlink(missing_ok=True)  # of an earlier stop: it must not speak for this start
    command = training_command(chain, stage, sys.executable)
    print("$", " ".join(command), flush=True)
    # A session of its own: Ctrl-C reaches the stage once, through this process. It inherits the lock.
    status = signals.start(command, env=clean_environment(), start_new_session=True, pass_fds=[lock.fileno()])
    if status == 0 and stage.is_done:
        return 0
    if (stage.run_dir / STOP_MARKER).exists():
        print(f"{stage.name}: stopped with a whole checkpoint; start the chain again to go on", flush=True)
        return EXIT_REQUEUE
    if signals.received and stage.is_done:  # the signal came with its last step
        print(f"{stage.name}: finished; start the chain again to go on", flush=True)
        return EXIT_REQUEUE
    if signals.received and status in (-signal.SIGTERM, 128 + signal.SIGTERM):
        print(
            f"{stage.name}: stopped, nothing saved since the last checkpoint; start the chain again to go on",
            flush=True,
        )
        return EXIT_REQUEUE
    print(f"error: {stage.name} ended with status {status}; its message is above", file=sys.stderr)
    return EXIT_FAILURE


def _check_files(chain: "Chain", stage: "Stage") -> None:
    from megatron_omni.chain import recipe_with_rows, stage_ranks
    from megatron_omni.config.validate import validate

    assert stage.recipe is not None
    try:
        validate(recipe_with_rows(chain, stage), world_size=stage_ranks(chain, stage.recipe))
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from error


def _make(chain: "Chain", stage: "Stage") -> int:
    """A stage that trains nothing, in this process: an upcycling, or pairs."""
    from megatron_omni.chain import run_pairs, run_upcycle
    from megatron_omni.chain.pairs import Unanswered
    from megatron_omni.checkpoint.commit import CheckpointError

    try:
        if stage.pairs is None:
            print(f"wrote {run_upcycle(chain, stage)}", flush=True)
        else:
            made = run_pairs(chain, stage)
            kinds = ", ".join(f"{kind} {count}" for kind, count in made["by_kind"].items())
            print(
                f"wrote {made['pairs']} pairs of {made['prompts']} prompts ({kinds}) into {stage.run_dir}", flush=True
            )
    except Unanswered as error:
        print(f"{stage.name}: {error}", file=sys.stderr)
        return EXIT_REQUEUE
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from error
    except (CheckpointError, OSError) as error:
        print(f"error: stage {stage.name}: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return 0


if __name__ == "__main__":
    sys.exit(main())
