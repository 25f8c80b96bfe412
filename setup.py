"""Builds csrc: ``megatron_omni/ops/_kernels.so`` (CPU), and ``_kernels_cuda.so`` where asked for.

Kernels are plain C++17 and take seconds; only the bindings see torch's headers. Torch itself is not a build dependency
when the environment that is being installed into has one already (a container's, or the one ``make venv`` put there
first): its headers and libraries are used from there, across pip's build isolation, so the result fits the torch it will
run with and torch is not downloaded twice. Without one, the isolated build asks for the project's own torch requirement.

    python setup.py build_ext --inplace        # or `make ext`: rebuild what changed (object files in build/csrc)

OMNI_BUILD_CUDA   1 builds the CUDA side (needs nvcc), 0 never does; default: where nvcc and a GPU driver are both there
CXX, MAX_JOBS     compiler, and how many run at once (default: the number of cores)
"""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "csrc"
BINDINGS = [CSRC / "bindings_autograd.cpp", CSRC / "bindings.cpp"]
CXX_FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-uninitialized"]  # gcc 12: its own headers


def find_torch() -> Path | None:
    """Directory of torch in the environment installed into, else in this (isolated) one; it is not imported."""
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    for flags in (["-I"], []):  # -I: without the paths that pip's build isolation sets
        found = subprocess.run([sys.executable, *flags, "-c", ask], capture_output=True, text=True, check=True)
        if found.stdout.strip():
            return Path(found.stdout.strip())
    return None


def torch_requirement() -> str:
    """The project's own requirement on torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(d for d in project["dependencies"] if d.startswith("torch"))


def wants_cuda() -> bool:
    """Whether to build the CUDA side (module docstring)."""
    choice = os.environ.get("OMNI_BUILD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"error: OMNI_BUILD_CUDA = {choice}: must be 0, 1 or auto")
    if choice == "1" and shutil.which("nvcc") is None:
        raise SystemExit("error: OMNI_BUILD_CUDA = 1 needs nvcc on PATH; install the CUDA toolkit or set it to 0")
    return choice == "1" or (choice == "auto" and bool(shutil.which("nvcc")) and Path("/proc/driver/nvidia").exists())


def cxx_command(source: Path, torch: Path) -> list[str]:
    """Compiler call of a C++ source, without its input and output."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), *CXX_FLAGS, f"-I{CSRC}"]
    if source.name.startswith("bindings"):
        include = torch / "include"
        return [*command, "-std=c++20", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    return [*command, "-std=c++17"]


def is_current(target: Path, command: list[str]) -> bool:
    """Whether ``target`` was made by this command and is newer than everything its dependency file lists."""
    record, depfile = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and depfile.exists() and record.exists() and record.read_text() == shlex.join(command)):
        return False
    made = target.stat().st_mtime
    words = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(Path(w).exists() and Path(w).stat().st_mtime <= made for w in words)


def compile_object(source: Path, command: list[str]) -> Path:
    """Object file of one source; nothing is done when it is current."""
    target = OBJECTS / source.relative_to(CSRC).with_suffix(source.suffix + ".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*command, "-c", str(source), "-o", str(target)]
    if not is_current(target, command):
        target.unlink(missing_ok=True)
        print(f"compiling {source.relative_to(ROOT)}", flush=True)
        subprocess.run([*command, "-MMD", "-MF", str(target.with_suffix(".d"))], check=True)
        target.with_suffix(".cmd").write_text(shlex.join(command))
    return target


def link(objects: list[Path], *, target: Path, torch: Path, libraries: list[str]) -> None:
    """Shared object at ``target``, put there in one move: a running process keeps the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-shared", *map(str, objects), "-o", str(fresh)]
    subprocess.run([*command, f"-L{torch / 'lib'}", *(f"-l{name}" for name in libraries)], check=True)
    fresh.replace(target)


class BuildKernels(build_ext):
    """Our own compile step: plain C++ objects side by side, then one link per shared object."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # loaded by torch.ops, not by Python: no ABI tag

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(f"error: building csrc needs torch's headers; pip install '{torch_requirement()}' first")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        if ext.name.endswith("_cuda"):
            raise SystemExit("error: the CUDA side is not part of this tree")
        sources = sorted(CSRC.glob("cpu/*.cpp"))
        with ThreadPoolExecutor(jobs) as pool:  # bindings first: the longest
            objects = list(
                pool.map(lambda s: compile_object(s, cxx_command(s, torch)), [*BINDINGS, *sources])
            )
        link(objects, target=target, torch=torch, libraries=["c10", "torch_cpu", "torch"])


# The sources are listed for source distributions; build_extension finds them by their folder.
extensions = [Extension("megatron_omni.ops._kernels", ["csrc/bindings.cpp"])]
if wants_cuda() and any(CSRC.glob("cuda/*.cu")):
    extensions.append(Extension("megatron_omni.ops._kernels_cuda", ["csrc/bindings_cuda.cpp"]))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    setup_requires=[] if find_torch() else [torch_requirement()],
)
