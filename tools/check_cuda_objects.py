"""What nvcc put into the CUDA objects: code for the devices that it is meant for, wgmma for Hopper, and what kernels take.

Reads build/csrc/cuda/*.o (`make ext-cuda`) with cuobjdump, from the CUDA toolkit or from the triton package that comes
with torch. A kernel of csrc/cuda/sm90_*.cu without HGMMA instructions (SASS for wgmma) would be a silent fall back to
something far slower; so would one that is missing, and one whose registers are spilled. Exit status 1 with the reason when a
check fails.

    python tools/check_cuda_objects.py [--json FILE]
    python tools/check_cuda_objects.py --markdown docs/kernels.md    # its table of registers and occupancy, anew

Occupancy is arithmetic (NVIDIA's occupancy calculator): the blocks of a kernel that one SM can hold at a time, by its
registers, threads and shared memory. It is no speed.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "csrc" / "cuda"
HOPPER_KERNELS = {f"sm90_{kind}_{dtype}": 2 for kind in ("forward", "dgrad", "wgrad") for dtype in ("bf16", "fp16")}
"""CUTLASS kernels that each file must hold."""
BEGIN, END = "<!-- kernels in the CUDA objects -->", "<!-- end of kernels -->"
HELPERS = ("check_offsets", "zero_tail", "zero_empty_experts", "build_tile_map", "build_groups")
"""One block, or a fill with zeros: not in the table."""
MAY_SPILL = ("simt_kernel", "release_route")
"""Kernels for correctness, not speed; a thread of release_route keeps some words of its token there."""


@dataclass
class Kernel:
    """One kernel of one object on one architecture."""

    instructions: int = 0
    hgmma: int = 0
    hmma: int = 0
    """Of the tensor cores: wgmma, mma."""
    registers: int = 0
    shared: int = 0
    """Static shared memory, bytes a block; what the launch adds is :func:`dynamic_shared`."""
    stack: int = 0
    """Bytes of a thread in local memory: spilled registers, and arrays that are indexed."""
    threads: int = 0
    """Of a block at most."""


Kernels = dict[str, dict[str, Kernel]]
"""By architecture and (mangled) name."""


@dataclass(frozen=True)
class Multiprocessor:
    """What an SM has."""

    shared: int
    """Bytes for all blocks."""
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


RESERVED = 1024
"""Bytes of shared memory that the system takes for each block."""
MULTIPROCESSORS = {"sm_80": Multiprocessor(164 << 10), "sm_90a": Multiprocessor(228 << 10)}


def occupancy(kernel: Kernel, dynamic: int, sm: Multiprocessor) -> int:
    """Blocks that an SM holds at a time."""
    warps = -(-kernel.threads // 32)
    registers = -(-kernel.registers * 32 // 256) * 256  # a warp's, allocated by 256
    by_registers = sm.registers // registers // 4 * 4 // warps if registers else sm.blocks
    by_shared = sm.shared // (-(-(kernel.shared + dynamic + RESERVED) // 128) * 128)
    return min(sm.blocks, sm.warps // warps, by_registers, by_shared)


def dynamic_shared(name: str) -> int | None:
    """Bytes of shared memory that a launch of the kernel ``name`` (demangled) asks for; None: what an SM has left.

    ``mma_kernel``: Layout of csrc/cuda/grouped_gemm_mma.cu (tests/ops/test_cuda_emulated.py compares the two). CUTLASS
    takes as many stages as fit.
    """
    if "device_kernel" in name:
        return None
    if match := re.search(r"mma_kernel<\(.*?Kind\)(\d), (\d+)", name):
        return mma_shared(int(match[1]), int(match[2]))
    if "topp_route_kernel" in name:
        return 8 * 8 * (2 * (8 if "<double>" in name else 4) + 3 * 4)  # 8 tokens of 8 slots: the released model has 5
    return 0


def mma_shared(kind: int, tile_m: int) -> int:
    """``Layout<kind, tile_m>::shared_bytes``; kinds are 0 forward, 1 dgrad, 2 wgrad."""
    few = tile_m == 16
    tile_n, tile_k, stages = (64, 64, 4) if few else (128, 32, 3)
    a = tile_k * (tile_m + 8) if kind == 2 else tile_m * (tile_k + 8)
    b = tile_n * (tile_k + 8) if kind == 1 else tile_k * (tile_n + 8)
    return 2 * (a + b) * stages


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


def dump(path: Path, cuobjdump: str, option: str) -> Iterable[str]:
    """Lines that cuobjdump prints of an object; RuntimeError with what it says."""
    tools = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # nvdisasm
    done = subprocess.run([cuobjdump, option, str(path)], capture_output=True, text=True, check=False, env=tools)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} {path.name}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def inspect(path: Path, cuobjdump: str) -> Kernels:
    """Everything that is known of the kernels of an object."""
    kernels: Kernels = {}
    read_instructions(dump(path, cuobjdump, "-sass"), kernels)
    read_resources(dump(path, cuobjdump, "-res-usage"), kernels)
    read_threads(dump(path, cuobjdump, "-elf"), kernels)
    return kernels


def read_instructions(lines: Iterable[str], kernels: Kernels) -> None:
    """Instructions, from ``cuobjdump -sass``."""
    arch, kernel = "", Kernel()
    for line in lines:
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernel = kernels.setdefault(arch, {}).setdefault(match[1], Kernel())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            kernel.instructions += 1
            kernel.hgmma += match[1] == "HGMMA"
            kernel.hmma += match[1] == "HMMA"


def read_resources(lines: Iterable[str], kernels: Kernels) -> None:
    """Registers and memory, from ``cuobjdump -res-usage``."""
    arch, name = "", ""
    for line in lines:
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernel = kernels.setdefault(arch, {}).setdefault(name, Kernel())
            kernel.registers, kernel.stack = found["REG"], found["STACK"] + found["LOCAL"]
            # From 9.0 on what the system takes is in it, of kernels that use any.
            kernel.shared = found["SHARED"] - (RESERVED if arch == "sm_90a" and found["SHARED"] >= RESERVED else 0)


def read_threads(lines: Iterable[str], kernels: Kernels) -> None:
    """Threads of a block, from ``cuobjdump -elf``: EIATTR_MAX_THREADS of a kernel's .nv.info section."""
    arch, name, is_threads = "", "", False
    for line in lines:
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\.nv\.info\.(\S+)", line):
            name = match[1]
        elif "Attribute:" in line:
            is_threads = "EIATTR_MAX_THREADS" in line
        elif is_threads and (match := re.search(r"Value:\s+(0x[0-9a-f]+)", line)):
            kernels.setdefault(arch, {}).setdefault(name, Kernel()).threads = int(match[1], 16)
            is_threads = False


