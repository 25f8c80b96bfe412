"""Bodies that are strict about names and types, and say what is wrong with either (schema.py)."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")
_SHOWN = 60


class Model(BaseModel):
    """A body or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields of OpenAI's that mean something and are not honoured, with what to do instead."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        known: dict[str, Any] = {}
        for name, item in value.items():
            if name in cls.model_fields:
                known[name] = item
            elif name in cls.refused:
                if item not in _EMPTY:
                    raise PydanticCustomError(
                        "refused", "is not supported: {fix}", {"at": name, "fix": cls.refused[name]}
                    )
            elif not (info.context or {}).get("ignore_unknown"):
                near = difflib.get_close_matches(name[:64], cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(cls.model_fields)}"
                raise PydanticCustomError("unknown", "is an unknown field; {hint}", {"at": name[:_SHOWN], "hint": hint})
        # null stands for "not given" in what clients send.
        return {name: item for name, item in known.items() if item is not None}


def refuse(name: str, problem: str) -> None:
    """End the validation: the field ``name`` has this ``problem``."""
    raise PydanticCustomError("refused", "{problem}", {"at": name, "problem": problem})
