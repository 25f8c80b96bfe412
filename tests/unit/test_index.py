"""Indexes: they change the speed of a run and nothing else, survive interruptions, and are refused when stale."""

import json
import os
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest

from megatron_omni.config.data import SourceConfig
from megatron_omni.data import prepare
from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.index import Fingerprint, index_path, open_index, read_index, tokenizer_digest
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.prepare import index_files
from megatron_omni.data.record import RecordError
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sizes import SizeRule, measure
from megatron_omni.data.sources import JsonlSource, open_source
from megatron_omni.data.summary import mean_tokens, summarise, summary_lines
from megatron_omni.data.tokenizer import load_tokenizer
from tests.unit.tiny_data import (
    assert_equal,
    row,
    tiny_recipe,
    tokenizer_file,
    write_clip,
    write_image,
    write_sound,
    write_source,
)


def test_a_tokenizer_that_is_no_ordinary_file_is_refused_unread(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"tokenizer.json: no ordinary file \(a folder, a pipe or a device\)"):
        tokenizer_digest(tmp_path)


@pytest.fixture
def mixed(tmp_path):
    """42 rows of every kind, with blank lines and rows that cannot be used."""
    for i in range(3):
        write_image(tmp_path / f"{i}.png", level=40 * i, size=(28 * (i + 1), 28 + 30 * i))
        write_sound(tmp_path / f"{i}.wav", 0.5 + i)
    write_clip(tmp_path / "v.mp4", [10, 60, 110, 160], sound=True)
    write_clip(tmp_path / "quiet.mp4", [10, 60, 110])
    (tmp_path / "empty.png").write_bytes(b"")
    rows: list[dict | str] = [row("what is it?", "x" * (1 + 3 * i)) for i in range(20)]
    rows += [row("<image> and <audio>", f"p{i}", images=[f"{i % 3}.png"], audios=[f"{i % 3}.wav"]) for i in range(6)]
    rows += [row("<video>", "v", videos=["v.mp4"]), row("<video><image>", "q", videos=["quiet.mp4"], images=["1.png"])]
    rows += ["", "   ", "{broken", row("<image>"), row("<image>", images=["gone.png"])]
    rows += [row("<image>", images=["empty.png"]), row("<image>", images=["../secret.png"]), {"messages": []}]
    rows += [{"messages": [{"role": "king", "content": "hi"}]}, row("hi", " "), row("long " * 100, "l")]
    rows += [{"messages": [{"role": "user", "content": "no answer"}]}]
    rows += [{"messages": [*row("a", "b")["messages"], {"role": "assistant", "content": "right", "weight": 1}]}]
    rows += [
        {"messages": [row("not to", "learn")["messages"][0], {"role": "assistant", "content": "x", "train": False}]}
    ]
    rows += [
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "s"}], "image": "0.png"}
    ]
    rows += [{"messages": [{"role": "system", "content": "be"}, *row("a", "b")["messages"]]}]
    return write_source(tmp_path, "mixed", rows)


REJECTED = {
    "not_json": 1, "marker_count": 1, "missing_media": 1, "unreadable_media": 1, "path_escape": 1, "bad_type": 1,
    "unknown_role": 1, "empty_answer": 1,
}  # fmt: skip


def index_of(tmp_path, path, **settings):
    index_files([tmp_path / path], tokenizer_file(tmp_path), **settings)
    return read_index(index_path(tmp_path / path))


def test_an_index_changes_nothing_but_the_files_that_planning_opens(tmp_path, mixed, monkeypatch):
    settings = dict(max_bad_fraction=1.0, system_prompt="<image> is a picture", max_frames_with_audio=3)
    plain = StepLoader(tiny_recipe(tmp_path, [mixed], **settings), data_rank=0, data_size=1)
    index_of(tmp_path, "mixed.jsonl")
    quick = StepLoader(tiny_recipe(tmp_path, [mixed], **settings), data_rank=0, data_size=1)
    probed = []
    monkeypatch.setattr("megatron_omni.data.sample.measure", lambda *_: probed.append(1) or measure(*_))
    for _ in range(12):
        a, b = plain.plan(plain._cursor), quick.plan(quick._cursor)
        assert a.micro_batches == b.micro_batches and a.num_samples == b.num_samples
        assert [(s.reason, s.message) for s in a.skips] == [(s.reason, s.message) for s in b.skips]
        seen = len(probed)
        assert_equal(plain.next_step(), quick.next_step())
        assert len(probed) == seen or not quick.sources[0].facts(0)
    assert plain.state_dict() == quick.state_dict()
    assert set(quick.report()) == {*REJECTED, "too_long", "no_answer"}


