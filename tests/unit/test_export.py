"""What an export says, keeps and refuses, beside the weights themselves; its ledger and a damaged one."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.export import Opened, export_checkpoint, open_ours
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_omni.checkpoint.uni_moe_files import chat_template
from megatron_omni.checkpoint.uni_moe_loader import other_arithmetic
from megatron_omni.checkpoint.upcycle import upcycle
from megatron_omni.checkpoint.verify import verify
from megatron_omni.config.data import DataConfig
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.config.run import Recipe
from tests.distributed.test_omni_layouts import MODEL as TINY_OMNI
from tests.unit.dense_checkpoints import MODEL, change, change_config, omni, tensors_of, write_dense

OMNI = omni(MODEL, TINY_OMNI)


def imported(hf: Path, out: Path, **options: Any) -> Path:
    opened = open_sources(language=hf)
    recipe = Recipe(model=opened.model)
    return import_checkpoint(opened.parts, recipe, out, wanted=opened.wanted, tokenizer=hf, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with both encoders in the released layout."""
    return write_dense(tmp_path_factory.mktemp("whole") / "hf", OMNI, seed=4)


@pytest.fixture
def ours(whole: Path, tmp_path: Path) -> Opened:
    imported(whole, tmp_path / "ours")
    return open_ours(tmp_path / "ours")


GENERATORS = {
    "speech_generator.layers.0.mlp.deepspeed_moe.gate.wg.weight": torch.randn(4, 6),
    "image_generator.vae.encoder.norm.num_batches_tracked": torch.tensor(7),
    "task_hidden_fcs.0.query_embs": torch.randn(1, 3, 4).half(),
    "visual_hidden_fcs.0.model.bias": torch.randn(5).bfloat16(),
}


def test_generators_are_carried_there_and_back(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No key is lost and no field of config.json that tells of them; and no one is left to believe that they are used."""
    hf = Path(shutil.copytree(whole, tmp_path / "hf"))
    change(hf, lambda tensors: tensors.update(GENERATORS))
    change_config(hf, tune_image_generator=True, speech_generator_type="ar_ori_v2_new")
    imported(hf, tmp_path / "ours", layout=Layout(tp=2))
    assert (
        "4 weights of generators (image_generator, speech_generator, task_hidden_fcs, visual_hidden_fcs)" in caplog.text
    )
    back = export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back")
    before, after = tensors_of(hf), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    config = json.loads((back / "config.json").read_text())
    assert config["tune_image_generator"] is True and config["speech_generator_type"] == "ar_ori_v2_new"
    assert len(verify(back)) == 2 and len(verify(tmp_path / "ours")) == 2
    change(hf, lambda tensors: tensors.update({"speech_generation.x": torch.ones(1)}))
    with pytest.raises(ConversionError, match=r"'speech_generation\.x' has no place in a uni_moe model"):
        imported(hf, tmp_path / "other")


def test_weights_without_a_place_are_listed(ours: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_checkpoint(ours, tmp_path / "text", family="qwen2")
    assert "left out, since a qwen2 directory has no place for them" in caplog.text
    assert "audio.projector.bias" in caplog.text and "more" in caplog.text
    ours.recipe.model.vision = ours.recipe.model.audio = None
    with pytest.raises(ConversionError, match=r"a qwen2 directory has no place for:\n  - audio\.projector\.bias"):
        export_checkpoint(ours, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_other_arithmetic_is_said_and_the_published_one_is_not(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixture = open_ours(upcycle({"base": whole}, tmp_path / "mixture"))
    caplog.clear()
    export_checkpoint(mixture, tmp_path / "ours")
    assert "routing_weight_mode=masked_softmax (always release there)" in caplog.text
    assert "audio_only_1d=false" in caplog.text
    assert "the published processor fails on a conversation without one" in caplog.text
    assert caplog.text.count("computes something else") == 1


RELEASED = ModelConfig(
    audio_only_1d=True, half_even_positions=True,
    moe=MoEConfig(routing_weight_mode="release", gradient_estimator="grin"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("part", "changed", "said"),
    [
        (
            "vision",
            {"hidden_size": 768, "patch_size": 16},
            "model.vision: patch_size=16, hidden_size=768 (it builds so400m",
        ),
        ("vision", {"num_layers": 27}, "model.vision: num_layers=27 ("),
        ("vision", {"pooled_side": 6}, None),
        ("model", {"kv_channels": 64}, "model.kv_channels=64 (always hidden_size / num_attention_heads there, 128"),
        ("audio", {"chunk_seconds": 3.0}, "model.audio.chunk_seconds=3 (always 30 there)"),
        ("audio", {"num_query_tokens": 100}, "model.audio.num_query_tokens=100"),
        ("audio", {"tokens_per_position": 10}, "model.audio.tokens_per_position=10 (always 20 there)"),
        ("audio", {"causal_queries": False}, "model.audio.causal_queries=false"),
        ("moe", {"capacity_factor": 3.0}, "model.moe.capacity_factor=3.0 (token_drop is on, in its evaluation too)"),
        ("moe", {"max_routed": 2}, "model.moe.max_routed=2"),
        ("moe", {"routing_weight_mode": "masked_softmax"}, "model.moe.routing_weight_mode=masked_softmax"),
        ("model", {"half_even_positions": False}, "model.half_even_positions=false"),
        ("model", {"audio_only_1d": False}, "model.audio_only_1d=false"),
        ("model", {"rope_theta_seconds": 1.0}, "model.rope_theta_seconds=1.0 (always 2.0 there)"),
        ("data", {"frame_choice": "rate"}, "data.frame_choice=rate"),
    ],
)
def test_each_setting_that_the_released_loader_does_not_follow_is_one_line(
    part: str, changed: dict[str, Any], said: str | None
) -> None:
    model, data = copy.deepcopy(RELEASED), DataConfig(frame_choice="release")
    assert other_arithmetic(model, data) == []
    place = {"model": model, "data": data}.get(part) or getattr(model, part)
    for name, value in changed.items():
        setattr(place, name, value)
    lines = other_arithmetic(model, data)
    assert [line.startswith(said or "-") for line in lines] == ([True] if said else [])


SPECIALS = {"<|endoftext|>": 256, "<|im_end|>": 258}


def test_an_exported_chat_model_stops_and_asks_as_it_was_trained(tmp_path: Path) -> None:
    """Ids of the checkpoint's own tokenizer, wherever a loader looks; what the source said of sampling stays."""
    hf = write_dense(tmp_path / "hf")
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.7, "do_sample": True}))
    change_config(hf, eos_token_id=7)
    imported(hf, tmp_path / "ours")
    opened = open_ours(tmp_path / "ours")
    opened.recipe.data.system_prompt = "Answer in one word."
    back = export_checkpoint(opened, tmp_path / "back")
    stops = list(SPECIALS.values())[::-1]
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == stops
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation == {"eos_token_id": stops, "pad_token_id": 256, "temperature": 0.7, "do_sample": True}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(back), AutoTokenizer.from_pretrained(back)
    assert model.generation_config.eos_token_id == stops
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert len(verify(back)) == 2
    with torch.no_grad():  # the likeliest token is <|im_end|>, always: two tokens would be one too many
        model.lm_head.weight.zero_()
        model.lm_head.weight[258] = model.model(torch.tensor([[1, 2]])).last_hidden_state[0, -1]
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=5, do_sample=False).tolist() == [[1, 2, 258]]


