"""Recipes from YAML: dataclass schema <- ``extends`` chain <- file <- ``key=value`` overrides, to a typed ``Recipe``.

A recipe may start with ``extends: other.yaml`` (path relative to the file). Every key is checked against the schema: an
unknown key or a value of the wrong type is a ValueError that names the file, the field and the nearest known name.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_omni.config.run import Recipe

MAX_EXTENDS = 5


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in ``path`` with dotted ``key=value`` overrides applied.

    Raises ValueError naming the file or override, the field, the value and the fix.
    """
    merged = OmegaConf.structured(Recipe)
    for file, layer in _extends_chain(Path(path)):
        merged = _merge(merged, layer, origin=str(file))
    return recipe_from_config(_override(merged, overrides or []))


def recipe_from_overrides(overrides: list[str]) -> Recipe:
    """The defaults with ``key=value`` overrides applied (what a command line alone says)."""
    return recipe_from_config(_override(OmegaConf.structured(Recipe), overrides))


def recipe_from_dict(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A recipe from plain values (a checkpoint's ``run_config.yaml``, a test)."""
    return recipe_from_config(_merge(OmegaConf.structured(Recipe), OmegaConf.create(values), origin=origin))


def recipe_from_config(config: DictConfig) -> Recipe:
    """The dataclass tree behind a merged configuration."""
    recipe = OmegaConf.to_object(config)
    assert isinstance(recipe, Recipe)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values of every field, defaults included."""
    return dataclasses.asdict(recipe)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, loadable by ``load_recipe``."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _extends_chain(path: Path) -> list[tuple[Path, DictConfig]]:
    """The files to merge, base first."""
    chain: list[tuple[Path, DictConfig]] = []
    current: Path | None = path
    while current is not None:
        if len(chain) > MAX_EXTENDS:
            raise ValueError(f"{path}: extends: chain of more than {MAX_EXTENDS} files (a loop?); shorten it")
        values = _read_yaml(current)
        parent = values.pop("extends", None)
        chain.append((current, values))
        current = None if parent is None else current.parent / str(parent)
    return chain[::-1]


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe; give the path of a YAML file (see recipes/)")
    try:
        values = OmegaConf.load(path)
    except Exception as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise ValueError(f"{path}: a recipe is a mapping of fields, found a {type(values).__name__}")
    return values


def _override(config: DictConfig, overrides: list[str]) -> DictConfig:
    for override in overrides:
        config = _merge(config, _parse_override(override), origin=f"override {override!r}")
    return config


def _parse_override(override: str) -> DictConfig:
    key, separator, _ = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"override {override!r}: write key=value, for example optim.lr=1e-5")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        raise ValueError(f"override {override!r}: not a value that YAML can read: {error}") from error


def _merge(base: DictConfig, layer: DictConfig, *, origin: str) -> DictConfig:
    if "${" in OmegaConf.to_yaml(layer, resolve=False):
        raise ValueError(
            f"{origin}: '${{...}}' is not expanded in recipes (environment values stay out); write the value"
        )
    _check_keys(layer, Recipe, origin=origin, prefix="")
    try:
        return typing.cast(DictConfig, OmegaConf.merge(base, layer))
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a mapping given for a list, or the reverse
        field: Any = getattr(error, "full_key", None) or next(iter(layer), "?")
        reason = str(error).splitlines()[0]
        raise ValueError(f"{origin}: {field}: {reason}; see docs/config.md for the type") from error


def _check_keys(values: DictConfig, schema: type, *, origin: str, prefix: str) -> None:
    """Reject keys that the schema does not have, with the nearest one that it has."""
    hints = typing.get_type_hints(schema)
    for key in map(str, values):
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            elsewhere = [p for p in all_fields() if p.rsplit(".", 1)[-1] == key]
            guess = near[0] if near else (elsewhere[0] if elsewhere else None)
            hint = f"did you mean {guess!r}?" if guess else f"known here: {', '.join(hints)}"
            raise ValueError(f"{origin}: unknown field {name!r}; {hint}")
        nested = _dataclass_in(hints[key])
        child = None if OmegaConf.is_missing(values, key) else values.get(key)
        if nested is not None and isinstance(child, DictConfig):
            _check_keys(child, nested, origin=origin, prefix=f"{name}.")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of ``X`` or ``X | None``."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def all_fields(schema: type = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of every field of the schema."""
    names: list[str] = []
    for key, hint in typing.get_type_hints(schema).items():
        nested = _dataclass_in(hint)
        names += all_fields(nested, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return names
