"""What grows with the number of ranks, counted: store operations, collectives and their bytes, files (docs/scale.md).

python -m benchmarks.bench_scale --real 2 4 8 --light 2 4 8 16 32 64 --groups 8 64 512 4096

--real    ranks of a tiny training that starts, takes three steps, saves and resumes (gloo, forked)
--light   ranks without a model, which do once what a run does often
--groups  Megatron's groups of a rank among so many, without the others (torch's fake backend)

A table a kind, in Markdown: calls and bytes of rank 0 and the largest of the others. Nothing is timed.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.platform.device import install

Table = dict[str, dict[str, list[int]]]
"""{phase: {what: [calls, bytes]}} of a rank (tests/distributed/scaled_run.py)."""
LAYOUT = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=4)
TIMEOUT_SECONDS = 3600.0


def main(arguments: list[str] | None = None) -> None:
    """Count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("real", "light", "groups"):
        parser.add_argument(f"--{kind}", type=int, nargs="*", default=[], metavar="N")
    options = parser.parse_args(arguments)
    install()  # before anything imports megatron.core, as the functions below do
    with tempfile.TemporaryDirectory() as directory:
        print_tables("real", {n: real(Path(directory), n) for n in options.real})
        print_tables("light", {n: light(Path(directory) / f"light{n}", n) for n in options.light})
    if options.groups:
        print("\n| ranks | groups that a rank makes | it is in | of these with others | ranks of these together |")
        print("|---|---|---|---|---|")
    for n in options.groups:
        print(f"| {n:,} | " + " | ".join(f"{number:,}" for number in groups_of_a_rank(n)) + " |", flush=True)


def real(directory: Path, ranks: int) -> list[Table]:
    """Counts of every rank of a tiny training."""
    from tests.distributed.harness import run_ranks
    from tests.distributed.scaled_run import counted_run, scaled_recipe
    from tests.distributed.tiny_run import make_corpus

    corpus = make_corpus(directory / f"corpus{ranks}")
    recipe = scaled_recipe(corpus, directory / f"run{ranks}", ranks)
    return run_ranks(counted_run, ranks, recipe, timeout_seconds=TIMEOUT_SECONDS)


def light(directory: Path, ranks: int) -> list[Table]:
    """Counts of every light rank."""
    from tests.distributed.harness import run_ranks
    from tests.distributed.scaled_run import light_rank, write_checkpoint

    write_checkpoint(directory / "checkpoints", ranks)
    return run_ranks(light_rank, ranks, directory / "checkpoints", timeout_seconds=TIMEOUT_SECONDS)


def print_tables(kind: str, found: dict[int, list[Table]]) -> None:
    """Calls (bytes) by phase and what, a column a number of ranks: rank 0 / most of the others."""
    if not found:
        return
    rows = sorted({(phase, what) for tables in found.values() for t in tables for phase in t for what in t[phase]})
    print(f"\n{kind} ranks: rank 0 / most of the others\n")
    print("| phase | what | " + " | ".join(map(str, found)) + " |\n|---|---|" + "---|" * len(found))
    for phase, what in rows:
        cells = [f"{_cell(tables[:1], phase, what)} / {_cell(tables[1:], phase, what)}" for tables in found.values()]
        print(f"| {phase} | {what} | " + " | ".join(cells) + " |", flush=True)


def _cell(tables: list[Table], phase: str, what: str) -> str:
    most = [max(table.get(phase, {}).get(what, [0, 0])[i] for table in tables) for i in (0, 1)]
    return f"{most[0]}" + (f" ({most[1]:,} B)" if most[1] else "")


def groups_of_a_rank(ranks: int) -> tuple[int, int, int, int]:
    """Calls of ``new_group`` that rank 0 makes, groups it is in, those with others, and the sum of their sizes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_omni.parallel import groups

    made: list[Any] = []
    new_group = dist.new_group
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)

    def counted(ranks: list[int] | None = None, **settings: Any) -> Any:
        made.append(list(ranks) if ranks is not None else list(range(dist.get_world_size())))
        return new_group(ranks, **settings)

    dist.new_group = counted
    try:
        groups.initialize(LAYOUT)
    finally:
        dist.new_group = new_group
        groups.destroy()
    own = [members for members in made if 0 in members]
    sizes = Counter(len(members) for members in own if len(members) > 1)
    return len(made), len(own), sizes.total(), sum(size * number for size, number in sizes.items())


if __name__ == "__main__":
    main()
