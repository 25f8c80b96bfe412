"""Every test runs on the CPU platform, with one thread a process: several ranks share few cores.

Hypothesis draws the same examples every time, so that chance never decides whether a change is good; whoever looks for
new ones runs ``pytest FILES --hypothesis-profile random`` and stores what it finds as an ``@example``.

The garbage collector rests while modules are imported and is not shown again what they left: a search of it all takes a
quarter of a second, and every start of ranks makes one (tests/distributed/harness.py).
"""

import gc
import os
import sys
from pathlib import Path

gc.disable()
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=60)
settings.register_profile("random", derandomize=False, database=None, deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("fixed")

torch.set_num_threads(1)

# Where there is no GPU, torch's fake tensors pretend that there are eight. Autograd counts devices once, at a process'
# first backward, and starts a thread for each, after which ranks cannot be forked: so it counts here, before a test fakes.
torch.ones((), requires_grad=True).backward()

LONGEST = ("test_slurm", "test_sanitized", "test_tiny_recipes", "test_gpu_check", "test_upcycle", "test_readme")

from megatron_omni.platform.device import install  # noqa: E402

install()

from tests.drawing import train_drawing  # noqa: E402
from tests.trained import Trained, train_tiny  # noqa: E402


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The one tiny checkpoint of all tests of a process."""
    return train_tiny(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def draws(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The one tiny checkpoint that draws."""
    return train_drawing(tmp_path_factory.mktemp("draws"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """What is there now stays."""
    gc.collect()
    gc.freeze()
    gc.enable()
