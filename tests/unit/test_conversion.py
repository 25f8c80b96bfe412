"""Conversion: the table is the model, both ways are bitwise, the ledger tells the truth."""

import json
import math
import runpy
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_omni.checkpoint import commit, convert
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.distributed import sharding_metadata
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.families import FAMILIES, OpenedSources, draw_projectors, open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.ledger import record_loss, recorded_loss
from megatron_omni.checkpoint.names import expand
from megatron_omni.checkpoint.progress import ByteProgress
from megatron_omni.checkpoint.sources import HuggingFaceSource
from megatron_omni.checkpoint.tensor_files import ConversionError, SafetensorsWriter, read_header, read_tensor
from megatron_omni.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_omni.checkpoint.transforms import Concat, GateUpTransposed, PadRows, QkvInterleave
from megatron_omni.checkpoint.verify import compare, roundtrip, verify
from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.models.build import build_model
from megatron_omni.parallel import groups
from tests.parity import foreign

ROOT = Path(__file__).resolve().parents[2]
NARROW = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 8, "vocab_size": 250, "make_vocab_size_divisible_by": 16, "mrope_section": [2, 1, 1],
}  # fmt: skip
TOWERS = {
    "vision": {"image_size": 28, "hidden_size": 24, "ffn_hidden_size": 40, "num_layers": 2, "num_attention_heads": 3,
               "pooled_side": 2},
    "audio": {"hidden_size": 24, "ffn_hidden_size": 40, "num_encoder_layers": 1, "num_decoder_layers": 1,
              "num_attention_heads": 2, "num_query_tokens": 4, "chunk_seconds": 0.6, "num_mel_bins": 8},
}  # fmt: skip
EXPERTS = {"moe": {"moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 6}}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("foreign")
    foreign.qwen2(place / "language", dtype=torch.bfloat16, max_shard_size="100KB")
    foreign.siglip(place / "vision")
    foreign.whisper(place / "audio")
    return {name: place / name for name in ("language", "vision", "audio")}


def imported(opened: OpenedSources, out: Path, **options: Any) -> Path:
    return import_checkpoint(opened.parts, Recipe(model=opened.model), out, wanted=opened.wanted, **options)


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("qwen2", {"moe": None, "vision": None, "audio": None}),
        ("qwen2", {"moe": None, "vision": None, "audio": None, "untie_embeddings_and_output_weights": False}),
        ("uni_moe", {"moe": None, **TOWERS}),
        ("uni_moe", {**EXPERTS, **TOWERS}),
    ],
    ids=["untied", "tied", "dense with encoders", "experts with encoders"],
)
def test_the_table_is_the_model(family: str, model: dict[str, Any]) -> None:
    """Keys, whole shapes, and what megatron-core would put into a checkpoint, nothing more or less."""
    recipe = recipe_from_dict({"model": {**NARROW, **model}, "optim": {"precision": "fp32"}})
    pg = groups.initialize(recipe.parallel)
    try:
        state = build_model(recipe, pg).sharded_state_dict(prefix="", metadata=sharding_metadata(pg))
    finally:
        groups.destroy()
    real, objects = {}, set()
    for value in state.values():
        built = value.build() if hasattr(value, "build") else value
        for shard in built if isinstance(built, list) else [built]:
            if hasattr(shard, "axis_fragmentations"):
                real[shard.key] = tuple(shard.global_shape)
            else:
                objects.add(shard.key)
    entries = expand(FAMILIES[family].rows(recipe.model, {}))
    assert {entry.ours: entry.global_shape for entry in entries} == real
    keys = [key for entry in entries for key in entry.theirs]
    assert len(keys) == len(set(keys))
    endings = tuple(f"{module}._extra_state" for module in (*convert.EXTRA_STATE, "output_layer"))
    assert all(key.endswith(endings) for key in objects), "an object that a converted checkpoint would lack"


def test_transforms_are_inverse_and_mean_what_they_say() -> None:
    q, k, v = (torch.randn(rows, 5) for rows in (12, 4, 4))  # 6 heads of 2, 2 groups
    fused = QkvInterleave(6, 2).to_ours([q, k, v])
    assert torch.equal(fused[:10], torch.cat([q[:6], k[:2], v[:2]])), "group 0: its three queries, key, value"
    assert torch.equal(fused[10:], torch.cat([q[6:], k[2:], v[2:]]))
    gates, ups = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    shared = GateUpTransposed(2).to_ours([gates[0], ups[0], gates[1], ups[1]])
    assert torch.equal(shared, torch.cat([gates[0].t(), gates[1].t(), ups[0].t(), ups[1].t()], dim=1))
    padded = PadRows(3, 8).to_ours([gates[0]])
    assert torch.equal(padded[:3], gates[0]) and padded[3:].abs().sum() == 0
    for transform, parts in (
        (QkvInterleave(6, 2), [q, k, v]),
        (Concat(2), [gates[0], ups[0]]),
        (GateUpTransposed(2), [gates[0], ups[0], gates[1], ups[1]]),
        (PadRows(3, 8), [gates[0]]),
    ):
        back = transform.to_theirs(transform.to_ours(parts))
        assert len(back) == len(parts) and all(torch.equal(a, b) for a, b in zip(back, parts))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["sharded", "single", "pickle"])
