"""A whole training with each choice of ``model.moe.kernels`` that is here: the same losses, and checkpoints move
between choices.
"""

from pathlib import Path

import pytest

from tests.distributed.tiny_run import make_corpus, records, run_tiny, tiny_recipe

STEPS = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def ours(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Losses of ``omni``, the default."""
    recipe = tiny_recipe(corpus, tmp_path_factory.mktemp("omni"), train_iters=STEPS, optim__lr_decay_iters=20)
    assert recipe.model.moe is not None and recipe.model.moe.kernels == "omni"
    return run_tiny(recipe, 1)


@pytest.mark.parametrize(("choice", "ranks", "expert_parallel"), [("torch", 1, 1), ("megatron", 2, 2)])
def test_losses_equal_those_of_omni(
    choice: str, ranks: int, expert_parallel: int, corpus: Path, ours: list[dict[str, float]], tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        corpus,
        tmp_path,
        train_iters=STEPS,
        optim__lr_decay_iters=20,
        model__moe__kernels=choice,
        parallel__expert_model_parallel_size=expert_parallel,
    )
    theirs = run_tiny(recipe, ranks)
    assert len(theirs) == len(ours) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("lm loss", "grad-norm", "moe/mean_k"):
            assert other[name] == pytest.approx(mine[name], rel=1e-4), (mine["step"], name)
    assert ours[-1]["lm loss"] < ours[0]["lm loss"]


def test_a_run_resumes_with_another_choice(corpus: Path, ours: list[dict[str, float]], tmp_path: Path) -> None:
    settings = {"optim__lr_decay_iters": 20, "checkpoint__save_interval": 3}
    run_tiny(tiny_recipe(corpus, tmp_path, train_iters=3, **settings, model__moe__kernels="torch"), 1)
    recipe = tiny_recipe(corpus, tmp_path, train_iters=STEPS, **settings, load="auto", model__moe__kernels="omni")
    run_tiny(recipe, 1)
    resumed = records(recipe)
    assert [r["step"] for r in resumed] == [r["step"] for r in ours]
    for mine, other in zip(ours, resumed, strict=True):
        assert other["lm loss"] == pytest.approx(mine["lm loss"], rel=1e-4)
