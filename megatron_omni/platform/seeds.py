"""Random streams: every draw comes from a generator that is named by what it is for.

``named_seed(seed, "language.decoder.layers.0.mlp", ...)`` is a 63-bit BLAKE2 hash of its arguments, so that a stream
depends on its name alone: not on the layout, not on how many numbers were drawn before it, not on the run having been
resumed.
"""

import hashlib
import random

import numpy
import torch


def named_seed(seed: int, *names: str | int) -> int:
    """63-bit seed of the stream called ``names`` under the run's ``seed``."""
    text = "\x1f".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def named_generator(seed: int, *names: str | int) -> torch.Generator:
    """CPU generator of the stream called ``names``; the same numbers on every machine and layout."""
    return torch.Generator().manual_seed(named_seed(seed, *names))


def seed_everything(seed: int, *, tp_rank: int = 0, ep_rank: int = 0, expert_tp_rank: int = 0) -> None:
    """Seed the global generators of Python, NumPy, torch and Megatron's tracker (dropout inside tensor-parallel
    regions)."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(named_seed(seed, "python"))
    numpy.random.seed(named_seed(seed, "numpy") % 2**32)
    torch.manual_seed(named_seed(seed, "torch"))
    # Megatron adds small offsets to the seed and refuses to see one twice.
    tracker_seed = named_seed(seed, "megatron") % 2**31
    model_parallel_cuda_manual_seed(
        tracker_seed, tp_rank=tp_rank, ep_rank=ep_rank, etp_rank=expert_tp_rank, force_reset_rng=True
    )
