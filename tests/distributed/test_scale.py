"""What a rank asks of others and of the file system does not grow with their number, but for what is said here.

The numbers are what docs/scale.md tells of 2 to 64 ranks, on fewer of them.
"""

from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.scaled_run import (
    Table,
    counted_run,
    light_disagreement,
    light_rank,
    own_operations,
    scaled_recipe,
    write_checkpoint,
)
from tests.distributed.tiny_run import make_corpus

WORK = {"collective barrier": 1, "store set": 1, "store get": 1}
"""Of a piece of work of any length (parallel/long_work.py)."""
LIGHT = {
    "numbers of a step": {"collective all_reduce": 1},
    "times of all ranks": {"collective all_reduce": 1},
    "word of rank 0": {"collective broadcast": 2},  # its length, and it
    "agreement on a save": {"collective all_reduce": 1},
    "work of any length": WORK,
    # What is to be hashed by whom, the work, and which checkpoint it is.
    "checkpoint verified": {"collective broadcast": 4} | WORK,
    "beats": {},
}
"""Operations of a rank that is not the first, on any number of them."""
REAL = {
    "setup": {"collective all_reduce": 2, "collective broadcast": 2},
    # Two MoE layers: counts gathered; rows to their experts and back, forward and backward.
    "step": {"collective all_reduce": 2, "collective all_gather": 2, "collective all_to_all": 8},
    "logged step": {"collective all_reduce": 8, "collective all_gather": 2, "collective all_to_all": 8},
    # The states of the loaders and the digests of the files are gathered; the rest is agreement, and one wait.
    "checkpoint": {"collective all_gather": 4, "collective all_reduce": 6} | WORK,
    # Five pieces of work of any length; a broadcast for each weight that data-parallel ranks hold alike.
    "resume": {what: 5 * number for what, number in WORK.items()}
    | {"collective all_reduce": 2, "collective broadcast": 23},
    "other": {"collective all_gather": 2, "collective barrier": 1},
}
"""The same of a training."""
FILES = {"setup": 0, "first step": 0, "step": 0, "logged step": 0, "checkpoint": 1, "resume": 6, "other": 0}
"""Files below the run directory that a rank opens which is not the first."""


def check(tables: list[Table], expected: dict[str, dict[str, int]]) -> None:
    """Every rank has the operations that are expected, the first more where it reads what each has said and answers."""
    for rank, table in enumerate(tables):
        for phase, operations in expected.items():
            works = operations.get("store set", 0) if rank == 0 else 0
            more = {"store set": works, "store get": works * (len(tables) - 1)} if works else {}
            assert own_operations(table, phase) == {
                what: number + more.get(what, 0) for what, number in operations.items()
            }, (rank, phase)


def test_a_run_on_real_ranks(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    tables = run_ranks(counted_run, 2, scaled_recipe(corpus, tmp_path / "run", 2))
    check(tables, REAL)
    opened = {phase: tables[1][phase].get("files opened", [0])[0] for phase in FILES}
    assert all(opened[phase] <= most for phase, most in FILES.items()), opened


@pytest.mark.parametrize("ranks", [2, 8])
def test_parts_of_a_run_on_light_ranks(ranks: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ranks)
    first, *others = tables = run_ranks(light_rank, ranks, tmp_path)
    check(tables, LIGHT)
    assert all(table["checkpoint verified"]["files opened"][0] <= 2 for table in others)  # its share of n files
    asked = first["report of a hang"]
    assert (asked["ours store poll"][0], asked["ours store beat"][0]) == (ranks, ranks)
    sent = first["times of all ranks"]["ours collective all_reduce"][1]
    assert sent == 5 * 8 * ranks  # the one message of a logged step that grows: 40 bytes a rank


def test_all_ranks_hear_of_one_that_differs(tmp_path: Path) -> None:
    """The other side of a single number: what is wrong reaches every rank, as if everything had been gathered."""
    everyone = run_ranks(light_disagreement, 3, tmp_path)
    assert len({tuple(heard) for heard in everyone}) == 1
    nothing, one, cause, failed, equal, own = everyone[0]
    assert (nothing, one, cause) == ("none", "rank 0 heard", "of 2")
    assert failed == "[rank 1] ZeroDivisionError: division by zero"
    assert equal == "['equal']" and own == "['own of 0', 'own of 1', 'own of 2']"
