"""How runs end: stop signals, non-finite gradients, a failure on one rank. No rank is left waiting."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_omni.chain import Stage
from megatron_omni.checkpoint import commit
from megatron_omni.cli import train as cli_train
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.run import Recipe
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training import hooks, loop
from megatron_omni.training.hooks import StopSignals
from megatron_omni.training.loop import train
from megatron_omni.training.setup import Run
from tests.distributed.harness import Rank, RankFailure
from tests.distributed.test_resume import exact
from tests.distributed.tiny_run import make_corpus, prepare, records, run_ranks, run_tiny, tiny_recipe, train_rank
from tests.slurm.cluster import free_ports

ROOT = Path(__file__).resolve().parents[2]
EXPERT = "language.decoder.layers.1.mlp.experts.weight1"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


# ---------------------------------------------------------------------------------------------------- signals


class Exited(Exception):
    pass


@pytest.mark.parametrize(("seconds_later", "exits"), [(2.0, False), (6.0, True)])
def test_a_second_signal_ends_the_process_but_copies_of_one_do_not(
    monkeypatch: pytest.MonkeyPatch, seconds_later: float, exits: bool
) -> None:
    clock = [100.0]

    def leave(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(hooks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(hooks.os, "_exit", leave)
    with StopSignals().installed() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received is signal.SIGINT
        clock[0] += seconds_later
        if exits:
            with pytest.raises(Exited, match=str(128 + signal.SIGTERM)):
                signal.raise_signal(signal.SIGTERM)
        else:
            signal.raise_signal(signal.SIGTERM)
            assert signals.received is signal.SIGINT


def command(recipe: Recipe, *overrides: str) -> list[str]:
    file = Path(recipe.run_dir).with_suffix(".yaml")
    file.write_text(recipe_to_yaml(recipe))
    return [sys.executable, "-m", "megatron_omni.cli.train", str(file), *overrides]


def test_the_command_saves_on_sigterm_exits_75_and_resumes_bit_equal(corpus: Path, tmp_path: Path) -> None:
    long = {"train_iters": 400, "optim__lr_decay_iters": 400}
    recipe = tiny_recipe(corpus, tmp_path / "run", **long)
    with subprocess.Popen(command(recipe), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("step 2/") for line in process.stdout), "no step was reported"
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(timeout=60) == 75
    stopped = int(records(recipe)[-1]["step"])
    assert 2 <= stopped < 400
    done = subprocess.run(command(recipe, f"train_iters={stopped + 2}", "load=auto"), cwd=ROOT, check=False)
    assert done.returncode == 0
    straight = tiny_recipe(corpus, tmp_path / "straight", **{**long, "train_iters": stopped + 2})
    assert exact(records(recipe)) == exact(run_tiny(straight, 1))


# ---------------------------------------------------------------------------------------------------- end of the data


def test_a_run_ends_where_its_data_ends_with_a_checkpoint_and_says_why(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """20 rows of each source, once, two of one damaged: 60 samples fill 7 steps of 8."""
    lines = (corpus / "text.jsonl").read_text().splitlines()
    (corpus / "holes.jsonl").write_text("\n".join(["{", *lines[1:-1], "{"]))
    sources = [
        {"name": name, "path": str(corpus / f"{name}.jsonl"), "epochs": 1} for name in ("image", "audio", "holes")
    ]
    pipeline = {"parallel__pipeline_model_parallel_size": 2}  # the second rank reads nothing
    settings = {"data__sources": sources, "data__max_bad_fraction": 1.0, "log__interval": 5, "load": "auto", **pipeline}
    held_out = {"data__eval_sources": [{"name": "held", "path": str(corpus / "held_out.jsonl"), "epochs": 1}]}
    recipe = tiny_recipe(corpus, tmp_path, **settings, **held_out, log__eval_interval=50, log__eval_iters=100)
    assert run_ranks(train_rank, 2, recipe) == [0, 0]
    found = records(recipe)
    assert [record["step"] for record in found if "lm loss" in record] == [1, 5, 7]  # step 6 is not lost
    last = next(record for record in found if record["step"] == 7 and "lm loss" in record)
    assert last["consumed samples"] == 56 and last["data/skipped records"] == last["data/skipped/holes"] >= 2
    assert "data/skipped/image" not in last and last["data/decoder fallbacks"] == 0
    assert [record["step"] for record in found if "eval/loss/held" in record] == [7]
    assert (tmp_path / "data_ended").read_text() == "7\n" and commit.tracked_step(tmp_path / "checkpoints") == 7
    assert Stage(name="s", run_dir=tmp_path, hand_on="last", sources={}, recipe=recipe).is_done
    said = "".join(capfd.readouterr())
    assert "finished after step 7 of 20: the data ends after 60 samples: every source has used its epochs" in said
    count = round(last["data/skipped records"])
    assert f"data: {count} records passed over\n  {count} holes: not_json" in said
    assert run_ranks(train_rank, 2, recipe) == [0, 0] and len(records(recipe)) == len(found)  # nothing is left to do
    recipe.run_dir = str(tmp_path / "none")
    recipe.data.sources[0].epochs, recipe.data.sources = 0.2, recipe.data.sources[:1]
    with pytest.raises(RankFailure, match=r"the data ends after 4 samples|ReaderFailed"):  # not one step
        run_ranks(train_rank, 2, recipe)


# ---------------------------------------------------------------------------------------------------- failures


def fail_on_one_rank(arguments: list[str], rank: int, port: int, log: Path) -> None:
    """The command as rank ``rank`` of two, forked; rank 1 raises in its first update."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    update = loop.update

    def failing(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("the injected cause")
        return update(*args, **kwargs)

    loop.update = failing
    os._exit(cli_train.main(arguments))


def test_a_failure_on_one_rank_ends_all_and_is_reported_once(corpus: Path, tmp_path: Path) -> None:
    arguments = command(tiny_recipe(corpus, tmp_path / "run"))[3:]
    (port,) = free_ports(1)
    logs = [tmp_path / f"stderr{rank}" for rank in range(2)]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=fail_on_one_rank, args=(arguments, rank, port, log), daemon=True)
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
    errors = [log.read_text() for log in logs]
    assert [process.exitcode for process in processes] == [1, 1], errors
    assert "error: [rank 1] ZeroDivisionError: the injected cause" in errors[1] and "Traceback" in errors[1]
    assert "[rank 0] ends: another rank failed first" in errors[0] and "Traceback" not in errors[0]


