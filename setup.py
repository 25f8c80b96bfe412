"""Builds csrc: ``megatron_omni/ops/_kernels.so`` (CPU), and ``_kernels_cuda.so`` where asked for.

Kernels are plain C++17 and take seconds; only the bindings see torch's headers. Torch itself is not a build dependency
when the environment that is being installed into has one already (a container's, or the one ``make venv`` put there
first): its headers and libraries are used from there, across pip's build isolation, so the result fits the torch it will
run with and torch is not downloaded twice. Without one, the isolated build asks for the project's own torch requirement.

    python setup.py build_ext --inplace        # or `make ext`: rebuild what changed (object files in build/csrc)

OMNI_BUILD_CUDA   1 builds the CUDA side (needs nvcc), 0 never does; default: where nvcc and a GPU driver are both there
CXX, MAX_JOBS     compiler, and how many run at once (default: the number of cores; CUDA also by memory)
CUDA_HOME         the toolkit whose nvcc to use; CUTLASS is taken from the nvidia-cutlass package
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "csrc"
BINDINGS = [CSRC / "bindings_autograd.cpp", CSRC / "bindings_dit.cpp", CSRC / "bindings.cpp"]
CXX_FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-uninitialized"]  # gcc 12: its own headers
SM80 = ["-gencode", "arch=compute_80,code=[sm_80,compute_80]"]  # with PTX, for devices that are younger than this
SM90A = ["-gencode", "arch=compute_90a,code=sm_90a"]
CUDA_JOB_BYTES = 10 << 30  # physical memory for each nvcc at once: a CUTLASS file takes 5 GB


def find_package(name: str) -> Path | None:
    """Directory of a package in the environment installed into, else in this (isolated) one; it is not imported."""
    ask = f"import importlib.util as u; s = u.find_spec('{name}'); print(s.submodule_search_locations[0] if s else '')"
    for flags in (["-I"], []):  # -I: without the paths that pip's build isolation sets
        found = subprocess.run([sys.executable, *flags, "-c", ask], capture_output=True, text=True, check=True)
        if found.stdout.strip():
            return Path(found.stdout.strip())
    return None


def find_torch() -> Path | None:
    """Directory of torch, which is not imported."""
    return find_package("torch")


def torch_requirement() -> str:
    """The project's own requirement on torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(d for d in project["dependencies"] if d.startswith("torch"))


