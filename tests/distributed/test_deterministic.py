"""deterministic_mode: two runs have the same bits, and an operation without such a kernel is an error that names it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.config.run import Recipe
from megatron_omni.platform.determinism import VARIABLES, make_deterministic
from megatron_omni.training.loop import train
from megatron_omni.training.setup import Run
from tests.distributed.harness import Rank, RankFailure
from tests.distributed.test_resume import exact
from tests.distributed.tiny_run import make_corpus, prepare, records, run_ranks, run_tiny, tiny_recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def settings_and_status(rank: Rank, recipe: Recipe) -> tuple[int, bool, bool, dict[str, str]]:
    """Status of the run, what it told torch and the model, and the environment that other libraries read."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    run = prepare(rank, recipe)
    told = run.model.config.deterministic_mode
    status = train(run)
    return status, torch.are_deterministic_algorithms_enabled(), told, {name: os.environ[name] for name in VARIABLES}


def test_two_runs_have_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    expected = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "FLASH_ATTENTION_DETERMINISTIC": "1",
    }
    runs = []
    for name in ("first", "second"):
        recipe = tiny_recipe(
            corpus,
            tmp_path / name,
            train_iters=4,
            deterministic_mode=True,
            optim__precision="bf16",
            parallel__expert_model_parallel_size=2,
            parallel__recompute="full",
        )
        assert run_ranks(settings_and_status, 2, recipe) == [(0, True, True, expected)] * 2
        runs.append(exact(records(recipe)))
    assert runs[0] == runs[1] and len(runs[0]) == 4


def write_without_an_order(run: Run) -> None:
    """An operation that has no deterministic kernel, on a CPU neither."""
    inner = run.task.forward_step

    def forward_step(batch: Any, model: Any, *, info: Any) -> Any:
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        return inner(batch, model, info=info)

    run.task.forward_step = forward_step  # type: ignore[method-assign]


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_operation_without_a_deterministic_kernel_is_an_error(
    corpus: Path, tmp_path: Path, deterministic: bool
) -> None:
    recipe = tiny_recipe(corpus, tmp_path, train_iters=1, deterministic_mode=deterministic)
    if deterministic:
        with pytest.raises(RankFailure, match=r"put_.* does not have a deterministic implementation"):
            run_tiny(recipe, 1, write_without_an_order)
    else:
        assert len(run_tiny(recipe, 1, write_without_an_order)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "Tree"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")],
)
def test_an_environment_that_says_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for variable, accepted in VARIABLES.items():
        monkeypatch.setenv(variable, value if variable == name else accepted[-1])
    with pytest.raises(
        ValueError, match=f"deterministic_mode=true: the environment has {name}='{value}'.*unset it or set it to"
    ):
        make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
