"""The life of a recipe in miniature (miniature.py), on every rank of it.

It trains, evaluates held-out sets whose media differ between ranks, saves, goes back to the checkpoint in its middle, is stopped
by a signal, is resumed to the same numbers bit for bit, saves again, is exported and answers a question, or speaks where it is a
speech generator; what draws and is trained without a language model ends there.
"""

import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.run_dir import take
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.generative import GenerativeConfig
from megatron_omni.config.load import load_recipe
from megatron_omni.config.outcome import EXIT_REQUEUE
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.parts import NEW_TOKEN_ROWS
from megatron_omni.config.run import Recipe
from megatron_omni.data.record import parse_record
from megatron_omni.generation.answers import ANSWER, answer_one
from megatron_omni.generation.load import Checkpoint, open_checkpoint
from megatron_omni.generation.request import Wanted
from megatron_omni.generation.speaking import speak_all
from megatron_omni.generation.speech import Utterance
from megatron_omni.models.generators.codec import load_codec
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.tasks.choice import task_of
from megatron_omni.training.loop import train
from megatron_omni.training.optimizer import DTYPES
from megatron_omni.training.setup import Run, new_token_ids, save, setup
from tests.distributed.harness import Rank, RankFailure, run_ranks
from tests.distributed.tiny_run import WORDS, records
from tests.recipes.miniature import DP, MIDDLE, STEPS, STOP, Case, Miniature, shrunk
from tests.recipes.miniature_data import make_data, question

MASTER = "optimizer.state.param."
"""Before a tensor's name: its fp32 master weight in a checkpoint."""
SIGNAL = "SIGSEGV("
"""With which PyTorch begins the native stacks of a process that dies of it."""
TIMES = ("time/", "step time", "tokens/s", "pictures/s", "TFLOP/s", "MFU", "rollout/tokens_per_s")


def rehearse(rank: Rank, recipe: Recipe, data: Path) -> None:
    """The whole life of a run on one rank, in one process. What it says goes into a file of its own."""
    log = os.open(log_file(recipe, rank.index), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(log, stream)
    # A rank once died of a signal in a thread without Python, so Python's stacks did not tell where (docs/log.md).
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    pg = rank.initialize(recipe.parallel)

    def begin() -> Run:
        run = setup(recipe, task_of(recipe), pg=pg)
        if rank.index == 0:
            take(recipe)
        dist.barrier()
        return run

    run = begin()
    assert run.state.step == 0 and (recipe.init_from is None or recipe.init_from in run.origin), run.origin
    check_flags(run)
    alone = recipe.task == "generative" and recipe.generative.conditions != "model"  # no language model
    if recipe.model.speech is None and not alone:
        check_held_out(run)
    assert train(run) == 0
    straight, weights = metrics(recipe), whole_weights(run)
    dist.barrier()
    if rank.index == 0:
        check_metrics(recipe, straight)
        for step in (MIDDLE, STEPS):
            check_weights(recipe, step)
        commit.write_text(run.checkpoints / commit.TRACKER, f"{MIDDLE}\n")  # rolled back
    dist.barrier()

    run = begin()
    assert run.state.step == MIDDLE, f"load={recipe.load}: does not resume its own run_dir"
    stop_in(run, STOP)  # then a save follows an update with no evaluation between them
    assert train(run) == EXIT_REQUEUE
    dist.barrier()
    if rank.index == 0:
        check_weights(recipe, STOP)

    run = begin()
    assert run.state.step == STOP
    assert train(run) == 0
    resumed, again = metrics(recipe), whole_weights(run)
    assert resumed == straight, "a resumed run is not the one that went straight on"
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), f"{name} of the resumed run differs from the one that went straight on"
    dist.barrier()
    if rank.index == 0:
        check_weights(recipe, STEPS)
    if alone:
        return
    if rank.index == 0:
        out = Path(recipe.run_dir) / "exported"
        export_checkpoint(open_ours(Path(recipe.run_dir)), out)
        assert (out / "config.json").is_file() and list(out.glob("*.safetensors"))
    dist.barrier()
    sizes = [f"parallel.{f.name}={getattr(recipe.parallel, f.name)}" for f in _sizes(recipe.parallel)]
    checkpoint = open_checkpoint(Path(recipe.run_dir), overrides=sizes, pg=pg)
    if recipe.model.speech is not None:
        check_speech(checkpoint)
        return
    out = Path(recipe.run_dir) / "answer"
    answer_one(checkpoint, parse_record(question(data)), out=out, wanted=Wanted(max_new_tokens=4), batch_size=1)
    dist.barrier()
    assert (Path(recipe.run_dir) / "answer" / ANSWER).is_file()


