"""Figures of iterations between two records: sums and counts that ranks add up, maxima, scores of the reward functions."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_omni.batch import Modality
from megatron_omni.data.prompts import Prompt
from megatron_omni.rewards import Scores
from megatron_omni.rewards.score import join
from megatron_omni.tasks.responding import Response


@dataclass
class Figures:
    """What a rank measured; plain numbers, so that ranks can tell each other."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    """Name -> sum and count: a mean."""
    largest: dict[str, float] = field(default_factory=dict)
    scores: list[Scores] = field(default_factory=list)

    def add(self, name: str, total: float, count: float) -> None:
        """Add to a mean."""
        found = self.sums.setdefault(name, [0.0, 0.0])
        found[0] += total
        found[1] += count

    def raise_to(self, name: str, value: float) -> None:
        """Add to a maximum."""
        self.largest[name] = max(value, self.largest.get(name, value))

    def plain(self) -> dict[str, Any]:
        """As JSON knows it; :meth:`merge` reads it."""
        return asdict(self)

    def merge(self, parts: Iterable[dict[str, Any]]) -> None:
        """Add what other ranks measured of the same thing."""
        parts = list(parts)
        for part in parts:
            for name, (total, count) in part["sums"].items():
                self.add(name, total, count)
            for name, value in part["largest"].items():
                self.raise_to(name, value)
        scores = [Scores(**scores) for part in parts for scores in part["scores"]]
        if scores:
            self.scores.append(join(scores))

    def metrics(self) -> dict[str, float]:
        """Of all that was added."""
        found = {name: total / count for name, (total, count) in self.sums.items() if count}
        found |= self.largest
        return found | (join(self.scores).metrics() if self.scores else {})

    def take(self) -> dict[str, float]:
        """The metrics; starts again from nothing."""
        found = self.metrics()
        self.sums, self.largest, self.scores = {}, {}, []
        return found


def of_responses(
    prompts: Sequence[Prompt], responses: dict[int, list[Response]], scores: Scores | None, source_names: Sequence[str]
) -> Figures:
    """Of one replica's responses, once they have advantages."""
    figures = Figures(scores=[] if scores is None else [scores])
    for prompt in prompts:
        group = responses[prompt.number]
        totals = [r.total for r in group if r.total is not None]
        for name in (f"source/{source_names[prompt.source]}", *map("modality/{}".format, modalities(prompt))):
            figures.add(f"reward/{name}", sum(totals), len(totals))
        figures.add("rollout/length", sum(len(r.ids) for r in group), len(group))
        figures.add("rollout/near_edge", sum(r.near_edge for r in group), sum(len(r.ids) for r in group))
        figures.add("rollout/cut", sum(r.finish == "length" for r in group), len(group))
        figures.add("groups/kept", any(r.kept for r in group), 1)
        first = [next(iter(r.values.values()), None) for r in group]
        same = None not in first and len(set(first)) == 1
        right = same and first[0] is not None and first[0] > 0.5
        figures.add("groups/all_right", right, 1)
        figures.add("groups/all_wrong", same and not right, 1)
    return figures


def modalities(prompt: Prompt) -> list[str]:
    """What a prompt shows, ``text`` where it has no media."""
    shown = {int(value) for value in prompt.modality.unique()} - {int(Modality.TEXT)}
    return [Modality(value).name.lower() for value in sorted(shown)] or ["text"]
