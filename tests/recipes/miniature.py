"""The full recipes in miniature: what a cluster would run, on two to four gloo ranks, with every flag of the recipe's own.

    python -m tests.recipes                        # all of recipes/[0-9]*.yaml and recipes/layout/*.yaml (make miniature)
    python -m tests.recipes 3_sft sft_64x80gb

:func:`shrunk` alone decides what is replaced: sizes, paths and counts (docs/parallelism.md has the table). A recipe whose
messages do not overlap runs a second time with both overlaps on, one of them with bf16 gradients and moments too. What each
run goes through: rehearsal.py.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_omni.config.data import EvalSourceConfig
from megatron_omni.config.load import load_recipe, recipe_to_dict
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
from tests.recipes.miniature_data import (
    CODEC,
    CODED,
    CODED_HELD_OUT,
    DRAWING_TOKENIZER,
    DRAWING_VOCABULARY,
    DRAWN,
    DRAWN_HELD_OUT,
    DRAWN_SIZES,
    HELD_OUT,
    MIXED,
    NUM_CODES,
    PICTURE_CODEC,
    REWARD_FILE,
    SPEECH_TOKENIZER,
    SPOKEN,
    TOKENIZER,
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
    "model.image.dit.hidden_size": 16,
    "model.image.dit.num_layers": 1,
    "model.image.dit.num_attention_heads": 2,
    "model.image.dit.num_query_groups": 1,
    "model.image.dit.ffn_hidden_size": 24,
    "model.image.dit.condition_size": 12,
    "model.image.dit.caption_size": DRAWN_SIZES["caption"],
    "model.image.dit.task_size": DRAWN_SIZES["task"],
    "model.image.dit.vision_size": DRAWN_SIZES["visual"],
    "model.image.dit.kept_vision_tokens": 3,
    "model.image.projectors.hidden_size": 16,
    "model.image.projectors.num_attention_heads": 2,
    "model.image.projectors.num_layers": 1,
    "model.image.projectors.ffn_hidden_size": 24,
    "model.image.projectors.num_caption_rows": 4,
    "model.image.base_size": 32,
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
    "parallel.context_parallel_size": 2,
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
PATHS = (
    "run_dir", "init_from", "data.tokenizer", "data.sources", "data.eval_sources", "model.speech.codec", "model.image.vae",
    "model.image.weights",
)  # fmt: skip
"""Of a source, ``path`` and ``root`` alone are replaced; of the held-out sets, which there are as well."""
TIMEOUT = "parallel.distributed_timeout_seconds"
"""The harness's own: no test waits ten minutes."""
REPLACED = frozenset({*SIZES, *AT_MOST, *REINFORCE, *PATHS, REWARDS, TIMEOUT})
VARIANTS: dict[str, dict[str, Any]] = {
    "overlap": {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True},
    "lean": {
        "optim.grad_reduce_in_fp32": False,
        "optim.use_precision_aware_optimizer": True,
        "optim.exp_avg_dtype": "bf16",
        "optim.exp_avg_sq_dtype": "bf16",
    },
}
"""What a further run of a recipe changes besides: the first, of every recipe that does not have it; the second of ``LEAN``."""
LEAN = ("sft_8x80gb",)
"""Where memory is the reason for short sequences."""
MOST_RANKS, DP = 4, 2


@dataclass(frozen=True)
class Case:
    """A recipe, as it is or in one of ``VARIANTS``."""

    path: Path
    variant: str = ""

    @property
    def name(self) -> str:
        """The file's name without its ending, and the variant: ``3_sft-overlap``."""
        return self.path.stem + (self.variant and f"-{self.variant}")

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of the variant and their values."""
        return VARIANTS.get(self.variant, {})


@dataclass(frozen=True)
class Miniature:
    """A recipe that few ranks can run."""

    recipe: Recipe
    num_ranks: int
    dropped: str
    """What of the recipe's layout is smaller or gone, for people."""


def cases() -> list[Case]:
    """Every recipe, once more with both overlaps where they are not its own, and those of ``LEAN`` in that variant."""
    found = []
    for path in RECIPES:
        parallel = load_recipe(path).parallel
        found.append(Case(path))
        if not (parallel.overlap_grad_reduce and parallel.overlap_param_gather):
            found.append(Case(path, "overlap"))
        if path.stem in LEAN:
            found.append(Case(path, "lean"))
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
    if recipe.model.image is not None:
        recipe.data.tokenizer, files = str(data / DRAWING_TOKENIZER), (DRAWN, DRAWN_HELD_OUT)
        recipe.model.vocab_size, recipe.model.image.vae = DRAWING_VOCABULARY, str(data / PICTURE_CODEC)
        if recipe.model.image.weights is not None:
            recipe.model.image.weights = recipe.init_from
    for sources, file in zip((recipe.data.sources, held_out), files):
        for source in sources:
            source.path, source.root = str(data / file), ""
    for name, value in case.changes.items():
        _set(recipe, name, lambda old, value=value: value)
    allowed = REPLACED.union(case.changes)
    assert (others := _differences(full, recipe) - allowed) == set(), f"{case.name}: {others} are not to be replaced"
    validate(recipe, world_size=num_ranks)
    return Miniature(recipe, num_ranks, _dropped(full.parallel, recipe.parallel))


def _fit(parallel: ParallelConfig) -> int:
    """Ranks for two data-parallel replicas, at most four; where there would be more stages go first, then tensor-parallel
    ranks of rows that are cut."""

    def ranks() -> int:
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.context_parallel_size,
            parallel.pipeline_model_parallel_size,
        )
        return math.prod(sizes) * DP

    if ranks() > MOST_RANKS:
        parallel.pipeline_model_parallel_size = 1
    if ranks() > MOST_RANKS and parallel.context_parallel_size > 1:
        parallel.tensor_model_parallel_size = 1
    num_ranks = ranks()
    of_a_stage = num_ranks // parallel.pipeline_model_parallel_size
    if parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size > of_a_stage:
        parallel.expert_tensor_parallel_size = 1
    return num_ranks


def _dropped(full: ParallelConfig, small: ParallelConfig) -> str:
    sizes = {
        "TP": "tensor_model",
        "CP": "context",
        "PP": "pipeline_model",
        "EP": "expert_model",
        "ETP": "expert_tensor",
    }
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