def check_speech(checkpoint: Checkpoint) -> None:
    """It speaks a text of two pieces, on every layout as many samples as codes make."""
    speech = checkpoint.recipe.model.speech
    assert speech is not None and speech.codec is not None
    codec, text = load_codec(speech.codec), " ".join(WORDS)
    said = [Utterance(name="short", prompt="Language: English; Speaker: Jenny;", text=WORDS[0])]
    said += [Utterance(name="long", prompt="A low voice speaks slowly.", text=f"{text}. {text}")]
    ended = speak_all(checkpoint.load_model(), said, codec=codec, tokenizer=checkpoint.builder.tokenizer)
    assert ended["short"].pieces == 1 and ended["long"].pieces > 1
    for event in ended.values():
        assert event.error is None and event.samples == event.codes * codec.hop_size > 0


def stop_in(run: Run, step: int) -> None:
    """Rank 0 gets SIGTERM before the data of ``step`` is there."""
    if dist.get_rank() != 0:
        return
    make = run.task.batches

    def batches(*arguments: Any, **settings: Any) -> Any:
        if run.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(*arguments, **settings)

    run.task.batches = batches  # type: ignore[method-assign]


def log_file(recipe: Recipe, rank: int) -> Path:
    return Path(recipe.run_dir) / f"rank{rank}.log"


def _sizes(parallel: ParallelConfig) -> list[Any]:
    return [f for f in parallel.__dataclass_fields__.values() if f.name.endswith("parallel_size")]


def check_flags(run: Run) -> None:
    """What the recipe asks for is what runs: precision, overlap, optimizer, several gradient buckets."""
    recipe, config = run.recipe, run.model.ddp_config
    assert config.overlap_grad_reduce == recipe.parallel.overlap_grad_reduce
    assert config.overlap_param_gather == recipe.parallel.overlap_param_gather
    assert config.use_distributed_optimizer == recipe.optim.use_distributed_optimizer
    gradients = {buffer.grad_dtype for buffer in run.model.buffers + run.model.expert_parallel_buffers}
    wide = recipe.optim.grad_reduce_in_fp32 or recipe.optim.precision == "fp32"
    assert gradients == {torch.float32 if wide else torch.bfloat16}
    state = {key: value for member in run.optimizer.chained_optimizers for key, value in moments(member)}
    assert state == {name: DTYPES[getattr(recipe.optim, f"{name}_dtype")] for name in ("exp_avg", "exp_avg_sq")}
    dtype = torch.bfloat16 if recipe.optim.precision == "bf16" else torch.float32
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {dtype}
    if run.pg.pp.rank() == 0:
        assert len(run.model.bucket_groups) > 1, "one gradient bucket: nothing overlaps, and no bucket ends inside"
        if any(not getattr(p, "allreduce", True) for p in trained):
            assert len(run.model.expert_parallel_bucket_groups) > 1


def moments(member: Any) -> Iterator[tuple[str, torch.dtype]]:
    """Adam's, by name, and their dtypes."""
    if not member.is_stub_optimizer:
        for state in member.optimizer.state.values():
            yield from ((name, value.dtype) for name, value in state.items() if name.startswith("exp_avg"))


