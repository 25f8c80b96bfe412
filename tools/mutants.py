"""Change the package in small ways, one at a time, and list the changes that no test sees.

    python tools/mutants.py data/loader.py ops --seed 0 --count 40 [--jobs 2] [--tests tests/unit/test_loader.py ...]

Modules are files or folders below megatron_omni. A change turns a comparison, an operator, a condition or min and max,
moves a number, negates a truth value, or drops a keyword or a call. Each is made in a copy of the tree, never here, and
test files run, those called like the module first, then those that name it, until one fails. What survives is a test
that is missing, or a change that computes the same: those stand with their reason in tools/mutants_equivalent.txt (the
printed line, `` # ``, the reason) and are not counted. Exit status 1 if more than a tenth survives.
"""

import argparse
import ast
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = "tools/mutants_equivalent.txt"
TURNED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitXor: ast.BitAnd, ast.USub: ast.UAdd,
}  # fmt: skip
MESSAGES = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
"""Nodes that are not changed: texts for users, and invariants, which nothing makes false."""
UNTESTED = ("logger.", "warnings.", "if TYPE_CHECKING")
Change = tuple[ast.stmt, Callable[[], object]]
"""The statement that is changed, and what changes it."""


class Mutant(NamedTuple):
    """The ``number``-th change of a file."""

    file: str
    number: int


def changes(node: ast.AST, statement: ast.stmt | None = None) -> Iterator[Change]:
    """Every small change below ``node``, in the order of the source."""
    if isinstance(node, ast.stmt):
        statement = node
    if isinstance(node, MESSAGES):
        return
    if isinstance(node, ast.Expr | ast.If) and ast.unparse(node).startswith(UNTESTED):
        return
    if statement is not None:
        yield from ((statement, change) for change in _changes_of(node))
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from changes(child, statement)


def _changes_of(node: ast.AST) -> Iterator[Callable[[], object]]:
    """The changes of one node itself."""
    match node:
        case ast.Compare(ops=operators):
            for i, operator in enumerate(operators):
                yield partial(operators.__setitem__, i, TURNED[type(operator)]())
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) | ast.UnaryOp(op=op) if type(op) in TURNED:
            yield partial(setattr, node, "op", TURNED[type(op)]())
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield partial(setattr, node, "test", ast.UnaryOp(ast.Not(), test))
        case ast.Constant(value=bool() | int() | float() as value):
            yield partial(setattr, node, "value", not value if isinstance(value, bool) else value + 1)
        case ast.Name(id="min" | "max" as name):
            yield partial(setattr, node, "id", "max" if name == "min" else "min")
        case ast.Call(keywords=words):
            for word in words:
                yield partial(words.remove, word)
        case ast.Expr(value=ast.Call()):
            yield partial(setattr, node, "value", ast.Constant(None))


def changed(mutant: Mutant) -> tuple[str, str]:
    """The file's new source, and the change in one line."""
    tree = ast.parse((ROOT / mutant.file).read_text())
    statement, change = list(changes(tree))[mutant.number]
    was = ast.unparse(statement).splitlines()[0]
    change()
    became = ast.unparse(statement).splitlines()[0]
    apart = next((i for i, (a, b) in enumerate(zip(was, became)) if a != b), 0)
    was, became = (text[max(apart - 60, 0) :][:120] for text in (was, became))
    return ast.unparse(tree), f"{mutant.file}: {was} -> {became}"


def files_of(modules: list[str]) -> list[str]:
    """Source files, relative to the root; ValueError for a name that is none."""
    found: list[str] = []
    for module in modules:
        place = ROOT / "megatron_omni" / module.removeprefix("megatron_omni/")
        if not place.exists():
            raise ValueError(f"{module}: no file or folder below megatron_omni")
        found += [str(f.relative_to(ROOT)) for f in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return found


@cache
def related(file: str) -> tuple[str, ...]:
    """Test files called like a module, then those that name it (or import a helper of the tests that does), then those
    that name its folder; in each group those that start no ranks first.
    """
    module, stem = file.removesuffix(".py").replace("/", "."), Path(file).stem
    folder = module.rpartition(".")[0]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}
    ways = [f"{module} ", f"from {folder} import {stem}"]
    ways += [
        name.removesuffix(".py").replace("/", ".") for name, text in texts.items() if any(way in text for way in ways)
    ]
    tests = {name: text for name, text in texts.items() if Path(name).stem.startswith("test_")}
    called = [name for name in tests if stem in Path(name).stem]
    naming = [name for name, text in tests.items() if name in ways or any(way in text for way in ways)]
    near = [name for name, text in tests.items() if f"{folder}." in text]
    groups = (
        sorted(group, key=lambda name: "unit" not in name and "/ops" not in name) for group in (called, naming, near)
    )
    return tuple(dict.fromkeys(name for group in groups for name in group))


def tracked() -> list[str]:
    """What git knows and what it does not ignore: not the environment, runs and caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


def copy_of_tree(place: Path) -> Path:
    """Those files and the compiled kernels."""
    kernels = [str(path.relative_to(ROOT)) for path in (ROOT / "megatron_omni" / "ops").glob("*.so")]
    for name in tracked() + kernels:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name)
    return place


def failing(tree: Path, tests: tuple[str, ...], limit: float | None = None) -> str:
    """The first test that fails in ``tree``, or why there is no verdict of tests; empty when all pass."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", *tests]
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"nothing in {limit:.0f} s"
    words = [line.split(" ")[1] for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return "" if process.returncode == 0 else (words or [f"pytest's status {process.returncode}"])[0]


def main(arguments: list[str] | None = None) -> int:
    """Sample, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="+", help="files or folders below megatron_omni")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--count", type=int, default=40, help="changes to make")
    parser.add_argument("--jobs", type=int, default=1, help="changes that are tested at a time")
    parser.add_argument("--tests", nargs="+", help="test files, instead of those that belong to each module")
    parser.add_argument("--seconds", type=float, default=1800, help="that the tests of one change may take")
    options = parser.parse_args(arguments)
    every = [
        Mutant(f, i)
        for f in files_of(options.modules)
        for i in range(len([*changes(ast.parse((ROOT / f).read_text()))]))
    ]
    sample = random.Random(options.seed).sample(every, min(options.count, len(every)))
    known = (ROOT / EQUIVALENT).read_text() if (ROOT / EQUIVALENT).exists() else ""
    survived, sound = [], {""}
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.jobs) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(options.jobs):
            trees.put(copy_of_tree(Path(place) / str(i)))

        def verdict(mutant: Mutant) -> tuple[str, str]:
            source, line = changed(mutant)
            if f"{line} # " in known:
                return line, "equivalent"
            tests = tuple(options.tests or related(mutant.file))
            tree = trees.get()
            (tree / mutant.file).write_text(source)
            killer = failing(tree, tests, options.seconds)
            (tree / mutant.file).write_text((ROOT / mutant.file).read_text())
            if killer not in sound and (without := failing(tree, (killer,) if "::" in killer else tests)):
                raise RuntimeError(f"{without} fails without any change")
            sound.add(killer)
            trees.put(tree)
            return line, killer

        for line, killer in pool.map(verdict, sample):
            print(f"{killer or 'SURVIVED'}: {line}", flush=True)
            survived += [line] if not killer else []
    print(f"{len(survived)} of {len(sample)} survived ({len(every)} changes are possible, seed {options.seed})")
    return int(len(survived) > len(sample) / 10)


if __name__ == "__main__":
    sys.exit(main())
