"""Intersection over union of segments of time ``[start, end]`` or boxes ``[left, top, right, bottom]``."""

from collections.abc import Sequence

from megatron_omni.scoring.metric import Metric, Scored, mean_of, yes_or_no
from megatron_omni.scoring.numeric import NUMBER, parse_number

NUMBERS = {"segment": 2, "box": 4}


def numbers_in(written: str) -> list[float]:
    """All numbers of a text, in their order. A hyphen between two numbers is no sign."""
    found = [parse_number(match[0]) for match in NUMBER.finditer(written)]
    return [value for value in found if value is not None]


class IoU(Metric):
    """The mean over samples, or with ``threshold`` the share of samples that reach it (R@1 of temporal grounding)."""

    def __init__(self, kind: str = "segment", threshold: float | None = None) -> None:
        if kind not in NUMBERS:
            raise ValueError(f"metric_settings: kind = {kind!r}; give one of {', '.join(NUMBERS)}")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"metric_settings: threshold = {threshold}; it must be above 0 and at most 1")
        self._kind, self._threshold, self.rule = kind, threshold, kind
        self.version = f"iou/1 kind={kind} threshold={threshold}"

    def check(self, expected: Sequence[str], options: Sequence[str] | None) -> None:
        """References have the numbers, each end behind its start."""
        for one in expected:
            values = numbers_in(one)
            if len(values) != NUMBERS[self._kind] or not all(low < high for low, high in _sides(values)):
                said = "[start, end]" if self._kind == "segment" else "[left, top, right, bottom]"
                raise ValueError(f"expected = {one!r} is no {self._kind}; write {said}, the second above the first")

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """The best over references."""
        given = numbers_in(answer) if answer is not None else []
        best = max(_iou(given, numbers_in(one)) for one in expected)
        return mean_of(best) if self._threshold is None else yes_or_no(best >= self._threshold)


def _sides(values: Sequence[float]) -> list[tuple[float, float]]:
    half = len(values) // 2
    return list(zip(values[:half], values[half:]))


def _iou(given: Sequence[float], target: Sequence[float]) -> float:
    if len(given) != len(target):
        return 0.0
    common = size = other = 1.0
    for (low, high), (left, right) in zip(_sides(given), _sides(target)):
        common *= max(0.0, min(high, right) - max(low, left))
        size *= max(0.0, high - low)
        other *= right - left
    return common / (size + other - common)
