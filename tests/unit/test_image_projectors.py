"""Projectors against ``nn.Transformer`` under the released names, and the defect of the released start, written down."""

import pytest
import torch
from torch import Tensor, nn

from megatron_omni.config.pictures import ProjectorConfig
from megatron_omni.models.generators.projectors import TokenProjector, VisualProjector
from megatron_omni.platform.seeds import named_generator

TINY = ProjectorConfig(hidden_size=24, num_attention_heads=4, num_layers=2, ffn_hidden_size=40, num_caption_rows=5)
RELEASED = ProjectorConfig(query_init="zero", input_positions=False)


class TextFcLayer(nn.Module):
    """What the published code computes, on PyTorch's own transformer."""

    def __init__(self, hidden: int, config: ProjectorConfig, rows: int, out: int) -> None:
        super().__init__()
        self.in_fc = nn.Linear(hidden, config.hidden_size)
        self.tfm = nn.Transformer(
            config.hidden_size, config.num_attention_heads, config.num_layers, config.num_layers, config.ffn_hidden_size,
            dropout=0.0, batch_first=True, norm_first=True,
        )  # fmt: skip
        self.query_embs = nn.Parameter(torch.randn(1, rows, config.hidden_size))
        self.out_fc = nn.Linear(config.hidden_size, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_fc(self.tfm(self.in_fc(x), self.query_embs.repeat(len(x), 1, 1)))


def projector(config: ProjectorConfig, *, num_inputs: int = 7, seed: int = 0) -> TokenProjector:
    """From 7 rows of 16 to 5 of 12, in float64."""
    made = TokenProjector(config, hidden_size=16, num_inputs=num_inputs, num_rows=5, out_size=12)
    made.draw_weights(lambda name: named_generator(seed, name), prefix="image.caption.")
    return made.double()


def rows_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_values_and_gradients_are_those_of_the_published_layer_under_its_names() -> None:
    config = ProjectorConfig(**{**vars(TINY), "input_positions": False})
    torch.manual_seed(0)
    theirs, ours = TextFcLayer(16, config, 5, 12).double(), projector(config)
    for parameter in theirs.parameters():  # norms and biases that are not at their start
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    hidden, weight = rows_of(1, 3, 7, 16).requires_grad_(), rows_of(2, 3, 5, 12)
    grads = {}
    for name, module in {"theirs": theirs, "ours": ours}.items():
        out = module(hidden)
        hidden.grad = None
        (out * weight).sum().backward()
        grads[name] = [out.detach(), hidden.grad, *(p.grad for p in module.parameters())]
    assert dict(theirs.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    by_name = [
        dict(zip(("out", "hidden", *dict(m.named_parameters())), grads[k]))
        for k, m in (("theirs", theirs), ("ours", ours))
    ]
    for name, want in by_name[0].items():
        assert want.any() or name.endswith("k_proj.bias"), name
        torch.testing.assert_close(by_name[1][name], want, rtol=1e-10, atol=1e-12, msg=name)
    with torch.no_grad():
        evaluated = ours.eval()(hidden)
    assert torch.equal(evaluated, grads["ours"][0]), "evaluation takes another kernel"


@pytest.mark.parametrize(("out", "num_rows", "expected"), [(2048, 32, 273_147_392), (768, 3, 271_135_488)])
def test_the_released_sizes(out: int, num_rows: int, expected: int) -> None:
    with torch.device("meta"):
        made = TokenProjector(RELEASED, hidden_size=3584, num_inputs=64, num_rows=num_rows, out_size=out)
        visual = VisualProjector(hidden_size=3584, out_size=1024)
    assert sum(p.numel() for p in made.parameters()) == expected
    assert len([name for name in made.state_dict() if name.startswith("tfm.")]) == 124
    assert {name: tuple(p.shape) for name, p in visual.named_parameters()} == {
        "model.weight": (1024, 3584),
        "model.bias": (1024,),
    }
    assert sum(p.numel() for p in visual.parameters()) == 3_671_040


def test_zero_queries_give_one_row_many_times_and_ours_differ() -> None:
    hidden = rows_of(3, 2, 7, 16)
    released = projector(ProjectorConfig(**{**vars(TINY), "query_init": "zero", "input_positions": False}))
    rows = released(hidden)
    assert (rows - rows[:, :1]).abs().max() < 1e-12 * rows.abs().max()
    # A loss that does not tell rows apart gives all queries one gradient: they stay equal.
    released(hidden).square().sum().backward()
    grad = released.query_embs.grad
    assert grad.any() and (grad - grad[:, :1]).abs().max() < 1e-12 * grad.abs().max()
    shuffled = torch.tensor([3, 0, 6, 1, 2, 5, 4])
    torch.testing.assert_close(
        released(hidden[:, shuffled]), rows, rtol=1e-9, atol=1e-12
    )  # nor the order of the inputs

    ours = projector(TINY)
    rows = ours(hidden)
    spread = (rows - rows.mean(dim=1, keepdim=True)).norm() / rows.norm()
    assert spread > 0.01, "rows of the caption are equal at the start"
    moved = (ours(hidden[:, shuffled]) - rows).norm() / rows.norm()
    assert moved > 1e-4, "the order of the block's tokens does not count"


def test_weights_depend_on_seed_and_name_alone() -> None:
    one, same, other = projector(TINY), projector(TINY), projector(TINY, seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        assert value.ndim == 1 or not torch.equal(value, other.state_dict()[name])
    assert one.state_dict()["input_positions"].std() == pytest.approx(0.02, rel=0.2)