def unreadable_on_one_rank(rank: Rank, recipe: Recipe) -> tuple[str, int]:
    run = prepare(rank, recipe)
    if rank.index == 1:
        assert run.loader is not None
        run.loader._prepared = lambda: (_ for _ in ()).throw(ValueError("a bad record"))  # type: ignore[method-assign]
    with pytest.raises(Exception) as caught:
        train(run)
    return f"{caught.type.__name__}: {caught.value}", run.state.step


def test_data_that_one_rank_cannot_read_stops_every_rank_at_the_same_step(corpus: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    results = run_ranks(unreadable_on_one_rank, 2, tiny_recipe(corpus, tmp_path))
    assert results == [("ReaderFailed: another rank could not load its data", 0), ("ValueError: a bad record", 0)]
    assert time.monotonic() - started < 30, "a rank waited for a timeout"


# ---------------------------------------------------------------------------------------------------- non-finite


def poison(run: Run, steps: set[int], *, value: float) -> None:
    """Make one element of one gradient on rank 1 non-finite in ``steps``; remember the weights before and after."""
    snapshots: dict[int, list[torch.Tensor]] = {}
    inner = run.task.forward_step

    def forward_step(batch: Any, model: Any, *, info: Any) -> Any:
        if info.step not in snapshots:
            snapshots[info.step] = [p.detach().clone() for p in unwrap_model(run.model).parameters()]
        return inner(batch, model, info=info)

    run.task.forward_step = forward_step  # type: ignore[method-assign]
    run.snapshots = snapshots  # type: ignore[attr-defined]
    if dist.get_rank() == 1:
        weight = unwrap_model(run.model).get_parameter("language.decoder.layers.0.input_layernorm.weight")

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            if run.state.step in steps:
                grad = grad.clone()
                grad[0] = value
            return grad

        weight.register_hook(spoil)


def skip_steps(rank: Rank, recipe: Recipe, steps: set[int], value: float) -> tuple[int, list[bool], int]:
    run = prepare(rank, recipe)
    poison(run, steps, value=value)
    status = train(run)
    snapshots: dict[int, list[torch.Tensor]] = run.snapshots  # type: ignore[attr-defined]
    changed = [
        any(not torch.equal(a, b) for a, b in zip(snapshots[step], snapshots[step + 1], strict=True))
        for step in range(1, len(snapshots))
    ]
    return status, changed, run.state.updates


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_non_finite_gradient_on_one_rank_changes_no_weight_on_any(
    corpus: Path, tmp_path: Path, value: float, distributed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    saving = {"save_interval": 2, "keep": 1, "async_save": distributed}
    settings = {"optim__use_distributed_optimizer": distributed, "checkpoint": saving}
    recipe = tiny_recipe(corpus, tmp_path, train_iters=7, **settings)
    for status, changed, updates in run_ranks(skip_steps, 2, recipe, {2, 4, 7}, value):
        assert status == 0 and changed == [True, False, True, False, True, True] and updates == 4
    *_, last = capfd.readouterr().out.splitlines()  # the run ends in a streak too short to end it: its weights are good
    assert last.startswith(
        "the last 1 step(s) were skipped, their gradients are not finite: the weights are those after step 6;"
    )
    skipped = [record for record in records(recipe) if "lm loss" not in record]
    assert [(record["step"], record["skipped steps"]) for record in skipped] == [(2, 1), (4, 2), (7, 3)]
    assert all("grad-norm" not in record for record in skipped)  # not a number: JSON has no word for it
    # The save of step 4 waited for step 5; what is published after a step that was skipped (the last, and in the background
    # perhaps the one before it) retires nothing.
    kept = set(commit.steps(tmp_path / "checkpoints"))
    assert {6, 7} <= kept <= ({5, 6, 7} if distributed else {6, 7}) and {3, 5} <= set(saved_steps(recipe))


def saved_steps(recipe: Recipe) -> list[int]:
    """Steps at which the account of time was written: those of checkpoints, and the last."""
    return [json.loads(line)["step"] for line in (Path(recipe.run_dir) / "goodput.jsonl").read_text().splitlines()]


def diverge(run: Run) -> None:
    """Rank 1 loses a weight of its experts while step 3 is computed."""
    inner = run.task.forward_step

    def forward_step(batch: Any, model: Any, *, info: Any) -> Any:
        if info.step == 3 and dist.get_rank() == 1:
            unwrap_model(run.model).get_parameter(EXPERT).data[0, 0, 0] = float("inf")
        return inner(batch, model, info=info)

    run.task.forward_step = forward_step  # type: ignore[method-assign]


def test_weights_that_are_not_finite_are_never_saved(corpus: Path, tmp_path: Path) -> None:
    """The run ends in a streak of skipped steps, too short to end it: an error, and the last good checkpoint stays."""
    saving = {"save_interval": 2, "keep": 1, "async_save": True}
    recipe = tiny_recipe(corpus, tmp_path, train_iters=4, checkpoint=saving, parallel__expert_model_parallel_size=2)
    with pytest.raises(RankFailure, match=rf"CheckpointError: \[rank 1\] saving: {EXPERT} is not finite"):
        run_ranks(train_rank, 2, recipe, diverge)
    assert commit.find(tmp_path) == tmp_path / "checkpoints" / "iter_0000002"
    assert commit.steps(tmp_path / "checkpoints") == [2] and not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_too_many_in_a_row_end_the_run(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="3 steps in a row had non-finite gradients"):
        run_ranks(skip_steps, 2, tiny_recipe(corpus, tmp_path), {3, 4, 5}, float("nan"))


def test_sigusr1_stops_every_rank_after_the_same_step(corpus: Path, tmp_path: Path) -> None:
    from tests.distributed.test_resume import stop_at

    recipe = tiny_recipe(corpus, tmp_path)
    assert run_ranks(train_rank, 2, recipe, stop_at(3, rank=1, number=signal.SIGUSR1)) == [75, 75]
    assert records(recipe)[-1]["step"] == 3
