"""What megatron-omni plan says of a rank's memory, against what the rank really holds: on every layout of {TP, PP, EP} x
{1, 2} on four ranks, on two data-parallel ranks, with and without the distributed optimizer, in bf16 and fp32.

Weights, gradients and optimizer state to the byte. Activations within 5 % of what autograd saves: each storage once,
parameters not counted, at the peak of a step (so a pipeline stage holds as many micro-batches as 1F1B keeps there).
One spawn of ranks walks through all layouts.
"""

import gc
import itertools
import weakref
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from megatron_omni.estimate.activations import Activations, MicroBatch
from megatron_omni.estimate.memory import static_bytes
from megatron_omni.models.build import build_model
from megatron_omni.models.moe.experts import RoutedExperts
from megatron_omni.models.moe.router import OmniRouter
from megatron_omni.parallel import groups
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import unwrap_model, wrap_model
from megatron_omni.segments import AttentionSegments, prefix
from megatron_omni.training.optimizer import build_optimizer
from megatron_omni.training.setup import freeze
from tests.attention import segments_of
from tests.distributed.harness import Rank, run_ranks

MICRO_BATCHES = 3
ROWS, LENGTH, LABELS, TILES, CHUNKS = 2, 128, 40, 4, 2

VALUES: dict[str, Any] = {
    "model": {
        "num_layers": 2, "hidden_size": 72, "ffn_hidden_size": 136, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 16, "mrope_section": [4, 2, 2], "vocab_size": 301, "make_vocab_size_divisible_by": 16,
        "moe": {"moe_ffn_hidden_size": 104, "moe_shared_expert_intermediate_size": 24},
        "vision": {
            "image_size": 32, "patch_size": 8, "hidden_size": 24, "ffn_hidden_size": 40, "num_layers": 2,
            "num_attention_heads": 2, "pooled_side": 2,
        },
        "audio": {
            "num_mel_bins": 20, "chunk_seconds": 1.5, "hidden_size": 24, "ffn_hidden_size": 40, "num_encoder_layers": 2,
            "num_decoder_layers": 2, "num_attention_heads": 2, "num_query_tokens": 10, "max_target_positions": 12,
        },
    },
    "optim": {"precision": "bf16"},
    "freeze": ["new_token_rows"],
}  # fmt: skip

SPEECH = {
    "model__vision": None, "model__audio": None, "model__vocab_size": 73, "model__output_bias": True,
    "model__speech": {"num_codes": 64, "text_vocab_size": 50, "text_hidden_size": 40}, "freeze": [],
}  # fmt: skip
IMAGE = {
    "task": "generative",
    "model__image": {
        "dit": {
            "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 40,
            "condition_size": 24, "caption_size": 20, "task_size": 12, "vision_size": 16,
        },
        "projectors": {"hidden_size": 24, "num_layers": 1, "ffn_hidden_size": 30},
    },
}  # fmt: skip
TABLE_2 = ["vision", "audio", "attention", "norms", "embeddings", "output", "new_token_rows"]
"""What the paper's fine-tuning leaves alone."""


@dataclass(frozen=True)
class Case:
    """A run whose memory is looked at."""

    name: str
    changes: dict[str, Any]


def layout(tp: int = 1, pp: int = 1, ep: int = 1, **changes: Any) -> Case:
    """A layout and further dotted fields (``__`` for the dot)."""
    name = f"tp{tp}-pp{pp}-ep{ep}" + "".join(f"-{k.split('__')[-1]}={v}" for k, v in changes.items())
    sizes = {"tensor": tp, "pipeline": pp, "expert": ep}
    return Case(name, {f"parallel__{axis}_model_parallel_size": n for axis, n in sizes.items()} | changes)


