"""JSONL sources: random access, line numbers, damaged rows, and paths that may not leave the root."""

import json

import pytest

from megatron_omni.config.data import SourceConfig
from megatron_omni.data import sources
from megatron_omni.data.record import RecordError
from megatron_omni.data.sources import JsonlSource, open_sources


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
    monkeypatch.setattr(sources, "_SCAN_BYTES", scan_bytes)
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


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_or_missing_file_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"data source 'pairs': path = .*a.jsonl' holds no rows"):
        JsonlSource(tmp_path / "a.jsonl", name="pairs")
    with pytest.raises(ValueError, match=r"data source 'pairs': path = .*b.jsonl' is no file"):
        JsonlSource(tmp_path / "b.jsonl", name="pairs")


def test_media_paths_are_taken_from_the_files_directory(tmp_path):
    (tmp_path / "set" / "img").mkdir(parents=True)
    (tmp_path / "set" / "img" / "linked.png").symlink_to(tmp_path / "set" / "img" / "a.png")
    path = write(tmp_path / "set" / "a.jsonl", row("<image><image>", images=["img/a.png", "img/linked.png"]))
    record = JsonlSource(path, name="a")[0]
    assert record.images == (str(tmp_path / "set/img/a.png"), str(tmp_path / "set/img/linked.png"))


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("/etc/passwd", "is an absolute path"),
        ("../secret.png", r"climbs out with '\.\.'"),
        ("img/../../secret.png", "climbs out"),
        ("img/link/secret.png", "through a link"),
        ("img/file_link.png", "through a link"),
        ("a\0b.png", "holds a zero byte"),
    ],
)
def test_a_path_that_leaves_the_root_is_refused(tmp_path, file, problem):
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "set" / "img").mkdir(parents=True)
    (tmp_path / "set" / "img" / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "set" / "img" / "file_link.png").symlink_to(tmp_path / "secret.png")
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
