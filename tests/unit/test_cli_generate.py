"""The generation command line: what it accepts, and one clear error with status 2 for everything else."""

import contextlib
import io
import json
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.cli.generate import main, parse, user_parts
from megatron_omni.data.record import parse_record
from megatron_omni.generation.batches import generate
from megatron_omni.generation.load import open_checkpoint
from megatron_omni.generation.request import Sampling, Wanted
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import chat, make_corpus, run_tiny, tiny_recipe
from tests.trained import Trained


def test_media_without_markers_come_first_in_the_order_given() -> None:
    parts = user_parts("What?", [("audio", "a.wav"), ("image", "b.png"), ("audio", "c.wav")])
    assert parts == (("audio", "a.wav"), ("image", "b.png"), ("audio", "c.wav"), "What?")


def test_markers_keep_their_place_and_unmarked_kinds_come_first() -> None:
    parts = user_parts("Is <image> like <image>?", [("image", "a.png"), ("video", "v.mp4"), ("image", "b.png")])
    assert parts == (("video", "v.mp4"), "Is ", ("image", "a.png"), " like ", ("image", "b.png"), "?")


@pytest.mark.parametrize(
    ("prompt", "media", "message"),
    [
        ("<image> and <image>", [("image", "a.png")], r"2 <image> marker\(s\) for 1 --image"),
        ("<audio>", [], r"1 <audio> marker\(s\) for 0 --audio"),
        ("<video>", [("video", "a"), ("video", "b")], r"1 <video> marker\(s\) for 2 --video"),
    ],
)
def test_a_count_that_does_not_fit_names_marker_and_count(prompt: str, media: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        user_parts(prompt, media)


def test_command_line_in_any_order(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.touch()
    size = "parallel.tensor_model_parallel_size=2"
    request = parse(["--out", "o", str(tmp_path), "--image", str(image), size, "--temperature", "0.5", "--seed", "7"])
    assert request.checkpoint == tmp_path
    assert request.overrides == [size]
    assert request.wanted.sampling == Sampling(temperature=0.5, seed=7)
    assert request.parts == (("image", str(image)), "")


def test_every_option_reaches_the_engine(tmp_path: Path) -> None:
    words = (
        "--max-new-tokens 9 --min-new-tokens 2 --temperature 0.7 --top-p 0.9 --top-k 20 --min-p 0.1 --n 3 --logprobs 2 "
        "--repetition-penalty 1.2 --presence-penalty 0.3 --frequency-penalty 0.4 --seed 5 --ignore-eos --stop-id 7 "
        "--stop-id 8 --stop one --stop two --prompt x --out o"
    )
    sampling = Sampling(
        temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4, seed=5,
    )  # fmt: skip
    assert parse([str(tmp_path), *words.split()]).wanted == Wanted(
        max_new_tokens=9, min_new_tokens=2, sampling=sampling, n=3, logprobs=2, ignore_eos=True, stop=("one", "two"),
        stop_ids=(7, 8), text=True,
    )  # fmt: skip


BAD_COMMAND_LINES = {
    "no checkpoint": (["{tmp}/nothing", "--prompt", "hi", "--out", "{tmp}/out"], "nothing: no such checkpoint"),
    "no image": (["{tmp}", "--image", "{tmp}/no.png", "--out", "{tmp}/out"], "no.png: no such file"),
    "no jsonl": (["{tmp}", "--jsonl", "{tmp}/no.jsonl", "--out", "{tmp}/out"], "no.jsonl: no such file"),
    "nothing to answer": (["{tmp}", "--out", "{tmp}/out"], "give --prompt"),
    "two sources of prompts": (["{tmp}", "--jsonl", "{file}", "--prompt", "x", "--out", "{tmp}/out"], "--jsonl brings"),
    "no out": (["{tmp}", "--prompt", "hi"], "--out"),
    "out is a file": (["{tmp}", "--prompt", "hi", "--out", "{file}"], "is no directory"),
    "marker without file": (["{tmp}", "--prompt", "<image>", "--out", "{tmp}/out"], "1 <image> marker(s) for 0"),
    "unknown option": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "--wrong", "1"], "--wrong"),
    "unknown override": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "optim.lr=1"], "optim.lr=1"),
    "no override": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "word"], "'word'"),
    "no tokens": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "no batch": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "--batch-size", "0"], "--batch-size is 0"),
    "samples": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "--n", "99"], "n is 99; it must be from 1 to 64"),
    "a stop text": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "--stop", ""], "stop is 0 characters"),
    "penalty": (
        ["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "--repetition-penalty", "0"],
        "repetition_penalty is 0",
    ),
    "top-p of greedy": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "--top-p", "0.5"], "top_p is 0.5"),
    "temperature": (["{tmp}", "--prompt", "hi", "--out", "{tmp}/out", "--temperature", "-1"], "temperature is -1"),
}


