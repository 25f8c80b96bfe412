"""The account of a run's time over its starts."""

from pathlib import Path
from typing import Any

import pytest

from megatron_omni.training.goodput import Goodput, describe, summary


def line(began: float, from_step: int, step: int, wall: float, **parts: float) -> dict[str, Any]:
    return {"began": began, "from_step": from_step, "step": step, "wall": wall, "parts": parts}


def test_an_undisturbed_run() -> None:
    found = summary([line(100.0, 0, 10, 50.0, setup=5.0, forward=20.0, backward=15.0, data=5.0, checkpoint=5.0)])
    assert found["training"] == 35.0 and found["wall"] == 50.0 and found["goodput"] == 0.7
    assert found["lost"] == 0.0


def test_what_was_run_again_and_the_time_between_starts_are_lost() -> None:
    lines = [
        line(0.0, 0, 10, 20.0, setup=4.0, forward=15.0, checkpoint=1.0),
        line(0.0, 0, 20, 40.0, setup=4.0, forward=34.0, checkpoint=2.0),  # never whole: the next start is from 10
        line(100.0, 10, 20, 30.0, setup=4.0, forward=26.0),
    ]
    found = summary(lines)
    assert found["wall"] == 130.0 and found["training"] == 41.0 and found["lost"] == 80.0
    parts = sum(value for name, value in found.items() if name not in ("wall", "training", "goodput"))
    assert parts == pytest.approx(found["wall"])
    assert "goodput 31.5%" in describe(lines) and "2 start(s)" in describe(lines)


def test_the_time_between_a_finished_run_and_its_extension_is_not_lost() -> None:
    lines = [
        line(0.0, 0, 10, 20.0, setup=4.0, forward=16.0) | {"finished": True},
        line(9000.0, 10, 20, 30.0, setup=4.0, forward=26.0),
    ]
    found = summary(lines)
    assert found["wall"] == 50.0 and found["lost"] == 0.0 and found["goodput"] == pytest.approx(42.0 / 50.0)
    lines[1]["from_step"] = 5  # rolled back: all of the first start is run again, the pause is still no part of it
    assert summary(lines)["wall"] == 50.0 and summary(lines)["lost"] == 20.0


def test_a_start_that_kept_nothing_counts_nothing() -> None:
    lines = [line(0.0, 0, 5, 10.0, forward=9.0), line(20.0, 0, 5, 10.0, forward=9.0)]
    assert summary(lines)["training"] == 9.0


def test_parts_of_a_start_sum_to_its_wall_time_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    account = Goodput(tmp_path, step=0)
    written = account.note(3, {"forward": 0.0})
    assert sum(written["parts"].values()) == pytest.approx(written["wall"])
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"began": 1')
    assert account.lines() == [written]