def check_held_out(run: Run) -> None:
    """Some micro-batch of an evaluation has media on one data-parallel rank that another's has not."""
    mine: list[Any] = []
    for loader in run.eval_loaders.values():
        batches = [] if loader is None else loader.next_step()
        mine.append([(b.pixel_values is not None, b.audio_features is not None) for b in batches])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    read = [kinds for kinds in everyone if any(kinds)]
    assert len(read) == DP and read[0] != read[1], f"media of the held-out sets are alike on all ranks: {read}"


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    """The records of a run without what a clock says; read by every rank when the run is over."""
    dist.barrier()
    return [{k: v for k, v in record.items() if not k.startswith(TIMES)} for record in records(recipe)]


def whole_weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in unwrap_model(run.model).named_parameters()}


def check_metrics(recipe: Recipe, found: list[dict[str, Any]]) -> None:
    """Every step has finite figures and every held-out set two evaluations."""
    loss = task_of(recipe).report_names[0]
    steps = [record for record in found if loss in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(record[loss]) and 0 < record["grad-norm"] < math.inf for record in steps)
    for source in recipe.data.eval_sources:
        losses = [r[f"eval/loss/{source.name}"] for r in found if f"eval/loss/{source.name}" in r]
        assert len(losses) == 2 and all(map(math.isfinite, losses)), source.name


def check_weights(recipe: Recipe, step: int) -> None:
    """The checkpoint ran with this very recipe, and its weights are its optimizer's, rounded: those of the last update."""
    directory = commit.iteration_dir(Path(recipe.run_dir) / commit.CHECKPOINTS, step)
    assert load_recipe(directory / "run_config.yaml") == recipe
    reader, compared = TorchDistReader(directory), 0
    for key in reader.tensors:
        if key.startswith(MASTER):
            master, name = reader.read(key), key.removeprefix(MASTER)
            matrix = name.replace(f"embedding.{NEW_TOKEN_ROWS}", "embedding.word_embeddings")
            weight = reader.read(matrix.replace(f".{NEW_TOKEN_ROWS}", ""))
            if NEW_TOKEN_ROWS in name:
                weight = weight[new_token_ids(recipe)]
            assert torch.equal(master.to(weight.dtype), weight), f"{key.removeprefix(MASTER)}: not of the last update"
            compared += 1
    assert compared > 0 or not recipe.optim.use_distributed_optimizer


def make_start(rank: Rank, recipe: Recipe) -> None:
    """A checkpoint of drawn weights to start from."""
    pg = rank.initialize(recipe.parallel)
    save(setup(recipe, task_of(recipe), pg=pg))


class Rehearsal:
    """Data and starting weights, made once for all cases of a session."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = make_data(directory / "data")
        self._starts: dict[str, Path] = {}

    def run(self, case: Case, *, attempt: int = 1) -> Miniature:
        """Rehearse one case; the error says what is wrong with it."""
        run_dir = self.directory / f"{case.name}.{attempt}"
        small = shrunk(case, data=self.data, start=self._start(case), run_dir=run_dir)
        run_dir.mkdir()
        try:
            run_ranks(rehearse, small.num_ranks, small.recipe, self.data, timeout_seconds=300.0)
        except RankFailure as failure:
            logs = [log_file(small.recipe, rank) for rank in range(small.num_ranks)]
            said = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
            failure.add_note("\n".join(["rank 0 said last:", *said[0].splitlines()[-10:]]))
            for rank, text in enumerate(said):
                if SIGNAL in text:
                    failure.add_note(f"native stacks of rank {rank}:\n{text[text.index(SIGNAL) :]}")
            raise
        return small

    def _start(self, case: Case) -> Path | None:
        """Weights for the recipe's ``init_from``: of one rank, of the model's own kind and tokenizer."""
        if load_recipe(case.path).init_from is None:
            return None
        small = shrunk(case, data=self.data, start=self.directory, run_dir=self.directory / "start").recipe
        small.parallel, small.init_from, small.task = ParallelConfig(), None, "supervised"
        small.generative = GenerativeConfig()
        if small.model.image is not None:
            small.model.image.weights, small.freeze = None, []
        kind = repr((small.model, small.data.tokenizer))
        if kind not in self._starts:
            small.run_dir = str(self.directory / f"start{len(self._starts)}")
            run_ranks(make_start, 1, small)
            self._starts[kind] = Path(small.run_dir)
        return self._starts[kind]