def problems(name: str, kernels: Kernels) -> list[str]:
    """What is wrong with one object."""
    wanted = {"sm_90a"} if name in HOPPER_KERNELS else {"sm_80", "sm_90a"}
    found = [f"{name}: no code for {arch}" for arch in sorted(wanted - set(kernels))]
    if name in HOPPER_KERNELS:
        cutlass = {k: v for k, v in kernels.get("sm_90a", {}).items() if "cutlass" in k and "device_kernel" in k}
        if len(cutlass) != HOPPER_KERNELS[name]:
            found.append(f"{name}: {len(cutlass)} CUTLASS kernels, {HOPPER_KERNELS[name]} expected")
        found += [f"{name}: a CUTLASS kernel without wgmma (HGMMA)" for v in cutlass.values() if v.hgmma == 0]
    for arch, functions in kernels.items():
        if name == "grouped_gemm_mma":
            plain = [k for k, v in functions.items() if "mma_kernel" in k and v.hmma == 0]
            found += [f"{name}: {arch}: a kernel without tensor-core instructions (HMMA)"] * bool(plain)
        spilled = [k for k, v in functions.items() if v.stack and not any(part in k for part in MAY_SPILL)]
        found += [f"{name}: {arch}: {functions[k].stack} bytes of a thread in local memory: {k}" for k in spilled]
    return found


