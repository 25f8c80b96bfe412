"""Save and load a training run through Megatron's distributed checkpoints (``torch_dist``).

A checkpoint holds model weights, optimizer state (``fully_reshardable``: any TP, PP, EP and DP can read it), one RNG
state per global rank, the common state (training counters, data cursor, layout), ``run_config.yaml`` and the
tokenizer. How its directory becomes visible is in ``commit.py``.

Every rank sees the same outcome: after each phase the ranks exchange their errors, and one failure anywhere becomes one
:class:`CheckpointError` everywhere, with the temporary directory removed. torch's ``CheckpointException`` derives from
``BaseException``, so it is named wherever errors are caught.

Files are read without running what is pickled in them (``untrusted.py``).
Shapes and dtypes are compared before a tensor is read: Megatron would cast a wrong dtype in silence.
"""

import fnmatch
import gc
import logging
import queue
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_tensors_metadata
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import _get_cuda_rng_state, _set_cuda_rng_state, get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megatron_omni.checkpoint import commit, untrusted
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.run import Recipe

RUN_CONFIG = "run_config.yaml"
TOKENIZER = "tokenizer"
FAILURES = (Exception, CheckpointException)

untrusted.install()


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    common: dict[str, Any],
    recipe: Recipe,
    pg: ProcessGroupCollection,
    score: tuple[str, float] | None = None,
) -> Path:
    """Write ``root/iter_<step>`` and make it the latest; all ranks call this together.

    ``common`` is plain values, equal on every rank; ``score`` as :func:`commit.publish` takes it. Raises CheckpointError
    on every rank when any rank fails; the previous checkpoint stays what it was.
    """
    try:
        _on_first_rank(lambda: commit.begin(root, step), what=f"{root}: cannot start a checkpoint")
        _together(lambda: _write_tensors(commit.temporary_dir(root, step), model, optimizer, common, pg), what="saving")
        _on_first_rank(lambda: _finish(root, step, recipe, score), what="finishing the checkpoint")
    except CheckpointError:
        if dist.get_rank() == 0:
            commit.abandon(root, step)
        raise
    return commit.iteration_dir(root, step)


def load_checkpoint(
    directory: Path, *, model: MegatronModule, optimizer: MegatronOptimizer, pg: ProcessGroupCollection
) -> dict[str, Any]:
    """Restore weights, optimizer and (on the same number of ranks) RNG state; the common state.

    ``directory`` as :func:`find_checkpoint` returned it, so verified. Raises ValueError when the checkpoint's tensors
    are not the model's, naming the tensor and both shapes.
    """
    metadata = _metadata(pg)
    weights = model.sharded_state_dict(prefix="", metadata=metadata)
    wanted: dict[str, Any] = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata),
    }
    _compare(wanted, directory, prefix="")
    layout = _read(lambda: dist_checkpointing.load_common_state_dict(directory), directory)["layout"]
    if layout["world_size"] == dist.get_world_size():
        wanted["rng"] = _rng_shard()
    state = _read(lambda: dist_checkpointing.load(wanted, str(directory)), directory)
    model.load_state_dict(state["model"])
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
) -> None:
    """Restore the weights alone, strictly: the same tensors with the same shapes and dtypes.

    ``directory`` as :func:`find_checkpoint` returned it, so verified. Tensors whose names match a shell-style pattern of
    ``allow_missing`` may be absent from it and then stay as they are; those of ``allow_extra`` may be in it unused.
    """
    weights = model.sharded_state_dict(prefix="", metadata=_metadata(pg))
    absent = _compare(
        {"model": weights}, directory, prefix="optimizer.", allow_missing=allow_missing, allow_extra=allow_extra
    )
    present = {name: value for name, value in weights.items() if not _keys(value) & absent}
    state = _read(lambda: dist_checkpointing.load({"model": present}, str(directory)), directory)["model"]
    left = model.load_state_dict(state, strict=not absent)
    # Non-tensors (extra states) have no entry of their own in a checkpoint; of the tensors, only the absent may be left.
    assert not left.unexpected_keys and not set(left.missing_keys) & set(present), left


def _read(action: Callable[[], dict[str, Any]], directory: Path) -> dict[str, Any]:
    """``action()``; what torch's reader refused or could not read becomes a CheckpointError."""
    try:
        return action()
    except CheckpointException as error:
        raise CheckpointError(f"{directory}: {_reason(error)}") from error


