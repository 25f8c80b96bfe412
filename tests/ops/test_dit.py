"""Parts of the picture generator's blocks: values and every gradient of every engine against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_omni.ops import dit
from megatron_omni.ops.dit import Rows
from megatron_omni.ops.extension import use_cpu_engine
from tests.ops.ragged import ENGINES

TOLERANCE = 4e-6
"""Of values and gradients, beside the largest of each tensor."""
EPSILON = 1e-5


def drawn(*sizes: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*sizes, generator=generator).requires_grad_()


def agrees(engine: str, ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Both of the same ``inputs``, the reference in float64: results, and gradients of a loss that weighs every element."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with use_cpu_engine(engine):
        got = ours(*inputs)
        weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad((got * weights).sum(), inputs)
    wanted = reference(*wide)
    expected = torch.autograd.grad((wanted * weights.double()).sum(), wide, allow_unused=True, materialize_grads=True)
    assert got.dtype == torch.float32 and got.is_contiguous()
    for name, (one, other) in enumerate(zip([got, *grads], [wanted, *expected], strict=True)):
        error, size = ((part.detach().abs().max().item() if part.numel() else 0.0) for part in (one - other, other))
        assert error <= TOLERANCE * size, (name, error, size)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [(3, 5, 48), (2, 64, 128), (1, 1, 16)])
def test_modulated_norm(engine: str, sizes: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (
        drawn(*sizes, generator=generator),
        drawn(*sizes, generator=generator),
        drawn(sizes[2], generator=generator),
    )
    factor = drawn(sizes[0], sizes[2], generator=generator)

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, factor, residual: function(x, weight, factor, residual, EPSILON)

    def ours(x: Tensor, weight: Tensor, factor: Tensor | None, residual: Tensor | None, eps: float) -> Tensor:
        return dit.modulated_norm(x, weight, factor=factor, residual=residual, eps=eps)

    reference = dit.modulated_norm_reference
    agrees(engine, of(ours), of(reference), [x, weight, factor, residual])
    for alone in (ours, reference):
        assert alone(x, weight, None, None, EPSILON).shape == x.shape
    agrees(
        engine,
        lambda x, w: ours(x, w, None, None, EPSILON),
        lambda x, w: reference(x, w, None, None, EPSILON),
        [x, weight],
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (4, 32), (3, 48)])
def test_rotary_norm(engine: str, heads: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (drawn(*sizes, heads * width, generator=generator) for sizes in ((3, 7), (), ()))
    angles = torch.randn(7, width // 2, dtype=torch.float64, generator=generator)
    turns = torch.polar(torch.ones_like(angles), angles)
    agrees(
        engine,
        lambda x, w, b: dit.rotary_norm(x + 3, w, b, turns=turns.to(torch.complex64), heads=heads, eps=EPSILON),
        lambda x, w, b: dit.rotary_norm_reference(x + 3, w, b, turns, heads, EPSILON),
        [x, weight, bias],
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_swiglu(engine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    agrees(engine, dit.swiglu, dit.swiglu_reference, [drawn(3, 7, 11, generator=generator) for _ in range(2)])
    extreme = torch.tensor([-200.0, -100.0, 0.0, 100.0, 200.0])
    with use_cpu_engine(engine):
        torch.testing.assert_close(dit.swiglu(extreme, torch.ones(5)), dit.swiglu_reference(extreme, torch.ones(5)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("patches", "heads", "groups", "width", "seen", "read"),
    [(64, 4, 4, 32, 8, 5), (6, 6, 2, 16, 0, 17), (33, 2, 1, 48, 20, 3)],
)
def test_joint_attention(engine: str, patches: int, heads: int, groups: int, width: int, seen: int, read: int) -> None:
    """One picture reads all caption rows, one some of them, one none; the second one's vision rows are masked."""
    generator = torch.Generator().manual_seed(0)
    query = drawn(3, heads, patches, width, generator=generator)
    keys, values = (
        drawn(3, groups, patches, width, generator=generator),
        drawn(3, patches, groups * width, generator=generator),
    )
    others = [drawn(3, n, groups * width, generator=generator) for n in (seen, seen, read, read)]
    gates = [drawn(heads, generator=generator) for _ in range(2)]
    caption_mask = torch.rand(3, read, generator=generator) < 0.5
    caption_mask[0], caption_mask[2] = True, False
    vision_mask = torch.tensor([True, False, True])[:, None].expand(-1, seen)

    def conditions(parts: tuple[Tensor, ...]) -> list[tuple[Rows, Tensor]]:
        vision = Rows(*parts[:2], vision_mask), parts[4]
        return [vision, (Rows(*parts[2:4], caption_mask), parts[5])]

    def ours(query: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        vision, caption = conditions(rest)
        return dit.joint_attention(query, keys, values, scale=0.3, vision=vision, caption=caption)

    def reference(query: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        return _attention(query, keys, values, conditions(rest), scale=0.3)

    agrees(engine, ours, reference, [query, keys, values, *others, *gates])
    agrees(
        engine,
        lambda *own: dit.joint_attention(*own, scale=2.0),
        lambda *own: _attention(*own, [], scale=2.0),
        [query, keys, values],
    )


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, others: list[tuple[Rows, Tensor]], *, scale: float
) -> Tensor:
    """The definition, picture by picture and head by head."""
    pictures, heads, _, width = query.shape
    share = heads // keys.shape[1]
    out = []
    for b in range(pictures):
        for h in range(heads):
            part = slice(h // share * width, (h // share + 1) * width)
            head = (scale * query[b, h] @ keys[b, h // share].T).softmax(-1) @ values[b, :, part]
            for rows, gate in others:
                there = rows.mask[b]
                if there.any():
                    scores = query[b, h] @ rows.keys[b, there, part].T / width**0.5
                    head = head + gate[h] * scores.softmax(-1) @ rows.values[b, there, part]
            out.append(head)
    return torch.stack(out).unflatten(0, (pictures, heads)).transpose(1, 2).flatten(2)


def test_plain_torch_is_the_same_attention() -> None:
    """What other devices and dtypes compute."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64, generator=generator)
    rows = Rows(
        *torch.randn(2, 2, 3, 32, dtype=torch.float64, generator=generator), torch.tensor([[True, True, False]] * 2)
    )
    gate, values = torch.rand(4, dtype=torch.float64, generator=generator), values.transpose(1, 2).flatten(2)
    got = dit.joint_attention(query, keys, values, scale=0.7, caption=(rows, gate))
    torch.testing.assert_close(got, _attention(query, keys, values, [(rows, gate)], scale=0.7))


def test_a_picture_does_not_depend_on_those_beside_it() -> None:
    """Bit for bit."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = torch.randn(3, 5, 4, 9, 32, generator=generator)
    values = values.transpose(1, 2).flatten(2)
    together = dit.joint_attention(query, keys, values, scale=0.2)
    alone = dit.joint_attention(query[3:4], keys[3:4], values[3:4], scale=0.2)
    assert torch.equal(alone[0], together[3])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda o, x: o.modulated_norm(x[..., :5].contiguous(), x[0, 0, :5], None, None, 1e-5), "x: is 5 wide"),
        (lambda o, x: o.modulated_norm(x, x[0, 0], x, None, 1e-5), "factor: has shape"),
        (lambda o, x: o.modulated_norm(x.double(), x[0, 0], None, None, 1e-5), "x: dtype Double"),
        (lambda o, x: o.rotary_norm(x, x[0, 0], x[0, 0], x, 2, 1e-5), "turns: has shape"),
        (lambda o, x: o.rotary_norm(x, x[0, 0], x[0, 0], x, 3, 1e-5), "heads: 3"),
        (lambda o, x: o.swiglu(x, x[0]), "up: has shape"),
        (lambda o, x: o.joint_attention(x[None], x[None], x, *[None] * 8, 1.0), "values: has shape"),
        (lambda o, x: o.joint_attention(x[None], x, x, *[None] * 8, 1.0), "keys: has 3 dimensions"),
    ],
)
def test_wrong_arguments_are_named(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(torch.ops.megatron_omni, torch.zeros(2, 3, 32))


def test_fake_kernels_give_shapes() -> None:
    """Of every op, its backward included."""
    ops, x, query = torch.ops.megatron_omni, torch.randn(2, 3, 32), torch.randn(2, 2, 3, 16)
    turns, stats, vision = torch.randn(3, 8, 2), torch.rand(2, 3, 2), (x, x, torch.ones(2), None)
    masked = (*vision[:3], torch.tensor([[True, False, True]] * 2))
    calls = {
        ops.modulated_norm: [(x, x[0, 0], None, x, 1e-5), (x, x[0, 0], x[:, 0].clone(), None, 1e-5)],
        ops.modulated_norm_backward: [(x, x, torch.rand(2, 3), x[0, 0], None)],
        ops.rotary_norm: [(x, x[0, 0], x[0, 0], turns, 2, 1e-5)],
        ops.rotary_norm_backward: [(query, x, stats, x[0, 0], turns)],
        ops.swiglu: [(x, x)],
        ops.swiglu_backward: [(x, x, x)],
        ops.joint_attention: [(query, query, x, *rows, 1.0) for rows in ((*vision, *masked), (None,) * 8)],
        ops.joint_attention_backward: [
            (x, query, query, x, *rows, 1.0) for rows in ((*vision, *masked), ((None,) * 4 + masked), (None,) * 8)
        ],
    }
    for op, arguments in calls.items():
        for each in arguments:
            torch.library.opcheck(op.default, each, test_utils=("test_schema", "test_faketensor"))
