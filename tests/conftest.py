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

LONGEST = ("test_slurm", "test_sanitized", "test_tiny_recipes")
FORKING = ("distributed", "recipes", "serve", "slurm")
ALSO_FORKING = ("test_sanitized", "test_token_log_probs", "test_cli_generate", "test_uni_moe_layout", "test_uni_moe_files",
                "test_train_cli", "test_upcycle", "test_export", "test_conversion_parity", "test_uni_moe_parity")  # fmt: skip

from megatron_omni.platform.device import install  # noqa: E402

install()

from tests.trained import Trained, train_tiny  # noqa: E402


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The one tiny checkpoint of all tests of a process."""
    return train_tiny(tmp_path_factory.mktemp("trained"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests fork ranks come before those that compute gradients in this very process, from which PyTorch may
    refuse to fork; of them, those that take longest begin."""

    def turn(item: pytest.Item) -> tuple[bool, bool]:
        forks = item.path.parent.name in FORKING or item.path.stem in ALSO_FORKING
        return not forks, item.path.stem not in LONGEST

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """What is there now stays."""
    gc.collect()
    gc.freeze()
    gc.enable()
