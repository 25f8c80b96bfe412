"""Compiled kernels in a folder, to be used on another machine: packed here, checked and put in place there.

    python -m benchmarks.gpu_check.prebuilt pack DIR        # after make ext-cuda
    python -m benchmarks.gpu_check.prebuilt install DIR

The shared objects hold no Python, but they are linked against one torch and compiled for one processor family and some
GPUs; ``prebuilt.json`` beside them says which, and of which sources.
"""

import argparse
import hashlib
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "megatron_omni" / "ops"
FILES = ("_kernels.so", "_kernels_cuda.so")
MANIFEST = "prebuilt.json"
MOST_BYTES = 64 << 20
MAKE = "make it again here with: make ext-cuda && python -m benchmarks.gpu_check.prebuilt pack DIR"
GPUS = {"sm_80": (8, 0), "sm_90a": (9, 0)}
"""Compute capabilities that the objects have code for; PTX of sm_80 runs on every later one."""


def sources() -> list[Path]:
    """All that the objects are made of."""
    kinds = (".h", ".cpp", ".cu", ".cuh")
    return sorted([ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds)])


def sources_digest() -> str:
    """SHA-256 over their names and bytes."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def facts_here() -> dict[str, str]:
    """What objects have to fit, of this machine."""
    import torch

    return {
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
        "sources": sources_digest(),
    }


def pack(folder: Path) -> None:
    """Copy what ``make ext-cuda`` built; ValueError where it is not there, older than its sources, or too large."""
    newest = max(sources(), key=lambda path: path.stat().st_mtime)
    for path in (OPS / name for name in FILES):
        if not path.is_file():
            raise ValueError(f"{path} is not built; run make ext-cuda")
        if path.stat().st_mtime < newest.stat().st_mtime:
            raise ValueError(f"{path} is older than {newest}; run make ext-cuda")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; give a new folder")
    check_size([OPS / name for name in FILES])
    for name in FILES:
        shutil.copy2(OPS / name, folder / name)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    manifest = facts_here() | {"gpus": sorted(GPUS), "files": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def check_size(files: list[Path]) -> None:
    """ValueError for more bytes than may be carried."""
    size = sum(path.stat().st_size for path in files)
    if size > MOST_BYTES:
        raise ValueError(f"{size / 2**20:.0f} MiB in all; at most {MOST_BYTES >> 20} MiB")


def check(folder: Path, here: dict[str, str], *, capability: tuple[int, int] | None) -> None:
    """ValueError that names what does not fit: a file, or what the objects were made for and what is here.

    ``here`` as :func:`facts_here`; ``capability`` of the GPU that they shall run on, None where that is not asked.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} is missing; {MAKE}")
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        digests, made_for = dict(manifest["files"]), {name: str(manifest[name]) for name in here}
        oldest = min(GPUS[name] for name in manifest["gpus"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is not the file that pack wrote ({type(error).__name__}: {error}); {MAKE}"
        ) from error
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {MAKE}")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digests.get(name):
            raise ValueError(f"{folder / name}: is not the file that was packed (its SHA-256 differs); {MAKE}")
    check_size([entry for entry in folder.rglob("*") if entry.is_file()])
    for name, value in here.items():
        if made_for[name] != value:
            raise ValueError(f"{folder}: made for {name} {made_for[name]}, here is {name} {value}; {MAKE}")
    if capability is not None and capability < oldest:
        raise ValueError(f"{folder}: has code for compute capability {oldest} and later, this GPU has {capability}")


def install(folder: Path) -> None:
    """Put the objects where the package loads them, each in one move; ValueError as :func:`check`."""
    check(folder, facts_here(), capability=None)
    for name in FILES:
        fresh = OPS / f"{name}.new"
        shutil.copy2(folder / name, fresh)
        fresh.replace(OPS / name)


def main() -> int:
    """Pack or install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "install"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        (pack if options.what == "pack" else install)(options.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
