"""Checkpoints that were made to run code: every one is refused, and the code does not run."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_omni.checkpoint import untrusted
from megatron_omni.checkpoint.commit import CheckpointError

WEIGHT = torch.arange(6.0).view(2, 3)


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


class Spoken:
    """Unpickling this calls a function that a restricted unpickler might have forgotten."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that exists only once a payload ran; the payload is shown to work."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload is a dud"
    path.unlink()
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A benign distributed checkpoint with a tensor and a byte entry."""
    directory = tmp_path / "checkpoint"
    dcp.save({"weight": WEIGHT, "common": {"step": 7, "name": "run"}}, checkpoint_id=directory, no_dist=True)
    return directory


def load(directory: Path) -> dict[str, Any]:
    untrusted.install()
    state: dict[str, Any] = {"weight": torch.zeros(2, 3), "common": {"step": 0, "name": ""}}
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


def replace_metadata(directory: Path, value: Any) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(value))


def test_a_benign_checkpoint_loads(checkpoint: Path) -> None:
    state = load(checkpoint)
    assert torch.equal(state["weight"], WEIGHT) and state["common"] == {"step": 7, "name": "run"}


def test_metadata_that_runs_code_is_refused(checkpoint: Path, marker: Path) -> None:
    metadata = untrusted.read_metadata(checkpoint / ".metadata")
    metadata.planner_data = Payload(marker)
    replace_metadata(checkpoint, metadata)
    with pytest.raises(CheckpointError, match=r"\.metadata: refused: its pickle asks for pathlib.*touch|getattr"):
        untrusted.read_metadata(checkpoint / ".metadata")
    with pytest.raises((CheckpointError, CheckpointException), match="refused"):
        load(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize(
    "call", [(eval, "1"), (getattr, "x", "upper"), (__import__, "os"), (torch.load, "x"), (pickle.loads, b"N.")]
)
def test_every_other_callable_is_refused(checkpoint: Path, call: tuple[Any, ...]) -> None:
    replace_metadata(checkpoint, Metadata(state_dict_metadata={"x": Spoken(*call)}))  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="refused"):
        untrusted.read_metadata(checkpoint / ".metadata")


def test_an_allowed_module_does_not_open_its_other_names(checkpoint: Path) -> None:
    # The list holds exact names: what an allowed module imported (os, pickle, io) is not reachable through it.
    for module, name in sorted(untrusted.ALLOWED):
        for attempt in (f"{name}.__init__.__globals__", "os.system", "pickle.loads", "io.open"):
            stream = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(attempt))}{attempt}\x93.".encode("latin1")
            (checkpoint / ".metadata").write_bytes(stream)
            with pytest.raises(CheckpointError, match="refused"):
                untrusted.read_metadata(checkpoint / ".metadata")


def test_a_byte_entry_that_runs_code_is_refused(checkpoint: Path, marker: Path) -> None:
    metadata = untrusted.read_metadata(checkpoint / ".metadata")
    evil = io.BytesIO()
    torch.save(Payload(marker), evil)
    index, info = next((i, s) for i, s in metadata.storage_data.items() if i.fqn == "common.name")
    shard = checkpoint / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(evil.getvalue())
    shard.write_bytes(shard.read_bytes() + evil.getvalue())
    replace_metadata(checkpoint, metadata)
    with pytest.raises((CheckpointError, CheckpointException), match=r"'common\.name'.*refused"):
        load(checkpoint)
    assert index.fqn == "common.name" and not marker.exists()


@pytest.mark.parametrize("name", ["../outside.distcp", "/outside.distcp"])
def test_a_shard_outside_the_checkpoint_is_refused(checkpoint: Path, name: str) -> None:
    metadata = untrusted.read_metadata(checkpoint / ".metadata")
    next(iter(metadata.storage_data.values())).relative_path = name
    replace_metadata(checkpoint, metadata)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        untrusted.read_metadata(checkpoint / ".metadata")


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps([])[:-1]])
def test_what_is_no_metadata_is_one_error(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: (not readable|holds a)"):
        untrusted.read_metadata(checkpoint / ".metadata")


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_of_other_people(tmp_path: Path, marker: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"weights{suffix}"

    def save(value: Any) -> None:
        torch.save(value, path, _use_new_zipfile_serialization=zipped)

    save({"module": {"a.weight": WEIGHT.bfloat16()}})
    assert torch.equal(untrusted.read_torch_file(path)["a.weight"], WEIGHT.bfloat16())
    save({"a.weight": WEIGHT, "extra": Payload(marker)})
    with pytest.raises(ValueError, match="refused: not a file of plain tensors"):
        untrusted.read_torch_file(path)
    save({"a.weight": WEIGHT, "step": 3})
    with pytest.raises(ValueError, match="'step' is a int, expected a tensor"):
        untrusted.read_torch_file(path)
    save(WEIGHT)
    with pytest.raises(ValueError, match="holds a Tensor"):
        untrusted.read_torch_file(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=str(path)):
        untrusted.read_torch_file(path)
    assert not marker.exists()
