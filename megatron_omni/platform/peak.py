"""Peak dense bf16 rate of known accelerators, from their makers' data sheets; the denominator of MFU."""

import torch

from megatron_omni.platform.device import accelerator_present, device

# Substring of the device name -> dense bf16 TFLOP/s (without sparsity).
PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0}


def peak_tflops() -> float | None:
    """Peak of this process's device; None where it is not known, and on a CPU."""
    if not accelerator_present():
        return None
    name = torch.cuda.get_device_name(device())
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
