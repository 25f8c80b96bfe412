"""The compiled CUDA side, without a GPU: what is in the objects, that it loads, that every op has a CUDA kernel."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_omni.ops import extension

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "megatron_omni" / "ops" / "_kernels_cuda.so"
built = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA side is not built here (make ext-cuda)")

spec = importlib.util.spec_from_file_location("check_cuda_objects", ROOT / "tools" / "check_cuda_objects.py")
checker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checker)


def kernel(**counts):
    return {"instructions": 100, "hgmma": 0, "hmma": 0, **counts}


def test_checker_names_what_is_missing():
    two = {"_ZN7cutlass13device_kernelA": kernel(hgmma=8), "_ZN7cutlass13device_kernelB": kernel(hgmma=8)}
    assert checker.problems("sm90_forward", {"sm_90a": two}) == []
    assert checker.problems("sm90_forward", {"sm_80": two}) == [
        "sm90_forward: no code for sm_90a",
        "sm90_forward: 0 CUTLASS kernels, 2 expected",
    ]
    slow = {**two, "_ZN7cutlass13device_kernelB": kernel(hmma=8)}
    assert checker.problems("sm90_forward", {"sm_90a": slow}) == [
        "sm90_forward: a CUTLASS kernel without wgmma (HGMMA)"
    ]
    assert checker.problems("permute", {"sm_80": {"k": kernel()}}) == ["permute: no code for sm_90a"]
    both = {"sm_80": {"mma_kernel": kernel(hmma=4)}, "sm_90a": {"mma_kernel": kernel()}}
    assert checker.problems("grouped_gemm_mma", both) == [
        "grouped_gemm_mma: sm_90a: a kernel without tensor-core instructions (HMMA)"
    ]


@built
def test_objects_hold_code_for_every_device():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_cuda_objects.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "sm90_forward" in done.stdout


@built
def test_loads_without_a_gpu_and_covers_every_op():
    assert extension.CUDA_ERROR is None
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("megatron_omni::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cpu = {n for n in names if has(n, "CPU")}
    assert len(on_cpu) >= 10
    assert {n for n in on_cpu if not has(n, "CUDA")} == set()
