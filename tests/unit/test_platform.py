"""The CPU platform: every patch still has its target, Megatron's CUDA-only calls work, and FusedAdam is AdamW."""

import ast
import importlib
import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.platform import adam, cpu, device
from megatron_omni.platform.adam import FusedAdam
from megatron_omni.platform.device import hide_upstream_notes
from megatron_omni.platform.patch import Patch
from megatron_omni.platform.seeds import named_generator, named_seed, seed_everything

ON_CPU = pytest.mark.skipif(device.accelerator_present(), reason="the patch table is not installed with an accelerator")


@pytest.mark.parametrize(
    "patch", cpu.TORCH_PATCHES + cpu.MEGATRON_PATCHES + adam.PATCHES, ids=lambda patch: patch.target
)
def test_patch_target_exists_in_pinned_version(patch: Patch) -> None:
    holder, name = patch.resolve()
    assert hasattr(holder, name) and patch.reason


def test_stale_patch_is_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_function"):
        Patch("torch.cuda:no_such_function", None, "test").resolve()


FACTORIES: dict[str, tuple[Any, ...]] = {
    "tensor": ([1.0, 2.0],), "zeros": (2,), "ones": (2,), "empty": (2,), "full": ((2,), 7.0), "arange": (2,),
    "zeros_like": (torch.ones(2),), "ones_like": (torch.zeros(2),), "empty_like": (torch.ones(2),),
}  # fmt: skip


@ON_CPU
@pytest.mark.parametrize("name", FACTORIES)
def test_cuda_literals_land_on_cpu_in_megatron_only(name: str) -> None:
    from megatron.core.optimizer import clip_grads

    made = getattr(clip_grads.torch, name)(*FACTORIES[name], device="cuda")
    assert made.device.type == "cpu"
    plain = getattr(torch, name)(*FACTORIES[name])
    assert made.shape == plain.shape and ("empty" in name or torch.equal(made, plain))
    assert clip_grads.torch.nn is torch.nn
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(torch, name)(*FACTORIES[name], device="cuda")


@pytest.mark.parametrize(
    "module", [p.target.removesuffix(":torch") for p in cpu.MEGATRON_PATCHES if p.target.endswith(":torch")]
)
def test_every_factory_that_megatron_calls_with_a_cuda_literal_is_redirected(module: str) -> None:
    """From the source of the modules of the table: which functions of torch they hand ``device="cuda"``."""
    source = ast.parse(inspect.getsource(importlib.import_module(module)))
    called = {
        ast.unparse(call.func)
        for call in ast.walk(source)
        if isinstance(call, ast.Call)
        for word in call.keywords
        if word.arg == "device" and isinstance(word.value, ast.Constant) and str(word.value.value).startswith("cuda")
    }
    assert called <= {f"torch.{name}" for name in FACTORIES}


@ON_CPU
def test_type_name_is_cuda_for_megatron_optimizers_only() -> None:
    tensor = torch.zeros(1, dtype=torch.bfloat16)
    assert tensor.type() == "torch.BFloat16Tensor"
    in_megatron = eval("lambda t: t.type()", {"__name__": "megatron.core.optimizer.clip_grads"})
    assert in_megatron(tensor) == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.float64).dtype == torch.float64


