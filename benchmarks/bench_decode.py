"""Decoders on the same clips: frames, seconds of sound and pictures for each second of processor time, on one thread.

    python -m benchmarks.bench_decode [--rounds 5] [--seconds 10] [--only video|sound|pictures] [--size 640x360]

    cpu          data.decoder = cpu as training calls it (PyAV, soundfile, Pillow; sampling, times and checks included)
    dali         data.decoder = dali likewise; a dash where DALI cannot and the CPU would take over
    PyAV         every frame in turn to RGB, nothing else
    torchcodec   where it is installed (it needs FFmpeg's shared libraries)

Sparse means 1 frame a second of the same clip; the figure counts frames of the clip, not frames taken, so it says how
much video is consumed. Contenders take turns; the figure is the best round. On a GPU, DALI's figure is wall time.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse, make the clips, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the clips, 25 frames a second")
    parser.add_argument("--size", default="640x360", help="of the clips")
    parser.add_argument("--only", choices=("video", "sound", "pictures"))
    options = parser.parse_args(arguments)
    wanted = [options.only] if options.only else ["video", "sound", "pictures"]
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), options.rounds)
        if "video" in wanted:
            width, height = map(int, options.size.split("x"))
            bench.video(options.seconds, (width, height))
        if "sound" in wanted:
            bench.sound(options.seconds)
        if "pictures" in wanted:
            bench.pictures()
    return 0


class _Bench:
    def __init__(self, folder: Path, rounds: int) -> None:
        import torch

        from megatron_omni.data.decode import cpu, open_decoder

        torch.set_num_threads(1)
        self.folder, self.rounds, self.cpu = folder, rounds, cpu
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

    def video(self, seconds: float, size: tuple[int, int]) -> None:
        """All frames, and one a second."""
        import av

        from megatron_omni.data.decode.media import FrameSampling
        from tests.unit.media_files import tone, write_scenes

        count = round(25 * seconds)
        limits = dict(min_frames=1, max_frames=10**6, max_frames_with_audio=10**6, sound=False)
        whole, sparse = FrameSampling(fps=25.0, **limits), FrameSampling(fps=1.0, **limits)

        def plain(path: Path) -> None:
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                for frame in container.decode(video=0):
                    frame.reformat(format="rgb24", threads=1).to_ndarray()

        def codec(path: Path, step: int) -> None:
            self.torchcodec.VideoDecoder(str(path), num_ffmpeg_threads=1)[::step]

        rows = []
        for name, encoder, extra in (
            ("h264.mp4", "libx264", {"g": "250"}),
            ("vp9.webm", "libvpx-vp9", {"g": "128", "deadline": "realtime", "cpu-used": "8"}),
            ("mpeg4.mp4", "mpeg4", {"bf": "2"}),
            ("mjpeg.mov", "mjpeg", {}),
        ):
            path = write_scenes(
                self.folder / name, codec=encoder, num_frames=count, rate=25, size=size, options=extra,
                sound=tone(seconds, rate=48000) if name != "mjpeg.mov" else None,
            )  # fmt: skip
            for label, sampling, step in (("all", whole, 1), ("sparse", sparse, 25)):
                runs: dict[str, Callable[[], object] | None] = {
                    "cpu": lambda p=path, s=sampling: self.cpu.decode_video(p, sampling=s),
                    "dali": self._dali(lambda p=path, s=sampling: self.dali.decode_video(p, sampling=s)),
                    "PyAV": (lambda p=path: plain(p)) if step == 1 else None,
                    "torchcodec": (lambda p=path, n=step: codec(p, n)) if self.torchcodec else None,
                }
                rows.append((f"{name}, {label}", self._rates(runs, count)))
        self._table(f"frames of the clip a processor second, {size[0]} x {size[1]}, {count} frames", rows)

    def sound(self, seconds: float) -> None:
        """To 16 kHz mono."""
        import numpy as np
        import soundfile

        from tests.unit.media_files import tone, write_scenes

        wave = np.stack([tone(seconds, rate=44100), tone(seconds, rate=44100, hertz=700)], axis=1)
        wave += np.random.default_rng(0).normal(scale=0.01, size=wave.shape).astype(np.float32)
        rows = []
        for name in ("a.wav", "a.flac", "a.ogg", "a.mp3", "aac.mp4"):
            path = self.folder / name
            if path.suffix == ".mp4":
                write_scenes(path, codec="libx264", num_frames=2, sound=tone(seconds, rate=48000))
            else:
                soundfile.write(path, wave, 44100)

            def codec(p: Path) -> None:
                self.torchcodec.AudioDecoder(str(p), sample_rate=16000, num_channels=1).get_all_samples()

            runs: dict[str, Callable[[], object] | None] = {
                "cpu": lambda p=path: self.cpu.decode_audio(p),
                "dali": self._dali(lambda p=path: self.dali.decode_audio(p)),
                "torchcodec": (lambda p=path: codec(p)) if self.torchcodec else None,
            }
            rows.append((name, self._rates(runs, seconds)))
        self._table(f"seconds of sound a processor second, {seconds:g} s, 44.1 kHz stereo (AAC: 48 kHz mono)", rows)

    def pictures(self) -> None:
        """Files to RGB."""
        from PIL import Image

        from tests.unit.media_files import scene

        rows = []
        for name, size in (
            ("a.jpg", (1280, 720)),
            ("a.png", (1280, 720)),
            ("a.webp", (1280, 720)),
            ("b.png", (64, 64)),
        ):
            path = self.folder / name
            Image.fromarray(scene(*size)).save(path)
            data = path.read_bytes()
            runs: dict[str, Callable[[], object] | None] = {
                "cpu": lambda p=path: self.cpu.decode_image(p),
                "dali": self._dali(lambda p=path: self.dali.decode_image(p)),
                "Pillow": lambda d=data: Image.open(io.BytesIO(d)).convert("RGB"),
            }
            rows.append((f"{name}, {size[0]} x {size[1]}", self._rates(runs, 1)))
        self._table("pictures a processor second", rows)

    def _dali(self, run: Callable[[], object]) -> Callable[[], object] | None:
        """None where DALI is missing or hands this file to the CPU."""
        if self.dali is None:
            return None
        before = self.dali.fallbacks.total()
        run()
        return run if self.dali.fallbacks.total() == before else None

    def _rates(self, runs: dict[str, Callable[[], object] | None], amount: float) -> dict[str, float | None]:
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
    def _table(title: str, rows: list[tuple[str, dict[str, float | None]]]) -> None:
        names = list(rows[0][1])
        print(f"\n{title}\n\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for label, rates in rows:
            cells = ("-" if rates[name] is None else f"{rates[name]:.0f}" for name in names)
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
