"""Ctrl-C, SIGTERM, SIGKILL and a full disk in the middle of an import or an export: nothing that looks finished is left,
and the same command starts clean afterwards. (Upcycling is an import; its own signals are in test_upcycle.py.)
"""

import errno
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.checkpoint import commit, convert
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.checkpoint.tensor_files import HashedFile, SafetensorsWriter
from megatron_omni.checkpoint.torch_dist import TorchDistWriter
from megatron_omni.checkpoint.verify import verify
from megatron_omni.cli.convert import main
from megatron_omni.config.run import Recipe
from tests.parity import foreign

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("foreign") / "hf"
    foreign.qwen2(directory)
    return directory


@pytest.fixture(scope="module")
def ours(hf: Path) -> Path:
    return imported(hf, hf.with_name("ours"))


def imported(hf: Path, out: Path) -> Path:
    opened = open_sources(language=hf)
    import_checkpoint(opened.parts, Recipe(model=opened.model), out, wanted=opened.wanted)
    return out


def tool(log: Path, *arguments: str | Path, before: Callable[[], None] = lambda: None) -> int:
    """Exit status of megatron-omni convert in a process of its own, forked: nothing is imported again. ``before`` runs there."""

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()
        with log.open("w") as sys.stderr:
            status = main([str(a) for a in arguments])
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=240)
    assert process.exitcode is not None, "the tool hangs"
    return process.exitcode


def command(name: str, hf: Path, ours: Path, out: Path) -> list[str | Path]:
    source: list[str | Path] = ["--hf", hf, "--tp", "2"] if name == "import" else ["--checkpoint", ours]
    return [name, *source, "--out", out]


def strike(place: Any, name: str, call: int, number: int) -> Callable[[], None]:
    """To be run in the tool's process: it gets the signal ``number`` when ``place.name`` is called for the ``call``-th time."""

    def install() -> None:
        real, calls = getattr(place, name), 0

        def struck(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), number)
            return real(*args, **settings)

        setattr(place, name, struck)

    return install


MOMENTS: dict[str, tuple[str, Any, str, int, int]] = {
    "import, first tensor": ("import", TorchDistWriter, "write", 1, signal.SIGINT),
    "import, in the middle": ("import", TorchDistWriter, "write", 25, signal.SIGTERM),
    "import, second of two files being closed": ("import", HashedFile, "finish", 2, signal.SIGINT),
    "import, files being flushed": ("import", commit, "flush_tree", 1, signal.SIGINT),
    "import, visible but not yet named by the tracker": ("import", commit, "write_text", 3, signal.SIGINT),
    "import, killed": ("import", TorchDistWriter, "write", 25, signal.SIGKILL),
    "export, first tensor": ("export", SafetensorsWriter, "write", 1, signal.SIGINT),
    "export, in the middle": ("export", SafetensorsWriter, "write", 25, signal.SIGTERM),
    "export, files being flushed": ("export", commit, "flush_tree", 1, signal.SIGINT),
    "export, killed": ("export", SafetensorsWriter, "write", 25, signal.SIGKILL),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_command_leaves_nothing_and_starts_clean(
    tmp_path: Path, hf: Path, ours: Path, moment: str
) -> None:
    name, place, method, call, number = MOMENTS[moment]
    out, words = tmp_path / "out", command(name, hf, ours, tmp_path / "out")
    status = tool(tmp_path / "log", *words, before=strike(place, method, call, number))
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL and list(tmp_path.rglob(".tmp_*")), "it was not killed in the middle"
        assert not list(tmp_path.rglob("iter_*")) and not list(out.rglob("*.safetensors"))
    else:
        assert status == 130 and "a rerun starts clean" in (tmp_path / "log").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["log"], "something is left"
    assert tool(tmp_path / "log", *words) == 0, (tmp_path / "log").read_text()
    assert verify(out)[-1].endswith("all equal") and not list(tmp_path.rglob(".tmp_*"))


def test_a_disk_that_is_full_when_a_file_is_closed_is_said_to_be(tmp_path: Path, hf: Path) -> None:
    """The first of two files is closed already, and is not closed again in the place of the error."""

    def full() -> None:
        real, calls = os.fsync, 0

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        os.fsync = fsync  # type: ignore[assignment]

    status = tool(tmp_path / "log", *command("import", hf, hf, tmp_path / "out"), before=full)
    assert status == 1 and os.strerror(errno.ENOSPC) in (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("name", ["import", "export"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, hf: Path, ours: Path, name: str) -> None:
    """A limit on the size of a file stops the writer in the middle, as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    status = tool(tmp_path / "log", *command(name, hf, ours, tmp_path / "out"), before=limit)
    said = (tmp_path / "log").read_text()
    assert status == 1 and os.strerror(errno.EFBIG) in said and "a rerun starts clean" in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, the disk has 0\.0 GB free; nothing was written"):
        imported(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_others_put_into_the_directory_stays(tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    monkeypatch.setattr(commit, "publish", lambda *args, **settings: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        imported(hf, tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/notes.txt"]


def test_a_signal_inside_torchs_writer_is_still_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch closes the half-written archive on the way out and complains of that: the signal must not be lost in it."""
    write, calls = HashedFile.write, 0

    def stopped(self: HashedFile, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return write(self, data)

    monkeypatch.setattr(HashedFile, "write", stopped)
    writer = TorchDistWriter(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        writer.write("a", torch.ones(4), shape=(4,), offsets=(0,), rank=0)
    writer.close()
