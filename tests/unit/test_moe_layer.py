"""The MoE layer on one rank, in float64, against a token-by-token transcription: output and every gradient."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.utils.checkpoint import checkpoint

from megatron_omni.models.moe.context import token_context, without_stats
from tests.unit.moe_problem import (
    AUX_SCALE,
    HIDDEN,
    LAYER,
    ROUTED,
    SHARED,
    SHARED_WIDTH,
    WIDTH,
    build_layer,
    micro_batch,
    settings,
    weights,
)


def ffn(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


def literal_layer(x, gate_input, full, mask, scale, estimator):
    """y_t = sum over selected real e of GradEst(w_e FFN_e(x_t)) + sum_s w_s FFN_s(x_t), one token at a time.

    w: softmax of the token's logits over its selected dynamic and all shared slots (Algorithm 1). GradEst: A.4's o_est.
    """
    rows = []
    for t in range(x.shape[0]):
        z = full["router.weight"] @ gate_input[t]
        selected = mask[t].nonzero().flatten().tolist()
        everyone = selected + list(range(ROUTED + 1, ROUTED + 1 + SHARED))
        w = dict(zip(everyone, torch.softmax(z[everyone], 0), strict=True))
        y = torch.zeros_like(x[t])
        for e in selected:
            if e >= ROUTED:
                continue
            gate, up = full["experts.weight1"][e].chunk(2, dim=1)
            out = ffn(x[t], gate, up, full["experts.weight2"][e])
            s = scale[t, e]
            if estimator == "paper":
                o = w[e] * out
                y = y + 2 * o + (s * o - 2 * o).detach()
            elif estimator == "grin":
                y = y + (w[e] + (s * w[e] - w[e]).detach()) * out
            else:
                y = y + w[e] * out
        gates, ups = full["shared_experts.weight1"].chunk(2, dim=1)
        for i in range(SHARED):
            mine = slice(i * SHARED_WIDTH, (i + 1) * SHARED_WIDTH)
            out = ffn(x[t], gates[:, mine], ups[:, mine], full["shared_experts.weight2"][mine])
            y = y + w[ROUTED + 1 + i] * out
        rows.append(y)
    return torch.stack(rows)


def gate_jitter(layer, x, ctx):
    """What the gate multiplies its input by, [T, H], read off with gates that copy single dimensions."""
    trained, columns = layer.router.weight.data.clone(), []
    with torch.no_grad():
        for first in range(0, HIDDEN, 7):
            layer.router.weight.copy_(torch.eye(HIDDEN, dtype=x.dtype).roll(-first, 0)[:7])
            columns.append(layer.router.gate(torch.ones_like(x), ctx=ctx)[:, : HIDDEN - first])
        layer.router.weight.copy_(trained)
    return torch.cat(columns, 1)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize(
    ("estimator", "stochastic"), [("paper", True), ("grin", True), ("none", True), ("paper", False)]
)
def test_forward_and_gradients_token_by_token(dispatcher, estimator, stochastic):
    moe = settings(gradient_estimator=estimator, moe_token_dispatcher_type=dispatcher)
    full = {name: value.double() for name, value in weights().items()}
    layer = build_layer(moe, full, dtype=torch.float64)
    hidden, gradient, ctx = micro_batch(0, stochastic=stochastic)
    hidden, gradient = hidden.double().requires_grad_(), gradient.double()
    with token_context(ctx):
        y, bias = layer(hidden)
    assert bias is None and y.shape == hidden.shape
    y.backward(gradient)

    reference = {name: value.clone().requires_grad_() for name, value in full.items()}
    x = hidden.detach().flatten(0, 1).masked_fill(ctx.padding[:, None], 0).requires_grad_()
    output = layer.router(hidden.detach().flatten(0, 1), ctx=ctx)
    jitter = gate_jitter(layer, x, ctx)  # the gate's input is jittered, the experts' is not
    assert (0 < (jitter - 1).abs().max() <= 0.01) == stochastic
    mask, scale = output.routing.mask, output.routing.scale
    assert set(scale.flatten().tolist()) == ({1.0, 1 / 3} if stochastic and estimator != "none" else {1.0})
    literal = literal_layer(x, x * jitter, reference, mask, scale, estimator if stochastic else "none")
    torch.testing.assert_close(y.detach().flatten(0, 1), literal.detach(), rtol=1e-9, atol=1e-10)

    loss = (literal * gradient.flatten(0, 1)).sum()
    if stochastic:
        loss = loss + AUX_SCALE * literal_aux_loss(x * jitter, reference["router.weight"], mask, ctx)
    names = list(reference)
    expected = torch.autograd.grad(loss, [x, *(reference[name] for name in names)])
    of_padding = ctx.padding[:, None]
    torch.testing.assert_close(hidden.grad.flatten(0, 1), expected[0].masked_fill(of_padding, 0), rtol=1e-8, atol=1e-10)
    for name, value in zip(names, expected[1:], strict=True):
        torch.testing.assert_close(layer.get_parameter(name).grad, value, rtol=1e-8, atol=1e-10, msg=name)


def literal_aux_loss(gate_input, gate, mask, ctx):
    """5 sum_e f_e P_e with label weight 10 and P over the selected slots."""
    a = torch.where(ctx.padding, 0.0, torch.where(ctx.has_label, 10.0, 1.0)).double()
    z = (gate_input @ gate.t())[:, : ROUTED + 1]
    p = torch.stack(
        [
            torch.zeros(ROUTED + 1, dtype=torch.float64).index_add(0, chosen, torch.softmax(z[t][chosen], 0))
            for t, chosen in ((t, mask[t].nonzero().flatten()) for t in range(z.shape[0]))
        ]
    )
    f = (a[:, None] * mask).sum(0) / a.sum()
    return 5 * (f * (a[:, None] * p).sum(0) / a.sum()).sum()


def test_megatron_takes_it_for_a_moe_layer():
    layer = build_layer(settings(), weights())
    assert isinstance(layer, MoELayer) and layer.router.layer_number == LAYER
    assert all(parameter.allreduce is False for parameter in layer.experts.parameters())
    assert not any(hasattr(parameter, "allreduce") for parameter in layer.shared_experts.parameters())


@pytest.mark.parametrize("kernels", ["omni", "torch"])
def test_fixed_shapes_give_the_same_output_whatever_other_experts_say(kernels):
    """Of one rank, without gradients, routing not drawn; expert 0 gives inf, and only for tokens that are its own."""
    layer = build_layer(settings(kernels=kernels), weights())
    hidden, _, ctx = micro_batch(0, stochastic=False)
    ctx = replace(ctx, stats=None)
    with torch.no_grad(), token_context(ctx):
        expected, _ = layer(hidden)
        own = layer.router(hidden.flatten(0, 1), ctx=ctx).routing.mask[:, 0]
        with token_context(replace(ctx, fixed_shapes=True)):
            torch.testing.assert_close(layer(hidden)[0], expected)
            layer.experts.weight2[0] = float("inf")
            spoilt = layer(hidden)[0].flatten(0, 1)
    assert 0 < own.sum() < len(own)
    torch.testing.assert_close(spoilt[~own], expected.flatten(0, 1)[~own])
    assert not spoilt[own].isfinite().any()


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_all_tokens_to_null(dispatcher):
    """Only the shared part is left, and every expert still gets a gradient: zero."""
    layer = build_layer(settings(moe_token_dispatcher_type=dispatcher), weights(null_bias=60.0))
    hidden, gradient, ctx = micro_batch(0, marked="all")
    hidden.requires_grad_()
    with token_context(ctx):
        y, _ = layer(hidden)
    y.backward(gradient)
    assert ctx.stats.selected[LAYER][:, :ROUTED].sum() == 0
    assert bool((layer.experts.weight1.grad == 0).all()) and bool((layer.experts.weight2.grad == 0).all())
    real, x = ~ctx.padding, hidden.flatten(0, 1)
    shared = layer.shared_experts(x, layer.router(x, ctx=ctx).routing.shared_weights)
    torch.testing.assert_close(y.flatten(0, 1)[real], shared[real])
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("probs", ["selected", "full"])
@pytest.mark.parametrize("mode", ["masked_softmax", "release"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_what_padding_holds_reaches_nothing(poison, probs, mode, dispatcher):
    """Output, losses and every gradient are those of padding that holds 0, bit for bit."""
    moe = settings(
        aux_loss_probs=probs, routing_weight_mode=mode, gradient_estimator="grin", moe_token_dispatcher_type=dispatcher
    )
    results = []
    for value in (0.0, poison):
        layer = build_layer(moe, weights())
        hidden, gradient, ctx = micro_batch(0)
        real = ~ctx.padding
        hidden.flatten(0, 1)[ctx.padding] = value
        hidden.requires_grad_()
        with token_context(ctx):
            y, _ = layer(hidden)
        y.backward(gradient.flatten(0, 1).masked_fill(ctx.padding[:, None], 0).view_as(y))
        assert bool((y.flatten(0, 1)[ctx.padding] == 0).all())
        of_tokens = [t.detach().flatten(0, 1)[real] for t in (y, hidden.grad)]
        results.append([*of_tokens, *(p.grad for p in layer.parameters()), ctx.stats.aux_loss[LAYER]])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.isfinite(clean).all() and torch.equal(clean, poisoned)


def test_a_replayed_forward_repeats_its_draws():
    """Gradients through a checkpoint that runs the layer again equal the plain ones bit by bit: same noise."""
    results = []
    for replayed in (False, True):
        layer = build_layer(settings(capacity_factor=0.8), weights())
        hidden, gradient, ctx = micro_batch(0)
        hidden.requires_grad_()
        contexts = iter([ctx])

        def run(hidden, layer=layer, contexts=contexts, ctx=ctx):
            with token_context(next(contexts, without_stats(ctx))):
                return layer(hidden)[0]

        y = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False) if replayed else run(hidden)
        torch.rand(5)  # the generator moves on in between
        y.backward(gradient)
        results.append([y.detach(), hidden.grad, *(p.grad for p in layer.parameters()), ctx.stats.tokens[LAYER]])
    for plain, repeated in zip(*results, strict=True):
        assert torch.equal(plain, repeated)


def test_megatrons_own_recomputation_is_refused():
    with pytest.raises(ValueError, match=r"set parallel\.recompute = moe"):
        build_layer(settings(), weights(), recompute_granularity="selective", recompute_modules=["moe"])


def test_layer_without_shared_experts():
    layer = build_layer(settings(num_shared_experts=0), weights() | {"router.weight": weights()["router.weight"][:5]})
    hidden, gradient, ctx = micro_batch(0)
    with token_context(ctx):
        y, _ = layer(hidden.requires_grad_())
    y.backward(gradient)
    assert bool((y.detach().flatten(0, 1)[ctx.padding] == 0).all()) and torch.isfinite(hidden.grad).all()


def test_checkpoint_entries_have_a_leading_axis_of_all_experts():
    layer = build_layer(settings(), weights())
    entries = layer.experts.sharded_state_dict("decoder.layers.5.mlp.experts.")
    first = entries["decoder.layers.5.mlp.experts.weight1"]
    assert first.data is layer.experts.weight1, "the optimizer finds its parameter by identity"
    halves = first.build()
    assert [h.key for h in halves] == ["decoder.layers.5.mlp.experts.experts.linear_fc1.weight"] * 2
    assert {h.global_shape for h in halves} == {(ROUTED, HIDDEN, 2 * WIDTH)}
    assert torch.equal(first.merge_fn([h.data for h in halves]), layer.experts.weight1)
    second = entries["decoder.layers.5.mlp.experts.weight2"]
    assert second.key == "decoder.layers.5.mlp.experts.experts.linear_fc2.weight"
    assert second.global_shape == (ROUTED, WIDTH, HIDDEN) and second.data is layer.experts.weight2


def test_wrong_context_is_caught():
    layer = build_layer(settings(), weights())
    hidden, _, ctx = micro_batch(0)
    with pytest.raises(AssertionError, match="outside token_context"):
        layer(hidden)
    with token_context(ctx), pytest.raises(AssertionError, match="48 tokens for 24 hidden states"):
        layer(hidden[:12])


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_bfloat16_layer_stays_close_to_float64(dispatcher):
    """Same rounded weights and input, so the fp32 gate selects alike; what is left is bf16 rounding (2^-9)."""
    moe = settings(moe_token_dispatcher_type=dispatcher)
    rounded = {name: value.bfloat16() for name, value in weights().items()}
    hidden, gradient, ctx = micro_batch(0)
    results = {}
    for dtype in (torch.bfloat16, torch.float64):
        layer = build_layer(moe, rounded, dtype=dtype)
        x = hidden.bfloat16().to(dtype).requires_grad_()
        with token_context(ctx):
            y, _ = layer(x)
        assert y.dtype == dtype
        y.backward(gradient.bfloat16().to(dtype))
        results[dtype] = [y.detach().double(), x.grad.double(), *(p.grad.double() for p in layer.parameters())]
    for got, exact in zip(results[torch.bfloat16], results[torch.float64], strict=True):
        assert ((got - exact).norm() / exact.norm()).item() < 0.01


def inherited_of_megatron(layer: MoELayer) -> dict[str, Callable[..., Any]]:
    """Every method that a layer has from a class of Megatron's, private ones too."""
    found: dict[str, Callable[..., Any]] = {}
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("megatron."):
            methods = {name: fn for name, fn in vars(cls).items() if inspect.isfunction(fn) and name != "__init__"}
            found |= {name: fn for name, fn in methods.items() if getattr(type(layer), name) is fn}
    return found


