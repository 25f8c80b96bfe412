"""Tasks of kind ``speech``: a tiny speech generator speaks records, a judge of the user's hears what is scored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from megatron_omni.evaluation.judges.load import open_judge
from megatron_omni.evaluation.results import SampleResult, SkippedSample, read_samples, read_summary
from megatron_omni.evaluation.task import load_tasks
from megatron_omni.models.generators.codec import Codec, save_codec
from megatron_omni.platform.seeds import named_generator
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_evaluate import Outcome, run_command
from tests.distributed.tiny_run import run_tiny
from tests.distributed.tiny_speech import tiny_codec

WORDS = ("one", "two", "three", "four", "five")
JUDGE = """
def length(waves, sample_rate, unit):
    assert all(wave.dtype.name == "float32" and wave.ndim == 1 for wave in waves) and sample_rate == 16000
    return [f"{len(wave) // unit}" for wave in waves]

def too_few(waves, sample_rate):
    return ["one"]
"""
TASK = """
kind: speech
data: spoken.jsonl
metric: exact_match
judge: judge.py:length
judge_settings: {unit: 160}
"""


def loadable_codec() -> Codec:
    """As wide as a recipe's must be."""
    codec = Codec(replace(tiny_codec().config, hidden_size=64))
    codec.draw_weights(lambda name: named_generator(0, name))
    codec.codebook.load_state_dict(tiny_codec().codebook.state_dict())
    return codec.eval()


