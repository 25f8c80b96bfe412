"""The released speech generator in and out: every key of its list, bit for bit, and what it computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.families import OpenedSources, open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.names import expand
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.uni_moe_speech import PREFIX, released_moe, speech_rows
from megatron_omni.checkpoint.verify import roundtrip, verify
from megatron_omni.cli.convert import main
from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.run import Recipe
from tests.parity import foreign
from tests.unit.dense_checkpoints import write_tokenizer

CODES, WORDS, WIDTH, TABLE, HEADS, GROUPS, HEAD, FFN, LAYERS, EXPERTS = 20, 320, 112, 24, 14, 2, 8, 48, 2, 4
"""Of the model in miniature: seven queries a group and four experts, as released."""


def released_shapes(
    *, codes: int, words: int, width: int, table: int, keys: int, ffn: int, layers: int, experts: int
) -> dict[str, tuple[int, ...]]:
    """The key list of speech.md section 3.1, written out; no expert: a dense model."""
    shapes: dict[str, tuple[int, ...]] = {
        "qwenvl_embed_tokens.weight": (words, table),
        "in_fnn.weight": (width, table),
        "in_fnn.bias": (width,),
        "audio_embedding.weight": (codes + 9, width),
        "norm.weight": (width,),
        "out_fnn.weight": (codes + 9, width),
        "out_fnn.bias": (codes + 9,),
    }
    for n in range(layers):
        block = f"layers.{n}."
        shapes[block + "input_layernorm.weight"] = shapes[block + "post_attention_layernorm.weight"] = (width,)
        for name, rows in (("q", width), ("k", keys), ("v", keys)):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (rows, width)
            shapes[f"{block}self_attn.{name}_proj.bias"] = (rows,)
        shapes[block + "self_attn.o_proj.weight"] = (width, width)
        if experts:
            shapes[block + "mlp.deepspeed_moe.gate.wg.weight"] = (experts, width)
        for e in range(max(1, experts)):
            part = f"mlp.deepspeed_moe.experts.deepspeed_experts.{e}." if experts else "mlp."
            shapes[f"{block}{part}gate_proj.weight"] = shapes[f"{block}{part}up_proj.weight"] = (ffn, width)
            shapes[f"{block}{part}down_proj.weight"] = (width, ffn)
    return shapes


def tiny_shapes(*, experts: int = EXPERTS, own_table: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = released_shapes(
        codes=CODES, words=WORDS, width=WIDTH, table=TABLE, keys=GROUPS * HEAD, ffn=FFN, layers=LAYERS, experts=experts
    )
    if own_table:
        for key in ("qwenvl_embed_tokens.weight", "in_fnn.weight", "in_fnn.bias"):
            del shapes[key]
        shapes["embed_tokens.weight"] = (WORDS, WIDTH)
    return shapes


def drawn(
    shapes: dict[str, tuple[int, ...]], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """N(0, 0.15), norms around 1, gates N(0, 1) so that experts differ; under the released prefix."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        value = value if "gate.wg" in key else 1 + 0.15 * value if "norm" in key else 0.15 * value
        tensors[PREFIX + key] = value.to(dtype)
    return tensors


def write_generator(directory: Path, *, kind: str = "bin", dtype: torch.dtype = torch.float32, **of: Any) -> Path:
    """A folder as released, with the width of a head, which is not 64 here, in a configuration beside the weights."""
    directory.mkdir(parents=True)
    tensors = drawn(tiny_shapes(**of), dtype=dtype)
    (directory / "config.json").write_text(json.dumps({"transformer_attention_heads": HEADS}))
    if kind == "bin":
        torch.save(tensors, directory / "speech_gen_ep2.bin")
    elif kind == "bare":
        torch.save(
            {key.removeprefix(PREFIX): value for key, value in tensors.items()}, directory / "speech_gen_ep2.bin"
        )
    else:  # among the weights of the Omni release
        others = {"model.norm.weight": torch.ones(3), "vision_aligner.0.bias": torch.ones(2)}
        save_file(tensors | others, directory / "model.safetensors")
    return directory


def imported(opened: OpenedSources, out: Path, **options: Any) -> Path:
    return import_checkpoint(opened.parts, Recipe(model=opened.model), out, wanted=opened.wanted, **options)


