"""Writing a checkpoint: at once, or by a thread beside the training steps that follow.

    start     collective: plan; for a background save, each rank copies its share, which training will change
    write     each rank alone: its share (shards.py), flushed to disk and hashed; the first also recipe and tokenizer
    finish    collective: metadata, manifest, rename (commit.py)

A background save stalls training for *start*, and for a *finish* that has only small files left to write; what it
retires is deleted by a thread, too. Until *finish* the previous checkpoint is in charge: a run that dies in between
leaves a temporary directory, which the next save removes.

Every rank sees the same outcome: after each phase the ranks exchange their errors, and one failure anywhere becomes one
:class:`CheckpointError` everywhere, with the temporary directory removed. torch's ``CheckpointException`` derives from
``BaseException``, so it is named wherever errors are caught.
"""

import gc
import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.distributed import RUN_CONFIG, TOKENIZER, rng_shard, sharding_metadata
from megatron_omni.checkpoint.memory import SaveMemory, to_main_memory
from megatron_omni.checkpoint.reading import reason_of
from megatron_omni.checkpoint.shards import FlatState, dealt, expert_keys, is_described
from megatron_omni.checkpoint.torch_dist import alone
from megatron_omni.checkpoint.vocabulary_rows import stored_weights
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.run import Recipe
from megatron_omni.parallel.long_work import long_work, nothing
from megatron_omni.parallel.sharing import gathered
from megatron_omni.platform.device import device

FAILURES = (Exception, CheckpointException)


class PendingSave:
    """A checkpoint between *start* and *finish*; made by :func:`start_save`."""

    def __init__(
        self,
        root: Path,
        step: int,
        *,
        recipe: Recipe,
        score: tuple[str, float] | None,
        strategy: "_Strategy",
        request: AsyncRequest,
    ) -> None:
        self.root, self.step = root, step
        self.retires = True
        """Whether publishing it may retire older checkpoints."""
        self._recipe, self._score, self._strategy, self._request = recipe, score, strategy, request
        self._digests: dict[str, str] = {}
        self._errors: list[str] = []
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._pieces = 0
        """Written and hashed so far."""

    @property
    def written(self) -> bool:
        """Whether this rank's files are on disk, or will not be."""
        return self._thread is None or not self._thread.is_alive()

    def write(self, moved: Callable[[], None] = lambda: None) -> None:
        """Write, flush and hash this rank's files; ``moved`` is called for every piece. Errors are handed over to
        :meth:`finish`.
        """
        with _writer_errors() as errors, _no_garbage_collection():
            for _, _, (_, items) in _buckets(self._request):
                items.moved = moved
            if self._request.async_fn is not None:
                self._request.async_fn(*self._request.async_fn_args, **self._request.async_fn_kwargs)
            self._errors = errors
            if errors:
                gc.freeze()
                return
        try:
            if dist.get_rank() == 0:
                self._describe(commit.temporary_dir(self.root, self.step))
            self._digests = {name: commit.sha256(Path(path), moved=moved) for path, name, _ in _buckets(self._request)}
        except FAILURES as error:
            self._failure = error

    def _describe(self, directory: Path) -> None:
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
        commit.write_text(directory / RUN_CONFIG, recipe_to_yaml(self._recipe))
        if not self._recipe.model.is_codec:
            _copy_tokenizer(Path(self._recipe.data.tokenizer), directory / TOKENIZER)

    def write_in_background(self) -> None:
        """The same, in a thread."""
        # Not a daemon thread of some pool: an interpreter that ends in order waits for the files.
        self._thread = threading.Thread(target=self.write, args=(self._count,), name="checkpoint")
        self._thread.start()

    def _count(self) -> None:
        self._pieces += 1

    def finish(self) -> Path:
        """Wait for the files of every rank and make the checkpoint the latest; all ranks call this together."""
        if self._thread is not None:
            self._wait_for(self._thread)
        try:
            _together(self._raise, what="saving")
            _together(self._collect, what="saving", errors=self._errors)
            digests: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(digests, self._digests)
            known = {name: digest for rank in digests for name, digest in rank.items()}
            _on_first_rank(lambda: self._publish(known), what="finishing the checkpoint")
        except CheckpointError:
            self._abandon()
            raise
        self._sweep()
        return commit.iteration_dir(self.root, self.step)

    def _wait_for(self, thread: threading.Thread) -> None:
        """Until the threads of all ranks are done."""
        with long_work("writing the checkpoint") as work:
            pieces = -1
            while thread.is_alive():
                thread.join(0.1)
                if pieces != self._pieces:
                    pieces = self._pieces
                    work.advance()
            work.exchange(None, answer=nothing)

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _collect(self) -> None:
        """Megatron's part after writing: gather what every rank wrote where, and write ``.metadata``."""
        for finalize in self._request.finalize_fns:
            finalize()
        if self._strategy.failure is not None:
            raise self._strategy.failure

    def _publish(self, digests: dict[str, str]) -> None:
        keep = self._recipe.checkpoint.keep if self.retires else 0
        commit.publish(self.root, self.step, keep=keep, digests=digests, score=self._score)

    def _sweep(self) -> None:
        """Delete what was retired: at once, or beside training as the files were written."""
        if dist.get_rank() != 0:
            return
        if self._thread is None:
            commit.sweep(self.root)
        else:
            threading.Thread(target=commit.sweep, args=(self.root,), name="checkpoint-sweep").start()

    def _abandon(self) -> None:
        if dist.get_rank() == 0:
            commit.abandon(self.root, self.step)


