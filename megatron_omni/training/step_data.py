"""The data of a step on every rank: read by one rank of each replica, shared, and agreed upon by all."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_omni.batch import OmniBatch
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.mixture import DataEnded
from megatron_omni.parallel.sharing import ReaderFailed, StepData, share_step, sum_over_ranks
from megatron_omni.training.hooks import PartTimer

if TYPE_CHECKING:
    from megatron_omni.training.setup import Run

COUNTED = ("labels", "tokens", "samples", "tiles", "chunks", "images")


def counted(batches: Sequence[OmniBatch] | None) -> list[int]:
    """:data:`COUNTED` of a reader's micro-batches; 0 on ranks that do not read."""
    totals = [0] * len(COUNTED)
    for batch in batches or ():
        media = [0 if inputs is None else len(inputs) for inputs in (batch.pixel_values, batch.audio_features)]
        own = [batch.num_label_tokens, batch.num_tokens, batch.num_samples, *media, batch.num_images]
        totals = [total + number for total, number in zip(totals, own, strict=True)]
    return totals


def read_together[T](read: Callable[[], T] | None, *, device: torch.device) -> tuple[T | None, DataEnded | None]:
    """What this rank's ``read`` gives, None on ranks that do not read and at the end of the data; and the end, where any rank
    met it. All ranks together: a reader that fails raises its own error, the others ReaderFailed.
    """
    found, error, end = None, None, None
    try:
        found = read() if read is not None else None
    except DataEnded as caught:
        end = caught
    except Exception as caught:  # raised below, once every rank knows that it must not wait for this one
        error = caught
    failed, ended = sum_over_ranks([int(error is not None), int(end is not None)], device=device)
    if error is not None:
        raise error
    if failed:
        raise ReaderFailed("another rank could not load its data")
    return found, (end or DataEnded("the data ends here")) if ended else None


def next_batches(
    run: "Run",
    loader: StepLoader | None,
    *,
    timer: PartTimer | None = None,
    stop: Callable[[], bool] = lambda: False,
    written: Callable[[], bool] = lambda: False,
) -> tuple[StepData, dict[str, int]]:
    """This rank's micro-batches of the next step and, over all ranks, its label tokens (also as ``divisor``: the loss is
    their mean), tokens, samples, tiles, chunks and drawn images, and how many ranks said ``stop`` (asked to end) and
    ``written`` (done with the files of a checkpoint).

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
    with timer.measure("communication"):
        shared = share_step(
            batches,
            num_micro_batches=run.num_micro_batches,
            pg=run.pg,
            device=run.device,
            precision=torch.bfloat16 if run.recipe.optim.precision == "bf16" else torch.float32,
        )
        said = [error is not None, stop(), written(), end is not None]
        *totals, failed, stops, done, ended = sum_over_ranks([*counted(batches), *map(int, said)], device=run.device)
    if error is not None:
        raise error
    if ended and not failed:
        raise end or DataEnded("the data ends here")
    if failed or shared is None:
        raise ReaderFailed("another rank could not load its data")
    read = dict(zip(COUNTED, totals, strict=True))
    return shared, read | {"divisor": read["labels"], "stop": stops, "written": done}
