"""tools/compare_losses.py: runs that follow the control, runs that do not, and runs that are not there."""

import json
from pathlib import Path

import pytest

from tools.compare_losses import differences, main


def run(folder: Path, name: str, values: list[float]) -> str:
    (folder / name).mkdir()
    lines = [json.dumps({"step": i + 1, "lm loss": value}) + "\n" for i, value in enumerate(values)]
    (folder / name / "metrics.jsonl").write_text("".join([*lines, '{"step": 2, "eval/loss": 1.0}\n']))
    return f"{name}={folder / name}"


def test_differences_are_relative_and_at_common_steps() -> None:
    assert differences({1: 2.2, 2: 3.0, 9: 1.0}, {1: 2.0, 2: 3.0}) == pytest.approx({1: 0.1, 2: 0.0})


def test_exit_status_follows_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control, near = run(tmp_path, "control", [4.0, 3.0, 2.0]), run(tmp_path, "near", [4.0, 3.0 + 3e-6, 2.0])
    picture = tmp_path / "curves.png"
    assert main([control, near, "--assert-equal", "1e-5", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([control, near, "--assert-equal", "1e-7"]) == 1
    assert "at most 1.0e-06 apart" in capsys.readouterr().out
    assert main([control, run(tmp_path, "short", [4.0, 3.0]), "--assert-equal", "1e-5"]) == 1


def test_bad_input_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control = run(tmp_path, "control", [1.0])
    assert main([control, f"none={tmp_path / 'none'}"]) == 2
    assert main([control, control]) == 2
    assert main([control, run(tmp_path, "b", [1.0]), "--metric", "grad-norm"]) == 2
    assert "has no metric 'grad-norm'; it has eval/loss, lm loss, step" in capsys.readouterr().err
