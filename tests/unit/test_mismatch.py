"""Sampler against trainer: per response, against the definition written as loops."""

import math

import torch

from megatron_omni.losses.mismatch import LIMIT, mismatch


def test_each_response_is_measured_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 9, 3]
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    trained, sampled = (-torch.rand(4, 9, generator=generator) * 3 for _ in range(2))
    found = mismatch(trained, torch.where(valid, sampled, torch.nan), valid)  # behind the end there may be anything
    for i, length in enumerate(lengths):
        d = [float(trained[i, t].double() - sampled[i, t].double()) for t in range(length)]
        assert math.isclose(float(found.sequence[i]), abs(sum(d)) / length, rel_tol=1e-12)
        assert math.isclose(float(found.token[i]), sum(map(abs, d)) / length, rel_tol=1e-12)
        assert math.isclose(float(found.largest[i]), max(map(abs, d)), rel_tol=1e-12)


def test_what_differs_too_much_is_dropped_and_what_cancels_is_not() -> None:
    valid = torch.ones(5, 4, dtype=torch.bool)
    valid[4, 2:] = False
    sampled = torch.full((5, 4), -1.0)
    trained = sampled.clone()
    trained[1] += LIMIT + 1e-3
    trained[2] += torch.tensor([0.5, -0.5, 0.5, -0.5])  # noise, whose mean is nothing
    trained[3, 0] = torch.nan
    trained[4, 2:] = 7.0  # behind its end
    assert mismatch(trained, sampled, valid).dropped.tolist() == [False, True, False, True, False]
