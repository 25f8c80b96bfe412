"""From a recipe's line to a function: a reward of the package by its name, or ``FILE.py:NAME`` of the user's.

A file of the user's is run once, as a module of its own; its path counts from the working directory.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_omni.config.objectives import RewardConfig
from megatron_omni.rewards.accuracy import Accuracy
from megatron_omni.rewards.compare import choice, iou, number, wer
from megatron_omni.rewards.consistency import consistency
from megatron_omni.rewards.judge import Judge
from megatron_omni.rewards.shape import overlong, repetition, think_format
from megatron_omni.scoring import nearest

ARGUMENTS = ("completions", "prompts", "completion_ids", "finish_reasons", "step")
"""What every function is called with, besides the columns."""
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "choice": choice, "number": number, "iou": iou, "wer": wer,
    "think_format": think_format, "repetition": repetition, "overlong": overlong, "consistency": consistency,
}  # fmt: skip
SERVICES: dict[str, Callable[..., Any]] = {"accuracy": Accuracy, "judge": Judge}
"""Classes whose objects are the functions: they keep processes or connections, count what went wrong, and are closed."""
SHAPE = frozenset({"think_format", "repetition", "overlong", "consistency"})
"""Functions that read no solution: whether an answer is right is nothing to them."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A function ready to be called."""

    name: str
    """As in the recipe."""
    weight: float
    function: Callable[..., Any]
    settings: frozenset[str]
    """Keywords that the recipe has given already."""
    is_shape: bool

    @property
    def is_service(self) -> bool:
        """Whether it keeps processes or connections, and its own time."""
        return hasattr(self.function, "take_counts")

    def take_counts(self) -> dict[str, int]:
        """What went wrong since the last call."""
        take = getattr(self.function, "take_counts", None)
        return take() if take is not None else {}

    def close(self) -> None:
        """End what the function keeps."""
        end = getattr(self.function, "close", None)
        if end is not None:
            end()


def open_reward(config: RewardConfig, *, run_dir: Path, rank: int) -> Reward:
    """ValueError for an unknown name, a file without the function, a setting that it does not take, and what is not
    installed."""
    name, settings = config.function, dict(config.settings)
    for key in settings:
        if key in ARGUMENTS:
            raise ValueError(f"rewards: {name}: settings.{key} is what every reward is called with; take it out")
    if name in SERVICES:
        _check_settings(name, SERVICES[name], settings, leave={"run_dir", "rank"}, closed=False, builtin=True)
        try:
            function = SERVICES[name](run_dir=run_dir, rank=rank, **settings)
        except TypeError as error:
            raise ValueError(f"rewards: {name}: settings of another type: {error}") from error
    else:
        plain = FUNCTIONS[name] if name in FUNCTIONS else _of_file(name)
        _check_settings(
            name, plain, settings, leave=set(ARGUMENTS), closed=name in FUNCTIONS, builtin=name in FUNCTIONS
        )
        function = partial(plain, **settings) if settings else plain
    return Reward(
        name=name, weight=config.weight, function=function, settings=frozenset(settings), is_shape=name in SHAPE
    )


def _check_settings(
    name: str, function: Callable[..., Any], settings: dict[str, Any], *, leave: set[str], closed: bool, builtin: bool
) -> None:
    """ValueError for a setting that ``function`` does not take, and where one of the package lacks what it needs."""
    parameters = inspect.signature(function).parameters.values()
    named = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD and one.name not in leave]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    needed = [one.name for one in parameters if one.name in named and one.default is one.empty]
    if builtin and (lacking := [key for key in needed if key not in settings]):
        raise ValueError(
            f"rewards: {name} lacks settings.{', settings.'.join(lacking)}; docs/reinforcement.md has the list"
        )
    for key in settings:
        if key not in named and (closed or not takes_all):
            said = nearest(key, named) if named else "it has none"
            raise ValueError(f"rewards: {name} has no setting {key!r}; {said}")


def _of_file(name: str) -> Callable[..., Any]:
    file, colon, attribute = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        known = [*FUNCTIONS, *SERVICES]
        raise ValueError(f"rewards: function = {name!r} is no reward; {nearest(name, known)}, or FILE.py:NAME of yours")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"rewards: function = {name!r}: there is no file {path} (from {Path.cwd()})")
    function = getattr(user_module(path, "rewards"), attribute, None)
    if not callable(function):
        raise ValueError(f"rewards: function = {name!r}: {path} has no function {attribute!r}")
    parameters = inspect.signature(function).parameters.values()
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        raise ValueError(
            f"rewards: function = {name!r} takes no **columns; write def {attribute}(completions, **columns): it is called "
            f"with {', '.join(ARGUMENTS)} and every column of the records"
        )
    return function


def user_module(path: Path, what: str) -> ModuleType:
    """A user's file of ``what`` as a module, run once however many of its functions are used."""
    name = f"megatron_omni_user_{what}:{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{what}: {path} does not load: {type(error).__name__}: {error}") from error
    return module
