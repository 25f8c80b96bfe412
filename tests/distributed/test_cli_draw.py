"""``generate --draw`` on a tiny trained checkpoint: files, lines, layouts, and everything that cannot be."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from megatron_omni.checkpoint.means import MEANS
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.cli.generate import main
from megatron_omni.data.record import parse_record
from megatron_omni.data.sources import JsonlSource
from megatron_omni.generation.drawn_answers import AnswerDrawer
from megatron_omni.generation.load import open_checkpoint
from megatron_omni.generation.outline import outline, source_number, source_rows
from megatron_omni.generation.picture import PictureWanted
from megatron_omni.generation.png import facts_of
from tests.distributed.harness import Rank, run_ranks
from tests.drawing import drawing_rows, make_codec
from tests.trained import Trained
from tests.unit.test_cli_generate import command, without_first_line


def pixels_of(file: Path) -> numpy.ndarray:
    with Image.open(file) as image:
        return numpy.asarray(image).copy()


def test_draws_a_prompt_and_says_how(draws: Trained, tmp_path: Path) -> None:
    asked = [
        "--prompt",
        "draw red",
        "--draw",
        tmp_path / "a.png",
        "--out",
        tmp_path / "out",
        "--seed",
        3,
        "--max-new-tokens",
        4,
    ]
    (outcome,) = command(draws.run_dir, *asked)
    assert outcome.status == 0, outcome.err
    assert without_first_line(outcome.err) == ""
    prompt, facts = facts_of(tmp_path / "a.png")
    assert prompt == "draw red" and pixels_of(tmp_path / "a.png").shape == (16, 16, 3)
    wanted = {
        "width": 16,
        "height": 16,
        "steps": 4,
        "text_guidance": 2.0,
        "image_guidance": 1.0,
        "seed": 3,
        "source": False,
    }
    assert {name: facts[name] for name in wanted} == wanted
    assert facts["model"] == "draws/checkpoints/iter_0000002"
    said = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert said["images"] == [str(tmp_path / "a.png")] and "drawing" not in said
    assert (tmp_path / "out" / "answer.txt").read_text() == outcome.out


def test_a_source_a_size_and_settings(draws: Trained, tmp_path: Path) -> None:
    source = draws.media / "1.png"
    asked = ["--prompt", "then blue", "--source", source, "--draw", tmp_path / "b.png", "--out", tmp_path, "--size", "40x10",
             "--steps", 2, "--guidance", "3,1.5", "--n", 2, "--temperature", 1, "--max-new-tokens", 3]  # fmt: skip
    (outcome,) = command(draws.run_dir, *asked)
    assert outcome.status == 0, outcome.err
    assert "size 40x10 is none of this model's" in outcome.err and "drawn at 32x8" in outcome.err
    files = [tmp_path / "b_0.png", tmp_path / "b_1.png"]
    assert json.loads((tmp_path / "answer.json").read_text())["images"] == [*map(str, files)]
    first, second = map(pixels_of, files)
    assert first.shape == second.shape == (8, 32, 3) and (first != second).any()
    prompt, facts = facts_of(files[0])
    assert (facts["steps"], facts["text_guidance"], facts["image_guidance"], facts["source"]) == (2, 3.0, 1.5, True)
    assert prompt == "<image> then blue"


def records_of(draws: Trained, name: str = "records") -> Path:
    """The rows of training and one that cannot be used, beside their pictures."""
    rows = drawing_rows(draws.media)
    question = {"role": "user", "content": "<image> then"}
    rows.insert(3, {"messages": [question], "images": ["none.png"], "id": "n"})
    file = draws.media / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}, {"ranks": 2}], ids=["1", "PP2", "DP2"])
def test_records_are_drawn_alike_on_every_layout(draws: Trained, tmp_path: Path, layout: dict[str, int]) -> None:
    """Pictures of a record are those of the record alone: in batches of any size on one rank bit for bit, elsewhere to rounding."""
    folder = tmp_path / "drawn"
    records = records_of(draws)
    names = [f"parallel.{name}_model_parallel_size={size}" for name, size in layout.items() if name != "ranks"]
    asked = [
        "--jsonl",
        records,
        "--draw",
        folder,
        "--out",
        tmp_path / "out",
        "--max-new-tokens",
        3,
        "--batch-size",
        5,
        *names,
    ]
    outcomes = command(draws.run_dir, *asked, ranks=max(layout.values(), default=1))
    assert outcomes[0].status == 0, outcomes[0].err
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert lines[3]["reason"] == "missing_media" and "images" not in lines[3]
    drawn = [line for line in lines if "images" in line]
    assert [line["images"] for line in drawn] == [[str(folder / f"{n}.png")] for n in range(17) if n != 3]
    got = {line["id"]: pixels_of(Path(line["images"][0])) for line in drawn}
    if not layout:
        alone = tmp_path / "alone"
        one = draws.media / "one.jsonl"
        one.write_text(records.read_text().splitlines()[6] + "\n")
        (outcome,) = command(draws.run_dir, "--jsonl", one, "--draw", alone, "--out", alone, "--deterministic")
        assert outcome.status == 0, outcome.err
        assert facts_of(alone / "0.png")[1] == facts_of(folder / "6.png")[1]
        assert len({picture.tobytes() for picture in got.values()}) == 16
        draws_of_one_rank.update(got)
    for key, picture in got.items():
        difference = numpy.abs(picture.astype(int) - draws_of_one_rank[key].astype(int))
        assert difference.max() <= 1, key


draws_of_one_rank: dict[str, numpy.ndarray] = {}


def test_what_the_model_writes_comes_first_where_it_may(draws: Trained, tmp_path: Path) -> None:
    """``begin`` of a record, of the model, and words before a picture."""
    one = draws.media / "first.jsonl"
    one.write_text(json.dumps(drawing_rows(draws.media)[0]) + "\n")
    found = {}
    for name, words in (
        ("lead", ["--draw-lead", "one "]), ("record", ["--draw-begin", "record"]), ("model", ["--draw-begin", "model"]),
    ):  # fmt: skip
        out = tmp_path / name
        (outcome,) = command(draws.run_dir, "--jsonl", one, "--draw", out, "--out", out, *words,
                             "--max-new-tokens", 4)  # fmt: skip
        assert outcome.status == 0, outcome.err
        line = json.loads((out / "answers.jsonl").read_text())
        assert len(line["images"]) >= 1
        found[name] = pixels_of(Path(line["images"][0])).tobytes()
    assert found["record"] == found["lead"], "the record's answer is “one <generate> two”"
    assert found["model"] != found["lead"]


def test_outline_of_records(draws: Trained, tmp_path: Path) -> None:
    run_ranks(outlines, 1, draws, tmp_path)


def outlines(rank: Rank, draws: Trained, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(draws.run_dir)
    config, builder = checkpoint.recipe.model.image, checkpoint.builder
    assert config is not None
    records = JsonlSource(records_of(draws), name="r")
    words, edit = records[0], records[1]
    assert (source_number(words), source_number(edit)) == (None, 0)
    plain = outline(words, builder, config)
    assert (plain.size, plain.source) == ((16, 16), None)
    shown = outline(edit, builder, config)
    assert shown.source is not None and torch.equal(
        shown.source, torch.from_numpy(pixels_of(draws.media / "0.png")).permute(2, 0, 1)
    )
    assert source_rows(words, builder.build_prompt(words)) is None
    assert source_rows(edit, builder.build_prompt(edit)) == (0, 4)
    two = {
        "messages": [{"role": "user", "content": "<image> and <image> then"}],
        "images": [str(draws.media / "1.png")] * 2,
    }
    both = parse_record(two)
    assert source_number(both) == 1 and source_rows(both, builder.build_prompt(both)) == (4, 8)
    wide = tmp_path / "wide.png"
    for size, drawn_at in (((40, 10), (32, 8)), ((1, 1), (16, 16)), ((20_000, 3), (32, 8)), ((3, 9), (8, 24))):
        Image.new("CMYK", size, (0, 255, 255, 0)).save(tmp_path / "wide.jpg") if size[0] < 20_000 else None
        picture = Image.new("RGB", size, (200, 30, 30))
        picture.save(wide)
        record = parse_record({"messages": [{"role": "user", "content": "<image> then"}], "images": [str(wide)]})
        found = outline(record, builder, config)
        assert (
            found.size == drawn_at and found.source is not None and found.source.shape == (3, drawn_at[1], drawn_at[0])
        )
        assert found.source.float().mean(dim=(1, 2)).round().tolist() == [200, 30, 30]
        assert outline(record, builder, config, wanted=(16, 16)).source.shape == (3, 16, 16)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    moves = parse_record(
        {"messages": [{"role": "user", "content": "<image> then"}], "images": [str(tmp_path / "moves.gif")]}
    )
    first = outline(moves, builder, config).source
    assert first is not None and first.float().mean(dim=(1, 2)).tolist() == [250, 0, 0], "the first of an animation"
    cmyk = parse_record(
        {"messages": [{"role": "user", "content": "<image> then"}], "images": [str(tmp_path / "wide.jpg")]}
    )
    assert outline(cmyk, builder, config).source is not None


def test_running_means_are_what_draws(draws: Trained) -> None:
    run_ranks(means, 1, draws)


def means(rank: Rank, draws: Trained) -> None:
    checkpoint = open_checkpoint(draws.run_dir)
    model = checkpoint.load_model()
    reader = TorchDistReader(checkpoint.directory)
    names = [name.removeprefix(MEANS) for name in reader.tensors if name.startswith(MEANS)]
    assert len(names) > 20 and all(name.startswith("image.") for name in names)
    differ = 0
    for name, parameter in model.named_parameters():
        if name in names:
            mean, plain = torch.empty(parameter.shape), torch.empty(parameter.shape)
            reader.fill(f"{MEANS}{name}", [0] * parameter.dim(), mean)
            reader.fill(name, [0] * parameter.dim(), plain)
            assert torch.equal(parameter, mean)
            differ += not torch.equal(mean, plain)
    assert differ > 5


# --------------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[list[str], str]] = {
    "steps": (["--steps", "0"], "steps is 0"),
    "many steps": (["--steps", "10000"], "steps is 10000"),
    "guidance": (["--guidance", "-1"], "text_guidance is -1"),
    "guidance of the source": (["--guidance", "2,-3"], "image_guidance is -3"),
    "no numbers": (["--guidance", "much"], "write one number, or two"),
    "size": (["--size", "huge"], "WIDTHxHEIGHT"),
    "empty size": (["--size", "0x64"], "WIDTHxHEIGHT"),
    "pictures": (["--most-pictures", "99"], "most is 99"),
    "codec": (["--vae", "{tmp}/none"], "no such directory"),
    "speech": (["--speak", "{tmp}/a.wav"], "drawn or spoken"),
    "thought": (["--think", "--draw-begin", "block"], "before the thought"),
    "record": (["--draw-begin", "record"], "it is for --jsonl"),
    "lead": (["--draw-begin", "model", "--draw-lead", "x"], "leave one out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_end_with_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[name]
    words = [str(tmp_path), "--prompt", "hi", "--out", f"{tmp_path}/out", "--draw", f"{tmp_path}/a.png"]
    assert main([*words, *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    errors = without_first_line(capsys.readouterr().err)
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors


def test_options_of_drawing_mean_nothing_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path), "--prompt", "hi", "--out", str(tmp_path / "out")]
    for option in (["--size", "8x8"], ["--steps", "3"], ["--source", "a.png"], ["--vae", "x"], ["--draw-lead", "a"]):
        assert main([*words, *option]) == 2
        assert f"{option[0]} means nothing without --draw" in capsys.readouterr().err
    for file, problem in (
        ("a.jpg", "PNG files"),
        ("none/a.png", "a directory that is there"),
        ("a", "name it NAME.png"),
    ):
        assert main([*words, "--draw", str(tmp_path / file)]) == 2
        assert problem in capsys.readouterr().err


def test_files_that_cannot_be_used(draws: Trained, trained: Trained, tmp_path: Path) -> None:
    """A damaged source, a codec of another model, a model that draws nothing: one line, and nothing is written."""
    (tmp_path / "damaged.png").write_bytes((draws.media / "1.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    make_codec(tmp_path / "other", seed=9)
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, list[Any], str]] = [
        (draws.run_dir, ["--source", tmp_path / "damaged.png"], "damaged.png"),
        (draws.run_dir, ["--source", tmp_path / "text.png"], "is no picture"),
        (draws.run_dir, ["--vae", tmp_path / "other"], "codec of pictures"),
        (draws.run_dir, ["--vae", tmp_path / "empty"], "no codec of pictures here"),
        (trained.run_dir, [], "draws nothing"),
    ]
    for run, words, message in cases:
        (outcome,) = command(run, "--prompt", "then", "--draw", tmp_path / "a.png", "--out", tmp_path / "out", *words)
        assert outcome.status == 2
        errors = without_first_line(outcome.err)
        assert errors.startswith("error: ") and message in errors, errors
        assert not (tmp_path / "out").exists() and not (tmp_path / "a.png").exists()


def test_text_of_a_user_is_never_a_block(draws: Trained, tmp_path: Path) -> None:
    """What a user writes stays text, whatever it looks like: the answer has the picture of its own block alone."""
    run_ranks(written, 1, draws)


def written(rank: Rank, draws: Trained) -> None:
    checkpoint = open_checkpoint(draws.run_dir)
    drawer = AnswerDrawer(PictureWanted(), checkpoint)
    text = "[TASK0][TASK1][TASK2][IMG0][IMG1][IMG2][IMG3] <generate> [IMG77]"
    record = parse_record({"messages": [{"role": "user", "content": text}]})
    prompt = drawer.built(record, think=None)
    assert not set(prompt.input_ids.tolist()) & set(drawer.block_ids)
    assert checkpoint.builder.tokenizer.decode(prompt.input_ids.tolist()).count("[TASK0]") == 1


def test_an_answer_without_pictures_has_none_of_their_tokens(draws: Trained, tmp_path: Path) -> None:
    """Training to draw moves their rows of the output layer: text must not change by it. Here any token is as likely."""
    asked = ["--prompt", "draw red", "--out", tmp_path, "--temperature", 100, "--n", 4, "--max-new-tokens", 30]
    (outcome,) = command(draws.run_dir, *asked, "--ignore-eos", "--logprobs", 0)
    assert outcome.status == 0, outcome.err
    (never,) = run_ranks(unwritten, 1, draws)
    samples = json.loads((tmp_path / "answer.json").read_text())["samples"]
    said = [token["id"] for sample in samples for token in sample["tokens"]]
    assert len(never) == 3 + 4 and len(said) == 120 and not never & set(said)


def unwritten(rank: Rank, draws: Trained) -> set[int]:
    return set(open_checkpoint(draws.run_dir).builder.unwritten)
