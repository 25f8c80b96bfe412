"""The commands that are heard: ``speak``, and ``generate --speak``; on one rank and two, and one error for what cannot be.

Both models have random weights: the speech generator is imported as released ones are, the language model is a dense one
whose spoken turn is begun for it.
"""

import contextlib
import io
import json
import os
import socket
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from megatron_omni.generation.spoken_lines import Lines, lines_there
from megatron_omni.generation.wav import wav_header
from megatron_omni.models.generators.codec import save_codec
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import chat, run_tiny
from tests.distributed.tiny_speech import DENSE, tiny_codec
from tests.unit.dense_checkpoints import write_dense
from tests.unit.speech_models import write_speaker
from tests.unit.test_speech_conversion import CODES

TEXT = "One two, three. Four five; six seven eight nine ten eleven!"
TP = "parallel.tensor_model_parallel_size=2"


@dataclass(frozen=True)
class Models:
    """Checkpoints of a speech generator and of a language model, the generator's codec and one of other weights."""

    speaker: Path
    language: Path
    codec: Path
    other_codec: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("speak")
    speaker, codec = write_speaker(root)
    other = tiny_codec(CODES)
    other.decoder.out.bias.data.add_(1.0)
    save_codec(other, root / "other")
    hf = write_dense(root / "dense", seed=2)
    opened = open_sources(language=hf)
    import_checkpoint(opened.parts, Recipe(model=opened.model), root / "language", wanted=opened.wanted, tokenizer=hf)
    return Models(speaker, root / "language", codec, root / "other")


def run_command(rank: Rank, name: str, arguments: list[str], port: int) -> tuple[int, bytes, str]:
    if rank.world_size > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank.index), "WORLD_SIZE": str(rank.world_size), **address}
    out, err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = import_module(f"megatron_omni.cli.{name}").main(arguments)
    assert isinstance(out.buffer, io.BytesIO)
    return status, out.buffer.getvalue(), err.getvalue()