def wants_cuda() -> bool:
    """Whether to build the CUDA side (module docstring)."""
    choice = os.environ.get("OMNI_BUILD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"error: OMNI_BUILD_CUDA = {choice}: must be 0, 1 or auto")
    if choice == "1" and find_nvcc() is None:
        raise SystemExit(
            "error: OMNI_BUILD_CUDA = 1 needs nvcc in $CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin; "
            "install the CUDA toolkit or set it to 0"
        )
    return choice == "1" or (choice == "auto" and find_nvcc() is not None and Path("/proc/driver/nvidia").exists())


def find_nvcc() -> str | None:
    """CUDA's compiler: of CUDA_HOME if that is set, else on PATH, else where the toolkit installs itself."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def check_cuda_versions(nvcc: str, torch: Path) -> None:
    """The toolkit must be of the CUDA that torch was built for: both use the same runtime library in one process."""
    built_for = re.search(r"^cuda\b[^=]*= *'(\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    if built_for is None:
        raise SystemExit("error: this torch has no CUDA; install a CUDA build of torch or set OMNI_BUILD_CUDA=0")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    toolkit = re.search(r"release (\d+)", version)
    if toolkit is None or toolkit[1] != built_for[1]:
        raise SystemExit(
            f"error: nvcc is of CUDA {toolkit[1] if toolkit else 'unknown'}, torch of CUDA {built_for[1]}: "
            "point CUDA_HOME at a toolkit of the same major version or set OMNI_BUILD_CUDA=0"
        )


def nvcc_command(source: Path, nvcc: str, *, torch: Path, cutlass: Path | None) -> list[str]:
    """Compiler call of a CUDA source, or of the CUDA bindings. -DNDEBUG matters: an assertion in CUTLASS's main loop is a
    function call, around which ptxas serialises the wgmma instructions."""
    command = [nvcc, "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", f"-I{CSRC}"]
    if source.suffix == ".cpp":
        include = torch / "include"
        return [*command, "-std=c++20", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    arches = SM90A if source.name.startswith("sm90_") else SM80 + SM90A
    command = [*command, "-std=c++17", "--expt-relaxed-constexpr", *arches]
    return command if cutlass is None else [*command, "-DOMNI_WITH_CUTLASS", "-isystem", str(cutlass)]


def cxx_command(source: Path, torch: Path) -> list[str]:
    """Compiler call of a C++ source, without its input and output."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), *CXX_FLAGS, f"-I{CSRC}"]
    if source.name.startswith("bindings"):
        include = torch / "include"
        # at::parallel_for is a template around an OpenMP pragma: without -fopenmp here it runs on one thread.
        command += ["-fopenmp", "-std=c++20"]
        return [*command, "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    return [*command, "-std=c++17"]


def run_compiler(command: list[str]) -> None:
    """Compile, showing what the compiler says; serialised wgmma instructions (slow) are an error."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise SystemExit(f"error: {shlex.join(command)} failed")
    if "C7510" in done.stderr:
        raise SystemExit("error: ptxas serialised wgmma instructions (C7510, above)")


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
        run_compiler([*command, "-MMD", "-MF", str(target.with_suffix(".d"))])
        target.with_suffix(".cmd").write_text(shlex.join(command))
    return target


def link(objects: list[Path], *, linker: list[str], target: Path, torch: Path, libraries: list[str]) -> None:
    """Shared object at ``target``, put there in one move: a running process keeps the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    command = [*linker, "-shared", *map(str, objects), "-o", str(fresh)]
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
        if ext.name.endswith("_cuda"):
            self.build_cuda(target, torch)
            return
        sources = [*BINDINGS, *sorted(CSRC.glob("cpu/*.cpp"))]  # bindings first: the longest
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1) as pool:
            objects = list(pool.map(lambda s: compile_object(s, cxx_command(s, torch)), sources))
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        link(objects, linker=compiler, target=target, torch=torch, libraries=["c10", "torch_cpu", "torch"])
        cuda = ROOT / "megatron_omni" / "ops" / "_kernels_cuda.so"
        schemas = CSRC / "bindings.cpp"
        if not wants_cuda() and cuda.exists() and cuda.stat().st_mtime < schemas.stat().st_mtime:
            cuda.unlink()  # its ops may no longer fit the schemas, which ends the process that loads it
            print(f"note: removed {cuda.relative_to(ROOT)}, which is older than the ops; make ext-cuda builds it again")

    def build_cuda(self, target: Path, torch: Path) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise SystemExit("error: the CUDA side needs nvcc")
        check_cuda_versions(nvcc, torch)
        library = find_package("cutlass_library")
        cutlass = library / "source" / "include" if library else None
        if cutlass is None:
            print("note: without the nvidia-cutlass package Hopper gets the portable tensor-core kernels")
        sources = [s for s in sorted(CSRC.glob("cuda/*.cu")) if cutlass or not s.name.startswith("sm90_")]
        sources.sort(key=lambda s: not s.name.startswith("sm90_"))  # longest first
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = int(os.environ.get("MAX_JOBS", 0)) or max(1, min(os.cpu_count() or 1, memory // CUDA_JOB_BYTES))
        with ThreadPoolExecutor(jobs) as pool:
            compile_one = partial(nvcc_command, nvcc=nvcc, torch=torch, cutlass=cutlass)
            sources = [*sources, CSRC / "bindings_cuda.cpp"]
            objects = list(pool.map(lambda s: compile_object(s, compile_one(s)), sources))
        linker = [nvcc, "-cudart", "shared"]
        link(objects, linker=linker, target=target, torch=torch, libraries=["c10", "c10_cuda", "torch_cpu", "torch"])


# The sources are listed for source distributions; build_extension finds them by their folder.
extensions = [Extension("megatron_omni.ops._kernels", ["csrc/bindings.cpp"])]
if wants_cuda():
    extensions.append(Extension("megatron_omni.ops._kernels_cuda", ["csrc/bindings_cuda.cpp"]))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    setup_requires=[] if find_torch() else [torch_requirement()],
)