def test_the_whole_layout_stops_too_and_keeps_the_template_that_it_brought(
    ours: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours.recipe.data.system_prompt = "be kind"
    back = export_checkpoint(ours, tmp_path / "back")
    assert "published processor fails" not in caplog.text
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [258, 256], "pad_token_id": 256}
    assert json.loads((back / "chat_template.json").read_text())["chat_template"] == chat_template("be kind")
    assert json.loads((back / "tokenizer_config.json").read_text())["chat_template"] == chat_template("be kind")
    (back / "chat_template.json").write_text(json.dumps({"chat_template": "theirs"}))
    imported(back, tmp_path / "again")
    opened = open_ours(tmp_path / "again")
    assert json.loads((export_checkpoint(opened, tmp_path / "kept") / "chat_template.json").read_text()) == {
        "chat_template": "theirs"
    }
    opened.recipe.data.system_prompt = "be brief"
    assert json.loads((export_checkpoint(opened, tmp_path / "new") / "chat_template.json").read_text()) == {
        "chat_template": chat_template("be brief")
    }


def test_a_changed_rotary_base_is_written_wherever_the_configuration_has_one(tmp_path: Path) -> None:
    hf = write_dense(tmp_path / "hf")
    change_config(hf, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0})
    imported(hf, tmp_path / "ours")
    opened = open_ours(tmp_path / "ours")
    opened.recipe.model.rotary_base = 5e5
    config = json.loads((export_checkpoint(opened, tmp_path / "back") / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_every_file_of_an_export_is_in_its_ledger(ours: Opened, tmp_path: Path, name: str) -> None:
    out = export_checkpoint(ours, tmp_path / "back")
    assert len(verify(out)) == 2
    content = bytearray((out / name).read_bytes())
    content[-2] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: contents do not match the ledger"):
        verify(out)
    (out / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        verify(out)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda ledger: ledger.pop("tensors"), r"tensors: damaged: expected a list, found NoneType"),
        (lambda ledger: ledger.pop("outputs"), r"outputs: damaged: expected a list"),
        (lambda ledger: ledger["outputs"][0].pop("sha256"), r"outputs\[0\]: damaged: expected 'sha256', a str, found None"),
        (lambda ledger: ledger["tensors"][1].update(key=3), r"tensors\[1\]: damaged: expected 'key', a str, found 3"),
        (lambda ledger: ledger["tensors"][1].update(dtype="load"), r"expected a type of tensors, found 'load'"),
        (lambda ledger: ledger["tensors"].append("x"), r"tensors\[\d+\]: damaged"),
        (lambda ledger: ledger.update(format=7), r"expected a ledger of format 1, found format 7"),
    ],
)  # fmt: skip
def test_a_damaged_ledger_is_one_error(
    ours: Opened, tmp_path: Path, damage: Callable[[dict[str, Any]], Any], said: str
) -> None:
    out = export_checkpoint(ours, tmp_path / "back")
    ledger = json.loads((out / "conversion.json").read_text())
    damage(ledger)
    (out / "conversion.json").write_text(json.dumps(ledger))
    with pytest.raises(ConversionError, match=r"conversion\.json: .*" + said):
        verify(out)


