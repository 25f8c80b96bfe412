"""The CPU kernels on Arm: the programs of tests/ops/sanitizer, which compare every kernel with float64 on odd sizes,
compiled for AArch64 and run by an emulator, on the engine ``neon`` and in plain C++. Nothing here says how fast they are.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ops import sanitize

PROGRAMS = sorted((Path(__file__).parent / "sanitizer").glob("*.cpp"))
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"{COMPILER} and {EMULATOR} are not here: apt-get install g++-aarch64-linux-gnu qemu-user",
)
@pytest.mark.parametrize("program", PROGRAMS, ids=[path.stem for path in PROGRAMS])
def test_no_wrong_result(program):
    compiler = [COMPILER, "-std=c++17", "-O1", "-static"]
    executable = sanitize.build(program, sanitize.ROOT / "build" / "aarch64", compiler)
    result = subprocess.run([EMULATOR, str(executable), "--quick"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "engines neon, portable: " in result.stdout and result.stdout.endswith(" 0 wrong\n")
