"""A step of task ``generative``, all its losses at once, against their definitions picture by picture and on other layouts.

Micro-batches are those of test_picture_layouts.py: two sizes, sources, text alone, two pictures that share a sequence; teachers
of some. Half of the pictures lose their words, half of these their sources.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.data import DataConfig, SourceConfig
from megatron_omni.config.generative import GenerativeConfig, GenerativeLosses
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.models.build import build_model
from megatron_omni.models.parts import apply_freeze
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import unwrap_model, wrap_model
from megatron_omni.platform.seeds import named_generator
from megatron_omni.tasks.choice import task_of
from megatron_omni.training.task import StepInfo
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_picture_layouts import BLOCK, FROZEN, IMAGE, MODEL, RULE, SAMPLES, sample_of

assert MODEL.moe is not None
SEED, STEP = 5, 6
LOSSES = GenerativeLosses(lm=0.5, flow=1.0, align_task=0.3, align_caption=0.2, align_visual=0.1)
CONFIG = GenerativeConfig(losses=LOSSES, drop=0.5, drop_source=0.5, time="logit_normal", shift=1.5, align_norm=0.05)
UNTAUGHT = 1
"""Sample of the first micro-batch without teachers."""


def recipe_of(parallel: ParallelConfig, **generative: Any) -> Recipe:
    sources = [SourceConfig(name="plain", path="a"), SourceConfig(name="heavy", path="b", loss_weight=2.0)]
    assert MODEL.moe is not None
    return Recipe(
        task="generative",
        seed=SEED,
        model=replace(MODEL, moe=replace(MODEL.moe, moe_aux_loss_coeff=0.0)),
        parallel=parallel,
        optim=OptimConfig(precision="fp32", use_distributed_optimizer=parallel.overlap_param_gather),
        freeze=FROZEN,
        data=DataConfig(sources=sources),
        generative=replace(CONFIG, **generative),
    )


def batch_of(index: int, *, packed: bool) -> OmniBatch:
    """A micro-batch of :data:`SAMPLES` with teachers; every second sample is of the source that counts twice."""
    samples = []
    for i, (spans, size, _) in enumerate(SAMPLES[index]):
        sample = sample_of(spans, size, 10 * index + i)
        generator = named_generator(1, "teacher", 10 * index + i)
        if sample.drawn and 10 * index + i != UNTAUGHT:
            (picture,) = sample.drawn
            taught = {"task": torch.randn(3 - i, IMAGE.dit.task_size, generator=generator)}
            taught["caption"] = torch.randn(2 + 3 * i, IMAGE.dit.caption_size, generator=generator)
            if picture.vision_rows is not None:
                taught["visual"] = torch.randn(4, IMAGE.dit.vision_size, generator=generator)
            sample = replace(sample, drawn=(replace(picture, teachers=taught),))
        samples.append(sample)
    return collate(
        samples,
        pad_id=0,
        sample_ids=[10 * index + i for i in range(len(samples))],
        source_ids=[i % 2 for i in range(len(samples))],
        row_of=[0] * len(samples) if packed else None,
        multiple_of=16,
        rule=RULE,
    )


BATCHES = range(len(SAMPLES))
NUM_IMAGES = sum(size is not None for samples in SAMPLES for _, size, _ in samples)


def wrapped(recipe: Recipe, pg: Any) -> Any:
    """The model of the recipe, with gates that let something through."""
    built = build_model(recipe, pg)
    apply_freeze(built, recipe.freeze)
    built.language.train_new_token_rows(BLOCK.tolist())
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.startswith("image."):
                parameter.add_(torch.empty(parameter.shape).normal_(std=0.1, generator=named_generator(1, name)))
    return wrap_model(built, recipe, pg)


def one_step(rank: Rank, parallel: ParallelConfig, packed: bool, read: Callable[..., Any] | None) -> dict[str, Any]:
    """The report's sums and the gradients of a step; what ``read`` makes of the model and the micro-batches."""
    pg = rank.initialize(parallel)
    recipe = recipe_of(parallel)
    model, task = wrapped(recipe, pg), task_of(recipe)
    batches = [batch_of(index, packed=packed) for index in BATCHES]
    info = StepInfo(
        step=STEP, training=True, divisor=sum(batch.num_label_tokens for batch in batches), num_images=NUM_IMAGES
    )
    model.zero_grad_buffer()
    mine = batches[pg.dp.rank() :: pg.dp.size()]
    reports = run_step(partial(task.forward_step, info=info), mine, model, pg=pg, recipe=recipe)
    named = unwrap_model(model).named_parameters()
    found = {
        "report": sum(reports).tolist() if reports else None,
        "names": list(task.report_names),
        "grads": {n: p.main_grad.numpy().copy() for n, p in named if hasattr(p, "main_grad")},
        "shard": pg.tp_cp.rank(),
    }
    return found if read is None else found | {"read": read(unwrap_model(model), batches, info)}


# ------------------------------------------------------------------------------------------- definitions, one by one


def by_hand(model: Any, batches: list[OmniBatch], info: StepInfo) -> dict[str, Any]:
    """Every term from its definition, a picture at a time, in float64 where there is no network in between."""
    lm, total, rows = 0.0, 0.0, []
    for batch in batches:
        with torch.no_grad():
            token_loss, hidden, vision = model(batch, step=info.step, stochastic=False, drawn=True)
        weight = torch.tensor([1.0, 2.0])[batch.source_ids.clamp(min=0)]
        lm += float((token_loss * weight).double().sum()) / info.divisor
        drawn = batch.drawn
        for g in range(len(drawn) if drawn is not None else 0):
            assert drawn is not None
            with torch.no_grad():
                terms, branch = picture_by_hand(model.image, drawn, g, hidden[g], vision[g])
            row, column = (
                int(drawn.places[g, 0]) % len(batch.source_ids),
                int(drawn.places[g, 0]) // len(batch.source_ids),
            )
            heavy = 1.0 + float(batch.source_ids[row, column])
            total += heavy * sum(getattr(LOSSES, name) * value for name, value in terms.items()) / info.num_images
            rows.append(terms | {"branch": branch, "heavy": heavy})
    return {"lm": lm, "loss": LOSSES.lm * lm + total, "pictures": rows}