def test_one_index_serves_any_recipe_with_its_tokenizer(tmp_path, mixed):
    index_of(tmp_path, "mixed.jsonl")
    digest = tokenizer_digest(tokenizer_file(tmp_path))
    source, plain = open_source(mixed, digest=digest), JsonlSource(tmp_path / "mixed.jsonl", name="mixed")
    assert len(source) == len(plain) and [source.where(i) for i in range(len(source))] == [
        plain.where(i) for i in range(len(plain))
    ]
    for settings in (
        dict(),
        dict(max_frames=2, max_frames_with_audio=2),
        dict(use_video_sound=False, video_fps=0.5),
        dict(frame_choice="release", video_fps=3.0),
    ):
        recipe = tiny_recipe(tmp_path, [mixed], **settings)
        assert recipe.model.vision is not None
        recipe.model.vision.max_tiles_per_side = len(settings) + 1
        builder = SampleBuilder(recipe)
        usable = 0
        for i in range(len(plain)):
            try:
                size = builder.sizes.size(source.facts(i))
            except RecordError:
                continue
            sample = builder.build_sample(source[i])
            assert size.tokens == sample.length and size == builder.size(plain[i])
            assert size.tiles == (0 if sample.tiles is None else len(sample.tiles))
            assert size.chunks == (0 if sample.chunks is None else len(sample.chunks))
            usable += 1
        assert usable == 31


def test_a_summary_counts_what_is_there(tmp_path, mixed):
    index_of(tmp_path, "mixed.jsonl")
    recipe = tiny_recipe(tmp_path, [mixed])
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    source, sizes = open_source(mixed, digest=tokenizer_digest(recipe.data.tokenizer)), SizeRule(recipe, tokenizer)
    summary = summarise(source, sizes)
    assert summary["records"] == 42 and summary["usable"] == 31
    assert summary["rejected"] == {**REJECTED, "too_long": 1, "no_answer": 2}
    assert summary["samples_by_class"] == {"text": 22, "image": 7, "video": 2}
    assert summary["media"] == {"image": 8, "audio": 6, "video": 2}
    assert summary["media_seconds"] == {"audio": 9.0, "video": 3.5}
    builder = SampleBuilder(recipe)
    lengths = []
    for i in range(42):
        try:
            lengths.append(builder.build_sample(source[i]).length)
        except (RecordError, MediaError):
            continue
    assert summary["tokens"]["all"] == sum(lengths) == sum(v for k, v in summary["tokens"].items() if k != "all")
    assert sum(summary["length_histogram"].values()) == 31 and summary["tokens_per_sample"]["longest"] == max(lengths)
    assert mean_tokens(source, sizes) == pytest.approx(np.mean(lengths))
    text = "\n".join(summary_lines(summary))
    assert "31 of 42 records usable" in text and "rejected (missing_media): 1; " in text and "mixed.jsonl:33: " in text


