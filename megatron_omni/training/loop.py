"""The training loop: everything that happens in a step, in order and in sight.

    read micro-batches -> sum label counts over ranks -> forwards and backwards (1F1B) -> clip, learning rate, update
    -> log, evaluate, save, stop

Ranks synchronise at three points of a step only: the three integers that every step starts with (label tokens, failed
readers, stop requests), the gradient reduction, and the gradient norm. Loss sums stay on the device and are reduced
when they are logged.

A step whose gradients are not finite changes nothing, on any rank; ``NON_FINITE_LIMIT`` of them in a row end the run.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_omni.batch import OmniBatch
from megatron_omni.checkpoint.ledger import converted_directory, recorded_loss
from megatron_omni.data.loader import StepLoader
from megatron_omni.models.moe.balance import aux_loss_coefficient, reduce_stats, routing_metrics
from megatron_omni.models.moe.context import RoutingStats
from megatron_omni.models.parts import parameter_table
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.sharing import ReaderFailed, share_step, sum_over_ranks
from megatron_omni.platform.peak import peak_tflops
from megatron_omni.training.hooks import EXIT_REQUEUE, PartTimer, StopSignals, eval_due, evaluation_mode, save_due
from megatron_omni.training.metrics import MetricsWriter, Progress, throughput
from megatron_omni.training.optimizer import learning_rate, update
from megatron_omni.training.setup import Run, save
from megatron_omni.training.task import StepInfo

NON_FINITE_LIMIT = 3
"""Skipped updates in a row after which the run stops."""
STOP_MARKER = "requeue"
"""File in the run directory that says: stopped on a signal, checkpoint whole, start me again."""


def train(run: Run) -> int:
    """Run until ``train_iters`` or a stop signal; the exit status (0, or 75 after a stop signal)."""
    # A million objects of imported modules and the model live as long as the process: the collector may leave them out.
    gc.collect()
    gc.freeze()
    with StopSignals().installed() as signals:
        logger = _Logger(run)
        try:
            return _train(run, signals, logger)
        finally:
            logger.close()
            for loader in (run.loader, *run.eval_loaders.values()):
                if loader is not None:
                    loader.close()


def _train(run: Run, signals: StopSignals, logger: "_Logger") -> int:
    state, timer = run.state, logger.timer
    stopping = False
    while state.step < run.recipe.train_iters and not stopping:
        with timer.measure("data wait"):
            batches, totals = next_batches(run, run.loader, signals)
        labels, tokens, stopping = totals["labels"], totals["tokens"], totals["stop"] > 0
        state.step += 1
        stats = RoutingStats() if logger.due(state.step) and run.recipe.model.moe is not None else None
        info = StepInfo(
            step=state.step,
            training=True,
            num_label_tokens=labels,
            aux_loss_scale=aux_loss_scale(run, state.step),
            stats=stats,
        )
        with timer.measure("forward-backward"):
            run.model.zero_grad_buffer()
            run.optimizer.zero_grad()
            reports = run_step(
                partial(run.task.forward_step, info=info), batches, run.model, pg=run.pg, recipe=run.recipe
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
            logger.add(reports, tokens=tokens, samples=totals["samples"])
        else:
            state.skipped_in_a_row += 1
            logger.say(f"step {state.step}: gradient norm is {grad_norm}; no weight changed, the step is skipped")
        if logger.due(state.step):
            logger.record(grad_norm=grad_norm, stats=stats)
        if state.skipped_in_a_row >= NON_FINITE_LIMIT:
            raise RuntimeError(
                f"{NON_FINITE_LIMIT} steps in a row had non-finite gradients (step {state.step}: norm {grad_norm}); "
                "lower optim.lr or look at the data of these steps, then resume from the last checkpoint"
            )
        evaluated: dict[str, float] = {}
        if eval_due(run.recipe, state.step):
            with logger.paused():
                evaluated = evaluate(run)
                logger.write(evaluated)
        if stopping or save_due(run.recipe, state.step):
            with logger.paused():
                logger.say(f"saved {save(run, evaluated)}")
    if stopping and state.step < run.recipe.train_iters:
        logger.mark_stopped()
        return EXIT_REQUEUE
    return 0


def describe(run: Run) -> list[str]:
    """What is about to run, as this rank sees it."""
    place, data, state = run.layout, run.recipe.data, run.state
    table = parameter_table(run.model)
    trained = ", ".join(f"{part} {count:,}" for part, (_, count) in table.items() if count)
    frozen = ", ".join(f"{part} {total - count:,}" for part, (total, count) in table.items() if total > count)
    sizes = f"tp {place.tp_size} x pp {place.pp_size} x dp {place.dp_size}, ep {place.ep_size}"
    rows = f"packed rows of {data.seq_length} tokens" if data.packing else "samples"
    step = (
        f"{data.global_batch_size} {rows}; {run.num_micro_batches} micro-batches of {data.micro_batch_size} a replica"
    )
    lines = [f"layout: {sizes}, on {run.device.type}", f"step: {step}", f"trained on this rank: {trained}"]
    if frozen:
        lines.append(f"frozen on this rank: {frozen}")
    if state.step:
        lines.append(f"resumed after step {state.step}, {state.consumed_samples} samples")
    return lines


def next_batches(
    run: Run, loader: StepLoader | None, signals: StopSignals | None = None
) -> tuple[list[OmniBatch], dict[str, int]]:
    """This rank's micro-batches of the next step and, over all ranks, its label tokens, tokens, samples and stop requests.

    A reader that fails raises its own error; the other ranks raise ReaderFailed at the same step.
    """
    batches, error = None, None
    if loader is not None:
        try:
            batches = loader.next_step()
        except Exception as caught:  # reported below, once every rank knows that it must not wait for this one
            error = caught
    labels = tokens = samples = 0
    if batches is not None:
        labels = sum(batch.num_label_tokens for batch in batches)
        tokens = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
        samples = sum(batch.num_samples for batch in batches)
    shared = share_step(batches, num_micro_batches=run.num_micro_batches, pg=run.pg, device=run.device)
    stop = signals is not None and signals.received is not None
    values = [labels, tokens, samples, int(error is not None), int(stop)]
    labels, tokens, samples, failed, stops = sum_over_ranks(values, device=run.device)
    if error is not None:
        raise error
    if failed or shared is None:
        raise ReaderFailed("another rank could not load its data")
    return shared, {"labels": labels, "tokens": tokens, "samples": samples, "stop": stops}


def aux_loss_scale(run: Run, step: int) -> float:
    """Factor on each layer's auxiliary loss: coefficient / (MoE layers x micro-batches of the global step)."""
    moe = run.recipe.model.moe
    if moe is None:
        return 0.0
    coefficient = aux_loss_coefficient(moe, step=step)
    return coefficient / (run.recipe.model.num_layers * run.num_micro_batches * run.layout.dp_size)


