"""Parameter counts and FLOPs against the paper's Table 1 figures as worked out in docs/model.md."""

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.estimate import count_parameters, flops_per_token, weight_bytes_per_rank


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
    whole = weight_bytes_per_rank(recipe_from_dict({}), 1)
    split = weight_bytes_per_rank(
        recipe_from_dict({"parallel": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}}), 8
    )
    assert whole["weights"] == 2 * count_parameters(ModelConfig()).total
    assert split["weights"] < whole["weights"] / 2
    # Distributed optimizer: 12 bytes a parameter over the ranks that hold replicas of it.
    assert split["optimizer"] < whole["optimizer"] / 6