def command(name: str, *arguments: object, ranks: int = 1) -> list[tuple[int, bytes, str]]:
    """(status, standard output, standard error) on each rank, in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_ranks(run_command, ranks, name, [str(a) for a in arguments], port)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_text_is_spoken_into_a_file_and_into_a_pipe(models: Models, tmp_path: Path) -> None:
    common = [models.speaker, "--text", TEXT, "--voice", "Jenny", "--temperature", 0.7, "--seed", 3]
    ((status, out, err),) = command("speak", *common, "--out", tmp_path / "a.wav")
    assert status == 0, err
    said, info = json.loads(out), soundfile.info(tmp_path / "a.wav")
    assert (info.frames, info.samplerate, info.channels) == (16 * said["codes"], 1600, 1)
    assert said["prompt"] == "Language: English; Speaker: Jenny;" and said["pieces"] > 2
    assert said["first_sound_seconds"] > 0 and said["real_time_factor"] > 0
    ((status, out, err),) = command("speak", *common, "--out", "-")
    assert status == 0 and json.loads(err.splitlines()[-1])["codes"] == said["codes"]
    assert out == wav_header(1600) + (tmp_path / "a.wav").read_bytes()[44:]


def test_a_file_of_texts_is_spoken_on_two_ranks(models: Models, tmp_path: Path) -> None:
    rows = [{"text": TEXT, "voice": "Brian", "id": "first"}, {"text": " . "}, {"text": "seven", "style": "An old man."}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {}
    common = [models.speaker, "--jsonl", tmp_path / "texts.jsonl", "--voice", "Jenny"]
    stopped = tmp_path / "dp"
    (stopped / "2.wav").mkdir(parents=True)  # the run ends where it would write the third line's sound
    ((status, _, err),) = command("speak", *common, "--out", stopped, "--batch-size", 1)
    assert status == 1 and "Is a directory" in err and not (stopped / "spoken.jsonl").exists()
    assert [row["line"] for row in lines_of(stopped / "spoken.0.partial")] == [0, 1]
    (stopped / "2.wav").rmdir()
    spoken_at = (stopped / "0.wav").stat().st_mtime_ns
    for name, ranks in (("alone", 1), ("dp", 2)):  # "dp" goes on, on another layout
        outcomes = command("speak", *common, "--out", tmp_path / name, ranks=ranks)
        assert [status for status, *_ in outcomes] == [0] * ranks, outcomes
        assert ("2 lines from an earlier start" in outcomes[0][1].decode()) == (name == "dp")
        sounds = {p.name: soundfile.read(p)[0] for p in sorted((tmp_path / name).glob("*.wav"))}
        told[name] = lines_of(tmp_path / name / "spoken.jsonl"), sounds
    first, silent, third = told["alone"][0]
    assert (first["id"], first["prompt"]) == ("first", "Language: English; Speaker: Brian;")
    assert third["prompt"] == "An old man." and "nothing to say" in silent["error"]
    assert list(told["alone"][1]) == ["0.wav", "2.wav"]
    assert told["dp"][0] == told["alone"][0] and not list(stopped.glob("*.partial"))
    assert (stopped / "0.wav").stat().st_mtime_ns == spoken_at
    for file, sound in told["alone"][1].items():
        np.testing.assert_allclose(told["dp"][1][file], sound, atol=1e-4)


def test_only_whole_lines_of_the_same_request_count(tmp_path: Path) -> None:
    asked = {"seed": 0, "lines": "a"}
    assert lines_there(tmp_path / "out", asked) == {} and lines_there(tmp_path / "out", {"seed": 1}) == {}
    out = tmp_path / "out"
    assert lines_there(out, asked) == {}
    gone, silent = {"line": 5, "file": "5.wav"}, {"line": 2, "error": "nothing to say"}
    for rank, rows in ((0, [{"line": 0, "file": "0.wav"}, silent]), (3, [gone])):
        with Lines(out / f"spoken.{rank}.partial") as lines:
            for row in rows:
                lines.add(row)
    with (out / "spoken.0.partial").open("ab") as file:
        file.write(b'{"line": 4, "fi')
    (out / "0.wav").touch()
    assert sorted(lines_there(out, asked)) == [0, 2]  # there is no 5.wav, and line 4 was never whole
    with Lines(out / "spoken.0.partial") as lines:
        lines.add({"line": 6, "error": "x"})
    assert sorted(lines_there(out, asked)) == [0, 2, 6]
    for other in ({"seed": 1, "lines": "a"}, {"seed": 0, "lines": "b"}):
        with pytest.raises(ValueError, match=r"another request \((seed|lines) differ\).*remove spoken\.0\.partial"):
            lines_there(out, other)
    (out / "request.json").unlink()
    with pytest.raises(ValueError, match="lines, seed differ"):
        lines_there(out, asked)


def test_an_answer_is_written_and_heard(models: Models, tmp_path: Path) -> None:
    common = [models.language, "--prompt", "Say it.", "--speaker", models.speaker, "--max-new-tokens", 12]
    wav = tmp_path / "a.wav"
    ((status, out, err),) = command("generate", *common, "--voice", "Jenny", "--speak", wav, "--out", tmp_path / "a")
    assert status == 0, err
    said = json.loads((tmp_path / "a" / "answer.json").read_text())
    speech = said["speech"]
    assert (speech["prompt"], speech["file"]) == ("Language: English; Speaker: Jenny;", str(wav))
    assert soundfile.info(wav).frames == 16 * speech["codes"] > 0
    assert "Speaker" not in said["answer"] and out.decode() == (tmp_path / "a" / "answer.txt").read_text()
    ((status, _, err),) = command("generate", *common, "--speak", tmp_path / "none.wav", "--out", tmp_path / "b")
    assert status == 2 and "error: the answer has no spoken turn" in err and not (tmp_path / "none.wav").exists()


def test_records_are_answered_and_heard_on_two_ranks(models: Models, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": word}]} for word in ("one", "two", "three")]
    jsonl = tmp_path / "asked.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [models.language, "--jsonl", jsonl, "--speaker", models.speaker, "--style", "low", "--max-new-tokens", 8]
    told = []
    for ranks, override in ((1, []), (2, [TP])):
        out = tmp_path / str(ranks)
        outcomes = command("generate", *common, "--speak", tmp_path / "sound", "--out", out, *override, ranks=ranks)
        assert [status for status, *_ in outcomes] == [0] * ranks, outcomes
        told.append(lines_of(out / "answers.jsonl"))
    assert told[0] == told[1] and len(told[0]) == 3
    for number, row in enumerate(told[0]):
        speech = row["speech"]
        assert speech["file"] == str(tmp_path / "sound" / f"{number}.wav") and speech["prompt"] == "low"
        assert soundfile.info(speech["file"]).frames == 16 * speech["codes"] > 0


def test_a_run_knows_the_voices_and_the_codec_of_its_data(models: Models, tmp_path: Path) -> None:
    train_sentencepiece(
        ["one two three"] * 9, tmp_path / "t.model", vocab_size=320, model_type="bpe", specials=ALL_SPECIALS
    )
    rows = [chat("say it", "one two three") for _ in range(4)]
    for row, voice in zip(rows, ("Zoe", "Anna", "Anna", "Zoe"), strict=True):
        row["messages"][1]["speech"] = {"speaker": voice, "codes": list(range(CODES))}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = replace(DENSE, vocab_size=CODES + 9, make_vocab_size_divisible_by=1)
    model.speech = SpeechConfig(
        num_codes=CODES, text_vocab_size=350, text_hidden_size=8, least_codes_per_token=0.5, codec=str(models.codec),
        codes_per_second=100.0, max_codes=64,
    )  # fmt: skip
    recipe = Recipe(model=model, run_dir=str(tmp_path / "run"), train_iters=1)
    recipe.optim.precision = "fp32"
    recipe.data.tokenizer, recipe.data.seq_length, recipe.data.global_batch_size = str(tmp_path / "t.model"), 128, 1
    recipe.data.sources = [SourceConfig(name="a", path=str(tmp_path / "a.jsonl"))]
    run_tiny(recipe, 1)
    common = [tmp_path / "run", "--text", "one", "--out", tmp_path / "a.wav", "model.speech.max_codes=8"]
    ((status, _, err),) = command("speak", *common, "--voice", "Jenny")
    assert status == 2 and "its voices are Anna, Zoe" in err
    ((status, _, err),) = command("speak", *common, "--voice", "Anna", "--codec", models.other_codec)
    assert status == 2 and "its fingerprint is" in err
    ((status, out, err),) = command("speak", *common, "--voice", "Anna")
    assert status == 0 and 0 < json.loads(out)["codes"] <= 8, err


BAD = {
    "unknown voice": (["speak", "{speaker}", "--text", "a", "--voice", "Anna"], "its voices are Jenny, Brian"),
    "no voice": (["speak", "{speaker}", "--text", "a"], "give a voice or a style"),
    "nothing": (["speak", "{speaker}", "--text", "... !", "--voice", "Jenny"], "neither a letter nor a digit"),
    "two texts": (["speak", "{speaker}", "--text", "a", "--text-file", "b"], "one of --text, --text-file and --jsonl"),
    "codec": (["speak", "{speaker}", "--text", "a", "--voice", "Jenny", "--codec", "{other}"], "its fingerprint is"),
    "rows": (["speak", "{speaker}", "--jsonl", "{rows}"], "rows.jsonl:1: expected"),
    "half a character": (["speak", "{speaker}", "--text", "a\udc80", "--voice", "Jenny"], "no valid Unicode"),
    "override": (["speak", "{speaker}", "--text", "a", "data.seq_length=3"], "speaking knows"),
    "no generator": (["speak", "{language}", "--text", "a", "--voice", "Jenny"], "no speech generator"),
    "generator asked": (["generate", "{speaker}", "--prompt", "a"], "megatron-omni speak says a text"),
    "language speaks": (
        ["generate", "{language}", "--prompt", "a", "--speaker", "{language}", "--speak", "{tmp}/a.wav"],
        "no speech generator",
    ),
    "no speaker": (["generate", "{language}", "--prompt", "a", "--speak", "{tmp}/a.wav"], "--speak needs --speaker"),
    "voice alone": (["generate", "{language}", "--prompt", "a", "--voice", "Jenny"], "nothing without --speak"),
    "thought": (
        [
            "generate",
            "{language}",
            "--prompt",
            "a",
            "--speak",
            "a.wav",
            "--speaker",
            "{speaker}",
            "--voice",
            "x",
            "--think",
        ],
        "leave out --think",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_error(name: str, models: Models, tmp_path: Path) -> None:
    (which, *arguments), message = BAD[name]
    places = {"speaker": models.speaker, "language": models.language, "other": models.other_codec, "tmp": tmp_path}
    places["rows"] = tmp_path / "rows.jsonl"
    places["rows"].write_text('{"text": 3}\n')
    out = tmp_path / ("out" if which == "generate" else "out.wav")
    ((status, _, err),) = command(which, *(a.format(**places) for a in arguments), "--out", out)
    errors = [line for line in err.splitlines() if "starting (importing torch)" not in line]
    assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], err
    assert not out.exists()
