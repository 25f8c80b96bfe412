"""Damaged, hostile and unfitting sources: status 2, one error that names file, key, expected and found; nothing written."""

import importlib
import json
import os
import pickle
import random
import re
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_omni.checkpoint.families import open_sources
from megatron_omni.checkpoint.plan import make_plan
from megatron_omni.checkpoint.tensor_files import ConversionError, read_header
from tests.parity import foreign
from tests.unit.dense_checkpoints import FIRST_NEW, MODEL, NUM_NEW, write_dense

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def convert() -> Iterator[ModuleType]:
    """The command, whose signal handling ends with the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield importlib.import_module("megatron_omni.cli.convert")
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    foreign.qwen2(place / "sharded", max_shard_size="200KB")
    foreign.qwen2(place / "single")
    foreign.siglip(place / "vision")
    return place


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(hf: Path) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(hf: Path) -> None:
    (hf / "model.safetensors").write_bytes(b"")


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def header_of(hf: Path, header: bytes) -> None:
    (hf / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def pointer(hf: Path) -> None:
    (hf / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")


def lie_about_length(hf: Path) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def overlap(hf: Path) -> None:
    path = hf / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = [0, 448]
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def nan(hf: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")

    change_tensors(hf / "model.safetensors", spoil)


def infinity(hf: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].bfloat16()
        tensors["model.layers.2.mlp.up_proj.weight"][0, 7] = -float("inf")

    change_tensors(hf / "model.safetensors", spoil)


def integers(hf: Path) -> None:
    change_tensors(hf / "model.safetensors", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}))


def drop_key(hf: Path) -> None:
    change_tensors(hf / "model.safetensors", lambda t: t.__delitem__("model.layers.1.self_attn.k_proj.bias"))


def add_key(hf: Path) -> None:
    change_tensors(hf / "model.safetensors", lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(2)}))


def malicious(hf: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {hf / 'EXECUTED'}",)

    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Payload()}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"model\.safetensors: truncated or damaged: the header describes \d+ bytes, the file has \d+"),
        (empty, r"model\.safetensors: not a whole safetensors file"),
        (pointer, r"model\.safetensors: not a whole safetensors file: its first 8 bytes announce a header of \d+ bytes"),
        (lie_about_length, r"model\.safetensors: not a whole safetensors file.*1099511627776 bytes"),
        (overlap, r"model\.safetensors: damaged: '.*' expected at byte \d+, the header says \d+"),
        (nan, r"model\.safetensors: 'model\.layers\.2\.mlp\.up_proj\.weight': expected finite.*found 1 NaN.*element 341"),
        (infinity, r"model\.safetensors: 'model\.layers\.2\.mlp\.up_proj\.weight': expected finite.*element 7"),
        (integers, r"model\.safetensors: 'model\.norm\.weight': expected 16- to 64-bit .*found torch\.int32"),
        (drop_key, r"single: expected the key 'model\.layers\.1\.self_attn\.k_proj\.bias' of shape \[16\], found none"),
        (add_key, r"model\.safetensors: the key 'model\.layers\.1\.mlp\.gate\.weight' has no place in a qwen2 model"),
        (malicious, r"pytorch_model\.bin: refused: not a file of plain tensors"),
        (lambda hf: (hf / "config.json").unlink(), r"config\.json: cannot be read"),
        (lambda hf: (hf / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda hf: change_json(hf / "config.json", model_type="llama"), r"model_type: expected one of.*found 'llama'"),
        (lambda hf: change_json(hf / "config.json", hidden_act="gelu"), r"hidden_act: expected 'silu', found 'gelu'"),
        (lambda hf: change_json(hf / "config.json", num_hidden_layers=-3), r"num_hidden_layers: expected a positive.*-3"),
        (lambda hf: change_json(hf / "config.json", rms_norm_eps="1e-6"), r"rms_norm_eps: expected a number, found '1e-6'"),
        (lambda hf: change_json(hf / "config.json", rope_parameters=[1]), r"rope_parameters: expected a table, found \[1\]"),
        (lambda hf: change_json(hf / "config.json", tie_word_embeddings=1), r"tie_word_embeddings: expected true or false"),
        (lambda hf: change_json(hf / "config.json", use_sliding_window=True), r"use_sliding_window: expected False"),
        (
            lambda hf: change_json(hf / "config.json", rope_parameters={"rope_type": "yarn", "factor": 4.0}),
            r"rope_parameters\.rope_type: expected 'default' .*found 'yarn'",
        ),
        (
            lambda hf: change_json(hf / "config.json", rope_parameters={"rope_type": "default", "factor": 4.0}),
            r"rope_parameters\.factor: expected no such setting.*found 4\.0",
        ),
        (
            lambda hf: change_json(hf / "config.json", rope_parameters={"full_attention": {"rope_theta": 1e4}}),
            r"rope_parameters\.full_attention: expected no such setting: .*the same in all layers, found \{",
        ),
        (
            lambda hf: change_json(hf / "config.json", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            r"rope_parameters\.partial_rotary_factor: expected 1 .*found 0\.5",
        ),
        (
            lambda hf: change_json(hf / "config.json", partial_rotary_factor=0.25),
            r"config\.json: partial_rotary_factor: expected 1 .*found 0\.25",
        ),
        (
            lambda hf: change_json(hf / "config.json", rope_scaling={"rope_theta": 2e4}),  # rope_parameters says 1e6
            r"rope_parameters: expected what rope_scaling says, base 20000 .*disagree, found \{",
        ),
        (
            lambda hf: change_json(hf / "config.json", rope_scaling={"rope_theta": "1e6"}),
            r"rope_scaling\.rope_theta: expected a number, found '1e6'",
        ),
        (
            lambda hf: change_json(hf / "config.json", rope_scaling={"type": "yarn", "factor": 4.0}),
            r"rope_scaling\.type: expected 'default' .*found 'yarn'",
        ),
        (
            lambda hf: change_json(hf / "config.json", intermediate_size=97),
            r"'model\.layers\.0\.mlp\.gate_proj\.weight': expected shape \[97, 112\], found \[96, 112\]",
        ),
        (
            lambda hf: change_json(hf / "config.json", num_hidden_layers=10**6),
            r"config\.json: num_hidden_layers: 1000000 of them do not fit .*whose files hold 51 tensors",
        ),
        (
            lambda hf: change_json(hf / "config.json", num_hidden_layers=10**12),
            r"config\.json: num_hidden_layers: 1000000000000 of them",
        ),
        (
            lambda hf: change_json(hf / "config.json", hidden_size=10**18),
            r"config\.json: hidden_size: expected at most 2147483647, found 10+$",
        ),
        (lambda hf: instead(hf / "config.json", os.mkfifo), r"config\.json: no ordinary file"),
        (lambda hf: instead(hf / "config.json", lambda p: p.symlink_to("/dev/zero")), r"config\.json: no ordinary file"),
        (lambda hf: (hf / "config.json").write_bytes(b"[" * 100_000), r"config\.json: not valid JSON"),
        (lambda hf: instead(hf / "model.safetensors", os.mkfifo), r"single: expected model\.safetensors\.index\.json or"),
        (lambda hf: header_of(hf, b"[" * 100_000), r"model\.safetensors: damaged: the safetensors header is not valid JSON"),
        (
            lambda hf: header_of(hf, json.dumps({"x": {"dtype": "F32", "shape": [2] * 10**6, "data_offsets": [0, 8]}}).encode()),
            r"model\.safetensors: damaged: 'x' of shape ",
        ),
        (lambda hf: change_json(hf / "config.json", tie_word_embeddings=True), r"'lm_head\.weight': expected the values"),
    ],
)  # fmt: skip
def test_one_file(
    tmp_path: Path, whole: Path, convert: ModuleType, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None],
    said: str,
) -> None:  # fmt: skip
    hf = copy(whole / "single", tmp_path / "single")
    damage(hf)
    refused(convert, capsys, ["import", "--hf", str(hf), "--out", str(tmp_path / "out")], said)
    assert not (tmp_path / "out").exists() and not (hf / "EXECUTED").exists()


def test_an_unknown_key_in_a_kept_layer_is_not_carried(
    tmp_path: Path, whole: Path, convert: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the layers that are left out are."""
    hf = copy(whole / "vision", tmp_path / "vision")
    key = next(k for k in load_file(hf / "model.safetensors") if k.endswith("encoder.layers.0.mlp.fc1.weight"))
    change_tensors(hf / "model.safetensors", lambda t: t.update({f"{key}_scale": torch.ones(2)}))
    command = ["import", "--vision", str(hf), "--out", str(tmp_path / "out")]
    refused(convert, capsys, command, r"encoder\.layers\.0\.mlp\.fc1\.weight_scale' has no place in a siglip model")


