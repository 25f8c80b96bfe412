"""Reinforcement by GSPO: the model answers prompts, functions judge the answers, and better ones become likelier.

An iteration takes M = ``mini_batches`` steps of the loop. Before the first of them, on the weights as they stand:

    M steps of prompts -> G responses each (responding.py) -> rewards -> advantages (judging.py)
    -> old log-probabilities: the training forward, in the very micro-batches of the updates (iteration.py)

and then M updates, whose loss is losses/gspo.py's. So the ratio is 1 to the bit in the first of them. Nothing is drawn in
any of these forwards: experts are chosen as in evaluation, there is neither jitter nor dropout nor auxiliary loss.

A mini-batch of which no group has spread has nothing to learn: its step is skipped, on all ranks; ``EMPTY_LIMIT`` of them
in a row end the run. Held-out sets are evaluated as in supervised training.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.batch import OmniBatch, SampleRows
from megatron_omni.config.run import Recipe
from megatron_omni.data.prompts import PromptLoader, PromptStep
from megatron_omni.data.tokenizer import load_tokenizer
from megatron_omni.losses.gspo import PolicyTerms, gspo_loss
from megatron_omni.models.moe.routes import RouteRecord, flipped, num_slots
from megatron_omni.parallel.groups import replica
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.sharing import StepData, sum_over_ranks
from megatron_omni.platform.seeds import named_seed
from megatron_omni.rewards import Rewards
from megatron_omni.rewards.rollouts import write_rollouts
from megatron_omni.tasks.figures import Figures
from megatron_omni.tasks.iteration import Drawn, Iteration, MicroBatch, replace_dull
from megatron_omni.tasks.judging import judge, rollout
from megatron_omni.tasks.monitor import advise, compare
from megatron_omni.tasks.responding import sample_responses
from megatron_omni.tasks.start_weights import StartWeights
from megatron_omni.tasks.supervised import SupervisedTask
from megatron_omni.tasks.unanswered import Unanswered
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.setup import Run
from megatron_omni.training.step_data import read_together
from megatron_omni.training.task import Interrupted, LossFunction, StepInfo, Task

logger = logging.getLogger(__name__)

EMPTY_LIMIT = 20
"""Steps in a row without anything to learn after which the run ends."""
CUT_SHARE = 0.5
"""Of responses cut by length, above which the log says so."""
REPORT = ("policy loss", "clip/low", "clip/high", "ratio/mean_dev", "kl")


class ReinforceTask(Task):
    """GSPO with the recipe's rewards."""

    report_names = REPORT
    watches_loss = False  # it is 0 in the first step of an iteration, whatever happens

    def __init__(self, recipe: Recipe) -> None:
        self.config = recipe.reinforce
        self._held_out = SupervisedTask(recipe.data.sources)
        self._rewards: Rewards | None = None
        self._unanswered = Unanswered(recipe.run_dir)
        self._number = 0
        """Of the next iteration."""
        self._held: Iteration | None = None
        self._saved: dict[str, Any] | None = None
        """An iteration that a checkpoint was saved in."""
        self._facts: dict[int, MicroBatch] = {}
        """Of the step's micro-batches, by the identity of their attention."""
        self._empty = 0
        """Steps in a row without anything to learn."""
        self._latest: dict[str, float] = {}
        """Figures of the last iteration."""
        self._figures = Figures()
        self._advised = False
        self._max_dev: Tensor | None = None
        self._start: StartWeights | None = None
        """What the KL divergence is from."""

    # ------------------------------------------------------------------------------------------- of the loop

    def begin(self, run: Run) -> None:
        """See :class:`megatron_omni.training.task.Task`."""
        self.tokenizer = load_tokenizer(run.recipe.data.tokenizer)
        if self.config.kl_coeff:
            self._start = StartWeights(run.model)
        if run.loader is not None:
            self._rewards = Rewards.of(self.config, run_dir=run.recipe.run_dir, rank=run.place.dp_rank)

    def close(self) -> None:
        """See :class:`megatron_omni.training.task.Task`."""
        if self._rewards is not None:
            self._rewards.close()

    def batches(
        self, run: Run, *, timer: PartTimer, stop: Callable[[], bool], written: Callable[[], bool]
    ) -> tuple[StepData | None, dict[str, int]]:
        """See :class:`megatron_omni.training.task.Task`."""
        if self._held is None or self._held.is_done:
            self._held = None  # its memory is not needed beside the next one
            self._held = self._begin(run, timer, stop) if self._saved is None else self._restored(run, timer)
        held, mini = self._held, self._held.next
        stops, done = sum_over_ranks([int(stop()), int(written())], device=run.device)
        counts = held.counts[mini] | {"stop": stops, "written": done}
        data = held.batches[mini]
        held.next += 1
        micro_batches = zip(data.without_media, held.micro_batches[mini], strict=True)
        self._facts = {id(batch.attention): facts for batch, facts in micro_batches}
        if counts["divisor"]:
            self._empty = 0
            return data, counts
        self._nothing_to_learn()
        return None, counts

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """See :class:`megatron_omni.training.task.Task`."""
        if not info.training:
            return self._held_out.forward_step(batch, model, info=info)
        facts = self._facts[id(batch.attention)]
        output = model(batch, step=info.step, stochastic=False, stats=info.stats, temperature=self.config.temperature)

        def loss_function(token_loss: Tensor) -> tuple[Tensor, Tensor]:
            assert facts.old is not None and facts.advantages is not None and facts.kept is not None
            terms = gspo_loss(
                facts.where.of(-token_loss),
                facts.old,
                facts.where.valid,
                facts.advantages,
                facts.kept,
                num_sequences=info.divisor,
                clip_low=self.config.clip_low,
                clip_high=self.config.clip_high,
                form=self.config.form,
                kl_coeff=self.config.kl_coeff,
                reference_log_probs=facts.reference,
            )
            return terms.loss, self._report(terms, facts.kept, info.divisor)

        return output, loss_function

    def metrics(self, run: Run) -> dict[str, float]:
        """See :class:`megatron_omni.training.task.Task`."""
        largest = torch.zeros((), dtype=torch.float64, device=run.device) if self._max_dev is None else self._max_dev
        if dist.get_world_size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self._max_dev = None
        return {"ratio/max_dev": float(largest), **self._figures.take()}

    def state_dict(self, run: Run) -> dict[str, Any]:
        """See :class:`megatron_omni.training.task.Task`."""
        state: dict[str, Any] = {"iteration": self._number, "empty": self._empty}
        if self._start is not None:
            state["reference"] = run.initial_weights
        if self._held is not None and not self._held.is_done:
            state |= {"settings": self._settings(run), "held": self._held.state_dict(run)}
        return state

    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """See :class:`megatron_omni.training.task.Task`."""
        self._number, self._empty = state["iteration"], state["empty"]
        if self._start is not None and state.get("reference", run.initial_weights) != run.initial_weights:
            raise ValueError(
                f"init_from={run.recipe.init_from!r}: with reinforce.kl_coeff the divergence is from the weights that the run "
                "began with, and these are others; name their checkpoint, or start a new run"
            )
        if "held" not in state:
            return
        for name, value in self._settings(run).items():
            if value != state["settings"][name]:
                raise ValueError(
                    f"{name}={value!r}: the checkpoint was saved amid an iteration that began with "
                    f"{state['settings'][name]!r}; set it back, or start from a checkpoint between two iterations"
                )
        self._saved = state["held"]

    def _settings(self, run: Run) -> dict[str, Any]:
        """What an iteration that has begun goes on with."""
        fixed = ("group_size", "mini_batches", "max_new_tokens", "temperature", "share_prompt", "routes", "kl_coeff")
        found = {f"reinforce.{name}": getattr(self.config, name) for name in fixed}
        return found | {"data.global_batch_size": run.recipe.data.global_batch_size}

    # ------------------------------------------------------------------------------------------- an iteration

    def _begin(self, run: Run, timer: PartTimer, stop: Callable[[], bool]) -> Iteration:
        """Answer the prompts of the next steps, judge the answers, compute their log-probabilities."""
        mark = run.loader.mark() if isinstance(run.loader, PromptLoader) else None
        with timer.measure("data"):
            drawn = Drawn.of(self._read(run))
        try:
            rows = self._answer(run, drawn, timer, stop)
        except Interrupted:
            if mark is not None:
                run.loader.go_back(mark)  # type: ignore[union-attr]
            raise
        places = {number: prompt.record.where for number, prompt in drawn.prompts.items()}
        steps, responses, places = _from_leader(run, (drawn.steps, drawn.responses, places))
        asked = {number for mini in steps for micro in mini for number in micro}  # others gave way
        responses = {number: group for number, group in responses.items() if number in asked}
        iteration = Iteration(number=self._number, steps=steps, responses=responses, places=places)
        self._number += 1
        with timer.measure("old_logp"):
            start = time.perf_counter()
            iteration.prepare(run, drawn.prompts, rows)
            self._old_log_probs(run, iteration)
            self._reference_log_probs(run, iteration)
            self._take_comparison(compare(run, iteration))
            iteration.settle(run)
            self._figures.add("time/old_logp", time.perf_counter() - start, 1)
        if run.loader is not None:
            self._write(run, iteration, drawn)
        return iteration

    def _answer(self, run: Run, drawn: Drawn, timer: PartTimer, stop: Callable[[], bool]) -> dict[int, SampleRows]:
        """Responses to what was drawn, with rewards and advantages; prompts without spread give way to the next ones. Rows of
        frozen encoders are returned, by the prompt's number."""
        found, fresh = Figures(), [*drawn.prompts.values()]
        rows: dict[int, SampleRows] = {}
        for turn in range(1 + self.config.resample):
            start = time.perf_counter()
            with timer.measure("rollout"):
                drawn.responses |= sample_responses(
                    run,
                    fresh,
                    tokenizer=self.tokenizer,
                    seed=named_seed(run.recipe.seed, "rollout", self._number),
                    rows=rows,
                    stop=stop,
                    moved=timer.moved,
                )
            found.add("time/rollout", (rolled := time.perf_counter()) - start, not turn)
            with timer.measure("reward"):
                figures = judge(run, self._rewards, fresh, drawn.responses, tokenizer=self.tokenizer, moved=timer.moved)
                self._unanswered.check(figures.scores[0].unanswered_share, iteration=self._number)
            found.merge([figures.plain()])
            found.add("time/reward", time.perf_counter() - rolled, not turn)
            if turn == self.config.resample:
                break
            replaced = replace_dull(run, drawn, fresh)
            if replaced is None:
                break
            fresh = replaced
        found.add("rollout/tokens_per_s", found.sums["rollout/length"][0], found.sums["time/rollout"][0])
        self._latest = found.metrics()
        if self._latest["rollout/cut"] > CUT_SHARE and dist.get_rank() == 0:
            logger.warning(
                "iteration %d: %.0f %% of the responses were cut at reinforce.max_new_tokens=%d: answers that do not end "
                "get no reward; raise it",
                self._number, 100 * self._latest["rollout/cut"], self.config.max_new_tokens,
            )  # fmt: skip
        self._figures.merge([found.plain()])
        return rows

    def _restored(self, run: Run, timer: PartTimer) -> Iteration:
        """The iteration that a checkpoint was saved in."""
        assert self._saved is not None
        state, self._saved = self._saved, None
        iteration = Iteration.of_state(state, run)
        with timer.measure("data"):
            prompts = {}
            if isinstance(run.loader, PromptLoader):
                prompts = {number: run.loader.prompt(number) for number in iteration.responses}
        iteration.prepare(run, prompts)
        iteration.restore(state, run)
        iteration.settle(run)
        return iteration

    def _read(self, run: Run) -> list[PromptStep]:
        """The prompts of the next steps, fewer where the data ends; none on ranks that do not read."""
        steps: list[PromptStep] = []
        loader = run.loader if isinstance(run.loader, PromptLoader) else None
        for place in range(self.config.mini_batches):
            step, end = read_together(None if loader is None else loader.next_step, device=run.device)
            if end is not None and not place:
                raise end
            if end is not None:
                break
            steps += [step] if step is not None else []
        return steps

    def _old_log_probs(self, run: Run, iteration: Iteration) -> None:
        """Log-probabilities of the responses under the weights as they stand, by the forward of the updates."""

        replays, moe = self.config.routes == "rollout", run.recipe.model.moe
        records: list[RouteRecord] = []

        def forward(batch: OmniBatch, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            records.append(RouteRecord())
            output = model(
                batch if replays else replace(batch, routes=None),
                step=0,
                stochastic=False,
                record=records[-1],
                temperature=self.config.temperature,
                with_entropy=True,
            )
            return output, lambda found: (found.new_zeros(()), found)

        for data, micro_batches in zip(iteration.batches, iteration.micro_batches, strict=True):
            reports = run_step(forward, data, run.model, pg=run.pg, recipe=run.recipe, forward_only=True)
            for micro, (token_loss, entropy) in zip(micro_batches, reports):
                micro.old = micro.where.of(-token_loss).contiguous()
                micro.entropy = float(micro.where.of(entropy).sum())
            if moe is not None:
                pairs = zip(records, data.without_media, strict=True)
                old = [record.grid(batch, run.recipe.model, run.pg) for record, batch in pairs]
                self._fix_routes(data, micro_batches, old, slots=num_slots(moe))
            records.clear()

    def _reference_log_probs(self, run: Run, iteration: Iteration) -> None:
        """The same under the weights that the run started from, where the loss asks for them."""
        if self._start is None:
            return

        def forward(batch: OmniBatch, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            live = replace(batch, routes=None)
            output = model(live, step=0, stochastic=False, temperature=self.config.temperature)
            return output, lambda found: (found.new_zeros(()), found)

        with self._start.in_place():
            for data, micro_batches in zip(iteration.batches, iteration.micro_batches, strict=True):
                reports = run_step(forward, data, run.model, pg=run.pg, recipe=run.recipe, forward_only=True)
                for micro, token_loss in zip(micro_batches, reports):
                    micro.reference = micro.where.of(-token_loss).contiguous()

    def _take_comparison(self, figures: Figures) -> None:
        advice = advise(figures, routes=self.config.routes)
        if advice is not None and not self._advised and dist.get_rank() == 0:
            logger.warning("%s", advice)
        self._advised = self._advised or advice is not None
        self._figures.merge([figures.plain()])

    def _fix_routes(
        self, data: StepData, micro_batches: Sequence[MicroBatch], old: Sequence[Tensor], *, slots: int
    ) -> None:
        """Compare the routes that the forward chose with the rollout's; the updates have those that the recipe says."""
        rollout = [batch.routes for batch in data.without_media]
        for micro, chosen, sampled in zip(micro_batches, old, rollout, strict=True):
            if sampled is not None:
                micro.flips = micro.where.of(flipped(chosen, sampled, num_slots=slots)).sum(1)
        data.replay({"live": [None] * len(old), "old": old, "rollout": rollout}[self.config.routes])

    def _write(self, run: Run, iteration: Iteration, drawn: Drawn) -> None:
        """This replica's file of the iteration's responses."""
        names = [source.name for source in run.recipe.data.sources]
        rows = [
            rollout(
                prompt, g, response, iteration=iteration.number, source=names[prompt.source], tokenizer=self.tokenizer
            )
            for number, prompt in sorted(drawn.prompts.items())
            for g, response in enumerate(drawn.responses[number])
        ]
        place = run.place
        write_rollouts(run.recipe.run_dir, rows, iteration=iteration.number, rank=place.dp_rank, ranks=place.dp_size)

    def _nothing_to_learn(self) -> None:
        self._empty += 1
        self._figures.add("groups/empty_steps", 1, 1)
        if self._empty >= EMPTY_LIMIT:
            right, wrong = (self._latest.get(f"groups/all_{name}", 0.0) for name in ("right", "wrong"))
            left_out = self._latest.get("reward/left_out", 0.0)
            unusable = (
                f" {left_out:.0%} of the responses got no reward: look at the records' solutions." if left_out else ""
            )
            raise RuntimeError(
                f"{EMPTY_LIMIT} steps in a row had no prompt whose responses got different rewards, so there was nothing to "
                f"learn; of the last prompts {right:.0%} were answered right every time and {wrong:.0%} wrong every time."
                f"{unusable} Take harder prompts, or easier ones and a better start (init_from), or raise reinforce.group_size"
            )

    def _report(self, terms: PolicyTerms, kept: Tensor, divisor: int) -> Tensor:
        """[rows, 2] sums and counts over the kept responses of a micro-batch."""
        deviation = (terms.ratio - 1).abs().masked_fill(~kept, 0.0)
        largest = deviation.max() if len(deviation) else deviation.sum()
        self._max_dev = largest if self._max_dev is None else torch.maximum(self._max_dev, largest)
        sums = [
            terms.loss.detach().double() * divisor,
            terms.clipped_low.sum(),
            terms.clipped_high.sum(),
            deviation.sum(),
            terms.kl.masked_fill(~kept, 0.0).sum(),
        ]
        count = kept.sum()
        return torch.stack([torch.stack([value.double(), count.double()]) for value in sums])


def _from_leader[T](run: Run, value: T) -> T:
    """What the leader of a replica has, on all of its ranks."""
    if replica(run.pg).size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=replica(run.pg), group_src=0)
    return box[0]