THREE_BLOCKS = {"model__num_layers": 3}
PLAIN = {"optim__use_distributed_optimizer": False}
LEAN = {
    "optim__grad_reduce_in_fp32": False, "optim__use_precision_aware_optimizer": True,
    "optim__exp_avg_dtype": "bf16", "optim__exp_avg_sq_dtype": "bf16",
}  # fmt: skip
FOUR_RANKS = [
    *(layout(tp, pp, ep) for tp, pp, ep in itertools.product((1, 2), repeat=3)),
    layout(2, 2, 2, **PLAIN, optim__precision="fp32"),
    layout(2, 1, 2, parallel__recompute="full", parallel__bucket_size=20_000),
    layout(
        1,
        2,
        1,
        **THREE_BLOCKS,
        parallel__pipeline_layout=[2, 1],
        parallel__recompute="moe",
        parallel__overlap_grad_reduce=True,
        parallel__bucket_size=20_000,
    ),
    layout(1, 1, 2, parallel__expert_tensor_parallel_size=2, freeze=TABLE_2),
    layout(2, 1, 1, freeze=TABLE_2[:-1]),
    layout(1, 2, 1, freeze=["output"], model__untie_embeddings_and_output_weights=False),
    layout(2, 2, 1, model__moe=None, model__untie_embeddings_and_output_weights=False),
    layout(2, 1, 2, model__moe__moe_token_dispatcher_type="allgather", data__packing=True),
    layout(2, 1, 2, model__lora={"rank": 4}),
    Case("cp2-ep2", layout(1, 1, 2, parallel__context_parallel_size=2).changes),
    Case("cp2-pp2-fp32", layout(1, 2, 1, parallel__context_parallel_size=2, optim__precision="fp32").changes),
    Case("tp2-ep2-lean", layout(2, 1, 2, **LEAN, freeze=TABLE_2[:-1]).changes),
    Case(
        "image-pp2",
        layout(2, 2, 1, **IMAGE, freeze=["vision", "projectors", "image_generator", "new_token_rows"]).changes,
    ),
    Case("image-overlap", layout(1, 1, 2, **IMAGE, parallel__overlap_grad_reduce=True).changes),
    Case("speech-pp2", layout(1, 2, 1, **SPEECH | THREE_BLOCKS, parallel__pipeline_layout=[1, 2]).changes),
    Case("speech-tp2-overlap", layout(2, 1, 2, **SPEECH, parallel__overlap_grad_reduce=True).changes),
    Case("speech-frozen", layout(1, 1, 1, **SPEECH | {"freeze": ["text_projection", "embeddings"]}).changes),
]
TWO_RANKS = [
    layout(optim__precision=precision, optim__use_distributed_optimizer=sharded)
    for precision in ("bf16", "fp32")
    for sharded in (True, False)
]
TWO_RANKS += [Case("lean", LEAN), Case("one-moment", LEAN | {"optim__exp_avg_sq_dtype": "fp32"})]
TWO_RANKS += [Case("gradients", PLAIN | {"optim__grad_reduce_in_fp32": False})]


def recipe_of(case: Case) -> Recipe:
    values = recipe_values(VALUES)
    for name, value in case.changes.items():
        *path, last = name.split("__")
        group = values
        for key in path:
            group = group.setdefault(key, {})
        group[last] = value
    return recipe_from_dict(values)


def recipe_values(values: dict[str, Any]) -> dict[str, Any]:
    return {k: recipe_values(v) if isinstance(v, dict) else v for k, v in values.items()}


