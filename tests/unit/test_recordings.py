"""Speech data as people have it, written here as their own tools write it: F5-TTS, CosyVoice, Emilia, LibriTTS in tars."""

import csv
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import soundfile

from megatron_omni.data.assemble import assemble
from megatron_omni.data.errors import RecordError
from megatron_omni.data.extract import Rules, extract
from megatron_omni.data.record import parse_record
from megatron_omni.data.recording_rows import Recording, Recordings, Voice
from megatron_omni.data.recordings import recordings_of
from tests.unit.test_extract import (  # noqa: F401  (fixtures)
    RATE,
    Encoder,
    alone,
    codec,
    codes_of,
    encoder,
    jsonl,
    rows_of,
    speech_of,
    spoken,
    wave_of,
    write,
)

JENNY = Voice(speaker="Jenny")
EMILIA = {
    "id": "EN_B00000_S00000_W000000", "wav": "EN_B00000/EN_B00000_S00000/mp3/EN_B00000_S00000_W000000.mp3",
    "text": " You can help my mother.", "duration": 1.2, "speaker": "EN_B00000_S00000", "language": "en", "dnsmos": 3.2927,
}  # fmt: skip


def mp3_of(seconds: float, seed: int = 0) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, wave_of(seconds, seed, 24000), 24000, format="MP3")
    return data.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def outcome(recordings: Recordings) -> tuple[dict[str, Recording], dict[str, RecordError]]:
    """What can be read, by the row's id, and what cannot, by the end of its place."""
    good, bad = {}, {}
    for number, place in enumerate(recordings.places):
        try:
            recording = recordings.read(number)
            good[recording.row["id"]] = recording
        except RecordError as error:
            assert place in str(error)
            bad[place.rpartition("/")[2]] = error
    return good, bad


# ------------------------------------------------------------------------------------------------ F5-TTS


def test_the_table_of_f5_tts(tmp_path, codec, encoder) -> None:  # noqa: F811
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs/a.mp3").write_bytes(mp3_of(1.0))
    write(tmp_path / "wavs/b.wav", wave_of(0.5, 1))
    with (tmp_path / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file, delimiter="|")
        table.writerow(["audio_file", "text"])
        table.writerow(["wavs/a.mp3", '"Yes | no," he said.'])
        table.writerow(["wavs/b.wav", "一只猫"])
        file.write('\nwavs/b.wav|"Yes," he said.\nwavs/b.wav|a|b\nwavs/b.wav\nwavs/b.wav| \n|a cat\n')
        file.write("../b.wav|a cat\nwavs/gone.wav|a cat\n")
    found = extract(recordings_of(tmp_path, JENNY), encoder, Rules())
    english, chinese = rows_of(found)
    assert english["messages"][-1]["content"] == '"Yes | no," he said.' and english["id"] == "wavs/a.mp3"
    assert speech_of(english)["speaker"] == "Jenny" and speech_of(english)["file"] == "wavs/a.mp3"
    assert speech_of(chinese)["language"] == "Chinese" and found.seconds == pytest.approx(1.5, abs=0.1)
    assert found.skipped == Counter(bad_table=3, no_text=1, no_recording=1, path_escape=1, missing_media=1)
    lines = [int(message.split("metadata.csv:")[1].split(":")[0]) for message in found.messages]
    assert lines == [5, 6, 7, 8, 9, 10, 11]
    assert "double the quotes" in found.messages[0] and "3 cells and the first line 2" in found.messages[1]


