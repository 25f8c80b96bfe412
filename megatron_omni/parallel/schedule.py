"""One optimizer step's forwards and backwards over its micro-batches, by Megatron's schedules (1F1B under pipeline
parallelism).

Around a step the caller zeroes the gradients (``model.zero_grad_buffer()``, ``optimizer.zero_grad()``) before and calls
``optimizer.step()`` after; when :func:`run_step` returns, the gradients are summed over ranks (gradients.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface as Offload,
)
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.run import Recipe
from megatron_omni.parallel.gradients import sum_gradients
from megatron_omni.parallel.sharing import StepData

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
    shapes = batches.shapes if isinstance(batches, StepData) else [tuple(batch.input_ids.shape) for batch in batches]
    rows, length = shapes[0]
    if getattr(config, "fine_grained_activation_offloading", False):
        # It follows the micro-batches of training steps, all alike; other forwards keep nothing.
        (Offload.disable_offload if forward_only else Offload.enable_offload)()
    with torch.set_grad_enabled(not forward_only):
        reports: list[Any] = schedule(
            forward_step_func=partial(_megatron_forward_step, forward_step),
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=length,  # of the first; variable_seq_lengths makes Megatron ask _Neighbours for each
            micro_batch_size=rows,
            forward_only=forward_only,
            p2p_communicator=_Neighbours(pg, config, shapes) if pipelined else None,
            pg_collection=pg,
        )
    return reports


class _Neighbours(P2PCommunicator):
    """Tensors of a stage to and from the next one, whose shapes are not exchanged first.

    Micro-batches may differ in length, and Megatron's own communicator then sends every shape ahead and waits for it on
    the host. But all ranks of a replica know those of the whole step, and 1F1B takes micro-batches in their order, in
    the forward as in the backward.
    """

    def __init__(
        self, pg: ProcessGroupCollection, config: TransformerConfig, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        super().__init__(pp_group=pg.pp, config=config)
        split = pg.cp.size() * (pg.tp.size() if config.sequence_parallel else 1)
        hidden = [(length // split, rows, config.hidden_size) for rows, length in shapes]
        self._forward, self._backward = iter(hidden), iter(hidden)

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        return next(self._forward) if recv_prev else None, next(self._backward) if recv_next else None


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
