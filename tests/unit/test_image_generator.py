"""What a picture is drawn from, branch by branch, and that every trained parameter takes part in every micro-batch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_omni.config.pictures import DiTConfig, ImageGeneratorConfig, ProjectorConfig
from megatron_omni.models.generators.image import BRANCHES, ImageGenerator
from megatron_omni.models.parts import part_of
from megatron_omni.platform.seeds import named_generator

WIDTH = 16
CONFIG = ImageGeneratorConfig(
    dit=DiTConfig(
        hidden_size=32, num_layers=2, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, condition_size=16,
        caption_size=12, task_size=8, vision_size=10, kept_vision_tokens=3, latent_channels=2,
    ),
    projectors=ProjectorConfig(
        hidden_size=24, num_attention_heads=4, num_layers=1, ffn_hidden_size=40, num_caption_rows=4
    ),
    num_image_tokens=3,
    size_step=8,
    downsampling=4,
    base_size=32,
)  # fmt: skip


def generator(config: ImageGeneratorConfig = CONFIG, *, std: float = 0.0, **settings: bool) -> ImageGenerator:
    """In float64; with ``std`` every weight is moved by so much, since gates begin as zeros."""
    made = ImageGenerator(config, WIDTH, **{"visual": True, **settings})
    made.draw_weights(lambda name: named_generator(0, name), prefix="image.")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(std=std, generator=named_generator(1, name)))
    return made.double()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


VISION = [rows(5, WIDTH, seed=1), None, rows(5, WIDTH, seed=2), rows(7, WIDTH, seed=3)]


def test_a_branch_has_the_conditions_that_it_is_named_for() -> None:
    image, hidden = generator(), rows(4, 6, WIDTH)
    found = image.conditions(hidden, VISION)
    assert torch.equal(found.task, image.task(hidden[:, :3])) and torch.equal(
        found.caption, image.caption(hidden[:, 3:])
    )
    null_caption, null_task = image.null_caption.weight, image.null_task.weight
    words, picture, nothing = (found.inputs([2, 1], branch) for branch in BRANCHES)
    assert torch.equal(words["caption"], found.caption[[2, 1]]) and words["caption_mask"].all()
    assert torch.equal(words["task"], found.task[[2, 1], 0])
    assert torch.equal(words["vision"][0], image.visual(VISION[2])) and not words["vision"][1].any()
    for number, branch in enumerate((picture, nothing)):
        assert torch.equal(branch["caption"][:, 0], null_caption.expand(2, -1)) and not branch["caption"][:, 1:].any()
        assert branch["caption_mask"].tolist() == [[True, False, False, False]] * 2
        assert torch.equal(branch["task"], null_task[number].expand(2, -1))
    assert torch.equal(picture["vision"], words["vision"]) and not nothing["vision"].any()
    mixed = found.inputs([0, 2, 1], ["u", "c", "i"])
    for row, (i, branch) in enumerate(((0, "u"), (2, "c"), (1, "i"))):
        alone = found.inputs([i, 2], branch)  # of as many vision rows
        assert all(torch.equal(mixed[name][row], alone[name][0]) for name in mixed)


def test_released_branches_take_the_second_and_third_task_row() -> None:
    image, hidden = generator(replace(CONFIG, release=True)), rows(2, 6, WIDTH)
    found = image.conditions(hidden, [None, None])
    assert image.null_task is None
    for number, branch in enumerate(BRANCHES):
        assert torch.equal(found.inputs([0, 1], branch)["task"], found.task[:, number])


def test_pictures_of_one_size_and_as_many_vision_rows_go_together() -> None:
    found = generator().conditions(rows(4, 6, WIDTH), VISION)
    assert found.groups(["a", "a", "a", "a"]) == [[0, 1, 2], [3]]
    assert found.groups(["a", "b", "b", "a"]) == [[0], [3], [1, 2]]
    with pytest.raises(AssertionError, match=r"\[5, 7\] vision rows in one call"):
        found.inputs([0, 3])


def test_teachers_stand_in_for_the_projectors() -> None:
    image = generator(projectors=False)
    assert not [n for n, _ in image.named_parameters() if n.startswith(("caption", "task", "visual"))]
    mask = torch.tensor([[True] * 3, [True, False, False]])
    teachers = {
        "caption": rows(2, 3, 12),
        "caption_mask": mask,
        "task": rows(2, 3, 8, seed=4),
        "visual": rows(2, 5, 10, seed=5),
        "visual_mask": torch.tensor([[True] * 5, [False] * 5]),
    }
    found = image.taught(teachers).inputs([0, 1])
    assert torch.equal(found["caption"], teachers["caption"]) and torch.equal(found["caption_mask"], mask)
    assert torch.equal(found["task"], teachers["task"][:, 0])
    assert torch.equal(found["vision"][0], teachers["visual"][0]) and not found["vision"][1].any()
    del teachers["visual"]
    assert not image.taught(teachers).inputs([0, 1])["vision"].any()


@pytest.mark.parametrize("branch", BRANCHES)
def test_whatever_is_left_out_every_projector_takes_part(branch: str) -> None:
    image, hidden = generator(std=0.1), rows(2, 6, WIDTH).requires_grad_()
    image.conditions(hidden, [None, None]).inputs([0, 1], branch)["task"].sum().backward()
    parts = {name: p.grad for name, p in image.named_parameters() if part_of(f"image.{name}") == "image_projectors"}
    assert all(grad is not None for grad in parts.values()) and hidden.grad is not None
    assert not parts["visual.model.weight"].any() and not parts["caption.out_fc.weight"].any()
    assert parts["task.out_fc.weight"].any() == (branch == "c")


@pytest.mark.parametrize("projectors", [True, False])
def test_a_micro_batch_without_pictures_counts_nothing_and_reaches_everything(projectors: bool) -> None:
    hidden = rows(0, 6, WIDTH).requires_grad_()
    image = generator(std=0.1, overlap=True, projectors=projectors)
    loss = image.idle(hidden)
    assert loss == 0 and loss.requires_grad
    loss.backward()
    trained = {name: p.grad for name, p in image.named_parameters() if p.requires_grad}
    missing = [name for name, grad in trained.items() if grad is None]
    assert not missing and not any(grad.any() for grad in trained.values()) and hidden.grad is not None
    # Without messages in the backward nothing runs, and rows of a trunk are reached all the same.
    hidden.grad = None
    generator(projectors=projectors).idle(hidden).backward()
    assert hidden.grad is not None


def test_a_frozen_generator_asks_for_no_gradient() -> None:
    image = generator(overlap=True).requires_grad_(False)
    assert not image.idle(rows(0, 6, WIDTH)).requires_grad
    found = image.conditions(rows(1, 6, WIDTH), [None])
    assert not found.caption.requires_grad and not found.null_caption.requires_grad


def test_missing_weights_alone_are_drawn_anew() -> None:
    image, wanted = generator(), {"image.task.out_fc.weight", "image.null_task.weight"}
    for parameter in image.parameters():
        parameter.data.fill_(7.0)
    image.draw_weights(lambda name: named_generator(0, name), prefix="image.", only=wanted)
    fresh = generator().state_dict()
    for name, value in image.state_dict().items():
        if f"image.{name}" in wanted:
            assert torch.equal(value, fresh[name])
        else:
            assert (value == 7.0).all(), name
