"""The full recipes in miniature: what a cluster would run, on two to four gloo ranks, with every flag of the recipe's own.

    python -m tests.recipes                        # all of recipes/[0-9]*.yaml and recipes/layout/*.yaml (make miniature)
    python -m tests.recipes 3_sft sft_64x80gb

:func:`shrunk` alone decides what is replaced: sizes, paths and counts (docs/parallelism.md has the table). A recipe whose
messages do not overlap runs a second time with both overlaps on. Each run trains, evaluates held-out sets whose media differ
between ranks, saves, goes back to the checkpoint in its middle, is stopped by a signal, is resumed to the same numbers bit for
bit, saves again, is exported and answers a question, or speaks where it is a speech generator.
"""

import copy
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.run_dir import take
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.data import EvalSourceConfig
from megatron_omni.config.load import load_recipe, recipe_to_dict
from megatron_omni.config.outcome import EXIT_REQUEUE
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.parts import NEW_TOKEN_ROWS
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
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
from megatron_omni.training.setup import Run, new_token_ids, save, setup
from tests.distributed.harness import Rank, RankFailure, run_ranks
from tests.distributed.tiny_run import WORDS, records
from tests.recipes.miniature_data import (
    CODEC,
    CODED,
    CODED_HELD_OUT,
    HELD_OUT,
    MIXED,
    NUM_CODES,
    REWARD_FILE,
    SPEECH_TOKENIZER,
    SPOKEN,
    TOKENIZER,
    make_data,
    question,
)

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted([*(ROOT / "recipes").glob("[0-9]*.yaml"), *(ROOT / "recipes" / "layout").glob("*.yaml")])
STEPS, MIDDLE, STOP = 4, 2, 3
"""Steps of a run, the one after which its first checkpoint stands, and the one in which a signal stops it later."""

_TOWER = {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
SIZES: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 48,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.kv_channels": 8,
    "model.mrope_section": [2, 1, 1],
    "model.vocab_size": 300,
    "model.moe.moe_ffn_hidden_size": 32,
    "model.moe.moe_shared_expert_intermediate_size": 16,
    **{f"model.vision.{name}": size for name, size in _TOWER.items()},
    "model.vision.image_size": 16,
    "model.vision.patch_size": 8,
    "model.vision.num_layers": 1,
    "model.vision.pooled_side": 2,
    "model.vision.max_tiles_per_side": 2,
    **{f"model.audio.{name}": size for name, size in _TOWER.items()},
    "model.audio.num_mel_bins": 16,
    "model.audio.chunk_seconds": 1.5,
    "model.audio.num_encoder_layers": 1,
    "model.audio.num_decoder_layers": 1,
    "model.audio.num_query_tokens": 10,
    "model.audio.max_target_positions": 16,
    "model.speech.num_codes": NUM_CODES,
    "model.speech.text_vocab_size": 300,
    "model.speech.text_hidden_size": 24,
    "model.speech.prefix_codes": 6,
    "model.speech.least_prefix_codes": 3,
    "model.speech.max_codes": 40,
    "model.speech.least_codes_per_token": 0.5,
    "parallel.bucket_size": 1_000,
    "data.seq_length": 128,
    "data.system_template": "none",
    "data.micro_batch_size": 1,
    "data.global_batch_size": 4,
    "train_iters": STEPS,
    "checkpoint.save_interval": MIDDLE,
    "log.interval": 1,
    "log.eval_interval": MIDDLE,
    "log.eval_iters": 1,
}
"""Fields and their values in miniature; those of a part that a recipe does not have are passed over."""
AT_MOST: dict[str, int] = {
    "optim.lr_warmup_iters": 1,
    "optim.lr_decay_iters": STEPS,
    "optim.lr_wsd_decay_iters": 2,
    "parallel.tensor_model_parallel_size": 2,
    "parallel.pipeline_model_parallel_size": 2,
    "parallel.expert_model_parallel_size": 2,
    "parallel.expert_tensor_parallel_size": 2,
}
"""Counts that stay where they are smaller, or null."""
REINFORCE: dict[str, Any] = {
    "reinforce.group_size": 3,
    "reinforce.mini_batches": 3,
    "reinforce.max_new_tokens": 6,
    "reinforce.max_running": 8,
}
"""Of recipes that reinforce: an iteration is longer than the steps to the first checkpoint."""
REWARDS = "reinforce.rewards"
"""Functions alone are replaced, by one that tells a drawn model's responses apart."""
PATHS = ("run_dir", "init_from", "data.tokenizer", "data.sources", "data.eval_sources", "model.speech.codec")
"""Of a source, ``path`` and ``root`` alone are replaced; of the held-out sets, which there are as well."""
TIMEOUT = "parallel.distributed_timeout_seconds"
"""The harness's own: no test waits ten minutes."""
REPLACED = frozenset({*SIZES, *AT_MOST, *REINFORCE, *PATHS, REWARDS, TIMEOUT})
OVERLAPS = ("parallel.overlap_grad_reduce", "parallel.overlap_param_gather")
MOST_RANKS, DP = 4, 2
MASTER = "optimizer.state.param."
"""Before a tensor's name: its fp32 master weight in a checkpoint."""
TIMES = ("time/", "step time", "tokens/s", "TFLOP/s", "MFU", "rollout/tokens_per_s")


