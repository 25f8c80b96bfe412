"""Draws of a rollout: 20,000 of them follow the model's distribution, and in bf16 the same rollout has the same bits.

Other layouts and company in bf16 are played by hand (tests/stress/rollouts.py).
"""

import math
from pathlib import Path
from typing import Any

import torch

from megatron_omni.data.collate import collate
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.generation.batches import Result, answered
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.request import Request, Sampling
from megatron_omni.generation.sampling import derived_seed
from megatron_omni.models.build import build_model
from megatron_omni.parallel.wrap import wrap_model
from tests.distributed.generation_requests import by_name, make_media, prompts_of, recipe_for
from tests.distributed.harness import Rank, run_ranks

GROUPS, SAMPLES = 2500, 8


def drawn(rank: Rank, corpus: Path) -> dict[str, Any]:
    """First tokens of 2,500 groups of one prompt, and the distribution that they come from."""
    recipe = recipe_for(corpus, model__vision=None, model__audio=None)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg).eval()
    prompt = builder.build_text([5, 6, 7, 8])

    def requests() -> Any:
        for number in range(GROUPS):
            sampling = Sampling(temperature=1.0, seed=derived_seed(3, number))
            yield Request(name=str(number), prompt=prompt, max_new_tokens=1, n=SAMPLES, sampling=sampling)

    limits = EngineLimits(max_running=256, max_batch_tokens=1024, cache_tokens=16384)
    tokens = torch.zeros(GROUPS, SAMPLES, dtype=torch.int64)
    with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits) as engine:
        for result in answered(engine, requests()):
            tokens[int(result.name), result.sample] = result.ids[0] if result.ids else result.end_id
    with torch.no_grad():
        logits = model(collate([prompt], pad_id=0), step=0, stochastic=False, compute_loss=False)[0, -1]
    return {"tokens": tokens, "expected": logits.double().softmax(-1)}


def test_frequencies_of_20_000_draws_by_chi_square(tmp_path: Path) -> None:
    (found,) = run_ranks(drawn, 1, make_media(tmp_path / "corpus"))
    tokens, expected = found["tokens"], found["expected"]
    n = tokens.numel()
    assert n == 20_000
    counts = torch.bincount(tokens.flatten(), minlength=len(expected)).double()
    often = n * expected >= 5  # the others together
    counts = torch.cat([counts[often], counts[~often].sum(0, keepdim=True)])
    wanted = n * torch.cat([expected[often], expected[~often].sum(0, keepdim=True)])
    chi_square, freedom = float(((counts - wanted).square() / wanted).sum()), len(wanted) - 1
    assert freedom > 50
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom) + 4.5, f"{chi_square} with {freedom} degrees of freedom"
    uniform = torch.full_like(wanted, n / len(wanted))
    assert float(((counts - uniform).square() / uniform).sum()) > 2 * chi_square, "any distribution would pass"
    # Samples of a group are drawn apart: two of them are equal as often as two of different groups.
    pairs = [(i, j) for i in range(SAMPLES) for j in range(i)]
    equal = sum(int((tokens[:, i] == tokens[:, j]).sum()) for i, j in pairs)
    rate, count = float(expected.square().sum()), GROUPS * len(pairs)
    assert abs(equal - count * rate) < 6 * math.sqrt(count * rate), (equal, count * rate)


def repeated(rank: Rank, corpus: Path) -> list[dict[tuple[str, int], Result]]:
    recipe = recipe_for(corpus, optim__precision="bf16")
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = wrap_model(build_model(recipe, pg), recipe, pg)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    prompts = prompts_of(builder, corpus)
    told = []
    for _ in range(2):
        with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=EngineLimits(cache_tokens=8192)) as engine:
            requests = [
                Request(
                    name=str(i), prompt=prompt, max_new_tokens=24, n=SAMPLES, logprobs=0, routes=True,
                    sampling=Sampling(temperature=1.0, seed=i),
                )
                for i, prompt in enumerate(prompts)
            ]  # fmt: skip
            told.append(by_name(answered(engine, requests)))
    return told


def test_in_bf16_the_same_rollout_has_the_same_bits(tmp_path: Path) -> None:
    (told,) = run_ranks(repeated, 1, make_media(tmp_path / "corpus"))
    first, second = told
    assert len(first) == 6 * SAMPLES and len({tuple(result.ids) for result in first.values()}) > 6 * (SAMPLES - 2)
    for key, result in first.items():
        again = second[key]
        assert (result.ids, result.end_id, result.logprobs) == (again.ids, again.end_id, again.logprobs), key
        assert result.routes is not None and again.routes is not None and torch.equal(result.routes, again.routes)
