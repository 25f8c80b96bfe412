"""A row of a table of patches: an attribute of torch or Megatron-Core, what takes its place, and why."""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One row: ``target`` is ``module:attribute.path``."""

    target: str
    replacement: Any
    reason: str

    def resolve(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's name; raises when the target is gone."""
        module_name, path = self.target.split(":")
        holder: Any = importlib.import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            holder = getattr(holder, parent)
        if inspect.getattr_static(holder, name, None) is None and not hasattr(holder, name):
            raise AttributeError(f"patch target {self.target} does not exist (patched because: {self.reason})")
        return holder, name

    def apply(self) -> None:
        """Replace the attribute."""
        setattr(*self.resolve(), self.replacement)
