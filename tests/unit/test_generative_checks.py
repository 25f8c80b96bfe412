"""Task ``generative`` in a recipe: what cannot work is refused by name; chance of a picture by its own name alone."""

from typing import Any

import pytest
import torch

from megatron_omni.config.generative import GenerativeConfig
from megatron_omni.config.generators import PictureCodecConfig
from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.validate import validate
from megatron_omni.models.generators.conv_vae import ConvCodec
from megatron_omni.tasks.picture_draws import draw_picture, latents_of
from megatron_omni.training.task import StepInfo

TRUNK = [
    "vision",
    "audio",
    "projectors",
    "attention",
    "norms",
    "experts",
    "shared_experts",
    "gate",
    "embeddings",
    "output",
]
QUIET = {"moe_aux_loss_coeff": 0.0, "moe_aux_loss_coeff_min": 0.0}
ALONE = {"conditions": "cached", "losses": {"lm": 0.0}}


def recipe(
    generative: dict[str, Any] | None = None, *, model: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    model = {"moe": QUIET, "image": {}} | (model or {})
    return {"task": "generative", "generative": generative or {}, "model": model, "freeze": TRUNK} | more


def test_each_way_of_conditions_is_a_recipe() -> None:
    for values in (
        recipe(),
        recipe(ALONE),
        recipe({"conditions": "teachers", "losses": {"lm": 0.0}, "ema": 0.9}),
        recipe({"losses": {"flow": 0.0, "align_task": 1.0}}, freeze=[*TRUNK, "image_generator"]),
        recipe(parallel={"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    ):
        validate(recipe_from_dict(values), check_files=False, world_size=2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (recipe(model={"image": None}), "task=generative, model.image null: it trains what draws"),
        ({"generative": {"drop": 0.1}}, "generative: no effect with task=supervised"),
        (recipe({"losses": {"lm": 0.0, "flow": 0.0}}), "generative.losses: all are 0"),
        (
            recipe({"losses": {"flow": 0.0}}),
            "losses.flow=0: nothing trains the generator; add image_generator to freeze",
        ),
        (
            recipe({"losses": {"align_caption": 1.0}}, freeze=[*TRUNK, "image_projectors"]),
            "losses.align_caption: the projectors are frozen",
        ),
        (
            recipe({"ema": 0.9}, freeze=[*TRUNK, "image_projectors", "image_generator"]),
            "ema=0.9: nothing of what draws is trained",
        ),
        (recipe(model={"moe": QUIET | {"moe_aux_loss_coeff": 0.1}}), "moe_aux_loss_coeff=0.1: the gate is frozen"),
        (
            recipe({"conditions": "cached"}),
            "losses.lm=1.0: with generative.conditions=cached there is no language model",
        ),
        (
            recipe({"conditions": "teachers", "losses": {"lm": 0.0, "align_task": 1.0}}),
            "losses.align_task: with generative.conditions=teachers there are no projectors",
        ),
        (
            recipe(ALONE, parallel={"tensor_model_parallel_size": 2}),
            "tensor_model_parallel_size=2: with generative.conditions=cached every rank has the whole generator",
        ),
        (
            recipe(ALONE, data={"eval_sources": [{"name": "a", "path": "a", "metric": "exact_match"}]}),
            "eval_sources.a.metric=exact_match: with generative.conditions=cached nothing answers",
        ),
        (recipe({"drop": 1.5}), "generative.drop=1.5: must be at least 0 and at most 1"),
        (recipe({"ema": 1.0}), "generative.ema=1.0: must be at least 0 and below 1"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        validate(recipe_from_dict(values), check_files=False, world_size=2)


def info(step: int = 1, *, training: bool = True, held_out: str = "") -> StepInfo:
    return StepInfo(step=step, training=training, divisor=1, held_out=held_out)


def drawn(sample: int, told: StepInfo, number: int = 0, config: GenerativeConfig | None = None) -> Any:
    return draw_picture(config or GenerativeConfig(), (2, 3, 4), seed=0, info=told, sample=sample, number=number)


def test_a_step_a_sample_and_a_number_name_a_pictures_chance() -> None:
    first = drawn(3, info())
    assert torch.equal(first.noise, drawn(3, info()).noise)
    others = [drawn(4, info()), drawn(3, info(2)), drawn(3, info(), number=1), drawn(3, info(training=False))]
    assert not any(torch.equal(first.noise, other.noise) or first.time == other.time for other in others)
    held = [drawn(3, info(step, training=False, held_out="a")) for step in (1, 9)]
    assert torch.equal(held[0].noise, held[1].noise) and held[0].time == held[1].time
    assert not torch.equal(held[0].noise, drawn(3, info(training=False, held_out="b")).noise)


def test_words_are_lost_as_often_as_said_and_the_source_with_half_of_them() -> None:
    config, count = GenerativeConfig(drop=0.2, drop_source=0.5), 4000
    found = [drawn(sample, info(), config=config) for sample in range(count)]
    shares = {branch: sum(one.branch == branch for one in found) / count for branch in "ciu"}
    assert shares["i"] == pytest.approx(0.1, abs=0.02) and shares["u"] == pytest.approx(0.1, abs=0.02)
    assert all((one.blank is not None) == (one.branch == "u") for one in found)
    assert all(drawn(sample, info(training=False), config=config).branch == "c" for sample in range(50))
    # A source that is lost is noise of its own: the noise that the path begins with would tell the answer.
    lost = next(one for one in found if one.branch == "u")
    assert not torch.equal(lost.blank, lost.noise)


def test_latents_stay_and_pixels_go_through_the_codec() -> None:
    """Of two sizes, mixed; the codec is asked for where there are pixels alone."""
    config = PictureCodecConfig(
        latent_channels=2, channels=[4, 4], encoder_blocks=[0, 0], decoder_blocks=[0, 0], pixel_channels=4
    )
    codec = ConvCodec(config).eval()
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randint(256, (3, 8, width), dtype=torch.uint8, generator=generator) for width in (4, 12))
    kept = torch.randn(2, 2, 2, generator=generator).half()
    found = latents_of([small, None, kept, large, small], lambda _: codec, channels=2)
    assert [None if f is None else tuple(f.shape) for f in found] == [(2, 2, 1), None, (2, 2, 2), (2, 2, 3), (2, 2, 1)]
    for made, pixels in ((found[0], small), (found[3], large), (found[4], small)):
        assert made is not None and torch.equal(made, codec.encode(pixels[None])[0])
    assert found[2] is not None and found[2].dtype == torch.float32 and torch.equal(found[2], kept.float())

    def no_codec(device: torch.device) -> Any:
        raise AssertionError("no pixels, no codec")

    assert latents_of([kept, None], no_codec, channels=2)[1] is None
    with pytest.raises(ValueError, match=r"latents of shape \[2, 2, 2\]: the generator has .*latent_channels=4"):
        latents_of([kept], no_codec, channels=4)
