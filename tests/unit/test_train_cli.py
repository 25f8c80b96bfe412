"""Bad input costs one line and status 2; a dry run says what would be trained, and whether its files would do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_omni.checkpoint import commit
from megatron_omni.cli.train import main
from megatron_omni.config.load import load_recipe, recipe_to_yaml
from megatron_omni.data.prepare import index_files
from tests.distributed.tiny_run import make_corpus, tiny_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def recipe_file(tmp_path: Path, corpus: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(tiny_recipe(corpus, tmp_path / "run")))
    return file


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("optim.lrr=1", "did you mean"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=0", "must be above 0"),
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
    assert table["embeddings"].endswith("rows of 42 new tokens")
    # q, k, v with biases and the output projection of two blocks
    assert "attention" in table and f"{2 * (32 * 64 + 64 + 32 * 32):,}" in table["attention"]
    assert "GiB" in table["optimizer"] and float(table["peak"].split()[1]) >= float(table["held"].split()[1])
    assert text.splitlines()[-1] == "files: tokenizer, sources, indexes and checkpoints are there and fit"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.sources.text.path=none.jsonl"], ["data source 'text': no such file 'none.jsonl'"]),
        (["data.sources.text.path=none/*.tar"], ["no file matches 'none/*.tar'"]),
        (["data.tokenizer=none.model", "run_dir=/dev/null"], ["data.tokenizer='none.model'", "run_dir='/dev/null'"]),
        (["model.vocab_size=200"], ["model.vocab_size = 200 is below the 300 ids"]),
        (["data.seq_length=8"], ["data source 'text': 20 records in a row cannot be used"]),
        (["init_from=none"], ["init_from='none': no checkpoint there"]),
        (["load=nothing"], ["load='nothing': no checkpoint there"]),
        (["data.weight_by=tokens"], ["run megatron-omni prepare"]),
        (["data.eval_sources.a.path=EMPTY", "data.eval_sources.b.path=UNUSABLE", "log.eval_interval=5"], ["EMPTY", "UNUSABLE"]),
        (["model.num_layers=1000000"], ["model.num_layers=1000000: must be at least 1 and at most 1,000"]),
        (["--ranks=3"], ["data.global_batch_size=8 is no multiple of micro_batch_size x data-parallel ranks = 2 x 3"]),
        (["--ranks=0"], ["--ranks 0: a positive number"]),
    ],
)  # fmt: skip
def test_dry_run_refuses_what_the_run_would_refuse(
    recipe_file: Path, tmp_path: Path, overrides: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "UNUSABLE").write_text('{"no": "record"}\n' * 3)
    words = [word.replace("EMPTY", str(tmp_path / "EMPTY")) for word in overrides]
    words = [word.replace("UNUSABLE", str(tmp_path / "UNUSABLE")) for word in words]
    assert main([str(recipe_file), *words, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(text in error for text in expected), error


def test_dry_run_finds_the_checkpoint_of_a_run(recipe_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "other" / commit.CHECKPOINTS
    (commit.begin(root, 3) / "run_config.yaml").write_text(recipe_file.read_text())
    commit.publish(root, 3, keep=1)
    for path in (tmp_path / "other", root, commit.iteration_dir(root, 3)):
        assert main([str(recipe_file), f"init_from={path}", "--dry-run"]) == 0
    commit.iteration_dir(root, 3).rename(tmp_path / "away")
    assert main([str(recipe_file), f"init_from={tmp_path / 'other'}", "--dry-run"]) == 2


def test_dry_run_refuses_a_stale_index(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, tokenizer = tmp_path / "rows.jsonl", Path(load_recipe(recipe_file).data.tokenizer)
    row = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    data.write_text(row * 9)
    index_files([data], tokenizer=tokenizer)
    words = [str(recipe_file), f"data.sources=[{{name: rows, path: {data}}}]", "--dry-run"]
    assert main(words) == 0
    data.write_text(row * 10)
    assert main(words) == 2
    assert "stale, 'rows.jsonl' has changed since it was made" in capsys.readouterr().err


def test_dry_run_of_reinforcement_reads_prompts_and_opens_the_rewards(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "q"}], "solution": "a"}\n' * 9)
    words = [str(recipe_file), "--dry-run", "task=reinforce", "data.packing=false", "reinforce.max_new_tokens=8"]
    words += [f"data.sources=[{{name: rows, path: {data}}}]", "data.eval_sources=[]"]
    for function, said in (
        ("think_format", None),
        ("think_formatt", "did you mean 'think_format'"),
        (f"{tmp_path}/mine.py:none", "there is no file"),
    ):
        status = main([*words, f"reinforce.rewards=[{{function: '{function}'}}]"])
        error = capsys.readouterr().err
        assert (status, error) == (0, "") if said is None else (status == 2 and said in error), error
    assert main([*words, "reinforce.rewards=[{function: choice}]", "data.seq_length=8"]) == 2


@pytest.mark.parametrize(("words", "launched", "ranks"), [([], "", 4), (["--ranks=32"], "", 32), ([], "16", 16)])
def test_dry_run_of_a_shipped_stage_needs_neither_ranks_nor_data_to_show_it(
    words: list[str], launched: str, ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", launched)
    assert main([str(RECIPES / "3_sft.yaml"), "--dry-run", *words]) == 2  # its data is not in the repository
    shown = capsys.readouterr()
    assert f"fullest of {ranks} rank(s):" in shown.out and "data source 'image_instruction': no such file" in shown.err


def test_ranks_are_for_a_dry_run(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe_file), "--ranks", "2"]) == 2
    assert "for --dry-run alone" in capsys.readouterr().err


FIRST = """
import os, sys
from megatron_omni.cli import train
assert "torch" not in sys.modules
train.main(["nowhere.yaml"])
print(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "1 expandable_segments:True"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "8 backend:native"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "1 None"),
    ],
)
def test_what_cuda_reads_is_set_before_torch_is_imported(given: dict[str, str], found: str) -> None:
    """By every rank itself, so under any launcher; what is set already stays."""
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", FIRST], env=clean | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
