"""What :mod:`megatron_omni.platform.allocator` changes, counted in page faults of fresh processes."""

import subprocess
import sys

import pytest

PROBE = """
import resource, sys
import torch
if sys.argv[1] == "keep":
    from megatron_omni.platform.allocator import keep_freed_memory
    print(keep_freed_memory())
source = torch.ones(64 << 18)
def copies(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        source.clone()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
copies(20)
print(copies(10))
"""


def probe(mode: str, **environment: str) -> list[str]:
    clean = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, mode], env=clean, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_tensors_are_used_again():
    """64 MiB is 16384 pages: fresh ones for every copy by default, none afterwards."""
    (default,) = probe("leave")
    done, kept = probe("keep")
    assert done == "True" and int(default) > 100_000 and int(kept) < 1000, (default, kept)


def test_a_users_own_settings_stand():
    done, faults = probe("keep", MALLOC_MMAP_THRESHOLD_="131072")
    assert done == "False" and int(faults) > 100_000
