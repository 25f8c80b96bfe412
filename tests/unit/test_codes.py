"""Files of codes: what is written is read, in place; damage and another codec are named."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.data.codes import (
    CodecOf,
    CodesFile,
    code_range,
    codec_fingerprint,
    codes_between,
    open_codes,
    write_codes,
)
from megatron_omni.data.errors import RecipeError
from megatron_omni.data.spoken import CodesAt, Speech

KIND = {"fingerprint": "f" * 64, "num_codes": 300, "codes_per_second": 40.0}
RECORDINGS = [[1, 2, 299], [], [7, 0, 7, 8]]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.codes.safetensors"
    write_codes(path, RECORDINGS, about={"made_of": "x"}, **KIND)
    return path


def speech(codes, **fields) -> Speech:
    return Speech(spoken="a", prompt="b", codes=codes, **fields)


def test_what_is_written_is_read(file, tmp_path):
    opened = open_codes(file)
    assert [opened.codes(i).tolist() for i in range(len(opened))] == RECORDINGS
    assert [opened.length(i) for i in range(3)] == [3, 0, 4]
    assert opened.codes(2, 1, 3).tolist() == [0, 7] and opened.codes(2).dtype == np.uint16
    assert (opened.fingerprint, opened.num_codes, opened.codes_per_second) == tuple(KIND.values())
    assert opened.about["made_of"] == "x" and open_codes(str(file)) is opened
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_that_was_written_anew_is_opened_anew(file):
    before = open_codes(file)
    data = file.read_bytes()
    write_codes(file, RECORDINGS, about={"made_of": "x"}, **KIND)
    assert file.read_bytes() == data
    write_codes(file, [[5] * 9], **KIND)
    assert open_codes(file).codes(0).tolist() == [5] * 9 and before.length(0) == 3


def test_ranges_of_an_answer(file):
    at = CodesAt(str(file), 2)
    assert code_range(speech(at)) == range(0, 4) and code_range(speech((5, 6, 7), start=1)) == range(1, 3)
    assert codes_between(speech(at), 1, 4) == [0, 7, 8] and codes_between(speech((5, 6, 7)), 0, 2) == (5, 6)
    for bad, said in (
        (speech(None), "has no codes; run megatron-omni prepare --codes"),
        (speech(CodesAt(str(file), 3)), r"#3: the file holds 3 recordings"),
        (speech(CodesAt(str(file), 1)), "0 to 0 of a recording that has 0"),
        (speech(at, start=4), "4 to 4 of a recording that has 4"),
        (speech(at, stop=5), "0 to 5 of a recording that has 4"),
        (speech(CodesAt(str(file) + "x", 0)), "no file of codes"),
    ):
        with pytest.raises(ValueError, match=said):
            code_range(bad)
    with pytest.raises(ValueError, match="codes 2 to 9 of a recording that has 4"):
        open_codes(file).codes(2, 2, 9)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "offsets", "behind", "wide", "fifo"])
def test_damaged_files_are_named(file, damage):
    data = file.read_bytes()
    arrays = {"codes": np.zeros(3, np.uint16), "offsets": np.array([0, 3])}
    about = {"about": json.dumps(KIND)}
    if damage in ("cut", "empty", "other"):
        file.write_bytes({"cut": data[:-3], "empty": b"", "other": b"x" * 400}[damage])
    elif damage == "fifo":
        import os

        file.unlink()
        os.mkfifo(file)
    else:
        changed = {"offsets": {"offsets": np.array([0, 2, 1, 3])}, "behind": {"offsets": np.array([0, 4])}}
        save_file(arrays | changed.get(damage, {"codes": np.zeros(3, np.int32)}), file, metadata=about)
    with pytest.raises(ValueError, match=r"train.codes.safetensors.*run megatron-omni prepare --codes again"):
        CodesFile(file)


def test_a_codebook_beyond_two_bytes_is_refused(tmp_path):
    path = tmp_path / "x.codes.safetensors"
    write_codes(path, [[65535]], **{**KIND, "num_codes": 65536})
    assert open_codes(path).codes(0).tolist() == [65535]
    with pytest.raises(ValueError, match="65537 entries"):
        write_codes(path, [[1]], **{**KIND, "num_codes": 65537})


def test_codes_of_another_codec_end_the_run(file, tmp_path):
    folder = tmp_path / "codec"
    folder.mkdir()
    (folder / "codec.json").write_text(json.dumps({"fingerprint": "e" * 64, "config": {}}))
    answer = speech(CodesAt(str(file), 0))
    own = SpeechConfig(num_codes=300, codec=str(folder))
    with pytest.raises(
        RecipeError, match=r"fingerprint ffffffffffff, and model.speech.codec = .*codec' has eeeeeeeeeeee"
    ):
        CodecOf(own).check(answer)
    CodecOf(own).check(speech((1, 2)))
    (folder / "codec.json").write_text(json.dumps({"fingerprint": "f" * 64, "config": {}}))
    CodecOf(own).check(answer)
    CodecOf(SpeechConfig(num_codes=300)).check(answer)
    CodecOf(SpeechConfig(num_codes=300, codec_fingerprint="f" * 64)).check(answer)
    with pytest.raises(RecipeError, match=r"fingerprint ffffffffffff, and this model learned codes of eeeeeeeeeeee"):
        CodecOf(SpeechConfig(num_codes=300, codec_fingerprint="e" * 64)).check(answer)
    with pytest.raises(RecipeError, match=r"num_codes = 300 of its codec, and model.speech.num_codes = 4096"):
        CodecOf(SpeechConfig()).check(answer)
    with pytest.raises(RecipeError, match=r"codes_per_second = 40 .* = 50"):
        CodecOf(SpeechConfig(num_codes=300, codes_per_second=50.0)).check(answer)
    (folder / "codec.json").write_text("[]")
    with pytest.raises(ValueError, match="names no fingerprint"):
        codec_fingerprint(folder)
    with pytest.raises(ValueError, match=r"no codec\.json there"):
        CodecOf(SpeechConfig(codec=str(tmp_path / "gone")))
    # What a checkpoint knows needs no folder, which may lie elsewhere by now.
    assert CodecOf(SpeechConfig(codec=str(tmp_path / "gone"), codec_fingerprint="5d2a")).fingerprint == "5d2a"