@ON_CPU
def test_install_after_megatron_is_refused_and_twice_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core  # noqa: F401

    device.install()
    monkeypatch.setattr(cpu, "_installed", False)
    with pytest.raises(RuntimeError, match="must run before"):
        device.install()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_adam_equals_torch_adamw(weight_decay: float) -> None:
    generator = named_generator(0, "adam")
    start = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    settings = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": weight_decay}
    fused, reference = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        fused.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_fused_adam_keeps_step_in_groups_and_resumes_exactly() -> None:
    def train(parameter: torch.Tensor, optimizer: FusedAdam, steps: range) -> None:
        for i in steps:
            parameter.grad = torch.randn(4, generator=named_generator(1, i))
            optimizer.step()

    whole = torch.ones(4, requires_grad=True)
    optimizer = FusedAdam([whole], lr=0.1)
    train(whole, optimizer, range(6))
    first = torch.ones(4, requires_grad=True)
    optimizer = FusedAdam([first], lr=0.1)
    train(first, optimizer, range(3))
    state = optimizer.state_dict()
    assert state["param_groups"][0]["step"] == 3
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}
    resumed = first.detach().clone().requires_grad_()
    optimizer = FusedAdam([resumed], lr=0.1)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, range(3, 6))
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_narrow_moments_are_the_rounded_ones_of_float64(weight_decay: float) -> None:
    """bf16 moments, weights and gradients, fp32 masters: Adam in float64 whose moments are rounded after each update."""
    lr, (beta1, beta2), eps = 0.03, (0.9, 0.95), 1e-6
    start = torch.randn(400, generator=named_generator(0, "narrow")).bfloat16()
    param = torch.nn.Parameter(start.clone())
    narrow = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    settings = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    optimizer = FusedAdam([param], **settings, **narrow, master_weights=True, use_decoupled_grad=True)
    optimizer.initialize_state(param, False)
    weight, mean, square = start.double(), torch.zeros(400).double(), torch.zeros(400).double()
    exact_mean, strayed = mean.clone(), 0.0
    for step in range(1, 31):
        grad = torch.randn(400, generator=named_generator(1, step)).bfloat16()
        param.decoupled_grad = grad  # type: ignore[attr-defined]
        optimizer.step()
        mean = beta1 * mean + (1 - beta1) * grad.double()
        square = beta2 * square + (1 - beta2) * grad.double() ** 2
        exact_mean = beta1 * exact_mean + (1 - beta1) * grad.double()
        weight = weight - lr * weight_decay * weight
        weight = weight - lr * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        mean, square = mean.bfloat16().double(), square.bfloat16().double()
        strayed = max(strayed, float((mean - exact_mean).abs().max() / exact_mean.abs().max()))
        state = optimizer.state[param]
        for name, expected in (("exp_avg", mean), ("exp_avg_sq", square)):
            assert state[name].dtype == torch.bfloat16
            # fp32 and float64 may round a value between two bf16 numbers to different ones.
            assert (state[name].double() == expected).double().mean() > 0.99, name
            torch.testing.assert_close(state[name].double(), expected, rtol=2**-7, atol=1e-30)
        assert state["master_param"].dtype == torch.float32
        torch.testing.assert_close(state["master_param"].double(), weight, rtol=1e-4, atol=1e-5)
        assert torch.equal(param.data, state["master_param"].bfloat16())
        mean, square = state["exp_avg"].double(), state["exp_avg_sq"].double()
    assert 2**-10 < strayed < 2**-8 / (1 - beta1)  # rounded at all, and no further than roundings can add up to


def test_fused_adam_keeps_the_dtypes_of_its_state_when_it_is_loaded() -> None:
    param = torch.nn.Parameter(torch.randn(8, generator=named_generator(0, "dtypes")).bfloat16())
    settings = {"exp_avg_dtype": torch.bfloat16, "master_weights": True}
    first, second = FusedAdam([param], **settings), FusedAdam([param], **settings)
    param.grad = torch.ones_like(param)
    first.step()
    second.load_state_dict(first.state_dict())
    dtypes = {name: value.dtype for name, value in second.state[param].items()}
    assert dtypes == {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32, "master_param": torch.float32}
    assert second.param_groups[0]["step"] == 1
    for wrong in ({"store_param_remainders": True}, {"exp_avg_dtype": torch.float16}):
        with pytest.raises(ValueError, match="FusedAdam"):
            FusedAdam([param], **wrong)


def test_named_streams_depend_on_name_and_seed_only() -> None:
    assert named_seed(1, "a", "b") != named_seed(1, "ab") and named_seed(1, "a") != named_seed(2, "a")
    first = torch.randn(3, generator=named_generator(5, "x"))
    torch.randn(100)
    assert torch.equal(first, torch.randn(3, generator=named_generator(5, "x")))


def test_seed_everything_repeats_global_draws() -> None:
    seed_everything(7)
    first = torch.randn(3)
    seed_everything(7)
    assert torch.equal(first, torch.randn(3))


def test_notes_of_torch_that_nobody_can_act_on_are_hidden_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
    from torch.utils import cpp_extension

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    cpp_extension.logger.addHandler(handler)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hide_upstream_notes()
        cpp_extension._find_cuda_home()
        cpp_extension.logger.warning("another")
        save({"x": torch.ones(2)}, storage_writer=FileSystemWriter(tmp_path / "save"), no_dist=True)
        load({"x": torch.zeros(2)}, storage_reader=FileSystemReader(tmp_path / "save"), no_dist=True)
        warnings.warn("another", stacklevel=1)
    cpp_extension.logger.removeHandler(handler)
    assert heard == ["another"]
    assert [str(w.message) for w in said if "torch.distributed is disabled" in str(w.message)] == []
    assert "another" in [str(w.message) for w in said]
