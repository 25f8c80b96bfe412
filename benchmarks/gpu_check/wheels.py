"""What a GPU check needs beside PyTorch, as ``name==version`` lines of what is installed here.

The project's own requirements and the test tools with all that they require, without what PyTorch brings: the machine has
that. A line for each; with them in a folder, ``pip install --no-index --no-deps --find-links FOLDER -r LIST`` installs.
"""

import importlib.metadata as metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("pytest", "hypothesis", "setuptools")
"""Of the tests, and of the build on that machine."""
UNUSED = frozenset({"matplotlib", "tensorboard"})
"""Requirements of the project that a check does not import: it draws nothing and logs nothing."""


def closure(roots: list[str], leave_out: frozenset[str] = frozenset()) -> dict[str, str]:
    """Versions by normalised name of the roots and all that they require here; what is not installed has "missing"."""
    found: dict[str, str] = {}
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or name in leave_out:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
            continue
        found[name] = distribution.version
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            ):
                waiting.append(needed)
    return found


def needed() -> list[str]:
    """The lines, sorted; a name alone where it is not installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = frozenset(closure(["torch"]))
    wanted = closure([*project["dependencies"], *TOOLS], leave_out=(brought | UNUSED) - {"setuptools"})
    lines = [name if version == "missing" else f"{name}=={version}" for name, version in wanted.items()]
    return sorted([*lines, *project["optional-dependencies"]["cuda-build"]])  # headers: what they require is not needed
