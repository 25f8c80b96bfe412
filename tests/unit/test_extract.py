"""Recordings to codes: every kind of data that is read, a real (small) codec, sound that is left out, shards that resume."""

import io
import json
import os
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch

from megatron_omni.cli import prepare
from megatron_omni.config.generators import CodecConfig, SpeechConfig
from megatron_omni.data import extract as extracting
from megatron_omni.data import sound_codes
from megatron_omni.data.codes import open_codes
from megatron_omni.data.decode import cpu
from megatron_omni.data.errors import RecordError
from megatron_omni.data.extract import Rules, extract
from megatron_omni.data.recording_rows import Voice
from megatron_omni.data.recordings import recordings_of
from megatron_omni.data.sound_codes import check_sound, encode_long
from megatron_omni.data.sources import open_sources
from megatron_omni.data.speech_sample import SpeechSampleBuilder
from megatron_omni.data.speech_segments import groups, joined
from megatron_omni.data.spoken_text import normaliser
from megatron_omni.data.tokenizer import ALL_SPECIALS, load_tokenizer, train_sentencepiece
from megatron_omni.models.generators.codec import Codec, save_codec
from megatron_omni.platform.seeds import named_generator
from tests.unit.tiny_data import CORPUS

RATE, HOP = 1600, 40
SIZES = CodecConfig(
    encoder="seanet", sample_rate=RATE, num_codes=16, code_size=8, strides=[2, 4, 5], num_filters=4, hidden_size=64,
    ffn_hidden_size=48, num_layers=2,
)  # fmt: skip
TEXT = "the cat is left of the dog"
JENNY = {"speaker": "Jenny"}


def build_codec(seed: int = 0) -> Codec:
    codec = Codec(SIZES).eval()
    codec.draw_weights(lambda *name: named_generator(seed, *name))
    start = named_generator(seed, "start")
    codec.codebook.start(torch.randn(64, 8, generator=start), generator=start)
    return codec


class Encoder:
    """The codec as the command takes it, which notes the batches."""

    sample_rate, hop_size, num_codes, codes_per_second = RATE, HOP, 16, 40.0

    def __init__(self, codec: Codec) -> None:
        self.codec, self.fingerprint, self.shapes = codec, codec.fingerprint, []

    def encode(self, waves):
        self.shapes.append(waves.shape)
        return self.codec.encode(torch.from_numpy(waves)).numpy()


@pytest.fixture(scope="module")
def codec():
    return build_codec()


@pytest.fixture
def encoder(codec):
    return Encoder(codec)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    size = 256 + 1 + len(ALL_SPECIALS) + 25
    return load_tokenizer(train_sentencepiece(CORPUS, path, vocab_size=size, specials=ALL_SPECIALS))


def wave_of(seconds: float, seed: int = 0, rate: int = RATE):
    noise = np.random.default_rng(seed).standard_normal(round(seconds * rate))
    return np.clip(0.2 * noise, -0.9, 0.9).astype(np.float32)


def write(path, wave, rate: int = RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype="FLOAT")


