"""Our Euler against diffusers' FlowMatchEulerDiscreteScheduler on our grid; its time runs the other way."""

import pytest
import torch

from megatron_omni.models.generators.flow import euler


def test_euler_is_diffusers_scheduler() -> None:
    pytest.importorskip("diffusers", reason="the extra `image`")
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    count = 8
    scheduler.set_timesteps(sigmas=(1 - torch.linspace(0, 1, count)[:-1]).tolist())
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x) + t.view(-1, 1, 1, 1)

    theirs = noise
    for step, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        theirs = scheduler.step(-velocity(theirs, torch.full((2,), 1 - sigma.item())), step, theirs).prev_sample
    torch.testing.assert_close(euler(velocity, noise, count - 1), theirs, rtol=0, atol=1e-6)