@pytest.mark.parametrize("change", [lambda b: b[:-200], lambda b: b[:40] + b"\x00" * 60 + b[100:], lambda b: b"PK"])
def test_a_damaged_pickle_file_is_one_error(
    tmp_path: Path, whole: Path, convert: ModuleType, capsys: pytest.CaptureFixture[str],
    change: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    hf = copy(whole / "single", tmp_path / "hf")
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(change((hf / "pytorch_model.bin").read_bytes()))
    refused(convert, capsys, ["import", "--hf", str(hf), "--out", str(tmp_path / "out")], r"pytorch_model\.bin: ")


def outside(hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))


def absolute(hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "/etc/hostname"
    index.write_text(json.dumps(content))


def remove_index(hf: Path) -> None:
    (hf / "model.safetensors.index.json").unlink()


def remove_shard(hf: Path) -> None:
    sorted(hf.glob("model-*.safetensors"))[1].unlink()


def misplace(hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    key = next(key for key, name in content["weight_map"].items() if name == names[0])
    content["weight_map"][key] = names[1]
    index.write_text(json.dumps(content))


def swap_shards(hf: Path) -> None:
    first, second = sorted(hf.glob("model-*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def truncate_shard(hf: Path) -> None:
    path = sorted(hf.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (outside, r"index\.json: names the file '\.\./model-.*'; expected a plain file name inside the directory"),
        (absolute, r"index\.json: names the file '/etc/hostname'; expected a plain file name"),
        (
            remove_index,
            r"hf: holds \d+ shards \(model-00001-of-\d+\.safetensors, \.\.\.\) and no index, .*copy model\.safetensors\.index",
        ),
        (
            lambda hf: instead(hf / "model.safetensors.index.json", os.mkfifo),
            r"hf: holds \d+ shards .*copy model\.safetensors\.index\.json",
        ),
        (remove_shard, r"index\.json: expected the shard model-00002-of-\d+\.safetensors, found no such file"),
        (misplace, r"index\.json: expected '.*' in model-00002.*, found it in model-00001"),
        (swap_shards, r"index\.json: expected '.*' in model-0000.*, found it in model-0000"),
        (truncate_shard, r"model-00002-of-\d+\.safetensors: truncated or damaged"),
        (lambda hf: (hf / "model.safetensors.index.json").write_text('{"weight_map": 3}'), r"weight_map: expected a table"),
    ],
)  # fmt: skip
def test_shards(
    tmp_path: Path, whole: Path, convert: ModuleType, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None],
    said: str,
) -> None:  # fmt: skip
    hf = copy(whole / "sharded", tmp_path / "hf")
    damage(hf)
    refused(convert, capsys, ["import", "--hf", str(hf), "--out", str(tmp_path / "out")], said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tp", "3"], r"--tp 3: does not divide 14 attention heads; choose a divisor of 14"),
        (["--tp", "7"], r"--tp 7: does not divide 2 query groups; choose a divisor of 2; what is written loads at every layout"),
        (["--pp", "8"], r"--pp 8: does not divide 4 blocks"),
        (["--tp", "0"], r"--tp 0: does not divide"),
        (["--ep", "2"], r"a dense model has no experts"),
        (["--vision", "{whole}/vision"], r"need projectors: give --projectors FILE or --draw-projectors SEED"),
        (["--audio", "{whole}/vision"], r"vision/config\.json: model_type: expected 'whisper', found 'siglip_vision_model'"),
        (["--draw-projectors", "1"], r"projectors join encoders to a language model"),
        (["--hf", "{whole}/nowhere"], r"nowhere: does not exist"),
        (["--hf", "{whole}"], r"expected model\.safetensors\.index\.json or .*, found none"),
    ],
)  # fmt: skip
def test_arguments(
    tmp_path: Path,
    whole: Path,
    convert: ModuleType,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    command = ["import", "--hf", str(whole / "single"), "--out", str(tmp_path / "out")]
    refused(convert, capsys, command + [a.format(whole=whole) for a in arguments], said)
    assert not (tmp_path / "out").exists()


def refused(convert: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert convert.main(arguments) == 2
    text = capsys.readouterr().err
    assert text.count("error: ") == 1 and re.search(said, text), text


@pytest.mark.parametrize("rows", [304, 305])
def test_fewer_rows_than_token_ids_are_refused(
    tmp_path: Path, convert: ModuleType, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    """256 bytes, 7 special tokens of the file and 42 of ours are 305 ids."""
    hf = write_dense(tmp_path / "hf", replace(MODEL, vocab_size=rows))
    command = ["import", "--hf", str(hf), "--out", str(tmp_path / "out")]
    if rows == FIRST_NEW + NUM_NEW:
        assert convert.main(command) == 0
        return
    refused(
        convert, capsys, command, r"tokenizer\.json|hf: has 305 ids .* has 304 rows; .*resize_token_embeddings\(305\)"
    )
    assert not (tmp_path / "out").exists()


def test_an_export_says_how_to_make_a_checkpoint_of_a_foreign_directory(
    tmp_path: Path, whole: Path, convert: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--checkpoint", str(whole / "single"), "--out", str(tmp_path / "out")]
    refused(
        convert, capsys, command, rf"is a Hugging Face directory; .*megatron-omni convert import --hf {whole}/single"
    )


def test_many_misfits_are_listed_and_counted(tmp_path: Path, whole: Path) -> None:
    hf = copy(whole / "single", tmp_path / "hf")
    change_json(hf / "config.json", num_hidden_layers=6)
    opened = open_sources(language=hf)
    with pytest.raises(ConversionError) as caught:
        make_plan(opened.parts, opened.wanted)
    lines = str(caught.value).splitlines()
    assert lines[1].endswith("expected the key 'model.layers.4.input_layernorm.weight' of shape [112], found none")
    assert len(lines) == 1 + 10 + 1 and lines[-1] == "  - and 14 more"  # two layers of twelve tensors


def test_a_flipped_bit_in_a_header_never_passes_for_another_model(whole: Path, tmp_path: Path) -> None:
    """300 single flips: refused with the file's name, or what is read is what was written."""
    content = (whole / "single" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    original = {
        key: (i.dtype, i.shape, i.offset) for key, i in read_header(whole / "single" / "model.safetensors").items()
    }
    hf = copy(whole / "single", tmp_path / "hf")
    path, pick, harmless = hf / "model.safetensors", random.Random(1), 0
    for _ in range(300):
        bit = pick.randrange(8 * (8 + length))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            opened = open_sources(language=hf)
            make_plan(opened.parts, opened.wanted)
        except ConversionError as error:
            assert "model.safetensors" in str(error) or "expected the key" in str(error), bit
            continue
        found = {key: (i.dtype, i.shape, i.offset) for key, i in read_header(path).items()}
        assert found == original, f"bit {bit}"
        harmless += 1
    assert harmless < 30
