"""Parameter counts and FLOPs against the paper's Table 1 figures as worked out in docs/model.md."""

import pytest

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.estimate import ParameterCount, count_parameters, flops_per_token, weight_bytes_per_rank
from megatron_omni.estimate.memory import replicas, static_bytes
from megatron_omni.estimate.parameters import stage_weights


def test_full_model_counts() -> None:
    counts = count_parameters(ModelConfig())
    assert counts.language == 26_151_734_784
    assert counts.attention == 822_212_608
    assert counts.embeddings == counts.output == 544_997_376
    assert counts.gate == 702_464
    assert counts.experts == 4 * 5_703_204_864
    assert counts.shared_experts == 2 * 712_900_608
    assert counts.audio == 636_968_960  # Whisper-large-v3's encoder, as in the paper's Table 1
    # The paper's 398M keeps the tower's post-layernorm, which nothing uses.
    assert counts.vision == 397_747_744 - 2 * 1152


def test_null_slots_cost_nothing_and_routed_flops_follow_mean_k() -> None:
    one = flops_per_token(ModelConfig(moe=MoEConfig(num_null_experts=1)), 4096, mean_k=1.0)
    two = flops_per_token(ModelConfig(moe=MoEConfig(num_null_experts=1)), 4096, mean_k=2.0)
    assert two - one == 6.0 * 3 * 3584 * 18944 * 28


def test_bytes_shrink_with_the_layout() -> None:
    whole = weight_bytes_per_rank(recipe_from_dict({"optim": {"use_distributed_optimizer": False}}), 1)
    split = weight_bytes_per_rank(
        recipe_from_dict({"parallel": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}}), 8
    )
    total = count_parameters(ModelConfig()).total
    sinusoids = 1500 * 1280  # Whisper's positions are never trained
    assert whole == {
        "weights": 2 * total,
        "gradients": 4 * (total - sinusoids),
        "optimizer": 12 * (total - sinusoids),
    }
    assert split["weights"] < whole["weights"] / 2
    # Distributed optimizer: 12 bytes a parameter over the ranks that hold replicas of it.
    assert split["optimizer"] < whole["optimizer"] / 6


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 4, 1), (2, 4, 2, 1), (4, 2, 2, 2)])
def test_the_ranks_of_a_layout_hold_the_whole_model(sizes: tuple[int, int, int, int]) -> None:
    tp, pp, ep, etp = sizes
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    copies = {"embeddings": tp, "output": tp, "attention": tp, "experts": ep * etp}
    counts = dict.fromkeys(vars(ParameterCount()), 0)
    for stage in range(pp):
        for weight in stage_weights(ModelConfig(), parallel, stage=stage):
            counts[weight.part] += weight.numel * copies.get(weight.part, 1)
    assert counts == vars(count_parameters(ModelConfig()))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world_size", [8, 24])
def test_optimizer_shards_add_up_to_what_is_trained(world_size: int, overlap: bool) -> None:
    """Summed over the ranks of the groups that share it, every trained element is updated exactly once."""
    recipe = recipe_from_dict(
        {
            "freeze": ["vision", "audio", "attention"],
            "parallel": {"expert_model_parallel_size": 4, "overlap_grad_reduce": overlap},
        }
    )
    dense_ranks, expert_ranks = replicas(recipe, world_size)
    # Varying one rank while the other stands still leaves the still group's bytes in every term.
    base = static_bytes(recipe, world_size, stage=0).optimizer
    along_dense = sum(static_bytes(recipe, world_size, stage=0, dp_rank=r).optimizer for r in range(dense_ranks))
    along_experts = sum(
        static_bytes(recipe, world_size, stage=0, expert_dp_rank=r).optimizer for r in range(expert_ranks)
    )
    counts = count_parameters(recipe.model)
    frozen = counts.vision + counts.audio + counts.attention
    experts = 12 * counts.experts // 4
    dense = 12 * (counts.total - frozen - counts.experts)
    dense_here = (along_experts - experts) // expert_ranks
    assert along_dense == dense + dense_ranks * (base - dense_here)
    assert along_experts == experts + expert_ranks * dense_here
    assert dense_here * dense_ranks == pytest.approx(dense, rel=0.01)
