"""Log-probabilities of pairs under the weights that a run starts from, in ``RUN_DIR/reference.npz``: 16 bytes a pair.

Before the first step one pass without gradients goes through the steps that the run will take, in their order and
micro-batches, and through those of its held-out sets; rank 0 writes what all found every few steps, so a start that was
interrupted goes on there. A value belongs to a sample of the order of the data (data/mixture.py), and the file says of
which weights, data and tokens it is: another one is made again before the first step. A run that goes on must find the
one that it began with, which its checkpoint names; what is added when it is made longer is computed with the weights of
``init_from`` again.
"""

import dataclasses
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.checkpoint.distributed import RUN_CONFIG
from megatron_omni.checkpoint.run_dir import REFERENCE
from megatron_omni.config.load import load_recipe, recipe_to_dict
from megatron_omni.data.index import Fingerprint, tokenizer_digest
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.mixture import DataEnded
from megatron_omni.data.past import describe_order
from megatron_omni.data.record import Message, Record
from megatron_omni.data.responses import responses_of
from megatron_omni.foreign import parse_json
from megatron_omni.losses.dpo import pair_sums
from megatron_omni.parallel.schedule import LossFunction, run_step
from megatron_omni.parallel.sharing import from_rank_0
from megatron_omni.parallel.wrap import gather_weights, unwrap_model
from megatron_omni.tasks.start_weights import put_back
from megatron_omni.training.initial_weights import load_initial_weights
from megatron_omni.training.setup import Run, initial_checkpoint, weights_digest
from megatron_omni.training.step_data import next_batches

logger = logging.getLogger(__name__)

STEPS_AT_ONCE = 32
"""Steps between two writes of the file, which the ranks exchange then."""
_OTHER_FIELDS = (
    "sources", "eval_sources", "tokenizer", "micro_batch_size", "num_workers", "prefetch_gib", "stall_seconds", "cache_gib",
    "decoder", "max_bad_fraction", "pad_to_multiple_of",
)  # fmt: skip
"""Of the data group: told in another way, or without effect on anything but the last bits."""