def spoken(file: str | None, text: str = TEXT, **speech) -> dict:
    said = {**JENNY, **({} if file is None else {"file": file}), **speech}
    return {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": text, "speech": said}]}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(found) -> list[dict]:
    return [json.loads(line) for path in found.paths for line in path.read_text().splitlines()]


def speech_of(row: dict) -> dict:
    return row["messages"][-1]["speech"]


def codes_of(folder, row: dict) -> list[int]:
    name, _, number = speech_of(row)["codes"].partition("#")
    return open_codes(folder / name).codes(int(number)).tolist()


def alone(codec: Codec, wave) -> list[int]:
    """Codes of a sound by itself."""
    return codec.encode(torch.from_numpy(np.pad(wave, (0, -len(wave) % HOP)))[None])[0].tolist()


def test_each_recording_has_the_codes_that_it_has_alone(tmp_path, codec, encoder):
    lengths = [1.0, 0.51, 1.0, 2.0, 0.52]
    for i, seconds in enumerate(lengths):
        write(tmp_path / f"{i}.wav", wave_of(seconds, i))
    rows = [spoken(f"{i}.wav") for i in range(5)]
    recordings = recordings_of(jsonl(tmp_path / "train.jsonl", rows), Voice())
    told: list[int] = []
    found = extract(recordings, encoder, Rules(), threads=3, advance=told.append)
    assert found.num_rows == sum(told) == 5 and not found.skipped
    assert found.seconds == pytest.approx(1 + 0.525 + 1 + 2 + 0.525)
    assert sorted(shape[0] for shape in encoder.shapes) == [1, 2, 2]  # 0.51 and 0.52 s are 21 codes each
    assert [path.name for path in found.paths] == ["train.spoken-00000.jsonl"]
    for i, row in enumerate(rows_of(found)):
        assert speech_of(row) == {**JENNY, "file": f"{i}.wav", "codes": f"train.spoken-00000.codes.safetensors#{i}"}
        assert row["messages"][0] == rows[i]["messages"][0]
        assert codes_of(tmp_path, row) == alone(codec, wave_of(lengths[i], i))


def test_sound_is_mixed_and_resampled(tmp_path, codec, encoder):
    left, right = wave_of(1.0, 1, 2400), wave_of(1.0, 2, 2400)
    write(tmp_path / "stereo.wav", np.stack([left, right], 1), 2400)
    recordings = recordings_of(jsonl(tmp_path / "a.jsonl", [spoken("stereo.wav")]), Voice())
    found = extract(recordings, encoder, Rules())
    wave = cpu.decode_audio(str(tmp_path / "stereo.wav"), sample_rate=RATE)
    assert len(wave) == RATE and codes_of(tmp_path, rows_of(found)[0]) == alone(codec, wave)


def test_what_is_left_out(tmp_path, encoder):
    good = wave_of(1.0)
    full, holes = good.copy(), good.copy()
    full[:100], holes[7] = 1.0, np.nan
    sounds = {
        "good": good,
        "silent": 0 * good,
        "clipped": full,
        "nan": holes,
        "short": good[:200],
        "long": wave_of(3.0),
    }
    for name, wave in sounds.items():
        write(tmp_path / f"{name}.wav", wave)
    (tmp_path / "damaged.wav").write_bytes(b"RIFF....")
    rows = [spoken(f"{name}.wav") for name in (*sounds, "damaged", "gone")]
    rows += [spoken(None), {"messages": [{"role": "assistant", "content": "a"}]}, spoken("good.wav", speaker="a;b")]
    rows += [spoken("good.wav", start=3), spoken("../good.wav")]
    path = jsonl(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n")
    found = extract(recordings_of(path, Voice()), encoder, Rules(longest_seconds=2.0))
    assert found.num_rows == 1 and found.skipped == Counter(
        silent=1, clipped=1, not_finite=1, too_short=1, media_too_large=1, unreadable_media=1, missing_media=1,
        no_recording=2, bad_speech=2, path_escape=1, not_json=1,
    )  # fmt: skip
    assert len(found.messages) == 13 and all("a.jsonl:" in message for message in found.messages)
    again = extract(recordings_of(path, Voice()), encoder, Rules(longest_seconds=2.0))
    assert again.skipped == found.skipped and len(encoder.shapes) == 1


def test_the_bounds_of_sound():
    for wave, reason in (
        (np.full(480, 0.001, np.float32), None),
        (np.full(480, 0.0009, np.float32), "silent"),
        (np.full(479, 0.5, np.float32), "too_short"),
        (np.r_[np.ones(5), np.zeros(995)].astype(np.float32), None),
        (np.r_[np.ones(6), np.zeros(994)].astype(np.float32), "clipped"),
        (np.r_[-np.ones(6), np.zeros(994)].astype(np.float32), "clipped"),
        (np.r_[np.inf, np.zeros(994)].astype(np.float32), "not_finite"),
    ):
        if reason is None:
            check_sound(wave, 1600, 0.3, where="w")
        else:
            with pytest.raises(RecordError, match="w: sound") as error:
                check_sound(wave, 1600, 0.3, where="w")
            assert error.value.reason == reason


def test_an_interrupted_command_goes_on_where_it_was(tmp_path, codec, monkeypatch):
    monkeypatch.setattr(extracting, "SHARD", 2)
    for i in range(5):
        write(tmp_path / f"{i}.wav", wave_of(1 + i / 10, i))
    path = jsonl(tmp_path / "t.jsonl", [spoken(f"{i}.wav") for i in range(5)])

    class Interrupted(Encoder):
        def encode(self, waves):
            if len(self.shapes) == 3:  # in the second shard
                raise KeyboardInterrupt
            return super().encode(waves)

    with pytest.raises(KeyboardInterrupt):
        extract(recordings_of(path, Voice()), Interrupted(codec), Rules())
    made = sorted(p.name for p in tmp_path.glob("t.spoken*"))
    assert made == ["t.spoken-00000.codes.safetensors", "t.spoken-00000.jsonl"] and not list(tmp_path.glob(".*"))
    first = os.stat(tmp_path / made[0]).st_mtime_ns
    rest = Encoder(codec)
    found = extract(recordings_of(path, Voice()), rest, Rules())
    assert len(rest.shapes) == 3 and os.stat(tmp_path / made[0]).st_mtime_ns == first
    assert [codes_of(tmp_path, row) for row in rows_of(found)] == [
        alone(codec, wave_of(1 + i / 10, i)) for i in range(5)
    ]
    files = {p.name: p.read_bytes() for p in tmp_path.glob("t.spoken*")}
    whole = extract(recordings_of(path, Voice()), Encoder(codec), Rules(), again=True)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("t.spoken*")} == files and whole.num_rows == found.num_rows


def test_shards_of_other_data_codec_or_rules_are_made_anew(tmp_path, encoder):
    write(tmp_path / "a.wav", wave_of(1.0))
    path = jsonl(tmp_path / "t.jsonl", [spoken("a.wav")])

    def batches(encoder, rules):
        before = len(encoder.shapes)
        extract(recordings_of(path, Voice()), encoder, rules)
        return len(encoder.shapes) - before

    assert batches(encoder, Rules()) == 1 and batches(encoder, Rules()) == 0
    other = Encoder(build_codec(1))
    index = tmp_path / "t.spoken-00000.jsonl.index"
    index.write_text("of the codes before")
    rows = (tmp_path / "t.spoken-00000.jsonl").read_bytes()
    assert batches(other, Rules()) == 1 and not index.exists()
    assert (tmp_path / "t.spoken-00000.jsonl").read_bytes() == rows
    assert batches(encoder, Rules()) == 1
    assert batches(encoder, Rules(longest_seconds=9.0)) == 1
    jsonl(path, [spoken("a.wav", "a dog")])
    assert batches(encoder, Rules(longest_seconds=9.0)) == 1
    (tmp_path / "t.spoken-00000.jsonl").unlink()
    assert batches(encoder, Rules(longest_seconds=9.0)) == 1


def test_long_sound_is_encoded_in_windows(codec, encoder, monkeypatch):
    monkeypatch.setattr(sound_codes, "WINDOW_SECONDS", 2.0)
    wave = wave_of(7.0, 3)
    codes, whole = encode_long(wave, encoder), np.array(alone(codec, wave))
    assert len(codes) == len(whole) == 280 and max(shape[1] for shape in encoder.shapes) == 5 * RATE
    assert (codes == whole).mean() > 0.97


# ------------------------------------------------------------------------------------------------ kinds of data


def test_ljspeech(tmp_path, codec, encoder):
    for key in ("LJ001-0001", "LJ001-0002"):
        write(tmp_path / f"LJ/wavs/{key}.wav", wave_of(1.0, len(key)))
    table = 'LJ001-0001|He said "80 GB|He said "eighty gigabytes\nLJ001-0002|a dog|\nLJ001-0003|\n'
    (tmp_path / "LJ/metadata.csv").write_text(table)
    found = extract(recordings_of(tmp_path / "LJ", Voice("Linda")), encoder, Rules())
    first, second = rows_of(found)
    assert found.paths[0] == tmp_path / "LJ/LJ.spoken-00000.jsonl" and found.skipped == {"bad_table": 1}
    assert (
        first["messages"][-1]["content"] == 'He said "80 GB' and speech_of(first)["text"] == 'He said "eighty gigabytes'
    )
    assert speech_of(first)["speaker"] == "Linda" and speech_of(first)["language"] == "English"
    assert first["messages"][0]["content"].startswith("He said \"80 GB\nYou should read user's query in Linda's voice.")
    assert "text" not in speech_of(second) and codes_of(tmp_path / "LJ", second) == alone(codec, wave_of(1.0, 10))
    assert extract(recordings_of(tmp_path / "LJ", Voice()), encoder, Rules(), again=True).skipped["no_speaker"] == 2
    (tmp_path / "LJ/metadata.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"metadata.csv: no lines of id\|text"):
        recordings_of(tmp_path / "LJ", Voice())


def test_libritts_and_neighbours(tmp_path, encoder):
    for file in ("tts/84/121123/84_1.wav", "tts/2035/7/x.wav", "vctk/p225/p225_1.wav", "vctk/p225/p225_2.wav"):
        write(tmp_path / file, wave_of(1.0))
    (tmp_path / "tts/84/121123/84_1.normalized.txt").write_text("a cat\n")
    (tmp_path / "tts/84/121123/84_1.txt").write_text("1 cat")
    (tmp_path / "tts/2035/7/x.txt").write_text("一只猫")
    (tmp_path / "vctk/p225/p225_1.txt").write_text("a dog")
    found = extract(recordings_of(tmp_path / "tts", Voice()), encoder, Rules())
    chinese, english = rows_of(found)
    assert [speech_of(row)["speaker"] for row in (chinese, english)] == ["2035", "84"]
    assert speech_of(chinese)["language"] == "Chinese" and len(chinese["messages"]) == 1
    assert english["messages"][-1]["content"] == "a cat" and english["id"] == "84/121123/84_1.wav"
    found = extract(recordings_of(tmp_path / "vctk", Voice(style="An old man.")), encoder, Rules())
    (row,) = rows_of(found)
    assert speech_of(row)["style"] == "An old man." and found.skipped == {"no_text": 1}
    with pytest.raises(ValueError, match=r"neither metadata\.csv"):
        (tmp_path / "empty").mkdir()
        recordings_of(tmp_path / "empty", Voice())


def test_webdataset(tmp_path, codec, encoder):
    def add(tar, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    sound = io.BytesIO()
    soundfile.write(sound, wave_of(1.0), RATE, format="WAV", subtype="FLOAT")
    emilia = {"text": "a cat", "speaker": "EN_1", "language": "en", "dnsmos": 3.2}
    whole = spoken("b.wav", "a dog")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, parts in {
            "a": {"json": json.dumps(emilia).encode(), "wav": sound.getvalue()},
            "b": {"json": json.dumps(whole).encode(), "wav": sound.getvalue()},
            "c": {"txt": b"hello", "wav": sound.getvalue()},
            "d": {"txt": b"hello"},
            "e": {"json": b"{", "wav": sound.getvalue()},
        }.items():
            for suffix, data in parts.items():
                add(tar, f"{key}.{suffix}", data)
    found = extract(recordings_of(tmp_path / "x.tar", Voice()), encoder, Rules())
    first, second = rows_of(found)
    assert found.skipped == Counter(no_speaker=1, no_recording=1, bad_text=1)
    assert (
        speech_of(first)["speaker"] == "EN_1"
        and speech_of(first)["language"] == "English"
        and "file" not in speech_of(first)
    )
    assert second["messages"][0] == whole["messages"][0] and "file" not in speech_of(second)
    assert codes_of(tmp_path, first) == codes_of(tmp_path, second) == alone(codec, wave_of(1.0))


# ------------------------------------------------------------------------------------------------ long recordings


def words_at(text: str, gap: float = 0.5) -> list[dict]:
    return [{"text": word, "start": i * gap, "end": (i + 1) * gap} for i, word in enumerate(text.split())]


def test_segments_become_pieces_with_their_codes(tmp_path, codec, encoder, tokenizer):
    write(tmp_path / "talk.wav", wave_of(7.2))
    text = "the cat is left. the dog is left of the cat, what do you hear"
    rows = [spoken("talk.wav", text, segments=words_at(text[: text.index(" hear")])), spoken("talk.wav")]
    config = SpeechConfig(min_split_tokens=4, max_split_tokens=400)
    rules = Rules(longest_seconds=1.0, group=lambda texts: groups(texts, tokenizer, config))
    found = extract(recordings_of(jsonl(tmp_path / "t.jsonl", rows), Voice()), encoder, rules)
    pieces = rows_of(found)
    assert found.skipped == {"media_too_large": 1}
    assert [row["messages"][-1]["content"] for row in pieces] == [
        "the cat is left.", "the dog is left of the cat,", "what do you",
    ]  # fmt: skip
    codes = {"codes": "t.spoken-00000.codes.safetensors#0"}
    assert [speech_of(row) for row in pieces] == [
        {**JENNY, **codes, "stop": 80}, {**JENNY, **codes, "start": 80, "stop": 220},
        {**JENNY, **codes, "start": 220},
    ]  # fmt: skip
    assert len(codes_of(tmp_path, pieces[0])) == 288


@pytest.mark.parametrize(
    "segments, reason",
    [
        ([{"text": "a", "start": 0.0, "end": 2.5}], "bad_segments"),
        ([{"text": "a", "start": 0.0, "end": 0.5}, {"text": "b", "start": 0.4, "end": 1.0}], "bad_segments"),
        ([{"text": "a", "start": 0.5, "end": 0.5}], "bad_segments"),
        ([{"text": " ", "start": 0.0, "end": 0.5}], "bad_segments"),
        ([{"text": "a", "start": "0", "end": 0.5}], "bad_segments"),
        ([{"text": "a", "start": 0.0, "end": float("inf")}], "bad_segments"),
        ("x", "bad_segments"),
    ],
)
def test_segments_that_cannot_be(tmp_path, encoder, segments, reason):
    write(tmp_path / "a.wav", wave_of(2.0))
    path = jsonl(tmp_path / "t.jsonl", [spoken("a.wav", segments=segments)])
    found = extract(recordings_of(path, Voice()), encoder, Rules())
    assert found.skipped.total() == 1 and (found.skipped[reason] or found.skipped["not_json"])
    assert "t.jsonl:1" in found.messages[0] and not found.paths


def test_groups_end_where_a_segment_ends(tokenizer):
    config = SpeechConfig(min_split_tokens=3, max_split_tokens=8)
    sentences = ["the cat is left of the dog. a cat,", "a dog", "what do you hear?"]
    assert groups(sentences, tokenizer, config)[0] == range(0, 1)
    words = ["the", "cat", "is", "left", "of", "the", "dog", "what", "do", "you", "hear"]
    for texts in (sentences, words, ["一只猫。", "两只狗"], ["?", "!"]):
        found = groups(texts, tokenizer, config)
        assert [i for group in found for i in group] == list(range(len(texts))) and all(found)
    assert joined(["a cat,", "a dog", "一只猫", "狗。", "naïve", "été"]) == "a cat, a dog一只猫狗。naïve été"


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def recipe_file(tmp_path, codec, tokenizer):
    save_codec(codec, tmp_path / "codec")
    text = f"""
data: {{tokenizer: {tokenizer.path}, seq_length: 512}}
model:
  vocab_size: 25
  vision: null
  audio: null
  speech: {{num_codes: 16, text_vocab_size: 512, codec: {tmp_path / "codec"}, least_codes_per_token: 1.0}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_the_command_makes_codes_and_indexes_the_rows(tmp_path, codec, recipe_file, capsys):
    for i in range(3):
        write(tmp_path / f"data/{i}.wav", wave_of(1.0 + i, i))
    path = jsonl(tmp_path / "data/train.jsonl", [spoken(f"{i}.wav") for i in range(3)] + [spoken("gone.wav")])
    words = [str(recipe_file), "--codes", str(tmp_path / "codec"), "--workers", "1"]
    assert prepare.main([*words, "--data", str(path)]) == 0
    said = capsys.readouterr().out
    assert "3 rows, 0.00 h of sound" in said and "left out (missing_media): 1" in said
    assert "train: 3 of 3 records usable" in said
    from megatron_omni.config.data import SourceConfig
    from megatron_omni.config.load import load_recipe

    builder = SpeechSampleBuilder(load_recipe(str(recipe_file), []))
    made = SourceConfig(name="t", path=str(tmp_path / "data/train.spoken-*.jsonl"))
    (source,) = open_sources([made], tokenizer=builder.tokenizer)
    assert source.facts(0) is not None and len(source) == 3
    for i in range(3):
        codes = alone(codec, wave_of(1.0 + i, i))
        sample = builder.build_sample(source[i])
        assert sample.input_ids[-len(codes) :].tolist() == codes and builder.row_size(source, i).tokens == sample.length
    other = tmp_path / "other"
    save_codec(build_codec(1), other)
    assert prepare.main([str(recipe_file), "--codes", str(other), "--data", str(path)]) == 2
    assert f"fingerprint {build_codec(1).fingerprint[:12]}" in (error := capsys.readouterr().err)
    assert codec.fingerprint[:12] in error


def test_the_command_says_what_is_missing(tmp_path, recipe_file, capsys):
    words = [str(recipe_file), "--codes", str(tmp_path / "codec")]
    assert prepare.main(words) == 2 and "name what to make codes of" in capsys.readouterr().err
    path = jsonl(tmp_path / "t.jsonl", [spoken("gone.wav")])
    for more, said in (
        (["--speaker", "a", "--style", "b"], "give one of the two"),
        (["--trl", "x.jsonl"], "run the command once for each"),
        (["--longest", "0"], "give seconds above 0"),
    ):
        assert prepare.main([*words, "--data", str(path), *more]) == 2 and said in capsys.readouterr().err
    assert prepare.main([words[0], "--data", str(path), "--normalise"]) == 2
    assert "--normalise says how codes are made; give --codes" in capsys.readouterr().err
    assert prepare.main([*words, "--data", str(path)]) == 2
    assert "none of the 1 recordings of 't' can be used; the first: " in capsys.readouterr().err
    assert (
        prepare.main([*words[:2], str(tmp_path), "--data", str(path)]) == 2
        and "no codec here" in capsys.readouterr().err
    )


def test_text_in_words(tmp_path, encoder, monkeypatch):
    write(tmp_path / "a.wav", wave_of(1.0))
    rows = [spoken("a.wav", "It has 80 GB."), spoken("a.wav", "一共80元"), spoken("a.wav", "a cat")]
    recordings = recordings_of(jsonl(tmp_path / "t.jsonl", rows), Voice())
    found = rows_of(extract(recordings, encoder, Rules(normalise=normaliser())))
    assert [speech_of(row).get("text") for row in found] == ["It has eighty gigabytes.", "一共八十元", None]
    assert [row["messages"][-1]["content"] for row in found] == ["It has 80 GB.", "一共80元", "a cat"]
    monkeypatch.setitem(sys.modules, "wetext", None)
    with pytest.raises(ValueError, match=r"wetext cannot be imported .*pip install 'megatron-omni\[speech\]'"):
        normaliser()