def picture_by_hand(
    image: Any, drawn: Any, g: int, hidden: Tensor, vision: Tensor | None
) -> tuple[dict[str, float], str]:
    sample, number = int(drawn.sample_ids[g]), int(drawn.numbers[g])
    generator = named_generator(SEED, "flow", STEP, sample, number)
    words, everything = torch.rand(2, generator=generator).tolist()
    u = torch.randn(1, generator=generator).double().sigmoid()
    t = (CONFIG.shift * u / (1 + (CONFIG.shift - 1) * u)).float()
    x1 = drawn.targets[g]
    x0 = torch.randn(x1.shape, generator=generator)
    branch = "c" if words >= CONFIG.drop else "u" if everything < CONFIG.drop_source else "i"
    source = torch.zeros_like(x1) if drawn.sources[g] is None else drawn.sources[g]
    if branch == "u":
        source = torch.randn(x1.shape, generator=generator)
    found = image.conditions(hidden[None], [vision])
    inputs = found.inputs([0], branch)
    count, noise = inputs["vision"].shape[1], None
    if count > IMAGE.dit.kept_vision_tokens:
        uniform = torch.rand(
            IMAGE.dit.num_layers, count, generator=named_generator(SEED, "selection", STEP, sample, number)
        )
        noise = -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()[None]
    x = t * x1 + (1 - t) * x0
    v = image.dit(x[None], t, source=source[None], noise=noise, **inputs)[0]
    terms = {"flow": float((v.double() - (x1 - x0).double()).square().mean())}
    for name in ("task", "caption", "visual"):
        teacher = (drawn.teachers or {}).get(name)
        if teacher is None or not drawn.teachers[f"{name}_mask"][g].any() or (name == "visual" and vision is None):
            continue
        made = found.vision[0] if name == "visual" else getattr(found, name)[0]
        there = int(drawn.teachers[f"{name}_mask"][g].sum())
        f, taught = made[:there].double(), teacher[g, :there][: len(made)].double()
        terms[f"align_{name}"] = aligned_by_hand(name, f, taught)
    return terms, branch


def aligned_by_hand(name: str, f: Tensor, g: Tensor) -> float:
    if name == "visual":
        return float((f - g).square().mean())
    if name == "task":
        f, g = f - f.mean(-1, keepdim=True), g - g.mean(-1, keepdim=True)
    rms = [rows.square().mean(-1, keepdim=True).sqrt() for rows in (f, g)]
    directions = (f / rms[0] - g / rms[1]).square().mean(-1)
    return float((directions + CONFIG.align_norm * (rms[0].log() - rms[1].log()).abs().squeeze(-1)).mean())


@cache
def one_rank() -> dict[str, Any]:
    return run_ranks(one_step, 1, ParallelConfig(), False, by_hand)[0]


def test_the_loss_and_its_report_are_their_definitions() -> None:
    found = one_rank()
    hand, table = found["read"], dict(zip(found["names"], found["report"], strict=True))
    pictures = hand["pictures"]
    assert len(pictures) == NUM_IMAGES and {p["branch"] for p in pictures} == {"c", "i", "u"}, "no branch is left out"
    assert table["loss"] == [pytest.approx(hand["loss"] * NUM_IMAGES, rel=1e-5), NUM_IMAGES]
    assert table["flow loss"] == [pytest.approx(sum(p["flow"] for p in pictures), rel=1e-5), NUM_IMAGES]
    for name in ("task", "caption", "visual"):
        own = [p[f"align_{name}"] for p in pictures if f"align_{name}" in p]
        assert table[f"align/{name}"] == [pytest.approx(sum(own), rel=1e-5), len(own)] and 0 < len(own) < NUM_IMAGES
        assert table[f"cosine/{name}"][1] == len(own) and abs(table[f"cosine/{name}"][0]) < len(own)
    quarters = [table[f"flow loss/t{i}"][1] for i in range(4)]
    assert sum(quarters) == NUM_IMAGES


LAYOUTS = {
    "tp2": (2, False, {"tensor_model_parallel_size": 2}),
    "pp2": (2, True, {"pipeline_model_parallel_size": 2, "pipeline_layout": [1, 2]}),
    "ep2": (2, False, {"expert_model_parallel_size": 2}),
    "dp2": (2, True, {}),
    "cp2": (2, True, {"context_parallel_size": 2}),
}
"""Ranks, whether samples share a sequence, and the layout."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_one_ranks(layout: str) -> None:
    world_size, packed, sizes = LAYOUTS[layout]
    expected = one_rank()
    ranks = run_ranks(one_step, world_size, ParallelConfig(**sizes), packed, None)
    told = [torch.tensor(rank["report"]) for rank in ranks if rank["report"] is not None and rank["shard"] == 0]
    torch.testing.assert_close(sum(told), torch.tensor(expected["report"]), rtol=1e-5, atol=1e-6)
    seen = set()
    for rank in ranks:
        for name, grad in rank["grads"].items():
            want = torch.from_numpy(expected["grads"][name])
            got, atol = torch.from_numpy(grad), 1e-5 * float(want.norm()) + 1e-9
            torch.testing.assert_close(got, want, atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
            seen.add(name)
    assert seen == set(expected["grads"])
    assert all(grad.any() for name, grad in expected["grads"].items() if name.startswith("language."))
