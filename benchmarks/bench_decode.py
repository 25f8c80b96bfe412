"""Decoders on the same clips: frames, seconds of sound and pictures for each second of processor time, on one thread.

    python -m benchmarks.bench_decode [--rounds 5] [--seconds 10] [--only video|sound|pictures] [--size 640x360]
    python -m benchmarks.bench_decode --files DIR more.mp4          # your own files instead of clips made here

    cpu          data.decoder = cpu as training calls it (PyAV, soundfile, Pillow; sampling, times and checks included)
    dali         data.decoder = dali likewise; a dash where DALI cannot and the CPU would take over
    PyAV         every frame in turn to RGB, nothing else
    torchcodec   where it is installed (it needs FFmpeg's shared libraries)

Sparse means 1 frame a second of the same clip; the figure counts frames of the clip, not frames taken, so it says how
much video is consumed. Contenders take turns; the figure is the best round. On a GPU, DALI's figure is wall time. The last
column is how far dali's result is from cpu's: mean difference of 8-bit colours, largest difference of sound in [-1, 1].
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Runs = dict[str, Callable[[], object] | None]
Row = tuple[str, dict[str, float | None], float | None]
"""What was decoded, amounts a second by contender, difference between dali and cpu."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, make or find the clips, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the clips, 25 frames a second")
    parser.add_argument("--size", default="640x360", help="of the clips")
    parser.add_argument("--only", choices=("video", "sound", "pictures"))
    parser.add_argument("--files", type=Path, nargs="+", help="files, or folders with files, to decode")
    options = parser.parse_args(arguments)
    wanted = [options.only] if options.only else ["video", "sound", "pictures"]
    with tempfile.TemporaryDirectory() as folder:
        found = _found(options.files) if options.files else None
        width, height = map(int, options.size.split("x"))
        made = {
            "video": lambda: _clips(Path(folder), options.seconds, (width, height)),
            "sound": lambda: _sounds(Path(folder), options.seconds),
            "pictures": lambda: _pictures(Path(folder)),
        }
        bench = _Bench(options.rounds)
        for kind in wanted:
            files = made[kind]() if found is None else found[kind]
            if files:
                getattr(bench, kind)(files)
    return 0