def test_parts_join_to_the_same_index_and_survive_an_interruption(tmp_path, mixed, monkeypatch):
    whole = index_of(tmp_path, "mixed.jsonl")
    monkeypatch.setattr(prepare, "_UNIT_BYTES", 300)  # dozens of units, many in the middle of a row
    work, done = prepare._work, []

    def failing(unit):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(unit)
        work(unit)

    monkeypatch.setattr(prepare, "_work", failing)
    with pytest.raises(KeyboardInterrupt):
        index_of(tmp_path, "mixed.jsonl", again=True)
    assert not index_path(tmp_path / "mixed.jsonl").exists()
    parts = tmp_path / "mixed.jsonl.index.parts"
    assert len(list(parts.iterdir())) == 5
    monkeypatch.setattr(prepare, "_work", lambda unit: (done.append(unit), work(unit)))
    joined = index_of(tmp_path, "mixed.jsonl")
    assert len(done) == len({unit.start for unit in done}) > 10 and not parts.exists()  # nothing was done twice
    assert joined.header["lengths"] == whole.header["lengths"]
    for name, array in vars(whole.arrays).items():
        assert np.array_equal(array, getattr(joined.arrays, name)), name
    told: list[int] = []
    index_of(tmp_path, "mixed.jsonl", advance=told.append)  # current: left alone
    assert told == [os.path.getsize(tmp_path / "mixed.jsonl")] and len(done) == len({unit.start for unit in done})


def test_an_array_has_the_index_of_its_rows(tmp_path, mixed, monkeypatch):
    lines = [line for line in (tmp_path / "mixed.jsonl").read_text().split("\n") if line.strip() and line != "{broken"]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    (tmp_path / "items.json").write_text("[" + " ,\n".join(lines) + "]")
    one = index_of(tmp_path, "lines.jsonl")
    monkeypatch.setattr(prepare, "_UNIT_BYTES", 500)
    for workers in (1, 2):
        two = index_of(tmp_path, "items.json", workers=workers, again=True)
        for name in set(one.arrays.records.dtype.names) - {"start", "num_bytes", "crc"}:
            assert (one.arrays.records[name] == two.arrays.records[name]).all(), name
        assert (one.arrays.media == two.arrays.media).all() and (one.arrays.rejections == two.arrays.rejections).all()
    digest = tokenizer_digest(tokenizer_file(tmp_path))
    sources = [
        open_source(SourceConfig(name="a", path=str(tmp_path / name)), digest=digest)
        for name in ("lines.jsonl", "items.json")
    ]
    for row_number in (0, 21, 26):
        a, b = (source[row_number] for source in sources)
        assert replace(a, where="") == replace(b, where="") and b.where == f"{tmp_path}/items.json[{row_number}]"


def test_processes_give_the_same_bytes(tmp_path, mixed, monkeypatch):
    alone = index_of(tmp_path, "mixed.jsonl").path.read_bytes()
    monkeypatch.setattr(prepare, "_UNIT_BYTES", 2000)
    assert index_of(tmp_path, "mixed.jsonl", again=True, workers=2).path.read_bytes() == alone


def test_a_stale_index_is_refused(tmp_path, mixed):
    path = tmp_path / "mixed.jsonl"
    index_of(tmp_path, "mixed.jsonl")
    digest = tokenizer_digest(tokenizer_file(tmp_path))
    assert open_index(path, tokenizer=digest) is not None
    with pytest.raises(ValueError, match=r"mixed.jsonl.index: stale, .*another tokenizer; run megatron-omni prepare"):
        open_index(path, tokenizer="f" * 64)
    text = path.read_text()
    path.write_text(text.replace("p3", "p7"))
    with pytest.raises(
        ValueError, match=r"data source 'mixed': .*stale, 'mixed.jsonl' has changed.*run megatron-omni prepare"
    ):
        StepLoader(tiny_recipe(tmp_path, [mixed]), data_rank=0, data_size=1)
    index_of(tmp_path, "mixed.jsonl")  # made anew
    assert open_index(path, tokenizer=digest) is not None
    moved = replace(mixed, root=str(tmp_path))
    with pytest.raises(ValueError, match=r"stale, it was made with root = '', not '.*run megatron-omni prepare"):
        StepLoader(tiny_recipe(tmp_path, [moved]), data_rank=0, data_size=1)
    index_of(tmp_path, "mixed.jsonl", root=str(tmp_path))
    assert StepLoader(tiny_recipe(tmp_path, [moved]), data_rank=0, data_size=1).sources[0].facts(20).media
    index_of(tmp_path, "mixed.jsonl")
    data = index_path(path).read_bytes()
    for damaged in (data[:-10], b"hello", data.replace(b'"version": 2', b'"version": 9'), data[:40], b""):
        index_path(path).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"no usable index \(.*\); run megatron-omni prepare again"):
            open_index(path, tokenizer=digest)
    index_of(tmp_path, "mixed.jsonl")
    assert index_path(path).read_bytes() == data


