"""What tests/stress/answers.py takes for a tie: margins of routers against their rule, and which differences they excuse."""

import math

import pytest
import torch

from megatron_omni.generation.batches import Result
from megatron_omni.ops.topp_route import RoutingRule, select_slots
from tests.stress.answers import compared, routing_margin


def rule_of(**more: object) -> RoutingRule:
    return RoutingRule(**{"num_routed": 3, "num_null": 1, "top_p": 0.7, **more})  # type: ignore[arg-type]


def test_margins_by_hand() -> None:
    rows = [[0.1, 0.5, 0.3, 0.1], [0.5, 0.25, 0.2, 0.05], [0.2500001, 0.25, 0.25, 0.2499999]]
    p = torch.tensor(rows, dtype=torch.float64)
    z = torch.cat([p.log(), torch.full((3, 1), 9.0)], dim=1)  # a shared expert's column
    margins = routing_margin(z, rule_of()).tolist()
    # 0.5, 0.8: 0.1 past 0.7, 0.2 to the third. 0.5, 0.75: 0.05. 0.25, 0.5, 0.75: 0.05, but the last two are equal.
    assert margins == pytest.approx([0.1, 0.05, 1e-7], rel=1e-3)
    by_count = routing_margin(z, rule_of(top_k=2)).tolist()
    assert by_count == pytest.approx([0.2, 0.05, 0.0], abs=1e-9)
    assert routing_margin(z, rule_of(top_k=4)).tolist() == [math.inf] * 3


@pytest.mark.parametrize("more", [{}, {"top_k": 2}])
def test_no_token_is_routed_otherwise_by_less_than_its_margin(more: dict[str, int]) -> None:
    """And by a little more than it, some are."""
    rule = rule_of(**more)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    margin = routing_margin(z, rule)
    p = torch.softmax(z, 1)
    changed = {}
    for share in (0.2, 4.0):
        # Each sum moves by at most half of what all entries move by, so this is less than a share of the margin.
        move = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        move -= move.mean(1, keepdim=True)
        move *= share * margin.unsqueeze(1) / move.abs().sum(1, keepdim=True)
        moved = (p + move).clamp_min(1e-12).log()
        changed[share] = (select_slots(moved, rule).mask != select_slots(z, rule).mask).any(1).sum().item()
    assert changed[0.2] == 0 and changed[4.0] > 400


def test_a_difference_is_excused_by_a_tie_at_or_before_it_alone() -> None:
    def result(name: str, ids: list[int], gap: float = 1.0) -> Result:
        tops = [((0, -0.1), (1, -0.1 - gap))] * len(ids)
        return Result(name=name, sample=0, ids=ids, top=tops)  # type: ignore[arg-type]

    far, near = [1.0, 1.0, 1.0], [1.0, 1e-7, 1e-7]
    alone = {(n, 0): result(n, [1, 2, 3]) for n in "abcd"} | {("e", 0): result("e", [1, 2, 3], gap=1e-5)}
    answers = {"a": [1, 2, 3], "b": [1, 2, 4], "c": [1, 2, 4], "d": [9, 2, 3], "e": [9, 2, 3]}
    got = {(n, 0): result(n, ids) for n, ids in answers.items()}
    margins = {("a", 0): near, ("b", 0): far, ("c", 0): near, ("d", 0): near, ("e", 0): far}
    ties, wrong = compared(got, alone, margins)
    assert sorted(ties) == ["c", "e"]
    assert [line[:10] for line in wrong] == ["('b', 0) a", "('d', 0) a"]
