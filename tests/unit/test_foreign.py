"""Text that others wrote: one error for all that can be wrong with it, and one place that reads it."""

import ast
import os
from pathlib import Path

import pytest

from megatron_omni.foreign import ForeignError, open_regular, parse_json, read_json, read_text

ROOT = Path(__file__).resolve().parents[2]
OUR_CODE = sorted([*(ROOT / "megatron_omni").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not valid JSON: Expecting value"),
        (b'{"a": 1} {}', "not valid JSON: Extra data"),
        (b"[" * 100_000, "not valid JSON: maximum recursion depth"),
        (b'{"a":' * 100_000, "not valid JSON: maximum recursion depth"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'{"a": "\xe9"}', "not UTF-8 text"),
        (b'[{"a": 1, "b": {"c": 1, "c": 1}}]', "not valid JSON: the key 'c' is there twice in one object; keep one"),
        (rb'{"id": "\ud83d"}', "half of a surrogate pair"),
        (rb'{"deep": [{"\uDE00": 1}]}', "half of a surrogate pair"),
        ('{"id": "\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_whatever_is_wrong_is_one_error_with_its_place(text: bytes | str, problem: str) -> None:
    with pytest.raises(ForeignError, match=f"^rows.jsonl:7: .*{problem}"):
        parse_json(text, "rows.jsonl:7")


def test_good_text_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    text = r'{"a": "\ud83d\ude00 caf\u00e9 \\ud83d", "b": [null, 1.5]}'
    expected = {"a": "\U0001f600 caf\u00e9 \\ud83d", "b": [None, 1.5]}
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.json").write_bytes(mark + text.encode())
        assert read_json(tmp_path / "a.json") == expected == parse_json(mark + text.encode(), "here")
        assert read_text(tmp_path / "a.json") == text


def test_only_ordinary_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"[1,2,3]")
    for name in ("pipe", "zero", "."):
        with pytest.raises(ForeignError, match="no ordinary file"):
            read_json(tmp_path / name)
    for name in ("none", "a\0b", "large/x"):
        with pytest.raises(ForeignError, match="cannot be read: "):
            open_regular(tmp_path / name)
    assert read_json(tmp_path / "large", most_bytes=7) == [1, 2, 3]
    with pytest.raises(ForeignError, match="large: larger than 6 bytes"):
        read_json(tmp_path / "large", most_bytes=6)


def test_nothing_else_reads_json() -> None:
    for path in OUR_CODE:
        if path.name == "foreign.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert name not in {"json.load", "json.loads", "json.JSONDecoder"}, f"{path}:{node.lineno}: use foreign.py"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "json", f"{path}:{node.lineno}: use foreign.py"
