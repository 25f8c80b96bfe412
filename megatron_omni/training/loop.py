"""The training loop: everything that happens in a step, in order and in sight.

    read micro-batches -> sum label counts over ranks -> forwards and backwards (1F1B) -> clip, learning rate, update
    -> log, evaluate, save, stop

Ranks synchronise at three points of a step only: the few integers that every step starts with (label tokens, failed
readers, stop requests, finished background saves), the gradient reduction, and the gradient norm. Loss sums stay on the
device and are reduced when they are logged.

A step whose gradients are not finite changes nothing, on any rank; ``NON_FINITE_LIMIT`` of them in a row end the run.
Such a streak may mean that the weights have diverged before it: until a step succeeds again nothing is saved at the
interval, and no older checkpoint is retired.
Where every source has used its epochs before ``train_iters``, the run ends there as if that step had been the last.
"""

import gc
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.checkpoint.memory import SaveMemory
from megatron_omni.checkpoint.saving import PendingSave
from megatron_omni.config.outcome import EXIT_REQUEUE
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.mixture import DataEnded
from megatron_omni.models.moe.balance import aux_loss_coefficient
from megatron_omni.models.moe.context import RoutingStats
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.sharing import ReaderFailed, StepData, share_step, sum_over_ranks
from megatron_omni.parallel.wrap import gather_weights
from megatron_omni.platform.device import synchronize
from megatron_omni.platform.ranges import named
from megatron_omni.training.hooks import PartTimer, StopSignals, eval_due, evaluation_mode, save_due
from megatron_omni.training.logger import RunLogger, sum_reports
from megatron_omni.training.optimizer import update
from megatron_omni.training.setup import Run, begin_save
from megatron_omni.training.task import LossFunction, StepInfo
from megatron_omni.training.watch import Watch

NON_FINITE_LIMIT = 3
"""Skipped updates in a row after which the run stops."""


def train(run: Run) -> int:
    """Run until ``train_iters``, the end of the data or a stop signal; the exit status (0, or 75 after a signal)."""
    # A million objects of imported modules and the model live as long as the process: the collector may leave them out.
    gc.collect()
    gc.freeze()
    timer = PartTimer(synchronize=synchronize, named=named)
    timeout = run.recipe.parallel.distributed_timeout_seconds
    watch = Watch(lambda: run.state.step, timer, timeout_seconds=timeout)
    with StopSignals().installed() as signals:
        logger = RunLogger(run, timer)
        try:
            watch.start()
            status = _train(run, signals, logger)
            watch.stop()
            logger.finish()
            return status
        finally:
            logger.close()
            for loader in (run.loader, *run.eval_loaders.values()):
                if loader is not None:
                    loader.close()


def _train(run: Run, signals: StopSignals, logger: RunLogger) -> int:
    state, timer, saver = run.state, logger.timer, _Saver(run, logger)
    stopping, evaluated = False, dict[str, float]()
    while state.step < run.recipe.train_iters and not stopping:
        logger.begin_step(state.step + 1)
        try:
            batches, totals = next_batches(run, run.loader, timer=timer, stop=signals.asked, written=saver.is_written)
        except DataEnded as end:
            _end_with_the_data(run, logger, saver, end, evaluated)
            return 0
        labels, tokens, stopping = totals["labels"], totals["tokens"], totals["stop"] > 0
        state.step += 1
        logger.note_samples(state.step)
        if totals["written"] == dist.get_world_size():
            saver.finish()
        stats = RoutingStats() if logger.due(state.step) and run.recipe.model.moe is not None else None
        info = StepInfo(
            step=state.step,
            training=True,
            num_label_tokens=labels,
            aux_loss_scale=aux_loss_scale(run, state.step),
            stats=stats,
        )
        with timer.measure("backward"):
            run.model.zero_grad_buffer()
            run.optimizer.zero_grad()
            reports = run_step(
                partial(_timed_forward, run, info, timer),
                batches,
                run.model,
                pg=run.pg,
                recipe=run.recipe,
                around_reduction=partial(timer.measure, "communication"),
            )
        if stats is not None:
            stats.micro_batches = run.num_micro_batches
        with timer.measure("optimizer"):
            updated, grad_norm = update(run.optimizer, run.scheduler, clip_grad=run.recipe.optim.clip_grad)
        state.consumed_samples += totals["samples"]
        state.consumed_tokens += tokens
        state.consumed_label_tokens += labels
        if updated:
            state.updates += 1
            state.skipped_in_a_row = 0
            logger.add(reports, totals)
        else:
            state.skipped_in_a_row += 1
            samples = logger.skipped(grad_norm)
        logger.end_step(grad_norm=grad_norm, stats=stats)
        if state.skipped_in_a_row >= NON_FINITE_LIMIT:
            raise RuntimeError(
                f"{NON_FINITE_LIMIT} steps in a row had non-finite gradients (step {state.step}: norm {grad_norm}; "
                f"{samples}); lower optim.lr or look at these samples, then resume from the last checkpoint, or where "
                "its weights have diverged already, from the one before it"
            )
        evaluated = _evaluate(run, logger) if eval_due(run.recipe, state.step) else {}
        last = stopping or state.step >= run.recipe.train_iters
        if last or saver.is_due():
            saver.save(evaluated, wait=last)
    stopped = stopping and state.step < run.recipe.train_iters
    logger.summarize(finished=not stopped)
    if stopped:
        logger.mark_stopped()
        status = EXIT_REQUEUE
    else:
        status = 0
    if dist.get_world_size() > 1:
        dist.barrier()  # a launcher may end the other ranks as soon as one of them exits with 75
    return status