def test_roundtrip_is_bitwise(tmp_path: Path, dtype: str, kind: str) -> None:
    hf = tmp_path / "hf"
    foreign.qwen2(hf, dtype=getattr(torch, dtype), **({"max_shard_size": "100KB"} if kind == "sharded" else {}))
    if kind == "pickle":
        torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
        (hf / "model.safetensors").unlink()
    opened = open_sources(language=hf)
    assert (len(opened.parts[0].source.files()) > 2) == (kind == "sharded")
    lines = roundtrip(opened.parts, Recipe(model=opened.model), wanted=opened.wanted, layout=Layout(tp=2, pp=2))
    assert lines == [f"qwen2: 51 tensors of {hf} are back, bit for bit"]


def test_every_part_comes_back(tmp_path: Path, directories: dict[str, Path]) -> None:
    """Text in bf16, encoders in fp32, SigLIP's last layer and Whisper's token table included."""
    opened = open_sources(**directories, draw_seed=3)
    assert opened.model.vision is not None and opened.model.vision.num_layers == 2
    lines = roundtrip(opened.parts, Recipe(model=opened.model), wanted=opened.wanted, layout=Layout(tp=2))
    assert [line.split(":")[0] for line in lines] == ["qwen2", "siglip", "whisper"]
    assert f" {len(HuggingFaceSource(directories['vision']).infos())} tensors" in lines[1]


@pytest.mark.parametrize("name", ["vision", "audio"])
def test_an_encoder_alone_comes_back(tmp_path: Path, directories: dict[str, Path], name: str) -> None:
    opened = open_sources(language=None, **{name: directories[name]})
    recipe = Recipe(model=opened.model)
    assert len(roundtrip(opened.parts, recipe, wanted=opened.wanted, layout=Layout())) == 1


def test_a_tied_matrix_stored_twice_must_be_one(tmp_path: Path) -> None:
    foreign.qwen2(tmp_path / "hf", tied=True)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    imported(open_sources(language=tmp_path / "hf"), tmp_path / "out")
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"'lm_head.weight': expected the values of 'model.embed_tokens.weight'"):
        imported(open_sources(language=tmp_path / "hf"), tmp_path / "other")
    assert not list((tmp_path / "other").rglob("iter_*"))


def test_drawn_projectors_are_those_of_a_run_with_that_seed(directories: dict[str, Path]) -> None:
    model = open_sources(**directories, draw_seed=3).model
    part = draw_projectors(model, seed=3)
    recipe = Recipe(model=model, seed=3)
    pg = groups.initialize(recipe.parallel)
    try:
        built = dict(build_model(recipe, pg).named_parameters())
    finally:
        groups.destroy()
    for entry in expand(part.rows):
        assert torch.equal(part.source.read(entry.theirs[0]), built[entry.ours]), entry.ours


def test_blocks_are_those_of_the_layout(tmp_path: Path, directories: dict[str, Path]) -> None:
    """TP2 x PP2: four files; gate and up are cut each; stage 1 holds the later blocks, the final norm and the output."""
    directory = imported(open_sources(language=directories["language"]), tmp_path, layout=Layout(tp=2, pp=2))
    reader = TorchDistReader(directory)
    fc1 = reader.tensors["language.decoder.layers.1.mlp.linear_fc1.weight"]
    assert sorted(offsets[0] for offsets, _ in fc1.blocks) == [0, 48, 96, 144]
    place = {(index.fqn, tuple(index.offset or ())): info.relative_path for index, info in reader._storage.items()}
    assert place["language.embedding.word_embeddings.weight", (192, 0)] == "__1_0.distcp"
    assert place["language.decoder.layers.3.mlp.linear_fc2.weight", (0, 48)] == "__1_0.distcp"
    assert place["language.decoder.layers.4.self_attention.linear_qkv.weight", (0, 0)] == "__2_0.distcp"
    assert place["language.output_layer.weight", (0, 0)] == "__2_0.distcp"


