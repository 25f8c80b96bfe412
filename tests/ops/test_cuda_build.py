"""The compiled CUDA side, without a GPU: what is in the objects, that it loads, that every op has a CUDA kernel."""

import importlib.util
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
    return checker.Kernel(instructions=100, **counts)


def test_checker_names_what_is_missing():
    two = {"_ZN7cutlass13device_kernelA": kernel(hgmma=8), "_ZN7cutlass13device_kernelB": kernel(hgmma=8)}
    assert checker.problems("sm90_forward_bf16", {"sm_90a": two}) == []
    assert checker.problems("sm90_forward_bf16", {"sm_80": two}) == [
        "sm90_forward_bf16: no code for sm_90a",
        "sm90_forward_bf16: 0 CUTLASS kernels, 2 expected",
    ]
    slow = {**two, "_ZN7cutlass13device_kernelB": kernel(hmma=8)}
    assert checker.problems("sm90_forward_bf16", {"sm_90a": slow}) == [
        "sm90_forward_bf16: a CUTLASS kernel without wgmma (HGMMA)"
    ]
    assert checker.problems("permute", {"sm_80": {"k": kernel()}}) == ["permute: no code for sm_90a"]
    spilled = {arch: {"permute_kernel": kernel(stack=16)} for arch in ("sm_80", "sm_90a")}
    assert (
        checker.problems("permute", spilled)[0]
        == "permute: sm_80: 16 bytes of a thread in local memory: permute_kernel"
    )
    both = {"sm_80": {"mma_kernel": kernel(hmma=4)}, "sm_90a": {"mma_kernel": kernel()}}
    assert checker.problems("grouped_gemm_mma", both) == [
        "grouped_gemm_mma: sm_90a: a kernel without tensor-core instructions (HMMA)"
    ]


def test_reads_what_cuobjdump_prints():
    """Lines of cuobjdump 13.0, shortened."""
    kernels = {}
    checker.read_instructions(
        [
            "arch = sm_80",
            "\t\tFunction : _Zk",
            "        /*0000*/                   MOV R1, c[0x0][0x28] ;",
            "        /*0010*/              @!P0 HMMA.16816.F32 R4, R8, R2, RZ ;",
        ],
        kernels,
    )
    checker.read_resources(
        [
            "arch = sm_80",
            "Resource usage:",
            " Common:",
            "  GLOBAL:0",
            " Function _Zk:",
            "  REG:72 STACK:24 SHARED:512 LOCAL:8 CONSTANT[2]:104 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0",
            "arch = sm_90a",
            " Function _Zk:",
            "  REG:40 STACK:0 SHARED:1056 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0",
        ],
        kernels,
    )
    checker.read_threads(
        [
            "arch = sm_80",
            "    8   25ec     bc  0  4                    CUDA_INFO       40    3       15 .nv.info._Zk",
            ".nv.info._Zk",
            "\tAttribute:\tEIATTR_CUDA_API_VERSION",
            "\tValue:\t0x82",
            "\tAttribute:\tEIATTR_MAX_THREADS",
            "\tFormat:\tEIFMT_SVAL",
            "\tValue:\t0x80 0x1 0x1 ",
        ],
        kernels,
    )
    found = checker.Kernel(instructions=2, hmma=1, registers=72, shared=512, stack=32, threads=128)
    assert kernels == {"sm_80": {"_Zk": found}, "sm_90a": {"_Zk": checker.Kernel(registers=40, shared=32)}}


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # by warps: 64 of them
        (16, 64, 0, 32),  # by blocks
        (128, 256, 0, 2),  # by registers: 16 warps of 4,096
        (129, 256, 0, 1),  # allocated by 256 a warp: 136 a thread, 15 warps, in fours 12
        (168, 384, 0, 1),
        (32, 256, 48 << 10, 3),  # 49 KiB with the system's
    ],
)
def test_occupancy_on_an_a100(registers, threads, shared, blocks):
    """Figures of NVIDIA's occupancy calculator."""
    kernel = checker.Kernel(registers=registers, threads=threads)
    assert checker.occupancy(kernel, shared, checker.MULTIPROCESSORS["sm_80"]) == blocks


def test_kernels_are_named_by_what_they_do():
    names = {
        "void omni::cuda::(anonymous namespace)::mma_kernel<(omni::cuda::Kind)1, 64, __half, float>": (
            "mma_kernel, dgrad, tiles of 64 rows"
        ),
        "void omni::cuda::(anonymous namespace)::permute_kernel<uint4>": "permute_kernel",
        "omni::cuda::(anonymous namespace)::check_offsets": "check_offsets",
    }
    assert {name: checker.family(name) for name in names} == names


@pytest.fixture(scope="module")
def found():
    return checker.check()


OF_PICTURES = ("modulated_norm", "rotary_norm", "swiglu", "joint_attention")  # plain torch on a GPU (ops/dit.py)
CPU_ONLY = {f"megatron_omni::{name}{end}" for name in OF_PICTURES for end in ("", "_backward")}
CPU_ONLY.add("megatron_omni::cached_attention")  # a GPU has kernels for sequences of any length (generation/cache.py)


@built
def test_objects_hold_code_for_every_device(found):
    assert found.wrong == []
    assert {"sm90_forward_bf16", "sm90_wgrad_fp16", "grouped_gemm_mma"} <= {row["object"] for row in found.totals}


@built
def test_table_of_registers_in_the_documents_is_current(found):
    """`python tools/check_cuda_objects.py --markdown docs/kernels.md` writes it. Other compilers give other registers."""
    page = checker.in_page((ROOT / "docs" / "kernels.md").read_text())
    if f"Compiled by nvcc {checker.nvcc_release()}." not in page:
        pytest.skip(f"the table is of another compiler than nvcc {checker.nvcc_release()}")
    assert page == checker.markdown(found)


@built
def test_loads_without_a_gpu_and_covers_every_op():
    assert extension.CUDA_ERROR is None
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("megatron_omni::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cpu = {n for n in names if has(n, "CPU")}
    assert len(on_cpu) >= 10
    assert {n for n in on_cpu if not has(n, "CUDA")} == CPU_ONLY
