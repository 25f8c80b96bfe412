"""A command that takes long to import says so first, and what is missing is said before that."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.tiny_data import row, tokenizer_file, write_source

ROOT = Path(__file__).resolve().parents[2]
STOPS_AT_THE_LINE = """
import sys
from megatron_omni.cli.main import main

class Said(BaseException):
    pass

class Terminal:
    def write(self, text):
        sys.__stderr__.write(text)
        if "starting (importing torch)" in text:
            raise Said(text)

    def flush(self):
        pass

sys.stderr = Terminal()
for line in {lines}:
    try:
        main(line)
    except Said as said:
        assert str(said).startswith("megatron-omni " + line[0] + " "), said
    else:
        raise AssertionError(f"{{line}}: no first line")
    assert "torch" not in sys.modules, f"{{line}}: torch was imported before anything was said"
"""


def recipe_file(folder: Path) -> Path:
    source = write_source(folder, "text", [row("what?")])
    file = folder / "recipe.yaml"
    sources = f"[{{name: text, path: {source.path}}}]"
    file.write_text(f"data: {{tokenizer: {tokenizer_file(folder)}, sources: {sources}}}\n")
    return file


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_first_line_comes_before_torch(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    lines = [
        ["train", str(recipe)],
        ["generate", str(tmp_path), "--prompt", "what?", "--out", str(tmp_path / "out")],
        ["prepare", str(recipe)],
        ["preflight", str(recipe), "--out", str(tmp_path / "page.html")],
    ]
    done = python(STOPS_AT_THE_LINE.format(lines=lines))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["data.tokenizer=none.model", "data.sources.text.path=none.jsonl"])
def test_what_is_missing_is_said_before_torch_is_imported(tmp_path: Path, missing: str) -> None:
    recipe = recipe_file(tmp_path)
    code = (
        "import sys\nfrom megatron_omni.cli.main import main\n"
        f"for command in ('train', 'prepare', 'preflight'):\n    assert main([command, {str(recipe)!r}, {missing!r}]) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 3 and done.stderr.count("none.") >= 3