def test_the_ledger_accounts_for_every_key_and_verify_finds_a_lie(tmp_path: Path, directories: dict[str, Path]) -> None:
    opened = open_sources(**directories, draw_seed=3)
    directory = imported(opened, tmp_path / "out")
    ledger = json.loads((directory / "conversion.json").read_text())
    for part in opened.parts[:3]:
        used = {k for line in ledger["tensors"] if line["source"] == part.source.label for k in line["from"]}
        carried = {line["key"] for line in ledger["carried"]}
        twins = {line["key"] for line in ledger["twins"]}
        assert set(part.source.infos()) <= used | carried | twins
    assert verify(tmp_path / "out")[1:4] == [
        f"{part.family}: {len(expand(part.rows))} tensors made again from {part.source.label}, all equal"
        for part in opened.parts[:3]
    ]
    assert (
        verify(tmp_path / "out")[4] == "projectors: drawn from seed 3; its tensors have no file to be made from again"
    )
    told = ledger["carried"][0]["sha256"]
    ledger["carried"][0]["sha256"] = "0" * 64
    (directory / "conversion.json").write_text(json.dumps(ledger))
    commit.write_manifest(directory)
    with pytest.raises(CheckpointError, match=r"carried\.safetensors: '.*': its contents are not those of the ledger"):
        verify(tmp_path / "out")
    ledger["carried"][0]["sha256"] = told
    name = "language.decoder.layers.0.input_layernorm.weight"
    line = next(line for line in ledger["tensors"] if line["key"] == name)
    line["sha256"] = "0" * 64
    (directory / "conversion.json").write_text(json.dumps(ledger))
    commit.write_manifest(directory)  # an attacker who recomputes the hashes
    with pytest.raises(CheckpointError, match=f"'{name}': its contents are not those of the ledger"):
        verify(tmp_path / "out")


def test_verify_sees_another_source(tmp_path: Path) -> None:
    foreign.qwen2(tmp_path / "hf")
    imported(open_sources(language=tmp_path / "hf"), tmp_path / "out")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not the file that was converted"):
        verify(tmp_path / "out")
    (tmp_path / "hf").rename(tmp_path / "gone")
    assert "is not here" in verify(tmp_path / "out")[1]


def test_verify_of_an_export(tmp_path: Path, directories: dict[str, Path]) -> None:
    imported(open_sources(language=directories["language"]), tmp_path / "ours")
    out = export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back", max_shard_bytes=100_000)
    assert "51 tensors" in verify(out)[0]
    assert compare(HuggingFaceSource(directories["language"]), HuggingFaceSource(out)) == 51
    victim = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=victim.name):
        verify(out)


def test_export_of_a_damaged_checkpoint_leaves_nothing(tmp_path: Path, directories: dict[str, Path]) -> None:
    directory = imported(open_sources(language=directories["language"]), tmp_path / "ours")
    shard = directory / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="__0_0"):
        export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back")
    content[: len(content) // 2] = bytes(len(content) // 2)
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: '.*': the block at byte \d+ is damaged"):
        export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back")
    (directory / commit.MANIFEST).write_text('{"algorithm": "sha256", "filer": {}}')
    with pytest.raises(CheckpointError, match=r"integrity\.json: damaged: expected a table 'files', found None"):
        export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_export_of_what_the_checkpoint_lacks_is_refused(tmp_path: Path, directories: dict[str, Path]) -> None:
    imported(open_sources(language=None, vision=directories["vision"]), tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"nothing fills model\.embed_tokens\.weight"):
        export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back", family="qwen2")
    assert not (tmp_path / "back").exists()


def test_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.tensor(2.5).half(),
    }
    writer = SafetensorsWriter(tmp_path / "x", [(k, t.dtype, tuple(t.shape)) for k, t in tensors.items()])
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.finish()
    with safe_open(tmp_path / "x", framework="pt") as theirs:
        assert all(torch.equal(theirs.get_tensor(key), tensor) for key, tensor in tensors.items())
    save_file(tensors, tmp_path / "y")
    infos = read_header(tmp_path / "y")
    assert all(torch.equal(read_tensor(infos[key]), tensor) for key, tensor in tensors.items())


def test_blocks_of_a_distributed_checkpoint_read_back_in_any_pieces(tmp_path: Path) -> None:
    whole = torch.randn(6, 10, 8).bfloat16()
    writer = TorchDistWriter(tmp_path)
    cuts = [((0, 0, 0), (2, 10, 8)), ((2, 0, 0), (4, 5, 8)), ((2, 5, 0), (4, 5, 3)), ((2, 5, 3), (4, 5, 5))]
    for rank, (start, size) in enumerate(cuts):
        block = whole[tuple(slice(a, a + n) for a, n in zip(start, size))]
        writer.write("x", block, shape=(6, 10, 8), offsets=start, rank=rank)
    writer.write("s", torch.tensor(2.0), shape=(), offsets=(), rank=0)
    writer.finish()
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("x"), whole) and reader.read("s") == 2.0
    assert all(torch.equal(reader.read("x", index=i), whole[i]) for i in range(6))