def _evaluate(run: Run, logger: RunLogger) -> dict[str, float]:
    with logger.paused("evaluation"):
        evaluated = evaluate(run, moved=logger.timer.moved)
        if run.score is not None:
            evaluated |= run.score(run, logger.timer.moved)
        logger.write(evaluated)
    return evaluated


def _end_with_the_data(
    run: Run, logger: RunLogger, saver: "_Saver", end: DataEnded, evaluated: dict[str, float]
) -> None:
    """What the last step of a run does, where the data says which one that is; ``evaluated`` after that step."""
    if not run.state.step:  # nothing was trained; a rank that reads no data leaves it to the others to say why
        raise end if run.loader is not None else ReaderFailed("another rank found no data for a step")
    logger.flush()
    if saver.step == run.state.step:
        saver.finish()
    else:
        if not evaluated and run.recipe.log.eval_interval > 0 and run.recipe.data.eval_sources:
            evaluated = _evaluate(run, logger)
        saver.save(evaluated, wait=True)
    logger.mark_ended(str(end))
    logger.summarize(finished=True)


class _Saver:
    """At most one checkpoint that is being written in the background."""

    def __init__(self, run: Run, logger: RunLogger) -> None:
        self._run, self._logger = run, logger
        self.step = run.state.step
        """Of the last checkpoint; a run that continues starts from one."""
        self._put_off = False
        self._pending: PendingSave | None = None
        self._memory = SaveMemory() if run.recipe.checkpoint.async_save else None

    def is_written(self) -> bool:
        """Whether this rank's files of a pending checkpoint are on disk."""
        return self._pending is not None and self._pending.written

    def is_due(self) -> bool:
        """Whether a checkpoint follows this step; during a streak of skipped steps it is put off until one succeeds."""
        due = self._put_off or save_due(self._run.recipe, self._run.state.step)
        self._put_off = due and self._run.state.skipped_in_a_row > 0
        return due and not self._put_off

    def save(self, evaluated: Mapping[str, float], *, wait: bool) -> None:
        """Save the run as it stands; in the background if the recipe says so, unless ``wait``."""
        self.finish()
        self.step = self._run.state.step
        background = self._run.recipe.checkpoint.async_save and not wait
        with self._logger.paused("checkpoint"):
            self._pending = begin_save(self._run, evaluated, background=background, memory=self._memory)
        if not background:
            self.finish()
        self._logger.note_time()

    def finish(self) -> None:
        """Make the pending checkpoint, if there is one, the latest; all ranks at the same step."""
        if self._pending is None:
            return
        self._pending.retires = not self._run.state.skipped_in_a_row
        with self._logger.paused("checkpoint"):
            path = self._pending.finish()
        self._pending = None
        self._logger.say(f"saved {path}")


def _timed_forward(
    run: Run, info: StepInfo, timer: PartTimer, batch: OmniBatch, model: torch.nn.Module
) -> tuple[Tensor, LossFunction]:
    """The task's forward step, its time counted."""
    with timer.measure("forward"):
        output, loss_function = run.task.forward_step(batch, model, info=info)

    def timed_loss(output: Tensor) -> tuple[Tensor, Tensor]:
        with timer.measure("forward"):
            return loss_function(output)

    return output, timed_loss


def next_batches(
    run: Run,
    loader: StepLoader | None,
    *,
    timer: PartTimer | None = None,
    stop: Callable[[], bool] = lambda: False,
    written: Callable[[], bool] = lambda: False,
) -> tuple[StepData, dict[str, int]]:
    """This rank's micro-batches of the next step and, over all ranks, its label tokens, tokens, samples, tiles and chunks,
    and how many ranks said ``stop`` (asked to end) and ``written`` (done with the files of a checkpoint).

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
    read = {"labels": labels, "tokens": tokens, "samples": samples, "tiles": tiles, "chunks": chunks}
    return shared, read | {"stop": stops, "written": done}


def aux_loss_scale(run: Run, step: int) -> float:
    """Factor on each layer's auxiliary loss: coefficient / (MoE layers x micro-batches of the global step)."""
    moe = run.recipe.model.moe
    if moe is None:
        return 0.0
    coefficient = aux_loss_coefficient(moe, step=step)
    return coefficient / (run.recipe.model.num_layers * run.num_micro_batches * run.place.dp_size)


def evaluate(run: Run, *, moved: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Mean loss over the label tokens of each held-out set: the same samples every time, deterministic routing.

    ``eval_iters`` steps of each, or what a set with ``epochs`` holds, to its last record.
    ``eval/loss`` is the mean over the sets, each counting the same. ValueError for a set without a label token.
    ``moved`` is called after every step.
    """
    gather_weights(run.model)
    losses = {}
    with evaluation_mode(run.model), torch.no_grad():
        for name, loader in run.eval_loaders.items():
            if loader is not None:
                loader.load_state_dict({"consumed_samples": 0})
            total = None
            for _ in range(run.recipe.log.eval_iters):
                try:
                    batches, totals = next_batches(run, loader)
                except DataEnded:
                    break
                info = StepInfo(step=run.state.step, training=False, num_label_tokens=totals["labels"])
                forward = partial(run.task.forward_step, info=info)
                for report in run_step(forward, batches, run.model, pg=run.pg, recipe=run.recipe, forward_only=True):
                    total = report[0] if total is None else total + report[0]
                moved()
            loss, count = sum_reports(run, total if total is not None else torch.zeros(2)).tolist()
            if not count:
                raise ValueError(
                    f"data.eval_sources[{name}]: no token of it carries a label; give it records with answers"
                )
            losses[f"eval/loss/{name}"] = loss / count
    return losses if not losses else losses | {"eval/loss": sum(losses.values()) / len(losses)}
