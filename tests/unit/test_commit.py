"""A checkpoint is visible only when whole, damage is found and passed over, and the last whole one is never deleted."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.commit import CheckpointError


def write(root: Path, step: int, *, keep: int = 0, text: str = "weights") -> Path:
    directory = commit.begin(root, step)
    (directory / "a.distcp").write_text(f"{text} {step}")
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.model").write_text("pieces")
    return commit.publish(root, step, keep=keep)


def test_nothing_is_visible_before_publish(tmp_path: Path) -> None:
    commit.begin(tmp_path, 1)
    assert commit.steps(tmp_path) == [] and commit.find(tmp_path) is None


def test_publish_makes_it_the_latest(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert write(tmp_path, 2) == tmp_path / "iter_0000002" == commit.find(tmp_path)
    assert (tmp_path / commit.TRACKER).read_text() == "2\n"
    assert not list(tmp_path.glob(".*"))


def test_found_through_a_run_directory_or_by_its_own_name(tmp_path: Path) -> None:
    made = write(tmp_path / "checkpoints", 3)
    assert commit.find(tmp_path) == made == commit.find(made)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "nested", "manifest"])
def test_damage_is_passed_over_for_the_older_one(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    whole, broken = write(tmp_path, 1), write(tmp_path, 2)
    victim = broken / "a.distcp"
    match damage:
        case "flip":
            victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
        case "truncate":
            victim.write_bytes(victim.read_bytes()[:-1])
        case "remove":
            victim.unlink()
        case "add":
            victim = broken / "b.distcp"
            victim.write_text("from another run")
        case "nested":
            victim = broken / "tokenizer" / "tokenizer.model"
            victim.write_text("other pieces")
        case "manifest":
            victim = broken / commit.MANIFEST
            victim.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert commit.find(tmp_path) == whole
    assert str(victim) in caplog.text
    with pytest.raises(CheckpointError, match=victim.name.replace(".", r"\.")):
        commit.find(broken)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (write(tmp_path, 1) / "a.distcp").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        commit.find(tmp_path)


@pytest.mark.parametrize("tracker", ["", "garbled", None])
def test_without_a_tracker_the_newest_whole_one_is_taken(tmp_path: Path, tracker: str | None) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    if tracker is None:
        (tmp_path / commit.TRACKER).unlink()
    else:
        (tmp_path / commit.TRACKER).write_text(tracker)
    assert commit.find(tmp_path) == newest


def test_the_tracker_rolls_a_run_back(tmp_path: Path) -> None:
    old = write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / commit.TRACKER).write_text("1\n")
    assert commit.find(tmp_path) == old
    again = write(tmp_path, 2, text="second generation")
    assert (again / "a.distcp").read_text() == "second generation 2" and commit.find(tmp_path) == again


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert sorted(commit.steps(tmp_path)) == [3, 4]
    assert [path.name for path in tmp_path.glob(".old_*")] == [".old_iter_0000002"]  # the last retired, until the sweep
    commit.sweep(tmp_path)
    assert not list(tmp_path.glob(".old_*")) and sorted(commit.steps(tmp_path)) == [3, 4]
    (tmp_path / commit.TRACKER).write_text("3\n")
    commit.retire(tmp_path, keep=1)  # never the published one, and nothing newer than it
    assert sorted(commit.steps(tmp_path)) == [3, 4]


def test_abandon_leaves_the_previous_one(tmp_path: Path) -> None:
    whole = write(tmp_path, 1)
    (commit.begin(tmp_path, 2) / "a.distcp").write_text("half")
    commit.abandon(tmp_path, 2)
    assert commit.find(tmp_path) == whole and not list(tmp_path.glob(".tmp*"))


def test_what_a_dead_run_left_is_removed(tmp_path: Path) -> None:
    (commit.begin(tmp_path, 1) / "a.distcp").write_text("half")
    write(tmp_path, 2)
    assert not list(tmp_path.glob(".tmp*"))


# ---------------------------------------------------------------------------------------------------- death anywhere

CALLS = ("fsync", "rename", "replace", "open", "mkdir", "rmdir", "unlink")


class Died(BaseException):
    """Stands for the death of the process: nothing that follows is executed."""


def write_and_die(root: Path, *, last_call: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Publish step 3, dying around the ``last_call``-th call that changes the disk; whether it came that far."""
    calls = [0]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            calls[0] += 1
            if calls[0] > last_call or (calls[0] == last_call and not after):
                raise Died
            result = real(*args, **settings)
            if calls[0] == last_call:
                raise Died
            return result

        return call

    with monkeypatch.context() as patched:
        for name in CALLS:
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            write(root, 3, keep=2)
        except Died:
            return True
    return False


@pytest.mark.parametrize("after", [False, True])
def test_death_around_any_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for last_call in range(1, 100):
        root = tmp_path / str(last_call)
        write(root, 1, keep=2)
        write(root, 2, keep=2)
        if not write_and_die(root, last_call=last_call, after=after, monkeypatch=monkeypatch):
            break
        directory = commit.find(root)
        assert directory is not None
        step = int(directory.name[5:])
        assert (directory / "a.distcp").read_text() == f"weights {step}"
        found.append(step)
        newest = write(root, 4, keep=2)  # and the next start is not hindered
        assert commit.find(root) == newest and not list(root.glob(".tmp*")) and len(commit.steps(root)) <= 3
    assert len(found) > 10 and found == sorted(found) and set(found) == {2, 3}
