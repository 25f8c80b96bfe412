"""Peak rates by the names that drivers give: a card of a module's name has the card's own rate."""

import pytest

from megatron_omni.config.run import LogConfig
from megatron_omni.platform.device import accelerator_present
from megatron_omni.platform.peak import peak_of
from megatron_omni.training.profile import check_snapshot


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_a_device_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


@pytest.mark.skipif(accelerator_present(), reason="this machine has a GPU")
def test_a_memory_snapshot_needs_a_gpu() -> None:
    check_snapshot(LogConfig())
    with pytest.raises(ValueError, match=r"log.memory_snapshot=true: only a GPU's allocations can be recorded"):
        check_snapshot(LogConfig(memory_snapshot=True))
