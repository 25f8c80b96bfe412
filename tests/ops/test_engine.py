"""Which engine the CPU kernels run on: the fastest that there is, the one that is asked for, or an error."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_omni.models.moe import kernels
from megatron_omni.ops import extension
from megatron_omni.ops.extension import use_cpu_engine
from megatron_omni.ops.grouped_gemm import grouped_gemm
from tests.ops.ragged import ENGINES

PROGRAM = """
import torch
from megatron_omni.ops import extension
from megatron_omni.ops.grouped_gemm import grouped_gemm
try:
    y = grouped_gemm(torch.ones(2, 3), torch.ones(1, 3, 4), torch.tensor([0, 2]))
    print(extension.cpu_engine(), extension.cpu_engine_is_forced(), bool((y == 3).all()))
except ValueError as error:
    print(error)
"""


def run_with(choice: str | None) -> str:
    """What PROGRAM prints under OMNI_CPU_KERNELS=choice."""
    environment = {name: value for name, value in os.environ.items() if name != "OMNI_CPU_KERNELS"}
    environment |= {} if choice is None else {"OMNI_CPU_KERNELS": choice}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def processor_flags() -> set[str]:
    with open("/proc/cpuinfo") as lines:
        return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def test_engines_are_those_of_the_processor():
    flags = processor_flags()
    expected = ["avx512"] if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags else []
    expected += ["avx2"] if {"avx2", "fma"} <= flags else []
    assert [*expected, "portable"] == ENGINES


def test_the_variable_chooses_and_an_absent_or_unknown_engine_is_an_error():
    """An op stops with the variable, its value and what there is; nothing runs on another engine instead."""
    assert run_with(None) == f"{ENGINES[0]} False True"
    assert run_with("portable") == "portable True True"
    names = ", ".join(ENGINES)
    absent = next((name for name in ("avx512", "avx2") if name not in ENGINES), "neon64")
    for choice in (absent, "AVX2"):
        assert run_with(choice) == (
            f"OMNI_CPU_KERNELS={choice}: this machine can run {names}; name one of these, or none for the fastest"
        )


def test_an_engine_is_named_for_a_while():
    before = extension.cpu_engine(), extension.cpu_engine_is_forced()
    for engine in ENGINES:
        with use_cpu_engine(engine):
            assert (extension.cpu_engine(), extension.cpu_engine_is_forced()) == (engine, True)
            with use_cpu_engine("portable"):
                assert extension.cpu_engine() == "portable"
            assert extension.cpu_engine() == engine
    with pytest.raises(ValueError, match="engine=fast: this machine can run"), use_cpu_engine("fast"):
        pass
    assert (extension.cpu_engine(), extension.cpu_engine_is_forced()) == before


@pytest.mark.skipif(extension.cpu_engine_is_forced(), reason="OMNI_CPU_KERNELS is set")
def test_plain_cpp_runs_only_when_it_is_asked_for(monkeypatch):
    """On a processor that has no engine of ours, omni is torch's composition, and is called so."""
    assert kernels.backend_of("omni") == f"omni({ENGINES[0] if ENGINES != ['portable'] else 'torch'})"
    monkeypatch.setattr(extension, "cpu_engine", lambda: "portable")
    assert kernels.backend_of("omni") == "omni(torch)"
    assert kernels.load_kernels.__wrapped__("omni") == kernels.load_kernels.__wrapped__("torch")
    monkeypatch.undo()
    with use_cpu_engine("portable"):
        assert kernels.backend_of("omni") == "omni(portable)"
        assert kernels.load_kernels.__wrapped__("omni").expert_mlp is kernels.omni_expert_mlp
        x, w = torch.ones(2, 3), torch.ones(1, 3, 4)
        assert torch.equal(grouped_gemm(x, w, torch.tensor([0, 2])), torch.full((2, 4), 3.0))
