"""Recipes from YAML: dataclass schema <- ``extends`` chain <- file <- ``key=value`` overrides, to a typed ``Recipe``.

A recipe may start with ``extends: other.yaml`` (path relative to the file). Every key is checked against the schema: an
unknown key or a value of the wrong type is a ValueError that names the file, the field and the nearest known name.

A list replaces the list below it. Lists of named items (``data.sources``) may be given as a mapping by name instead, which
changes the items of these names, adds new ones at the end and, with null, takes them out:

    data.sources.image.weight=2        sources: {image: {weight: 2}, video: null, notes: {path: notes.jsonl}}
"""

import dataclasses
import difflib
import functools
import os
import types
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_omni.config.ranges import FILE_PATH, short
from megatron_omni.config.run import Recipe
from megatron_omni.config.yaml_text import NULLS, Plain, core_value, read_yaml

MAX_EXTENDS = 5


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in ``path`` with dotted ``key=value`` overrides applied.

    Raises ValueError naming the file or override, the field, the value and the fix.
    """
    return load_config(Recipe, _extends_chain(Path(path)), overrides or [])


def recipe_from_overrides(overrides: list[str]) -> Recipe:
    """The defaults with ``key=value`` overrides applied (what a command line alone says)."""
    return load_config(Recipe, [], overrides)


def recipe_from_dict(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A recipe from plain values (a checkpoint's ``run_config.yaml``, a test)."""
    return load_config(Recipe, [(origin, values)], [])


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values of every field, defaults included."""
    return dataclasses.asdict(recipe)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, loadable by ``load_recipe``."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def load_config[T](schema: type[T], layers: list[tuple[str, dict[str, Any]]], overrides: list[str]) -> T:
    """A dataclass from layers of values (what each came from, mapping), later ones first, and overrides on top."""
    config = OmegaConf.structured(schema)
    for origin, values in layers:
        config = _merge(config, values, schema, origin=origin)
    for override in overrides:
        config = _merge(config, _parse_override(override), schema, origin=f"override {short(override)!r}")
    try:
        return typing.cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        origin = layers[-1][0] if layers else "overrides"
        raise ValueError(f"{origin}: {error.full_key}: has no value; give it one") from error


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The fields that a YAML file holds; ``what`` it is, for messages."""
    if not path.is_file():
        raise ValueError(f"{path}: no such {what}; give the path of a YAML file (see recipes/)")
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a {what} is a mapping of fields, found a {type(values).__name__}")
    return values


