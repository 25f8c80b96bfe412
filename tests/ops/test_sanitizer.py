"""CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on odd sizes with buffers exact to the byte.

The kernels see no torch, so each driver in tests/ops/sanitizer/ is a plain program; its first line names the sources of
csrc/cpu it runs. Both paths, and a driver that reads one element too far to show that the sanitizer would say so.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "sanitizer"
CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = os.environ.get("CXX", "c++").split()
FLAGS = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]
DRIVERS = sorted(HERE.glob("*.cpp"))


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory):
    """Whether programs with sanitizers build and run here: some compilers come without their libraries."""
    folder = tmp_path_factory.mktemp("sanitizer")
    source = folder / "overrun.cpp"
    source.write_text("int main(int n, char**) { int* p = new int[n]; return p[n]; }\n")
    built = subprocess.run([*CXX, *FLAGS, str(source), "-o", str(folder / "overrun")], capture_output=True, check=False)
    if shutil.which(CXX[0]) is None or built.returncode != 0:
        pytest.skip("no compiler with AddressSanitizer (Debian: apt-get install g++)")
    ran = subprocess.run([str(folder / "overrun")], capture_output=True, text=True, check=False)
    assert ran.returncode != 0 and "heap-buffer-overflow" in ran.stderr


@pytest.mark.parametrize("driver", DRIVERS, ids=lambda p: p.stem)
def test_no_report_and_both_paths_run(driver, sanitizer, tmp_path):
    first, *_ = driver.read_text().splitlines()
    sources = [str(CSRC / "cpu" / name) for name in first.removeprefix("// sources: ").split()]
    program = tmp_path / driver.stem
    subprocess.run([*CXX, *FLAGS, str(driver), *sources, "-o", str(program)], check=True)
    for path in ("native", "portable"):
        ran = subprocess.run(
            [str(program)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMNI_CPU_KERNELS": path, "ASAN_OPTIONS": "detect_leaks=0"},
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        assert float(ran.stdout) > 0
