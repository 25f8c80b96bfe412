"""Megatron's offload of activations and of the optimizer in our trunk and loop: numbers stay what they are, and as much goes
as the plan says.

Without a CUDA device the copies are ordinary memory: what Megatron asks of a device (is the tensor there, streams, pinned
memory, Transformer Engine's switch) is answered for it; its bookkeeping, its release of storages and our calls are what runs.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.estimate.activations import Activations, MicroBatch
from megatron_omni.models.build import build_model
from megatron_omni.parallel import groups
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import wrap_model
from megatron_omni.tasks.choice import task_of
from megatron_omni.training import setup as training_setup
from megatron_omni.training.loop import train
from megatron_omni.training.memory import check_offload
from megatron_omni.training.setup import setup
from tests.distributed.test_plan import LENGTH, ROWS, VALUES, batch_of
from tests.distributed.tiny_run import make_corpus, tiny_recipe

MODULES = ["attn_norm", "qkv_linear", "core_attn", "attn_proj"]


@pytest.fixture
def device_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary memory stands for the device's, and other ordinary memory for pinned."""
    handler, pool = offload.ChunkOffloadHandler, offload.OffloadTensorPool
    is_kept = staticmethod(lambda tensor: not isinstance(tensor, torch.nn.Parameter))
    monkeypatch.setattr(handler, "_can_manage_tensor_for_offload", is_kept)
    monkeypatch.setattr(pool, "allocate", lambda self, shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(pool, "free", lambda self, tensor: None)
    monkeypatch.setattr(transformer_engine, "cpu_offload", SimpleNamespace(CPUOffloadEnabled=False), raising=False)
    offload.PipelineOffloadManager.reset_instance()


def recipe_of(modules: list[str]) -> Recipe:
    parallel = {"fine_grained_activation_offloading": bool(modules), "offload_modules": modules}
    values = VALUES | {"model": VALUES["model"] | {"num_layers": 3}}
    return recipe_from_dict(values | {"parallel": parallel, "optim": {"precision": "fp32"}})


def steps(modules: list[str]) -> tuple[list[Any], int]:
    """Losses and gradients of three steps of two micro-batches, an evaluation between them; bytes offloaded of one."""
    recipe = recipe_of(modules)
    pg = groups.initialize(recipe.parallel, store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = wrap_model(build_model(recipe, pg), recipe, pg)
        model.module.language.config.min_offloaded_tensor_size = 256
        found: list[Any] = []

        def forward(batch: Any, model: Any) -> Any:
            losses = model(batch, step=1, stochastic=True, aux_loss_scale=0.1)
            return losses, lambda losses: (losses.sum(), losses.detach().sum())

        for step in range(3):
            torch.manual_seed(step)
            batches = [batch_of(recipe, first_sample=ROWS * i, packed=False) for i in range(2)]
            found += run_step(forward, batches[:1], model, pg=pg, recipe=recipe, forward_only=True)
            model.zero_grad_buffer()
            found += run_step(forward, batches, model, pg=pg, recipe=recipe)
            found += [p.main_grad.clone() for p in model.parameters() if p.requires_grad]
        manager = offload.PipelineOffloadManager.get_instance()
        return found, manager.offload_summary_total_bytes if modules else 0
    finally:
        groups.destroy()


def test_offloaded_activations_change_nothing(device_of_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = steps([])
    offloaded, size = steps(MODULES)
    assert len(kept) == len(offloaded) > 100
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(offloaded, kept, strict=True))
    monkeypatch.setattr("megatron_omni.estimate.activations.LEAST_OFFLOADED", 256)
    planned = Activations(recipe_of(MODULES), MicroBatch(rows=ROWS, length=LENGTH, label_tokens=40)).offloaded()
    # What autograd holds twice is copied twice: the norm's input and reciprocal, the output; and the small log-sum.
    twice = 4 * ROWS * LENGTH * (72 + 2 + 4 * 16 + 4)
    assert size == 2 * (planned + twice)  # of three blocks, the last's stays


@pytest.fixture
def optimizer_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the optimizer's parameters count as a device's, and their copies as the main memory's."""
    make = HybridDeviceOptimizer.__init__

    def split(self: HybridDeviceOptimizer, fraction: float) -> tuple[Any, ...]:
        groups_of_copies: list[Any] = []
        copies: dict[Any, Any] = {}
        for group in self.param_groups:
            own = {p: p.detach().clone().float() for p in group["params"]}
            groups_of_copies += [{**group, "params": list(own.values())}] if own else []
            copies |= own
        return groups_of_copies, [], dict(copies), {copy: p for p, copy in copies.items()}, copies

    def without_pinned(self: Any, params: Any, **settings: Any) -> None:
        make(self, params, **settings | {"pin_cpu_grads": False})

    event = SimpleNamespace(wait=lambda stream: None, synchronize=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: event)
    monkeypatch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", split)
    monkeypatch.setattr(HybridDeviceOptimizer, "__init__", without_pinned)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(training_setup, "check_offload", lambda recipe: None)


def test_an_offloaded_optimizer_changes_nothing_and_is_resumed(optimizer_in_memory: None, tmp_path: Path) -> None:
    """Against Adam in its place: weights, masters, moments bit for bit, and so from a checkpoint of the first step on."""
    corpus = make_corpus(tmp_path / "corpus")
    small = {"model__num_layers": 1, "model__vision": None, "model__audio": None, "data__global_batch_size": 2}
    small |= {"optim__precision": "bf16", "optim__grad_reduce_in_fp32": False, "checkpoint__save_interval": 1}
    ends = []
    for name, offloaded, steps in (("here", False, 2), ("there", True, 1), ("there", True, 2)):
        recipe = tiny_recipe(corpus, tmp_path / name, train_iters=steps, load="auto", **small)
        recipe.data.sources = recipe.data.sources[:1]
        recipe.optim.use_precision_aware_optimizer, recipe.optim.optimizer_cpu_offload = True, offloaded
        recipe.optim.lr_warmup_iters, recipe.optim.lr_decay_iters = 0, 20
        pg = groups.initialize(recipe.parallel, store=dist.HashStore(), rank=0, world_size=1)
        try:
            run = setup(recipe, task_of(recipe), pg=pg)
            members = [m.optimizer for m in run.optimizer.chained_optimizers if not m.is_stub_optimizer]
            assert all(isinstance(member, HybridDeviceOptimizer) == offloaded for member in members)
            assert train(run) == 0
        finally:
            groups.destroy()
        reader = TorchDistReader(commit.iteration_dir(tmp_path / name / "checkpoints", steps))
        ends.append({key: reader.read(key) for key in reader.tensors})
    here, between, there = ends
    assert here.keys() == there.keys() and any("exp_avg_sq" in key for key in here)
    assert all(torch.equal(here[key], there[key]) for key in here)
    assert not any(torch.equal(between[key], there[key]) for key in here if "exp_avg." in key and there[key].any())


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a CUDA device")
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"optim": {"optimizer_cpu_offload": True}}, "optim.optimizer_cpu_offload=True: does nothing here"),
        ({"parallel": {"fine_grained_activation_offloading": True}}, "activation_offloading=True: does nothing here"),
    ],
)
def test_an_offload_without_its_device_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_offload(recipe_from_dict(values))
