"""Load a training run from Megatron's distributed checkpoints (``torch_dist``); ``saving.py`` writes them.

A checkpoint holds model weights, optimizer state (``fully_reshardable``: any TP, PP, EP and DP can read it), one RNG
state per global rank, the common state (training counters, data cursor, layout), ``run_config.yaml`` and the
tokenizer. How its directory becomes visible is in ``commit.py``.

Tensors are read straight into parameters and optimizer state, each rank its share (``reading.py``); every file is hashed
by one rank. Files are read without running what is pickled in them (``untrusted.py``).
Shapes and dtypes are compared before a tensor is read: Megatron would cast a wrong dtype in silence.
"""

import fnmatch
import hashlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import _get_cuda_rng_state, _set_cuda_rng_state, get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megatron_omni.checkpoint import commit, untrusted
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.means import MeansReader
from megatron_omni.checkpoint.reading import read_into_place, reason_of, together
from megatron_omni.checkpoint.shards import FlatState, deal, expert_keys, is_described
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.checkpoint.vocabulary_rows import (
    RowsReader,
    stored_weights,
    take_rows,
    trained_alone,
    with_rows_alone,
)
from megatron_omni.parallel.long_work import long_work
from megatron_omni.platform.device import device

RUN_CONFIG = "run_config.yaml"
TOKENIZER = "tokenizer"
EXTRA_STATE = "_extra_state"
"""Ending of the names of a module's non-tensor state."""

untrusted.install()


def load_checkpoint(
    directory: Path,
    *,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    pg: ProcessGroupCollection,
    own: Sequence[ShardedTensor] = (),
) -> dict[str, Any]:
    """Restore weights, optimizer, ``own`` (:func:`~megatron_omni.checkpoint.saving.start_save`) and (on the same number of
    ranks) RNG state; the common state.

    ``directory`` as :func:`find_checkpoint` returned it, so verified. Raises ValueError when the checkpoint's tensors
    are not the model's, naming the tensor and both shapes.
    """
    metadata, flat = sharding_metadata(pg), FlatState(optimizer)
    reader = together(directory, lambda _: RowsReader(directory, trained_alone(model)))
    weights = model.sharded_state_dict(prefix="", metadata=metadata)
    experts = expert_keys(weights)
    with flat.described():
        state = optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)
    weights = stored_weights(weights)
    _compare(
        {"model": weights, "optimizer": state, "task": {tensor.key: tensor for tensor in own}}, reader, pg=pg, prefix=""
    )
    objects = _objects(weights, reader)
    described, rest = extract_matching_values(state, is_described)
    wanted: dict[str, Any] = {"model": objects, "optimizer": rest}
    layout = _by_megatron(lambda: dist_checkpointing.load_common_state_dict(directory), reader)["layout"]
    if layout["world_size"] == dist.get_world_size():
        wanted["rng"] = rng_shard()
    loaded = _load(wanted, reader, experts=experts, pg=pg)
    _set_objects(model, loaded.get("model", {}), objects)
    optimizer.load_state_dict(_without_tensors(loaded["optimizer"]))
    # Last, for the optimizer may have moved its state.
    boxes = [box for tensor in _tensors(described) for box in flat.own(tensor)]
    read_into_place(reader, own=[*boxes, *own], equal=_weights_in_place(model, weights), experts=experts, pg=pg)
    take_rows(model)
    if "rng" in loaded:
        _set_rng_state(loaded["rng"])
    return dict(loaded["common"])


