"""Everything that a GPU can tell of this project, within minutes: what compiles, what is right, how fast, how much memory.

    python tools/gpu_check.py --out DIR                    # one GPU, nvcc and PyTorch (make gpu-check OUT=DIR)
    python tools/gpu_check.py --out DIR --prebuilt FOLDER  # kernels that were compiled elsewhere: no nvcc, 2 minutes less
    python tools/gpu_check.py --out DIR --dry-run          # every part's CPU twin, here; a minute
    python tools/gpu_check.py --list-wheels                # what must be installed beside PyTorch

Parts, the most important first: csrc is built; tests/ops/test_cuda_ops.py; a bf16 training step of a model of middle
size with the flags of recipes/3_sft.yaml, profiled (host waits counted, kernels named), its memory against the plan's;
the kernels' goals against torch; a decoding step. Each has a limit of time and ends alone. DIR gets gpu_check.md,
gpu_check.json and a log of each part; both files are written again after every part. Exit status: 0 all passed, 1 some
did not, 2 bad input.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_check import prebuilt, report
from benchmarks.gpu_check.parts import MINUTES, PARTS, ROOT, Outcome, Part, run_parts
from megatron_omni.foreign import parse_json

ASK = (
    "import json, torch; from benchmarks.gpu_check.prebuilt import facts_here; there = torch.cuda.is_available(); "
    "print(json.dumps(facts_here() | {'cuda': torch.version.cuda, 'devices': torch.cuda.device_count() if there else 0, "
    "'capability': torch.cuda.get_device_capability() if there else None}))"
)


def ask() -> dict[str, Any]:
    """What torch says of this machine, asked in a process of its own: this one must not hold memory of the GPU."""
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"torch cannot be imported here: {done.stderr.strip().splitlines()[-1]}; install PyTorch first"
        )
    answer: dict[str, Any] = parse_json(done.stdout.splitlines()[-1], where="torch's answer")
    return answer


def check_input(options: argparse.Namespace) -> dict[str, Any]:
    """ValueError for what cannot work; what torch says."""
    if not 0 < options.minutes <= 24 * 60:
        raise ValueError(f"--minutes {options.minutes:g}: must be above 0 and at most a day")
    if options.out is None:
        raise ValueError("--out is missing: give a folder for gpu_check.md and gpu_check.json")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"--out {options.out}: is not an empty folder; give a new one")
    if options.prebuilt is not None and options.dry_run:
        raise ValueError("--prebuilt with --dry-run: compiled kernels need a GPU; leave one of the two out")
    said = ask()
    if not options.dry_run and not said["devices"]:
        raise ValueError(
            f"no GPU: torch {said['torch']} (CUDA {said['cuda'] or 'none'}) finds none; run this on a machine with an NVIDIA "
            "GPU, or give --dry-run for the CPU twins"
        )
    if options.prebuilt is not None:
        here = {name: said[name] for name in ("torch", "python", "machine", "sources")}
        prebuilt.check(options.prebuilt, here, capability=tuple(said["capability"]))
    return said


def parts_of(options: argparse.Namespace) -> list[Part]:
    """All parts; with ``--prebuilt`` the first puts the objects in place."""
    if options.prebuilt is None:
        return list(PARTS)
    install = ("-m", "benchmarks.gpu_check.prebuilt", "install", str(options.prebuilt.absolute()))
    return [Part("build", "the compiled kernels are put in place", 10, install, ()), *PARTS[1:]]


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the report")
    parser.add_argument("--dry-run", action="store_true", help="the CPU twins of all parts")
    parser.add_argument("--list-wheels", action="store_true", help="print name==version of what is needed, and end")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of all parts together (default {MINUTES:g})")
    parser.add_argument(
        "--prebuilt", type=Path, metavar="FOLDER", help="of python -m benchmarks.gpu_check.prebuilt pack"
    )
    options = parser.parse_args(arguments)
    if options.list_wheels:
        from benchmarks.gpu_check.wheels import needed

        print("\n".join(needed()))
        return 0
    try:
        said = check_input(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a part ends with this program
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "dry_run": options.dry_run,
        "minutes": options.minutes,
        **report.machine(),
        "torch": said["torch"],
        "cuda": said["cuda"],
        "prebuilt": options.prebuilt is not None,
    }
    known: list[Outcome] = []

    def say(outcome: Outcome) -> None:
        known.append(outcome)
        report.write(options.out, facts, known)
        cause = f": {outcome.cause}" if outcome.cause else ""
        print(f"{outcome.name:8} {outcome.status:9} {outcome.seconds:5.0f} s{cause}", flush=True)

    outcomes = run_parts(parts_of(options), options.out, dry_run=options.dry_run, minutes=options.minutes, say=say)
    print(f"report: {options.out / report.PAGE}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
