"""Routes as bytes: every record comes back, and replay is the recorded routing, weighted by whatever the logits are now."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_omni.batch import NO_RECORD
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.data.collate import collate
from megatron_omni.data.responses import group_samples, replaying, routes_of_responses
from megatron_omni.models.moe.kernels import load_kernels
from megatron_omni.models.moe.router import OmniRouter, RouterOutput
from megatron_omni.models.moe.routes import RouteRecord, bytes_of, flipped, packed, unpacked
from megatron_omni.platform.host_waits import HostWaits
from tests.unit.moe_problem import Alone
from tests.unit.test_collate import sample as text
from tests.unit.test_router import H, context, hidden, router

LAYER, LAYERS, TOKENS = 4, 3, 4096
INDEX = LAYER // 2 - 1


@pytest.mark.parametrize("num_slots", [1, 4, 5, 7, 8, 15, 16, 64])
def test_bytes_hold_every_mask_and_say_where_there_is_none(num_slots: int) -> None:
    mask = torch.rand(500, num_slots, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0], mask[1] = True, False
    routes = packed(mask)
    assert (
        routes.dtype == torch.uint8
        and routes.shape == (500, bytes_of(num_slots))
        and bytes_of(num_slots) * 8 > num_slots
    )
    back, recorded = unpacked(routes, num_slots)
    assert torch.equal(back, mask) and bool(recorded.all())
    for t in range(20):  # by the definition: bit e of the bytes, least significant first
        number = int.from_bytes(routes[t].numpy().tobytes(), "little")
        assert number == sum(1 << e for e in range(num_slots) if mask[t, e])
    routes[3] = NO_RECORD
    assert (~unpacked(routes, num_slots)[1]).nonzero().tolist() == [[3]]


def test_one_byte_a_token_and_layer() -> None:
    moe = MoEConfig()
    assert bytes_of(moe.num_routed_experts + moe.num_null_experts) == 1


def hard_hidden(module: OmniRouter) -> Tensor:
    """Inputs whose logits also tie and saturate."""
    x = hidden(TOKENS)
    x[:200] = 0.0  # all logits equal
    x[200:400] *= 1e4  # one slot has all of the probability
    x[400:600, :] = x[400:401, :]
    return x


def routed(module: OmniRouter, x: Tensor, **changes: object) -> tuple[RouterOutput, tuple[Tensor, Tensor], RouteRecord]:
    """What the router says, the gradients of its input and weight for one drawn gradient, and what it recorded."""
    padding = torch.arange(len(x)) % 13 == 0
    ctx = context(False, len(x), padding=padding, record=RouteRecord(), **changes)
    x = x.clone().requires_grad_()
    output = module(x, ctx=ctx)
    generator = torch.Generator().manual_seed(7)
    weights = output.routing.weights, output.routing.shared_weights
    loss = sum((w * torch.randn(w.shape, generator=generator, dtype=w.dtype)).sum() for w in weights)
    grads = torch.autograd.grad(loss, (x, module.weight))
    assert ctx.record is not None
    return output, grads, ctx.record


def columns(record: RouteRecord) -> Tensor:
    """[T, L n] with other layers' columns full of what must not be read."""
    own = packed(record.layers[INDEX])
    whole = torch.full((len(own), LAYERS, own.shape[1]), 0x55, dtype=torch.uint8)
    whole[:, INDEX] = own
    return whole.flatten(1)


@pytest.mark.parametrize("kernels", ["omni", "torch"])
@pytest.mark.parametrize("moe", [{}, {"max_routed": 1}, {"top_k": 2}, {"num_routed_experts": 9}], ids=str)
def test_replay_at_unchanged_weights_is_the_recorded_routing_bit_for_bit(kernels: str, moe: dict) -> None:
    module = router(layer=LAYER, **moe)
    module.topp_route = load_kernels(kernels).topp_route
    x = hard_hidden(module)
    live, grads, record = routed(module, x)
    replayed, again, second = routed(module, x, routes=columns(record))
    for a, b in zip(live.routing, replayed.routing):
        assert torch.equal(a, b)
    assert all(map(torch.equal, grads, again))
    assert torch.equal(record.layers[INDEX], second.layers[INDEX])
    assert live.routing.mask.sum(1).unique().numel() > (1 if "top_k" in moe else 2), "numbers of slots vary"


@pytest.mark.parametrize("kernels", ["omni", "torch"])
def test_on_moved_weights_the_record_holds_and_gradients_are_those_of_the_definition(kernels: str) -> None:
    module = router(torch.float64, layer=LAYER)
    module.topp_route = load_kernels(kernels).topp_route
    x = hard_hidden(module).double()
    live, _, record = routed(module, x)
    moved = replace_weights(module)
    replayed, grads, now = routed(moved, x, routes=columns(record))
    mask = live.routing.mask
    assert torch.equal(replayed.routing.mask, mask)
    own = now.layers[INDEX]
    assert 0.1 < (own != mask).any(1).double().mean() < 0.9, "the logits would choose otherwise for many"

    # Softmax over the recorded and the shared slots, by loops over tokens.
    leaf, weight = x.clone().requires_grad_(), moved.weight.detach().clone().requires_grad_()
    z = leaf @ weight.t()
    rows = []
    for t in range(len(x)):
        if t % 13 == 0:
            kept = torch.tensor([False] * module.num_slots + [True] * module.moe.num_shared_experts)
        else:
            kept = torch.cat([mask[t], mask.new_ones(module.moe.num_shared_experts)])
        w = torch.zeros_like(z[t])
        w[kept] = torch.softmax(z[t][kept], 0)
        rows.append(w)
    w = torch.stack(rows)
    assert torch.allclose(w[:, : module.num_slots], replayed.routing.weights, rtol=1e-12, atol=1e-14)
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum()
        for part in w.split([module.num_slots, module.moe.num_shared_experts], dim=1)
    )
    for got, expected in zip(grads, torch.autograd.grad(loss, (leaf, weight))):
        assert float(got.abs().max()) > 0
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def replace_weights(module: OmniRouter) -> OmniRouter:
    """The same router after a large step."""
    noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(3), dtype=module.weight.dtype)
    with torch.no_grad():
        module.weight += 0.5 * noise
    return module


