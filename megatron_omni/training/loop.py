"""The training loop: everything that happens in a step, in order and in sight.

    micro-batches of the task -> sum counts over ranks -> forwards and backwards (1F1B) -> clip, learning rate, update
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
from megatron_omni.data.mixture import DataEnded
from megatron_omni.models.moe.balance import aux_loss_coefficient
from megatron_omni.models.moe.context import RoutingStats
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.sharing import ReaderFailed, StepData
from megatron_omni.parallel.wrap import gather_weights
from megatron_omni.platform.device import synchronize
from megatron_omni.platform.ranges import named
from megatron_omni.training.hooks import PartTimer, StopSignals, eval_due, evaluation_mode, save_due
from megatron_omni.training.logger import RunLogger, sum_reports
from megatron_omni.training.optimizer import update
from megatron_omni.training.setup import Run, begin_save
from megatron_omni.training.step_data import next_batches
from megatron_omni.training.task import Interrupted, LossFunction, StepInfo
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
            run.task.close()
            for loader in (run.loader, *run.eval_loaders.values()):
                if loader is not None:
                    loader.close()


def _train(run: Run, signals: StopSignals, logger: RunLogger) -> int:
    state, timer, saver = run.state, logger.timer, _Saver(run, logger)
    stopping, evaluated = False, dict[str, float]()
    try:
        if state.step < run.recipe.train_iters:
            with logger.paused("preparation"):
                run.task.prepare(run, stop=signals.asked, moved=timer.moved)
    except Interrupted as reason:
        return _interrupted(run, logger, saver, evaluated, reason)
    while state.step < run.recipe.train_iters and not stopping:
        logger.begin_step(state.step + 1)
        try:
            batches, totals = run.task.batches(run, timer=timer, stop=signals.asked, written=saver.is_written)
        except DataEnded as end:
            _end_with_the_data(run, logger, saver, end, evaluated)
            return 0
        except Interrupted as reason:
            return _interrupted(run, logger, saver, evaluated, reason)
        stopping = totals["stop"] > 0
        state.step += 1
        state.consumed_samples += totals["samples"]
        state.consumed_tokens += totals["tokens"]
        state.consumed_label_tokens += totals["labels"]
        logger.note_samples(state.step)
        if totals["written"] == dist.get_world_size():
            saver.finish()
        if batches is not None:
            _learn(run, batches, totals, logger)
        else:
            logger.end_step(grad_norm=0.0, stats=None)
        evaluated = _evaluate(run, logger) if eval_due(run.recipe, state.step) else {}
        last = stopping or state.step >= run.recipe.train_iters
        if last or saver.is_due():
            saver.save(evaluated, wait=last)
    return _leave(logger, stopped=stopping and state.step < run.recipe.train_iters)


def _interrupted(
    run: Run, logger: RunLogger, saver: "_Saver", evaluated: Mapping[str, float], reason: Interrupted
) -> int:
    """Save what was not saved, and leave to be started again."""
    logger.say(str(reason))
    if run.state.step and saver.step != run.state.step:
        saver.save(evaluated, wait=True)
    saver.finish()
    return _leave(logger, stopped=True)


def _learn(run: Run, batches: StepData, totals: Mapping[str, int], logger: RunLogger) -> None:
    """Forwards and backwards of a step, its update and its record."""
    state, timer = run.state, logger.timer
    stats = RoutingStats() if logger.due(state.step) and run.recipe.model.moe is not None else None
    info = StepInfo(
        step=state.step,
        training=True,
        divisor=totals["divisor"],
        num_images=totals["images"],
        aux_loss_scale=aux_loss_scale(run, state.step),
        stats=stats,
    )
    logger.note_batches(batches)
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


def _leave(logger: RunLogger, *, stopped: bool) -> int:
    """The status with which all ranks leave: 75 where there are steps left."""
    logger.summarize(finished=not stopped)
    if stopped:
        logger.mark_stopped()
    if dist.get_world_size() > 1:
        dist.barrier()  # a launcher may end the other ranks as soon as one of them exits with 75
    return EXIT_REQUEUE if stopped else 0


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


def aux_loss_scale(run: Run, step: int) -> float:
    """Factor on each layer's auxiliary loss: coefficient / (MoE layers x micro-batches of the global step)."""
    moe = run.recipe.model.moe
    if moe is None:
        return 0.0
    coefficient = aux_loss_coefficient(moe, step=step)
    return coefficient / (run.recipe.model.num_layers * run.num_micro_batches * run.place.dp_size)


def evaluate(run: Run, *, moved: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Mean loss over the label tokens of each held-out set: the same samples every time, deterministic routing; and the
    task's ``held_out_names``.

    ``eval_iters`` steps of each, or what a set with ``epochs`` holds, to its last record.
    ``eval/loss`` is the mean over the sets, each counting the same. ValueError for a set without a label token.
    ``moved`` is called after every step.
    """
    gather_weights(run.model)
    losses: dict[str, float] = {}
    others: dict[str, float] = {}
    # Other rows of the table may be those of training, or of another length.
    wanted = [0, *map(list(run.task.report_names).index, run.task.held_out_names)]
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
                info = StepInfo(
                    step=run.state.step,
                    training=False,
                    divisor=totals["labels"],
                    num_images=totals["images"],
                    held_out=name,
                )
                forward = partial(run.task.forward_step, info=info)
                for report in run_step(forward, batches, run.model, pg=run.pg, recipe=run.recipe, forward_only=True):
                    total = report[wanted] if total is None else total + report[wanted]
                moved()
            nothing = torch.zeros(len(wanted), 2)
            (loss, count), *rest = sum_reports(run, total if total is not None else nothing).tolist()
            if not count:
                raise ValueError(
                    f"data.eval_sources[{name}]: no token of it carries a label; give it records with answers"
                )
            losses[f"eval/loss/{name}"] = loss / count
            rows = zip(run.task.held_out_names, rest, strict=True)
            others |= {f"eval/{row}/{name}": right / of for row, (right, of) in rows if of}
    return losses if not losses else losses | {"eval/loss": sum(losses.values()) / len(losses)} | others