def find_checkpoint(path: Path) -> Path | None:
    """The newest whole checkpoint at ``path``, chosen and verified by rank 0 for everyone; None when there is none."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [commit.find(path), None]
        except CheckpointError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return answer[0]


def tokenizer_path(directory: Path) -> Path:
    """The tokenizer inside a checkpoint, as ``data.tokenizer`` takes it."""
    model = directory / TOKENIZER / "tokenizer.model"
    return model if model.is_file() else directory / TOKENIZER


def _write_tensors(
    directory: Path,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    common: dict[str, Any],
    pg: ProcessGroupCollection,
) -> None:
    """Megatron's ``dist_checkpointing.save`` in its parts, so that no rank waits at a barrier for one that has failed."""
    metadata = _metadata(pg)
    weights = model.sharded_state_dict(prefix="", metadata=metadata)
    state: dict[str, Any] = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata),
        "rng": _rng_shard(),
        "common": common,
        "layout": {"world_size": dist.get_world_size()},
    }
    sharded, plain = save_preprocess(state)
    sharded["common_state"] = ShardedObject("common_state", plain, (1,), (0,), replica_id=dist.get_rank())
    # The writer hands its results over through a queue that Megatron starts a helper process for, to serve
    # asynchronous saves. In a synchronous save both ends are this process; a plain queue saves seconds and an orphan
    # when a run is killed.
    filesystem_async._results_queue = queue.Queue()
    torch_strategy._logged_mcore_async_deprecation = True  # a synchronous save goes through the same function
    torch_strategy.TorchDistSaveShardedStrategy().save(sharded, directory)


def _finish(root: Path, step: int, recipe: Recipe, score: tuple[str, float] | None) -> None:
    directory = commit.temporary_dir(root, step)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    commit.write_text(directory / RUN_CONFIG, recipe_to_yaml(recipe))
    _copy_tokenizer(Path(recipe.data.tokenizer), directory / TOKENIZER)
    commit.publish(root, step, keep=recipe.checkpoint.keep, score=score)


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    if source.is_file():
        shutil.copyfile(source, target / ("tokenizer.model" if source.suffix == ".model" else source.name))
    else:
        for file in source.iterdir():
            if file.is_file() and file.suffix in {".json", ".txt", ".model"}:
                shutil.copyfile(file, target / file.name)


def _metadata(pg: ProcessGroupCollection) -> dict[str, Any]:
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


def _rng_shard() -> ShardedObject:
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


def _together(action: Callable[[], Any], *, what: str) -> None:
    """Run ``action`` on every rank; if it fails on any, CheckpointError on all of them."""
    failure = None
    with _writer_errors() as errors, _no_garbage_collection():
        try:
            action()
        except FAILURES as error:
            gc.freeze()
            text = errors[0] if errors else _reason(error)
            failure = _Failure(f"[rank {dist.get_rank()}] {what}: {text}", is_cause=bool(errors))
    _agree(failure)


def _on_first_rank(action: Callable[[], Any], *, what: str) -> None:
    """Run ``action`` on rank 0; if it fails, CheckpointError on every rank."""
    failure = None
    if dist.get_rank() == 0:
        try:
            action()
        except FAILURES as error:
            failure = _Failure(f"{what}: {_reason(error)}", is_cause=True)
    _agree(failure)


class _Failure(NamedTuple):
    text: str
    is_cause: bool
    """Whether this rank itself failed, not merely heard of it."""


def _agree(failure: _Failure | None) -> None:
    everyone: list[_Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failure)
    failures = sorted((f for f in everyone if f is not None), key=lambda f: not f.is_cause)
    if failures:
        raise CheckpointError(failures[0].text)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """torch's zip writer, left in a reference cycle by a write that failed, crashes the process when the collector
    finds it.

    So nothing is collected while files are written, and after a failure what exists then is exempt for good.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _writer_errors() -> Iterator[list[str]]:
    """What Megatron's file writer logs as errors inside the block: it drops the text of an OSError from its exception."""
    errors: list[str] = []
    writer = logging.getLogger(filesystem_async.__name__)

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            errors.append(record.getMessage().split("an error: ")[-1])
        return record.levelno < logging.ERROR

    writer.addFilter(keep)
    try:
        yield errors
    finally:
        writer.removeFilter(keep)


def _reason(error: BaseException) -> str:
    """The error that started it: torch wraps the failures of all ranks, each with its traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"on rank {rank}: {inner}"
    return f"{type(error).__name__}: {error}"
