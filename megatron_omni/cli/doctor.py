"""Is this machine fit for training? One line a check: ``ok``, ``warn`` (works, with a loss that is named) or ``FAIL``.

    megatron-omni doctor [--dir runs]             # this machine: packages, kernels, decoders, GPUs, disk, clock
    torchrun ... -m megatron_omni.cli.doctor --ranks # the ranks of a job: reach each other, clocks agree, the slowest

Exit status 0 unless a check failed. examples/slurm/preflight.sbatch runs both on the nodes of a job.
"""

import argparse
import importlib
import importlib.metadata
import io
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

OK, WARN, FAIL = "ok", "warn", "FAIL"
Finding = tuple[str, str]
PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "omegaconf",
    "av",
    "soundfile",
    "pillow",
    "psutil",
    "tensorboard",
)
FREE_GIB = 50.0
"""Less free disk than this is worth a warning: a checkpoint of the 7B model with its optimizer takes 400 GB."""
SLOW_DISK = 0.1
"""GB/s below which writing a checkpoint is worth a warning."""
CLOCK_SECONDS = 1.0
"""Difference between the clocks of two machines that is worth a warning."""


def check_python() -> Iterator[Finding]:
    """Version and host."""
    good = sys.version_info >= (3, 12)
    yield (
        OK if good else FAIL,
        f"Python {platform.python_version()} on {socket.gethostname()}" + ("" if good else ": 3.12 or newer is needed"),
    )


def check_packages() -> Iterator[Finding]:
    """Everything that pyproject.toml requires imports, with its version."""
    modules = {"megatron-core": "megatron.core", "pillow": "PIL"}
    from megatron_omni.platform.device import install

    install()
    found = []
    for package in PACKAGES:
        try:
            importlib.import_module(modules.get(package, package))
            found.append(f"{package} {importlib.metadata.version(package)}")
        except Exception as error:  # a broken binary package fails in its own way
            yield FAIL, f"{package} does not import ({type(error).__name__}: {error}); pip install -e ."
    yield OK, "imports: " + ", ".join(found)


