"""The whole model on rows of a prompt and its responses: what a response computes does not depend on what shares its row,
the ratio before the first update is 1 to the bit, and layouts agree. The loss's log-probabilities are those of a sampler
at the same temperature, also where they are computed a chunk of rows at a time.

Four groups of the same responses, in four micro-batches: pictures, sound, a clip and text, every row padded; two groups
share a row where prompts are shared. A step is what training does: log-probabilities by a forward of its own, then
the update's forward and backward with GSPO's loss, both by Megatron's schedules.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.responses import Group, group_sample, responses_of, separate_samples
from megatron_omni.data.sample import Sample
from megatron_omni.generation.request import Sampling
from megatron_omni.generation.sampling import Choice, next_token_probabilities
from megatron_omni.losses.dpo import dpo_loss, pair_sums
from megatron_omni.losses.gspo import advantages, gspo_loss
from megatron_omni.models.build import build_model
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import unwrap_model, wrap_model
from megatron_omni.positions import (
    AudioSpan,
    ImageSpan,
    PositionRule,
    Span,
    TextSpan,
    VideoSpan,
    position_ids,
    span_length,
)
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_attention_uses import global_name
from tests.distributed.test_omni_layouts import MODEL as TINY_OMNI

MODEL = replace(TINY_OMNI, init_method_std=0.2)
"""Attention then weighs keys unevenly, so that a wrong one shows."""
TEMPERATURE = 0.7
MULTIPLE = 8
KINDS: dict[type, Modality] = {
    TextSpan: Modality.TEXT, ImageSpan: Modality.IMAGE, VideoSpan: Modality.VIDEO, AudioSpan: Modality.AUDIO,
}  # fmt: skip
MICRO_BATCHES: list[list[tuple[list[Span], list[int]]]] = [
    [([TextSpan(2), ImageSpan(1, 1), ImageSpan(1, 2), TextSpan(4)], [5, 1, 3, 8]), ([TextSpan(6)], [4, 2, 2, 5])],
    [([TextSpan(1), AudioSpan(1), TextSpan(2)], [3, 3, 6, 1]), ([AudioSpan(1), TextSpan(3)], [2, 7, 1, 1])],
    [([VideoSpan((0.0, 1.0)), TextSpan(3)], [4, 4, 9, 2])],
    [([TextSpan(9)], [1, 1, 12, 3]), ([TextSpan(3), ImageSpan(1, 1), TextSpan(2)], [6, 2, 1, 4])],
]
"""Groups of each: the prompt and the lengths of its responses. The first two of a micro-batch share a row."""
REWARDS = torch.tensor(
    [[1.0, 0, 0, 0], [1, 1, 0, 0.5], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0.2, 0, 1, 0], [1, 0, 0, 1]]
)


def prompt_of(spans: Sequence[Span], generator: torch.Generator) -> Sample:
    rule = PositionRule.from_config(MODEL)
    kinds = [int(KINDS[type(span)]) for span in spans for _ in range(span_length(span, rule))]
    positions, next_position = position_ids(spans, rule)
    tiles = sum(kind in (Modality.IMAGE, Modality.VIDEO) for kind in kinds) // rule.pooled_side**2
    chunks = sum(span.num_chunks for span in spans if isinstance(span, AudioSpan))
    return Sample(
        input_ids=torch.randint(0, MODEL.vocab_size, (len(kinds),), generator=generator),
        labels=torch.full((len(kinds),), IGNORE_LABEL),
        position_ids=positions,
        next_position=next_position,
        modality=torch.tensor(kinds),
        tiles=torch.randn(tiles, 3, 10, 10, generator=generator) if tiles else None,
        chunks=torch.randn(chunks, 6, 150, generator=generator) if chunks else None,
    )


@cache
def prompts_and_responses() -> list[list[tuple[Sample, list[list[int]]]]]:
    generator = torch.Generator().manual_seed(3)
    drawn = lambda n: torch.randint(0, MODEL.vocab_size, (n,), generator=generator).tolist()  # noqa: E731
    return [
        [(prompt_of(spans, generator), [drawn(n) for n in lengths]) for spans, lengths in groups]
        for groups in MICRO_BATCHES
    ]


def batches_of(*, share: bool) -> list[OmniBatch]:
    """The four micro-batches: the groups of one in a row, or each response in a row of its own."""
    batches = []
    for groups in prompts_and_responses():
        rows: list[Group] = []
        for prompt, responses in groups:
            rows += [group_sample(prompt, responses)] if share else separate_samples(prompt, responses)
        row_of = [0] * len(rows) if share else range(len(rows))
        batches.append(collate([g.sample for g in rows], pad_id=0, row_of=row_of, multiple_of=MULTIPLE))
    return batches


def advantages_of() -> Iterator[tuple[Tensor, Tensor]]:
    """[N] of each micro-batch: advantages and what is kept."""
    found = advantages(REWARDS)
    sizes = [len(groups) for groups in MICRO_BATCHES]
    for values, kept in zip(found.values.split(sizes), found.kept.split(sizes), strict=True):
        yield values.flatten(), kept.flatten()


class OneStep:
    """A model on this rank, and what a step of it computes."""

    def __init__(self, pg: Any, parallel: ParallelConfig, precision: Any) -> None:
        optim = OptimConfig(precision=precision, use_distributed_optimizer=False)
        self.recipe = Recipe(model=MODEL, parallel=parallel, optim=optim)
        self.pg = pg
        self.model = wrap_model(build_model(self.recipe, pg), self.recipe, pg)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def __call__(self, *, share: bool) -> dict[str, Any]:
        """By micro-batch of this rank: log p before the update and in it, ratios, losses; gradients."""
        pg, mine = self.pg, slice(self.pg.dp.rank(), None, self.pg.dp.size())
        numbers = [*range(len(MICRO_BATCHES))][mine]
        sound = lambda b: None if b.audio_features is None else b.audio_features.to(self.dtype)  # noqa: E731
        batches = [replace(b, audio_features=sound(b)) for b in batches_of(share=share)[mine]]
        run = lambda step, **how: run_step(step, batches, self.model, pg=pg, recipe=self.recipe, **how)  # noqa: E731
        forward = {"step": 1, "stochastic": False, "temperature": TEMPERATURE}

        def measure(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
            def report(losses: Tensor) -> tuple[Tensor, Tensor]:
                return losses.sum(), responses_of(batch).of(-losses).clone()

            return model(batch, **forward), report

        old = run(measure, forward_only=True)
        left = iter(zip(old, [*advantages_of()][mine]))
        num_sequences = sum(int(kept.sum()) for _, kept in advantages_of())

        def learn(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
            def loss(losses: Tensor) -> tuple[Tensor, Any]:
                before, (values, kept) = next(left)
                found = responses_of(batch)
                terms = gspo_loss(
                    found.of(-losses), before, found.valid, values, kept, num_sequences=num_sequences, clip_low=3e-4,
                    clip_high=4e-4,
                )  # fmt: skip
                return terms.loss, (found.of(-losses.detach()), terms.ratio, terms.loss.detach())

            return model(batch, **forward), loss

        self.model.zero_grad_buffer()
        reports = run(learn)
        omni = unwrap_model(self.model)
        earlier = pg.pp.rank() * len(omni.language.decoder.layers)
        named = (
            (global_name(name, earlier), p)
            for name, p in omni.named_parameters()
            if hasattr(p, "main_grad") and is_watched(name)
        )
        return {
            "old": {n: x.float().numpy() for n, x in zip(numbers, old)},
            "new": {n: x.float().numpy() for n, (x, _, _) in zip(numbers, reports)},
            "ratio": {n: x.tolist() for n, (_, x, _) in zip(numbers, reports)},
            "loss": {n: x.item() for n, (_, _, x) in zip(numbers, reports)},
            "gradients": {name: p.main_grad.float().numpy().copy() for name, p in named},
        }


def is_watched(name: str) -> bool:
    """Whole on every rank, whatever the layout; a key's bias moves no softmax."""
    whole = ("vision.", "audio.", "norm", "router")
    return any(part in name for part in whole) and not name.endswith("k_proj.bias")


