"""The CPU kernels on odd sizes under AddressSanitizer, without a report; the long form is tests/ops/sanitize.py."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.ops import sanitize

PROGRAMS = sorted((Path(__file__).parent / "sanitizer").glob("*.cpp"))


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """Skips where the compiler has no sanitizer runtime; shows that a read past the end is reported."""
    folder = tmp_path_factory.mktemp("sanitizer")
    source, program = folder / "overrun.cpp", folder / "overrun"
    source.write_text("int main(int n, char**) { int* p = new int[n]; return p[n]; }\n")
    command = [*sanitize.compiler(), *sanitize.FLAGS, str(source), "-o", str(program)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("the C++ compiler has no AddressSanitizer: install libasan and libubsan")
    overrun = subprocess.run([str(program)], capture_output=True, text=True)
    assert overrun.returncode != 0 and "heap-buffer-overflow" in overrun.stderr  # it would say so


@pytest.mark.parametrize("program", PROGRAMS, ids=[path.stem for path in PROGRAMS])
def test_no_report_and_no_wrong_result(program, sanitizers):
    result = sanitize.run(program, quick=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_kernel_has_a_program():
    """What csrc/kernels.h declares is called by a program of this folder, and so runs here and on emulated Arm."""
    declared = (sanitize.CSRC / "kernels.h").read_text().split("namespace cpu {")[1]
    kernels = re.findall(r"^(?:void|int64_t) (\w+)\(", declared, flags=re.MULTILINE)
    called = set(re.findall(r"\bcpu::(\w+)\(", "".join(path.read_text() for path in PROGRAMS)))
    assert len(kernels) >= 20 and not set(kernels) - called
