"""What a run says about itself: records every ``log.interval`` steps, lines in the log, incidents, the end's summary.

Every rank has a logger and takes part in its reductions; rank 0 writes. Between records loss sums stay on the device.

``time/<part>`` are seconds of the recorded step, mean over ranks, measured with the device synchronised around every
part: *data* (own reading), *forward*, *backward*, *communication* (the exchange that a step starts with, in which a
rank waits for the slowest reader, and the reduction of gradients; collectives inside layers count where they are),
*optimizer*; *checkpoint* is what saving has cost since the last record, divided by the steps. ``time/slowest_rank``
is the rank whose own work (data, forward, backward) took longest, ``time/slowdown`` its multiple of the median rank's;
a line in the log names a rank that is slowest, at ``SLOW`` times the median or more, in ``SLOW_RECORDS`` records in a
row.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_omni.checkpoint.ledger import converted_directory, recorded_loss
from megatron_omni.config.outcome import ENDED_MARKER, STOP_MARKER
from megatron_omni.models.moe.balance import moe_layer_numbers, reduce_stats, routing_metrics
from megatron_omni.models.moe.context import RoutingStats
from megatron_omni.models.parts import parameter_table
from megatron_omni.parallel.groups import Place
from megatron_omni.parallel.sharing import StepData, sum_over_ranks
from megatron_omni.platform.peak import peak_tflops
from megatron_omni.training import goodput, incidents
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.metrics import MetricsWriter, Progress, WandbRun, throughput
from megatron_omni.training.optimizer import learning_rate
from megatron_omni.training.profile import StepProfiler
from megatron_omni.training.setup import Run

PARTS = ("data", "forward", "backward", "communication", "optimizer")
OWN_PARTS = PARTS[:3]
SLOW, SLOW_RECORDS = 1.25, 3


def sum_reports(run: Run, table: torch.Tensor) -> torch.Tensor:
    """Sum a report table over the data-parallel ranks; every rank gets it. Of a replica the first rank of the last stage
    contributes.
    """
    table = table.to(run.device, torch.float64)
    if dist.get_world_size() == 1:
        return table
    contributes = run.place.is_last_stage and run.place.is_first
    table = table.clone() if contributes else torch.zeros_like(table)
    dist.all_reduce(table)
    return table


class RunLogger:
    """Sums between records, and the record."""

    def __init__(self, run: Run, timer: PartTimer) -> None:
        self.run, self.timer = run, timer
        self._reports: list[tuple[int, torch.Tensor]] = []
        """(step, report table) of the steps since the last record that updated the weights."""
        self._tokens = self._labels = self._samples = self._tiles = self._chunks = self._images = 0
        self._started = time.perf_counter()
        self._step = run.state.step
        self._mean_k = self._grad_norm = 0.0
        self._tokens_per_rank = 0
        """The most that a micro-batch brought since the last record."""
        self._stalled = 0.0
        """Seconds in checkpoints up to the last record."""
        self._stragglers = _Stragglers()
        self._writes = dist.get_rank() == 0
        self._directory = run.checkpoints.parent
        self._profiler = StepProfiler(self._directory, run.recipe.log, rank=dist.get_rank())
        if self._writes:
            assert run.loader is not None, "rank 0 reads data"
            log = run.recipe.log
            wandb = WandbRun(run.recipe, self._directory) if log.wandb_project is not None else None
            step = run.state.step
            self._writer = MetricsWriter(self._directory, tensorboard=log.tensorboard, after_step=step, wandb=wandb)
            self._writer.facts = {"layout": layout_of(run.place), "tokens_per_rank": 0}
            self._progress = Progress(run.recipe.train_iters, initial=run.state.step)
            self._incidents = incidents.Incidents(self._directory, run.loader)
            self._spikes = incidents.SpikeDetector()
            self._goodput = goodput.Goodput(self._directory, step=run.state.step)
            for marker in (STOP_MARKER, ENDED_MARKER):
                (self._directory / marker).unlink(missing_ok=True)
            for line in describe(run):
                self.say(line)
            if (dropped := self._writer.num_dropped) and not run.state.step:
                self.say(f"metrics.jsonl: {dropped} records of a start that left no checkpoint are replaced")

    def due(self, step: int) -> bool:
        """Whether ``step`` is recorded."""
        return step % self.run.recipe.log.interval == 0 or step >= self.run.recipe.train_iters or step == 1

    def begin_step(self, step: int) -> None:
        """Before anything of ``step``."""
        self.timer.exact = self.due(step)
        self.timer.take()
        self._profiler.before(step)

    def note_samples(self, step: int) -> None:
        """Once the loader has moved past the samples of ``step``."""
        if self._writes:
            self._incidents.note_step(step)

    def note_batches(self, batches: StepData) -> None:
        """The micro-batches that a step is about to compute."""
        own = max(rows * length for rows, length in batches.shapes) // self.run.place.cp_size
        self._tokens_per_rank = max(self._tokens_per_rank, own)

    def add(self, reports: list[torch.Tensor], totals: Mapping[str, int]) -> None:
        """Add the report tables of a step that updated the weights, and what all ranks read for it."""
        self._tokens += totals["tokens"]
        self._labels += totals["labels"]
        self._samples += totals["samples"]
        self._tiles += totals["tiles"]
        self._chunks += totals["chunks"]
        self._images += totals["images"]
        empty = torch.zeros(len(self.run.task.report_names), 2)
        self._reports.append((self.run.state.step, sum(reports[1:], reports[0]) if reports else empty))
        if self._writes:
            self._progress.advance()

    def skipped(self, grad_norm: float) -> str:
        """Report a step whose gradients are not finite; a phrase that says where its samples are listed."""
        step = self.run.state.step
        if self._writes:
            self._incidents.report("non-finite gradients", step, {"grad-norm": grad_norm})
        where = f"its samples are in {self._directory / incidents.FILE}"
        self.say(f"step {step}: gradient norm is {grad_norm}; no weight changed, the step is skipped; {where}")
        return where

    def end_step(self, *, grad_norm: float, stats: RoutingStats | None) -> None:
        """After the update of a step: the record, when it is due."""
        step, self._grad_norm = self.run.state.step, grad_norm
        if (trace := self._profiler.after(step)) is not None:
            self.say(f"profile: {trace}")
        if self.due(step):
            self._record(stats=stats)
        self.timer.exact = False

    def flush(self) -> None:
        """The record of the steps since the last one: the run ends here, without a step that says where its time goes."""
        if self._reports:
            self._record(stats=None, timed=False)

    def _record(self, *, stats: RoutingStats | None, timed: bool = True) -> None:
        """Reduce what was summed since the last record, and write it; ``timed``: with the time of each part."""
        run, names = self.run, list(self.run.task.report_names)
        tables = [table for _, table in self._reports]
        total = sum(tables[1:], tables[0]) if tables else torch.zeros(len(names), 2)
        # The first row of every step's own table: its loss.
        sums = sum_reports(run, torch.cat([total, *(table[:1] for table in tables)])).tolist()
        metrics = {name: loss / count for name, (loss, count) in zip(names, sums) if count > 0}
        metrics |= {"grad-norm": self._grad_norm, "learning-rate": learning_rate(run.optimizer)}
        metrics |= run.task.metrics(run)
        routing = self._routing(stats)
        self._mean_k = routing.get("moe/mean_k", self._mean_k)
        metrics |= {name: value for name, value in self._speed().items() if timed or not name.startswith("time/")}
        metrics |= {"consumed samples": run.state.consumed_samples, "consumed tokens": run.state.consumed_tokens}
        metrics |= {"skipped steps": run.state.step - run.state.updates} | self._data_counts()
        if first := self._compare_first_loss(metrics):
            self.say(first)
        if self._writes:
            self._writer.facts["tokens_per_rank"] = self._tokens_per_rank
        self._tokens_per_rank = 0
        self.write(metrics | routing)
        if self._writes:
            self._progress.show(run.state.step, metrics | routing)
        if self._writes and run.task.watches_loss:
            for (step, _), (loss, count) in zip(self._reports, sums[len(names) :]):
                self._look_for_spike(step, loss / max(count, 1.0))
        self._reports = []
        self._tokens = self._labels = self._samples = self._tiles = self._chunks = self._images = 0

    def _data_counts(self) -> dict[str, float]:
        """Records passed over, by source, data threads replaced and files left to the CPU decoder, over all ranks."""
        loader, names = self.run.loader, [source.name for source in self.run.recipe.data.sources]
        own = [0] * (2 + len(names))
        if loader is not None:
            own[:2] = loader.worker_restarts, loader.fallbacks.total()
            for (source, _), number in loader.own_skips().items():
                own[2 + names.index(source)] += number
        restarts, fallbacks, *skipped = sum_over_ranks(own, device=self.run.device)
        metrics: dict[str, float] = {"data/skipped records": sum(skipped), "data/thread restarts": restarts}
        metrics["data/decoder fallbacks"] = fallbacks
        return metrics | {f"data/skipped/{name}": number for name, number in zip(names, skipped) if number}

    def _look_for_spike(self, step: int, loss: float) -> None:
        usual = self._spikes.add(loss, phase=self._incidents.phase_of(step))
        if usual is not None:
            self._incidents.report("loss spike", step, {"lm loss": loss, "usual lm loss": usual})
            where = self._directory / incidents.FILE
            self.say(f"step {step}: loss {loss:.4f} is far above the usual {usual:.4f}; its samples are in {where}")

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
        layers = moe_layer_numbers(self.run.recipe.model.num_layers)
        pg = self.run.pg
        total = reduce_stats(
            stats, layers=layers, moe=moe, group=pg.tp_cp, dp_group=pg.dp, pp_group=pg.pp, device=self.run.device
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
            labels=self._labels,
            samples=self._samples,
            tiles=self._tiles,
            chunks=self._chunks,
            images=self._images,
            seconds=seconds,
            world_size=dist.get_world_size(),
            mean_k=self._mean_k,
            peak_tflops=peak_tflops(),
        )
        return {**rates, "step time": seconds / steps, **self._parts(steps=steps)}

    def _parts(self, *, steps: int) -> dict[str, float]:
        """The step's time by part, mean over ranks, and the slowest rank; of checkpoints, the share of each step."""
        own = self.timer.take()
        world, rank = dist.get_world_size(), dist.get_rank()
        micros = [0] * (world * len(PARTS))
        micros[rank * len(PARTS) : (rank + 1) * len(PARTS)] = [round(own.get(part, 0.0) * 1e6) for part in PARTS]
        everyone = torch.tensor(sum_over_ranks(micros, device=self.run.device)).view(world, len(PARTS)).double() / 1e6
        metrics = {f"time/{part}": value for part, value in zip(PARTS, everyone.mean(dim=0).tolist())}
        saving = self.timer.total().get("checkpoint", 0.0)
        if saving > self._stalled:
            metrics["time/checkpoint"] = (saving - self._stalled) / steps
        self._stalled = saving
        if world > 1:
            slowest, slowdown, line = self._stragglers.add(everyone[:, : len(OWN_PARTS)].sum(dim=1).tolist())
            metrics |= {"time/slowest_rank": slowest, "time/slowdown": slowdown}
            if line is not None:
                self.say(line)
        return metrics

    @contextmanager
    def paused(self, part: str) -> Iterator[None]:
        """Time inside the block is ``part``'s, not training's."""
        start = time.perf_counter()
        with self.timer.measure(part):
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

    def note_time(self, *, finished: bool = False) -> None:
        """Account for the time up to here: a later start may continue from this step."""
        if self._writes:
            self._goodput.note(self.run.state.step, self.timer.total(), finished=finished)

    def mark_stopped(self) -> None:
        """Tell the job script that a whole checkpoint waits for the next start."""
        if self._writes:
            marker = self._directory / STOP_MARKER
            marker.write_text(f"{self.run.state.step}\n", encoding="utf-8")
        self.say(f"stopped after step {self.run.state.step}; start again with load=auto to continue")

    def mark_ended(self, reason: str) -> None:
        """Tell a chain that the run is finished at this step, and people why."""
        step, planned = self.run.state.step, self.run.recipe.train_iters
        if self._writes:
            (self._directory / ENDED_MARKER).write_text(f"{step}\n", encoding="utf-8")
        self.say(
            f"finished after step {step} of {planned}: {reason}. The learning rate was planned for {planned} steps"
        )

    def summarize(self, *, finished: bool) -> None:
        """Say where the time of the run went, and what its data cost; ``finished``: no step of it is left. A line at the
        very end says when the last steps were skipped.
        """
        self.note_time(finished=finished)
        data = describe_data(self.run)
        if self._writes:
            self.say(goodput.describe(self._goodput.lines()))
            self.say(data)
            if streak := self.run.state.skipped_in_a_row:
                self.say(
                    f"the last {streak} step(s) were skipped, their gradients are not finite: the weights are those after step "
                    f"{self.run.state.step - streak}; look at the samples in {self._directory / incidents.FILE}"
                )

    def finish(self) -> None:
        """The run has ended well; where numbers are sent, this may take its time, for which no rank waits."""
        if self._writes:
            self._writer.finish()

    def close(self) -> None:
        """Close files."""
        self._profiler.stop()
        if self._writes:
            self._progress.close()
            self._writer.close()