def steps(rank: Rank, parallel: ParallelConfig, precisions: list[str]) -> dict[tuple[str, bool], dict[str, Any]]:
    pg = rank.initialize(parallel)
    models = {precision: OneStep(pg, parallel, precision) for precision in precisions}
    return {(precision, share): model(share=share) for precision, model in models.items() for share in (True, False)}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one_recompute": (1, {"recompute": "full"}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "dp2": (2, {"recompute": "full"}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "recompute": "full"}),
}


@cache
def ranks_of(layout: str) -> list[dict[tuple[str, bool], dict[str, Any]]]:
    world_size, sizes = LAYOUTS[layout]
    return run_ranks(steps, world_size, ParallelConfig(**sizes), ["fp32", "bf16"])


def joined(layout: str, precision: str, share: bool, what: str) -> dict[Any, Any]:
    """Of all ranks."""
    return {key: value for rank in ranks_of(layout) for key, value in rank[precision, share][what].items()}


CASES = [(precision, share) for precision in ("fp32", "bf16") for share in (True, False)]


@pytest.mark.parametrize(("precision", "share"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ratio_is_one_to_the_bit_before_the_first_update(layout: str, precision: str, share: bool) -> None:
    ratios = joined(layout, precision, share, "ratio")
    assert sorted(ratios) == [0, 1, 2, 3] and [len(ratios[n]) for n in range(4)] == [8, 8, 4, 8]
    assert all(ratio == 1.0 for of_one in ratios.values() for ratio in of_one)
    # What is kept sums to zero in each group.
    assert sum(joined(layout, precision, share, "loss").values()) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_rows_compute_what_separate_rows_do(layout: str) -> None:
    """Log-probabilities and gradients; two groups of a row are strangers to each other."""
    shared, separate = (joined(layout, "fp32", share, "new") for share in (True, False))
    for number in range(4):
        torch.testing.assert_close(
            torch.from_numpy(shared[number]), torch.from_numpy(separate[number]), atol=2e-5, rtol=0.0
        )
    close_gradients(joined(layout, "fp32", True, "gradients"), joined(layout, "fp32", False, "gradients"))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_layouts_compute_what_one_rank_does(layout: str, share: bool) -> None:
    one, other = (joined(name, "fp32", share, "new") for name in ("one", layout))
    for number in range(4):
        torch.testing.assert_close(torch.from_numpy(other[number]), torch.from_numpy(one[number]), atol=2e-5, rtol=0.0)
    close_gradients(joined(layout, "fp32", share, "gradients"), joined("one", "fp32", share, "gradients"))


def close_gradients(some: dict[str, Any], others: dict[str, Any], *, least: int = 60) -> None:
    assert some.keys() == others.keys() and len(some) > 60
    norms = {name: float(torch.from_numpy(g).norm()) for name, g in others.items()}
    assert sum(norm > 0 for norm in norms.values()) > least, "hardly a parameter has a gradient"
    largest = max(norms.values())
    for name, gradient in some.items():
        distance = float((torch.from_numpy(gradient) - torch.from_numpy(others[name])).norm())
        assert distance <= 1e-4 * norms[name] + 1e-6 * largest, (name, distance, norms[name])


# ------------------------------------------------------------------------------------- what the model's loss is made of


def objectives(rank: Rank, parallel: ParallelConfig, chunk: int | None) -> dict[str, Any]:
    """Of one micro-batch: values and gradients of GSPO, of its first-order form, of DPO; log p and entropy at a
    temperature, and logits."""
    step = OneStep(rank.initialize(parallel), parallel, "fp32")
    omni, batch = unwrap_model(step.model), batches_of(share=True)[0]
    if chunk is not None:
        omni.language.logits_chunk = chunk
    found, labels = responses_of(batch), batch.labels
    values, kept = next(advantages_of())
    reference = torch.linspace(-9.0, -8.0, 8, dtype=torch.float64).view(4, 2)

    def log_probs(**options: Any) -> Tensor:
        return found.of(-step.model(batch, step=1, stochastic=False, **options))

    def gspo() -> Tensor:
        new = log_probs(temperature=TEMPERATURE)
        old = new.detach()
        return gspo_loss(new, old, found.valid, values, kept, num_sequences=8, clip_low=0.1, clip_high=0.1).loss

    def first_order() -> Tensor:
        means = torch.stack([row[valid].mean() for row, valid in zip(log_probs(temperature=TEMPERATURE), found.valid)])
        return -(means * values).sum() / 8

    def dpo() -> Tensor:
        lengths = found.lengths.view(-1, 2)
        return dpo_loss(pair_sums(log_probs(), found.valid), reference, lengths, num_pairs=4, sft_weight=0.2).loss

    told: dict[str, Any] = {}
    for compute in (gspo, first_order, dpo):
        step.model.zero_grad_buffer()
        loss = compute()
        loss.backward()
        named = {n: p.main_grad for n, p in omni.named_parameters() if hasattr(p, "main_grad")}
        told[compute.__name__] = (loss.item(), {n: g.numpy().copy() for n, g in named.items() if is_watched(n)})
    with torch.no_grad():
        both = step.model(batch, step=1, stochastic=False, temperature=TEMPERATURE, with_entropy=True)
        logits = step.model(batch, step=1, stochastic=False, compute_loss=False)
        told["without entropy"] = step.model(batch, step=1, stochastic=False, temperature=TEMPERATURE).numpy()
    told |= {"log p": -both[0].numpy(), "entropy": both[1].numpy(), "logits": logits.numpy(), "labels": labels.numpy()}
    return told


OBJECTIVE_LAYOUTS = {"one": (1, {}), "tp2": (2, {"tensor_model_parallel_size": 2})}


@cache
def objectives_of(layout: str, chunk: int | None) -> dict[str, Any]:
    world_size, sizes = OBJECTIVE_LAYOUTS[layout]
    return run_ranks(objectives, world_size, ParallelConfig(**sizes), chunk)[0]


@pytest.mark.parametrize("chunk", [None, 64 * 3], ids=["whole", "3-rows"])
@pytest.mark.parametrize("layout", OBJECTIVE_LAYOUTS)
def test_log_probabilities_are_those_that_a_sampler_draws_from(layout: str, chunk: int | None) -> None:
    told = objectives_of(layout, chunk)
    places = zip(*(told["labels"] != IGNORE_LABEL).nonzero(), strict=True)
    choice = Choice(sampling=Sampling(temperature=TEMPERATURE), step=0)
    count = 0
    for row, column in places:
        q = next_token_probabilities(torch.from_numpy(told["logits"][row, column]), choice)
        assert told["log p"][row, column] == pytest.approx(float(q[told["labels"][row, column]].log()), abs=1e-5)
        assert told["entropy"][row, column] == pytest.approx(-float((q * q.log()).sum()), abs=1e-5)
        count += 1
    assert count == sum(sum(lengths) for _, lengths in MICRO_BATCHES[0])
    assert (told["without entropy"] == -told["log p"]).all(), "who asks for entropy changes no bit of the rest"


@pytest.mark.parametrize("layout", OBJECTIVE_LAYOUTS)
@pytest.mark.parametrize("objective", ["gspo", "dpo"])
def test_chunks_of_the_vocabulary_product_change_nothing(layout: str, objective: str) -> None:
    """A chunk of three rows, of 30 with a label; on two ranks of six."""
    (whole, gradients), (loss, chunked) = (objectives_of(layout, chunk)[objective] for chunk in (None, 64 * 3))
    assert loss == pytest.approx(whole, rel=1e-6, abs=1e-6)
    close_gradients(chunked, gradients, least=25)


def test_the_first_gradient_is_the_policy_gradient() -> None:
    """-mean_i A_i mean_t grad log pi, without a ratio or a clip."""
    (value, gradients), (_, plain) = (objectives_of("one", None)[name] for name in ("gspo", "first_order"))
    assert value == pytest.approx(0.0, abs=1e-7)
    close_gradients(gradients, plain, least=25)
