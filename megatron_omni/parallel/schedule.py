"""One optimizer step's forwards and backwards over its micro-batches, by Megatron's schedules (1F1B under pipeline
parallelism).

Around a step the caller zeroes the gradients (``model.zero_grad_buffer()``, ``optimizer.zero_grad()``) before and calls
``optimizer.step()`` after; when :func:`run_step` returns, the gradients are summed over ranks (gradients.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.run import Recipe
from megatron_omni.parallel.gradients import sum_gradients

# (model's loss output) -> (scalar to differentiate, report)
LossFunction = Callable[[Tensor], tuple[Tensor, Any]]


class Batches(Protocol):
    """A step's micro-batches: a list, or what arrives while the step runs (parallel/sharing.py)."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[OmniBatch]: ...


# (next micro-batch, model) -> (model output, loss function)
ForwardStep = Callable[[OmniBatch, DistributedDataParallel], tuple[Tensor, LossFunction]]


def run_step(
    forward_step: ForwardStep,
    batches: Batches,
    model: DistributedDataParallel,
    *,
    pg: ProcessGroupCollection,
    recipe: Recipe,
    forward_only: bool = False,
    around_reduction: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Any]:
    """Run ``forward_step`` (and its backward) on every micro-batch; the reports of the last stage, [] on the others.

    ``forward_step(batch, model)`` returns the model's output and a function that turns it, on the last stage, into the
    scalar to differentiate and a report of any kind. The scalar is differentiated as it is: no division by
    micro-batches or tokens. ``around_reduction`` is entered for the reduction of the gradients.
    """
    config = get_model_config(model)
    config.timers = None
    config.grad_scale_func = None
    config.finalize_model_grads_func = partial(_sum_gradients, around_reduction)
    overlap = recipe.parallel.overlap_grad_reduce and isinstance(model, DistributedDataParallel)
    config.no_sync_func = model.no_sync if overlap else None
    config.grad_sync_func = None
    config.param_sync_func = None
    pipelined = pg.pp.size() > 1
    schedule = get_forward_backward_func(pp_size=pg.pp.size(), vp_size=None)
    data = iter(batches)
    first = next(data)
    rows, length = first.input_ids.shape
    with torch.set_grad_enabled(not forward_only):
        reports: list[Any] = schedule(
            forward_step_func=partial(_megatron_forward_step, forward_step),
            data_iterator=chain([first], data),
            model=[model],
            num_microbatches=len(batches),
            seq_length=length,  # shapes travel with the tensors: variable_seq_lengths
            micro_batch_size=rows,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(pp_group=pg.pp, config=config) if pipelined else None,
            pg_collection=pg,
        )
    return reports


def _megatron_forward_step(
    forward_step: ForwardStep, batches: Iterator[OmniBatch], model: DistributedDataParallel
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    """Megatron's convention.

    A loss function returning three values is neither divided by tokens nor by micro-batches.
    """
    output, loss_function = forward_step(next(batches), model)

    def three_values(output: Tensor) -> tuple[Tensor, Tensor, Any]:
        loss, report = loss_function(output)
        return loss, torch.zeros((), dtype=torch.int32, device=loss.device), report

    return output, three_values


def _sum_gradients(
    around: Callable[[], AbstractContextManager[Any]],
    models: list[DistributedDataParallel],
    num_tokens: Tensor | None,
    *,
    pg_collection: ProcessGroupCollection,
    force_all_reduce: bool,
) -> None:
    """What Megatron's schedules call when the last backward is done. The loss function has divided by tokens."""
    assert not force_all_reduce
    (model,) = models
    with around():
        sum_gradients(model, pg_collection)
