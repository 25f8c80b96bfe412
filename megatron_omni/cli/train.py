"""Train from a recipe: ``python -m megatron_omni.cli.train RECIPE key=value ...``, alone or under torchrun.

Exit status: 0 finished, 2 bad input (one line ``error: ...``), 75 stopped on a signal with a whole checkpoint
("requeue me"), 1 anything else. torchrun reports 1 whatever its workers say; the file ``requeue`` in the run
directory tells a job script.

torch is imported after the arguments are parsed, so ``--help`` answers at once.
"""

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_omni.config.run import Recipe

EXIT_BAD_INPUT = 2


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
        "--dry-run", action="store_true", help="print the resolved recipe, parameters and memory; train nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        from megatron_omni.config.load import load_recipe
        from megatron_omni.config.validate import validate

        recipe = load_recipe(options.recipe, options.overrides)
        validate(recipe, world_size=world_size, check_files=not options.dry_run)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.dry_run:
        if rank == 0:
            print(describe(recipe, world_size=world_size))
        return 0
    return run(recipe)


def run(recipe: "Recipe") -> int:
    """Train; a failure on any rank ends every rank soon, and its first cause is printed once."""
    from megatron_omni.platform.device import install

    quiet()
    install()
    from megatron_omni.parallel.groups import destroy
    from megatron_omni.tasks.supervised import SupervisedTask
    from megatron_omni.training.failure import leave, report_failure
    from megatron_omni.training.loop import train
    from megatron_omni.training.setup import setup

    try:
        write_resolved(recipe)
        prepared = setup(recipe, SupervisedTask(recipe.data.sources))
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


def write_resolved(recipe: "Recipe") -> None:
    """Leave the recipe that is being run, defaults included, in its run directory."""
    from pathlib import Path

    from megatron_omni.config.load import recipe_to_yaml

    if int(os.environ.get("RANK", "0")) == 0:
        directory = Path(recipe.run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "resolved.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")


def describe(recipe: "Recipe", *, world_size: int) -> str:
    """The resolved recipe, its parameters by part and the memory of a rank, without building a model."""
    from megatron_omni.config.load import recipe_to_yaml
    from megatron_omni.estimate import count_parameters, weight_bytes_per_rank

    counts, adapters_only = count_parameters(recipe.model), recipe.model.lora is not None
    lines = [recipe_to_yaml(recipe).rstrip(), "", f"{'part':<16}{'parameters':>18}  trained"]
    for part, number in vars(counts).items():
        trained = "no" if part in recipe.freeze or (adapters_only and part != "adapters") else "yes"
        if (
            not adapters_only
            and part in ("embeddings", "output")
            and part in recipe.freeze
            and "new_token_rows" not in recipe.freeze
        ):
            trained = "rows of special tokens"
        lines.append(f"{part:<16}{number:>18,}  {trained}")
    frozen = sum(number for part, number in vars(counts).items() if part in recipe.freeze)
    if adapters_only:
        frozen = counts.total - counts.adapters
    lines.append(f"{'total':<16}{counts.total:>18,}  {counts.total - frozen:,} in trained parts")
    lines += ["", f"fullest of {world_size} rank(s), without activations:"]
    sizes = weight_bytes_per_rank(recipe, world_size)
    lines += [f"{name:<16}{size / 2**30:>15.2f} GiB" for name, size in sizes.items()]
    lines.append(f"{'sum':<16}{sum(sizes.values()) / 2**30:>15.2f} GiB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