def batch_of(recipe: Recipe, *, first_sample: int, packed: bool) -> OmniBatch:
    """Text, pictures and sound in every row, the last tokens labelled."""
    model = recipe.model
    names = ("input_ids", "labels", "segment_ids", "sample_ids", "sample_positions", "modality", "source_ids")
    ints = {name: torch.zeros(ROWS, LENGTH, dtype=torch.int64) for name in names}
    ints["input_ids"].random_(0, model.vocab_size)
    ints["labels"].fill_(IGNORE_LABEL)[:, -LABELS // ROWS :] = 3
    ints["segment_ids"][:, LENGTH // 2 :] = int(packed)
    ints["sample_ids"] += first_sample + torch.arange(ROWS)[:, None]
    ints["sample_positions"] += torch.arange(LENGTH)
    if model.speech is not None:
        ints["input_ids"].random_(0, model.vocab_size + model.speech.text_vocab_size)
        segments = (
            s.shifted(LENGTH * row) for row in range(ROWS) for s in prefix(LENGTH - LABELS // ROWS, LABELS // ROWS)
        )
        positions = torch.arange(LENGTH).expand(3, ROWS, LENGTH).clone()
        return OmniBatch.of(**ints, attention=AttentionSegments(tuple(segments), ROWS * LENGTH), position_ids=positions)
    assert model.vision is not None and model.audio is not None
    pictures = TILES // ROWS * model.vision.pooled_side**2
    sound = CHUNKS // ROWS * model.audio.num_query_tokens
    ints["modality"][:, 1 : 1 + pictures] = Modality.IMAGE
    ints["modality"][:, 1 + pictures : 1 + pictures + sound] = Modality.AUDIO
    side, mels = model.vision.image_size, model.audio.num_mel_bins
    return OmniBatch.of(
        **ints,
        attention=segments_of(ints["segment_ids"]),
        position_ids=torch.arange(LENGTH).expand(3, ROWS, LENGTH).clone(),
        pixel_values=torch.randint(256, (TILES, 3, side, side), dtype=torch.uint8),
        audio_features=torch.randn(CHUNKS, mels, int(model.audio.chunk_seconds * 100)),
    )


class SavedBytes:
    """Bytes of the storages that autograd holds: now and at most. Each storage counts once, ``ignored`` ones never."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> "_Held":
        held = _Held(tensor)
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.ignored:
            self.holders[key] = self.holders.get(key, 0) + 1
            if self.holders[key] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._release, key, size)
        return held

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if self.holders[key] == 0:
            self.now -= size


class _Held:
    """What autograd gets instead of a tensor; gone when autograd lets go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the storages behind ``tensors``."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def optimizer_tensors(optimizer: Any) -> Any:
    for member in optimizer.chained_optimizers:
        if member.is_stub_optimizer:
            continue
        for group in member.optimizer.param_groups:
            yield from group["params"]
        for state in member.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def held_and_planned(rank: Rank, cases: list[Case], tokenizer: Path) -> list[dict[str, Any]]:
    return [look_at(replace(rank, store=dist.PrefixStore(case.name, rank.store)), case, tokenizer) for case in cases]


def look_at(rank: Rank, case: Case, tokenizer: Path) -> dict[str, Any]:
    """Real and planned bytes of this rank in one case."""
    torch.manual_seed(rank.index)
    recipe = recipe_of(case)
    recipe.data.tokenizer = str(tokenizer)
    pg = rank.initialize(recipe.parallel)
    built = build_model(recipe, pg)
    freeze(built, recipe)
    model = wrap_model(built, recipe, pg)
    optimizer, _ = build_optimizer(model, recipe, pg)
    parameters = storages(model.parameters())
    buffers = [*model.buffers, *model.expert_parallel_buffers]
    state = {k: v for k, v in storages(optimizer_tensors(optimizer)).items() if k not in parameters}
    held = {
        "weights": sum(parameters.values()),
        "gradients": sum(storages(buffer.grad_data for buffer in buffers).values()),
        "optimizer": sum(state.values()),
    }
    planned = vars(
        static_bytes(
            recipe, rank.world_size, stage=pg.pp.rank(), dp_rank=pg.dp_cp.rank(), expert_dp_rank=pg.expt_dp.rank()
        )
    )
    kept, expected = activations(recipe, model, pg)
    groups.destroy()
    return {"held": held, "planned": planned, "kept": kept, "expected": expected, "stage": pg.pp.rank()}


def activations(recipe: Recipe, model: Any, pg: Any) -> tuple[int, float]:
    """Peak of what a step keeps, and what the plan says with this step's routing."""
    routed: dict[str, list[int]] = {"sent": [], "received": []}

    def count(module: Any, inputs: Any, output: Any = None) -> None:
        if isinstance(module, RoutedExperts):
            routed["received"].append(inputs[0].shape[0])
        else:
            num_routed = recipe.model.moe.num_routed_experts if recipe.model.moe else 0
            routed["sent"].append(int(output.routing.mask[:, :num_routed].sum()))

    omni = unwrap_model(model)
    for module in omni.modules():
        if isinstance(module, RoutedExperts):
            module.register_forward_pre_hook(count)
        elif isinstance(module, OmniRouter):
            module.register_forward_hook(count)
    ignored = set(storages(model.parameters()))
    ignored |= set(storages(torch.nn.Module.buffers(model)))
    saved = SavedBytes(ignored)
    packed = recipe.data.packing
    batches = [batch_of(recipe, first_sample=i * ROWS, packed=packed) for i in range(MICRO_BATCHES)]

    def forward_step(batch: OmniBatch, model: Any) -> tuple[torch.Tensor, Any]:
        losses = model(batch, step=1, stochastic=True, aux_loss_scale=0.1)
        return losses, lambda losses: (losses.sum(), None)

    model.zero_grad_buffer()
    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        run_step(partial(forward_step), batches, model, pg=pg, recipe=recipe)
    tp, stages, stage = pg.tp.size(), pg.pp.size(), pg.pp.rank()
    sent, received = sum(routed["sent"]), sum(routed["received"])
    shard_tokens = ROWS * LENGTH / tp / pg.cp.size() * max(len(routed["sent"]), 1)
    # Where all are at the end of a row they are not shared evenly.
    labels = LABELS if omni.cut is None else omni.cut.part(batches[0]).num_label_tokens * pg.cp.size()
    batch = MicroBatch(
        rows=ROWS, length=LENGTH, label_tokens=labels, tiles=TILES if recipe.model.vision else 0,
        chunks=CHUNKS if recipe.model.audio else 0,
        mean_k=sent / shard_tokens,
        imbalance=received / sent / pg.expt_tp.size() if sent else 1.0,
    )  # fmt: skip
    in_flight = min(stages - stage, MICRO_BATCHES)
    return saved.peak, in_flight * Activations(recipe, batch).stage(stage)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all new tokens, their ids first."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_sentencepiece(["one two three"], path, vocab_size=315, specials=ALL_SPECIALS)


@pytest.fixture(scope="module")
def four_ranks(tokenizer: Path) -> list[list[dict[str, Any]]]:
    return run_ranks(held_and_planned, 4, FOUR_RANKS, tokenizer, timeout_seconds=500.0)


@pytest.fixture(scope="module")
def two_ranks(tokenizer: Path) -> list[list[dict[str, Any]]]:
    return run_ranks(held_and_planned, 2, TWO_RANKS, tokenizer, timeout_seconds=250.0)


def check(results: list[list[dict[str, Any]]], index: int) -> None:
    for rank, result in enumerate(results):
        assert result[index]["held"] == result[index]["planned"], f"rank {rank}"
        kept, expected = result[index]["kept"], result[index]["expected"]
        assert expected == pytest.approx(kept, rel=0.05), f"rank {rank}, stage {result[index]['stage']}"


@pytest.mark.parametrize("index", range(len(FOUR_RANKS)), ids=[case.name for case in FOUR_RANKS])
def test_bytes_of_a_rank(four_ranks: list[list[dict[str, Any]]], index: int) -> None:
    check(four_ranks, index)


@pytest.mark.parametrize("index", range(len(TWO_RANKS)), ids=[case.name for case in TWO_RANKS])
def test_bytes_of_two_replicas(two_ranks: list[list[dict[str, Any]]], index: int) -> None:
    check(two_ranks, index)
