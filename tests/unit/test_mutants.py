"""tools/mutants.py makes every small change once, finds the tests of a module, and leaves the tree as it was."""

import ast
import subprocess
from pathlib import Path

import pytest

from tools import mutants

SOURCE = '''
def f(a: int = 1, b=2.0):
    """Not changed."""
    logger.info("nor this", 3)
    assert a != 4
    if a < b and not g(a, key=True):
        h(a)
    elif a is None:
        raise ValueError(f"nor {a + 5}")
    return max(a, -b) * 6
'''
CHANGED = [
    "a: int=2", "b=3.0", "if not (a < b and (not g(a, key=True))):", "if a < b or not g(a, key=True):",
    "if a <= b and", "(not g(a)):", "key=False", "    None", "elif not a is None:", "elif a is not None:",
    "return max(a, -b) + 6", "return min(a, -b) * 6", "return max(a, +b) * 6", "* 7",
]  # fmt: skip


def test_every_small_change_is_made_once() -> None:
    plain, found = ast.unparse(ast.parse(SOURCE)), []
    for number in range(len(list(mutants.changes(ast.parse(SOURCE))))):
        tree = ast.parse(SOURCE)
        list(mutants.changes(tree))[number][1]()
        found.append(ast.unparse(tree))
    assert len(set(found)) == len(found) == len(CHANGED) and plain not in found
    for piece in CHANGED:
        assert sum(piece in text for text in found) == 1 and piece not in plain, piece


def test_files_and_their_tests() -> None:
    assert mutants.files_of(["data/tar.py", "megatron_omni/positions.py"]) == [
        "megatron_omni/data/tar.py", "megatron_omni/positions.py",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="nothing: no file or folder below megatron_omni"):
        mutants.files_of(["nothing"])
    assert mutants.related("megatron_omni/data/packing.py")[0] == "tests/unit/test_packing.py"
    assert "tests/unit/test_moe_layer.py" in mutants.related("megatron_omni/models/moe/layer.py")


def test_what_no_test_sees_survives_unless_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a package of one function with two changes, of which its test sees one."""
    for folder in ("megatron_omni", "tests", "tools"):
        (tmp_path / folder).mkdir()
    (tmp_path / "megatron_omni" / "__init__.py").touch()
    (tmp_path / "megatron_omni" / "sums.py").write_text("def f(a):\n    return a + 1\n")
    test = "from megatron_omni.sums import f\ndef test_f():\n    assert f(0) in (1, 2)\n"
    (tmp_path / "tests" / "test_sums.py").write_text(test)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    mutants.related.cache_clear()
    assert mutants.main(["sums.py"]) == 1
    said = capsys.readouterr().out
    survivor = "megatron_omni/sums.py: return a + 1 -> return a + 2"
    assert f"SURVIVED: {survivor}\n" in said and "1 of 2 survived" in said
    assert "tests/test_sums.py::test_f: megatron_omni/sums.py: return a + 1 -> return a - 1" in said
    (tmp_path / mutants.EQUIVALENT).write_text(f"{survivor} # the test says so\n")
    assert mutants.main(["sums.py"]) == 0
    assert "0 of 2 survived" in capsys.readouterr().out
    assert (tmp_path / "megatron_omni" / "sums.py").read_text() == "def f(a):\n    return a + 1\n"
    mutants.related.cache_clear()
