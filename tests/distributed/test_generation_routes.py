"""Routes that come with an answer are those that a forward of the whole sequence takes, on every layout and in any company.

Rounding may move a token whose logits are at the edge of another choice: at most one token and layer in a thousand.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_omni.batch import NO_RECORD
from megatron_omni.data.collate import collate
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.generation.batches import Result, answered
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.fixed_steps import _Step
from megatron_omni.generation.request import Request
from megatron_omni.models.build import build_model
from megatron_omni.models.moe.routes import RouteRecord, flipped, num_slots, width_of
from megatron_omni.platform.host_waits import HostWaits
from tests.distributed.generation_requests import (
    SAMPLED,
    by_name,
    extended,
    make_media,
    played,
    prompts_of,
    recipe_for,
)
from tests.distributed.harness import Rank, run_ranks

ROOMY = EngineLimits(max_running=16, cache_tokens=8192)
TIGHT = EngineLimits(max_running=5, max_batch_tokens=37, cache_tokens=640)
ONE_IN = 1000
Results = dict[tuple[str, int], Result]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("routes") / "corpus")


def requests_of(builder: SampleBuilder, corpus: Path) -> list[Request]:
    """With routes: greedy ones and ones of three samples, some of them with media; and one without."""
    prompts = prompts_of(builder, corpus)
    wanted = [
        Request(name=f"one {p}", prompt=prompts[p], max_new_tokens=20, ignore_eos=True, routes=True) for p in (1, 4)
    ]
    wanted += [
        Request(name=f"three {p}", prompt=prompts[p], max_new_tokens=15, n=3, sampling=SAMPLED, routes=True)
        for p in (3, 4)
    ]
    # Their first tokens come from one row of logits, and end them before two of them have a place.
    wanted.append(Request(name="short", prompt=prompts[3], max_new_tokens=1, n=3, sampling=SAMPLED, routes=True))
    return [*wanted, Request(name="without", prompt=prompts[0], max_new_tokens=30, ignore_eos=True)]


def layouts(rank: Rank, corpus: Path, sizes: dict[str, int]) -> tuple[list[Request], Results] | None:
    """The requests and their results, on the leaders."""
    recipe = recipe_for(corpus, **{f"parallel__{name}_model_parallel_size": size for name, size in sizes.items()})
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    requests = requests_of(builder, corpus)[pg.dp.rank() :: pg.dp.size()]
    with Engine(build_model(recipe, pg), tokenizer=builder.tokenizer, pg=pg, limits=TIGHT) as engine:
        if not engine.leads:
            engine.follow()
            return None
        with engine.leading():
            return requests, by_name(answered(engine, requests))


def companies(rank: Rank, corpus: Path, found: list[tuple[list[Request], Results]]) -> dict[str, Any]:
    """On one rank: results in all kinds of company, and for each the routes of forwards of the whole sequences."""
    recipe = recipe_for(corpus)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    model.eval()
    requests = requests_of(builder, corpus)
    waits: list[str] = []

    def engine(limits: EngineLimits) -> Engine:
        return Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits)

    told: dict[str, Any] = {}
    with engine(ROOMY) as one:
        told["together"] = by_name(answered(one, requests))
    with engine(TIGHT) as one:
        told["set back"] = played(one, requests, seed=1, cancelled=6)
        assert one.state().set_back > 0
    compute = _Step.compute

    def watched(step: _Step) -> Any:
        with HostWaits(allowed={}):
            output = compute(step)
        waits.append("routes" if output[1] is not None else "none")
        return output

    with patch.object(_Step, "compute", watched), engine(replace(ROOMY, decoding="fixed")) as one:
        told["fixed"] = by_name(answered(one, requests))
    assert {"routes", "none"} == set(waits), "steps with and without"
    with engine(replace(ROOMY, prefix_cache=True)) as one:
        for turn in ("cold", "warm"):
            told[turn] = by_name(answered(one, requests[1:]))
        (usage,) = (told["warm"]["without", 0].usage,)
        assert usage is not None
        told["cached"] = usage.cached, told["warm"]["one 4", 0].usage.cached
    for i, (_, results) in enumerate(found):
        told[f"layout {i}"] = results
    expected = partial_forward(model, recipe, pg)
    pairs = {
        name: [
            (key[0], result.routes, expected(request, result))
            for key, result in results.items()
            for request in requests
            if request.name == key[0]
        ]
        for name, results in told.items()
        if name != "cached"
    }
    return {
        "pairs": pairs,
        "cached": told["cached"],
        "slots": num_slots(recipe.model.moe),
        "width": width_of(recipe.model),
    }


def partial_forward(model: Any, recipe: Any, pg: Any) -> Callable[[Request, Result], Tensor]:
    @torch.no_grad()
    def expected(request: Request, result: Result) -> Tensor:
        tokens = [*result.ids, *([result.end_id] if result.end_id is not None else [])]
        record = RouteRecord()
        sample = extended(request.prompt, tokens)
        model(collate([sample], pad_id=0), step=0, stochastic=False, record=record, compute_loss=False)
        return record.whole(recipe.model, pg)[: sample.length - 1]

    return expected


LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "tensor 2": ({"tensor": 2}, 2),
    "pipeline 2": ({"pipeline": 2}, 2),
    "expert 2": ({"expert": 2}, 2),
    "tensor 2 x pipeline 2": ({"tensor": 2, "pipeline": 2}, 4),
}


@pytest.fixture(scope="module")
def all_of(corpus: Path) -> dict[str, Any]:
    found = []
    for sizes, world_size in LAYOUTS.values():
        found += [result for result in run_ranks(layouts, world_size, corpus, sizes) if result is not None]
    (result,) = run_ranks(companies, 1, corpus, found)
    return result


def test_routes_are_those_of_a_forward_of_the_whole_sequence(all_of: dict[str, Any]) -> None:
    flips = places = 0
    for company, pairs in all_of["pairs"].items():
        assert pairs, company
        for name, routes, expected in pairs:
            if name == "without":
                assert routes is None
                continue
            assert routes.dtype == torch.uint8 and routes.shape == expected.shape == (len(expected), all_of["width"])
            assert bool((routes < NO_RECORD).all()), f"{company}, {name}: tokens without a record"
            flips += int(flipped(routes, expected, num_slots=all_of["slots"]).sum())
            places += routes.numel()
            assert len(expected.unique()) > 5, "all tokens take the same experts: nothing shows"
    assert places > 5000 and flips * ONE_IN <= places


def test_all_layouts_answered(all_of: dict[str, Any]) -> None:
    assert sum(name.startswith("layout") for name in all_of["pairs"]) == 5  # two leaders with expert parallelism


def test_a_prompt_whose_routes_are_wanted_is_computed_whatever_is_cached(all_of: dict[str, Any]) -> None:
    _, with_routes = all_of["cached"]
    assert with_routes == 0
