"""A few of the random faults of tests/stress/faults.py; `make stress` runs many."""

from collections.abc import Iterator

import pytest

from tests.stress.faults import Bench, can_mount, make_bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield make_bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("kill_one", 1),  # during a background save, goes on on one rank
        ("kill_all", 7),
        ("hang_looping", 3),
        ("non_finite", 4),
        ("dead_worker", 5),
        ("failing_data", 9),
        ("damaged", 6),
        pytest.param(
            "disk_full", 8, marks=pytest.mark.skipif(not can_mount(), reason="needs root to mount a small disk")
        ),
    ],
)
def test_the_run_goes_on_as_if_nothing_had_happened(bench: Bench, kind: str, seed: int) -> None:
    bench.trial(kind, seed)
