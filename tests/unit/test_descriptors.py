"""Thousands of shards under the usual limit of 1024 descriptors; maps and files that hold none."""

import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_omni.config.data import SourceConfig
from megatron_omni.data import descriptors
from megatron_omni.data.decode.media import open_media
from megatron_omni.data.descriptors import DataFile, mapped
from megatron_omni.data.index import index_path, tokenizer_digest
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.prepare import index_files
from megatron_omni.data.record import RecordError
from megatron_omni.data.sources import open_source
from tests.unit.test_tar import write_tar
from tests.unit.tiny_data import row, tiny_recipe, tokenizer_file, write_image, write_source

NUM_SHARDS = 3000


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``ulimit -n 1024`` without the way out."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr("megatron_omni.data.sources.raise_limit", lambda: None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_thousands_of_tars_and_of_indexed_and_plain_files(tmp_path: Path, limited: None) -> None:
    picture = write_image(tmp_path / "a.png").read_bytes()
    tar = write_tar(tmp_path / "a.tar", [("1.png", picture), ("1.txt", b"a cat")])
    text = Path(write_source(tmp_path, "text", [row("what?", "a dog")]).path)
    index_files([tar, text], tokenizer_file(tmp_path))
    (tmp_path / "s").mkdir()
    for number in range(NUM_SHARDS):
        for file, name in ((tar, f"{number:04d}.tar"), (text, f"{number:04d}.jsonl")):
            os.link(file, tmp_path / "s" / name)
            if number % 2 or file is tar:
                os.link(index_path(file), index_path(tmp_path / "s" / name))
    before = num_open()
    sources = [
        SourceConfig(name=name, path=f"{tmp_path}/s/{{0000..{NUM_SHARDS - 1}}}.{suffix}", prompt="")
        for name, suffix in (("pictures", "tar"), ("text", "jsonl"))
    ]
    loader = StepLoader(tiny_recipe(tmp_path, sources, global_batch_size=64), data_rank=0, data_size=1)
    assert [len(source) for source in loader.sources] == [NUM_SHARDS, NUM_SHARDS]
    assert num_open() - before < 10
    for _ in range(5):
        assert sum(batch.num_samples for batch in loader.next_step()) == 64
    assert all(loader.sources[1][i].answer == "a dog" for i in range(0, NUM_SHARDS, 7))
    assert num_open() - before <= descriptors.MOST_OPEN + 10 and not loader.report()


def test_a_map_ends_with_its_last_view_and_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "contents"
    path.write_bytes(bytes(range(256)) * 64)

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    before = num_open()
    view = mapped(path)[100:200].view(np.dtype([("a", "<u2"), ("b", "u1", 8)]))
    assert view["a"].tolist()[:2] == [100 + (101 << 8), 110 + (111 << 8)] and maps() == 1 and num_open() == before
    with pytest.raises(ValueError, match="read-only"):
        view["a"] = 1
    del view
    assert maps() == 0
    path.write_bytes(b"")
    assert len(mapped(path)) == 0


def test_files_are_closed_in_turn_and_read_right_by_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 1000)
    monkeypatch.setattr(descriptors, "_opened", descriptors.lru_cache(maxsize=3)(descriptors._Open))
    files = [DataFile(tmp_path / str(number)) for number in range(20)]
    before, wrong = num_open(), []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 20, 300).tolist():
            if files[number].read_at(10, 5) != bytes([number]) * 5:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and num_open() - before <= 3 and files[0].read_at(998, 10) == b"\0\0"


def test_a_file_that_was_replaced_is_not_read_as_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_source(tmp_path, "text", [row("what?", "a cat"), row("what?", "a dog")])
    source = open_source(config, digest="")
    monkeypatch.setattr(descriptors, "_opened", descriptors.lru_cache(maxsize=0)(descriptors._Open))
    assert source[0].answer == "a cat"
    os.rename(config.path, tmp_path / "old")
    for problem in ("No such file", "another file has taken its place"):
        with pytest.raises(RecordError, match=f"text.jsonl:2: .*{problem}") as caught:
            source[1]
        assert caught.value.reason == "unreadable_data"
        write_source(tmp_path, "text", [row("what?", "a cat"), row("what?", "a fox")])


def test_no_descriptors_left_is_an_error_with_its_way_out_and_no_skip(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    config = write_source(tmp_path, "picture", [row("<image>", images=["a.png"])])
    source = open_source(config, digest=tokenizer_digest(tokenizer_file(tmp_path)))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open(), before[1]))
    held: list[int] = []
    try:
        with pytest.raises(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(Exception, match=r"Too many open files; allow more of them \(ulimit -n 65536\)") as media:
            open_media(tmp_path / "a.png")
        with pytest.raises(Exception, match=r"ulimit -n 65536") as data:
            source[0]
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for caught in (media, data):
        assert not isinstance(caught.value, RecordError)
        cause = caught.value.__cause__
        assert isinstance(cause, OSError) and cause.errno == errno.EMFILE
    assert source[0].images


def test_the_limit_is_raised_as_far_as_it_goes() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        descriptors.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
