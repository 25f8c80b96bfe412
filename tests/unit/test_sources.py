"""JSONL sources: random access, line numbers, damaged rows, and paths that may not leave the root."""

import json

import pytest

from megatron_omni.config.data import SourceConfig
from megatron_omni.data import text_rows
from megatron_omni.data.decode.cpu import probe_image
from megatron_omni.data.record import RecordError
from megatron_omni.data.sources import JsonlSource, open_source, open_sources
from megatron_omni.data.text_rows import cut, find_rows, is_blank, rows_between
from tests.unit.tiny_data import write_image


def row(text: str, **fields) -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}], **fields}
    )


def write(path, *lines: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def questions(source) -> list[str]:
    return [source[i].messages[0].content for i in range(len(source))]


def test_rows_are_read_by_index_in_any_order(tmp_path):
    source = JsonlSource(write(tmp_path / "a.jsonl", *[row(f"q{i} é猫") for i in range(50)], ""), name="a")
    assert len(source) == 50
    assert source[41].messages[0].content == "q41 é猫"
    assert source[0].messages[0].content == "q0 é猫"
    assert source[49].where.endswith("a.jsonl:50") and source[49].source == "a"
    with pytest.raises(IndexError):
        source[50]


@pytest.mark.parametrize("scan_bytes", [1, 7, 1 << 20])
def test_blank_lines_crlf_and_a_missing_last_newline(tmp_path, monkeypatch, scan_bytes):
    monkeypatch.setattr(text_rows, "_SCAN_BYTES", scan_bytes)
    (tmp_path / "a.jsonl").write_bytes(b"\n" + row("x").encode() + b"\r\n  \t\r\n\n" + row("y").encode())
    source = JsonlSource(tmp_path / "a.jsonl", name="a")
    assert questions(source) == ["x", "y"]
    assert [source.where(i).rsplit(":", 1)[1] for i in range(2)] == ["2", "5"]


def test_a_damaged_row_costs_itself_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([row("x").encode(), b'{"messages": [', b"\xff\xfe{}", row("y").encode()]))
    source = JsonlSource(path, name="a")
    for index in (1, 2):
        with pytest.raises(
            RecordError, match=rf"a.jsonl:{index + 1}: row = .*not (valid JSON|UTF-8 text).*write one JSON object"
        ) as caught:
            source[index]
        assert caught.value.reason == "not_json"
    assert source[3].messages[0].content == "y"


def test_an_array_of_rows_is_a_source(tmp_path):
    texts = [f'q{i} [x] {{"y": "é猫"}}, \\" \\\\' for i in range(30)]
    rows = [json.loads(row(text, nested=[[[[[{"deep": i}, "]"]]]]])) for i, text in enumerate(texts)]
    for number, settings in enumerate(({}, {"indent": 2}, {"separators": (",", ":"), "ensure_ascii": False})):
        path = tmp_path / f"{number}.json"
        path.write_bytes(b"\xef\xbb\xbf" * number + json.dumps(rows, **settings).encode() + b"\n\n")
        source = JsonlSource(path, name="a")
        assert questions(source) == texts and source.where(29) == f"{path}[29]"
        for size in (1, 300, 1 << 20):
            stretches = cut(path, size)
            assert [stretches[0][0], stretches[-1][1]] == [0, path.stat().st_size]
            found = [json.loads(item) for stretch in stretches for _, item in rows_between(path, *stretch)]
            assert found == rows, size


