"""YAML read as YAML 1.2's core schema has it: ``010`` is ten, ``1:30`` and ``no`` are text, ``1e-5`` is a number.

PyYAML resolves by YAML 1.1, where these are 8, 90, False and text. Here a plain (unquoted) scalar stays ``Plain`` text until the
field that takes it is known (load.py): a run directory called ``010`` keeps its name, and for a number ``core_value`` decides.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {word: value for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())}
_INT = re.compile(r"[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Plain(str):
    """A scalar that was written without quotes."""


def core_value(text: Plain) -> str | int | float | bool | None:
    """What a plain scalar stands for where any type may stand."""
    if text in NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return str(text)


def read_yaml(text: str) -> Any:
    """Mappings, lists and scalars of one YAML document; ValueError that says where it is none."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Leaves plain scalars alone; refuses aliases, whose expansion has no bound, and keys that come twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias (*): write the value, or use extends", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = (
                "twice" if isinstance(key, Hashable) and key in found else "" if isinstance(key, str) else "no text"
            )
            if problem:
                what = f"the key {key!r} is there twice" if problem == "twice" else f"{key!r} cannot be a key"
                raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=deep)
        return found


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    value = loader.construct_scalar(node)
    return Plain(value) if node.style is None and node.tag == "tag:yaml.org,2002:str" else str(value)


_Loader.add_constructor("tag:yaml.org,2002:str", _text)
