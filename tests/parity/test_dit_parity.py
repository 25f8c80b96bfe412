"""The picture generator against its description, forward and every gradient; its keys and sizes; the order of a patch."""

from pathlib import Path

import pytest
import torch

from megatron_omni.config.pictures import DiTConfig
from megatron_omni.models.generators.dit import DiT
from megatron_omni.platform.seeds import named_generator

from . import dit_reference

KEYS = Path(__file__).with_name("dit_keys.txt")
SMALL = DiTConfig(
    hidden_size=48, num_layers=2, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=56, condition_size=40,
    caption_size=20, task_size=12, vision_size=16, kept_vision_tokens=4, latent_channels=3,
)  # fmt: skip


def _dit(config: DiTConfig, dtype: torch.dtype = torch.float64, **options: object) -> DiT:
    """Random everywhere, gates and modulations too."""
    dit = DiT(config, **options).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in dit.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.normal_(std=0.5, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    weight.add_(1)
    return dit


def _inputs(config: DiTConfig, height: int, width: int, num_vision: int, num_pictures: int = 3) -> dict:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(num_pictures, *shape, generator=generator, dtype=torch.float64)

    caption_mask = torch.ones(num_pictures, 5, dtype=torch.bool)
    caption_mask[1, 3:] = False
    caption_mask[2, 1:] = False  # as a null caption has it
    vision = draw(num_vision, config.vision_size)
    vision[2] = 0
    return {
        "x": draw(config.latent_channels, height, width),
        "t": torch.tensor([0.0, 0.37, 0.93], dtype=torch.float64)[:num_pictures],
        "source": draw(config.latent_channels, height, width),
        "caption": draw(5, config.caption_size),
        "caption_mask": caption_mask,
        "task": draw(config.task_size),
        "vision": vision,
    }


def _reference(dit: DiT, given: dict, **more: object) -> torch.Tensor:
    names = ("x", "t", "source", "caption", "caption_mask", "task", "vision")
    return dit_reference.velocity(dict(dit.named_parameters()), dit.config, *(given[name] for name in names), **more)


CASES = [
    pytest.param(SMALL, 4, 6, 7, id="choosing_4_of_7"),
    pytest.param(SMALL, 8, 2, 3, id="all_3_of_3"),
    pytest.param(
        DiTConfig(**{**vars(SMALL), "kept_vision_tokens": 0, "patch_size": 1, "learn_sigma": False}), 2, 3, 4,
        id="without_choice",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "height", "width", "num_vision"), CASES)
def test_forward_and_every_gradient_are_the_description(config, height, width, num_vision) -> None:
    dit, given = _dit(config), _inputs(config, height, width, num_vision)
    inputs = [given[name].requires_grad_() for name in ("x", "source", "caption", "task", "vision")]
    weights = {name: weight for name, weight in dit.named_parameters() if weight.requires_grad}
    noise = torch.randn(3, config.num_layers, num_vision, dtype=torch.float64, generator=torch.manual_seed(5))
    for extra in ({}, {"noise": noise, "base_tokens": 7}):
        wanted, found = _reference(dit, given, **extra), dit(**given, **extra)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
        direction = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
        of_wanted = torch.autograd.grad((wanted * direction).sum(), [*inputs, *weights.values()], allow_unused=True)
        of_found = torch.autograd.grad((found * direction).sum(), [*inputs, *weights.values()], allow_unused=True)
        for name, a, b in zip(["x", "source", "caption", "task", "vision", *weights], of_wanted, of_found):
            # A softmax does not see what is added to all of its logits.
            assert a is not None and b is not None and (a.any() or name.endswith("out_conv.4.bias")), name
            if name == "vision" and not extra:  # of rows that are all zero, any may be chosen
                a, b = a[:2], b[:2]
            size = max(a.abs().max().item(), 1e-5)
            torch.testing.assert_close(b, a, rtol=0, atol=1e-9 * size, msg=lambda m, name=name: f"{name}: {m}")


def test_fp32_is_the_description() -> None:
    given = _inputs(SMALL, 4, 6, 7)
    wanted = _reference(_dit(SMALL), given)
    single = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    found = _dit(SMALL).float()(**single)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5


def test_what_is_remembered_gives_the_same_bits() -> None:
    dit, given = _dit(SMALL, torch.float32), _inputs(SMALL, 4, 6, 7)
    given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    x, t, source = given.pop("x"), given.pop("t"), given.pop("source")
    with torch.no_grad():
        memory = dit.remember(**given)
        for time in (t, 1 - t):
            assert torch.equal(
                dit.velocity(x, time, source=source, memory=memory), dit(x, time, source=source, **given)
            )


def test_recomputation_changes_no_gradient() -> None:
    given = _inputs(SMALL, 4, 6, 7)
    found = []
    for recompute in (False, True):
        dit = _dit(SMALL, recompute=recompute)
        dit(**given, noise=torch.ones(3, 2, 7, dtype=torch.float64)).square().sum().backward()
        found.append([weight.grad for weight in dit.parameters() if weight.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and len(found[0]) > 50


def test_pictures_without_vision_rows_or_caption() -> None:
    """No vision rows are as rows of zeros, which add exactly 0; a caption of which nothing counts is not read."""
    dit, given = _dit(SMALL), _inputs(SMALL, 4, 6, 7)
    given["vision"] = torch.zeros_like(given["vision"])
    none = {**given, "vision": given["vision"][:, :0]}
    assert torch.equal(dit(**given), dit(**none))
    given["caption_mask"] = torch.zeros_like(given["caption_mask"])
    other = {**given, "caption": -given["caption"]}
    assert torch.equal(dit(**given), dit(**other)) and dit(**given).isfinite().all()


@pytest.mark.parametrize("shown", [[], [1]])
def test_pictures_that_have_no_vision_can_be_left_out(shown: list[int]) -> None:
    """Of their rows of zeros nothing is computed: velocities and gradients of all weights are the same."""
    given, found = _inputs(SMALL, 4, 6, 7), []
    blank = [b for b in range(len(given["x"])) if b not in shown]
    given["vision"] = given["vision"].index_fill(0, torch.tensor(blank), 0.0)
    noise = torch.rand(len(given["x"]), 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for numbers in (None, torch.tensor(shown, dtype=torch.int64)):
        dit = _dit(SMALL)
        velocity = dit(**given, noise=noise, shown=numbers)
        velocity.square().sum().backward()
        found.append([velocity.detach(), *(weight.grad for weight in dit.parameters() if weight.requires_grad)])
    for whole, part in zip(*found):
        torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-12)
    assert len(found[0]) > 50 and (not shown or found[0][-1].any())


def test_the_keys_and_shapes_of_the_release() -> None:
    with torch.device("meta"):
        dit = DiT(DiTConfig())
    wanted = {}
    for line in KEYS.read_text().splitlines():
        name, *shape = line.split()
        for number in range(24) if ".N." in name else [0]:
            wanted[name.replace(".N.", f".{number}.")] = tuple(map(int, shape))
    assert {name: tuple(value.shape) for name, value in dit.state_dict().items()} == wanted
    assert len(wanted) == 1003
    assert sum(weight.numel() for weight in dit.parameters()) == 2_011_441_976
    assert sum(weight.numel() for weight in dit.layers[0].parameters()) == 83_573_953
    chosen = ("in_conv", "out_conv", "y_pool_proj", "input_image_proj")
    choosing = [w.numel() for n, w in dit.layers[0].named_parameters() if n.startswith(chosen)]
    assert round(sum(choosing) / 1e6, 1) == 13.4


def test_the_order_of_a_patch() -> None:
    """In: channel, row, column, noisy latents before the source. Out: row, column, channel."""
    config = DiTConfig(**{**vars(SMALL), "num_layers": 1})
    dit = DiT(config).double()
    seen = {}
    dit.x_embedder.register_forward_hook(lambda module, args, out: seen.update(rows=args[0]))
    conditions = {name: value[:1] for name, value in _inputs(config, 4, 6, 3).items()}
    for of_source, channel, row, column in ((0, 0, 0, 0), (0, 2, 3, 4), (1, 1, 2, 5), (1, 0, 1, 3)):
        zeros = torch.zeros(1, 3, 4, 6, dtype=torch.float64)
        hot = zeros.clone()
        hot[0, channel, row, column] = 1
        dit(**{**conditions, "x": zeros if of_source else hot, "source": hot if of_source else zeros})
        token, place = (row // 2) * 3 + column // 2, (of_source * 3 + channel) * 4 + (row % 2) * 2 + column % 2
        assert seen["rows"].nonzero().tolist() == [[0, token, place]]
    for hot_column in range(2 * 2 * 6):
        for weight in dit.final_layer.linear.parameters():
            weight.data.zero_()
        dit.final_layer.linear.bias.data[hot_column] = 1
        lit = dit(**conditions).nonzero().tolist()
        row, column, channel = hot_column // 12, hot_column // 6 % 2, hot_column % 6
        wanted = [[0, channel, r, c] for r in range(row, 4, 2) for c in range(column, 6, 2)]
        assert lit == (wanted if channel < 3 else [])  # the second half is thrown away


def test_it_begins_by_saying_nothing() -> None:
    """Zeros at first: all blocks are identities and the output 0; the rest is drawn by name."""
    dit = DiT(SMALL)
    dit.draw_weights(lambda name: named_generator(0, name), prefix="image.dit.")
    given = {k: v.float() if v.is_floating_point() else v for k, v in _inputs(SMALL, 4, 6, 7).items()}
    assert not dit(**given).any()
    zero = {name for name, weight in dit.named_parameters() if not weight.any() and not name.endswith("bias")}
    gates = {f"layers.{n}.attention.{gate}" for n in range(2) for gate in ("gate", "gate_for_ii")}
    modulations = {f"layers.{n}.adaLN_modulation.1.weight" for n in range(2)}
    embedders = {"task_embedder.1.weight", "global_semantic_embedder.1.weight"}
    assert zero == gates | modulations | embedders | {
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.weight",
    }
    assert (dit.layers[1].attention_y_norm.weight == 1).all() and (dit.layers[0].in_conv[0].weight == 1).all()
    alone = DiT(DiTConfig(**{**vars(SMALL), "num_layers": 1}))
    alone.draw_weights(lambda name: named_generator(0, name), prefix="image.dit.")
    assert torch.equal(alone.layers[0].attention.wq.weight, dit.layers[0].attention.wq.weight)
    assert not torch.equal(dit.layers[0].attention.wq.weight, dit.layers[1].attention.wq.weight)


def test_latents_that_do_not_fit() -> None:
    dit, given = _dit(SMALL), _inputs(SMALL, 4, 6, 7)
    with pytest.raises(ValueError, match=r"\[3, 3, 3, 6\].*multiples of 2"):
        dit(**{**given, "x": given["x"][:, :, :3], "source": given["source"][:, :, :3]})
    with pytest.raises(ValueError, match="must be the same"):
        dit(**{**given, "source": given["source"][:, :, :2]})