def load_weights(
    directory: Path,
    *,
    model: MegatronModule,
    pg: ProcessGroupCollection,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> set[str]:
    """Restore the weights alone, strictly: the same tensors with the same shapes and dtypes. The names that are absent.

    ``directory`` as :func:`find_checkpoint` returned it, so verified. Tensors whose names match a shell-style pattern of
    ``allow_missing`` may be absent from it and then stay as they are; those of ``allow_extra`` may be in it unused. Weights
    that have a running mean are it (means.py).
    """
    reader = together(directory, lambda _: MeansReader(directory))
    weights = stored_weights(model.sharded_state_dict(prefix="", metadata=sharding_metadata(pg)))
    absent = _compare(
        {"model": weights}, reader, pg=pg, prefix="optimizer.", allow_missing=allow_missing, allow_extra=allow_extra
    )
    weights = {name: value for name, value in weights.items() if not _keys(value) & absent}
    experts, objects = expert_keys(weights), _objects(weights, reader)
    loaded = _load({"model": objects}, reader, experts=experts, pg=pg)
    _set_objects(model, loaded.get("model", {}), objects)
    read_into_place(reader, own=[], equal=_weights_in_place(model, weights), experts=experts, pg=pg)
    take_rows(model)
    return absent


def _load(
    wanted: dict[str, Any], reader: TorchDistReader, *, experts: set[str], pg: ProcessGroupCollection
) -> dict[str, Any]:
    """Megatron's ``load`` of ``wanted``, tensors in their place."""
    strategy = _InPlace(reader, experts, pg)
    return _by_megatron(lambda: dist_checkpointing.load(wanted, str(reader.directory), strategy), reader)


class _InPlace(TorchDistLoadShardedStrategy):
    """Megatron's way of loading objects; tensors are read into the memory that they stand for."""

    def __init__(self, reader: TorchDistReader, experts: set[str], pg: ProcessGroupCollection) -> None:
        super().__init__()
        self._reader, self._experts, self._pg = reader, experts, pg

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "mcore") -> Any:
        """The loaded state dict; all ranks call this together."""
        tensors, objects = extract_matching_values(sharded_state_dict, lambda value: isinstance(value, ShardedTensor))
        equal = list(nested_values(tensors))
        read_into_place(self._reader, own=[], equal=equal, experts=self._experts, pg=self._pg)
        loaded = dict_list_map_outplace(lambda tensor: tensor.data, tensors)
        load = super().load
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The argument order of load")  # Megatron's call of torch's
            found = together(
                Path(checkpoint_dir), lambda _: load(objects, checkpoint_dir, async_strategy) if objects else {}
            )
        return merge(loaded, found)


def _objects(weights: dict[str, Any], reader: TorchDistReader) -> dict[str, Any]:
    """Entries of ``weights`` that are no tensors, as far as the checkpoint has them.

    They are modules' extra states. Which modules have one depends on the backend that made them: Transformer Engine's
    norms do, even where they keep nothing in it (without fp8 it is empty), PyTorch's do not.
    """
    stored = reader.table.state_dict_metadata
    objects = {name: value for name, value in weights.items() if isinstance(value, ShardedObject)}
    assert all(name.endswith(EXTRA_STATE) for name in objects), objects
    return {name: value for name, value in objects.items() if value.unique_key in stored}


def _set_objects(model: MegatronModule, state: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Give modules their extra states; a module without an entry stays as it was built."""
    assert state.keys() == wanted.keys(), (state.keys(), wanted.keys())
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left


def _weights_in_place(model: MegatronModule, weights: dict[str, Any]) -> list[ShardedTensor]:
    """The tensors of ``weights`` as views of the model's own memory."""
    tensors = list(_tensors(weights))
    memory = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    for tensor in tensors:
        assert tensor.data.untyped_storage().data_ptr() in memory or not tensor.data.numel(), tensor.key
    return tensors


def _without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's loaded state without the entry of a distributed one's tensors, which are read into their place."""
    for member in (state, *state.values()):  # alone, or one of a chain
        if isinstance(member, dict):
            member.pop("param_state", None)
    return state


def _by_megatron(action: Callable[[], dict[str, Any]], reader: TorchDistReader) -> dict[str, Any]:
    """``action()``, which reads what ``reader`` does; what torch refused or could not read becomes a CheckpointError."""
    try:
        with untrusted.known(reader.directory / ".metadata", reader.table):
            return action()
    except CheckpointException as error:
        raise CheckpointError(f"{reader.directory}: {reason_of(error)}") from error


def parameter_names(model: MegatronModule, keys: set[str], *, pg: ProcessGroupCollection) -> set[str]:
    """Names of this rank's parameters whose tensors are called ``keys`` in a checkpoint."""
    weights = model.sharded_state_dict(prefix="", metadata=sharding_metadata(pg))
    return {name for name, value in weights.items() if _keys(value) & keys}


def find_checkpoint(path: Path) -> Path | None:
    """The newest whole checkpoint at ``path``, chosen by rank 0 for everyone; None when there is none.

    Its files are verified by all ranks, each hashed by one of them.
    """
    answer: list[Any] = [None]
    if dist.get_rank() != 0:
        while True:
            dist.broadcast_object_list(answer, src=0)
            if not isinstance(answer[0], _Hashing):
                break
            answer[0].take_part()
    else:
        try:
            answer = [commit.find(path, hashed=_hash_together)]
        except (CheckpointError, OSError) as error:
            answer = [_Failed(str(error))]
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], _Failed):
        raise CheckpointError(answer[0].text)
    return answer[0]


class _Failed(NamedTuple):
    text: str