@pytest.mark.parametrize("name", BAD_COMMAND_LINES)
def test_bad_command_line_ends_with_status_2_and_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    arguments, message = BAD_COMMAND_LINES[name]
    assert main([a.format(tmp=tmp_path, file=file) for a in arguments]) == 2
    captured = capsys.readouterr()
    errors = without_first_line(captured.err)
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def without_first_line(err: str) -> str:
    """What was said after the line that comes before the imports."""
    return re.sub(r"^megatron-omni generate \S+: starting \(importing torch\)\n", "", err)


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


def run_command(rank: Rank, arguments: list[str], port: int) -> Outcome:
    if rank.world_size > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in {"RANK": rank.index, "WORLD_SIZE": rank.world_size, **address}.items()}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return Outcome(status, out.getvalue(), err.getvalue())


def command(*arguments: object, ranks: int = 1) -> list[Outcome]:
    """The outcome of the command on each rank, in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_ranks(run_command, ranks, [str(a) for a in arguments], port)


def answer_directly(rank: Rank, run_dir: Path, record: dict[str, Any]) -> str:
    """The library's answer to a record, without the command line."""
    checkpoint = open_checkpoint(run_dir)
    tokenizer = checkpoint.builder.tokenizer
    prompt = checkpoint.builder.build_prompt(parse_record(record))
    return tokenizer.decode(
        generate(checkpoint.load_model(), [prompt], tokenizer=tokenizer, max_new_tokens=8, pg=checkpoint.pg)[0]
    )


def test_answers_a_prompt_with_media_as_the_library_does(trained: Trained, tmp_path: Path) -> None:
    image, sound = str(trained.media / "1.png"), str(trained.media / "2.wav")
    record = chat("<audio> red or <image> then", "") | {"images": [image], "audios": [sound]}
    record["messages"].pop()
    expected = run_ranks(answer_directly, 1, trained.run_dir, record)[0]
    assert expected
    media = ["--image", image, "--audio", sound, "--prompt", "red or <image> then", "--max-new-tokens", 8]
    outcome = command(trained.run_dir, *media, "--out", tmp_path / "new" / "out")[0]
    assert (outcome.status, outcome.out) == (0, expected + "\n")
    assert outcome.err == f"megatron-omni generate {trained.run_dir}: starting (importing torch)\n", "nothing to ignore"
    assert (tmp_path / "new" / "out" / "answer.txt").read_text() == expected + "\n"


def test_samples_and_log_probabilities_of_a_prompt(trained: Trained, tmp_path: Path) -> None:
    """Three samples end at a stop string at the latest; a token's log-probability is among the most likely ones'."""
    asked = [trained.run_dir, "--prompt", "red blue", "--temperature", 1, "--n", 3, "--logprobs", 20, "--stop", "e"]
    outcome = command(*asked, "--max-new-tokens", 8, "--out", tmp_path)[0]
    said = json.loads((tmp_path / "answer.json").read_text())
    answers = [sample["answer"] for sample in said["samples"]]
    assert outcome.status == 0 and outcome.out == "".join(f"{answer}\n" for answer in answers)
    assert said["answer"] == answers[0] and len(set(answers)) == 3 and not any("e" in answer for answer in answers)
    for sample in said["samples"]:
        assert sample["finish_reason"] in ("stop", "length") and 0 < len(sample["tokens"]) <= 8
        assert "".join(token["text"] for token in sample["tokens"]).lstrip().startswith(sample["answer"].strip())
        for token in sample["tokens"]:
            values = [item["logprob"] for item in token["top"]]
            assert values == sorted(values, reverse=True) and len(values) == 20
            assert token["logprob"] in [i["logprob"] for i in token["top"] if i["id"] == token["id"]] or (
                token["logprob"] <= values[-1]
            )


def test_answers_records_in_order_on_any_layout(trained: Trained, tmp_path: Path) -> None:
    jsonl = trained.media / "text.jsonl"
    common = ["--jsonl", jsonl, "--max-new-tokens", 5, "--batch-size", 3, "--temperature", 0.8, "--seed", 4, "--n", 2]
    outcome = command(trained.run_dir, *common, "--out", tmp_path / "alone")[0]
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "alone" / "answers.jsonl").read_text().splitlines()]
    assert [row["record"] for row in rows] == list(range(len(jsonl.read_text().splitlines())))
    assert len({row["answer"] for row in rows}) > 5
    samples = [[sample["answer"] for sample in row["samples"]] for row in rows]
    assert [row["answer"] for row in rows] == [first for first, _ in samples]
    assert sum(first != second for first, second in samples) > 5
    for name, override in {"dp": [], "tp": ["parallel.tensor_model_parallel_size=2"]}.items():
        outcomes = command(trained.run_dir, *common, "--out", tmp_path / name, *override, ranks=2)
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
        assert outcomes[1].out == ""
        assert (tmp_path / name / "answers.jsonl").read_text() == (tmp_path / "alone" / "answers.jsonl").read_text()


