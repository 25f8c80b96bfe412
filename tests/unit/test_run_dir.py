"""A used run directory is refused with the ways out named, nothing of it touched; random weights are not trained beside."""

from pathlib import Path

import pytest

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.run_dir import METRICS, RESOLVED, WRITTEN, check_start, take
from megatron_omni.config.load import load_recipe
from megatron_omni.config.model import LoraConfig
from megatron_omni.config.run import Recipe


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """What a run leaves, and a user's own file."""
    run = tmp_path / "run"
    commit.begin(run / commit.CHECKPOINTS, 4)
    commit.publish(run / commit.CHECKPOINTS, 4, keep=0)
    for name in WRITTEN:
        if name != commit.CHECKPOINTS:
            (run / name).write_text("of the first run")
    (run / "corpus").mkdir()
    (run / "corpus" / "text.jsonl").write_text("mine")
    return run


def test_a_used_directory_is_refused_with_the_ways_out(used: Path, tmp_path: Path) -> None:
    files = sorted(used.rglob("*"))
    for recipe in (Recipe(run_dir=str(used)), Recipe(run_dir=str(used), load=str(tmp_path / "other"))):
        with pytest.raises(
            ValueError, match=r"holds the checkpoints of a run; load=auto .*overwrite=true .*another run_dir"
        ):
            check_start(recipe)
    with pytest.raises(ValueError, match=r"holds the checkpoints"):
        (used / commit.CHECKPOINTS / commit.TRACKER).unlink()  # its checkpoints are still there
        check_start(Recipe(run_dir=str(used)))
    assert len(files) == len(sorted(used.rglob("*"))) + 1
    for load in ("auto", str(used), str(used / commit.CHECKPOINTS / "iter_0000004")):
        check_start(Recipe(run_dir=str(used), load=load))
        with pytest.raises(ValueError, match="overwrite=true would delete it"):
            check_start(Recipe(run_dir=str(used), load=load, overwrite=True))
    check_start(Recipe(run_dir=str(tmp_path / "new")))
    check_start(Recipe(run_dir=str(used), overwrite=True))


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(used: Path) -> None:
    recipe = Recipe(run_dir=str(used), overwrite=True)
    take(recipe)
    assert sorted(path.name for path in used.iterdir()) == ["corpus", RESOLVED]
    assert (used / "corpus" / "text.jsonl").read_text() == "mine" and load_recipe(used / RESOLVED) == recipe


def test_a_start_that_goes_on_keeps_everything(used: Path) -> None:
    take(Recipe(run_dir=str(used), load="auto"))
    assert (used / METRICS).read_text() == "of the first run" and load_recipe(used / RESOLVED).load == "auto"


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        check_start(Recipe(run_dir=str(tmp_path / "file")))


def test_nothing_is_trained_beside_random_weights(used: Path, tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    adapters, frozen = Recipe(run_dir=new), Recipe(run_dir=new, freeze=["vision"])
    adapters.model.lora = LoraConfig()
    for recipe, named in ((adapters, "model.lora"), (frozen, r"freeze=\['vision'\]")):
        for load in (None, "auto"):
            recipe.load = load
            with pytest.raises(ValueError, match=rf"{named}: .* would stay random; name .* init_from"):
                check_start(recipe)
        recipe.init_from = "somewhere"
        check_start(recipe)
        recipe.init_from, recipe.run_dir = None, str(used)
        check_start(recipe)  # load=auto finds the weights there
