"""Every test runs on the CPU platform, with one thread a process: several ranks share few cores.

Hypothesis draws the same examples every time, so that chance never decides whether a change is good; whoever looks for
new ones runs ``pytest FILES --hypothesis-profile random`` and stores what it finds as an ``@example``.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=60)
settings.register_profile("random", derandomize=False, database=None, deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("fixed")

torch.set_num_threads(1)

from megatron_omni.platform.device import install  # noqa: E402

install()

from tests.trained import Trained, train_tiny  # noqa: E402


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The one tiny checkpoint of all tests of a process."""
    return train_tiny(tmp_path_factory.mktemp("trained"))