def start_save(
    root: Path,
    step: int,
    *,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    common: dict[str, Any],
    recipe: Recipe,
    pg: ProcessGroupCollection,
    own: Sequence[ShardedTensor] = (),
    score: tuple[str, float] | None = None,
    background: bool = False,
    memory: SaveMemory | None = None,
) -> PendingSave:
    """Begin to write ``root/iter_<step>``; all ranks call this together, and later :meth:`PendingSave.finish`.

    ``common`` is plain values, equal on every rank; ``own`` whole tensors that this rank alone of its data-parallel group has;
    ``score`` as :func:`commit.publish` takes it. ``background``: the
    files are written while training goes on; else before this returns. ``memory`` is reused from save to save, and
    belongs to this one until it is finished. Raises CheckpointError on every rank when any
    rank fails, or has a weight that is not finite; the previous checkpoint stays what it was.
    """
    pending: list[PendingSave] = []

    def plan() -> None:
        kept = memory or SaveMemory()
        sharded = _state(model, optimizer, common, pg, own=own, check=not kept.is_known)
        kept.is_known = True
        later = _let_go_of(kept, sharded, background=background)
        strategy = _Strategy()
        request = _plan(strategy, sharded, commit.temporary_dir(root, step), later)
        pending.append(PendingSave(root, step, recipe=recipe, score=score, strategy=strategy, request=request))

    # All ranks hear of it before any of them goes on.
    _together(lambda: _check_finite(model), what="saving")
    try:
        _on_first_rank(lambda: commit.begin(root, step), what=f"{root}: cannot start a checkpoint")
        _together(plan, what="saving")
    except CheckpointError:
        if dist.get_rank() == 0:
            commit.abandon(root, step)
        raise
    if background:
        pending[0].write_in_background()
    else:
        with long_work("writing the checkpoint") as work:
            pending[0].write(work.advance)
            work.exchange(None, answer=nothing)
    return pending[0]


def plan_save(model: MegatronModule, optimizer: MegatronOptimizer, pg: ProcessGroupCollection) -> None:
    """Name every tensor that a save will write, without copying or writing one; all ranks call this together.

    ValueError on every rank where that fails on any: no checkpoint of such a model could be made.
    """
    try:
        _together(lambda: _state(model, optimizer, {}, pg, check=True, only_names=True), what="planning a checkpoint")
    except CheckpointError as error:
        raise ValueError(f"no checkpoint of this model could be saved: {error}") from error


