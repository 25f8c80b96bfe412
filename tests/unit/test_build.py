"""From a recipe to this rank's weights: Megatron's configuration, layout-independent initial weights, named parts."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

import megatron_omni.models.omni  # noqa: F401  imported here once, not in every rank
from megatron_omni.config.model import AudioConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.parts import CODEC_PARTS, PARTS, SPEECH
from megatron_omni.config.pictures import IMAGE_PARTS
from megatron_omni.config.run import Recipe
from megatron_omni.models.build import build_model, transformer_config
from megatron_omni.models.init import partition
from megatron_omni.models.language import layer_pattern, vocab_rows
from megatron_omni.models.parts import apply_freeze, parameter_table, part_of
from megatron_omni.parallel import groups
from tests.distributed.harness import Rank, run_ranks


def _recipe(*, moe: bool = True, seed: int = 1, **sizes: int) -> Recipe:
    model = ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=60, make_vocab_size_divisible_by=8, mrope_section=[2, 1, 1], init_method_std=0.02,
        moe=MoEConfig(moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=8) if moe else None,
        vision=VisionConfig(
            image_size=10, patch_size=2, hidden_size=16, ffn_hidden_size=24, num_layers=1, num_attention_heads=2,
            pooled_side=2,
        ),
        audio=AudioConfig(
            num_mel_bins=6, chunk_seconds=1.5, hidden_size=16, ffn_hidden_size=24, num_encoder_layers=1,
            num_decoder_layers=1, num_attention_heads=2, num_query_tokens=10, max_target_positions=10,
        ),
    )  # fmt: skip
    return Recipe(model=model, seed=seed, parallel=ParallelConfig(**sizes), optim=OptimConfig(precision="fp32"))


@pytest.fixture
def pg() -> Iterator[ProcessGroupCollection]:
    yield groups.initialize(ParallelConfig())
    groups.destroy()


def _weights(rank: Rank, recipe: Recipe) -> dict[str, torch.Tensor]:
    """This rank's language weights by the name that checkpoints give them, with what it takes to join the ranks'."""
    pg = rank.initialize(recipe.parallel)
    model = build_model(recipe, pg)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": pg.dp_cp})
    found = {}
    for value in sharded.values():
        for shard in value.build() if hasattr(value, "build") else [value]:
            if isinstance(getattr(shard, "data", None), torch.Tensor):
                found[shard.key, tuple(shard.global_offset)] = (tuple(shard.global_shape), shard.data.detach().clone())
    return found


def _whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Full tensors put together from every rank's shards."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for (key, offset), (shape, data) in rank.items():
            target = whole.setdefault(key, torch.full(shape, float("nan")))
            extra = len(shape) - data.ndim  # axes such as "which expert" that a shard does not have
            index = tuple(offset[:extra]) + tuple(slice(o, o + n) for o, n in zip(offset[extra:], data.shape))
            target[index] = data
    return whole


@cache
def _one_rank(moe: bool) -> dict[str, torch.Tensor]:
    return _whole(run_ranks(_weights, 1, _recipe(moe=moe)))


@pytest.mark.parametrize(
    ("moe", "sizes"),
    [
        (False, {"tensor_model_parallel_size": 2}),
        (False, {"pipeline_model_parallel_size": 2}),
        (True, {"tensor_model_parallel_size": 2}),
        (True, {"pipeline_model_parallel_size": 2}),
        (True, {"expert_model_parallel_size": 2}),
        (True, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    ],
    ids=["dense-TP2", "dense-PP2", "TP2", "PP2", "EP2", "TP2xETP2"],
)
def test_every_layout_starts_from_the_same_weights(moe: bool, sizes: dict[str, int]) -> None:
    expected = _one_rank(moe)
    joined = _whole(run_ranks(_weights, 2, _recipe(moe=moe, **sizes)))
    assert set(joined) == set(expected)
    for key, value in expected.items():
        assert torch.equal(joined[key], value), key


def test_initial_weights_have_their_standard_deviation(pg: ProcessGroupCollection) -> None:
    model = build_model(_recipe(), pg)
    weights = dict(model.named_parameters())
    assert weights["language.embedding.word_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    # Matrices that write to the residual stream: / sqrt(2 * 2 blocks).
    assert weights["language.decoder.layers.0.self_attention.linear_proj.weight"].std().item() == pytest.approx(
        0.01, rel=0.1
    )
    assert weights["language.decoder.layers.1.mlp.experts.weight2"].std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.all(weights["language.decoder.final_norm.weight"] == 1)
    assert torch.all(weights["language.decoder.layers.0.self_attention.linear_qkv.bias"] == 0)
    first, second = weights["language.decoder.layers.1.mlp.experts.weight1"][:2]
    assert not torch.equal(first, second), "two experts start equal"
    other_seed = dict(build_model(_recipe(seed=2), pg).named_parameters())
    assert not torch.equal(other_seed["language.output_layer.weight"], weights["language.output_layer.weight"]), (
        "the seed has no effect"
    )


def test_partition_of_gate_and_up_takes_a_share_of_each() -> None:
    full = torch.arange(8)  # gate 0..3, up 4..7
    assert partition(full, 0, parts=2, index=1, stride=2).tolist() == [2, 3, 6, 7]
    assert partition(full, 0, parts=2, index=1, stride=1).tolist() == [4, 5, 6, 7]


def test_parts_cover_every_parameter_and_freeze_exactly_theirs(pg: ProcessGroupCollection) -> None:
    model = build_model(_recipe(), pg)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == set(PARTS) - {"ffn", "new_token_rows"} - SPEECH - CODEC_PARTS - IMAGE_PARTS
    assert parts["audio.qformer.query_tokens"] == "projectors"
    assert parts["language.decoder.layers.1.pre_mlp_layernorm.weight"] == "norms"
    assert parts["language.decoder.layers.1.mlp.router.weight"] == "gate"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    apply_freeze(model, ["vision", "gate"])
    still_trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert still_trained == {name for name in trained if parts[name] not in ("vision", "gate")}
    table = parameter_table(model)
    assert table["gate"] == (2 * 7 * 32, 0)
    assert table["experts"] == (2 * 4 * 3 * 32 * 24, 2 * 4 * 3 * 32 * 24)
    assert sum(total for total, _ in table.values()) == sum(p.numel() for p in model.parameters())


def test_dense_blocks_are_the_ffn_part(pg: ProcessGroupCollection) -> None:
    assert parameter_table(build_model(_recipe(moe=False), pg))["ffn"][0] == 2 * 3 * 32 * 48


def test_megatron_entries_reach_the_configuration_and_unknown_ones_are_refused() -> None:
    recipe = _recipe()
    recipe.model.megatron = {"softmax_scale": 0.5}
    assert transformer_config(recipe).softmax_scale == 0.5
    recipe.model.megatron = {"softmax_scal": 0.5}
    with pytest.raises(ValueError, match=r"model\.megatron\.softmax_scal=0\.5: .*did you mean 'softmax_scale'"):
        transformer_config(recipe)


def test_settings_that_cannot_work_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"make_vocab_size_divisible_by=8 .* use a multiple of 3"):
        vocab_rows(_recipe().model, 3)
    with pytest.raises(ValueError, match=r"expert_model_parallel_size=2 with model\.moe null"):
        transformer_config(_recipe(moe=False, expert_model_parallel_size=2))
    recipe = _recipe()
    recipe.parallel.recompute, recipe.model.hidden_dropout = "full", 0.1
    with pytest.raises(ValueError, match=r"parallel\.recompute=full replays"):
        transformer_config(recipe)


def test_pattern_has_the_blocks_of_each_stage() -> None:
    assert layer_pattern([2, 2], moe=True) == "*E*E|*E*E"
    assert layer_pattern([1, 3, 2], moe=False) == "*-|*-*-*-|*-*-"
    assert layer_pattern([2], moe=False) == "*-*-"
