"""Scores of a recipe's held-out sets while it trains: the tasks, the engine and the metrics of ``megatron-omni evaluate``."""

import logging
from collections.abc import Callable
from pathlib import Path

from megatron_omni.config.run import Recipe
from megatron_omni.data.builders import prompt_builder
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.evaluation.running import answers_of, limits_for
from megatron_omni.evaluation.summary import summarise, unused
from megatron_omni.evaluation.task import held_out_config, open_task
from megatron_omni.parallel.groups import replica
from megatron_omni.training.setup import Run

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
"""Answers that are computed together."""


class HeldOutScores:
    """Makes the tasks of all held-out sets that name a metric; ValueError for what can never be scored."""

    def __init__(self, recipe: Recipe) -> None:
        self.tasks = [
            open_task(held_out_config(source), file=f"data.eval_sources.{source.name}", folder=Path())
            for source in recipe.data.eval_sources
            if source.metric is not None
        ]
        self._builder: SampleBuilder | None = None

    def __call__(self, run: Run, moved: Callable[[], None]) -> dict[str, float]:
        """``eval/METRIC/NAME`` of each; all ranks together. A set of which nothing counts has none."""
        if not self.tasks:
            return {}
        self._builder = self._builder or prompt_builder(run.recipe)
        lines = answers_of(
            run.model, self._builder, self.tasks, pg=run.pg, limits=limits_for(BATCH_SIZE), moved=moved,
            threads=max(1, run.recipe.data.num_workers),
        )  # fmt: skip
        scores = {}
        for task in self.tasks:
            summary = summarise(task, lines[task.name])
            if run.pg.dp.rank() == replica(run.pg).rank() == 0:
                for said in unused(lines[task.name], task.name):
                    logger.warning("%s", said)
            if summary.score is not None:
                scores[f"eval/{task.config.metric}/{task.name}"] = summary.score
        return scores
