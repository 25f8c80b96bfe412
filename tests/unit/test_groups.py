"""The groups of a run: none that nobody uses."""

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.parallel import groups


def test_no_group_is_made_a_second_time_for_the_cpu() -> None:
    """Megatron can give each data-parallel group a gloo twin: a full mesh of connections between up to hundreds of ranks."""
    groups.initialize(ParallelConfig())
    try:
        held = {name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)}
        assert held and not [name for name in held if "GLOO" in name]
    finally:
        groups.destroy()