def test_a_table_with_speakers_and_one_without_a_first_line(tmp_path: Path) -> None:
    for name, text in (
        ("coqui", "audio_file|text|speaker_name|emotion_name\nx/a.wav|a cat|Anna|neutral\nx/b.wav|a dog||neutral\n"),
        ("plain", "a|a cat\nb.flac|a dog\nwavs/c.wav|hello\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.csv").write_text(text)
    good, bad = outcome(recordings_of(tmp_path / "coqui", Voice()))
    assert good["x/a.wav"].speech["speaker"] == "Anna" and good["x/a.wav"].speech["file"] == "x/a.wav"
    assert bad["metadata.csv:3"].reason == "no_speaker" and "--speaker NAME" in str(bad["metadata.csv:3"])
    good, bad = outcome(recordings_of(tmp_path / "plain", JENNY))
    assert [each.speech["file"] for each in good.values()] == ["wavs/a.wav", "wavs/b.flac", "wavs/c.wav"] and not bad
    with pytest.raises(ValueError, match=r"--root .* leave --root out"):
        recordings_of(tmp_path / "plain", JENNY, root=str(tmp_path))


# ------------------------------------------------------------------------------------------------ CosyVoice


def cosyvoice(folder: Path, **tables: str) -> Path:
    folder.mkdir()
    for name, text in tables.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_the_tables_of_cosyvoice(tmp_path, codec, encoder) -> None:  # noqa: F811
    corpus = tmp_path / "corpus"
    for name in ("84/121/84_1.wav", "84/121/84_2.wav", "85/with space.wav"):
        write(corpus / name, wave_of(0.5, len(name)))
    folder = cosyvoice(
        tmp_path / "train",
        wav_scp=f"84_1 {corpus}/84/121/84_1.wav\n84_2 84/121/84_2.wav\n85_1\t85/with space.wav\n86 sph2pipe x |\n"
        "87 84/121/84_2.wav\n88 84/121/84_2.wav\n89 84/121/84_2.wav\n89 84/121/84_1.wav\n90 /etc/x.wav\n",
        text="84_1 a cat\n84_2 a  dog, it is\n85_1 一只猫\n86 a\n88 hello\n89 a\n90 a\n91 no sound\n",
        utt2spk="84_1 84\n84_2 84\n85_1 85\n86 85\n87 85\n89 85\n90 85\n91 85\n",
        spk2utt="84 84_1 84_2\n85 85_1 86 87 89 90 91\n",
    )
    found = extract(recordings_of(folder, Voice(), root=str(corpus)), encoder, Rules())
    assert [path.parent for path in found.paths] == [corpus] and found.paths[0].name == "train.spoken-00000.jsonl"
    rows = {row["id"]: row for row in rows_of(found)}
    said = {
        key: (row["messages"][-1]["content"], speech_of(row)["speaker"], speech_of(row)["file"])
        for key, row in rows.items()
    }
    assert said == {
        "84_1": ("a cat", "84", "84/121/84_1.wav"),
        "84_2": ("a  dog, it is", "84", "84/121/84_2.wav"),
        "85_1": ("一只猫", "85", "85/with space.wav"),
    }
    _, bad = outcome(recordings_of(folder, Voice(), root=str(corpus)))
    assert {place: error.reason for place, error in bad.items()} == {
        "wav.scp:4": "no_recording", "wav.scp:5": "no_text", "wav.scp:6": "no_speaker", "wav.scp:7": "double_name",
        "wav.scp:9": "path_escape", "text:8": "no_recording",
    }  # fmt: skip
    assert "lines 7, 8" in str(bad["wav.scp:7"]) and "is a command" in str(bad["wav.scp:4"])
    assert found.skipped == Counter(error.reason for error in bad.values())


def test_speakers_of_spk2utt_and_what_a_folder_lacks(tmp_path: Path) -> None:
    tables = {"wav_scp": "a a.wav\nb b.wav\n", "text": "a one\nb two\n"}
    folder = cosyvoice(tmp_path / "turned", **tables, spk2utt="Anna a\nZoe b\n")
    (good, _) = outcome(recordings_of(folder, Voice()))
    assert {key: each.speech["speaker"] for key, each in good.items()} == {"a": "Anna", "b": "Zoe"}
    (good, _) = outcome(recordings_of(folder, Voice(style="An old man.")))
    assert good["a"].speech["style"] == "An old man." and "speaker" not in good["a"].speech
    with pytest.raises(ValueError, match=r"wav\.scp without the file text"):
        recordings_of(cosyvoice(tmp_path / "no text", wav_scp="a a.wav\n"), Voice())
    before = recordings_of(folder, Voice()).fingerprint
    (folder / "spk2utt").write_text("Zoe a b\n")
    assert recordings_of(folder, Voice()).fingerprint != before


# ------------------------------------------------------------------------------------------------ Emilia


def test_emilia(tmp_path, codec, encoder) -> None:  # noqa: F811
    """Its JSONL beside unpacked folders, its tars, and its tars unpacked."""
    sound = mp3_of(1.2)
    file = tmp_path / EMILIA["wav"]
    file.parent.mkdir(parents=True)
    file.write_bytes(sound)
    yodas = {"_id": "DE_1", "text": "eine Katze", "speaker": "DE_S", "language": "de", "dnsmos": 3.1, "phone_count": 21}
    bad = [{**EMILIA, "text": ["a"]}, {**EMILIA, "speaker": None}, {**EMILIA, "wav": ""}, {**EMILIA, "wav": "../x.mp3"}]
    rows = extract(recordings_of(jsonl(tmp_path / "EN_B00000.jsonl", [EMILIA, *bad]), Voice()), encoder, Rules())
    assert rows.skipped == Counter(bad_type=1, no_speaker=1, no_recording=1, path_escape=1)
    assert "EN_B00000.jsonl:2" in rows.messages[0]
    tar = tar_of(
        tmp_path / "EN-B000000.tar",
        {f"{EMILIA['id']}.mp3": sound, f"{EMILIA['id']}.json": json.dumps(EMILIA).encode(),
         "DE_1.json": json.dumps(yodas).encode(), "DE_1.mp3": sound},
    )  # fmt: skip
    folder = tmp_path / "unpacked" / "EN-B000000"
    folder.mkdir(parents=True)
    for name, data in (("a.mp3", sound), ("a.json", json.dumps(EMILIA).encode()), ("b.mp3", sound), ("b.json", b"[1]")):
        (folder / name).write_bytes(data)
    tars = extract(recordings_of(tar, Voice()), encoder, Rules())
    tree = extract(recordings_of(tmp_path / "unpacked", Voice()), encoder, Rules())
    assert tree.skipped == Counter(bad_type=1) and not tars.skipped
    (row,), (packed, german), (unpacked,) = rows_of(rows), rows_of(tars), rows_of(tree)
    for each in (row, packed, unpacked):
        assert (each["id"], each["dnsmos"]) == (EMILIA["id"], 3.2927)
        assert each["messages"][-1]["content"] == "You can help my mother."
        assert (speech_of(each)["speaker"], speech_of(each)["language"]) == ("EN_B00000_S00000", "English")
    assert speech_of(row)["file"] == EMILIA["wav"] and "file" not in speech_of(packed)
    assert speech_of(unpacked)["file"] == "EN-B000000/a.mp3"
    assert (german["id"], speech_of(german)["language"]) == ("DE_1", "German") and len(german["messages"]) == 1


# ------------------------------------------------------------------------------------------------ tars


def wav_bytes(seed: int) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, wave_of(0.5, seed), RATE, format="WAV", subtype="FLOAT")
    return data.getvalue()


