"""A leader that fails between two messages is no rank's reason to wait: all of them raise, and go on together.

Each rank catches what it is told and then answers again with the others, so a message that one of them missed would
show as a hang or as an answer to something else.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.data.record import parse_record
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.generation.batches import generate, generate_all
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.request import Request
from megatron_omni.models.build import build_model
from megatron_omni.parallel.sharing import from_rank_0
from megatron_omni.serve.replicas import Replicas, take_part
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import make_corpus, tiny_recipe

WORDS = ("red", "blue one", "two", "high and low", "green", "five", "one", "three", "red red", "low", "and", "then")
BATCH = 1
LIMITS = EngineLimits(cache_tokens=64, max_running=2, max_batch_tokens=16)
LAYOUTS: dict[str, dict[str, int]] = {
    "tensor": {"parallel__tensor_model_parallel_size": 2},
    "pipeline": {"parallel__pipeline_model_parallel_size": 2},
    "expert": {"parallel__expert_model_parallel_size": 2},
    "data": {},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("failures") / "corpus")


class Prompts:
    """Builds prompts, and fails at one number on whatever rank builds it."""

    def __init__(self, builder: SampleBuilder, *, fails_at: int | None = None, too_long_at: int | None = None) -> None:
        self._builder, self._fails_at, self._too_long_at = builder, fails_at, too_long_at

    def __call__(self, number: int) -> Sample:
        if number == self._fails_at:
            raise OSError("the disk is gone")
        words = "red " * 30 if number == self._too_long_at else WORDS[number]
        return self._builder.build_prompt(parse_record({"messages": [{"role": "user", "content": words}]}))


def outcomes(rank: Rank, corpus: Path, layout: dict[str, int]) -> dict[str, Any]:
    """By fault: what was raised on this rank, and whether all answers came afterwards."""
    recipe = tiny_recipe(corpus, corpus / "run", model__init_method_std=0.25, **layout)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    settings: dict[str, Any] = {"tokenizer": builder.tokenizer, "max_new_tokens": 3, "pg": pg, "limits": LIMITS}

    def all_windows(prompts: Prompts) -> dict[int, list[int]]:
        return generate_all(model, prompts, len(WORDS), batch_size=BATCH, **settings)

    def own_loop() -> None:
        with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=LIMITS) as engine:
            if not engine.leads:
                engine.follow()
                return
            engine.submit(Request(name="a", prompt=Prompts(builder)(1), max_new_tokens=30, ignore_eos=True))
            for step in range(20):
                engine.step()
                if step == 3 and rank.index == 0:
                    raise KeyError("a bug of the caller")

    def with_weights_that_are_not_finite() -> None:
        with torch.no_grad():
            kept = [parameter.clone() for parameter in model.parameters()]
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        try:
            all_windows(Prompts(builder))
        finally:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), kept, strict=True):
                    parameter.copy_(value)

    def served(*bad: bool) -> None:
        """One turn of a server's ranks, with a request for each of ``bad``: whether it ends its engine."""
        engine = Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=LIMITS)
        if rank.index == 0:
            good = Request(name="0", prompt=Prompts(builder)(1), max_new_tokens=2)
            broken = replace(good.prompt, modality=None)  # type: ignore[arg-type]
            requests = [replace(good, name=str(i), prompt=broken if b else good.prompt) for i, b in enumerate(bad)]
            replicas = Replicas(engine, pg.dp)
            try:
                replicas.turn(requests)
            except Exception:
                replicas.close(failed=True)
                raise
        elif engine.leads:
            take_part(engine, pg.dp)
        else:
            with engine:
                engine.follow()

    faults: dict[str, Callable[[], object]] = {
        "the first prompt": lambda: all_windows(Prompts(builder, fails_at=0)),
        "a later window": lambda: all_windows(Prompts(builder, fails_at=10)),
        "a prompt that is too long": lambda: all_windows(Prompts(builder, too_long_at=2)),
        "one replica's prompts": lambda: generate(
            model, [Prompts(builder, too_long_at=0)(rank.index % pg.dp.size())] * 2, **settings
        ),
        "a loop of one's own": own_loop,
        "logits": with_weights_that_are_not_finite,
        "the server on rank 0": lambda: served(True),
        "the server on the second replica": lambda: served(False, True),
        "work of rank 0": lambda: from_rank_0(lambda: 1 // 0),
    }  # fmt: skip
    told = {}
    whole = all_windows(Prompts(builder))
    assert sorted(whole) == list(range(len(WORDS)))
    for name, fault in faults.items():
        try:
            fault()
            told[name] = "nothing"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        assert all_windows(Prompts(builder)) == whole, name
    return told


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_stops_where_a_leader_fails_and_can_go_on(layout: str, corpus: Path) -> None:
    first, second = run_ranks(outcomes, 2, corpus, LAYOUTS[layout])
    causes = {
        "the first prompt": "OSError: the disk is gone", "a later window": "OSError: the disk is gone",
        "a prompt that is too long": "ValueError: prompt has", "one replica's prompts": "ValueError: prompt has",
        "a loop of one's own": "KeyError: 'a bug of the caller'", "logits": "FloatingPointError: the model's logits",
        "work of rank 0": "ZeroDivisionError", "the server on rank 0": "AttributeError",
    }  # fmt: skip
    for name, cause in causes.items():
        assert first[name].startswith(cause), (name, first, second)
        if (
            name in ("one replica's prompts", "a loop of one's own") and layout == "data"
        ):  # nothing to say to each other
            assert second[name] == "nothing"
        elif name == "logits" and layout in ("data", "expert"):  # both leaders see it
            assert second[name].startswith(cause)
        else:
            assert second[name].startswith("PeerFailed: "), (name, second)
    told = [said["the server on the second replica"].partition(":")[0] for said in (first, second)]
    replicas = layout in ("data", "expert")
    assert told == (["PeerFailed", "AttributeError"] if replicas else ["AttributeError", "PeerFailed"])