class _Stragglers:
    """Whether one rank is slow again and again."""

    def __init__(self) -> None:
        self._suspect, self._times = -1, 0

    def add(self, seconds: list[float]) -> tuple[int, float, str | None]:
        """The slowest rank of ``seconds`` of own work by rank, its multiple of the median, and a line worth saying."""
        median = sorted(seconds)[(len(seconds) - 1) // 2]
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        slowdown = seconds[slowest] / median if median > 0 else 1.0
        slow = slowdown >= SLOW
        self._times = (self._times + 1 if slowest == self._suspect else 1) if slow else 0
        self._suspect = slowest if slow else -1
        if self._times < SLOW_RECORDS:
            return slowest, slowdown, None
        self._times = 0
        return (
            slowest,
            slowdown,
            f"rank {slowest} is slow: {slowdown:.2f} times the median, {SLOW_RECORDS} records in a row",
        )


def describe_data(run: Run) -> str:
    """What all ranks' loaders passed over, replaced, or left to the CPU decoder; every rank takes part."""
    loader = run.loader
    own = (loader.own_skips(), loader.fallbacks, loader.worker_restarts) if loader is not None else None
    everyone: list[tuple[Counter[tuple[str, str]], Counter[str], int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    skips, fallbacks, restarts = Counter[str](), Counter[str](), 0
    for theirs in everyone:
        if theirs is not None:
            skips.update({f"{source}: {reason}": number for (source, reason), number in theirs[0].items()})
            fallbacks.update(theirs[1])
            restarts += theirs[2]
    told = [
        f"{counts.total()} {what}" + "".join(f"\n  {number} {name}" for name, number in counts.most_common())
        for counts, what in ((skips, "records passed over"), (fallbacks, "files left to the CPU decoder"))
        if counts
    ]
    if restarts:
        told.append(f"data threads replaced {restarts} times")
    return "data: " + ("; ".join(told) if told else "no record passed over")


def layout_of(place: Place) -> dict[str, int]:
    """Ranks of each kind."""
    return {
        "tp": place.tp_size, "cp": place.cp_size, "ep": place.ep_size, "pp": place.pp_size, "dp": place.dp_size
    }  # fmt: skip


def describe(run: Run) -> list[str]:
    """What is about to run, as this rank sees it."""
    place, data, state = run.place, run.recipe.data, run.state
    table = parameter_table(run.model)
    trained = ", ".join(f"{part} {count:,}" for part, (_, count) in table.items() if count)
    frozen = ", ".join(f"{part} {total - count:,}" for part, (total, count) in table.items() if total > count)
    sizes = f"tp {place.tp_size} x cp {place.cp_size} x pp {place.pp_size} x dp {place.dp_size}, ep {place.ep_size}"
    rows = f"packed sequences of {data.seq_length} tokens" if data.packing else "samples"
    step = (
        f"{data.global_batch_size} {rows}; {run.num_micro_batches} micro-batches of {data.micro_batch_size} a replica"
    )
    lines = [f"layout: {sizes}, on {run.device.type}", f"step: {step}", f"weights: {run.origin}"]
    lines.append(f"trained on this rank: {trained}")
    if frozen:
        lines.append(f"frozen on this rank: {frozen}")
    if state.step:
        lines.append(f"resumed after step {state.step}, {state.consumed_samples} samples")
    return lines