def row(number: int, words: str, **speech: Any) -> dict[str, Any]:
    """A record whose codes are as many as the judge will count."""
    answer = {
        "role": "assistant",
        "content": words,
        "speech": {"speaker": "Jenny", "codes": [number % 32] * 8, **speech},
    }
    return {"messages": [{"role": "user", "content": "say it"}, answer], "id": str(number)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, a codec, a task and a judge."""
    folder = tmp_path_factory.mktemp("hearing")
    rows = [row(n, f"{WORDS[n % 5]} {WORDS[n % 3]}.") for n in range(8)]
    lines = [json.dumps(one) + "\n" for one in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    bad = json.dumps(row(8, "one", speaker=None) | {"id": "bad"}) + "\n"
    (folder / "spoken.jsonl").write_text("".join([*lines[:5], bad, *lines[5:]]))
    (folder / "task.yaml").write_text(TASK)
    (folder / "judge.py").write_text(JUDGE)
    lines = [" ".join(WORDS) + ". Language: English; Speaker: Jenny;"] * 20
    path = folder / "t.model"
    train_sentencepiece(lines, path, vocab_size=340, model_type="bpe", specials=ALL_SPECIALS)
    save_codec(loadable_codec(), folder / "codec")
    recipe = {
        "run_dir": str(folder / "run"), "train_iters": 1, "seed": 3,
        "model": {
            "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
            "kv_channels": 8, "mrope_section": [4, 0, 0], "vocab_size": 41, "make_vocab_size_divisible_by": 8,
            "output_bias": True, "untie_embeddings_and_output_weights": True, "moe": None, "vision": None, "audio": None,
            "speech": {
                "num_codes": 32, "text_vocab_size": 340, "text_hidden_size": 16, "codec": str(folder / "codec"),
                "max_codes": 24, "least_codes_per_token": 0.5, "most_codes_per_token": 2.0, "prefix_codes": 4,
                "least_prefix_codes": 2,
            },
        },
        "data": {
            "seq_length": 128, "micro_batch_size": 2, "global_batch_size": 4, "tokenizer": str(folder / "t.model"),
            "sources": [{"name": "spoken", "path": str(folder / "train.jsonl")}],
        },
        "optim": {"precision": "fp32"}, "checkpoint": {"save_interval": 0}, "log": {"tensorboard": False},
    }  # fmt: skip
    run_tiny(recipe_from_dict(recipe), 1)
    return folder


def evaluated(folder: Path, out: str, world_size: int = 1, *more: str) -> Outcome:
    """The command on so many ranks."""
    words = [str(folder / "run"), "--tasks", str(folder / "task.yaml"), "--out", str(folder / out), *more]
    return run_ranks(_command, world_size, words, _port())[0]


def _command(rank: Rank, words: list[str], port: int) -> Outcome:
    return run_command(rank, words, port)


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_sounds_are_judged_on_every_layout(trained: Path) -> None:
    outcome = evaluated(trained, "one")
    assert outcome.status == 0, outcome.err
    lines = read_samples(trained / "one", "task")
    heard = [line for line in lines if isinstance(line, SampleResult)]
    assert [line.row for line in heard] == [0, 1, 2, 3, 4, 6, 7, 8]
    (skipped,) = [line for line in lines if isinstance(line, SkippedSample)]
    assert skipped.row == 5 and "speaker" in skipped.message
    for line in heard:
        wave, rate = soundfile.read(trained / "one" / "sounds" / "task" / f"{line.row}.wav")
        assert rate == 1600 and len(wave) == 16 * line.tokens and 0 < line.tokens <= 24
        # the judge has the sound at 16 kHz: a code of 16 samples at 1.6 kHz is 160 there
        assert line.answer == str(line.tokens) and line.prompt[0]["content"] == "Language: English; Speaker: Jenny;"
        assert line.score == float(line.answer in line.expected) == 0
    summary = read_summary(trained / "one").tasks["task"]
    assert summary.count == 8 and summary.score == 0 and sum(summary.skipped.values()) == 1
    assert evaluated(trained, "two", 2).status == 0
    other = [line for line in read_samples(trained / "two", "task") if isinstance(line, SampleResult)]
    assert [(line.row, line.answer) for line in other] == [(line.row, line.answer) for line in heard]


def test_what_a_checkpoint_cannot_do_is_refused(trained: Path, tmp_path: Path) -> None:
    text = TASK.replace("kind: speech", "kind: text").replace("judge: judge.py:length", "")
    (trained / "text.yaml").write_text(text.replace("judge_settings: {unit: 160}", ""))
    words = [str(trained / "run"), "--tasks", str(trained / "text.yaml"), "--out", str(tmp_path / "out")]
    outcome = run_ranks(_command, 1, words, _port())[0]
    assert outcome.status == 2 and "speaks and answers no text; give tasks of kind speech" in outcome.err
    (trained / "few.yaml").write_text(TASK.replace("length", "too_few").replace("judge_settings: {unit: 160}", ""))
    words = [str(trained / "run"), "--tasks", str(trained / "few.yaml"), "--out", str(tmp_path / "few")]
    outcome = run_ranks(_command, 1, words, _port())[0]
    assert outcome.status == 2 and "gave 1 values for 8 sounds" in outcome.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("judge: judge.py:length", ""), "judge is missing"),
        (("judge.py:length", "judge.py:none"), "has no function 'none'"),
        (("judge.py:length", "none.py:length"), "there is no file"),
        (("judge.py:length", "word"), "did you mean 'words'"),
        (("judge.py:length", "words"), "words has no setting 'unit'"),
        (("kind: speech", "kind: text"), "set kind: speech"),
        (("metric: exact_match", "metric: perplexity"), "a judge hears one"),
        (("data: spoken.jsonl", "data: spoken.jsonl\nsystem_prompt: x"), "system_prompt means nothing"),
    ],
)
def test_bad_tasks(trained: Path, change: tuple[str, str], said: str) -> None:
    path = trained / "bad.yaml"
    path.write_text(TASK.replace(*change))
    with pytest.raises(ValueError, match=said):
        load_tasks([str(path)])


def test_judges_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recordings of two voices or more"):
        open_judge("voice", {}, tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        open_judge("voice", {"recordings": {"a": ["a.wav"], "b": ["b.wav"]}}, tmp_path)
    with pytest.raises(ValueError, match="give a list of words"):
        open_judge("words", {"vocabulary": "cat dog"}, tmp_path)
    from examples.quickstart.assets import load_assets

    words = load_assets().words
    for name in ("flite_slt", "flite_rms"):
        soundfile.write(tmp_path / f"{name}.wav", np.concatenate(words[name][:8]), 16_000)
    recordings = {name: [f"{name}.wav"] for name in ("flite_slt", "flite_rms")}
    judge = open_judge("voice", {"recordings": recordings}, tmp_path)
    assert [file.name for file in judge.files] == ["flite_slt.wav", "flite_rms.wav"]
    said = [np.concatenate(words[name][40:43]) for name in recordings]
    assert judge.open()([*said, np.zeros(16_000, np.float32)]) == ["flite_slt", "flite_rms", ""]
