"""How sure a score is, and whether two differ: from the statistics of samples, for any metric.

Standard error of a mean: s / sqrt(n). Of another score (a corpus error rate, BLEU): the standard deviation over 1,000
bootstrap draws of the samples. Two results on the same samples are compared pairwise: the same draws for both, and for
right and wrong the exact sign test over the samples that changed (McNemar).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_omni.scoring import Metric

DRAWS = 1000
AT_ONCE = 2_000_000
"""Numbers of the counts that are drawn together."""


def score_of(metric: Metric, statistics: Sequence[Sequence[float]]) -> float | None:
    """The score of samples; None where none counts."""
    if not statistics:
        return None
    return metric.combine(np.array(statistics, dtype=np.float64).sum(axis=0).tolist(), len(statistics))


def standard_error(metric: Metric, statistics: Sequence[Sequence[float]], *, seed: int = 0) -> float | None:
    """None where fewer than two samples count."""
    if len(statistics) < 2:
        return None
    values = np.array(statistics, dtype=np.float64)
    if metric.is_mean:
        return float(values[:, 0].std(ddof=1) / np.sqrt(len(values)))
    (drawn,) = _bootstrap(metric, [values], seed)
    return float(drawn.std(ddof=1))


def _bootstrap(metric: Metric, sides: Sequence[NDArray[np.float64]], seed: int) -> list[NDArray[np.float64]]:
    """Scores [DRAWS] of each side under the same draws of samples with replacement."""
    rng, count = np.random.default_rng(seed), len(sides[0])
    scores: list[list[float]] = [[] for _ in sides]
    step = max(1, AT_ONCE // count)
    for first in range(0, DRAWS, step):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(step, DRAWS - first)).astype(np.float64)
        for side, found in zip(sides, scores):
            found += [metric.combine(sums, count) for sums in (times @ side).tolist()]
    return [np.array(found) for found in scores]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two results on the same samples."""

    first: float
    second: float
    low: float
    """Of ``second - first``, 2.5 % of the draws lie below."""
    high: float
    """97.5 % lie below."""
    p: float
    """Two-sided: twice the share of the draws on the other side of 0, of which one is always counted."""


def paired(
    metric: Metric, first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, seed: int = 0
) -> Paired | None:
    """Bootstrap of the difference over samples that both have; None where there is none."""
    if not first:
        return None
    sides = [np.array(first, dtype=np.float64), np.array(second, dtype=np.float64)]
    scores = [metric.combine(side.sum(axis=0).tolist(), len(side)) for side in sides]
    before, after = _bootstrap(metric, sides, seed)
    difference = after - before
    low, high = np.quantile(difference, [0.025, 0.975]).tolist()
    tail = min((difference <= 0).sum(), (difference >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (DRAWS + 1))
    return Paired(first=scores[0], second=scores[1], low=low, high=high, p=p)


def sign_test(better: int, worse: int) -> float:
    """Two-sided probability of so uneven a split of the samples that changed, if both directions were alike."""
    from scipy.stats import binomtest  # half a second that training's start needs not wait for

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
