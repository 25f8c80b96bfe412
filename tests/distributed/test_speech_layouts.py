"""The speech generator trains and speaks alike on every layout: losses, gradient norms and codes equal one rank's.

Steps of four micro-batches, packed and padded, with and without a prefix; then codes are chosen one after the other, the
most probable each. The dense model and the mixture of four experts, top-2.
"""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.models.build import build_model
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import unwrap_model, wrap_model
from megatron_omni.segments import prefix
from megatron_omni.training.optimizer import build_optimizer, update
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_speech import DENSE, MIXTURE, SPEECH, batch_of, speech

BATCHES = [("short", False), ("long", False), ("short", True), ("empty", True)]
STEPS, CODES = 3, 4


def train_and_speak(rank: Rank, parallel: ParallelConfig, moe: bool) -> dict[str, Any]:
    """Losses and gradient norms of some steps, the table before and after, gradients of the first step, and codes."""
    pg = rank.initialize(parallel)
    optim = OptimConfig(
        precision="fp32",
        lr=0.01,
        min_lr=0.01,
        lr_warmup_iters=0,
        use_distributed_optimizer=parallel.overlap_grad_reduce,
    )
    recipe = Recipe(model=replace(MIXTURE if moe else DENSE, num_layers=3), parallel=parallel, optim=optim)
    model = wrap_model(build_model(recipe, pg), recipe, pg)
    omni = unwrap_model(model)
    optimizer, scheduler = build_optimizer(model, recipe, pg)
    table = omni.text_table.weight.clone() if omni.pre_process else None
    batches = [batch_of(name, packed=packed) for name, packed in BATCHES]
    num_labels = sum(batch.num_label_tokens for batch in batches)
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": {}}
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()

        def loss_step(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
            losses = model(batch, step=step, stochastic=True, aux_loss_scale=0.01)  # noqa: B023
            return losses, lambda losses: (losses.sum() / num_labels, losses.sum().item())

        losses = run_step(loss_step, batches[pg.dp.rank() :: pg.dp.size()], model, pg=pg, recipe=recipe)
        found["losses"].append(losses if omni.post_process else None)
        if step == 0 and not parallel.overlap_grad_reduce:
            found["grads"] = {n: p.main_grad.numpy().copy() for n, p in omni.named_parameters() if is_whole(n)}
        updated, norm = update(optimizer, scheduler, clip_grad=1.0)
        assert updated
        found["norms"].append(norm)
    if table is not None:
        assert torch.equal(table, omni.text_table.weight), "the frozen table has moved"
        assert omni.text_table.weight.grad is None and not hasattr(omni.text_table.weight, "main_grad")
    return found | {"codes": spoken(model, pg, recipe)}


def is_whole(name: str) -> bool:
    """Trained parameters that every rank of a stage holds whole."""
    return name.startswith("text_projection.") or bool(re.search(r"norm\.weight$|router", name))


def spoken(model: Any, pg: Any, recipe: Recipe) -> list[int]:
    """The most probable codes after a condition, each from a forward over all that stands before it."""
    model.eval()
    sample, codes = speech(3, 2, 4, 1, seed=7), []

    def logits_step(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
        logits = model(batch, step=0, stochastic=False, compute_loss=False)
        return logits, lambda logits: (logits.sum(), logits.detach().clone())

    with torch.no_grad():
        for _ in range(CODES):
            batch = collate([sample], pad_id=SPEECH.ids.padding, multiple_of=24)
            found = run_step(logits_step, [batch], model, pg=pg, recipe=recipe, forward_only=True)
            last = sample.length - 1
            code = int(found[0][0, last].argmax()) if unwrap_model(model).post_process else None
            code = from_last_stage(code)
            codes.append(code)
            sample = longer(sample, code)
    return codes


def from_last_stage(code: int | None) -> int:
    """Every rank's code is the one of the last stage; where several have it they agree."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, code)
    (agreed,) = {found for found in everyone if found is not None}
    return agreed


def longer(sample: Any, code: int) -> Any:
    """The sample with one code more."""
    condition, rest = sample.attention
    length = sample.length + 1
    return replace(
        sample,
        input_ids=torch.cat([sample.input_ids, torch.tensor([code])]),
        labels=torch.cat([sample.labels, sample.labels[:1]]),
        position_ids=torch.arange(length).repeat(3, 1),
        modality=torch.zeros(length, dtype=torch.int64),
        next_position=length,
        attention=prefix(len(condition.queries), len(rest.queries) + 1),
    )


@cache
def one_rank(moe: bool) -> dict[str, Any]:
    return run_ranks(train_and_speak, 1, ParallelConfig(), moe)[0]


LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "pipeline_layout": [1, 2]}),
    "dp2": (2, {}),
    "dp2_overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
}
MOE_LAYOUTS = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "cp2_ep2": (2, {"context_parallel_size": 2, "expert_model_parallel_size": 2}),
    "tp2_ep2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "tp2_pp2_recompute": (
        4,
        {
            "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "pipeline_layout": [2, 1],
            "recompute": "full",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", [*LAYOUTS, *MOE_LAYOUTS])
def test_training_and_codes_equal_one_rank(layout: str) -> None:
    moe = layout in MOE_LAYOUTS
    world_size, sizes = (LAYOUTS | MOE_LAYOUTS)[layout]
    expected = one_rank(moe)
    ranks = run_ranks(train_and_speak, world_size, ParallelConfig(**sizes), moe)
    copies = sizes.get("tensor_model_parallel_size", 1) * sizes.get("context_parallel_size", 1)
    for step in range(STEPS):
        mine = [sum(rank["losses"][step]) for rank in ranks if rank["losses"][step] is not None]
        assert sum(mine) / copies == pytest.approx(sum(expected["losses"][step]), rel=1e-4)
    assert sum(expected["losses"][-1]) < 0.9 * sum(expected["losses"][0]), "it does not learn: equality proves little"
    for rank in ranks:
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        assert rank["codes"] == expected["codes"]
        for name, grad in rank["grads"].items():
            if name.startswith("text_projection."):
                want = torch.from_numpy(expected["grads"][name])
                assert want.any(), f"no gradient reaches {name}"
                torch.testing.assert_close(torch.from_numpy(grad), want, atol=1e-6 * float(want.norm()), rtol=1e-4)
