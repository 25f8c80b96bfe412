"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch: every program of
tests/ops/sanitizer/*.cpp is linked with csrc/cpu/*.cpp and run on odd sizes.

    python tests/ops/sanitize.py            # all cases, minutes
    python tests/ops/sanitize.py --quick    # few sizes: what pytest runs

Exit status 0 if every program ends without a report. Objects are kept in build/sanitize.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FLAGS = [
    "-std=c++17",
    "-O0",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "--param=asan-instrumentation-with-call-threshold=0",
]
"""Every access is checked, by a call: compiled in less than half the time of -O1 with the checks in place."""


def compiler() -> list[str]:
    """The C++ compiler: $CXX or c++."""
    return shlex.split(os.environ.get("CXX", "c++"))


def build(program: Path, folder: Path, compile_: list[str]) -> Path:
    """Executable of a program with all CPU kernels, made by a compiler with its flags in a folder of its own; objects
    newer than all of csrc and the program are reused."""
    newest = max(
        path.stat().st_mtime for path in [*CSRC.rglob("*.h"), *CSRC.glob("cpu/*.cpp"), *program.parent.glob("*.h")]
    )
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in [*sorted(CSRC.glob("cpu/*.cpp")), program]:
        target = folder / f"{source.stem}_{source.parent.name}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([*compile_, f"-I{CSRC}", "-c", str(source), "-o", str(target)], check=True)
        objects.append(str(target))
    executable = folder / program.stem
    subprocess.run([*compile_, *objects, "-o", str(executable)], check=True)
    return executable


def run(program: Path, *, quick: bool) -> subprocess.CompletedProcess[str]:
    """Build one program of tests/ops/sanitizer and run it; it goes through every engine that this machine can run."""
    executable = build(program, ROOT / "build" / "sanitize", [*compiler(), *FLAGS])
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(
        [str(executable), *(["--quick"] if quick else [])], env=environment, capture_output=True, text=True
    )


def main() -> int:
    """Run all programs; print what they print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few sizes")
    quick = parser.parse_args().quick
    failed = 0
    for program in sorted((Path(__file__).parent / "sanitizer").glob("*.cpp")):
        result = run(program, quick=quick)
        print(f"{program.name}: exit status {result.returncode}\n{result.stdout}{result.stderr}", flush=True)
        failed += result.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
