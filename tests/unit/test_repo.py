"""The repository's own rules: documents name files that exist, generated pages are current, unsafe calls are absent."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_omni.cli.main import COMMANDS
from megatron_omni.cli.main import main as cli_main
from megatron_omni.config.load import load_recipe
from megatron_omni.config.validate import fewest_ranks, validate

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "megatron_omni").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHAINS = sorted((ROOT / "recipes").rglob("chain*.yaml"))
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - set(CHAINS))
STATUSES = {"verified", "unverified", "unsupported"}


def test_config_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "tools/config_docs.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_name_files_that_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    prefixes = r"(?:megatron_omni|tests|tools|recipes|examples|docs)/[\w./-]+\.(?:py|md|yaml)"
    for target in re.findall(rf"`({prefixes})`", text):
        assert (ROOT / target).exists(), f"{page.name} names {target}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_of_documents_are_short(page: Path) -> None:
    """At most 120 characters, so that a difference shows what changed; tables cannot be wrapped."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [n for n, line in enumerate(lines, 1) if len(line) > 120 and not line.lstrip().startswith("|")]


def test_no_document_or_source_names_a_path_of_a_machine() -> None:
    for path in [*SOURCES, *PAGES, *RECIPES]:
        assert not re.search(r"(/home/\w|/root/|/mnt/\w)", path.read_text()), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_unsafe_calls(path: Path) -> None:
    banned = {"pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system"}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in banned, f"{path}:{node.lineno} calls {name}"
        checked = any(k.arg == "filter" and getattr(k.value, "value", None) == "data" for k in node.keywords)
        assert checked or not name.endswith("extractall"), f"{path}:{node.lineno} extracts an archive unchecked"
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            unsafe = {"weights_only": False, "shell": True, "trust_remote_code": True}
            assert not (keyword.arg in unsafe and value is unsafe[keyword.arg]), (
                f"{path}:{node.lineno} {keyword.arg}={value}"
            )


def test_only_platform_names_cuda_or_a_backend() -> None:
    for path in PACKAGE:
        if "platform" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda")), (
                f"{path}:{node.lineno}"
            )
            assert not (isinstance(node, ast.Constant) and node.value in ("nccl", "gloo")), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("module", "owner"),
    [
        ("megatron.core.models.hybrid", "models/language.py"),
        ("megatron.core.parallel_state", "parallel/groups.py"),
        ("megatron.training", ""),
        ("diffusers", "models/generators/sdxl_vae.py"),
        ("nvidia.dali", "data/decode/dali.py"),
    ],
)
def test_module_is_imported_by_its_owner_alone(module: str, owner: str) -> None:
    for path in PACKAGE:
        if owner and path == ROOT / "megatron_omni" / owner:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            assert not any(n == module or n.startswith(module + ".") for n in names), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_docstring_and_size(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"
    assert text.count("\n") <= 500, f"{path} is longer than 500 lines"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_validates(path: Path) -> None:
    recipe = load_recipe(path)
    validate(recipe, world_size=fewest_ranks(recipe.parallel), check_files=False)


def test_verification_page_has_a_status_and_a_reason_for_each_entry() -> None:
    entries = yaml.safe_load((ROOT / "docs" / "verification.yaml").read_text())
    assert len(entries) >= 10
    for entry in entries:
        assert entry["status"] in STATUSES, entry
        assert entry.get("command") if entry["status"] == "verified" else entry.get("reason"), entry


def test_help_answers_without_torch() -> None:
    """Of every command, and of the commands inside ``convert``, in one process."""
    lines = [["--help"], *([name, "--help"] for name in COMMANDS)]
    lines += [["convert", name, "--help"] for name in ("import", "export", "roundtrip", "verify")]
    code = (
        "import contextlib, sys\n"
        "from megatron_omni.cli.main import main\n"
        f"for line in {lines}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert main(line) == 0\n"
        "    assert 'torch' not in sys.modules, f'{line} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: megatron-omni") == len(lines)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main(["trian", "recipe.yaml"]) == 2
    assert "error: unknown command 'trian'; one of train, chain" in capsys.readouterr().err
    assert cli_main([]) == 2


@pytest.mark.parametrize("name", sorted({p.stem for p in (ROOT / "tools").glob("*.py")} & {*COMMANDS, "prepare_data"}))
def test_the_tool_is_the_command(name: str) -> None:
    module = importlib.import_module(f"megatron_omni.cli.{name.removesuffix('_data')}")
    assert runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"] is module.main