def _check_finite(model: MegatronModule) -> None:
    """CheckpointError for a weight that is not finite."""
    parameters = dict(model.named_parameters())
    # By the extremes, which carry a NaN on: isfinite() would make copies of each weight, for which a GPU has no room.
    extremes = [torch.stack(parameter.detach().aminmax()).float() for parameter in parameters.values()]
    finite = torch.stack(extremes).isfinite().all(dim=1).tolist()
    if not all(finite):
        raise CheckpointError(
            f"{list(parameters)[finite.index(False)]} is not finite; weights that have diverged are not saved, and the "
            "checkpoints before them stay. Lower optim.lr, or look at the samples in incidents.jsonl, and go on from one "
            "of them"
        )


def _state(
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    common: dict[str, Any],
    pg: ProcessGroupCollection,
    *,
    own: Sequence[ShardedTensor] = (),
    check: bool,
    only_names: bool = False,
) -> dict[str, Any]:
    """What is saved, each entry main replica on the rank that writes it. ``check``: all ranks compare what each says it
    has, which stays the same from save to save. ``only_names``: nothing is asked of the optimizer's state.
    """
    metadata = sharding_metadata(pg)
    weights = model.sharded_state_dict(prefix="", metadata=metadata)
    experts, flat = expert_keys(weights), FlatState(optimizer)
    with flat.described():
        state: dict[str, Any] = {
            "model": stored_weights(weights),
            "optimizer": optimizer.sharded_state_dict(weights, is_loading=only_names, metadata=metadata),
            "rng": rng_shard(),
            "common": common,
            "task": {tensor.key: tensor for tensor in own},
            "layout": {"world_size": dist.get_world_size()},
        }
    sharded, plain = save_preprocess(state, validate_access_integrity=check)
    entries: list[Any] = [ShardedObject("common_state", plain, (1,), (0,), replica_id=dist.get_rank())]
    equal, alone_here = [], {tensor.key for tensor in own}
    for value in nested_values(sharded):
        if is_described(value):
            entries.extend(flat.own(value))
        else:
            entries.append(value)
            if isinstance(value, ShardedTensor) and value.key not in alone_here:
                equal.append(value)
    for entry in dealt(equal, experts, pg):
        assert isinstance(entry.tensor.replica_id, tuple)
        entry.tensor.replica_id = (*entry.tensor.replica_id[:-1], int(not entry.is_ours))
    return {str(number): entry for number, entry in enumerate(entries)}


class _Strategy(torch_strategy.TorchDistSaveShardedStrategy):
    """Megatron's way of saving, but an error of rank 0 while it writes ``.metadata`` is kept until the ranks have heard
    of each other: raised where it happens, it would leave the others waiting in Megatron's broadcast.
    """

    failure: BaseException | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *arguments: Any) -> AsyncRequest:
        finish = writer.finish

        def finish_and_tell(*results: Any) -> None:
            try:
                finish(*results)
            except FAILURES as error:
                self.failure = error

        writer.finish = finish_and_tell
        return super()._get_save_and_finalize_callbacks(writer, *arguments)


def _plan(
    strategy: _Strategy, sharded: dict[str, Any], directory: Path, later: dict[int, torch.Tensor]
) -> AsyncRequest:
    """Megatron's ``dist_checkpointing.save`` in its parts, so that no rank waits at a barrier for one that has failed.

    The tensors of the result are on the CPU; what is in ``later`` stands in the place of its stand-in.
    """
    # The writer hands its results over through a queue that Megatron starts a helper process for. Here both ends are
    # this process; a plain queue saves seconds and an orphan when a run is killed.
    filesystem_async._results_queue = queue.Queue()
    torch_strategy._logged_mcore_async_deprecation = True  # a thread of ours, not Megatron's process, writes
    request = strategy.async_save(sharded, directory, async_strategy="mcore")
    if request.preload_fn is None:  # nothing to write on this rank
        return request
    rank, _, results = request.async_fn_args
    buckets = request.preload_fn()
    planned = {tensor.data_ptr() for _, _, (_, items) in buckets for _, tensor in items}
    assert planned >= set(later), "Megatron has copied a stand-in"
    buckets = [(path, name, (data, _WhenWritten(items, later))) for path, name, (data, items) in buckets]
    return request._replace(async_fn_args=(rank, buckets, results), preload_fn=None)