def test_verify_makes_an_export_again(
    whole: Path, ours: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint, in the types that were asked for; carried weights from the one that it descends from."""
    trained = tmp_path / "trained"
    shutil.copytree(tmp_path / "ours" / "checkpoints", trained / "checkpoints")
    directory = trained / "checkpoints" / "iter_0000000"
    for name in ("conversion.json", "carried.safetensors"):  # as a run leaves it
        (directory / name).unlink()
    shutil.rmtree(directory / "hf")
    commit.write_manifest(directory)
    out = export_checkpoint(open_ours(trained, like=tmp_path / "ours"), tmp_path / "back", dtype="bf16")
    monkeypatch.chdir("/")
    count = len(tensors_of(whole))
    assert verify(out)[1] == f"uni_moe: {count} tensors made again from {directory}, all equal"
    trained.rename(tmp_path / "moved")
    assert f"{directory} is not here" in verify(out)[1]
    assert verify(out, sources={"uni_moe": tmp_path / "moved"})[1].endswith("all equal")
    (tmp_path / "moved").rename(trained)
    file = directory / "run_config.yaml"
    file.write_text(file.read_text() + "\n")
    commit.write_manifest(directory)
    with pytest.raises(CheckpointError, match=r"iter_0000000: is not the checkpoint that was exported"):
        verify(out)


def test_sources_are_found_from_another_directory(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger keeps absolute paths, whatever was typed."""
    shutil.copytree(whole, tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    imported(Path("hf"), Path("ours"))
    upcycle({"base": Path("hf")}, Path("mixture"))
    monkeypatch.chdir("/")
    assert verify(tmp_path / "ours")[1].endswith(f"made again from {tmp_path / 'hf'}, all equal")
    assert verify(tmp_path / "mixture")[1].endswith("made again from upcycled, all equal")
    report = tmp_path / "mixture" / "checkpoints" / "iter_0000000" / "upcycle.json"
    assert json.loads(report.read_text())["sources"] == {"base": str(tmp_path / "hf")}
    content = json.loads(report.read_text())
    report.write_text(json.dumps(content | {"trunk": "vision"}))
    commit.write_manifest(report.parent)
    with pytest.raises(ConversionError, match=r"upcycle\.json: damaged: names the source 'vision'"):
        verify(tmp_path / "mixture")


def test_blocks_that_overlap_are_no_whole_checkpoint(tmp_path: Path) -> None:
    """As many elements as the tensor has, and still not all of them."""
    writer = TorchDistWriter(tmp_path)
    for start in (0, 2):
        writer.write("x", torch.zeros(4, 3), shape=(8, 3), offsets=(start, 0), rank=0)
    writer.finish()
    with pytest.raises(CheckpointError, match=r"two blocks of 'x', at \[0, 0\] and \[2, 0\], overlap"):
        TorchDistReader(tmp_path).read("x")


def test_archives_without_checksums_of_their_own_load_with_torch(tmp_path: Path) -> None:
    writer = TorchDistWriter(tmp_path)
    value = torch.randn(50, 60)
    writer.write("x", value, shape=(50, 60), offsets=(0, 0), rank=0)
    writer.finish()
    assert torch.equal(torch.load(tmp_path / "__0_0.distcp", weights_only=True), value)
    assert torch.serialization.get_crc32_options(), "the setting of the process is as it was"
