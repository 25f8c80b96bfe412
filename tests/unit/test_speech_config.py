"""Recipes of a speech generator: what must go together, what is trained, what it costs."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.cli.plan import main as plan
from megatron_omni.config.generators import CodecConfig, SpeechConfig
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.model import ModelConfig, MoEConfig, VisionConfig
from megatron_omni.config.parts import parts_of, trained_parts, trains_new_rows_alone
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
from megatron_omni.estimate import count_parameters, flops_per_token
from megatron_omni.estimate.plan import heaviest_batch
from megatron_omni.segments import AttentionSegments, prefix
from tests.distributed.tiny_speech import DENSE, MIXTURE, SPEECH

RELEASED = ModelConfig(
    num_layers=24, hidden_size=896, ffn_hidden_size=4864, num_attention_heads=14, num_query_groups=2, kv_channels=64,
    mrope_section=[32, 0, 0], rotary_base=1e4, vocab_size=4105, output_bias=True, vision=None, audio=None,
    speech=SpeechConfig(),
    moe=MoEConfig(
        num_routed_experts=4, num_null_experts=0, num_shared_experts=0, top_k=2, moe_ffn_hidden_size=4864,
        gradient_estimator="none", sample_experts=False, input_jitter=0.0,
    ),
)  # fmt: skip


def of(**model: Any) -> Recipe:
    return Recipe(model=replace(DENSE, **model))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (of(vocab_size=4105), r"model.vocab_size=4105: .* 32 codes and 9 marks; set it to 41"),
        (of(vision=VisionConfig()), "model.vision: a speech generator .* set model.vision=null"),
        (of(codec=CodecConfig()), "model.codec: a speech generator .* set model.codec=null"),
        (of(untie_embeddings_and_output_weights=False), "model.output_bias=True: .*set model.untie"),
        (
            of(speech=replace(SPEECH, least_prefix_codes=41)),
            "least_prefix_codes=41: above model.speech.prefix_codes=40",
        ),
        (
            of(speech=replace(SPEECH, min_split_tokens=17)),
            "min_split_tokens=17: above model.speech.max_split_tokens=16",
        ),
        (of(speech=replace(SPEECH, least_codes_per_token=33.0)), "least_codes_per_token=33.0: above"),
        (Recipe(model=DENSE, task="preference", init_from="x"), "task=preference: a speech generator"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_fix(recipe: Recipe, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(recipe, check_files=False)


def test_what_goes_together_passes() -> None:
    for model in (DENSE, MIXTURE, RELEASED, replace(DENSE, output_bias=False)):
        validate(Recipe(model=model), check_files=False)
    validate(of(speech=replace(SPEECH, prefix_codes=0)), check_files=False)  # no prefix: nothing to draw


def test_a_table_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"model.speech.text_table=.nowhere.: no such file or directory; fix the path"):
        validate(of(speech=replace(SPEECH, text_table="nowhere")))


def test_the_table_is_never_trained_and_no_row_of_its_vocabulary_is() -> None:
    recipe = of()
    assert trained_parts(recipe) >= {"text_projection", "attention", "output"}
    assert "text_table" not in trained_parts(recipe) and "text_table" in parts_of(DENSE)
    assert not {"text_table", "text_projection"} & parts_of(ModelConfig())
    recipe.freeze = ["embeddings", "output"]
    assert not trains_new_rows_alone(recipe)  # its ids are codes
    recipe.freeze = sorted(parts_of(DENSE) - {"text_table"})
    with pytest.raises(ValueError, match="nothing is left to train"):
        validate(recipe, check_files=False)
    recipe.freeze, recipe.optim.lr_scale = [], {"text_table": 2.0}
    with pytest.raises(ValueError, match=re.escape("optim.lr_scale.text_table: no effect")):
        validate(recipe, check_files=False)


def test_released_sizes() -> None:
    """1.6 B parameters, of which 311 M in the table; 681 M act on a token of the other 1.3 B."""
    counts = count_parameters(RELEASED)
    assert counts.text_table == 151_936 * 2048 == 311_164_928
    assert counts.text_projection == 2048 * 896 + 896
    assert counts.output == 4224 * 896 + 4224 and counts.embeddings == 4224 * 896
    assert counts.experts == 24 * 4 * 3 * 4864 * 896 and counts.gate == 24 * 4 * 896
    trained = counts.total - counts.text_table
    assert round(trained / 1e6) == 1309
    assert round((trained - counts.experts / 2) / 1e6) == 681


def test_flops_count_the_condition_that_sees_itself() -> None:
    """By the pairs of segments: 300 tokens see each other, 700 are causal."""
    share, length = 0.3, 1000
    pairs = AttentionSegments(prefix(300, 700), length).num_pairs
    scores = 6 * 2 * RELEASED.num_layers * RELEASED.num_attention_heads * RELEASED.kv_channels
    causal, seen = (flops_per_token(RELEASED, length, 2.0, prefix_share=p) for p in (0.0, share))
    assert (seen - causal) * length == pytest.approx(scores * (pairs - length * (length + 1) / 2), rel=2e-2)
    batch = heaviest_batch(Recipe(model=RELEASED), label_share=1 - share)
    length = batch.length
    exact = AttentionSegments(prefix(round(share * length), length - round(share * length)), length).num_pairs
    assert batch.pairs == pytest.approx(batch.rows * exact, rel=1e-3)


def test_a_plan_of_the_released_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(model=RELEASED)
    recipe.data.seq_length, recipe.data.packing, recipe.data.batch_by = 4096, True, "mixed"
    recipe.freeze = []
    (tmp_path / "r.yaml").write_text(recipe_to_yaml(recipe))
    assert plan([str(tmp_path / "r.yaml"), "--gpus", "4", "parallel.expert_model_parallel_size=4"]) == 0
    said = capsys.readouterr().out
    assert "EP4" in said and "2.00 experts a token" in said