def evaluate(run: Run) -> dict[str, float]:
    """Mean loss over the label tokens of each held-out set: the same samples every time, deterministic routing.

    ``eval/loss`` is the mean over the sets, each counting the same.
    """
    losses = {}
    with evaluation_mode(run.model), torch.no_grad():
        for name, loader in run.eval_loaders.items():
            if loader is not None:
                loader.load_state_dict({"consumed_samples": 0})
            total = None
            for _ in range(run.recipe.log.eval_iters):
                batches, totals = next_batches(run, loader)
                info = StepInfo(step=run.state.step, training=False, num_label_tokens=totals["labels"])
                forward = partial(run.task.forward_step, info=info)
                for report in run_step(forward, batches, run.model, pg=run.pg, recipe=run.recipe, forward_only=True):
                    total = report[0] if total is None else total + report[0]
            loss, count = sum_reports(run, total if total is not None else torch.zeros(2)).tolist()
            losses[f"eval/loss/{name}"] = loss / max(count, 1.0)
    return losses if not losses else losses | {"eval/loss": sum(losses.values()) / len(losses)}


def sum_reports(run: Run, table: torch.Tensor) -> torch.Tensor:
    """Sum a report table over the data-parallel ranks; every rank gets it. Only the last stage's tensor rank 0
    contributes.
    """
    table = table.to(run.device, torch.float64)
    if dist.get_world_size() == 1:
        return table
    contributes = run.layout.is_last_stage and run.layout.tp_rank == 0
    table = table.clone() if contributes else torch.zeros_like(table)
    dist.all_reduce(table)
    return table


