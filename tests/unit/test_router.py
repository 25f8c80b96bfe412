"""The router module: what the gate computes, what is random and what is not, and which settings are refused."""

from dataclasses import replace

import pytest
import torch

from megatron_omni.config.model import MoEConfig
from megatron_omni.models.moe.context import TokenContext
from megatron_omni.models.moe.router import OmniRouter

T, H = 600, 16


def context(stochastic=True, num_tokens=T, **changes):
    fields = {
        "sample_ids": torch.arange(num_tokens) // 50,
        "sample_positions": torch.arange(num_tokens) % 50,
        "modality": torch.arange(num_tokens) % 4,
        "has_label": torch.arange(num_tokens) % 3 == 0,
        "padding": torch.zeros(num_tokens, dtype=torch.bool),
        "seed": 11,
        "step": 3,
        "stochastic": stochastic,
        "aux_loss_scale": 0.0,
    }
    return TokenContext(**(fields | changes))


def router(dtype=torch.float32, layer=2, std=1.0, **moe):
    torch.manual_seed(0)
    module = OmniRouter(MoEConfig(**moe), hidden_size=H, dtype=dtype, init_std=std)
    module.set_layer_number(layer)
    return module


def hidden(num_tokens=T, dtype=torch.float32):
    return torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_columns_are_routed_null_shared():
    """Hidden dimension e alone drives logit e: a token that points at 4 takes null and nothing else."""
    module = router(input_jitter=0.0)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[torch.arange(7), torch.arange(7)] = 20.0
    x = torch.eye(7, H)
    routing = module(x, ctx=context(False, 7)).routing
    assert routing.mask[:5].tolist() == [[e == t for e in range(5)] for t in range(5)]
    assert module.weight.shape == (7, H)
    # tokens 5 and 6 point at the shared experts
    assert routing.shared_weights[5, 0] > 0.999 and routing.shared_weights[6, 1] > 0.999


@pytest.mark.parametrize("stochastic", [False, True])
def test_gate_runs_in_fp32_in_training_and_evaluation(stochastic):
    x = hidden(dtype=torch.bfloat16)
    module = router(torch.bfloat16, input_jitter=0.0)
    z = module.gate(x, ctx=context(stochastic))
    assert z.dtype == torch.float32
    assert torch.equal(z, x.float() @ module.weight.float().t())
    low = router(torch.bfloat16, input_jitter=0.0, fp32_gate=False).gate(x, ctx=context(stochastic))
    assert torch.equal(low, (x @ module.weight.t()).float()) and not torch.equal(low, z)


def test_jitter_scales_each_input_within_its_bounds():
    module = router(input_jitter=0.01)
    with torch.no_grad():
        module.weight.copy_(torch.eye(7, H))
    x = hidden() + 3.0
    before = x.clone()
    ratio = module.gate(x, ctx=context()) / x[:, :7]
    assert torch.equal(x, before), "the hidden states, which the experts get, stay as they are"
    assert 0.99 - 1e-6 < ratio.min() < 0.9902 and 1.0098 < ratio.max() < 1.01 + 1e-6
    assert ratio.mean().item() == pytest.approx(1.0, abs=5 * 0.01 / 3**0.5 / ratio.numel() ** 0.5)
    assert torch.equal(module.gate(x, ctx=context(False)), x[:, :7]), "no jitter in evaluation"
    gradient = torch.autograd.grad(module.gate(x.requires_grad_(), ctx=context()).sum(), x)[0]
    torch.testing.assert_close(gradient[:, :7], ratio.detach(), rtol=1e-5, atol=1e-6)


def test_evaluation_is_sorted_unscaled_and_never_drops():
    module = router(capacity_factor=0.1, min_capacity=1)
    routing = module(hidden(), ctx=context(False)).routing
    z = module.gate(hidden(), ctx=context(False))[:, :5]
    smallest_selected = z.masked_fill(~routing.mask, float("inf")).min(1).values
    largest_left = z.masked_fill(routing.mask, -float("inf")).max(1).values
    assert bool((smallest_selected > largest_left).all())
    assert bool((routing.scale == 1).all())
    other_run = module(hidden(), ctx=context(False, seed=99, step=17)).routing
    assert torch.equal(routing.weights, other_run.weights)


