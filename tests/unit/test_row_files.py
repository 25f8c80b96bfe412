"""Arrays on disk: back as they were, damaged files named, the same bytes for the same arrays."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_omni.data.row_files import open_rows, write_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arrays_come_back_as_they_were(tmp_path, dtype):
    arrays = [torch.randn(shape).to(dtype) for shape in ((4, 2, 3), (7,), (1, 1), (5, 8))]
    path = tmp_path / "x.latents.safetensors"
    write_rows(path, arrays, kind="latents", fingerprint="abc", about={"base_size": 64})
    file = open_rows(path, "latents")
    assert len(file) == 4 and (file.fingerprint, file.about["base_size"]) == ("abc", 64)
    for i, array in enumerate(arrays):
        found = file.array(i)
        assert found.dtype == dtype and found.shape == array.shape and torch.equal(found, array)
    for number in (4, -1):
        with pytest.raises(ValueError, match=r"#-?\d: the file holds 4 arrays"):
            file.array(number)


def test_the_same_arrays_are_the_same_bytes_and_a_new_file_is_opened_anew(tmp_path):
    path = tmp_path / "x.safetensors"
    for _ in range(2):
        write_rows(path, [torch.ones(2)], kind="hidden", fingerprint="a")
        data = path.read_bytes()
        assert torch.equal(open_rows(path, "hidden").array(0), torch.ones(2))
    write_rows(path, [torch.zeros(2)], kind="hidden", fingerprint="a")
    assert path.read_bytes() != data and torch.equal(open_rows(path, "hidden").array(0), torch.zeros(2))
    write_rows(path, [torch.ones(2)], kind="hidden", fingerprint="a")
    assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path]


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_rows(path, [torch.ones(2, 2), torch.ones(3)], kind="latents", fingerprint="a")
    with pytest.raises(
        ValueError, match=r"no usable file of hidden .it holds latents.; run megatron-omni prepare --hidden again"
    ):
        open_rows(path, "hidden")
    with safe_open(str(path), framework="pt") as file:
        good = {name: file.get_tensor(name) for name in ("values", "offsets", "shapes")}
    about = {"about": json.dumps({"kind": "latents", "fingerprint": "a"})}
    for change in (
        {"values": good["values"][:-1]}, {"offsets": torch.tensor([0, 5, 7])}, {"shapes": good["shapes"] + 1},
        {"values": good["values"].double()}, {"shapes": good["shapes"][:1]}, {"offsets": good["offsets"].int()},
    ):  # fmt: skip
        bad = tmp_path / "bad.safetensors"
        save_file({**good, **change}, bad, metadata=about)
        with pytest.raises(ValueError, match=r"bad\.safetensors: no usable file of latents"):
            open_rows(bad, "latents")
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"{}"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="no usable file of latents"):
            open_rows(path, "latents")
    with pytest.raises(ValueError, match="no file of latents"):
        open_rows(tmp_path / "gone.safetensors", "latents")
