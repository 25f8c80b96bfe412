"""What a conversion will do, decided from headers alone: every key of every source and every tensor of ours, once.

A key without a row that is neither carried nor a twin, a tensor of ours that nothing fills, one
that two rows fill, and a wrong shape are collected, listed, and end the conversion before a byte is written.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_omni.checkpoint.families import Part
from megatron_omni.checkpoint.names import Entry, Row, expand
from megatron_omni.checkpoint.tensor_files import ConversionError

LISTED = 10


@dataclass(frozen=True)
class Job:
    """One tensor of ours (or one expert's) and the part that it comes from."""

    part: Part
    entry: Entry


@dataclass(frozen=True)
class Plan:
    """Checked against the headers of every source."""

    jobs: list[Job]
    carried: list[tuple[Part, str]]
    twins: list[tuple[Part, str, str]]
    """(part, key, the key that it must equal)."""

    def dtypes(self) -> set[torch.dtype]:
        """Of everything that fills our tensors."""
        return {job.part.source.infos()[key].dtype for job in self.jobs for key in job.entry.theirs}

    def num_bytes(self) -> int:
        """To read."""
        keys = [(job.part, key) for job in self.jobs for key in job.entry.theirs] + self.carried
        return sum(part.source.infos()[key].num_bytes for part, key in keys)


def make_plan(parts: Sequence[Part], wanted: Iterable[Row]) -> Plan:
    """The plan that fills every row of ``wanted`` from ``parts``; ConversionError lists everything that does not fit."""
    jobs = [Job(part, entry) for part in parts for entry in expand(part.rows)]
    problems = [*_unfilled(jobs, wanted), *(p for job in jobs for p in _misfits(job))]
    carried, twins = [], []
    for part in parts:
        used = {key for job in jobs if job.part is part for key in job.entry.theirs}
        for key in part.source.infos():
            if key in used:
                continue
            if part.same.get(key) in part.source.infos():
                twins.append((part, key, part.same[key]))
            elif any(re.fullmatch(pattern, key) for pattern in part.carried):
                carried.append((part, key))
            else:
                path = part.source.infos()[key].path
                problems.append(f"{path}: the key {key!r} has no place in a {part.family} model")
    if problems:
        heading = f"the sources do not fit ({len(problems)} problems):"
        raise ConversionError(problems[0] if len(problems) == 1 else listed(heading, problems))
    return Plan(jobs, carried, twins)


def listed(heading: str, lines: Sequence[str]) -> str:
    """``heading`` and the first of ``lines`` below it, the others counted."""
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n  - ".join([heading, *lines[:LISTED], *more])


def _unfilled(jobs: Sequence[Job], wanted: Iterable[Row]) -> Iterator[str]:
    filled: dict[tuple[str, int | None], Job] = {}
    for job in jobs:
        place = (job.entry.ours, job.entry.expert)
        if place in filled:
            yield f"{_name(job.entry)} would be filled twice: from {filled[place].part.source.label} and {job.part.source.label}"
        filled[place] = job
    for entry in expand(wanted):
        if (entry.ours, entry.expert) not in filled:
            yield f"nothing fills {_name(entry)} (it is made of {', '.join(entry.theirs)})"


def _misfits(job: Job) -> Iterator[str]:
    infos = job.part.source.infos()
    for key, shape in zip(job.entry.theirs, job.entry.shapes, strict=True):
        info = infos.get(key)
        if info is None:
            yield f"{job.part.source.label}: expected the key {key!r} of shape {list(shape)}, found none"
        elif info.shape != shape:
            yield f"{info.path}: {key!r}: expected shape {list(shape)}, found {list(info.shape)}"
        elif not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            yield f"{info.path}: {key!r}: expected 16- to 64-bit floating-point weights, found {info.dtype}"


def _name(entry: Entry) -> str:
    return entry.ours if entry.expert is None else f"{entry.ours}[{entry.expert}]"
