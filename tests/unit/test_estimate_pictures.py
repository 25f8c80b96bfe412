"""What a plan says of ``model.image`` against the modules: weights one by one, FLOPs as torch counts them, bytes that autograd
keeps; and the figures of the full model."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_omni.cli.plan import report
from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.model import ModelConfig, VisionConfig
from megatron_omni.config.pictures import DiTConfig, ImageGeneratorConfig, ProjectorConfig
from megatron_omni.estimate.activations import Activations
from megatron_omni.estimate.hardware import GPUS
from megatron_omni.estimate.memory import static_bytes
from megatron_omni.estimate.pictures import (
    dit_bytes,
    dit_flops,
    image_weights,
    num_tokens,
    num_vision_rows,
    picture_flops,
    picture_forward,
    projector_bytes,
)
from megatron_omni.estimate.plan import Plan, heaviest_batch, make_plan
from megatron_omni.models.generators.image import ImageGenerator
from megatron_omni.models.parts import part_of
from megatron_omni.ops import dit

DIT = DiTConfig(
    hidden_size=96, num_layers=3, num_attention_heads=8, num_query_groups=2, ffn_hidden_size=256, condition_size=64,
    caption_size=80, task_size=48, vision_size=64, kept_vision_tokens=20,
)  # fmt: skip
INSIDE = ProjectorConfig(hidden_size=48, num_layers=2, ffn_hidden_size=80, num_caption_rows=7)
MODEL = ModelConfig(
    hidden_size=40,
    vision=VisionConfig(pooled_side=6, max_tiles_per_side=1),
    image=ImageGeneratorConfig(dit=DIT, projectors=INSIDE, num_image_tokens=9, base_size=128, size_step=16),
)


def _with(model: ModelConfig = MODEL, *, dit: dict | None = None, **image: object) -> ModelConfig:
    assert model.image is not None
    return replace(model, image=replace(model.image, dit=replace(model.image.dit, **dit or {}), **image))


def _generator(model: ModelConfig, dtype: torch.dtype, *, projectors: bool = True) -> ImageGenerator:
    assert model.image is not None
    generator = ImageGenerator(model.image, model.hidden_size, visual=model.vision is not None, projectors=projectors)
    return generator.to(dtype)


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        _with(dit={"kept_vision_tokens": 0, "learn_sigma": False}),
        _with(release=True, image_token_repeat=2, projectors=replace(INSIDE, input_positions=False)),
        replace(MODEL, vision=None),
    ],
)
def test_weights_are_those_of_the_modules_in_their_order(model) -> None:
    for projectors in (True, False):
        built = _generator(model, torch.float32, projectors=projectors)
        wanted = [(part_of(f"image.{n}"), w.numel(), w.requires_grad) for n, w in built.named_parameters()]
        assert [*image_weights(model, projectors=projectors)] == wanted


def test_the_full_model() -> None:
    model = ModelConfig(image=ImageGeneratorConfig(release=True))
    sums: dict[str, int] = {}
    for part, count, _ in image_weights(model):
        sums[part] = sums.get(part, 0) + count
    assert sums["image_generator"] == 2_011_441_976
    # 273,147,392 + 271,135,488 + 3,671,040 and, ours, input positions and a null caption of one row.
    assert sums["image_projectors"] == 273_147_392 + 271_135_488 + 3_671_040 + (32 + 3) * 1536 + 2048
    assert model.image is not None and num_tokens(model.image) == 2304 and num_vision_rows(model) == 576
    forward = picture_forward(model)
    assert forward.generator == pytest.approx(7.8e12, rel=0.01)  # 6.2 + 1.2 + 0.15 + 0.3


def _plan(*frozen: str, recompute: str = "none", conditions: str = "cached", **losses: float) -> Plan:
    """Of the full model's sizes, without a language model."""
    values = {
        "task": "generative", "model": {"image": {}}, "freeze": list(frozen), "parallel": {"recompute": recompute},
        "generative": {"conditions": conditions, "losses": {"lm": 0.0, **losses}}, "data": {"global_batch_size": 64},
    }  # fmt: skip
    return make_plan(recipe_from_dict(values), world_size=8, gpu=GPUS["H100-80GB"])


