"""Every test runs on the CPU platform, with one thread a process: several ranks share few cores."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

torch.set_num_threads(1)

from megatron_omni.platform.device import install  # noqa: E402

install()