@dataclass(frozen=True)
class Case:
    """A recipe, as it is or with both overlaps on."""

    path: Path
    overlap: bool

    @property
    def name(self) -> str:
        """The file's name without its ending; ``-overlap`` for the second run."""
        return self.path.stem + ("-overlap" if self.overlap else "")


@dataclass(frozen=True)
class Miniature:
    """A recipe that few ranks can run."""

    recipe: Recipe
    num_ranks: int
    dropped: str
    """What of the recipe's layout is smaller or gone, for people."""


def cases() -> list[Case]:
    """Every recipe, and once more with both overlaps where they are not its own."""
    found = []
    for path in RECIPES:
        parallel = load_recipe(path).parallel
        found.append(Case(path, False))
        if not (parallel.overlap_grad_reduce and parallel.overlap_param_gather):
            found.append(Case(path, True))
    return found


def shrunk(case: Case, *, data: Path, start: Path | None, run_dir: Path) -> Miniature:
    """The recipe with its sizes, paths and counts replaced and nothing else, which is asserted."""
    full = load_recipe(case.path)
    recipe = copy.deepcopy(full)
    for name, value in SIZES.items():
        _set(recipe, name, lambda old, value=value: copy.deepcopy(value))
    for name, most in AT_MOST.items():
        _set(recipe, name, lambda old, most=most: None if old is None else min(old, most))
    if recipe.task == "reinforce":
        for name, value in REINFORCE.items():
            _set(recipe, name, lambda old, value=value: value)
        for reward in recipe.reinforce.rewards:
            reward.function = f"{data / REWARD_FILE}:digits"
    num_ranks = _fit(recipe.parallel)
    recipe.run_dir, recipe.init_from = str(run_dir), None if start is None else str(start)
    speaks = "speech_generation" in case.path.stem
    marks = speaks or recipe.model.speech is not None
    recipe.data.tokenizer = str(data / (SPEECH_TOKENIZER if marks else TOKENIZER))
    held_out = recipe.data.eval_sources or [EvalSourceConfig(name="held_out", path="")]
    recipe.data.eval_sources = held_out
    files = (SPOKEN if speaks else MIXED, HELD_OUT)
    if recipe.model.speech is not None:
        recipe.model.speech.codec, files = str(data / CODEC), (CODED, CODED_HELD_OUT)
    for sources, file in zip((recipe.data.sources, held_out), files):
        for source in sources:
            source.path, source.root = str(data / file), ""
    if case.overlap:
        recipe.parallel.overlap_grad_reduce = recipe.parallel.overlap_param_gather = True
    allowed = REPLACED | set(OVERLAPS if case.overlap else ())
    assert (others := _differences(full, recipe) - allowed) == set(), f"{case.name}: {others} are not to be replaced"
    validate(recipe, world_size=num_ranks)
    return Miniature(recipe, num_ranks, _dropped(full.parallel, recipe.parallel))