class _Logger:
    """Sums between records, and the record: every rank takes part in the reductions, rank 0 writes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.timer = PartTimer()
        self._tables: torch.Tensor | None = None
        self._tokens = self._samples = 0
        self._started = time.perf_counter()
        self._step = run.state.step
        self._mean_k = 0.0
        self._writes = dist.get_rank() == 0
        self._marker = run.checkpoints.parent / STOP_MARKER
        if self._writes:
            self._writer = MetricsWriter(
                run.checkpoints.parent, tensorboard=run.recipe.log.tensorboard, after_step=run.state.step
            )
            self._progress = Progress(run.recipe.train_iters, initial=run.state.step)
            self._marker.unlink(missing_ok=True)
            for line in describe(run):
                self.say(line)

    def due(self, step: int) -> bool:
        """Whether ``step`` is logged."""
        return step % self.run.recipe.log.interval == 0 or step >= self.run.recipe.train_iters or step == 1

    def add(self, reports: list[torch.Tensor], *, tokens: int, samples: int) -> None:
        """Add the report tables of a step that updated the weights."""
        self._tokens += tokens
        self._samples += samples
        for report in reports:
            self._tables = report if self._tables is None else self._tables + report
        if self._writes:
            self._progress.advance()

    def record(self, *, grad_norm: float, stats: RoutingStats | None) -> None:
        """Reduce what was summed since the last record, and write it."""
        run, names = self.run, list(self.run.task.report_names)
        table = self._tables if self._tables is not None else torch.zeros(len(names), 2)
        sums = sum_reports(run, table).tolist()
        metrics = {name: loss / count for name, (loss, count) in zip(names, sums, strict=True) if count > 0}
        metrics |= {"grad-norm": grad_norm, "learning-rate": learning_rate(run.optimizer)}
        routing = self._routing(stats)
        self._mean_k = routing.get("moe/mean_k", self._mean_k)
        metrics |= self._speed()
        metrics |= {"consumed samples": run.state.consumed_samples, "consumed tokens": run.state.consumed_tokens}
        metrics |= {"skipped steps": run.state.step - run.state.updates}
        if first := self._compare_first_loss(metrics):
            self.say(first)
        self.write(metrics | routing)
        self._tables, self._tokens, self._samples = None, 0, 0
        if self._writes:
            self._progress.show(run.state.step, metrics | routing)

    def _compare_first_loss(self, metrics: dict[str, float]) -> str | None:
        """At step 1: the loss recorded with the converted checkpoint (checkpoint/ledger.py), into ``metrics`` and a line."""
        origin = self.run.recipe.init_from
        if not self._writes or origin is None or self.run.state.step != 1 or "lm loss" not in metrics:
            return None
        recorded, own = recorded_loss(converted_directory(Path(origin))), metrics["lm loss"]
        if recorded is None:
            return None
        metrics["recorded first-step loss"] = recorded
        return f"first step: lm loss {own:.6f}; recorded with the checkpoint: {recorded:.6f} ({own - recorded:+.1e})"

    def _routing(self, stats: RoutingStats | None) -> dict[str, float]:
        moe = self.run.recipe.model.moe
        if stats is None or moe is None:
            return {}
        # Hybrid layer numbers count attention and feed-forward layers alike, from 1: every second one is a MoE layer.
        layers = [2 * block + 2 for block in range(self.run.recipe.model.num_layers)]
        pg = self.run.pg
        total = reduce_stats(
            stats, layers=layers, moe=moe, tp_group=pg.tp, dp_group=pg.dp, pp_group=pg.pp, device=self.run.device
        )
        metrics = routing_metrics(total, layers=layers, moe=moe)
        if self.run.recipe.log.expert_load:
            return metrics
        return {name: value for name, value in metrics.items() if name.count("/") == 1}

    def _speed(self) -> dict[str, float]:
        steps = max(self.run.state.step - self._step, 1)
        seconds, self._started = time.perf_counter() - self._started, time.perf_counter()
        self._step = self.run.state.step
        rates = throughput(
            self.run.recipe,
            tokens=self._tokens,
            samples=self._samples,
            seconds=seconds,
            world_size=dist.get_world_size(),
            mean_k=self._mean_k,
            peak_tflops=peak_tflops(),
        )
        parts = {f"time/{part}": value / steps for part, value in self.timer.take().items()}
        return {**rates, "step time": seconds / steps, **parts}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count as training."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def write(self, metrics: dict[str, float]) -> None:
        """Write metrics of the current step."""
        if self._writes:
            self._writer.write(self.run.state.step, metrics)
            for name, value in metrics.items():
                if name.startswith("eval/"):
                    self._progress.say(f"step {self.run.state.step} | {name} {value:.4f}")

    def say(self, text: str) -> None:
        """A line in the log."""
        if self._writes:
            self._progress.say(text)

    def mark_stopped(self) -> None:
        """Tell the job script that a whole checkpoint waits for the next start."""
        if self._writes:
            self._marker.write_text(f"{self.run.state.step}\n", encoding="utf-8")
        self.say(f"stopped after step {self.run.state.step}; start again with load=auto to continue")

    def close(self) -> None:
        """Close files."""
        if self._writes:
            self._progress.close()
            self._writer.close()
