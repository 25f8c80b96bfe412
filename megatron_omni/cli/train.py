"""Train from a recipe: ``python -m megatron_omni.cli.train RECIPE key=value ...``, alone or under torchrun.

Exit status: 0 finished, 2 bad input (one line ``error: ...``), 75 stopped on a signal with a whole checkpoint
("requeue me"), 1 anything else. torchrun reports 1 whatever its workers say; the file ``requeue`` in the run
directory tells a job script.

torch is imported after the arguments are parsed, so ``--help`` answers at once.
"""

import argparse
import faulthandler
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from megatron_omni.cli.starting import say_starting
from megatron_omni.config.outcome import EXIT_BAD_INPUT
from megatron_omni.platform.environment import set_cuda_defaults

if TYPE_CHECKING:
    from megatron_omni.config.run import Recipe


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn what happened into an exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-omni train",
        description="Train a model from a recipe (recipes/*.yaml), alone or under torchrun.",
        epilog="example: torchrun --nproc-per-node 2 -m megatron_omni.cli.train recipes/tiny/quickstart.yaml optim.lr=1e-4",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields to change, for example train_iters=100"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, parameters and memory, look at every file of the run; train nothing",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks of a dry run (default: this launch's, or the fewest of the layout)",
    )
    options = parser.parse_intermixed_args(arguments)
    set_cuda_defaults()
    rank, world_size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    try:
        from megatron_omni.checkpoint.run_dir import check_start
        from megatron_omni.config.load import load_recipe
        from megatron_omni.config.validate import validate

        if options.ranks is not None and (options.ranks < 1 or not options.dry_run):
            raise ValueError(f"--ranks {options.ranks}: a positive number, for --dry-run alone (torchrun sets a run's)")
        recipe = load_recipe(options.recipe, options.overrides)
        if options.dry_run:
            return dry_run(recipe, options.ranks) if rank == 0 else 0
        validate(recipe, world_size=world_size)
        check_start(recipe)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return run(recipe, origin=options.recipe)


def dry_run(recipe: "Recipe", ranks: int | None) -> int:
    """Print what a run would be; ValueError for a recipe that cannot work, then for files that are not as it needs them."""
    from megatron_omni.config.validate import fewest_ranks, validate
    from megatron_omni.evaluation.held_out import HeldOutScores
    from megatron_omni.training.dry_run import describe, missing

    launched = os.environ.get("WORLD_SIZE")
    world_size = ranks or (int(launched) if launched else fewest_ranks(recipe.parallel))
    validate(recipe, world_size=world_size, check_files=False)
    print(describe(recipe, world_size=world_size), flush=True)
    validate(recipe, world_size=world_size)
    quiet()
    problems = missing(recipe, world_size=world_size)
    try:
        HeldOutScores(recipe)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems]))
    print("files: tokenizer, sources, indexes and checkpoints are there and fit")
    return 0


def run(recipe: "Recipe", *, origin: str) -> int:
    """Train the recipe of the file ``origin``; a failure on any rank ends every rank soon, and its first cause is printed once."""
    say_starting("train", origin)
    # An abort from C, such as that of NCCL's watchdog, shows where Python was; on the descriptor, whatever sys.stderr is.
    faulthandler.enable(2)
    from megatron_omni.platform.device import install

    quiet()
    install()
    from megatron_omni.checkpoint.run_dir import take
    from megatron_omni.evaluation.held_out import HeldOutScores
    from megatron_omni.parallel.groups import destroy
    from megatron_omni.tasks.choice import task_of
    from megatron_omni.training.failure import leave, report_failure
    from megatron_omni.training.loop import train
    from megatron_omni.training.setup import setup

    try:
        score = HeldOutScores(recipe)  # a set that cannot be scored ends the run here
        prepared = setup(recipe, task_of(recipe))
        prepared.score = score
        if int(os.environ.get("RANK", "0")) == 0:
            take(recipe)
        status = train(prepared)
    except BaseException as error:
        # Not sys.exit: a rank that unwinds politely waits for peers that are waiting for it.
        leave(report_failure(error))
    destroy()
    return status


def quiet() -> None:
    """Plain log lines; upstream's notes about itself stay out of a training log, warnings of ours stay in."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if int(os.environ.get("RANK", "0")) != 0:
        logging.getLogger("megatron_omni").setLevel(logging.WARNING)
    for name in ("megatron.core", "torch", "transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    if int(os.environ.get("RANK", "0")) == 0:
        # What it says of a run (messages that do not overlap, a slow path taken) is said once; not its deprecations, nor
        # what it would rather find installed (the log names what is used), nor what of it nothing here uses, nor that it
        # asks views for gradients.
        warnings.filterwarnings("once", category=UserWarning, module=r"megatron\.")
        for unsaid in (
            r"(?s).*not installed",
            r"(?s).*is experimental",
            r"The \.grad attribute of a Tensor that is not a leaf",
        ):
            warnings.filterwarnings("ignore", message=unsaid)


if __name__ == "__main__":
    sys.exit(main())