class _WhenWritten:
    """The (item, tensor) pairs of a file. What has to be copied is copied when its turn comes, never two at a time."""

    def __init__(self, items: list[tuple[Any, torch.Tensor]], later: dict[int, torch.Tensor]) -> None:
        self._items, self._later = items, later
        self.moved: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        for item, tensor in self._items:
            made = self._later.get(tensor.data_ptr())
            yield item, tensor if made is None else to_main_memory(made).view(tensor.shape)
            self.moved()


def _buckets(request: AsyncRequest) -> list[Any]:
    """(path, name, (bytes, tensors)) of every file of this rank."""
    return request.async_fn_args[1] if request.async_fn_args else []


def _let_go_of(memory: SaveMemory, sharded: dict[str, Any], *, background: bool) -> dict[int, torch.Tensor]:
    """Make the tensors that this rank writes the checkpoint's own; address of a stand-in -> what is written in its place.

    For a background save they are copied to main memory. Else they are written from where they are: under a storage of
    their own size over the same memory (Megatron would copy a slice of a larger one), and what is on a device or not
    contiguous is copied when its turn comes. That is planned with a stand-in, memory that nobody touches and that
    therefore costs nothing.
    """
    later = {}
    for value in sharded.values():
        if not isinstance(value, ShardedTensor) or value.data is None or not is_main_replica(value.replica_id):
            continue
        data = value.data.detach()
        if background:
            value.data = memory.copy(data, key=(value.key, value.global_offset))
        elif data.device.type == "cpu" and data.is_contiguous():
            value.data = alone(data)
        else:
            value.data = torch.empty(data.shape, dtype=data.dtype)
            later[value.data.data_ptr()] = data
    return later


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    if source.is_file():
        shutil.copyfile(source, target / ("tokenizer.model" if source.suffix == ".model" else source.name))
    else:
        for file in source.iterdir():
            if file.is_file() and file.suffix in {".json", ".txt", ".model"}:
                shutil.copyfile(file, target / file.name)


def _together(action: Callable[[], Any], *, what: str, errors: list[str] | None = None) -> None:
    """Run ``action`` on every rank; if it fails on any, CheckpointError on all of them.

    ``errors``: what this rank's writer said, which explains the failure better than its exception does.
    """
    failure = None
    try:
        action()
    except FAILURES as error:
        text = errors[0] if errors else reason_of(error)
        failure = _Failure(f"[rank {dist.get_rank()}] {what}: {text}", is_cause=bool(errors))
    _agree(failure)


def _on_first_rank(action: Callable[[], Any], *, what: str) -> None:
    """Run ``action`` on rank 0; if it fails, CheckpointError on every rank."""
    failure = None
    if dist.get_rank() == 0:
        try:
            action()
        except FAILURES as error:
            failure = _Failure(f"{what}: {reason_of(error)}", is_cause=True)
    _agree(failure)


class _Failure(NamedTuple):
    text: str
    is_cause: bool
    """Whether this rank itself failed, not merely heard of it."""


def _agree(failure: _Failure | None) -> None:
    """CheckpointError on every rank where any has a ``failure``; else one sum of one number."""
    own = [failure] if failure is not None else []
    failures = gathered(own, group=None, device=device())
    if failures:
        raise CheckpointError(min(failures, key=lambda f: not f.is_cause).text)


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
