"""Whether an order of samples begins like the one that a state was saved with.

A resumed run may change what lies ahead: a source that joins later, a weight that changes later, rows appended to a file
that nothing was drawn from yet. What was drawn must stay as it was, or samples would come twice or never. Both follow
from the phases of the order (mixture.py) up to the cursor. A state of an earlier version does not describe all of an order:
nothing may change for it.
"""

from dataclasses import fields
from typing import Any

from megatron_omni.data.mixture import Component, Mixture

_COMPONENT = [field for field in fields(Component) if field.name not in ("rows", "source")]


def describe_order(mixture: Mixture) -> dict[str, Any]:
    """Plain values of everything that the order depends on; what has its default is left out of a component."""
    return {
        "seed": mixture.seed,
        "batch_by": mixture.batch_by,
        "samples_per_item": mixture.samples_per_item,
        "components": [_plain(part) for part in mixture.components],
    }


def _plain(part: Component) -> dict[str, Any]:
    values = {field.name: getattr(part, field.name) for field in _COMPONENT}
    values["reweight"] = [list(pair) for pair in part.reweight]
    return {field.name: values[field.name] for field in _COMPONENT if getattr(part, field.name) != field.default}


def check_past(mixture: Mixture, saved: dict[str, Any], num_samples: int) -> None:
    """ValueError unless the first ``num_samples`` samples of ``mixture`` are those of the order ``saved``."""
    mine = describe_order(mixture)
    problem = None
    if "components" not in saved and saved["sources"] != (sources := _as_before(mixture)):
        problem = (
            f"its sources were {saved['sources']}, are {sources}, and since an earlier version saved it none may change"
        )
    for key in ("samples_per_item", "batch_by", "seed"):
        if saved[key] != mine[key]:
            problem = f"{key} was {saved[key]}, is {mine[key]}"
    if problem is None and saved.get("components", mine["components"]) != mine["components"]:
        problem = _other_sources(_described(saved), mixture, num_samples)
    if problem is not None:
        raise ValueError(
            f"the data changed since this state was saved: {problem}; restore it (what joins or changes later may "
            "change), or start a new run from the weights with init_from"
        )


def _as_before(mixture: Mixture) -> list[list[Any]]:
    """The components as earlier versions described them."""
    return [
        [part.name, part.num_rows, part.weight, part.from_sample, *map(list, part.reweight)]
        + ([f"epochs {part.epochs}"] if part.epochs is not None else [])
        for part in mixture.components
    ]


def _described(saved: dict[str, Any]) -> Mixture:
    """An order that was described; its rows are numbers without records."""
    parts = [
        Component(**part | {"reweight": tuple(map(tuple, part.get("reweight", ())))}) for part in saved["components"]
    ]
    return Mixture(parts, seed=saved["seed"], batch_by=saved["batch_by"], global_batch_size=saved["samples_per_item"])


def _other_sources(then: Mixture, now: Mixture, num_samples: int) -> str | None:
    was, found = then.past(num_samples), now.past(num_samples)
    if was != found:
        at = next((i for i, (a, b) in enumerate(zip(was, found)) if a != b), min(len(was), len(found)))
        return f"its sources were {_said(was, at)}, are {_said(found, at)}"
    if now.num_samples is not None and now.num_samples < num_samples:
        return f"{num_samples} samples were drawn, data.sources[].epochs now end after {now.num_samples}"
    return None


def _said(past: list[tuple[int, list[tuple[str, int, int]]]], at: int) -> str:
    if at >= len(past):
        return "the same as before that"
    start, parts = past[at]
    whole = sum(share for *_, share in parts)
    told = (f"{name} ({share / whole:.1%}, {num_rows} rows)" for name, num_rows, share in parts)
    return f"{', '.join(told)} from sample {start} on"
