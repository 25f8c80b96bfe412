"""``megatron-omni prepare``: every recipe of the tree, names that are shared or are paths, files that are somebody's."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_omni.cli import prepare
from megatron_omni.config.load import load_recipe
from megatron_omni.data.index import index_path, read_index
from tests.unit.test_tar import write_tar
from tests.unit.tiny_data import row, tiny_recipe, tokenizer_file, write_image

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TINY = sorted(path.name for path in (RECIPES / "tiny").glob("*.yaml") if not path.stem.startswith("chain"))


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    settings = tiny_recipe(tmp_path, [])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{vocab_size: 512, vision: {{image_size: 28, pooled_side: 2, max_tiles_per_side: 3}}}}\n"
        f"data: {{tokenizer: {settings.data.tokenizer}, seq_length: 256}}\n"
    )
    return str(path)


def write_rows(path: Path, *answers: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row("what?", answer)) + "\n" for answer in answers))
    return path


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_recipe_is_prepared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Training and held-out sets share names in most of them: each file gets its own index, each set its summary."""
    monkeypatch.chdir(tmp_path)
    path = str(RECIPES / "tiny" / name)
    data = load_recipe(path).data
    files = [Path(source.path) for source in (*data.sources, *data.eval_sources)]
    for number, file in enumerate(files):
        write_rows(file, *["x"] * (1 + number))
    settings = [
        f"data.tokenizer={tokenizer_file(tmp_path)}",
        "data.seq_length=512",
    ]  # a codec's recipe has room for no text
    assert prepare.main([path, *settings, "--workers", "1"]) == 0
    assert [len(read_index(index_path(file))) for file in files] == [1 + number for number in range(len(files))]
    summaries = sorted(json.loads(file.read_text())["records"] for file in tmp_path.rglob("*.summary.json"))
    assert summaries == [1 + number for number in range(len(files))]


def test_sets_of_one_name_in_one_folder_and_a_file_named_twice(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = write_rows(tmp_path / "text.jsonl", "a"), write_rows(tmp_path / "ev" / "text.jsonl", "b", "c")
    assert prepare.main([recipe, "--workers", "1", "--data", str(one), str(other), str(one)]) == 0
    captured = capsys.readouterr()
    assert "100%" in captured.err and len(read_index(index_path(one))) == 1 and len(read_index(index_path(other))) == 2
    found = {str(file.relative_to(tmp_path)): json.loads(file.read_text())["records"]
             for file in tmp_path.rglob("*.summary.json")}  # fmt: skip
    assert found == {"text.summary.json": 1, "text.2.summary.json": 1, "ev/text.summary.json": 2}


def test_a_tar_with_two_prompts_is_named(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    picture = write_image(tmp_path / "a.png").read_bytes()
    tar = write_tar(tmp_path / "a.tar", [("1.png", picture), ("1.txt", b"a cat")])
    sources = f"data.sources=[{{name: a, path: {tar}, prompt: one}}, {{name: b, path: {tar}, prompt: two}}]"
    assert prepare.main([recipe, "--workers", "1", sources]) == 2
    assert "is in two sources, 'a' with prompt = 'one' and 'b' with 'two'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../outside", "a/b", ".hidden", "..", "a\\\\b", "x" * 101])
def test_a_name_that_is_a_path_is_refused_before_any_work(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = write_rows(tmp_path / "deep" / "er" / "text.jsonl", "a")
    assert prepare.main([recipe, f'data.sources=[{{name: "{name}", path: {path}}}]']) == 2
    assert "give a name and no path" in capsys.readouterr().err
    assert not index_path(path).exists() and not list(tmp_path.rglob("*.summary.json"))


def test_a_source_without_a_usable_record_is_no_success(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "text.jsonl", " ", " ")
    assert prepare.main([recipe, "--workers", "1", "--data", str(path)]) == 2
    assert "none of the 2 records of text can be used" in capsys.readouterr().err


def test_a_records_file_that_somebody_made_is_kept(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_image(folder / "1.png")
    (folder / "1.txt").write_text("a cat")
    (folder / "records.jsonl").write_text("my own work of a week\n")
    command = [recipe, "--workers", "1", "--folder", str(folder)]
    assert prepare.main(command) == 0
    assert "is kept as" in capsys.readouterr().out
    assert (folder / "records.jsonl.1").read_text() == "my own work of a week\n"
    assert prepare.main(command) == 0  # the same again: nothing to keep
    assert not (folder / "records.jsonl.2").exists()
    (folder / "1.txt").write_text("a dog")
    assert prepare.main(command) == 0
    assert "a cat" in (folder / "records.jsonl.2").read_text() and "a dog" in (folder / "records.jsonl").read_text()


def test_an_index_is_the_same_bytes_from_build_to_build(tmp_path: Path, recipe: str) -> None:
    """Also where decoders complain: their messages held the address of an object."""
    picture = write_image(tmp_path / "a.png").read_bytes()
    damaged = {"png": b"xx", "jpg": b"\xff\xd8\xff", "wav": b"RIFF", "mp4": b"\0\0\0\x18ftyp", "gif": picture[:20],
               "tiff": b"II*\0" + bytes(20), "webp": b"RIFF0000WEBP", "flac": b"fLaC" + bytes(50)}  # fmt: skip
    members = [("0.png", picture), ("0.txt", b"c")]
    for kind, data in damaged.items():
        members += [(f"{kind}.{kind}", data), (f"{kind}.txt", b"c")]
    tar = write_tar(tmp_path / "x.tar", members)
    digests = set()
    for _ in range(2):
        assert prepare.main([recipe, "--again", "--workers", "1", "--data", str(tar)]) == 0
        digests.add(hashlib.sha256(index_path(tar).read_bytes()).hexdigest())
    assert len(digests) == 1 and read_index(index_path(tar)).num_rejected == len(damaged)
    assert b" at 0x" not in index_path(tar).read_bytes()