class _Hashing(NamedTuple):
    """Files whose digests are asked for, and the rank that computes each."""

    directory: Path
    names: list[str]
    owners: list[int]

    def take_part(self) -> dict[str, str]:
        """The digests on rank 0; all ranks call this together. What of them cannot be read has none."""
        with long_work(f"verifying {self.directory}") as work:
            found: dict[str, str] = {}
            everyone: list[dict[str, str]] = []
            for name, owner in zip(self.names, self.owners, strict=True):
                if owner == dist.get_rank():
                    try:
                        found[name] = commit.sha256(self.directory / name, moved=work.advance)
                    except OSError as error:
                        found[name] = f"unreadable on rank {owner}: {error}"
            work.exchange(found, answer=everyone.extend)
        return {name: digest for rank in everyone for name, digest in rank.items()}


def _hash_together(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """Rank 0's part of :func:`commit.find`: the digests of files, computed by all ranks."""
    if dist.get_world_size() == 1:
        return commit.hash_files(directory, names)
    sizes = [(directory / name).stat().st_size for name in names]
    hashing = _Hashing(directory, list(names), deal(sizes, dist.get_world_size()))
    dist.broadcast_object_list([hashing], src=0)
    return hashing.take_part()


def tokenizer_path(directory: Path) -> Path:
    """The tokenizer inside a checkpoint, as ``data.tokenizer`` takes it."""
    model = directory / TOKENIZER / "tokenizer.model"
    return model if model.is_file() else directory / TOKENIZER


def sharding_metadata(pg: ProcessGroupCollection) -> dict[str, Any]:
    """What Megatron's ``sharded_state_dict`` methods need to know; the sharding type has a deprecated default if left
    out.
    """
    return {
        "dp_cp_group": pg.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from (v for v in nested_values({"built": value.build()}) if isinstance(v, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value


def _keys(value: Any) -> set[str]:
    """Names in the checkpoint of what one entry of a state dict is made of."""
    return {tensor.key for tensor in _tensors({"entry": value})}


def _compare(
    wanted: dict[str, Any],
    reader: TorchDistReader,
    *,
    pg: ProcessGroupCollection,
    prefix: str,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> set[str]:
    """ValueError unless the checkpoint holds exactly the tensors of ``wanted``, over all ranks; keys with ``prefix``
    may be more, and what matches a pattern may be missing or extra. The names that are missing.
    """
    here = {tensor.key: (tuple(tensor.global_shape), tensor.dtype) for tensor in _tensors(wanted)}
    ours = _everywhere(here, pg)
    directory, stored, absent = reader.directory, with_rows_alone(reader.tensors, ours), set()
    for key, (shape, dtype) in ours.items():
        if key not in stored:
            if _matches(key, allow_missing):
                absent.add(key)
                continue
            raise ValueError(
                f"{directory}: has no tensor {key!r}, which this model has; the recipe must describe the same model, or "
                "name it in init_allow_missing"
            )
        there = stored[key]
        if there.shape != shape:
            raise ValueError(
                f"{directory}: {key!r} has shape {list(there.shape)}, this model's has {list(shape)}; "
                "the recipe must describe the same model"
            )
        if there.dtype != dtype:
            raise ValueError(
                f"{directory}: {key!r} is {there.dtype}, this run's is {dtype}; set optim.precision to the checkpoint's"
            )
    extra = [key for key in stored if key not in ours and not (prefix and key.startswith(prefix))]
    if extra := [key for key in extra if not _matches(key, allow_extra)]:
        raise ValueError(
            f"{directory}: holds the tensor {extra[0]!r}, which this model does not have ({len(extra)} such); the recipe "
            "must describe the same model, or name it in init_allow_extra"
        )
    return absent


def _everywhere(here: dict[str, Any], pg: ProcessGroupCollection) -> dict[str, Any]:
    """What all ranks have ``here``. Data-parallel ranks have the same: gathered over one replica, and over all ranks where that
    differs from replica to replica (a task's own tensors).
    """
    found = _union(here, pg.mp)
    digest = int.from_bytes(hashlib.sha256(repr(sorted(found.items(), key=str)).encode()).digest()[:7])
    bounds = torch.tensor([digest, -digest], device=device())
    if dist.get_world_size() > 1:
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    highest, lowest = bounds.tolist()
    return found if highest == -lowest else _union(found, None)


def _union(here: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    everyone: list[dict[str, Any]] = [here]
    if (size := dist.get_world_size(group)) > 1:
        everyone = [{} for _ in range(size)]
        dist.all_gather_object(everyone, here, group=group)
    return {key: value for rank in everyone for key, value in rank.items()}


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def rng_shard() -> ShardedObject:
    """This rank's random generators, under its global rank: two ranks never share a state."""
    return ShardedObject("rng", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),))


def _rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "device": _get_cuda_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, gauss))
    _set_cuda_rng_state(state["device"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
