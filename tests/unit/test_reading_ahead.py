"""Reading ahead of the writer, hashing beside it, and what stays in memory meanwhile."""

import hashlib
import threading
from pathlib import Path

import pytest
import torch

from megatron_omni.checkpoint import sources
from megatron_omni.checkpoint.ahead import made_ahead
from megatron_omni.checkpoint.sources import Digests, HuggingFaceSource
from megatron_omni.checkpoint.tensor_files import ConversionError


def test_items_are_made_in_order_and_no_further_ahead_than_asked() -> None:
    made: list[int] = []
    arrived = threading.Semaphore(0)

    def make(item: int) -> int:
        made.append(item)
        arrived.release()
        return item * item

    with made_ahead(make, range(10), depth=2) as pairs:
        for item, square in pairs:
            assert square == item * item
            for _ in range(3 if item == 0 else 1 if item < 8 else 0):
                assert arrived.acquire(timeout=60)
            assert made == list(range(min(10, item + 3))), "the next two, and they wait for nobody"
    assert len(made) == 10


def test_an_error_is_raised_in_its_turn_and_nothing_is_made_afterwards() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    taken = []
    with pytest.raises(ValueError, match="three"), made_ahead(make, range(1000), depth=2) as pairs:
        for item, _ in pairs:
            taken.append(item)
    assert taken == [0, 1, 2] and len(made) <= 6


def test_digests_of_directories_side_by_side_are_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank files and directories advance together, none further ahead than allowed until the converter is done."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    monkeypatch.setattr(sources, "LEAD_BYTES", 1000)
    files = []
    for place, name, size in (("a", "1.safetensors", 950), ("a", "2.safetensors", 0), ("b", "1.safetensors", 4000),
                              ("c", "__0_0.distcp", 3000), ("c", "__1_0.distcp", 3000)):  # fmt: skip
        (tmp_path / place).mkdir(exist_ok=True)
        files.append(tmp_path / place / name)
        files[-1].write_bytes(bytes(i * 7 % 251 for i in range(size)))
    digests = Digests([*files, files[0]])
    digests.follow(0.5)
    assert digests.result() == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    digests = Digests(files)
    digests._thread.join(0.3)  # it waits for the converter, else it is done long before
    digests.stop()
    assert files[2] not in digests._digests, "a converter that has read nothing is not left behind by 4000 bytes"
    with pytest.raises(ConversionError, match=r"gone\.safetensors: cannot be read"):
        Digests([tmp_path / "gone.safetensors"]).result()


def test_a_pickle_file_is_mapped_only_while_a_tensor_is_read(tmp_path: Path) -> None:
    """What a mapping has read counts as resident: shards would add up."""
    tensors = {"a": torch.randn(300, 40), "b": torch.randn(7).half()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = HuggingFaceSource(tmp_path)
    for key, value in tensors.items():
        assert torch.equal(source.read(key), value)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    source = HuggingFaceSource(tmp_path)
    assert all(torch.equal(source.read(key), value) for key, value in tensors.items())
