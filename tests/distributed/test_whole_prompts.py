"""Prompts whose first tokens all see each other (``segments.prefix``): answers are those of one forward without a cache.

Alone, in all kinds of company, in a cache that is too small, in steps of fixed shapes and with the same bits; with tokens that
are never chosen. Layouts: test_speaking.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_omni.data.record import parse_record
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.generation.batches import Result, answered
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.request import Request
from megatron_omni.models.build import build_model
from megatron_omni.segments import prefix, shared_prompt
from tests.distributed.generation_requests import (
    SAMPLED,
    TOLERANCE,
    assert_same_answers,
    by_name,
    extended,
    make_media,
    played,
    prompts_of,
    recipe_for,
)
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_generation import whole_logits

ROOMY = EngineLimits(max_running=8, cache_tokens=4096, prefix_cache=True)
TIGHT = EngineLimits(max_running=4, max_batch_tokens=150, cache_tokens=640, prefix_cache=True)
Results = dict[tuple[str, int], Result]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("whole") / "corpus")


def seen_whole(prompt: Sample, rest: int) -> Sample:
    return replace(prompt, attention=prefix(prompt.length - rest, rest))


def requests_of(builder: SampleBuilder, corpus: Path) -> list[Request]:
    """Of every prompt the same words causal, whole but the last token, whole but the last three, and whole."""
    requests = []
    words = builder.build_prompt(parse_record({"messages": [{"role": "user", "content": "two " * 25}]}))
    prompts = prompts_of(builder, corpus)
    for p, prompt in enumerate((prompts[0], prompts[2], prompts[5], prompts[1], words)):
        kinds: list[tuple[int | None, dict[str, Any]]] = [
            (1, {"max_new_tokens": 24, "ignore_eos": True}),
            (3, {"max_new_tokens": 11, "n": 3, "sampling": replace(SAMPLED, seed=p)}),
            (0, {"max_new_tokens": 11, "n": 2, "sampling": replace(SAMPLED, seed=p), "ignore_eos": True}),
            (None, {"max_new_tokens": 24, "ignore_eos": True}),
        ]
        for k, (rest, wanted) in enumerate(kinds):
            if p % 2 == k % 2 or p == 4:
                given = prompt if rest is None else seen_whole(prompt, rest)
                requests.append(Request(name=f"{p}.{k}", prompt=given, logprobs=2, **wanted))
    return requests


def one_rank(rank: Rank, corpus: Path) -> dict[str, Any]:
    recipe = recipe_for(corpus)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    requests = requests_of(builder, corpus)

    def engine(limits: EngineLimits) -> Engine:
        return Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits)

    told: dict[str, Any] = {}
    with engine(ROOMY) as one:
        told["alone"] = {k: r for request in requests for k, r in by_name(answered(one, [request])).items()}
        told["cached"] = {key: r.usage.cached for key, r in told["alone"].items() if r.usage is not None}
        told["refused"] = refusals(one, requests)
        told["banned"] = banned(one, requests[0])
    with engine(TIGHT) as tight:
        told["tight"] = played(tight, requests, seed=2, cancelled=4)
        told["set back"] = tight.state().set_back
    with engine(replace(ROOMY, decoding="fixed", prefix_cache=False)) as fixed:
        told["fixed"] = played(fixed, requests, seed=3)
    told["bits"] = []
    for limits in (replace(ROOMY, max_running=1), TIGHT):
        with engine(replace(limits, deterministic=True)) as same:
            found = by_name(answered(same, requests[::3]))
            told["bits"].append({key: (result.ids, result.logprobs) for key, result in found.items()})
    model.eval()
    told["full"] = []
    for request in requests:
        for sample in range(request.n):
            told["full"].append(against_one_forward(model, request, told["alone"][request.name, sample]))
    return told


def against_one_forward(model: Any, request: Request, result: Result) -> tuple[list[float], list[float], bool]:
    """Log-probabilities of an answer as the engine and one forward have them; whether the latter's best are the answer."""
    tokens = [*result.ids, *([result.end_id] if result.end_id is not None else [])]
    sequence = extended(request.prompt, tokens)
    if request.prompt.attention is not None:
        whole = len(request.prompt.attention[0].queries)
        sequence = replace(sequence, attention=prefix(whole, sequence.length - whole))
    logprobs = whole_logits(model, sequence)[request.prompt.length - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    best = logprobs.argmax(-1).tolist() == tokens or request.sampling.temperature > 0
    return result.logprobs, expected.tolist(), best


def refusals(engine: Engine, requests: list[Request]) -> dict[str, str]:
    long = next(r for r in requests if r.prompt.length > 60 and r.prompt.attention)
    prompt = long.prompt
    bad: dict[str, dict[str, Any]] = {
        "neither": {"prompt": replace(prompt, attention=shared_prompt(10, (3, prompt.length - 13)))},
        "scored": {"prompt_logprobs": 1},
        "all banned": {"banned_ids": tuple(range(300))},
        "unknown": {"banned_ids": (10**6,)},
    }
    told = {}
    for name, change in bad.items():
        try:
            engine.submit(replace(long, **change))
        except ValueError as error:
            told[name] = str(error)
    times = -(-600 // prompt.length)
    names = ("input_ids", "labels", "position_ids", "modality")
    longer = replace(prompt, **{name: torch.cat([getattr(prompt, name)] * times, -1) for name in names})
    try:
        engine.submit(replace(long, prompt=seen_whole(longer, 1)))
    except ValueError as error:
        told["too long"] = str(error)
    return told


def banned(engine: Engine, request: Request) -> list[tuple[list[int], list[int]]]:
    """(what may not be chosen, what was) of answers that first ban what the one before them began with."""
    told: list[tuple[list[int], list[int]]] = []
    never: list[int] = []
    for sampling in (request.sampling, SAMPLED):
        for _ in range(3):
            (result,) = answered(engine, [replace(request, banned_ids=tuple(never), sampling=sampling)])
            told.append((list(never), result.ids))
            never += result.ids[:4]
    return told


@pytest.fixture(scope="module")
def alone(corpus: Path) -> dict[str, Any]:
    return run_ranks(one_rank, 1, corpus)[0]


def test_answers_equal_a_forward_of_the_whole_sequence(alone: dict[str, Any]) -> None:
    assert numpy.std([value for told, *_ in alone["full"] for value in told]) > 0.5, "too alike to tell a mistake"
    for told, expected, best in alone["full"]:
        numpy.testing.assert_allclose(told, expected, rtol=0, atol=TOLERANCE)
        assert best


def test_the_mask_matters(alone: dict[str, Any]) -> None:
    """The same prompt, causal and not: other answers."""
    assert alone["alone"]["4.0", 0].ids != alone["alone"]["4.3", 0].ids


def test_any_company_gives_the_same_answers(alone: dict[str, Any]) -> None:
    assert alone["set back"] > 0, "the cache was not tight"
    assert assert_same_answers(alone["tight"], alone["alone"]) <= 1
    assert assert_same_answers(alone["fixed"], alone["alone"]) <= 1
    assert alone["bits"][0] == alone["bits"][1]


def test_only_samples_of_one_prompt_share_what_is_whole(alone: dict[str, Any]) -> None:
    cached = alone["cached"]
    assert all(n == 0 for (name, sample), n in cached.items() if name[-1] in "012" and sample == 0)
    assert all(n > 0 for (name, sample), n in cached.items() if name[-1] in "12" and sample > 0)


def test_what_cannot_be_is_refused(alone: dict[str, Any]) -> None:
    refused = alone["refused"]
    assert "neither causal nor segments.prefix" in refused["neither"]
    assert "which one step must hold" in refused["too long"] and "max_batch_tokens (512)" in refused["too long"]
    assert "prompt_logprobs is 1" in refused["scored"]
    assert "leaves none to choose" in refused["all banned"] and "banned_ids has token 1000000" in refused["unknown"]


def test_banned_tokens_are_never_chosen(alone: dict[str, Any]) -> None:
    for never, chosen in alone["banned"]:
        assert len(chosen) == 24 and not set(never) & set(chosen)
    assert len(alone["banned"][-1][0]) == 20
