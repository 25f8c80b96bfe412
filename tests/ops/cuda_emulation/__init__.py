"""The hand-written CUDA kernels on the CPU: csrc/cuda/*.cu compiled by the C++ compiler over emulate.h, called by ctypes.

``kernels()`` gives an object whose methods are the functions of csrc/kernels_cuda.h (entry.cpp). Tensors are passed as
pointers, None as null, dtypes as ``DTYPE``. Objects are kept in build/cuda_emulation and rebuilt when a source is newer.
"""

import ctypes
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "cuda_emulation"
KERNELS = (
    "permute",
    "topp_route",
    "release_route",
    "counter_rng",
    "grouped_gemm",
    "grouped_gemm_mma",
    "grouped_gemm_simt",
    "expert_mlp",
)
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-DOMNI_EMULATE_CUDA", f"-I{HERE}", "-Wno-unknown-pragmas")
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _newest(paths: list[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


def _compile(source: Path, headers_changed: float) -> Path:
    target = BUILD / (source.name + ".o")
    if not target.exists() or target.stat().st_mtime < max(headers_changed, source.stat().st_mtime):
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        fresh = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(fresh)], check=True)
        fresh.replace(target)
    return target


@cache
def _library() -> ctypes.CDLL:
    BUILD.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    headers = _newest([*HERE.glob("*.h"), *csrc.glob("*.h"), *csrc.glob("cuda/*.h"), *csrc.glob("cuda/*.cuh")])
    objects = [
        _compile(source, headers) for source in [*(csrc / "cuda" / f"{k}.cu" for k in KERNELS), HERE / "entry.cpp"]
    ]
    library = BUILD / "kernels.so"
    if not library.exists() or library.stat().st_mtime < _newest(objects):
        fresh = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [*shlex.split(os.environ.get("CXX", "c++")), "-shared", *map(str, objects), "-o", str(fresh)], check=True
        )
        fresh.replace(library)
    return ctypes.CDLL(str(library))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous() and value.device.type == "cpu"
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int64(DTYPE[value])
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


class Kernels:
    """Calls by name; RuntimeError carries the message of a kernel that refuses."""

    def workspace(self, rows: int, experts: int) -> Tensor:
        size = _library().grouped_gemm_workspace
        size.restype = ctypes.c_int64
        return torch.full((size(ctypes.c_int64(rows), ctypes.c_int64(experts)),), 0xFF, dtype=torch.uint8)

    def mma_shared_bytes(self, kind: int, tile_rows: int) -> int:
        size = _library().mma_shared_bytes
        size.restype = ctypes.c_int64
        return int(size(ctypes.c_int64(kind), ctypes.c_int64(tile_rows)))

    def __getattr__(self, name: str) -> Any:
        function = getattr(_library(), name)
        function.restype = ctypes.c_char_p

        def call(*values: Any) -> None:
            message = function(*(_argument(value) for value in values))
            if message is not None:
                raise RuntimeError(message.decode())

        return call