def _found(places: Sequence[Path]) -> dict[str, list[Path]]:
    """Media among files and in folders, by kind."""
    from megatron_omni.data.assemble import media_kind

    files = [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    names = {"video": "video", "audio": "sound", "image": "pictures"}
    found: dict[str, list[Path]] = {name: [] for name in names.values()}
    for file in files:
        if file.is_file() and (kind := media_kind(file.suffix)) is not None:
            found[names[kind]].append(file)
    return found


def _clips(folder: Path, seconds: float, size: tuple[int, int]) -> list[Path]:
    from tests.unit.media_files import tone, write_scenes

    codecs = {
        "h264.mp4": ("libx264", {"g": "250"}),
        "vp9.webm": ("libvpx-vp9", {"g": "128", "deadline": "realtime", "cpu-used": "8"}),
        "mpeg4.mp4": ("mpeg4", {"bf": "2"}),
        "mjpeg.mov": ("mjpeg", {}),
    }
    return [
        write_scenes(
            folder / name, codec=codec, num_frames=round(25 * seconds), rate=25, size=size, options=extra,
            sound=tone(seconds, rate=48000) if name != "mjpeg.mov" else None,
        )
        for name, (codec, extra) in codecs.items()
    ]  # fmt: skip


def _sounds(folder: Path, seconds: float) -> list[Path]:
    """44.1 kHz stereo; AAC 48 kHz mono."""
    import numpy as np
    import soundfile

    from tests.unit.media_files import tone, write_scenes

    wave = np.stack([tone(seconds, rate=44100), tone(seconds, rate=44100, hertz=700)], axis=1)
    wave += np.random.default_rng(0).normal(scale=0.01, size=wave.shape).astype(np.float32)
    files = [folder / name for name in ("a.wav", "a.flac", "a.ogg", "a.mp3")]
    for file in files:
        soundfile.write(file, wave, 44100)
    sound = tone(seconds, rate=48000)
    return [*files, write_scenes(folder / "aac.mp4", codec="libx264", num_frames=2, sound=sound)]


def _pictures(folder: Path) -> list[Path]:
    from PIL import Image

    from tests.unit.media_files import scene

    sizes = {"a.jpg": (1280, 720), "a.png": (1280, 720), "a.webp": (1280, 720), "b.png": (64, 64)}
    for name, size in sizes.items():
        Image.fromarray(scene(*size)).save(folder / name)
    return [folder / name for name in sizes]


class _Bench:
    def __init__(self, rounds: int) -> None:
        import torch

        from megatron_omni.data.decode import cpu, open_decoder

        torch.set_num_threads(1)
        self.rounds, self.cpu = rounds, cpu
        try:
            self.dali = open_decoder("dali")
        except ValueError as error:
            print(error)
            self.dali = None
        try:
            import torchcodec.decoders

            self.torchcodec = torchcodec.decoders
        except (ImportError, RuntimeError, OSError) as error:
            print(f"torchcodec: {str(error).splitlines()[0]}")
            self.torchcodec = None

    def video(self, files: Sequence[Path]) -> None:
        """All frames, and one a second."""
        import av
        import numpy as np

        from megatron_omni.data.decode.media import FrameSampling

        def plain(path: Path) -> None:
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                for frame in container.decode(video=0):
                    frame.reformat(format="rgb24", threads=1).to_ndarray()

        def codec(path: Path, step: int) -> None:
            self.torchcodec.VideoDecoder(str(path), num_ffmpeg_threads=1)[::step]

        def difference(one: object, other: object) -> float:
            pairs = zip(one.frames, other.frames, strict=True)  # type: ignore[attr-defined]
            return float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in pairs]))

        rows = []
        for path in files:
            header = self.cpu.read_video_header(path)
            rate = header.num_frames / max(header.seconds, 1e-3)
            label = f"{path.name}, {header.width} x {header.height}, {header.num_frames} frames"
            limits = dict(min_frames=1, max_frames=10**6, max_frames_with_audio=10**6, sound=False)
            for name, fps, step in (("all", rate, 1), ("sparse", 1.0, max(1, round(rate)))):
                sampling = FrameSampling(fps=fps, **limits)
                ours = lambda p=path, s=sampling: self.cpu.decode_video(p, sampling=s)  # noqa: E731
                dali, apart = self._dali(
                    ours, lambda p=path, s=sampling: self.dali.decode_video(p, sampling=s), difference
                )
                runs: Runs = {
                    "cpu": ours,
                    "dali": dali,
                    "PyAV": (lambda p=path: plain(p)) if step == 1 else None,
                    "torchcodec": (lambda p=path, n=step: codec(p, n)) if self.torchcodec else None,
                }
                rows.append((f"{label}, {name}", self._rates(runs, header.num_frames), apart))
        self._table("frames of the clip a processor second", rows)

    def sound(self, files: Sequence[Path]) -> None:
        """To 16 kHz mono."""
        import numpy as np

        def codec(p: Path) -> None:
            self.torchcodec.AudioDecoder(str(p), sample_rate=16000, num_channels=1).get_all_samples()

        rows = []
        for path in files:
            ours = lambda p=path: self.cpu.decode_audio(p)  # noqa: E731
            dali, apart = self._dali(
                ours, lambda p=path: self.dali.decode_audio(p), lambda a, b: float(np.abs(a - b).max())
            )
            runs: Runs = {
                "cpu": ours,
                "dali": dali,
                "torchcodec": (lambda p=path: codec(p)) if self.torchcodec else None,
            }
            seconds = len(ours()) / 16000
            rows.append((f"{path.name}, {seconds:.1f} s", self._rates(runs, seconds), apart))
        self._table("seconds of sound a processor second", rows)

    def pictures(self, files: Sequence[Path]) -> None:
        """Files to RGB."""
        import numpy as np
        from PIL import Image

        rows = []
        for path in files:
            data = path.read_bytes()
            ours = lambda p=path: self.cpu.decode_image(p)  # noqa: E731
            dali, apart = self._dali(
                ours, lambda p=path: self.dali.decode_image(p),
                lambda a, b: float(np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean()),
            )  # fmt: skip
            runs: Runs = {
                "cpu": ours,
                "dali": dali,
                "Pillow": lambda d=data: Image.open(io.BytesIO(d)).convert("RGB"),
            }
            width, height = self.cpu.probe_image(path)
            rows.append((f"{path.name}, {width} x {height}", self._rates(runs, 1), apart))
        self._table("pictures a processor second", rows)

    def _dali[T](
        self, ours: Callable[[], T], run: Callable[[], T], difference: Callable[[T, T], float]
    ) -> tuple[Callable[[], T] | None, float | None]:
        """None where DALI is missing or hands this file to the CPU; else how far its result is from ours."""
        if self.dali is None:
            return None, None
        before = sum(self.dali.fallbacks.values())
        theirs = run()
        if sum(self.dali.fallbacks.values()) != before:
            return None, None
        return run, difference(ours(), theirs)

    def _rates(self, runs: Runs, amount: float) -> dict[str, float | None]:
        clock = time.perf_counter if self.dali is not None and self.dali.device == "gpu" else time.process_time
        best: dict[str, float] = {}
        for _ in range(self.rounds + 1):  # the first round warms up, and may only be the best if it is
            for name, run in runs.items():
                if run is not None:
                    start = clock()
                    run()
                    best[name] = min(best.get(name, 1e9), clock() - start)
        return {name: amount / best[name] if name in best else None for name in runs}

    @staticmethod
    def _table(title: str, rows: list[Row]) -> None:
        names = list(rows[0][1])
        print(f"\n{title}\n\n| | {' | '.join(names)} | dali - cpu |\n|---|{'---|' * (len(names) + 1)}")
        for label, rates, apart in rows:
            cells = ["-" if rates[name] is None else f"{rates[name]:.0f}" for name in names]
            cells.append("-" if apart is None else f"{apart:.2g}")
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
