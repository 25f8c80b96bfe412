"""Peak dense bf16 rate of known accelerators, from their makers' data sheets; the denominator of MFU."""

import torch

from megatron_omni.platform.device import accelerator_present, device

# Substring of the device name -> dense bf16 TFLOP/s (without sparsity). A card of lower power or fewer units than the
# module of its name (PCIe, NVL) stands before it: the first that fits counts.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}


def peak_of(name: str) -> float | None:
    """Peak of the device of this name (as the driver gives it); None where it is not known, and for a part of a GPU."""
    if " MIG " in name:
        return None
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def peak_tflops() -> float | None:
    """Peak of this process's device; None where it is not known, and on a CPU."""
    return peak_of(torch.cuda.get_device_name(device())) if accelerator_present() else None
