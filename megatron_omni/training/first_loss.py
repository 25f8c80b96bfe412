"""The loss of a run's first step, recorded beside the converted checkpoint that it starts from.

A run that starts there later logs its own first loss beside the recorded one (training/loop.py): a wrong conversion, a
changed recipe or another data order shows at once. The loss is what training logs at step 1: same samples, same
routing draws, before any update.
"""

from functools import partial
from pathlib import Path

import torch

from megatron_omni.checkpoint.ledger import converted_directory, record_loss
from megatron_omni.config.load import recipe_to_dict
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
from megatron_omni.parallel.groups import destroy
from megatron_omni.parallel.schedule import run_step
from megatron_omni.training.logger import sum_reports
from megatron_omni.training.loop import aux_loss_scale
from megatron_omni.training.setup import Run, setup
from megatron_omni.training.step_data import next_batches
from megatron_omni.training.task import StepInfo, Task

SAID = ("task", "seed", "data", "freeze")
"""Groups of the recipe that are recorded with the loss."""


def first_step_loss(run: Run) -> float:
    """Mean loss over the label tokens of the first step; changes no weight, but moves the loader."""
    batches, totals = next_batches(run, run.step_loader)
    info = StepInfo(step=1, training=True, divisor=totals["labels"], aux_loss_scale=aux_loss_scale(run, 1), stats=None)
    with torch.no_grad():
        forward = partial(run.task.forward_step, info=info)
        reports = run_step(forward, batches, run.model, pg=run.pg, recipe=run.recipe, forward_only=True)
    table = sum(reports[1:], reports[0]) if reports else torch.zeros(len(run.task.report_names), 2)
    loss, count = sum_reports(run, table).tolist()[0]
    return loss / count


def record_first_loss(recipe: Recipe, task: Task) -> float:
    """Measure with ``recipe``, whose ``init_from`` is the converted checkpoint, and keep the figure beside it."""
    assert recipe.init_from is not None
    validate(recipe, world_size=1)
    run = setup(recipe, task)
    try:
        loss = first_step_loss(run)
    finally:
        for loader in (run.loader, *run.eval_loaders.values()):
            if loader is not None:
                loader.close()
        destroy()
    values = recipe_to_dict(recipe)
    record_loss(converted_directory(Path(recipe.init_from)), loss=loss, recipe={name: values[name] for name in SAID})
    return loss
