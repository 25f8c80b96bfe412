"""The quickstart's driver: what is there is kept, a stop reaches the command that runs, several runs make one table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # examples/ is not installed

from examples.quickstart import repeat, run  # noqa: E402
from megatron_omni.config.load import load_recipe  # noqa: E402


def test_a_trained_model_is_not_deleted_without_being_told(tmp_path, monkeypatch):
    out = tmp_path / run.OUT
    out.mkdir(parents=True)
    (out / "latest_checkpointed_iteration.txt").write_text("3000")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit, match=r"holds a trained model.*OVERWRITE=1"):
        run.main()
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "3000"


def test_the_fast_form_lives_in_a_folder_of_its_own():
    fast, full = (load_recipe(ROOT / name) for name in (run.FAST_RECIPE, run.RECIPE))
    paths = [fast.run_dir, fast.data.tokenizer, *(source.path for source in fast.data.sources)]
    assert all(path.startswith(f"{run.FAST_OUT}") for path in paths)
    assert all(f"{run.FAST_OUT}" not in source.path for source in full.data.sources)
    assert full.run_dir == str(run.OUT) != fast.run_dir


def test_a_stop_signal_ends_the_command_that_runs(tmp_path):
    """The child says that it runs; the signal to the driver reaches it, and both are gone."""
    ready = tmp_path / "ready"
    child = f"import os, pathlib, signal; pathlib.Path({str(ready)!r}).write_text(str(os.getpid())); signal.pause()"
    script = f"from examples.quickstart.run import Steps; Steps().run('wait', '-c', {child!r})"
    driver = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (ready.exists() and ready.read_text()):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signal.SIGTERM
    assert b"stopped by SIGTERM during: wait" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)


def test_several_runs_give_mean_and_lowest(tmp_path):
    runs = [
        {"seed": seed, "kernels": "omni", "scores": {"image": image, "word": 1.0}, "training_seconds": 600.4}
        for seed, image in ((7, 0.9), (8, 0.8), (9, 1.0))
    ]
    report = {"runs": runs, **repeat.summary(runs)}
    assert report["mean"] == {"image": 0.9, "word": 1.0} and report["lowest"] == {"image": 0.8, "word": 1.0}
    lines = repeat.table(report).splitlines()
    assert lines[2] == "| seed 7, omni | 0.900 | 1.000 | 600 |"
    assert lines[-3:] == [
        "| **mean** | 0.900 | 1.000 |  |",
        "| **lowest** | 0.800 | 1.000 |  |",
        "| goal | 0.90 | - | 720 |",
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "step time": t}) + "\n" for step, t in ((1, 5.0), (20, 0.5), (40, 0.25)))
    )
    assert repeat.training_seconds(tmp_path) == 5.0 + 19 * 0.5 + 20 * 0.25
