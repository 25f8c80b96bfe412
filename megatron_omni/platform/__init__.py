"""The machine below: device, collective backend, seeds, and the patches that let megatron-core run on a CPU."""
