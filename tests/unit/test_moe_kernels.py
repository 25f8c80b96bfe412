"""``model.moe.kernels``: every choice computes the same layer on the same weights, and null slots cost nothing."""

import pytest
import torch

from megatron_omni.models.moe import kernels as module
from megatron_omni.models.moe.context import token_context
from megatron_omni.models.moe.kernels import load_kernels, takes_grouped_mm, torch_grouped_gemm
from megatron_omni.platform.device import accelerator_present
from tests.unit.moe_problem import ROUTED, build_layer, micro_batch, settings, weights

HERE = ["omni", "torch", "megatron"]


def outcome(choice, dtype, **changes):
    """Output, gradient of the input and of every parameter."""
    layer = build_layer(settings(kernels=choice, **changes), weights(), dtype=dtype)
    hidden, gradient, ctx = micro_batch(0)
    hidden, gradient = hidden.to(dtype).requires_grad_(), gradient.to(dtype)
    with token_context(ctx):
        y, _ = layer(hidden)
    y.backward(gradient)
    return {"y": y.detach(), "x": hidden.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("estimator", ["paper", "grin"])
@pytest.mark.parametrize("choice", ["torch", "megatron"])
def test_choices_agree_in_float64(choice, estimator, dispatcher):
    changes = {"gradient_estimator": estimator, "moe_token_dispatcher_type": dispatcher}
    ours, theirs = (outcome(name, torch.float64, **changes) for name in ("omni", choice))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert ours["experts.weight1"].abs().max() > 0.01


@pytest.mark.parametrize("choice", HERE)
def test_single_precision_stays_close_to_float64(choice):
    exact, found = outcome("omni", torch.float64), outcome(choice, torch.float32)
    for name, value in exact.items():
        assert ((found[name].double() - value).norm() / value.norm()).item() < 2e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_added_to_main_grad(dtype):
    """The convention of megatron-core's DDP: two micro-batches into ``main_grad``, and the flag that its hook reads."""
    layer = build_layer(settings(), weights(), dtype=dtype)
    experts = {name: p for name, p in layer.named_parameters() if name.startswith("experts.")}
    expected = {name: torch.zeros_like(p) for name, p in experts.items()}

    def run(index):
        hidden, gradient, ctx = micro_batch(index)
        with token_context(ctx):
            y, _ = layer(hidden.to(dtype))
        y.backward(gradient.to(dtype))

    for index in range(2):
        run(index)
        for name, p in experts.items():
            expected[name] += p.grad
            p.grad = None
    for p in experts.values():
        p.main_grad, p.grad_added_to_main_grad = torch.zeros_like(p), False
    with torch.no_grad(), token_context(micro_batch(0)[2]):
        layer(micro_batch(0)[0].to(dtype))  # as a recomputed or an evaluated layer: no gradient will come
    assert not any(p.grad_added_to_main_grad for p in experts.values())
    for index in range(2):
        run(index)
        assert all(p.grad_added_to_main_grad and p.grad is not None for p in experts.values())
        for p in experts.values():
            p.grad = None  # the hook
    for name, p in experts.items():
        torch.testing.assert_close(p.main_grad, expected[name])
        assert p.main_grad.abs().max() > 0.01


@pytest.mark.parametrize("choice", HERE)
def test_all_tokens_to_null_leave_zero_gradients(choice):
    layer = build_layer(settings(kernels=choice), weights(null_bias=60.0))
    hidden, gradient, ctx = micro_batch(0, marked="all")
    with token_context(ctx):
        y, _ = layer(hidden.requires_grad_())
    y.backward(gradient)
    assert bool((layer.experts.weight1.grad == 0).all()) and bool((layer.experts.weight2.grad == 0).all())


def test_choices_have_the_same_parameters_and_checkpoint_keys():
    layers = [build_layer(settings(kernels=choice), weights()) for choice in HERE]
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers]
    keys = [
        {name: (entry.key, entry.data.shape) for name, entry in layer.experts.sharded_state_dict("mlp.").items()}
        for layer in layers
    ]
    assert shapes[0] == shapes[1] == shapes[2] and keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_null_slots_are_neither_moved_nor_computed(dispatcher, monkeypatch):
    """Rows gathered, multiplied and summed are the selected real experts, however many slots are null."""
    seen: dict[str, list[int]] = {"permute": [], "expert_mlp": [], "unpermute": [], "last offset": []}
    real = load_kernels("omni")

    def permute(*args, **kwargs):
        rows = real.permute(*args, **kwargs)
        seen["permute"].append(rows.shape[0])
        return rows

    def expert_mlp(rows, w1, w2, offsets):
        seen["expert_mlp"].append(rows.shape[0])
        seen["last offset"].append(int(offsets[-1]))
        return real.expert_mlp(rows, w1, w2, offsets)

    def unpermute(rows, *args, **kwargs):
        seen["unpermute"].append(rows.shape[0])
        return real.unpermute(rows, *args, **kwargs)

    monkeypatch.setitem(
        module._CHOICES, "counted", lambda: real._replace(permute=permute, unpermute=unpermute, expert_mlp=expert_mlp)
    )
    load_kernels.cache_clear()
    null_shares = []
    for null_bias, top_p in ((0.0, 0.7), (2.0, 0.7), (2.0, 0.99), (60.0, 0.7)):
        moe = settings(kernels="counted", moe_token_dispatcher_type=dispatcher, top_p=top_p)
        layer = build_layer(moe, weights(null_bias=null_bias))
        hidden, _, ctx = micro_batch(0, marked="all")
        for counts in seen.values():
            counts.clear()
        with token_context(ctx):
            layer(hidden)
            mask = layer.router(hidden.flatten(0, 1), ctx=ctx).routing.mask
        assignments = int(mask[:, :ROUTED].sum())
        assert {name: counts for name, counts in seen.items()} == {name: [assignments] for name in seen}
        null_shares.append(int(mask[:, ROUTED:].sum()) / int(mask.sum()))
    load_kernels.cache_clear()
    assert null_shares[0] < 0.2 < null_shares[1] < null_shares[-1] == 1.0, null_shares


