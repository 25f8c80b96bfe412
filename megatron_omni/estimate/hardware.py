"""Accelerators by their data sheets, and how much of a sheet's rate training is assumed to reach.

Rates of ``GPUS`` are the makers' (dense bf16, one direction of a link, network of 400 Gb/s a GPU). Shares of
``STATED`` are not ours: no figure of this project was measured on a GPU. They are what published measurements of the
same kind of kernel reach on Hopper: cuBLAS 0.6 to 0.8 of the sheet, grouped products of mixtures 0.55 (SonicMoE, arXiv
2512.14080: over 550 TFLOP/s), flash attention of forward and backward together 0.35 to 0.45. Give ``megatron-omni plan
--measured`` the JSON of ``tools/bench_moe.py`` to replace the share of the experts by your own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_omni.foreign import read_json


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator and its links."""

    name: str
    memory_gib: float
    """What the driver gives out."""
    tflops: float
    """Dense bf16."""
    memory_gb_s: float
    link_gb_s: float
    """To the other GPUs of its node, one direction."""
    network_gb_s: float = 50.0
    """To other nodes."""
    gpus_per_node: int = 8


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="A100-80GB", memory_gib=79.1, tflops=312.0, memory_gb_s=2039.0, link_gb_s=300.0, network_gb_s=25.0),
        Gpu(name="H100-80GB", memory_gib=79.6, tflops=989.0, memory_gb_s=3350.0, link_gb_s=450.0),
        Gpu(name="H200-141GB", memory_gib=139.8, tflops=989.0, memory_gb_s=4800.0, link_gb_s=450.0),
        Gpu(name="B200-180GB", memory_gib=178.0, tflops=2250.0, memory_gb_s=8000.0, link_gb_s=900.0),
    )
}


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a data sheet's rate."""

    dense: float = 0.60
    """Matrix products of attention, shared experts and output layer."""
    experts: float = 0.50
    """Grouped products of routed experts."""
    attention: float = 0.40
    """Attention scores."""
    encoders: float = 0.40
    memory: float = 0.70
    """Of memory bandwidth, for everything that is no matrix product."""
    links: float = 0.70
    measured: tuple[str, ...] = ()
    """Names of the shares that were measured; the others are stated."""


STATED = Efficiency()


def with_measured_experts(efficiency: Efficiency, path: Path, gpu: Gpu) -> Efficiency:
    """``efficiency`` with the experts' share from rows of ``tools/bench_moe.py --json``.

    The bf16 rows of ``expert_mlp`` by ``omni`` count: mean of forward and backward rates. ValueError names what is missing.
    """
    try:
        rows: Iterable[dict[str, Any]] = read_json(path)
        rates = [
            float(row["gflops"])
            for row in rows
            if (row["op"], row["contender"], row["dtype"]) == ("expert_mlp", "omni", "bf16")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured {path}: not the JSON of tools/bench_moe.py ({error})") from error
    if not rates:
        raise ValueError(f"--measured {path}: has no bf16 row of expert_mlp by omni; run bench_moe with --dtype bf16")
    return replace(efficiency, experts=fmean(rates) / 1e3 / gpu.tflops, measured=(*efficiency.measured, "experts"))
