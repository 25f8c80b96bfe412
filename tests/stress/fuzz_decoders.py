"""Damage media files at random and decode them: every one must be a result or a MediaError, soon and in little memory.

    python -m tests.stress.fuzz_decoders [--trials 1000] [--decoder cpu|dali] [--only NAME] [--keep DIR]

For each kind of file, trial i damages it as seed i says (bits flipped, cut off, parts dropped, doubled, zeroed or
overwritten) and decodes it and its header in a child process, which a crash in a codec library ends and a hang gets
killed. Prints a line a kind (refused, decoded, failures) and one for each failure with its seed; exit status 1 if there
was any. ``--keep`` writes the files that failed.
"""

import argparse
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_omni.data.decode import Decoder, cpu, open_decoder
from megatron_omni.data.decode.media import FrameSampling, Media, MediaBytes, MediaError
from tests.unit.media_files import write_pictures, write_sounds, write_videos

HANG_SECONDS = 60.0
MEMORY_BYTES = 512 << 20
"""A trial may grow the memory in use by this. What is reserved and never touched costs nothing: FFmpeg reserves tables
as long as a header says and reads until the file ends."""
SOUND_SECONDS = 600.0
SAMPLING = FrameSampling(fps=2.0, min_frames=1, max_frames=8, max_frames_with_audio=8, sound=True)


@dataclass(frozen=True)
class Case:
    """A good file and what reads files of its kind."""

    name: str
    data: bytes
    readers: tuple[Callable[[Media], object], ...]


def make_cases(folder: Path, decoder: Decoder) -> list[Case]:
    """One case for each kind of file, small ones."""

    def video(file: Media) -> object:
        return decoder.decode_video(file, sampling=SAMPLING, max_sound_seconds=SOUND_SECONDS)

    def sound(file: Media) -> object:
        return decoder.decode_audio(file, max_seconds=SOUND_SECONDS)

    def sound_header(file: Media) -> object:
        return cpu.probe_audio(file, max_seconds=SOUND_SECONDS)

    pictures = [p for p in write_pictures(folder) if p.name != "large.jpg"]
    return [
        *(Case(p.name, p.read_bytes(), (decoder.decode_image, cpu.probe_image)) for p in pictures),
        *(Case(p.name, p.read_bytes(), (sound, sound_header)) for p in write_sounds(folder)),
        *(Case(p.name, p.read_bytes(), (video, cpu.read_video_header)) for p in write_videos(folder)),
    ]


def damaged(data: bytes, seed: int) -> bytes:
    """The file with 1 to 4 kinds of damage; headers, which stand at the start, are hit more often."""
    rng, out = np.random.default_rng(seed), bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not out:
            break
        reach = len(out) if rng.random() < 0.5 else min(len(out), 512)
        start = int(rng.integers(reach))
        stop = min(len(out), start + int(rng.integers(1, 64)))
        match rng.integers(6):
            case 0:
                for place in rng.integers(0, reach, 8):
                    out[place] ^= 1 << int(rng.integers(8))
            case 1:
                del out[max(1, int(rng.integers(len(out)))) :]
            case 2:
                del out[start:stop]
            case 3:
                out[start:start] = out[start:stop]
            case 4:
                out[start:stop] = bytes(stop - start)
            case 5:
                out[start:stop] = rng.choice([b"\xff", b"\x7f", b"\x80"]) * (stop - start)
    return bytes(out)


def outcome(case: Case, seed: int, folder: Path) -> str:
    """``decoded`` or ``refused``; any other exception is the caller's to report. By path and as bytes in turn."""
    data, said = damaged(case.data, seed), "decoded"
    file: Media = MediaBytes(case.name, data)
    if seed % 2:
        file = folder / f"damaged_{case.name}"
        file.write_bytes(data)
    for reader in case.readers:
        try:
            reader(file)
        except MediaError:
            said = "refused"
    return said


def run_trials(case: Case, trials: range, folder: Path) -> tuple[Counter[str], dict[int, str]]:
    """Outcomes, and what went wrong by seed. A child does the work and says before each trial which one it begins."""
    counts: Counter[str] = Counter()
    failures: dict[int, str] = {}
    at = trials.start
    while at < trials.stop:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            _work(case, range(at, trials.stop), folder, writer)
        os.close(writer)
        seen = b""
        while select.select([reader], [], [], HANG_SECONDS)[0]:
            part = os.read(reader, 1 << 16)
            if not part:
                break
            seen += part
        else:
            os.kill(child, signal.SIGKILL)
        os.close(reader)
        status = os.waitpid(child, 0)[1]
        lines = seen.decode(errors="replace").splitlines()
        for line in lines:
            if line[0] == "!":
                failures[int(line[1:].split(" ", 1)[0])] = line.split(" ", 1)[1]
            elif line[0] != "?":
                counts[line] += 1
        begun = [int(line[1:]) for line in lines if line[0] == "?"]
        at = begun[-1] + 1 if begun else trials.stop
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            failures[at - 1] = f"hangs for {HANG_SECONDS:g} s" if name == "SIGKILL" else f"dies by {name}"
        elif os.WEXITSTATUS(status):
            failures[at - 1] = f"ends with status {os.WEXITSTATUS(status)}"
    return counts, failures


def _work(case: Case, trials: range, folder: Path, writer: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # codec libraries complain at length
    peak = _peak_bytes()
    for seed in trials:
        os.write(writer, f"?{seed}\n".encode())
        try:
            said = outcome(case, seed, folder)
        except BaseException as error:
            said = f"!{seed} {type(error).__name__}: {str(error)[:300]}".replace("\n", " ")
        grown, peak = _peak_bytes() - peak, _peak_bytes()
        if grown > MEMORY_BYTES:
            said = f"!{seed} takes {grown >> 20} MB"
        os.write(writer, f"{said}\n".encode())
    os._exit(0)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
    """Run the trials of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="for each kind of file")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--decoder", choices=("cpu", "dali"), default="cpu")
    parser.add_argument("--only", default="", help="kinds of file whose name contains this")
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in make_cases(folder, open_decoder(args.decoder)):
            if args.only not in case.name:
                continue
            start = time.monotonic()
            counts, failures = run_trials(case, range(args.first, args.first + args.trials), folder)
            print(
                f"{case.name:20s} refused {counts['refused']:5d}  decoded {counts['decoded']:5d}  "
                f"failures {len(failures):3d}  ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
            for seed, problem in failures.items():
                print(f"    seed {seed}: {problem}", flush=True)
                if args.keep:
                    args.keep.mkdir(parents=True, exist_ok=True)
                    (args.keep / f"{seed}_{case.name}").write_bytes(damaged(case.data, seed))
            failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
