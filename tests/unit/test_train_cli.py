"""Bad input costs one line and status 2; a dry run says what would be trained."""

from pathlib import Path

import pytest

from megatron_omni.cli.train import main
from megatron_omni.config.load import recipe_to_yaml
from tests.distributed.tiny_run import make_corpus, tiny_recipe


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(tiny_recipe(make_corpus(tmp_path / "corpus"), tmp_path / "run")))
    return file


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("optim.lrr=1", "did you mean"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=0", "must be positive"),
        ("data.micro_batch_size=3", "global_batch_size"),
        ("parallel.tensor_model_parallel_size=2", "start a multiple of 2 ranks"),
        ("data.tokenizer=missing.model", "missing.model"),
        ("freeze=[wheels]", "unknown part"),
        ("nonsense", "key=value"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    recipe_file: Path, override: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe_file), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and fix in error


def test_only_rank_0_speaks(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(recipe_file), "optim.lr=-1"]) == 2
    assert capsys.readouterr().err == ""


def test_more_ranks_than_work(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main([str(recipe_file)]) == 2
    assert "more ranks than work" in capsys.readouterr().err


def test_dry_run_shows_parts_and_memory_and_trains_nothing(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe_file), "--dry-run", "freeze=[vision,embeddings]"]) == 0
    text = capsys.readouterr().out
    table = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert table["vision"].endswith(" no") and table["attention"].endswith(" yes")
    assert table["embeddings"].endswith("rows of special tokens")
    # q, k, v with biases and the output projection of two blocks
    assert "attention" in table and f"{2 * (32 * 64 + 64 + 32 * 32):,}" in table["attention"]
    assert "GiB" in table["optimizer"]
    assert not (tmp_path / "run").exists()