def test_a_damaged_item_costs_itself_only_and_an_open_array_is_refused(tmp_path):
    path = write(tmp_path / "a.json", f'[{row("x")}, {{"messages": [}}, 7, {row("y")},]')
    path.write_text(path.read_text().replace("[}", "[]]", 1).replace("[]]", "[nil]}", 1))
    source = JsonlSource(path, name="a")
    assert len(source) == 4 and [source[i].messages[0].content for i in (0, 3)] == ["x", "y"]
    for index, reason in ((1, "not_json"), (2, "bad_type")):
        with pytest.raises(RecordError, match=rf"a.json\[{index}\]: row = ") as caught:
            source[index]
        assert caught.value.reason == reason
    for text, problem in (
        ('[{"a": 1}, {"b": 2}', "item at byte 10 has no end: .*the file is cut off"),
        ('[{"a": "1}]', "item at byte 1 has no end"), ('["' + '\\"' * 200_000, "item at byte 1 has no end"),
        ("[" * 100_000, "item at byte 1 has no end"), ('[{"a": 1}] {"b": 2}', "behind its array stands b'{"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            JsonlSource(write(tmp_path / "b.json", text), name="a")
    with pytest.raises(RecordError, match=r"c.jsonl:1: .*a file that holds one array must be named .json"):
        JsonlSource(write(tmp_path / "c.jsonl", "[", row("x"), "]"), name="a")[0]


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_stretches_of_lines_hold_every_row_once(tmp_path, size):
    path = write(tmp_path / "a.jsonl", "", row("a"), "", row("b"), row("c" * 50), " ", row("d"), "")
    rows = [line for stretch in cut(path, size) for _, line in rows_between(path, *stretch)]
    assert rows == path.read_bytes().split(b"\n")[:-1]
    ranges, numbers = find_rows(path)
    assert numbers.tolist() == [number for number, line in enumerate(rows, 1) if not is_blank(line)] == [2, 4, 5, 7]
    assert [path.read_bytes()[a:b] for a, b in ranges] == [rows[number - 1] for number in numbers]


def test_the_mark_of_windows_programs_costs_no_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{row('x')}\r\n{row('y')}\r\n".encode())
    assert questions(JsonlSource(path, name="a")) == ["x", "y"]
    path.write_bytes(b"\xef\xbb\xbf\r\n" + row("z").encode())
    assert questions(JsonlSource(path, name="a")) == ["z"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_or_missing_file_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"data source 'pairs': path = .*a.jsonl' holds no rows"):
        JsonlSource(tmp_path / "a.jsonl", name="pairs")
    with pytest.raises(ValueError, match=r"data source 'pairs': path = .*b.jsonl' is no file"):
        JsonlSource(tmp_path / "b.jsonl", name="pairs")


def test_media_paths_are_taken_from_the_files_directory(tmp_path):
    (tmp_path / "set" / "img").mkdir(parents=True)
    absolute = str(tmp_path / "set/img/a.png")
    path = write(tmp_path / "set" / "a.jsonl", row("<image><image>", images=["img/a.png", absolute]))
    assert JsonlSource(path, name="a")[0].images == (absolute, absolute)


def test_a_source_may_name_another_root_for_its_media(tmp_path, monkeypatch):
    coco = tmp_path / "disk" / "coco"
    coco.mkdir(parents=True)
    (tmp_path / "images").symlink_to(tmp_path / "disk", target_is_directory=True)
    path = write(tmp_path / "lists" / "a.jsonl", row("<image><image>", images=["coco/a.png", str(coco / "b.png")]))
    monkeypatch.chdir(tmp_path)
    for root in ("disk", "images", str(tmp_path / "disk")):
        record = open_source(SourceConfig(name="a", path=str(path), root=root), digest="")[0]
        assert record.images == (f"{root}/coco/a.png", str(coco / "b.png"))
    with pytest.raises(ValueError, match=r"data source 'a': root = 'none' is no folder"):
        open_source(SourceConfig(name="a", path=str(path), root="none"), digest="")
    with pytest.raises(RecordError, match=r"absolute path outside .*or name another folder as the source's root"):
        open_source(SourceConfig(name="a", path=str(path)), digest="")[0]


def test_links_under_the_root_are_followed(tmp_path):
    """A cache of data sets is made of links, and a folder of pictures may be one to a larger disk."""
    (tmp_path / "blobs").mkdir()
    write_image(tmp_path / "blobs" / "sha.png", size=(56, 28))
    snapshot = tmp_path / "snapshots" / "rev"
    path = write(snapshot / "a.jsonl", row("<image><image>", images=["a.png", "disk/sha.png"]))
    (snapshot / "a.png").symlink_to("../../blobs/sha.png")
    (snapshot / "disk").symlink_to(tmp_path / "blobs", target_is_directory=True)
    record = JsonlSource(path, name="a")[0]
    assert [probe_image(str(file)) for file in record.images] == [(56, 28)] * 2


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("/etc/passwd", "is an absolute path outside"),
        ("ROOT/../secret.png", "climbs out"),
        ("ROOT2/a.png", "is an absolute path outside"),
        ("../secret.png", r"climbs out with '\.\.'"),
        ("img/../../secret.png", "climbs out"),
        ("a\0b.png", "holds a zero byte"),
    ],
)
def test_a_path_that_leaves_the_root_is_refused(tmp_path, file, problem):
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "set" / "img").mkdir(parents=True)
    file = file.replace("ROOT", str(tmp_path / "set"))
    path = write(tmp_path / "set" / "a.jsonl", row("hi"), row("<audio>", audios=[file]))
    with pytest.raises(RecordError, match=problem) as caught:
        JsonlSource(path, name="a")[1]
    assert caught.value.reason == "path_escape" and caught.value.field == "audios[0]"
    assert "a.jsonl:2: " in str(caught.value)


def test_a_root_reached_through_a_link_is_no_escape(tmp_path):
    write(tmp_path / "real" / "a.jsonl", row("<image>", images=["a.png"]))
    (tmp_path / "alias").symlink_to(tmp_path / "real", target_is_directory=True)
    assert JsonlSource(tmp_path / "alias" / "a.jsonl", name="a")[0].images == (str(tmp_path / "alias/a.png"),)


def test_names_of_sources_must_differ(tmp_path):
    path = str(write(tmp_path / "a.jsonl", row("x")))
    configs = [SourceConfig(name="a", path=path), SourceConfig(name="a", path=path)]
    with pytest.raises(ValueError, match=r"data.sources: name = 'a' is used 2 times"):
        open_sources(configs)