def test_tokens_without_a_record_are_routed_live() -> None:
    module = router(layer=LAYER)
    x = hidden(TOKENS)
    _, _, record = routed(module, x)
    replace_weights(module)
    live, _, _ = routed(module, x)
    whole = columns(record)
    whole[1::2] = NO_RECORD
    replayed, _, _ = routed(module, x, routes=whole)
    assert torch.equal(replayed.routing.mask[1::2], live.routing.mask[1::2])
    assert torch.equal(replayed.routing.weights[1::2], live.routing.weights[1::2])
    assert not torch.equal(replayed.routing.mask[::2], live.routing.mask[::2])


def test_a_flipped_bit_is_noticed() -> None:
    """At unchanged weights what the logits choose is what was given, in all but the layer whose record is wrong."""
    module = router(layer=LAYER)
    x = hidden(TOKENS)
    _, _, record = routed(module, x)
    given = columns(record)
    given[77, INDEX] ^= 1 << 2
    replayed, _, now = routed(module, x, routes=given)
    found = flipped(given[:, INDEX : INDEX + 1], packed(now.layers[INDEX]), num_slots=module.num_slots)
    assert found.nonzero().flatten().tolist() == [77] and int(found.sum()) == 1
    assert bool(replayed.routing.mask[77, 2]) != bool(now.layers[INDEX][77, 2])
    without = given.clone()
    without[77] = NO_RECORD
    assert not flipped(without[:, INDEX : INDEX + 1], packed(now.layers[INDEX]), num_slots=module.num_slots).any()


def test_release_is_refused() -> None:
    module = router(layer=LAYER, routing_weight_mode="release", gradient_estimator="grin")
    routes = torch.zeros(8, LAYERS, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"routing_weight_mode is release.*reinforce.routes = live"):
        module(torch.zeros(8, H), ctx=context(False, 8, routes=routes))


def test_without_record_and_replay_routing_is_one_call() -> None:
    calls = []
    module = router(layer=LAYER)
    inner = module.topp_route
    module.topp_route = lambda *a, **k: calls.append(k) or inner(*a, **k)
    module(hidden(), ctx=context(False))
    assert len(calls) == 1 and calls[0].get("keep") is None


def test_neither_recording_nor_replaying_waits_for_the_device() -> None:
    module = router(layer=LAYER)
    x = hidden(64)
    routes = torch.full((64, LAYERS), 0x15, dtype=torch.uint8)
    alone = SimpleNamespace(mp=Alone(), tp=Alone())
    with HostWaits(allowed={}):
        record = RouteRecord()
        module(x, ctx=context(False, 64, routes=routes, record=record))
        record.whole(ModelConfig(num_layers=1), alone)
        flipped(routes, routes, num_slots=module.num_slots)


def test_routes_of_samples_lie_where_their_tokens_do() -> None:
    """Also in a shared row; what has none, padding too, has no record."""

    def routes(length: int, first: int) -> Tensor:
        return torch.arange(first, first + 2 * length, dtype=torch.uint8).view(length, 2)

    with_routes = [replace(text(3), routes=routes(3, 1)), text(2), replace(text(4), routes=routes(4, 21))]
    batch = collate(with_routes, pad_id=0, row_of=[0, 0, 1], multiple_of=4)
    assert batch.routes is not None and batch.routes.shape == (2, 8, 2)
    assert torch.equal(batch.routes[0, :3], routes(3, 1)) and torch.equal(batch.routes[1, :4], routes(4, 21))
    assert bool((batch.routes[0, 3:] == NO_RECORD).all()) and bool((batch.routes[1, 4:] == NO_RECORD).all())
    assert collate([text(3)], pad_id=0).routes is None


def test_routes_of_responses_come_back_from_shared_rows() -> None:
    """The prompt's beside each of two samples that its responses needed, and each response's along its branch."""
    prompt, responses = text(5), [[7, 8, 9], [5], [11, 12, 13, 14], [3, 4]]
    groups = group_samples(prompt, responses, capacity=10)
    assert len(groups) == 2
    generator = torch.Generator().manual_seed(0)
    told = torch.randint(0, 128, (4, 2), generator=generator).byte()  # of the prompt but its last token
    own = [torch.randint(0, 128, (len(response), 2), generator=generator).byte() for response in responses]
    routes = [torch.cat([told, rows]) for rows in own]
    given = replaying(groups, routes)
    for group in given:
        assert group.sample.routes is not None and torch.equal(group.sample.routes[:4], told)
    taken = [group.sample.routes[list(span)] for group in given for span in group.spans]
    assert all(map(torch.equal, taken, own))
    batch = collate([text(3), *(group.sample for group in given)], pad_id=0, row_of=[0, 0, 1], multiple_of=8)
    assert batch.routes is not None
    assert all(map(torch.equal, routes_of_responses(batch.attention, batch.routes), routes))