def test_absent_choices_are_refused_with_the_fix():
    with pytest.raises(
        ValueError, match=r"model\.moe\.kernels='fast': no such choice; use one of omni, torch, te, meg"
    ):
        load_kernels("fast")
    if not accelerator_present():
        with pytest.raises(
            ValueError, match=r"model\.moe\.kernels='te': needs a CUDA device.*model\.moe\.kernels=omni"
        ):
            build_layer(settings(kernels="te"), weights())


def test_the_choice_is_logged_once(caplog):
    load_kernels.cache_clear()
    with caplog.at_level("INFO", logger="megatron_omni"):
        for _ in range(3):
            build_layer(settings(kernels="torch"), weights())
    assert [r.getMessage() for r in caplog.records if "moe=" in r.getMessage()] == ["backends: moe=torch"]


@pytest.mark.parametrize(("width", "taken"), [(12, True), (10, False)])
def test_torch_falls_back_where_grouped_mm_refuses(width, taken):
    """Rows of 40 bytes are refused by F.grouped_mm; the result is the same either way, expanded gradients included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 8, generator=generator, requires_grad=True)
    w = torch.randn(3, 8, width, generator=generator, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 9])
    assert takes_grouped_mm(x, w) == taken and not takes_grouped_mm(x.double(), w.double())
    y = torch_grouped_gemm(x, w, offsets)
    torch.testing.assert_close(y, torch.cat([x[:4] @ w[0], x[4:] @ w[2]]))
    y.sum().backward()
    torch.testing.assert_close(w.grad[2], x[4:].t().sum(1, keepdim=True).expand(8, width).detach())
    assert bool((w.grad[1] == 0).all())
