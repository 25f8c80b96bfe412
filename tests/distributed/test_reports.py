"""What a run of two ranks says about itself: a loss spike with its samples, where its time went, a profiler trace."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.incidents import FEWEST
from megatron_omni.training.logger import PARTS, SLOW_RECORDS, _Stragglers
from megatron_omni.training.loop import train
from megatron_omni.training.watch import Watch, places
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, prepare, records, run_ranks, tiny_recipe

SPIKE = FEWEST + 2


def spiking(rank: Rank, recipe: Any) -> int:
    """A step whose reported loss is four times what it is."""
    run = prepare(rank, recipe)
    inner = run.task.forward_step

    def forward_step(batch: Any, model: Any, *, info: Any) -> Any:
        output, loss_function = inner(batch, model, info=info)

        def spoiled(token_loss: torch.Tensor) -> Any:
            loss, report = loss_function(token_loss)
            return loss, report * torch.tensor([4.0, 1.0]) if info.step == SPIKE else report

        return output, spoiled

    run.task.forward_step = forward_step  # type: ignore[method-assign]
    assert dist.get_world_size() == 2
    return train(run)


def test_a_run_reports_spikes_time_and_traces(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        make_corpus(tmp_path_factory.mktemp("corpus")),
        tmp_path,
        train_iters=SPIKE + 2,
        log__interval=5,
        log__profile_steps=[2, 3],
        log__profile_ranks=[1],
        model__vision=None,
        model__audio=None,
        checkpoint__save_interval=8,
        checkpoint__async_save=True,
    )
    recipe.data.sources = recipe.data.sources[:1]
    assert run_ranks(spiking, 2, recipe) == [0, 0]

    (incident,) = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert (incident["kind"], incident["step"]) == ("loss spike", SPIKE)
    assert incident["lm loss"] > 3 * incident["usual lm loss"]
    batch = recipe.data.global_batch_size
    assert [sample["id"] for sample in incident["samples"]] == list(range((SPIKE - 1) * batch, SPIKE * batch))
    assert all("text.jsonl:" in sample["record"] for sample in incident["samples"])

    logged = records(recipe)
    assert all(record[f"time/{part}"] > 0 for record in logged for part in PARTS)
    assert all(record["time/slowest_rank"] in (0, 1) and record["time/slowdown"] >= 1 for record in logged)
    # A step is its parts, plus what lies between them.
    assert all(sum(record[f"time/{part}"] for part in PARTS) < 10 * record["step time"] for record in logged)
    # What begins at steps 8 and 16; a busy machine may finish the first so late that step 15 has a share of it, too.
    assert {10, 20} <= {record["step"] for record in logged if "time/checkpoint" in record} <= {10, 15, 20}

    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_2-3_rank1.json.gz"
    with gzip.open(trace, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"data", "communication", "backward", "forward", "optimizer"} <= names  # ranges of the parts of a step
    assert "aten::mm" in names or "aten::addmm" in names or "aten::matmul" in names

    account = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    assert [line["step"] for line in account] == [8, 16, SPIKE + 2, SPIKE + 2]
    for line in account:
        assert sum(line["parts"].values()) == pytest.approx(line["wall"], rel=0.01)


def test_a_rank_that_is_slow_again_and_again_is_named_once() -> None:
    stragglers = _Stragglers()
    lines = [stragglers.add([1.0, 1.0, 1.5, 1.0])[2] for _ in range(2 * SLOW_RECORDS)]
    assert [line is not None for line in lines] == ([False] * (SLOW_RECORDS - 1) + [True]) * 2
    assert lines[SLOW_RECORDS - 1] == "rank 2 is slow: 1.50 times the median, 3 records in a row"
    for slow in (0, 1, 0, 1, 0, 1):  # now one, now the other: noise
        seconds = [1.0, 1.0, 1.0]
        seconds[slow] = 1.5
        assert stragglers.add(seconds) == (slow, 1.5, None)


def heard_of(rank: Rank) -> list[int]:
    rank.initialize(ParallelConfig())
    watch = Watch(lambda: 7, PartTimer(), timeout_seconds=60.0)
    watch._run = lambda *args: None  # type: ignore[method-assign]  # a rank that hangs before its thread has run
    watch.start()
    dist.barrier()
    told = places(dist.distributed_c10d._get_default_store(), 2)
    watch.stop()
    return [place.step for place in told if place is not None]


def test_a_rank_that_hangs_at_once_has_been_heard_of() -> None:
    assert run_ranks(heard_of, 2) == [[7, 7], [7, 7]]
