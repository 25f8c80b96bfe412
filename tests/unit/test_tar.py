"""WebDataset tars and folders: read in place, also as Energon prepares them; hostile and damaged ones are refused."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from megatron_omni.cli import prepare
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.shards import expand_braces, shard_paths
from megatron_omni.data.folder import records_of_folder
from megatron_omni.data.index import index_path, read_index, tokenizer_digest
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.prepare import index_files
from megatron_omni.data.record import RecordError
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sources import JsonlSource, open_source
from megatron_omni.data.tar import tar_samples
from tests.unit.tiny_data import row, tiny_recipe, tokenizer_file, write_clip, write_image, write_sound


def _has_energon() -> bool:
    try:
        return importlib.util.find_spec("megatron.energon") is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture
def media(tmp_path):
    """Bytes of a picture, a sound and a clip."""
    write_image(tmp_path / "a.png", size=(56, 28), level=77)
    write_sound(tmp_path / "a.wav", 1.5)
    write_clip(tmp_path / "a.mp4", [10, 60, 110], sound=True)
    return {suffix: (tmp_path / f"a.{suffix}").read_bytes() for suffix in ("png", "wav", "mp4")}


def write_tar(path: Path, members: list[tuple[str, bytes | str | dict]], **kinds) -> Path:
    """Members by name; ``kinds`` gives a name's tar type and link target."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name in kinds:
                info.type, info.linkname, info.size = *kinds[name], 0
            tar.addfile(info, io.BytesIO(data) if info.size else None)
    return path


def indexed(tmp_path, path: str, **config):
    source = SourceConfig(name="tars", path=path, **config)
    index_files(shard_paths(path), tokenizer_file(tmp_path), prompt=source.prompt)
    return source, open_source(source, digest=tokenizer_digest(tokenizer_file(tmp_path)))


def rejections(tar: Path) -> dict[str, tuple[str, str]]:
    index = read_index(index_path(tar))
    return {index.stored_row(i)["id"]: (reason, message) for i, reason, message in index.rejections()}