def _fit(parallel: ParallelConfig) -> int:
    """Ranks for two data-parallel replicas, at most four; stages go first where there would be more."""
    tp = parallel.tensor_model_parallel_size
    if tp * parallel.pipeline_model_parallel_size * DP > MOST_RANKS:
        parallel.pipeline_model_parallel_size = 1
    num_ranks = tp * parallel.pipeline_model_parallel_size * DP
    of_a_stage = num_ranks // parallel.pipeline_model_parallel_size
    if parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size > of_a_stage:
        parallel.expert_tensor_parallel_size = 1
    return num_ranks


def _dropped(full: ParallelConfig, small: ParallelConfig) -> str:
    sizes = {"TP": "tensor_model", "PP": "pipeline_model", "EP": "expert_model", "ETP": "expert_tensor"}
    pairs = [(n, getattr(full, f"{f}_parallel_size"), getattr(small, f"{f}_parallel_size")) for n, f in sizes.items()]
    return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new) or "nothing"


def _set(recipe: Recipe, name: str, change: Any) -> None:
    *groups, field = name.split(".")
    holder: Any = recipe
    for group in groups:
        holder = getattr(holder, group)
        if holder is None:
            return
    setattr(holder, field, change(getattr(holder, field)))


def _differences(full: Recipe, small: Recipe) -> set[str]:
    """Dotted names of fields that differ; of sources, paths aside, whole."""
    mine, theirs = dict(_flat(recipe_to_dict(full), "")), dict(_flat(recipe_to_dict(small), ""))
    differ = {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
    bare = [[{**vars(s), "path": "", "root": ""} for s in recipe.data.sources] for recipe in (full, small)]
    assert bare[0] == bare[1], "a source is replaced by its paths alone"
    return differ


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# ------------------------------------------------------------------------------------------------- what ranks do


def rehearse(rank: Rank, recipe: Recipe, data: Path) -> None:
    """The whole life of a run on one rank, in one process. What it says goes into a file of its own."""
    log = os.open(log_file(recipe, rank.index), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(log, stream)
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
    if recipe.model.speech is None:
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
    dtype = torch.bfloat16 if recipe.optim.precision == "bf16" else torch.float32
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {dtype}
    if run.pg.pp.rank() == 0:
        assert len(run.model.bucket_groups) > 1, "one gradient bucket: nothing overlaps, and no bucket ends inside"
        if any(not getattr(p, "allreduce", True) for p in trained):
            assert len(run.model.expert_parallel_bucket_groups) > 1


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

    def run(self, case: Case) -> Miniature:
        """Rehearse one case; the error says what is wrong with it."""
        run_dir = self.directory / case.name
        small = shrunk(case, data=self.data, start=self._start(case), run_dir=run_dir)
        run_dir.mkdir()
        try:
            run_ranks(rehearse, small.num_ranks, small.recipe, self.data, timeout_seconds=300.0)
        except RankFailure as failure:
            said = log_file(small.recipe, 0).read_text(encoding="utf-8", errors="replace").splitlines()
            failure.add_note("\n".join(["rank 0 said last:", *said[-10:]]))
            raise
        return small

    def _start(self, case: Case) -> Path | None:
        """Weights for the recipe's ``init_from``: of one rank, of the model's own kind and tokenizer."""
        if load_recipe(case.path).init_from is None:
            return None
        small = shrunk(case, data=self.data, start=self.directory, run_dir=self.directory / "start").recipe
        small.parallel, small.init_from, small.task = ParallelConfig(), None, "supervised"
        kind = repr((small.model, small.data.tokenizer))
        if kind not in self._starts:
            small.run_dir = str(self.directory / f"start{len(self._starts)}")
            run_ranks(make_start, 1, small)
            self._starts[kind] = Path(small.run_dir)
        return self._starts[kind]