def test_a_step_of_the_full_generator() -> None:
    """image.md 3.2: 4.0 GB of weights; trained, 4 of gradients and (4 + 8) / ranks of the optimizer a parameter; 7 GB of a
    768 x 768 picture and, with recomputation, 0.26 GB and a block's 0.3."""
    whole = _plan()
    dit, projectors = 2_011_441_976, 547_953_920
    held = whole.stages[0].held
    assert held.weights == pytest.approx(2 * (dit + projectors), rel=0.001)
    assert held.gradients == pytest.approx(4 * (dit + projectors), rel=0.001)
    assert held.optimizer == pytest.approx(12 * (dit + projectors) / 8, rel=0.001)
    frozen = _plan("image_generator")
    assert frozen.stages[0].held.gradients == pytest.approx(4 * projectors, rel=0.001)
    kept = (frozen.stages[0].drawing - projector_bytes(frozen.recipe.model, element=2)) / 1e9
    assert kept == pytest.approx(7.5, rel=0.02)  # 7 and a frozen norm's fp32 input
    again = _plan("image_generator", recompute="full")
    assert again.stages[0].drawing - frozen.stages[0].drawing == pytest.approx(0.255e9 - kept * 1e9, rel=0.001)
    assert again.stages[0].working == pytest.approx(kept * 1e9 / 24, rel=0.02)
    assert again.step.drawing > frozen.step.drawing and whole.step.total == pytest.approx(
        whole.step.drawing + whole.step.gradients + whole.step.optimizer
    )


def test_what_a_picture_costs_in_training() -> None:
    def flops(*frozen: str, **options: object) -> float:
        return picture_flops(_plan(*frozen, **options).recipe)

    forward = picture_forward(_plan().recipe.model)
    assert flops() == 3 * (forward.generator + forward.projectors)
    assert flops("image_generator") == 2 * forward.generator + 3 * forward.projectors
    assert flops("image_generator", flow=0.0, align_task=1.0) == 3 * forward.projectors  # alignment draws nothing
    assert flops("image_projectors", conditions="teachers") == 3 * forward.generator
    assert _plan("image_generator", flow=0.0, align_task=1.0).stages[0].drawing == projector_bytes(
        _plan().recipe.model, element=2
    )


def test_a_language_model_of_which_nothing_is_trained_keeps_no_graph() -> None:
    trunk = (
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
    )
    frozen, rows = _plan(*trunk, "new_token_rows", conditions="model"), _plan(*trunk, conditions="model")
    assert frozen.stages[0].language == frozen.stages[0].loss == frozen.stages[0].encoders - _media(frozen) == 0
    assert rows.stages[0].language > 1e9 and rows.step.attention > 1.5 * frozen.step.attention
    assert frozen.stages[0].drawing == rows.stages[0].drawing > 0


def _media(plan: Plan) -> float:
    return Activations(plan.recipe, plan.batch).media()


def test_how_many_pictures_are_drawn() -> None:
    recipe = _plan().recipe
    packed = replace(recipe, data=replace(recipe.data, packing=True, seq_length=16384, micro_batch_size=1))
    assert heaviest_batch(packed).pictures == 16384 // (35 + 576 + 128)
    assert heaviest_batch(packed, sample_length=1024).pictures == 16
    assert heaviest_batch(packed, pictures=3).pictures == 3
    assert heaviest_batch(replace(packed, data=replace(packed.data, packing=False, micro_batch_size=4))).pictures == 4
    assert heaviest_batch(replace(packed, task="supervised"), pictures=3).pictures == 0


def test_what_the_command_says() -> None:
    said = report(_plan("image_generator"), [], {}, tokens=None)
    assert "7.83 TFLOP a forward of the generator" in said and "pictures/s, of 2304 patches" in said
    assert "15.7 TFLOP a picture in training" in said and "tokens/s" not in said
    assert "activations: pictures" in said


