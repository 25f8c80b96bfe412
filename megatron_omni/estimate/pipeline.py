"""How a split of the blocks over pipeline stages does, and the split whose slowest stage is fastest.

With m micro-batches a step, on p stages of which stage s takes t_s for one (forward and backward), 1F1B takes

    step   = sum_s t_s + (m - 1) max_s t_s
    bubble = 1 - m sum_s t_s / (p step)           the share of the ranks' time in which they wait for each other

Equal stages give (p - 1) / (m + p - 1). The step is exact where all stages are equal or the last is the slowest, and an
upper bound elsewhere: ranks before the last begin other micro-batches while they wait.
"""

from collections.abc import Sequence


def bubble(stages: Sequence[float], num_micro_batches: int) -> float:
    """Share of the ranks' time in which they wait; ``stages``: seconds of a micro-batch on each."""
    step = sum(stages) + (num_micro_batches - 1) * max(stages)
    return 1 - num_micro_batches * sum(stages) / (len(stages) * step)


def balanced(num_blocks: int, *, block: float, others: Sequence[float]) -> list[int]:
    """Blocks of each stage, one at least, such that the slowest stage takes as little as it can.

    ``block``: seconds of one; ``others``: of what a stage has besides. Blocks are equal, so to give each to the stage that
    would be done first with it is optimal; of two such the later one, which keeps fewer micro-batches.
    """
    assert num_blocks >= len(others), "a stage without a block"
    split = [1] * len(others)
    for _ in range(num_blocks - len(others)):
        first = min(range(len(split)), key=lambda s: (others[s] + (split[s] + 1) * block, -s))
        split[first] += 1
    return split