def test_a_tar_of_libritts_folders(tmp_path, codec, encoder) -> None:  # noqa: F811
    """Members in the order in which a disk has them, with the tables of a chapter between them."""
    chapter = "LibriTTS/dev-clean/84/121123/"
    tar = tar_of(
        tmp_path / "dev-clean.tar",
        {
            f"{chapter}84_1.wav": wav_bytes(1), f"{chapter}84_2.wav": wav_bytes(2),
            f"{chapter}84_121123.trans.tsv": b"84_1\tone cat\ta cat\n",
            f"{chapter}84_2.normalized.txt": b"a dog\n", f"{chapter}84_1.original.txt": b"1 cat",
            f"{chapter}84_1.normalized.txt": b"a cat\n", f"{chapter}84_3.normalized.txt": b"no sound",
        },
    )  # fmt: skip
    found = extract(recordings_of(tar, Voice()), encoder, Rules())
    rows = rows_of(found)
    assert [(row["id"][-4:], row["messages"][-1]["content"], speech_of(row)["speaker"]) for row in rows] == [
        ("84_1", "a cat", "84"), ("84_2", "a dog", "84"),
    ]  # fmt: skip
    assert found.skipped == Counter(no_recording=1)
    for row, seed in zip(rows, (1, 2)):
        assert codes_of(tmp_path, row) == alone(codec, wave_of(0.5, seed))
    good, _ = outcome(recordings_of(tar, Voice(speaker="Anna")))
    assert {each.speech["speaker"] for each in good.values()} == {"Anna"}


def question(file: str | None) -> dict:
    row = spoken(file, "a cat")
    row["messages"][0]["content"] = "<audio>what is it?"
    return row


@pytest.mark.parametrize("named", ["answer.wav", "x.answer.wav"])
def test_speech_file_names_the_sound_of_a_key_with_several(tmp_path, codec, encoder, named) -> None:  # noqa: F811
    rows = {"x": question(named), "y": question("gone.wav"), "z": question(None)}
    if named == "answer.wav":  # else it is left to the members
        rows["x"]["audios"] = ["question.wav"]
    members = {}
    for key, row in rows.items():
        members |= {f"{key}.json": json.dumps(row).encode(), f"{key}.question.wav": wav_bytes(3)}
        members |= {f"{key}.answer.wav": wav_bytes(4)}
    tar = tar_of(tmp_path / "t.tar", members)
    found = extract(recordings_of(tar, Voice()), encoder, Rules())
    (row,) = rows_of(found)
    assert row["messages"] == [{**rows["x"]["messages"][1], "speech": speech_of(row)}] and "audios" not in row
    assert speech_of(row).keys() == {"speaker", "codes"} and found.skipped == Counter(no_recording=2)
    assert "names none of question.wav, answer.wav" in found.messages[0] and "2 sounds of one key" in found.messages[1]
    assert codes_of(tmp_path, row) == alone(codec, wave_of(0.5, 4))


def test_a_question_does_not_show_the_recording_of_its_answer() -> None:
    """Of a tar whose rows a language model learns: a sound that ``speech.file`` names is none of ``audios``."""
    both = {"question.wav": "x.question.wav", "answer.wav": "x.answer.wav"}
    for named in ("answer.wav", "x.answer.wav"):
        row = assemble("x", both, where="x", text=None, metadata=question(named))
        assert parse_record(row).audios == ("x.question.wav",)
    alone_there = {"answer.wav": "y.answer.wav"}
    row = assemble("y", alone_there, where="y", text=None, metadata=spoken("answer.wav", "a dog"))
    assert parse_record(row).audios == ()
    with pytest.raises(RecordError, match="marker"):
        parse_record(assemble("y", alone_there, where="y", text=None, metadata=spoken("other.wav", "a dog")))