def test_members_are_read_in_place_and_give_the_samples_of_files(tmp_path, media):
    turns = row("<video> and <image>", "both")["messages"]
    tar = write_tar(
        tmp_path / "shards" / "s.tar",
        [
            ("set/0001.png", media["png"]), ("set/0001.txt", " a wide picture\n"),
            ("set/0002.wav", media["wav"]), ("set/0002.json", {"caption": "a tone", "question": "what do you hear?"}),
            ("set/0003.left.png", media["png"]), ("set/0003.mp4", media["mp4"]), ("set/0003.json", {"messages": turns}),
            ("set/0004.json", row("no media", "text")),
        ],
    )  # fmt: skip
    source, opened = indexed(tmp_path, str(tar), prompt="what is it?")
    assert len(opened) == 4 and [opened.where(i) for i in range(4)] == [f"{tar}:set/000{i}" for i in (1, 2, 3, 4)]
    rows = [
        row("<image>\nwhat is it?", "a wide picture", images=["a.png"]),
        row("<audio>\nwhat do you hear?", "a tone", audios=["a.wav"]),
        row("<video> and <image>", "both", videos=["a.mp4"], images=["a.png"]),
        row("no media", "text"),
    ]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files, builder = JsonlSource(tmp_path / "same.jsonl", name="f"), SampleBuilder(tiny_recipe(tmp_path, [source]))
    for i in range(4):
        inside, outside = builder.build_sample(opened[i]), builder.build_sample(files[i])
        assert builder.sizes.size(opened.facts(i)) == builder.size(files[i]) == builder.size(opened[i])
        for name, value in vars(outside).items():
            other = getattr(inside, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    loader = StepLoader(tiny_recipe(tmp_path, [source], num_workers=1), data_rank=0, data_size=1)
    assert sum(batch.num_samples for batch in loader.next_step()) == 8 and not loader.report()
    loader.close()


def test_hostile_and_damaged_members_cost_their_sample(tmp_path, media):
    caption = "a caption"
    names = ["good/1", "/abs/2", "a/../3", "sym", "hard", "dev", "twice", "no_text", "bad", "good/9"]
    members: list = [(f"{name}.txt", caption) for name in names if name not in ("no_text", "bad", "twice")]
    members += [("no_text.png", media["png"]), ("bad.png", media["png"][:40]), ("bad.txt", caption)]
    members += [("twice.png", media["png"]), ("twice.PNG", media["png"]), ("twice.txt", caption)]
    members += [(f"{name}.png", media["png"]) for name in names[:6]] + [("json.json", "{"), ("json.png", media["png"])]
    members += [("utf.txt", b"\xff\xfe"), ("utf.png", media["png"]), ("last.png", media["png"]), ("last.txt", caption)]
    members = sorted(members, key=lambda m: m[0].rpartition("/")[0] + m[0].rpartition("/")[2].partition(".")[0])
    kinds = {
        "sym.png": (tarfile.SYMTYPE, "/etc/passwd"), "hard.png": (tarfile.LNKTYPE, "good/1.png"),
        "dev.png": (tarfile.CHRTYPE, ""),
    }  # fmt: skip
    tar = write_tar(tmp_path / "s.tar", members, **kinds)
    source, opened = indexed(tmp_path, str(tar))
    found = rejections(tar)
    expected = {
        "/abs/2": ("unsafe_member", "is an absolute path"), "a/../3": ("unsafe_member", "climbs out with '..'"),
        "sym": ("unsafe_member", "is a symbolic link"), "hard": ("unsafe_member", "is a hard link"),
        "dev": ("unsafe_member", "is no ordinary file"), "twice": ("unsafe_member", "is there twice"),
        "no_text": ("no_text", "no answer in words"), "bad": ("unreadable_media", "s.tar:bad.png"),
        "good/9": ("no_media", "without the medium"), "json": ("not_json", "not valid JSON"), "utf": ("bad_text", "not UTF-8 text"),
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for key, (reason, text) in expected.items():
        assert found[key][0] == reason and text in found[key][1], key
    with pytest.raises(RecordError, match=r"s.tar:sym: .*is a symbolic link"):
        opened[[opened.where(i) for i in range(len(opened))].index(f"{tar}:sym")]
    loader = StepLoader(tiny_recipe(tmp_path, [source], max_bad_fraction=1.0), data_rank=0, data_size=1)
    for _ in range(4):
        loader.next_step()
    assert loader.report().keys() == {reason for reason, _ in expected.values()}


def test_a_caption_without_its_medium_is_refused(tmp_path, media):
    png = media["png"]
    tars: dict[str, tuple[list, dict[str, str]]] = {
        "missing": ([("1.png", png), ("1.txt", "one"), ("2.txt", "two")], {"2": "no_media"}),
        "by type": ([(f"{i}.{s}", png if s == "png" else "c") for s in ("png", "txt") for i in (1, 2)],
                    {"1": "no_media", "2": "no_media"}),
        "null": ([("1.json", {"caption": "x", "messages": None}), ("2.png", png), ("2.json", {"caption": None}), ("2.txt", "t")],
                 {"1": "no_media"}),
        "text": ([("1.json", row("q", "a text record says messages"))], {}),
    }  # fmt: skip
    for title, (members, expected) in tars.items():
        tar = write_tar(tmp_path / f"{title}.tar", members)
        _, opened = indexed(tmp_path, str(tar))
        found = rejections(tar)
        assert {key: reason for key, (reason, _) in found.items() if reason != "no_text"} == expected, title
        assert all("neighbours: tar --sort=name" in text for reason, text in found.values() if reason == "no_media")
        usable = [record for i in range(len(opened)) if (record := _usable(opened, i))]
        assert all(record.images for record in usable) != (title == "text")
        assert len(usable) == {"missing": 1, "by type": 0, "null": 1, "text": 1}[title]


def _usable(opened, i: int):
    try:
        return opened[i]
    except RecordError:
        return None


def test_what_systems_leave_beside_files_is_no_member(tmp_path, media):
    members: list = [("__MACOSX/x/._0.png", b"\0"), (".DS_Store", b"\0")]
    for i in range(3):
        members += [
            (f"._{i}.png", b"\0\5\x16\7"),
            (f"{i}.png", media["png"]),
            (f"._{i}.txt", b"\0"),
            (f"{i}.txt", f"n {i}"),
        ]
    tar = write_tar(tmp_path / "mac.tar", [*members, ("Thumbs.db", b"x")])
    _, opened = indexed(tmp_path, str(tar))
    assert [opened[i].answer for i in range(len(opened))] == ["n 0", "n 1", "n 2"] and not rejections(tar)


def test_tars_one_behind_the_other_are_one(tmp_path, media):
    tar, parts = tmp_path / "all.tar", []
    for number in range(3):
        members: list = [m for i in range(2) for m in ((f"{i}.png", media["png"]), (f"{i}.txt", f"tar {number}, {i}"))]
        parts.append(write_tar(tmp_path / f"{number}.tar", members).read_bytes())
    tar.write_bytes(parts[0] + bytes(3 << 20) + parts[1] + parts[2])
    _, opened = indexed(tmp_path, str(tar))
    assert [opened[i].answer for i in range(len(opened))] == [f"tar {n}, {i}" for n in range(3) for i in range(2)]
    assert opened[5].images[0].load().data == media["png"]
    for behind in (b"something else", b"x" * 5000):
        tar.write_bytes(parts[0] + behind)
        _, opened = indexed(tmp_path, str(tar))
        found = rejections(tar)
        assert found.keys() == {"after 1"} and len(opened) == 3
        assert (
            found["after 1"][0] == "damaged_tar" and "other data behind the end of the archive" in found["after 1"][1]
        )
    damaged = bytearray(parts[0])
    second = next(sample for sample in tar_samples(tmp_path / "0.tar") if sample.key == "1").members["png"]
    damaged[second.start - 512 : second.start] = b"\xee" * 512
    tar.write_bytes(damaged)  # the library takes a damaged header for the end
    indexed(tmp_path, str(tar))
    assert rejections(tar).keys() == {"after 0"}


def test_names_and_metadata_of_other_systems_cost_their_sample(tmp_path, media, capsys):
    record = '{%s"messages":[{"role":"user","content":"<image>q"},{"role":"assistant","content":"a"}]}'
    bad: dict[str, list] = {
        "caf\udce9": [("caf\udce9.png", media["png"]), ("caf\udce9.txt", "x")],
        "digits": [("digits.png", media["png"]), ("digits.json", '{"caption":"x","n":' + "9" * 5000 + "}")],
        "id": [("id.png", media["png"]), ("id.json", record % r'"id":"\ud83d",')],
        "system": [("system.png", media["png"]), ("system.json", record % r'"system":"\ud83d",')],
        "other": [("other.png", media["png"]), ("other.json", record % r'"task":{"\ud83d":1},')],
        "deep": [("deep.png", media["png"]), ("deep.json", record % ('"task":' + "[" * 900 + "]" * 900 + ","))],
    }
    members = [("1.png", media["png"]), ("1.txt", "good"), *(member for parts in bad.values() for member in parts)]
    tar = write_tar(tmp_path / "s.tar", members)
    _, opened = indexed(tmp_path, str(tar))
    found = rejections(tar)
    assert {key: reason for key, (reason, _) in found.items() if key != "deep"} == {
        "caf\\udce9": "unsafe_member", **dict.fromkeys(("digits", "id", "system", "other"), "not_json")
    }  # fmt: skip
    assert opened[0].answer == "good" and len(opened) == 1 + len(bad)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in members:
        path = os.fsencode(folder) + b"/" + os.fsencode(name)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    recipe = write_recipe(tmp_path)
    assert prepare.main([recipe, "--folder", str(folder), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "records.jsonl: 1 records" in out or "records.jsonl: 2 records" in out
    )  # with "deep", where Python can write it
    assert "left out (not_json): 4" in out and "left out (bad_type): 1" in out and r"caf\udce9" in out


def test_a_tar_that_is_cut_off_keeps_what_is_whole(tmp_path, media):
    members: list = [part for i in range(6) for part in ((f"{i}.wav", media["wav"]), (f"{i}.txt", "a"))]
    tar = write_tar(tmp_path / "s.tar", members)
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    _, opened = indexed(tmp_path, str(tar))
    assert "0" not in rejections(tar) and len(opened) > len(rejections(tar)) >= 1
    assert {reason for reason, _ in rejections(tar).values()} <= {"damaged_tar", "unsafe_member", "no_text"}
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b" + data[:5000])
    with pytest.raises(ValueError, match=r"c.tar: is no plain tar .*compressed tars cannot be read in place"):
        index_files([tmp_path / "c.tar"], tokenizer_file(tmp_path))
    tar.write_bytes(data)
    whole = [member for sample in tar_samples(tar) for member in sample.members.values()]
    last = max(whole, key=lambda member: member.start)
    assert last.load().data == data[last.start : last.start + last.num_bytes]
    tar.write_bytes(data[: last.start + last.num_bytes - 1])  # it shrinks while a run reads it
    with pytest.raises(EOFError, match=rf"s.tar:{last.name}: the tar ends inside this member"):
        last.load()
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"data source 'tars': .*stale"):
        open_source(SourceConfig(name="tars", path=str(tar)), digest=tokenizer_digest(tokenizer_file(tmp_path)))
    index_path(tar).unlink()
    with pytest.raises(ValueError, match=r"data source 'tars': .*s.tar' has no index; run megatron-omni prepare"):
        open_source(SourceConfig(name="tars", path=str(tar)), digest=tokenizer_digest(tokenizer_file(tmp_path)))


def test_energon_datasets_by_split_and_field_map(tmp_path, media):
    folder = tmp_path / "set"
    for number in range(3):
        members: list = [
            (f"{number}.png", media["png"]),
            (f"{number}.json", {"vqa": [{"q": "which?", "a": f"n{number}"}]}),
        ]
        write_tar(folder / "shards" / f"shard_{number:03d}.tar", members)
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / "split.yaml").write_text(
        "split_parts:\n  train:\n  - shards/shard_{000..001}.tar\n  val:\n  - shards/shard_002.tar\nexclude: []\n"
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: VQASample\n"
        "field_map:\n  image: jpg,png\n  context: json[vqa][0][q]\n  answers: txt,json[vqa][0][a]\n"
    )
    _, train = indexed(tmp_path, str(folder))
    assert [train[i].answer for i in range(len(train))] == ["n0", "n1"]
    assert train[1].messages[0].content == "<image>\nwhich?" and str(train[1].images[0]).endswith("shard_001.tar:1.png")
    _, held_out = indexed(tmp_path, f"{folder}#val")
    assert [held_out[i].answer for i in range(len(held_out))] == ["n2"]
    with pytest.raises(ValueError, match="names no shards for the split 'test'"):
        shard_paths(f"{folder}#test")
    (folder / ".nv-meta" / "split.yaml").unlink()
    (folder / ".nv-meta" / "split.json").write_text(
        json.dumps({"split_parts": {"train": ["shards/shard_{000..002}.tar"]}, "exclude": ["shards/shard_001.tar"]})
    )
    assert [path.name for path in shard_paths(str(folder))] == ["shard_000.tar", "shard_002.tar"]
    (folder / ".nv-meta" / "split.yaml").write_text("split_parts: {train: [../a.tar]}")
    with pytest.raises(ValueError, match="leads out of"):
        shard_paths(str(folder))


@pytest.mark.skipif(not _has_energon(), reason="megatron-energon is not installed (37 packages)")
def test_a_folder_that_energon_itself_prepared(tmp_path, media):
    """By its own command; the test above writes the files that it writes, so that they are tested without it."""
    folder = tmp_path / "set"
    for number in range(4):
        fields = {"q": f"what is {number}?", "a": f"picture {number}"}
        write_tar(folder / f"part_{number:03d}.tar", [(f"{number}.png", media["png"]), (f"{number}.json", fields)])
    fields = json.dumps({"image": "jpg,png", "context": "json[q]", "answers": "json[a]"})
    words = [
        "prepare",
        "--non-interactive",
        "--split-ratio",
        "2,1,1",
        "--sample-type",
        "VQASample",
        "--field-map",
        fields,
    ]
    code = f"import sys; sys.argv[1:] = {[*words, '--num-workers', '1', '--no-progress', str(folder)]!r}\n"
    code += "from megatron.energon.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=True)
    for split, numbers in (("", [0, 1]), ("#val", [2]), ("#test", [3])):
        _, opened = indexed(tmp_path, f"{folder}{split}")
        assert [opened[i].answer for i in range(len(opened))] == [f"picture {n}" for n in numbers]
        assert opened[0].messages[0].content == f"<image>\nwhat is {numbers[0]}?"


def test_paths_of_shards(tmp_path):
    assert expand_braces("s_{08..11}_{a,b}.tar")[:3] == ["s_08_a.tar", "s_08_b.tar", "s_09_a.tar"]
    assert len(expand_braces("s_{08..11}_{a,b}.tar")) == 8
    for name in ("b.tar", "a.tar", "c.jsonl"):
        (tmp_path / name).write_bytes(b"x")
    assert shard_paths(f"{tmp_path}/*.tar") == [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path, problem in (
        ("*.bin", "no file matches"),
        ("{a..}.tar", "no such file"),
        ("{9..1}.tar", "range"),
        ("d", "no such"),
    ):
        with pytest.raises(ValueError, match=problem):
            shard_paths(str(tmp_path / path))
    for name in ("a.parquet", "b.jsonl.gz", "c.csv"):
        (tmp_path / name).write_bytes(b"x")
    for path, way_out in (
        (f"{tmp_path}/a.parquet", r"\.parquet is not read; write its rows as JSONL"),
        (f"{tmp_path}/*.gz", r"\.gz is not read; unpack it"), (f"{tmp_path}/c.csv", r"\.csv is not read; .*--folder"),
        ("s3://bucket/x.jsonl", "is a URL, and only files are read: copy the data to a disk, or mount"),
        ("https://example.org/{0..9}.tar", "is a URL"), ("data:application/json,[]", "is a URL"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=way_out):
            shard_paths(path)
    with pytest.raises(ValueError, match=r"is a folder without .nv-meta"):
        shard_paths(str(tmp_path))


def write_recipe(folder: Path) -> str:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{vocab_size: 512, vision: {{image_size: 28, pooled_side: 2, max_tiles_per_side: 3}}, "
        f"audio: {{num_mel_bins: 80, chunk_seconds: 1.0, num_query_tokens: 20, max_chunks: 4}}}}\n"
        f"data: {{tokenizer: {tokenizer_file(folder)}, seq_length: 256}}\n"
    )
    return str(recipe)


def test_names_in_a_folder_may_have_dots(tmp_path):
    folder = tmp_path / "f"
    (folder / "IMG.d").mkdir(parents=True)
    for i in (1, 2, 3):
        write_image(folder / f"IMG.{i:03d}.png")
    write_image(folder / "IMG.d" / "photo.2024.PNG")
    (folder / "IMG.d" / "photo.2024.txt").write_bytes(b"\xef\xbb\xbfa cat")
    (folder / "metadata.csv").write_bytes(
        b"\xef\xbb\xbffile_name,text,question\r\nIMG.001.png,one,\r\nIMG.002.png,two,which?\r\nIMG.003.png,three,\r\n"
    )
    (folder / "IMG.001.txt").write_text("metadata comes first")
    (folder / "._IMG.001.png").write_bytes(b"\0")
    (folder / "__MACOSX").mkdir()
    write_image(folder / "__MACOSX" / "x.png")
    (folder / "elsewhere").symlink_to(folder / "IMG.d", target_is_directory=True)
    report = records_of_folder(folder)
    records = [json.loads(line) for line in report.path.read_text().splitlines()]
    found = {r["images"][0]: (r["messages"][0]["content"], r["messages"][1]["content"]) for r in records}
    describe = "<image>\nDescribe the picture."
    assert found == {
        "IMG.001.png": (describe, "one"), "IMG.002.png": ("<image>\nwhich?", "two"), "IMG.003.png": (describe, "three"),
        "IMG.d/photo.2024.PNG": (describe, "a cat"),
    }  # fmt: skip
    assert report.rejected == {"linked_folder": 1} and "elsewhere' is" not in report.messages[0]
    assert "elsewhere: folder = " in report.messages[0]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "IMG.001.png", "text": "a"}\n' + b"[" * 100_000)
    with pytest.raises(ValueError, match=r"metadata.jsonl' cannot be read \(.*line 2: not valid JSON.*give every row"):
        records_of_folder(folder)


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_a_file_with_two_captions_in_one_table_is_left_out(tmp_path, table):
    """The last one used to win without a word."""
    captions = [("a.png", "a cat"), ("b.png", "a dog"), ("./a.png", "a cow")]
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    rows = [f"{name},{text}" for name, text in captions]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions]
    (tmp_path / table).write_text("\n".join(["file_name,text", *rows] if table == "metadata.csv" else lines))
    report = records_of_folder(tmp_path)
    (record,) = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert record["images"] == ["b.png"] and record["messages"][1]["content"] == "a dog"
    assert report.rejected == {"double_name": 1}
    assert f"{table}: file_name = 'a.png': is there 2 times, with a caption each; keep one" in report.messages[0]


def test_from_a_folder_of_media_to_a_step_by_the_command(tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    write_image(folder / "sub" / "cat.png")
    (folder / "sub" / "cat.txt").write_text("a cat\n")
    write_sound(folder / "bell.wav", 0.5)
    (folder / "bell.json").write_text(json.dumps({"answer": "a bell", "question": "what rings?"}))
    write_image(folder / "listed.png")
    (folder / "metadata.csv").write_text('file_name,text\nlisted.png,"a dog, sleeping"\n')
    write_image(folder / "bare.png")
    (folder / "link.png").symlink_to(folder / "listed.png")
    recipe = write_recipe(tmp_path)
    command = [recipe, "--folder", str(folder), "--prompt", "what is it?", "--workers", "1"]
    assert prepare.main(command) == 0
    out = capsys.readouterr().out
    assert "records.jsonl: 3 records" in out and "left out (no_text): 2" in out and "3 of 3 records usable" in out
    summary = json.loads((folder / "records.summary.json").read_text())
    assert summary["samples_by_class"] == {"image": 2, "audio": 1} and summary["tiles"] == 2 and summary["chunks"] == 1
    source = SourceConfig(name="records", path=str(folder / "records.jsonl"))
    loader = StepLoader(tiny_recipe(tmp_path, [source]), data_rank=0, data_size=1)
    turns = {(r.messages[0].content, r.answer) for r in (loader.sources[0][i] for i in range(3))}
    assert turns == {
        ("<audio>\nwhat rings?", "a bell"), ("<image>\nwhat is it?", "a dog, sleeping"), ("<image>\nwhat is it?", "a cat"),
    }  # fmt: skip
    assert sum(batch.num_samples for batch in loader.next_step()) == 8
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"messages": []}\n{broken\n')
    again = [recipe, "--data", str(folder / "records.jsonl"), "--workers", "1", "--max-bad", "0.2"]
    assert prepare.main(again) == 2
    captured = capsys.readouterr()
    assert "rejected (not_json): 1" in captured.out and "2 of 5 records of records cannot be used" in captured.err
    assert prepare.main([recipe, "--folder", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    assert records_of_folder(folder).num_records == 3
    with pytest.raises(ValueError, match="holds no medium with a caption"):
        records_of_folder(tmp_path / "empty")
