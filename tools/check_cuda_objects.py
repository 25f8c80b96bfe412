"""What nvcc put into the CUDA objects: every file holds code for the devices it is meant for, Hopper's holds wgmma.

Reads build/csrc/cuda/*.o (`make ext-cuda`) with cuobjdump, from the CUDA toolkit or from the triton package that comes
with torch. A kernel of csrc/cuda/sm90_*.cu without HGMMA instructions (SASS for wgmma) would be a silent fall back to
something far slower; so would one that is missing. Exit status 1 with the reason when a check fails.

    python tools/check_cuda_objects.py [--json FILE]
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "csrc" / "cuda"
HOPPER_KERNELS = {"sm90_forward": 2, "sm90_dgrad": 2, "sm90_wgrad": 2}
"""CUTLASS kernels that each file must hold."""


def find_cuobjdump() -> str:
    """Path of cuobjdump; RuntimeError with what to install."""
    folders = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        folders.append(Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin")
    for path in (None, *map(str, folders)):
        found = shutil.which("cuobjdump", path=path)
        if found:
            return found
    raise RuntimeError("cuobjdump was not found: install the CUDA toolkit or the triton package")


def inspect(path: Path, cuobjdump: str) -> dict[str, dict[str, dict[str, int]]]:
    """Per architecture and kernel of an object: instructions, and those of the tensor cores (hgmma, hmma)."""
    tools = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # nvdisasm
    done = subprocess.run([cuobjdump, "-sass", str(path)], capture_output=True, text=True, check=False, env=tools)
    if done.returncode:
        raise RuntimeError(f"cuobjdump -sass {path.name}: {done.stderr.strip()}")
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    arch, counts = "", {"instructions": 0, "hgmma": 0, "hmma": 0}
    for line in done.stdout.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            counts = {"instructions": 0, "hgmma": 0, "hmma": 0}
            kernels.setdefault(arch, {})[match[1]] = counts
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            counts["instructions"] += 1
            counts["hgmma"] += match[1] == "HGMMA"
            counts["hmma"] += match[1] == "HMMA"
    return kernels


def problems(name: str, kernels: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """What is wrong with one object."""
    wanted = {"sm_90a"} if name in HOPPER_KERNELS else {"sm_80", "sm_90a"}
    found = [f"{name}: no code for {arch}" for arch in sorted(wanted - set(kernels))]
    if name in HOPPER_KERNELS:
        cutlass = {k: v for k, v in kernels.get("sm_90a", {}).items() if "cutlass" in k and "device_kernel" in k}
        if len(cutlass) != HOPPER_KERNELS[name]:
            found.append(f"{name}: {len(cutlass)} CUTLASS kernels, {HOPPER_KERNELS[name]} expected")
        found += [f"{name}: a CUTLASS kernel without wgmma (HGMMA)" for v in cutlass.values() if v["hgmma"] == 0]
    if name == "grouped_gemm_mma":
        for arch, functions in kernels.items():
            plain = [k for k, v in functions.items() if "mma_kernel" in k and v["hmma"] == 0]
            found += [f"{name}: {arch}: a kernel without tensor-core instructions (HMMA)"] * bool(plain)
    return found


def check() -> tuple[list[dict[str, object]], list[str]]:
    """A row per object and architecture, and all problems."""
    objects = {path.name.removesuffix(".cu.o"): path for path in sorted(OBJECTS.glob("*.cu.o"))}
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    wrong = [f"{name}: not built; run make ext-cuda" for name in sorted(sources - set(objects))]
    rows: list[dict[str, object]] = []
    cuobjdump = find_cuobjdump()
    for name, path in objects.items():
        kernels = inspect(path, cuobjdump)
        wrong += problems(name, kernels)
        for arch, functions in sorted(kernels.items()):
            totals = {key: sum(f[key] for f in functions.values()) for key in ("instructions", "hgmma", "hmma")}
            rows.append(
                {"object": name, "bytes": path.stat().st_size, "arch": arch, "kernels": len(functions), **totals}
            )
    return rows, wrong


def main() -> int:
    """Print the table and the problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    try:
        rows, wrong = check()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    columns = {"object": 20, "bytes": 9, "arch": 7, "kernels": 8, "instructions": 13, "hgmma": 6, "hmma": 6}
    print(" ".join(f"{name:>{width}}" for name, width in columns.items()))
    for row in rows:
        print(" ".join(f"{row[name]:>{width}}" for name, width in columns.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