def test_running_means_are_shared_out() -> None:
    plan = _plan()
    with_means = replace(plan.recipe, generative=replace(plan.recipe.generative, ema=0.999))
    more = static_bytes(with_means, 8, stage=0).optimizer - plan.stages[0].held.optimizer
    assert more == pytest.approx(4 * (2_011_441_976 + 547_953_920) / 8, rel=0.001)


def _conditions(model: ModelConfig, generator: ImageGenerator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    image = model.image
    assert image is not None
    hidden = torch.randn(1, len(image.block), model.hidden_size, dtype=dtype, requires_grad=True)
    rows = torch.randn(num_vision_rows(model), model.hidden_size, dtype=dtype)
    return generator.conditions(hidden, [rows]).inputs([0])


def _drawn(model: ModelConfig, generator: ImageGenerator, given: dict[str, torch.Tensor]) -> torch.Tensor:
    image = model.image
    assert image is not None
    side = image.base_size // image.downsampling
    x = torch.randn(1, image.dit.latent_channels, side, side)
    return generator.dit(x, torch.rand(1), source=x, **given)


@pytest.mark.parametrize("kept", [0, 20, 100])
def test_flops_are_what_torch_counts(kept) -> None:
    model = _with(dit={"kept_vision_tokens": kept})
    generator = _generator(model, torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as projectors:
            given = _conditions(model, generator, torch.float32)
        with FlopCounterMode(display=False) as drawn:
            _drawn(model, generator, given)
    forward = picture_forward(model)
    assert projectors.get_total_flops() == pytest.approx(forward.projectors, rel=0.001)
    # The matrices of vectors run on 16 rows on a CPU.
    dit = model.image.dit
    vectors = dit.num_layers * (4 * dit.hidden_size + (dit.hidden_size if kept else 0)) + 2 * dit.hidden_size
    assert drawn.get_total_flops() == pytest.approx(forward.generator + 15 * 2 * dit.condition_size * vectors, rel=0.02)
    assert forward.generator == dit_flops(dit, 64, caption_rows=7, vision_rows=36)


def _saved(forward, ignored: set[int]) -> tuple[int, object]:
    """Bytes of the storages that autograd keeps of ``forward()``."""
    seen = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    return sum(seen.values()), out


@pytest.mark.parametrize("kept", [0, 20])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_what_autograd_keeps(dtype, trained, kept, monkeypatch) -> None:
    monkeypatch.setattr(dit, "is_ours", lambda *_: False)  # the plan is of devices, where our CPU kernels do not run
    model = _with(dit={"kept_vision_tokens": kept})
    generator = _generator(model, dtype)
    with torch.no_grad():
        for weight in generator.parameters():
            weight.normal_(std=0.1)
    generator.dit.requires_grad_(trained)
    ignored = {weight.untyped_storage().data_ptr() for weight in generator.parameters()}
    of_projectors, given = _saved(lambda: _conditions(model, generator, dtype), ignored)
    ignored |= {value.untyped_storage().data_ptr() for value in given.values()}
    of_dit, _ = _saved(lambda: _drawn(model, generator, given), ignored)
    assert projector_bytes(model, element=dtype.itemsize) == pytest.approx(of_projectors, rel=0.05)
    assert dit_bytes(model, trained=trained, element=dtype.itemsize) == pytest.approx(of_dit, rel=0.05)


def test_recomputation_keeps_the_input_of_each_block() -> None:
    model = MODEL
    kept = []
    for layers in (2, 3):
        generator = _generator(_with(dit={"num_layers": layers}), torch.float32)
        generator.dit.recompute = True
        ignored = {weight.untyped_storage().data_ptr() for weight in generator.parameters()}
        given = _conditions(model, generator, torch.float32)
        kept.append(_saved(lambda g=generator, c=given: _drawn(model, g, c), ignored)[0])
    assert kept[1] - kept[0] == 64 * DIT.hidden_size * 4
