"""Load a training run from Megatron's distributed checkpoints (``torch_dist``); ``saving.py`` writes them.

A checkpoint holds model weights, optimizer state (``fully_reshardable``: any TP, PP, EP and DP can read it), one RNG
state per global rank, the common state (training counters, data cursor, layout), ``run_config.yaml`` and the
tokenizer. How its directory becomes visible is in ``commit.py``.

Files are read without running what is pickled in them (``untrusted.py``).
Shapes and dtypes are compared before a tensor is read: Megatron would cast a wrong dtype in silence.
"""

import fnmatch
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_tensors_metadata
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import _get_cuda_rng_state, _set_cuda_rng_state, get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megatron_omni.checkpoint import commit, untrusted
from megatron_omni.checkpoint.commit import CheckpointError

RUN_CONFIG = "run_config.yaml"
TOKENIZER = "tokenizer"
EXTRA_STATE = "_extra_state"
"""Ending of the names of a module's non-tensor state."""

untrusted.install()


def load_checkpoint(
    directory: Path, *, model: MegatronModule, optimizer: MegatronOptimizer, pg: ProcessGroupCollection
) -> dict[str, Any]:
    """Restore weights, optimizer and (on the same number of ranks) RNG state; the common state.

    ``directory`` as :func:`find_checkpoint` returned it, so verified. Raises ValueError when the checkpoint's tensors
    are not the model's, naming the tensor and both shapes.
    """
    metadata = sharding_metadata(pg)
    weights = model.sharded_state_dict(prefix="", metadata=metadata)
    wanted: dict[str, Any] = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata),
    }
    _compare(wanted, directory, prefix="")
    layout = _read(lambda: dist_checkpointing.load_common_state_dict(directory), directory)["layout"]
    if layout["world_size"] == dist.get_world_size():
        wanted["rng"] = rng_shard()
    lacking = _drop_lacking_extra_states(weights, directory)
    state = _read(lambda: dist_checkpointing.load(wanted, str(directory)), directory)
    _load_into(model, state["model"], absent=lacking)
    optimizer.load_state_dict(state["optimizer"])
    if "rng" in state:
        _set_rng_state(state["rng"])
    return dict(state["common"])


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
    ``allow_missing`` may be absent from it and then stay as they are; those of ``allow_extra`` may be in it unused.
    """
    weights = model.sharded_state_dict(prefix="", metadata=sharding_metadata(pg))
    absent = _compare(
        {"model": weights}, directory, prefix="optimizer.", allow_missing=allow_missing, allow_extra=allow_extra
    )
    lacking = {name for name, value in weights.items() if _keys(value) & absent}
    for name in lacking:
        del weights[name]
    lacking |= _drop_lacking_extra_states(weights, directory)
    state = _read(lambda: dist_checkpointing.load({"model": weights}, str(directory)), directory)["model"]
    _load_into(model, state, absent=lacking)
    return absent


def _drop_lacking_extra_states(weights: dict[str, Any], directory: Path) -> set[str]:
    """Remove from ``weights`` the ``_extra_state`` entries that the checkpoint lacks; their names.

    Which modules have such an entry depends on the backend that made them: Transformer Engine's norms do, even where they
    keep nothing in it (without fp8 it is empty), PyTorch's do not. A module without its entry stays as it was built.
    """
    stored = untrusted.read_metadata(directory / ".metadata").state_dict_metadata
    lacking = {
        name
        for name, value in weights.items()
        if name.endswith(EXTRA_STATE) and isinstance(value, ShardedObject) and value.unique_key not in stored
    }
    for name in lacking:
        del weights[name]
    return lacking


def _load_into(model: MegatronModule, state: dict[str, Any], *, absent: set[str]) -> None:
    """``load_state_dict`` of which nothing may be left but ``absent``."""
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= absent, left


def _read(action: Callable[[], dict[str, Any]], directory: Path) -> dict[str, Any]:
    """``action()``; what torch's reader refused or could not read becomes a CheckpointError."""
    try:
        return action()
    except CheckpointException as error:
        raise CheckpointError(f"{directory}: {reason_of(error)}") from error


def parameter_names(model: MegatronModule, keys: set[str], *, pg: ProcessGroupCollection) -> set[str]:
    """Names of this rank's parameters whose tensors are called ``keys`` in a checkpoint."""
    weights = model.sharded_state_dict(prefix="", metadata=sharding_metadata(pg))
    return {name for name, value in weights.items() if _keys(value) & keys}


def find_checkpoint(path: Path) -> Path | None:
    """The newest whole checkpoint at ``path``, chosen and verified by rank 0 for everyone; None when there is none."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [commit.find(path), None]
        except (CheckpointError, OSError) as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return answer[0]


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
    directory: Path,
    *,
    prefix: str,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> set[str]:
    """ValueError unless the checkpoint holds exactly the tensors of ``wanted``, over all ranks; keys with ``prefix``
    may be more, and what matches a pattern may be missing or extra. The names that are missing.
    """
    stored = load_tensors_metadata(str(directory))
    here = {tensor.key: (tuple(tensor.global_shape), tensor.dtype) for tensor in _tensors(wanted)}
    everywhere: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, here)
    ours = {key: value for rank in everywhere for key, value in rank.items()}
    absent = set()
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
        if tuple(there.global_shape) != shape:
            raise ValueError(
                f"{directory}: {key!r} has shape {list(there.global_shape)}, this model's has {list(shape)}; "
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


def reason_of(error: BaseException) -> str:
    """The error that started it: torch wraps the failures of all ranks, each with its traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"on rank {rank}: {inner}"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"