def _extends_chain(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What each file says, base first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    current: Path | None = path
    while current is not None:
        if len(chain) > MAX_EXTENDS:
            raise ValueError(f"{path}: extends: chain of more than {MAX_EXTENDS} files (a loop?); shorten it")
        values = read_mapping(current, "recipe")
        parent = values.pop("extends", "")
        chain.append((str(current), values))
        current = None if parent in NULLS else current.parent / str(parent)
    return chain[::-1]


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    origin = f"override {short(override)!r}"
    if not separator or not key.strip():
        raise ValueError(f"{origin}: write key=value, for example optim.lr=1e-5")
    if "[" in key:
        raise ValueError(f"{origin}: items of a list go by their names, as in data.sources.NAME.weight=2")
    try:
        value = Plain("") if not text.strip() else read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{origin}: not a value that YAML can read: {error}; quote it") from error
    for part in reversed(key.strip().split(".")):
        value = {Plain(part): value}
    return typing.cast(dict[str, Any], value)


def _merge(base: DictConfig, layer: dict[str, Any], schema: type, *, origin: str) -> DictConfig:
    try:
        return typing.cast(DictConfig, OmegaConf.merge(base, _typed(layer, schema, base, name="")))
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a mapping given for a list, or the reverse
        field: Any = getattr(error, "full_key", None) or next(iter(layer), "?")
        reason = short(str(error).splitlines()[0], 200)
        raise ValueError(f"{origin}: {field}: {reason}; see docs/config.md for the type") from error
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{origin}: is nested too deeply") from error


def _typed(value: Any, hint: Any, base: Any, *, name: str) -> Any:
    """``value`` as the type ``hint`` reads it, for OmegaConf to merge into ``base``, what stands there so far.

    Keys are checked, plain scalars resolved, items by name put into their list.
    """
    if isinstance(value, str):
        if "${" in value or value == "???":  # OmegaConf would read meaning into them
            raise ValueError(
                f"{name}={short(value)}: '${{...}}' and '???' are not expanded in recipes; write the value"
            )
        return _scalar(value, hint) if isinstance(value, Plain) else value
    schema = _dataclass_in(hint)
    inner = typing.get_args(hint)
    if schema is not None and isinstance(value, dict):
        _check_keys(value, schema, name=name)
        hints, typed = _type_hints(schema), {}
        for item in dataclasses.fields(schema):
            if item.name in value:
                inside = _join(name, item.name)
                typed[item.name] = _typed(value[item.name], hints[item.name], _within(base, item.name), name=inside)
                if item.metadata.get(FILE_PATH) and isinstance(typed[item.name], str):
                    typed[item.name] = _path(typed[item.name], name=inside)
        return typed
    if typing.get_origin(hint) is list and (item_schema := _dataclass_in(inner[0])) is not None:
        if isinstance(value, dict):
            if "name" not in _type_hints(item_schema):
                raise ValueError(f"{name}: its items have no names; give the whole list")
            return _by_name(value, item_schema, base, name=name)
        if isinstance(value, list):
            return [_item(given, item_schema, name=f"{name}[{place}]") for place, given in enumerate(value)]
    if isinstance(value, dict):
        of_key, of_value = inner if typing.get_origin(hint) is dict else (str, Any)
        return {
            _typed(k, of_key, None, name=name): _typed(v, of_value, None, name=f"{name}.{k}") for k, v in value.items()
        }
    if isinstance(value, list):
        of_item = inner[0] if typing.get_origin(hint) is list else Any
        return [_typed(given, of_item, None, name=name) for given in value]
    return value


def _scalar(text: Plain, hint: Any) -> Any:
    """A plain scalar for a field of this type: text keeps every character, other types take what YAML 1.2 says."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in options or any(typing.get_origin(option) is typing.Literal for option in options):
        empty = text in NULLS and (types.NoneType in options or text != "")
        return None if empty and typing.get_origin(hint) is not typing.Literal else str(text)
    return core_value(text)


def _path(path: str, *, name: str) -> str:
    """A path as it is meant: ``~`` is the home directory, as a shell has it where a word begins with it."""
    if "$" in path or "\0" in path:
        raise ValueError(f"{name}={short(path)}: '$' and zero bytes are refused in paths; write the path itself")
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise ValueError(f"{name}={short(path)}: there is no such user; write the path itself (./~ for a name with ~)")
    return full


def _by_name(given: dict[Any, Any], schema: type, base: Any, *, name: str) -> list[Any]:
    """The items of ``base`` with those that ``given`` names changed, added or taken out."""
    items = {item.name: item for item in base or []}
    for key, value in given.items():
        where = f"{name}.{key}"
        if value is None or (isinstance(value, Plain) and value in NULLS):
            if items.pop(str(key), None) is None:
                raise ValueError(f"{where}: no such item to take out; there are {', '.join(items) or 'none'}")
        elif not isinstance(value, dict):
            raise ValueError(f"{where}: give fields of it, as in {where}.weight=2, or null to take it out")
        elif str(key).isdigit() and str(key) not in items:
            raise ValueError(
                f"{where}: items go by their names, not by their places; there are {', '.join(items) or 'none'}"
            )
        elif str(key) in items:
            items[str(key)] = OmegaConf.merge(items[str(key)], _typed(value, schema, items[str(key)], name=where))
        else:
            near = difflib.get_close_matches(str(key), items, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(items) or 'none'}"
            items[str(key)] = _item({"name": str(key)} | value, schema, name=where, hint=f" ({hint})")
    return [OmegaConf.to_container(item) if isinstance(item, DictConfig) else item for item in items.values()]


def _item(given: Any, schema: type, *, name: str, hint: str = "") -> Any:
    """An item of a list, with what it cannot do without."""
    if isinstance(given, dict):
        for item in dataclasses.fields(schema):
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and given.get(item.name) in (None, *NULLS):
                raise ValueError(f"{name}: has no {item.name}; give it one{hint}")
    return _typed(given, schema, None, name=name)


def _within(base: Any, key: str) -> Any:
    return None if base is None or OmegaConf.is_missing(base, key) else base.get(key)


_type_hints = functools.cache(typing.get_type_hints)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


MEGATRON_ONLY = {
    "num_distributed_optimizer_instances": "optimizer state is always cut over all data-parallel ranks; on few ranks a node "
    "share its weights by parallel.expert_model_parallel_size instead, and hide messages by parallel.overlap_grad_reduce",
    "main_grads_dtype": "gradients have the dtype that they are reduced in; set optim.grad_reduce_in_fp32",
    "accumulate_allreduce_grads_in_fp32": "its launcher's word for optim.grad_reduce_in_fp32; set that",
    "main_params_dtype": "master weights are fp32; optim.exp_avg_dtype and exp_avg_sq_dtype make the moments smaller",
    "cpu_offloading": "a layer loop that this project replaces reads it; parallel.fine_grained_activation_offloading is read here",
    "store_param_remainders": "master weights are saved and kept whole, so that any run can read a checkpoint",
    "nccl_communicator_config_path": "communicators are made with NCCL's own defaults; it reads NCCL_MIN_CTAS, NCCL_MAX_CTAS and "
    "NCCL_CGA_CLUSTER_SIZE, for all of them, from the environment (examples/slurm/env.sh)",
}
"""Settings of Megatron's launcher that are looked for here -> what there is instead."""


def _check_keys(values: dict[Any, Any], schema: type, *, name: str) -> None:
    """Reject keys that the schema does not have, with the nearest one that it has."""
    known = [item.name for item in dataclasses.fields(schema)]
    for key in map(str, values):
        if key not in known:
            if key in MEGATRON_ONLY:
                raise ValueError(f"unknown field {_join(name, key)!r}, Megatron's: {MEGATRON_ONLY[key]}")
            near = difflib.get_close_matches(key, known, n=1)
            elsewhere = [p for p in all_fields() if p.rsplit(".", 1)[-1] == key]
            guess = near[0] if near else (elsewhere[0] if elsewhere else None)
            hint = f"did you mean {guess!r}?" if guess else f"known here: {', '.join(known)}"
            raise ValueError(f"unknown field {_join(name, key)!r}; {hint}")


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
