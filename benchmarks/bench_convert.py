"""Time and peak memory of import, upcycling and export, against a plain copy of the same bytes on the same disk.

python -m benchmarks.bench_convert --dir DISK [--layers 28] [--steps import,export,upcycle] [--rounds 1]
python -m benchmarks.bench_convert --dir DISK --steps import,export,upcycle --largest      # as many layers as the disk has room for

Each step is a process of its own (the command that users type), its peak memory is what the kernel counted for it. Before
every timed step and copy the files it reads are dropped from the page cache, and both end with their output on disk
(fsync). A copy of the sources is timed before and after a step; the ratio is the step's time over the time that a copy at
their mean rate takes for the bytes that the step writes. Processor seconds tell a busy machine from slow code.
The four dense models of an upcycling are one on the disk under four names: each is read, compared and hashed for itself,
three of them from the page cache where it holds them. What fits the disk is computed and said before anything is written.
DISK/bench_convert is removed afterwards, by Ctrl-C and SIGTERM too; what a killed run left there, by the next one. Exit
status 1 if a step needed more than 3 GiB, 2 if nothing fits.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.make_checkpoint import make, shape_of_7b
from megatron_omni.checkpoint.names import Row, expand, qwen2_rows
from megatron_omni.checkpoint.uni_moe import uni_moe_rows
from megatron_omni.checkpoint.upcycle_shape import upcycled_model

ROOT = Path(__file__).resolve().parents[1]
LIMIT_GIB = 3.0
MARGIN_BYTES = 2 << 30


def weights(directory: Path) -> list[Path]:
    """Files with weights below ``directory``."""
    return sorted(p for p in directory.rglob("*") if p.suffix in (".safetensors", ".distcp"))


def size_of(directory: Path) -> int:
    """Bytes in them."""
    return sum(path.stat().st_size for path in weights(directory))


def evict(directory: Path) -> None:
    """Drop the files from the page cache."""
    for path in weights(directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_rate(source: Path, target: Path) -> float:
    """Bytes/s of a plain copy that ends on the disk."""
    evict(source)
    target.mkdir()
    start = time.perf_counter()
    for path in weights(source):
        copied = shutil.copyfile(path, target / path.name)
        descriptor = os.open(copied, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return size_of(source) / seconds


def run(arguments: list[str | Path]) -> tuple[float, float, float]:
    """(seconds, seconds of processor, peak GiB) of a tool; a failure ends the benchmark, the benchmark's end the tool."""
    start = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, *map(str, arguments)], dict(os.environ))
    try:
        _, status, usage = os.wait4(process, 0)
    except BaseException:
        os.kill(process, signal.SIGTERM)
        os.waitpid(process, 0)
        raise
    if status != 0:
        raise SystemExit(f"{' '.join(map(str, arguments))}: status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def measure(name: str, source: Path, arguments: list[str | Path], out: Path, spare: Path, *, keep: bool) -> float:
    """One step and its two copies, as a row of the table; ``keep`` the output, which a later step reads. Peak GiB."""
    before = copy_rate(source, spare)
    evict(source)
    seconds, busy, peak = run(arguments)
    written = size_of(out)
    if not keep:
        shutil.rmtree(out)
    after = copy_rate(source, spare)
    copying = written / ((before + after) / 2)
    print(
        f"| {name} | {size_of(source) / 1e9:.1f} | {written / 1e9:.1f} | {seconds:.0f} | {busy:.0f} | {copying:.0f} "
        f"({before / 1e6:.0f}, {after / 1e6:.0f} MB/s) | {seconds / copying:.2f} | {peak:.2f} |",
        flush=True,
    )
    return peak


def needed_bytes(layers: int, scale: int, steps: Sequence[str]) -> int:
    """Disk that the hungriest step needs: sources, what it reads and writes, or the copy that it is timed against."""
    dense = shape_of_7b(layers=layers, scale=scale)
    read = 2 * count(qwen2_rows(dense))
    mixture = 2 * count(uni_moe_rows(upcycled_model(dense, num_experts=4)))
    sizes = {"import": 3 * read, "export": 3 * read, "upcycle": read + mixture, "export-moe": read + 2 * mixture}
    return max(sizes[step] for step in steps) + MARGIN_BYTES


def count(rows: Sequence[Row]) -> int:
    """Parameters of ``rows``."""
    return sum(math.prod(shape) for entry in expand(rows) for shape in entry.shapes)


def link(source: Path, target: Path) -> Path:
    """``source`` under another name: its files are there once."""
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)
    return target


def main() -> int:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="directory on the disk to measure")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument(
        "--largest", action="store_true", help="as many layers, up to --layers, as the disk has room for"
    )
    parser.add_argument("--scale", type=int, default=1, help="divide every width, for a trial run")
    parser.add_argument("--steps", default="import,export,upcycle")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ep", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    place = options.dir / "bench_convert"
    shutil.rmtree(place, ignore_errors=True)
    options.dir.mkdir(parents=True, exist_ok=True)
    steps = options.steps.split(",")
    free, layers = shutil.disk_usage(options.dir).free, options.layers
    fits = max((n for n in range(1, layers + 1) if needed_bytes(n, options.scale, steps) <= free), default=0)
    needed = needed_bytes(max(1, fits), options.scale, steps) / 1e9
    print(f"{free / 1e9:.0f} GB free: {fits} of {layers} layers fit for {options.steps} ({needed:.0f} GB)", flush=True)
    if options.largest:
        layers = fits
    if layers > fits or layers == 0:
        print(f"--layers {layers}: does not fit; free the disk or give --largest", file=sys.stderr)
        return 2
    hf, ours, back, moe, spare = (place / name for name in ("hf", "ours", "back", "moe", "spare"))
    convert, upcycle = ROOT / "tools" / "convert.py", ROOT / "tools" / "upcycle.py"
    try:
        place.mkdir()
        print(f"{layers} layers", flush=True)
        make(hf, shape_of_7b(layers=layers, scale=options.scale), shards=4, seed=0)
        vision, speech, other = (link(hf, place / name) for name in ("vision", "speech", "other"))
        print(
            "| step | reads GB | writes GB | s | processor s | plain copy s | ratio | peak GiB |\n|---|---|---|---|---|---|---|---|"
        )
        dense: list[str | Path] = ["--base", hf, "--vision", vision, "--speech", speech, other]
        commands: dict[str, tuple[Path, list[str | Path], Path]] = {
            "import": (hf, [convert, "import", "--hf", hf, "--out", ours, "--tp", str(options.tp)], ours),
            "export": (ours, [convert, "export", "--checkpoint", ours, "--out", back], back),
            "upcycle": (hf, [upcycle, *dense, "--out", moe, "--ep", str(options.ep)], moe),
            "export-moe": (moe, [convert, "export", "--checkpoint", moe, "--out", back], back),
        }
        needs = {"import": "export", "upcycle": "export-moe"}
        highest = 0.0
        for _ in range(options.rounds):
            for name in steps:
                source, command, out = commands[name]
                shutil.rmtree(out, ignore_errors=True)
                if name == "upcycle":
                    shutil.rmtree(ours, ignore_errors=True)
                peak = measure(name, source, command, out, spare, keep=needs.get(name) in steps)
                highest = max(highest, peak)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if highest > LIMIT_GIB:
        print(f"peak memory above {LIMIT_GIB} GiB", file=sys.stderr)
    return int(highest > LIMIT_GIB)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