@dataclasses.dataclass
class Table:
    """The pairs of one loader."""

    values: NDArray[np.float64]
    """[N, 2] by number in the order: log p of the chosen and of the rejected response; NaN where it is not known."""
    steps: int = 0
    """Steps that were computed."""
    ended: bool = False
    """The data ends there."""

    def add(self, numbers: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Enter ``values`` [n, 2] of pairs ``numbers`` [n]."""
        size = int(numbers.max(initial=-1)) + 1
        if size > len(self.values):
            grown = np.full((max(size, 2 * len(self.values)), 2), np.nan)
            grown[: len(self.values)] = self.values
            self.values = grown
        self.values[numbers] = values


class Reference:
    """The tables of a run: of its training data ("") and of each held-out set by name."""

    def __init__(self, key: dict[str, Any], tables: dict[str, Table] | None = None) -> None:
        self.key, self.tables = key, tables or {}
        self._on_device: dict[str, Tensor] = {}

    @property
    def digest(self) -> str:
        """What names the weights, data and tokens that it is of; held-out sets may come and go."""
        told = {"weights": self.key["weights"], "data": self.key["data"], "set": self.key["sets"][""]}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def of(self, numbers: Tensor, *, held_out: str) -> Tensor:
        """[P, 2] float64 of the pairs ``numbers`` [P]."""
        table = self._on_device.get(held_out)
        if table is None or table.device != numbers.device:
            table = self._on_device[held_out] = torch.from_numpy(self.tables[held_out].values).to(numbers.device)
        return table.index_select(0, numbers)

    def write(self, path: Path) -> None:
        """Put the file in its place, whole or not at all."""
        arrays: dict[str, Any] = {"key": np.array(json.dumps(self.key))}
        for name, table in self.tables.items():
            arrays[f"values/{name}"] = table.values
            arrays[f"steps/{name}"] = np.array([table.steps, table.ended])
        partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial.npz")
        try:
            np.savez(partial_path, **arrays)
            os.replace(partial_path, path)
        finally:
            partial_path.unlink(missing_ok=True)


def read(path: Path) -> Reference | None:
    """What the file holds; None where there is none, or one that is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [name.removeprefix("steps/") for name in file.files if name.startswith("steps/")]
            steps = {name: file[f"steps/{name}"].tolist() for name in names}
            tables = {n: Table(file[f"values/{n}"], int(steps[n][0]), bool(steps[n][1])) for n in names}
            return Reference(parse_json(str(file["key"]), str(path)), tables)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: damaged (%s)", path, error)
        return None


def complete_reference(
    run: Run, *, expected: str | None, stop: Callable[[], bool], moved: Callable[[], None]
) -> Reference | None:
    """The reference of every pair that ``run`` will read, made as far as it is not there; None where a stop was asked for.

    All ranks call this together. ``expected``: digest of the one that a run which goes on began with. ValueError where it
    is gone or another; ``moved`` is called after every step.
    """
    path = Path(run.recipe.run_dir) / REFERENCE
    found = from_rank_0(partial(_found, run, path, expected))
    assert run.loader is None or isinstance(run.loader, StepLoader)
    wanted: list[tuple[str, StepLoader | None, int]] = [("", run.loader, run.recipe.train_iters)]
    if run.recipe.log.eval_interval > 0:
        wanted += [(name, loader, run.recipe.log.eval_iters) for name, loader in run.eval_loaders.items()]
    missing = [w for w in wanted if not (table := found.tables.setdefault(w[0], Table(np.empty((0, 2))))).ended
               and table.steps < w[2]]  # fmt: skip
    if not missing:
        return found
    gather_weights(run.model)
    with _weights_of_start(run, found.key["weights"]["checkpoint"]):
        for name, loader, steps in missing:
            if not _completed(run, found, name, loader, steps, path=path, stop=stop, moved=moved):
                return None
    return found


def _found(run: Run, path: Path, expected: str | None) -> Reference:
    """On rank 0: what the file holds of this run's pairs, or nothing yet."""
    there = read(path)
    mine = Reference({"weights": _weights_key(run), "data": _data_key(run), "sets": _sets_key(run)})
    if expected is None:
        same = there is not None and there.digest == mine.digest
        if there is not None and not same:
            logger.info("%s is of other weights, data or tokens: made again", path)
    else:
        same = there is not None and there.digest == expected
        if there is not None:
            mine.key["weights"] = there.key["weights"]  # those of init_from are not looked at when a run goes on
        if there is None or not same or mine.digest != expected:
            why = "there is none" if there is None else "it is of other weights, data or tokens"
            raise ValueError(
                f"{path}: the reference that this run began with is needed to go on, and {why}; put it back with the data "
                "settings that it was made with, or start a new run from init_from"
            )
    if there is not None and same:
        sets = mine.key["sets"]
        mine.tables = {name: table for name, table in there.tables.items() if there.key["sets"][name] == sets.get(name)}
    return mine


def _weights_key(run: Run) -> dict[str, Any]:
    """What the log-probabilities of given tokens follow from."""
    recipe = run.recipe
    weights = {"checkpoint": run.initial_weights, "seed": recipe.seed, "precision": recipe.optim.precision}
    return _plain(weights | {"model": recipe_to_dict(recipe)["model"]})


def _data_key(run: Run) -> dict[str, Any]:
    """What the tokens of the run's pairs follow from."""
    recipe = run.recipe
    assert run.loader is not None, "rank 0 reads data"
    builder = run.loader.builder
    probe = builder.build_prompt(Record(messages=(Message("user", "a"),)))
    data = {name: value for name, value in vars(recipe.data).items() if name not in _OTHER_FIELDS}
    return _plain(
        {
            "tokenizer": tokenizer_digest(recipe.data.tokenizer),
            "template": probe.input_ids.tolist(),
            "settings": data,
        }
    )


def _sets_key(run: Run) -> dict[str, Any]:
    """Which pair has which number, of each table."""
    loaders = {name: loader for name, loader in ({"": run.loader} | run.eval_loaders).items() if loader is not None}
    files = {name: [path for source in loader.sources for path in _files(source)] for name, loader in loaders.items()}
    return _plain(
        {
            name: {"order": describe_order(loader.mixture), "files": [Fingerprint.of(p).digest for p in files[name]]}
            for name, loader in loaders.items()
        }
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    told: dict[str, Any] = parse_json(json.dumps(values, sort_keys=True), "key")
    return told


def _files(source: Any) -> list[Path]:
    return [shard.path for shard in getattr(source, "shards", [source])]


def _completed(
    run: Run, found: Reference, name: str, loader: StepLoader | None, steps: int, *, path: Path,
    stop: Callable[[], bool], moved: Callable[[], None],
) -> bool:  # fmt: skip
    """Compute the missing steps of one table; False where a stop was asked for."""
    table, stopping = found.tables[name], False
    state = loader.state_dict() if loader is not None else {}
    if loader is not None:
        loader.load_state_dict({"consumed_samples": table.steps * run.recipe.data.global_batch_size})
    if dist.get_rank() == 0:
        logger.info("reference: step %d to %d of %s", table.steps + 1, steps, name or "the run")
    reports: list[tuple[Tensor, Tensor]] = []
    while table.steps < steps and not table.ended and not stopping:
        try:
            batches, totals = next_batches(run, loader, stop=stop)
        except DataEnded:
            table.ended = True
        else:
            reports += run_step(_measure, batches, run.model, pg=run.pg, recipe=run.recipe, forward_only=True)
            stopping = totals["stop"] > 0
            table.steps += 1
        moved()
        if table.ended or stopping or table.steps == steps or table.steps % STEPS_AT_ONCE == 0:
            for numbers, values in _exchanged(run, reports):
                table.add(numbers, values)
            reports = []
            if dist.get_rank() == 0:
                found.write(path)
    if loader is not None:
        loader.load_state_dict(state)
    return not stopping


def _measure(batch: OmniBatch, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """A forward whose report is (numbers [P], log p [P, 2]) of the micro-batch's pairs."""

    def report(token_loss: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        found = responses_of(batch)
        counted = (found.lengths.view(-1, 2) > 0).all(1)
        numbers = found.facts(batch.sample_ids)[::2]
        sums = pair_sums(found.of(-token_loss), found.valid)
        return token_loss.sum(), (torch.where(counted, numbers, -1), sums)

    return model(batch, step=0, stochastic=False), report


def _exchanged(
    run: Run, reports: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """What every rank found, on every rank."""
    own = None
    if reports and run.place.is_first:
        numbers, values = (torch.cat(parts).cpu().numpy() for parts in zip(*reports))
        own = numbers[numbers >= 0], values[numbers >= 0]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    yield from (found for found in everyone if found is not None)


@contextmanager
def _weights_of_start(run: Run, digest: str | None) -> Iterator[None]:
    """Inside, the model has the weights that the run began with."""
    if run.state.step == 0:
        yield
        return
    directory, why = initial_checkpoint(run.recipe), ""
    if directory is None or weights_digest(directory) != digest:
        why = "these are not the weights that it began with; name their checkpoint"
    elif (lora := load_recipe(directory / RUN_CONFIG).model.lora) is not None and lora != run.recipe.model.lora:
        why = "its adapters can only be merged before a run; start a new one"
    if why or directory is None:
        raise ValueError(
            f"init_from={run.recipe.init_from!r}: pairs are to be read that the reference of this run lacks, and {why}, or end "
            "the run where it was to end"
        )
    model = unwrap_model(run.model)
    with put_back(model.parameters()):
        load_initial_weights(model, run.recipe, directory, pg=run.pg)
        yield
