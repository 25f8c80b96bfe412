"""The learning-rate schedule, step by step, from its definition."""

import pytest
import torch

from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.run import Recipe
from megatron_omni.training.optimizer import build_schedule


def rates(optim: OptimConfig, *, steps: int) -> list[float]:
    """Learning rate that each update uses."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, Recipe(train_iters=steps, optim=optim))
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    return used


def test_wsd_warms_up_stays_and_decays_linearly() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.2, lr_warmup_iters=4, lr_decay_style="WSD", lr_wsd_decay_iters=5)
    expected = [0.0, 0.25, 0.5, 0.75, *[1.0] * 12, 0.84, 0.68, 0.52, 0.36]
    assert rates(optim, steps=20) == pytest.approx(expected)


def test_linear_falls_to_its_minimum() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.0, lr_warmup_iters=0, lr_decay_style="linear")
    assert rates(optim, steps=4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