def attributes_read(method: Callable[..., Any]) -> set[str]:
    """Names that ``method`` reads of ``self``, but not those that it sets itself or asks for with ``hasattr``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    of_self = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"]
    asked = {
        call.args[1].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "hasattr" and isinstance(call.args[1], ast.Constant)
    }
    stored = {node.attr for node in of_self if isinstance(node.ctx, ast.Store)}
    return {node.attr for node in of_self} - stored - asked


def test_no_inherited_method_works_on_what_the_layer_has_not() -> None:
    """``MoELayer.__init__`` is not run, so what it would make is not there. A method that a later Megatron adds, or that
    begins to read something else, is found here.
    """
    layer = build_layer(settings(), weights())
    inherited = inherited_of_megatron(layer)
    assert set(inherited) >= {"sharded_state_dict", "set_is_first_microbatch"}, "nothing was looked at"
    for method in inherited.values():
        missing = {attribute for attribute in attributes_read(method) if not hasattr(layer, attribute)}
        assert not missing, f"{method.__qualname__} reads {missing}: override it, or refuse it in _MEGATRONS_OWN"
    own = {name for name, value in vars(MoELayer).items() if inspect.isfunction(value) and name != "__init__"}
    ours = {"forward", "set_layer_number"}
    assert not own & set(inherited), "a step of Megatron's forward is inherited"
    for name in own - ours:
        with pytest.raises(NotImplementedError, match=rf"MoELayer\.{name} was called: .*model\.megatron"):
            getattr(layer, name)()
