"""``model.image`` in a recipe: what is refused, by field and with the fix; the block of tokens; who is trained by which task."""

from typing import Any

import pytest

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.parts import parts_of, parts_of_run, trained_parts
from megatron_omni.config.pictures import IMAGE_PARTS, IMAGE_TOKENS, TASK_TOKENS, ImageGeneratorConfig
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
from megatron_omni.data.tokenizer import IMAGE_GENERATION_SPECIALS


def recipe(**groups: Any) -> Recipe:
    return recipe_from_dict({"model": {"image": {}}, **groups})


def drawing(**image: Any) -> Recipe:
    return recipe(model={"image": image})


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (drawing(dit={"num_attention_heads": 5}), "dit.num_attention_heads=5: model.image.dit.hidden_size=2304 must be a multiple"),
        (drawing(dit={"num_query_groups": 5}), "no multiple of model.image.dit.num_query_groups=5"),
        (drawing(projectors={"num_attention_heads": 7}), "num_attention_heads=7 does not divide model.image.projectors"),
        (drawing(size_step=24), "size_step=24: no multiple of downsampling x dit.patch_size = 16"),
        (drawing(base_size=8), "base_size=8: below model.image.size_step=16"),
        (drawing(sampling={"guided_channels": 5}), "guided_channels=5: there are model.image.dit.latent_channels=4"),
        (drawing(sampling={"steps": 0}), "steps=0: must be at least 1"),
        (drawing(sampling={"steps": 10_000}), "steps=10000: must be at least 1 and at most 1,000"),
        (drawing(sampling={"text_guidance": -1.0}), "text_guidance=-1.0: must be at least 0"),
        (drawing(num_image_tokens=33), "num_image_tokens=33: must be at least 1 and at most 32"),
        (recipe(model={"image": {}, "speech": {}}), r"speech generator or a codec \(model.speech\), which draws nothing"),
        (recipe(task="generative", model={"image": {}, "lora": {}}), "model.lora: adapters are trained alone"),
        (
            recipe(task="generative", parallel={"pipeline_model_parallel_size": 2}, freeze=["vision"]),
            "frozen copy of the encoder .*add projectors to freeze",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(made: Recipe, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        validate(made, world_size=2, check_files=False)


def test_files_that_are_not_there_are_named(tmp_path: Any) -> None:
    for name in ("weights", "vae"):
        with pytest.raises(ValueError, match=rf"model.image.{name}='\S+none': no such file or directory"):
            validate(drawing(**{name: str(tmp_path / "none")}))


def test_a_block_is_the_tokens_that_the_tokenizer_has_for_it() -> None:
    assert set(TASK_TOKENS + IMAGE_TOKENS) == set(IMAGE_GENERATION_SPECIALS)
    assert ImageGeneratorConfig().block == TASK_TOKENS + IMAGE_TOKENS
    tiny = ImageGeneratorConfig(num_image_tokens=2, image_token_repeat=2)
    assert tiny.block == ("[TASK0]", "[TASK1]", "[TASK2]", "[IMG0]", "[IMG1]", "[IMG0]", "[IMG1]")
    specials = {name: 100 + i for i, name in enumerate(IMAGE_GENERATION_SPECIALS)}
    assert tiny.block_ids(specials) == (132, 133, 134, 100, 101, 100, 101)
    del specials["[IMG1]"]
    with pytest.raises(ValueError, match=r"data.tokenizer: lacks \[IMG1\], by which model.image draws"):
        tiny.block_ids(specials)
    assert len(ImageGeneratorConfig(image_token_repeat=2).block) == 67  # the release


def test_what_draws_is_trained_by_its_own_task_alone() -> None:
    assert parts_of(recipe().model) >= IMAGE_PARTS and not parts_of(Recipe().model) & IMAGE_PARTS
    for task in ("supervised", "reinforce", "preference"):
        assert not trained_parts(recipe(task=task)) & IMAGE_PARTS
    assert trained_parts(recipe(task="generative", freeze=["image_generator"])) & IMAGE_PARTS == {"image_projectors"}
    cached = recipe(task="generative", generative={"conditions": "cached"}, freeze=["image_generator"])
    assert parts_of_run(cached) == IMAGE_PARTS and trained_parts(cached) == {"image_projectors"}
    everything = recipe(task="generative", generative={"conditions": "cached"}, freeze=sorted(IMAGE_PARTS))
    with pytest.raises(ValueError, match="nothing is left to train"):
        validate(everything, check_files=False)
