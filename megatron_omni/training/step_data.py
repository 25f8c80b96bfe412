"""The data of a step on every rank: read by one rank of each replica, shared, and agreed upon by all."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_omni.data.loader import StepLoader
from megatron_omni.data.mixture import DataEnded
from megatron_omni.parallel.sharing import ReaderFailed, StepData, share_step, sum_over_ranks
from megatron_omni.training.hooks import PartTimer

if TYPE_CHECKING:
    from megatron_omni.training.setup import Run


def next_batches(
    run: "Run",
    loader: StepLoader | None,
    *,
    timer: PartTimer | None = None,
    stop: Callable[[], bool] = lambda: False,
    written: Callable[[], bool] = lambda: False,
) -> tuple[StepData, dict[str, int]]:
    """This rank's micro-batches of the next step and, over all ranks, its label tokens (also as ``divisor``: the loss is
    their mean), tokens, samples, tiles and chunks, and how many ranks said ``stop`` (asked to end) and ``written`` (done
    with the files of a checkpoint).

    A reader that fails raises its own error; the other ranks raise ReaderFailed at the same step. Behind the last step of
    the data all raise DataEnded.
    """
    timer = timer or PartTimer()
    batches, error, end = None, None, None
    if loader is not None:
        loader.around_agreement = partial(timer.measure, "communication")
        try:
            with timer.measure("data"):
                batches = loader.next_step()
        except DataEnded as caught:
            end = caught
        except Exception as caught:  # reported below, once every rank knows that it must not wait for this one
            error = caught
    labels = tokens = samples = tiles = chunks = 0
    if batches is not None:
        labels = sum(batch.num_label_tokens for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        samples = sum(batch.num_samples for batch in batches)
        tiles = sum(len(batch.pixel_values) for batch in batches if batch.pixel_values is not None)
        chunks = sum(len(batch.audio_features) for batch in batches if batch.audio_features is not None)
    with timer.measure("communication"):
        shared = share_step(
            batches,
            num_micro_batches=run.num_micro_batches,
            pg=run.pg,
            device=run.device,
            precision=torch.bfloat16 if run.recipe.optim.precision == "bf16" else torch.float32,
        )
        values = [labels, tokens, samples, tiles, chunks, error is not None, stop(), written(), end is not None]
        labels, tokens, samples, tiles, chunks, failed, stops, done, ended = sum_over_ranks(
            [int(value) for value in values], device=run.device
        )
    if error is not None:
        raise error
    if ended and not failed:
        raise end or DataEnded("the data ends here")
    if failed or shared is None:
        raise ReaderFailed("another rank could not load its data")
    read = {"divisor": labels, "labels": labels, "tokens": tokens, "samples": samples, "tiles": tiles, "chunks": chunks}
    return shared, read | {"stop": stops, "written": done}