def test_an_existing_result_is_not_overwritten(tmp_path: Path, directories: dict[str, Path]) -> None:
    imported(open_sources(language=directories["language"]), tmp_path / "out")
    with pytest.raises(ConversionError, match="holds a checkpoint already"):
        imported(open_sources(language=directories["language"]), tmp_path / "out")


def test_a_run_is_not_rolled_back(tmp_path: Path, directories: dict[str, Path]) -> None:
    """A tracker that said 0 would make the run start again from the imported weights."""
    directory = imported(open_sources(language=directories["language"]), tmp_path / "out")
    directory.rename(directory.with_name("iter_0000100"))
    tracker = directory.with_name(commit.TRACKER)
    tracker.write_text("100\n")
    with pytest.raises(ConversionError, match="holds a checkpoint already"):
        imported(open_sources(language=directories["language"]), tmp_path / "out")
    assert tracker.read_text() == "100\n"


def test_a_loss_recorded_with_another_checkpoint_is_not_shown(
    tmp_path: Path, directories: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_sources(language=directories["language"])
    directory = imported(opened, tmp_path / "out")
    record_loss(directory, loss=4.5, recipe={"seed": 1})
    assert recorded_loss(directory) == 4.5
    shutil.rmtree(directory)
    directory.with_name(commit.TRACKER).unlink()
    assert imported(opened, tmp_path / "out", layout=Layout(tp=2)) == directory
    assert recorded_loss(directory) is None and "recorded with another checkpoint" in caplog.text


def test_values_beyond_the_written_type_are_refused(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    foreign.qwen2(hf, dtype=torch.bfloat16)
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    imported(open_sources(language=hf), tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"up_proj\.weight': expected values that float16 can hold.* 9\.98e\+04"):
        export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


def test_the_written_configuration_names_the_written_type(tmp_path: Path, directories: dict[str, Path]) -> None:
    """transformers rounds to what config.json says."""
    imported(open_sources(language=directories["language"]), tmp_path / "ours")
    back = export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back", dtype="fp32")
    assert AutoModelForCausalLM.from_pretrained(back).dtype == torch.float32


def test_progress_says_bytes_per_second_and_the_time_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = [0.0]
    monkeypatch.setattr("megatron_omni.checkpoint.progress.time.monotonic", lambda: clock[0])
    with (tmp_path / "log").open("w+") as stream:
        progress = ByteProgress("import", 4_000_000_000, stream=stream)
        for _ in range(8):
            clock[0] += 5.0
            progress.add(500_000_000)
        progress.finish()
        stream.seek(0)
        lines = stream.read().splitlines()
    assert len(lines) == 5, "one in ten seconds, and the last"
    assert lines[0] == "import 1.00/4.00 GB   25%  100 MB/s  30 s left"
    assert lines[-1] == "import 4.00/4.00 GB  100%  100 MB/s  40 s"
    small = ByteProgress("index", 45_600)  # of JSONL, whose media are not counted
    clock[0] += 10.0
    small.done = 22_800
    assert small.text() == "index 22.80/45.60 kB   50%  2 kB/s  10 s left"
    assert math.isclose(progress.done, 4e9)


def test_every_command_of_the_tool(
    tmp_path: Path, directories: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "tools" / "convert.py"))["main"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        hf = str(directories["language"])
        assert main(["import", "--hf", hf, "--out", str(tmp_path / "ours"), "--pp", "2", "--dtype", "fp32"]) == 0
        assert main(["verify", str(tmp_path / "ours")]) == 0
        assert main(["verify", str(tmp_path / "ours"), "--source", f"qwen2={hf}"]) == 0
        assert main(["verify", str(tmp_path / "ours"), "--source", "qwen2"]) == 2
        assert main(["export", "--checkpoint", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
        assert main(["verify", str(tmp_path / "back")]) == 0
        assert main(["roundtrip", "--vision", str(directories["vision"]), "--work", str(tmp_path)]) == 0
        with pytest.raises(SystemExit) as refused:
            main(["import", "--hf", hf, "--out", "x", "--tensor", "2"])
        assert refused.value.code == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out.count("all equal") == 3
    back, original = HuggingFaceSource(tmp_path / "back"), HuggingFaceSource(directories["language"])
    assert compare(original, back) == 51, "fp32 inside, bf16 again outside"