def demangled(names: Iterable[str]) -> dict[str, str]:
    """C++ names, by c++filt; as they are where it is not installed."""
    mangled = sorted(set(names))
    tool = shutil.which("c++filt")
    if tool is None:
        return {name: name for name in mangled}
    done = subprocess.run([tool, "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return dict(zip(mangled, done.stdout.splitlines(), strict=True))


def family(name: str) -> str:
    """What a row of the table is about: the kernel without namespaces and element types; tiles and kinds stay."""
    if match := re.search(r"mma_kernel<\(.*?Kind\)(\d), (\d+)", name):
        return f"mma_kernel, {('forward', 'dgrad', 'wgrad')[int(match[1])]}, tiles of {match[2]} rows"
    if "device_kernel" in name:  # too long for c++filt
        rows = re.search(r"(?:Pingpong|Cooperative)E+\w*?ILi(\d+)E+\w*?ILi256E", name)
        return f"CUTLASS, tiles of {rows[1] if rows else '?'} x 256"
    plain = re.sub(r"\(anonymous namespace\)::", "", name).split("<")[0].split("(")[0]
    return plain.split("::")[-1].split(" ")[-1]


@dataclass
class Row:
    """The kernels of a family on one architecture: the most that one of them takes, the least blocks."""

    kernels: int = 0
    registers: int = 0
    threads: int = 0
    shared: int | None = 0
    stack: int = 0
    blocks: int = 10**6


@dataclass
class Found:
    """What is in all objects."""

    totals: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    """By file, family and architecture."""
    wrong: list[str] = field(default_factory=list)


def check() -> Found:
    """Read every object."""
    objects = {path.name.removesuffix(".cu.o"): path for path in sorted(OBJECTS.glob("*.cu.o"))}
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    found = Found(wrong=[f"{name}: not built; run make ext-cuda" for name in sorted(sources - set(objects))])
    cuobjdump = find_cuobjdump()
    for name in sorted(sources & set(objects)):  # an object without a source is left from an older build
        kernels = inspect(objects[name], cuobjdump)
        found.wrong += problems(name, kernels)
        for arch, functions in sorted(kernels.items()):
            totals = {
                key: sum(getattr(f, key) for f in functions.values()) for key in ("instructions", "hgmma", "hmma")
            }
            bytes_ = objects[name].stat().st_size
            found.totals.append({"object": name, "bytes": bytes_, "arch": arch, "kernels": len(functions), **totals})
            add_rows(found.rows, name, arch, functions)
    return found


def add_rows(rows: dict[tuple[str, str, str], Row], name: str, arch: str, functions: dict[str, Kernel]) -> None:
    """Join the kernels of one object and architecture by family."""
    names = demangled(functions)
    for mangled, kernel in functions.items():
        if (what := family(names[mangled])) in HELPERS:
            continue
        row = rows.setdefault((name, what, arch), Row())
        dynamic = dynamic_shared(names[mangled])
        row.kernels += 1
        row.registers = max(row.registers, kernel.registers)
        row.threads = max(row.threads, kernel.threads)
        row.stack = max(row.stack, kernel.stack)
        if dynamic is None:
            row.shared = None
        elif row.shared is not None:
            row.shared = max(row.shared, kernel.shared + dynamic)
        row.blocks = min(row.blocks, occupancy(kernel, dynamic or 0, MULTIPROCESSORS[arch]))


def nvcc_release() -> str:
    """Release of the CUDA compiler, "13.0"; empty where there is none."""
    tool = shutil.which(
        "nvcc", path=str(Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin")
    ) or shutil.which("nvcc")
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout if tool else ""
    match = re.search(r"release ([\d.]+)", said)
    return match[1] if match else ""


def markdown(found: Found) -> str:
    """The table of docs/kernels.md."""
    columns = ["file", "kernel", "instances", "threads", "registers", "shared", "local", "blocks", "warps"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, kernel in sorted({(name, kernel) for name, kernel, _ in found.rows}):
        both = [found.rows.get((name, kernel, arch)) for arch in MULTIPROCESSORS]

        def each(value: Callable[[Row], Any], both: list[Row | None] = both) -> str:
            cells = ["-" if row is None else str(value(row)) for row in both]
            return cells[0] if len(set(cells)) == 1 else " / ".join(cells)

        cells = [
            each(lambda row: row.kernels),
            each(lambda row: row.threads),
            each(lambda row: row.registers),
            each(lambda row: "rest" if row.shared is None else f"{row.shared / 1024:.1f}"),
            each(lambda row: row.stack),
            each(lambda row: row.blocks),
            each(lambda row: row.blocks * -(-row.threads // 32)),
        ]
        lines.append("| " + " | ".join([name, kernel, *cells]) + " |")
    return f"Compiled by nvcc {nvcc_release()}.\n\n" + "\n".join(lines)


def in_page(page: str) -> str:
    """The table that a page holds; ValueError where its markers are missing."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return page.split(BEGIN)[1].split(END)[0].strip()


def main() -> int:
    """Print the table and the problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument(
        "--markdown", type=Path, metavar="PAGE", help="put the table of registers between the page's markers"
    )
    arguments = parser.parse_args()
    try:
        found = check()
        if arguments.markdown:
            page = arguments.markdown.read_text(encoding="utf-8")
            arguments.markdown.write_text(page.replace(in_page(page), markdown(found)), encoding="utf-8")
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    columns = {"object": 20, "bytes": 9, "arch": 7, "kernels": 8, "instructions": 13, "hgmma": 6, "hmma": 6}
    print(" ".join(f"{name:>{width}}" for name, width in columns.items()))
    for row in found.totals:
        print(" ".join(f"{row[name]:>{width}}" for name, width in columns.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found.totals, indent=1))
    for problem in found.wrong:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
