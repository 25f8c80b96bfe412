"""Which engine the CPU kernels run on: the fastest that there is, the one that is asked for, or an error."""

import pytest
import torch

from megatron_omni.models.moe import kernels
from megatron_omni.ops import extension
from megatron_omni.ops.extension import use_cpu_engine
from megatron_omni.ops.grouped_gemm import grouped_gemm
from tests.ops.ragged import ENGINES


@pytest.fixture
def choose(monkeypatch):
    """A function that sets OMNI_CPU_KERNELS as if the process had started with it; None unsets it."""

    def start_with(choice):
        if choice is None:
            monkeypatch.delenv("OMNI_CPU_KERNELS", raising=False)
        else:
            monkeypatch.setenv("OMNI_CPU_KERNELS", choice)
        extension.op("set_cpu_engine")("")  # reads the variable again

    yield start_with
    monkeypatch.undo()
    extension.op("set_cpu_engine")("")


def multiply():
    return grouped_gemm(torch.ones(2, 3), torch.ones(1, 3, 4), torch.tensor([0, 2]))


def processor_flags() -> set[str]:
    with open("/proc/cpuinfo") as lines:
        return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def test_engines_are_those_of_the_processor():
    flags = processor_flags()
    expected = ["avx512"] if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags else []
    expected += ["avx2"] if {"avx2", "fma"} <= flags else []
    expected += ["neon"] if "asimd" in flags else []
    assert [*expected, "portable"] == ENGINES


def test_the_variable_chooses_and_an_absent_or_unknown_engine_is_an_error(choose):
    """An op stops with the variable, its value and what there is; nothing runs on another engine instead."""
    for choice, runs in ((None, ENGINES[0]), ("", ENGINES[0]), ("portable", "portable")):
        choose(choice)
        assert (extension.cpu_engine(), extension.cpu_engine_is_forced()) == (runs, bool(choice))
        assert torch.equal(multiply(), torch.full((2, 4), 3.0))
    absent = {"avx512", "avx2", "neon"} - set(ENGINES)  # of other processors
    for choice in (*absent, "AVX2"):
        message = f"^OMNI_CPU_KERNELS={choice}: this machine can run {', '.join(ENGINES)}; name one of these, or none"
        with pytest.raises(ValueError, match=message):
            choose(choice)
        with pytest.raises(ValueError, match=message):
            multiply()


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
def test_unmeasured_engines_run_only_when_they_are_asked_for(monkeypatch):
    """Where no engine of ours was measured (plain C++, Arm), omni is torch's composition, and is called so."""
    assert kernels.backend_of("omni") == f"omni({ENGINES[0] if ENGINES[0] in extension.MEASURED_ENGINES else 'torch'})"
    for unmeasured in ("neon", "portable"):
        monkeypatch.setattr(extension, "cpu_engine", lambda name=unmeasured: name)
        assert kernels.backend_of("omni") == "omni(torch)"
        assert kernels.load_kernels.__wrapped__("omni") == kernels.load_kernels.__wrapped__("torch")
    monkeypatch.setattr(extension, "cpu_engine_is_forced", lambda: True)
    monkeypatch.setattr(extension, "cpu_engine", lambda: "neon")
    assert kernels.backend_of("omni") == "omni(neon)"
    monkeypatch.undo()
    with use_cpu_engine("portable"):
        assert kernels.backend_of("omni") == "omni(portable)"
        assert kernels.load_kernels.__wrapped__("omni").expert_mlp is kernels.omni_expert_mlp