def test_a_row_that_changed_unseen_is_a_skip(tmp_path):
    """Same size and same bytes at the places that are compared: the row's checksum tells."""
    rows = [row("what?", "x" * 100 + f"{i:06d}") for i in range(9000)]
    config = write_source(tmp_path, "big", rows)
    index_of(tmp_path, "big.jsonl")
    data = bytearray((tmp_path / "big.jsonl").read_bytes())
    place = data.index(b"000300")
    data[place : place + 6] = b"777777"
    (tmp_path / "big.jsonl").write_bytes(data)
    source = open_source(config, digest=tokenizer_digest(tokenizer_file(tmp_path)))
    with pytest.raises(RecordError, match=r"big.jsonl:301: .*has changed since the index was made") as caught:
        source[300]
    assert caught.value.reason == "stale_index" and source[299].answer.endswith("000299")
    assert asdict(Fingerprint.of(tmp_path / "big.jsonl")) == source.index.header["data"]
    for end in (0, -1):  # both are among the places that are compared
        other = bytearray(data)
        other[end] ^= 1
        (tmp_path / "big.jsonl").write_bytes(other)
        assert asdict(Fingerprint.of(tmp_path / "big.jsonl")) != source.index.header["data"]


def test_several_files_are_one_source(tmp_path):
    for part in range(3):
        write_source(tmp_path, f"part_{part}", [row(f"q{part}{i}") for i in range(4 + part)])
    config = write_source(tmp_path, "other", [row("x")])
    config.path = str(tmp_path / "part_{0..2}.jsonl")
    source = open_source(config, digest="")
    assert len(source) == 15 and source[4].messages[0].content == "q10" and source[14].messages[0].content == "q25"
    assert source.where(9).endswith("part_2.jsonl:1") and source.facts(0) is None and source.flags() is None
    index_files([tmp_path / f"part_{i}.jsonl" for i in range(3)], tokenizer_file(tmp_path))
    quick = open_source(config, digest=tokenizer_digest(tokenizer_file(tmp_path)))
    assert [quick[i] for i in range(15)] == [source[i] for i in range(15)] and [
        len(file) for file in quick.flags()
    ] == [4, 5, 6]
    with pytest.raises(IndexError, match="has 15 rows, asked for row 15"):
        quick[15]


def test_hostile_headers_and_long_messages_stay_one_rejection(tmp_path):
    rows = [row("<audio>", audios=["long.wav"]), row("<image>", images=["bomb.png"]), {"messages": "x" * 100_000}]
    config = write_source(tmp_path, "hostile", rows)
    header = b"RIFF" + (0x7FFFFFF0).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    header += (1).to_bytes(2, "little") + (1).to_bytes(2, "little") + (16000).to_bytes(4, "little")
    header += (32000).to_bytes(4, "little") + (2).to_bytes(2, "little") + (16).to_bytes(2, "little")
    (tmp_path / "long.wav").write_bytes(header + b"data" + (36000 * 32000).to_bytes(4, "little") + b"\0" * 100)
    ihdr = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    png = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + ihdr + zlib.crc32(ihdr).to_bytes(4, "big")
    idat = b"IDAT" + zlib.compress(b"\0" * 100)
    png += (len(idat) - 4).to_bytes(4, "big") + idat + zlib.crc32(idat).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(png)
    index = index_of(tmp_path, "hostile.jsonl")
    found = {number: (reason, message) for number, reason, message in index.rejections()}
    assert found[1][0] in ("media_too_large", "unreadable_media") and "pixels" in found[1][1]
    assert found[2][0] == "bad_type" and len(found[2][1]) < 2100
    # The library cuts the promise of the sound to what the file holds, or the file is refused: never 10 planned hours.
    source = open_source(config, digest=tokenizer_digest(tokenizer_file(tmp_path)))
    assert 0 in found or source.facts(0).media[0].samples <= 100
    assert json.loads(json.dumps(found))