@pytest.mark.parametrize("mode", ["masked_softmax", "release"])
def test_a_token_routes_the_same_wherever_it_lies(mode):
    module = router(routing_weight_mode=mode, gradient_estimator="grin", std=0.1)
    x, ctx = hidden(), context()
    whole = module(x, ctx=ctx).routing
    assert torch.equal(module(x, ctx=ctx).routing.weights, whole.weights), "a recomputed layer repeats itself"
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))[: T // 2]
    facts = {name: getattr(ctx, name)[order] for name in ("sample_ids", "sample_positions", "modality", "has_label")}
    part = module(x[order], ctx=replace(ctx, padding=ctx.padding[order], **facts)).routing
    assert torch.equal(part.mask, whole.mask[order]) and torch.equal(part.scale, whole.scale[order])
    torch.testing.assert_close(part.weights, whole.weights[order])


def test_draws_change_with_step_seed_and_layer():
    module = router(std=0.1)
    first = module(hidden(), ctx=context()).routing.mask
    for other in (
        module(hidden(), ctx=context(step=4)),
        module(hidden(), ctx=context(seed=12)),
        router(std=0.1, layer=4)(hidden(), ctx=context()),
    ):
        assert (other.routing.mask != first).any(1).float().mean() > 0.5


def test_sampling_can_be_switched_off_in_training():
    module = router(sample_experts=False, input_jitter=0.0)
    trained, evaluated = module(hidden(), ctx=context()), module(hidden(), ctx=context(False))
    assert torch.equal(trained.routing.weights, evaluated.routing.weights)
    assert bool((trained.routing.scale == 1).all())


def test_padding_is_not_routed():
    padding = torch.arange(T) % 5 == 0
    routing = router()(hidden(), ctx=context(padding=padding)).routing
    assert not routing.mask[padding].any() and routing.mask[~padding].any(1).all()
    assert torch.isfinite(routing.shared_weights).all()


def test_capacity_in_training_caps_real_experts_over_the_micro_batch():
    """C = max(8, ceil(600 / 5 * 0.5)) = 60 rows for every real expert; null keeps all of its tokens."""
    module = router(capacity_factor=0.5, std=0.05)
    capped, free = module(hidden(), ctx=context()), router(std=0.05)(hidden(), ctx=context())
    assert capped.routing.mask[:, :4].sum(0).tolist() == [60] * 4
    assert torch.equal(capped.routing.mask[:, 4], free.routing.mask[:, 4])
    assert capped.num_before_drop == free.routing.mask.sum() and free.num_before_drop is None
    assert torch.equal(capped.aux_loss, free.aux_loss), "the loss is computed before the drop"
    total = (capped.routing.weights / capped.routing.scale).sum(1) + capped.routing.shared_weights.sum(1)
    torch.testing.assert_close(total, torch.ones(T))


def test_capacity_in_release_mode_caps_null_too():
    """As the published code does: every dynamic slot keeps 60 tokens, those of largest logit."""
    settings = {"routing_weight_mode": "release", "gradient_estimator": "grin", "std": 0.05}
    capped, free = (
        router(capacity_factor=0.5, **settings)(hidden(), ctx=context()),
        router(**settings)(hidden(), ctx=context()),
    )
    assert (free.routing.mask.sum(0) > 60).all() and capped.routing.mask.sum(0).tolist() == [60] * 5
    z = router(**settings).gate(hidden(), ctx=context())[:, 4]
    kept, taken = capped.routing.mask[:, 4], free.routing.mask[:, 4]
    assert bool((kept <= taken).all()) and z[kept].min() >= z[taken & ~kept].max()
