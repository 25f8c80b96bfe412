"""Our torchrun: ranks hear of a stop signal, and the end is one line and a status instead of a traceback."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import os, pathlib, signal, sys, time
place, status = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rank = os.environ["RANK"]
names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF")
(place / f"environment{rank}").write_text(" ".join(os.environ.get(name, "-") for name in names))
if status:
    sys.exit(status)
def stop(number, frame):
    (place / f"heard{rank}").write_text(str(number))
    sys.exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
(place / f"ready{rank}").touch()
time.sleep(600)
"""


def start(place: Path, status: int) -> subprocess.Popen[str]:
    """Two ranks that wait for a signal, or leave with ``status`` at once."""
    (place / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "megatron_omni.platform.torchrun", "--standalone", "--nproc-per-node", "2"]
    command += [str(place / "rank.py"), str(place), str(status)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_usr1_reaches_the_ranks_and_ends_it_without_a_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, 0)
    end = time.monotonic() + 300
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert time.monotonic() < end and process.poll() is None, "the ranks did not start"
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGUSR1
    assert {(tmp_path / f"heard{rank}").read_text() for rank in range(2)} == {str(int(signal.SIGUSR1))}
    assert "stopped by SIGUSR1" in said and "Traceback" not in said
    environments = {(tmp_path / f"environment{rank}").read_text() for rank in range(2)}
    assert environments == {"1 expandable_segments:True"}, "what overlapping messages on CUDA ask for"


@pytest.mark.parametrize(("status", "expected", "is_reported"), [(75, 75, False), (3, 1, True)])
def test_ranks_that_ask_to_be_started_again_are_no_failure(
    tmp_path: Path, status: int, expected: int, is_reported: bool
) -> None:
    process = start(tmp_path, status)
    _, said = process.communicate(timeout=300)
    assert process.returncode == expected
    assert ("ChildFailedError" in said) == is_reported