def processor_name() -> str:
    """The CPU as the kernel of the operating system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or 'unnamed')} ({platform.machine()})"


def check_kernels() -> Iterator[Finding]:
    """The compiled extension loads with this torch: the same ABI."""
    import torch

    from megatron_omni.ops import extension
    from megatron_omni.platform.device import accelerator_present
    from megatron_omni.platform.environment import main_memory_bytes

    if extension.CPU_ERROR is not None:
        yield FAIL, extension.CPU_ERROR
        return
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("megatron_omni::")}
    yield OK, f"kernels: compiled extension loads with torch {torch.__version__} ({len(names)} ops)"
    engine, can_run = extension.cpu_engine(), ", ".join(extension.cpu_engines())
    memory = f"{main_memory_bytes() / 2**30:.0f} GiB"
    yield OK, f"processor: {processor_name()}, {os.cpu_count()} threads, {memory}; engines: {can_run}"
    if extension.cpu_engine_is_forced():
        yield OK, f"kernels: the CPU side runs on {engine} (OMNI_CPU_KERNELS)"
    elif engine not in extension.MEASURED_ENGINES:
        yield WARN, "kernels: none of ours was timed on such a processor; model.moe.kernels=omni is torch's products"
    else:
        yield OK, f"kernels: the CPU side runs on {engine}"
    if extension.CUDA_ERROR is None:
        yield OK, "kernels: CUDA side loads"
    else:
        yield WARN if accelerator_present() else OK, f"kernels: no CUDA side ({extension.CUDA_ERROR})"


def check_decoders() -> Iterator[Finding]:
    """Pictures, sound and video can be decoded: tiny ones are made and read back."""
    import av
    import numpy
    import soundfile
    from PIL import Image

    for form in ("PNG", "JPEG", "WEBP"):
        data = io.BytesIO()
        try:
            Image.new("RGB", (8, 8), "red").save(data, form)
            assert Image.open(io.BytesIO(data.getvalue())).convert("RGB").size == (8, 8)
        except Exception as error:
            yield FAIL, f"decoder: {form} does not work ({error})"
    for form in ("WAV", "FLAC", "OGG"):
        data = io.BytesIO()
        try:
            soundfile.write(data, numpy.zeros(1600, numpy.float32), 16_000, format=form)
            assert len(soundfile.read(io.BytesIO(data.getvalue()))[0]) == 1600
        except Exception as error:
            yield FAIL, f"decoder: {form} does not work ({error})"
    missing = [name for name in ("h264", "hevc", "vp9", "av1", "aac", "mp3", "opus") if name not in av.codecs_available]
    if missing:
        yield WARN, f"decoder: PyAV {av.__version__} has no {', '.join(missing)}; such files are skipped"
    yield OK, f"decoders: pillow, soundfile {soundfile.__libsndfile_version__}, PyAV {av.__version__}"


def check_backends() -> Iterator[Finding]:
    """Optional packages, and what is used in their place."""
    for module, without in (
        ("transformer_engine.pytorch", "Megatron's local linear layers and our norms are used"),
        ("nvidia.dali", "media are decoded on the CPU"),
    ):
        try:
            importlib.import_module(module)
            yield OK, f"backend: {module} is there"
        except ImportError:
            yield OK, f"backend: no {module}; {without}"
        except Exception as error:
            yield (
                WARN,
                f"backend: {module} is installed but does not import ({type(error).__name__}: {error}); {without}",
            )
    ffmpeg = shutil.which("ffmpeg")
    yield (
        OK,
        "ffmpeg is there" if ffmpeg else "no ffmpeg program (needed by no training; Debian: apt-get install ffmpeg)",
    )


def check_gpus() -> Iterator[Finding]:
    """Every GPU is seen, free, and computes."""
    from megatron_omni.platform.device import accelerator_present, probe_gpus

    if not accelerator_present():
        yield (
            (FAIL, "no GPU is seen, but GPU files exist; look at the driver and at CUDA_VISIBLE_DEVICES")
            if Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
            else (OK, "no GPU: training runs on the CPU with gloo")
        )
        return
    for index, gpu in enumerate(probe_gpus()):
        free, total = gpu.free_bytes / 2**30, gpu.total_bytes / 2**30
        text = f"GPU {index}: {gpu.name}, {free:.0f} of {total:.0f} GiB free, bf16 product"
        yield (OK if free > 0.9 * total else WARN, text) if gpu.computes else (FAIL, text + " is not finite")


def check_disk(directory: Path) -> Iterator[Finding]:
    """Runs can be written, and fast enough."""
    place = directory
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as scratch:
            data, start = os.urandom(1 << 24), time.perf_counter()
            with open(Path(scratch) / "probe", "wb") as file:
                for _ in range(8):
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            rate = 8 * len(data) / (time.perf_counter() - start) / 1e9
            os.replace(Path(scratch) / "probe", Path(scratch) / "renamed")
    except OSError as error:
        yield FAIL, f"disk: {place} cannot be written ({error})"
        return
    free = shutil.disk_usage(place).free / 2**30
    yield OK if rate > SLOW_DISK else WARN, f"disk: {place} takes {rate:.2f} GB/s"
    yield OK if free > FREE_GIB else WARN, f"disk: {free:.0f} GiB are free there"
    shared = shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").exists() else 0.0
    yield (
        OK if shared > 1.0 else WARN,
        f"/dev/shm has {shared:.1f} GiB" + ("" if shared > 1.0 else "; NCCL needs about 1"),
    )


def check_clock() -> Iterator[Finding]:
    """The clock is plausible and does not run backwards."""
    newest = max(path.stat().st_mtime for path in Path(__file__).resolve().parents[1].glob("*"))
    ahead = newest - time.time()
    yield (
        OK if ahead < 60 else WARN,
        f"clock: {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
        + ("" if ahead < 60 else f"; files here are {ahead:.0f} s in the future"),
    )


def check_ranks() -> Iterator[Finding]:
    """All ranks reach each other; one speaks for all."""
    import torch
    import torch.distributed as dist

    from megatron_omni.platform.device import backend, install, select_device

    install()
    device = select_device()
    start = time.perf_counter()
    dist.init_process_group(backend())
    joined = time.perf_counter() - start
    rank, world = dist.get_rank(), dist.get_world_size()
    number = torch.ones(1, device=device)
    dist.all_reduce(number)
    numbers, hosts = torch.ones(1 << 22, device=device), [("", 0.0, 0.0)] * world
    dist.all_reduce(numbers)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(numbers)
    total = float(numbers[0])
    seconds = time.perf_counter() - start
    dist.barrier()
    dist.all_gather_object(hosts, (socket.gethostname(), time.time(), seconds))
    right = int(number) == world and total == float(world) ** 2
    dist.destroy_process_group()
    if rank != 0:
        return
    yield (
        OK if right else FAIL,
        f"{world} ranks on {len({host for host, *_ in hosts})} machines sum up in {joined:.1f} s",
    )
    apart = max(clock for _, clock, _ in hosts) - min(clock for _, clock, _ in hosts)
    yield OK if apart < CLOCK_SECONDS else WARN, f"clocks are {apart:.2f} s apart"
    gigabytes = 4 * numbers.numel() / 1e9
    slowest = max(range(world), key=lambda r: hosts[r][2])
    yield (
        OK,
        f"all-reduce of {gigabytes:.3f} GB takes {hosts[slowest][2] * 1e3:.1f} ms (rank {slowest}, {hosts[slowest][0]})",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="megatron-omni doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where runs are written")
    parser.add_argument("--ranks", action="store_true", help="check the connections between the ranks of a job instead")
    options = parser.parse_args(arguments)
    checks: list[Callable[[], Iterator[Finding]]] = [check_ranks]
    if not options.ranks:
        checks = [check_python, check_packages, check_kernels, check_decoders, check_backends, check_gpus]
        checks += [lambda: check_disk(options.dir), check_clock]
    worst = 0
    for check in checks:
        try:
            for status, text in check():
                print(f"{status:<4} {text}", flush=True)
                worst = max(worst, int(status == FAIL))
        except Exception as error:
            print(f"FAIL {getattr(check, '__name__', 'check')}: {type(error).__name__}: {error}", flush=True)
            worst = 1
    return worst


if __name__ == "__main__":
    sys.exit(main())