def test_answers_with_a_bf16_checkpoint_over_two_stages(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    settings = {"model__init_method_std": 0.25, "optim__precision": "bf16"}
    run_tiny(tiny_recipe(corpus, tmp_path / "run", train_iters=3, **settings), 1)
    common = [tmp_path / "run", "--prompt", "one two", "--image", corpus / "1.png", "--max-new-tokens", 4]
    alone = command(*common, "--out", tmp_path / "alone")[0]
    assert (alone.status, without_first_line(alone.err)) == (0, "")
    staged = command(*common, "--out", tmp_path / "staged", "parallel.pipeline_model_parallel_size=2", ranks=2)
    assert [outcome.status for outcome in staged] == [0, 0], staged
    assert staged[0].out == alone.out


def test_bad_files_end_with_status_2_and_write_nothing(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    damaged = tmp_path / "damaged"
    shutil.copytree(trained.run_dir, damaged)
    for file in damaged.rglob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    for arguments, message in (
        ([trained.run_dir, "--image", tmp_path / "broken.png"], "broken.png"),
        ([trained.run_dir, "--audio", tmp_path / "empty.wav"], "empty.wav"),
        ([tmp_path / "hf", "--prompt", "x"], "make a checkpoint of it first: megatron-omni convert import --hf"),
        ([trained.run_dir, "--prompt", "red " * 500], "exceed data.seq_length"),
        ([trained.run_dir, "--prompt", "x", "parallel.tensor_model_parallel_size=2"], "tensor_model_parallel_size=2"),
        ([tmp_path / "empty", "--prompt", "x"], "no checkpoint there"),
        ([tmp_path / "hf", "--prompt", "x"], f"megatron-omni convert import --hf {tmp_path / 'hf'} --out DIR"),
        ([damaged, "--prompt", "x"], "no checkpoint is whole"),
    ):
        outcome = command(*arguments, "--out", tmp_path / "out")[0]
        assert outcome.status == 2, outcome
        errors = without_first_line(outcome.err)
        assert errors.startswith("error: ") and errors.count("\n") == 1, outcome.err
        assert message in errors
        assert outcome.out == ""
        assert not (tmp_path / "out").exists()


def test_records_that_cannot_be_used_are_lines_of_their_own_and_a_second_start_goes_on(
    trained: Trained, tmp_path: Path
) -> None:
    good = [chat(f"{word} then", "") for word in ("red", "blue", "green", "one", "two")]
    for number, record in enumerate(good):
        record["messages"].pop()
        record["id"] = f"r{number}"
    good[1] = chat("<image>", "x") | {"images": ["none.png"], "id": "lost"}
    lines = [json.dumps(record) for record in good]
    lines[3] = '{"messages": "x"}'
    jsonl, out = trained.media / "asked.jsonl", tmp_path / "out"
    jsonl.write_text("\n".join(lines) + "\n")
    asked = [trained.run_dir, "--jsonl", jsonl, "--max-new-tokens", 5, "--batch-size", 1, "--out", out]
    whole = command(*asked, ranks=2)  # the missing picture is on the second rank
    assert [outcome.status for outcome in whole] == [0, 0], whole
    text = (out / "answers.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["record"], row["id"]) for row in rows] == [(0, "r0"), (1, "lost"), (2, "r2"), (3, None), (4, "r4")]
    assert ["answer" in row for row in rows] == [True, False, True, False, True]
    assert rows[1]["reason"] == "missing_media" and "none.png" in rows[1]["error"]
    assert f"{jsonl}:4" in rows[3]["error"]
    assert "no answer to record 1 (id 'lost'): " in whole[0].err and f"{jsonl}:2" in whole[0].err
    assert "3 answers in" in whole[0].out and "2 records without one (" in whole[0].out

    (out / "answers.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]) + '{"record": 2, "id": "r')
    again = command(*asked)[0]
    assert (again.status, (out / "answers.jsonl").read_text()) == (0, text)
    assert "2 lines from an earlier start" in again.out
    other = command(*asked, "--seed", 1)[0]
    assert other.status == 2 and "answers to another request (seed differ)" in other.err
    jsonl.write_text(lines[3] + "\n")
    useless = command(*asked[:-1], tmp_path / "useless")[0]
    assert useless.status == 2 and "error: no record could be used" in useless.err