def test_the_released_shapes_are_the_table() -> None:
    """The full size: 24 layers of 4 experts, 4096 codes; 1.62 billion parameters with the frozen table, 1.31 trained."""
    model = ModelConfig(
        num_layers=24, hidden_size=896, ffn_hidden_size=4864, num_attention_heads=14, num_query_groups=2, kv_channels=64,
        vocab_size=4105, output_bias=True, moe=released_moe(4, 4864), vision=None, audio=None, speech=SpeechConfig(),
    )  # fmt: skip
    entries = expand(speech_rows(model, {"prefix": ""}))
    found = {key: shape for entry in entries for key, shape in zip(entry.theirs, entry.shapes, strict=True)}
    expected = released_shapes(
        codes=4096, words=151936, width=896, table=2048, keys=128, ffn=4864, layers=24, experts=4
    )
    assert found == expected
    sizes = {key: torch.empty(shape, device="meta").numel() for key, shape in expected.items()}
    assert round(sum(sizes.values()) / 1e9, 2) == 1.62
    assert round((sum(sizes.values()) - sizes["qwenvl_embed_tokens.weight"]) / 1e6, 1) == 1308.5


@pytest.mark.parametrize("kind", ["bin", "bare", "omni"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roundtrip_is_bitwise(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = write_generator(tmp_path / "theirs", kind=kind, dtype=dtype)
    opened = open_sources(language=None, speech=folder)
    lines = roundtrip(opened.parts, Recipe(model=opened.model), wanted=opened.wanted, layout=Layout(tp=2, pp=2, ep=2))
    (line,) = lines
    assert line.startswith(f"speech_gen: {len(tiny_shapes())} tensors of {folder}") and line.endswith("bit for bit")


@pytest.mark.parametrize("own_table", [False, True])
def test_a_dense_predecessor_comes_back(tmp_path: Path, own_table: bool) -> None:
    folder = write_generator(tmp_path / "theirs", experts=0, own_table=own_table)
    opened = open_sources(language=None, speech=folder / "speech_gen_ep2.bin")
    assert opened.model.moe is None and opened.model.speech is not None
    assert opened.model.speech.text_hidden_size == (WIDTH if own_table else TABLE)
    (line,) = roundtrip(opened.parts, Recipe(model=opened.model), wanted=opened.wanted, layout=Layout(tp=2))
    assert f"{len(tiny_shapes(experts=0, own_table=own_table))} tensors" in line


def test_a_trained_projection_does_not_become_a_predecessor(tmp_path: Path) -> None:
    """What the predecessor has no place for is an error there, and stays in the layout of today."""
    opened = open_sources(language=None, speech=write_generator(tmp_path / "theirs", experts=0, own_table=True))
    directory = imported(opened, tmp_path / "ours")
    file = next(directory.glob("*.distcp"))
    read = open_ours(directory)
    identity = read.reader.read("text_projection.weight").numpy().tobytes()
    content = file.read_bytes()
    assert content.count(identity) == 1
    place = content.index(identity)
    file.write_bytes(content[:place] + torch.full((1,), 0.5).numpy().tobytes() + content[place + 4 :])
    commit.write_manifest(directory)
    with pytest.raises(ConversionError, match="text_projection: expected the identity"):
        export_checkpoint(open_ours(directory), tmp_path / "back")
    read = open_ours(directory)
    read.ledger = {}  # a run that went on from it
    back = load_file(export_checkpoint(read, tmp_path / "today") / "model.safetensors")
    assert back[PREFIX + "in_fnn.weight"][0, 0] == 0.5 and PREFIX + "qwenvl_embed_tokens.weight" in back


def test_every_key_is_accounted_for(tmp_path: Path) -> None:
    folder = write_generator(tmp_path / "theirs")
    tensors = torch.load(folder / "speech_gen_ep2.bin", weights_only=True)
    for change, message in (
        (
            {PREFIX + "layers.0.extra.weight": torch.zeros(2)},
            r"the key 'speech_generator\.layers\.0\.extra\.weight' has no",
        ),
        (
            {PREFIX + "out_fnn.bias": None},
            r"expected the key 'speech_generator\.out_fnn\.bias' of shape \[29\], found none",
        ),
        ({PREFIX + "norm.weight": torch.ones(3)}, r"norm\.weight': expected shape \[112\], found \[3\]"),
        ({PREFIX + "layers.5.self_attn.o_proj.weight": torch.ones(2, 2)}, r"layers\.2\.input_layernorm.*found none"),
        ({PREFIX + "layers.999999999.x": torch.ones(2, 2)}, r"names layer 999999999"),
        ({PREFIX + "audio_embedding.weight": None}, r"expected the key 'speech_generator\.audio_embedding\.weight'"),
    ):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        torch.save(changed, folder / "speech_gen_ep2.bin")
        with pytest.raises(ConversionError, match=message):
            imported(open_sources(language=None, speech=folder), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_pickle_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    folder = write_generator(tmp_path / "theirs")

    class Code:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit",)

    torch.save({PREFIX + "norm.weight": Code()}, folder / "speech_gen_ep2.bin")
    with pytest.raises(ConversionError, match=r"speech_gen_ep2\.bin: refused: not a file of plain tensors"):
        open_sources(language=None, speech=folder)


def test_heads_of_another_width_need_a_configuration(tmp_path: Path) -> None:
    folder = write_generator(tmp_path / "theirs")
    (folder / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"112 rows of q_proj are no heads of 64.*transformer_attention_heads"):
        open_sources(language=None, speech=folder)


def test_the_command_imports_verifies_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what it writes is read back from its own ``config.json``, tokenizer included."""
    folder = write_generator(tmp_path / "theirs", dtype=torch.bfloat16)
    words = write_tokenizer(tmp_path / "words")
    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    assert main(["import", "--speech", str(folder), "--tokenizer", str(words), "--out", ours, "--ep", "4"]) == 0
    assert main(["verify", ours]) == 0
    assert "tensors made again from" in capsys.readouterr().out
    assert main(["export", "--checkpoint", ours, "--out", str(back)]) == 0
    assert main(["verify", str(back)]) == 0
    before = torch.load(folder / "speech_gen_ep2.bin", weights_only=True)
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    (back / "conversion.json").unlink()
    again = open_sources(language=None, speech=back)
    assert again.model == open_ours(tmp_path / "ours").recipe.model
    assert main(["import", "--speech", str(back), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "checkpoints" / "iter_0000000" / "tokenizer").is_dir()
    assert verify(tmp_path / "again")[1].endswith("all equal")


def test_a_generator_and_other_parts_are_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_generator(tmp_path / "theirs"))
    for words, message in (
        (["--speech", folder, "--hf", folder], "is a whole speech generator; leave out --hf"),
        (["--speech", folder, "--vision", folder], "a speech generator has no encoders"),
        (["--text-table", folder], "give --hf too"),
        (["--speech", str(tmp_path / "nowhere")], "does not exist"),
        (["--speech", str(tmp_path)], "expected"),
    ):
        assert main(["import", *words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said


def test_a_text_model_starts_a_generator(tmp_path: Path) -> None:
    """Layers and final norm of Qwen2.5, the word embeddings of another model; the rest is new in the run."""
    foreign.qwen2(tmp_path / "qwen", tied=True)
    table = torch.randn(WORDS, TABLE)
    (tmp_path / "vl").mkdir()
    save_file({"model.embed_tokens.weight": table, "visual.x": torch.ones(2)}, tmp_path / "vl" / "model.safetensors")
    opened = open_sources(language=tmp_path / "qwen", text_table=tmp_path / "vl")
    speech = opened.model.speech
    assert speech is not None and (speech.text_vocab_size, speech.text_hidden_size) == (WORDS, TABLE)
    assert (opened.model.vocab_size, opened.model.rotary_base) == (4105, 1e4) and opened.model.output_bias
    read = open_ours(imported(opened, tmp_path / "ours")).reader
    assert torch.equal(read.read("text_table.weight"), table)
    theirs = load_file(tmp_path / "qwen" / "model.safetensors")
    down = read.read("language.decoder.layers.3.mlp.linear_fc2.weight")
    assert torch.equal(down, theirs["model.layers.1.mlp.down_proj.weight"])
    missing = {"language.embedding.word_embeddings.weight", "language.output_layer.weight", "text_projection.weight"}
    assert not missing & set(read.tensors)
    assert verify(tmp_path / "ours")[1].endswith("all equal")
