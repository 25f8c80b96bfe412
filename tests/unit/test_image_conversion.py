"""The released picture generator and PixWizard's file in and out: every key of the list, bit for bit, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.means import MEANS
from megatron_omni.checkpoint.names import expand
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.checkpoint.uni_moe_image import RELEASED, image_rows
from megatron_omni.checkpoint.uni_moe_loader import other_drawing
from megatron_omni.checkpoint.upcycle_sources import merged_model, open_dense
from megatron_omni.checkpoint.verify import roundtrip
from megatron_omni.cli.convert import main
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.pictures import DiTConfig, ImageGeneratorConfig, ProjectorConfig
from megatron_omni.config.run import Recipe
from tests.distributed.test_omni_layouts import MODEL as OMNI_MODEL
from tests.trained import Trained
from tests.unit.dense_checkpoints import MODEL, change_config, omni, write_dense

OMNI = omni(MODEL, OMNI_MODEL)
DIT = DiTConfig(
    hidden_size=32, num_layers=2, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=40, condition_size=20,
    caption_size=24, task_size=12, vision_size=16,
)  # fmt: skip
WIZARD = dataclasses.replace(DIT, num_layers=1)
PROJECTORS = ProjectorConfig(hidden_size=16, num_layers=1, ffn_hidden_size=28, num_caption_rows=5, query_init="zero",
                             input_positions=False)  # fmt: skip
TINY = dataclasses.replace(RELEASED, dit=DIT, projectors=PROJECTORS)
VAE = {"image_generator.vae.encoder.conv_in.weight": torch.randn(4, 3, 3, 3)}


def dit_shapes(dit: DiTConfig) -> dict[str, tuple[int, ...]]:
    """The key list of image.md section 1.1, written out."""
    width, narrow, cond, ffn = (
        dit.hidden_size, dit.hidden_size // dit.num_attention_heads * dit.num_query_groups, dit.condition_size,
        dit.ffn_hidden_size,
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"x_embedder.weight": (width, 32), "x_embedder.bias": (width,)}
    shapes |= {"t_embedder.mlp.0.weight": (cond, 256), "t_embedder.mlp.2.weight": (cond, cond)}
    shapes |= {"task_embedder.1.weight": (cond, dit.task_size), "pad_token": (width,)}
    shapes |= {"global_semantic_embedder.1.weight": (cond, dit.vision_size), "final_layer.linear.weight": (32, width)}
    shapes |= {"final_layer.adaLN_modulation.1.weight": (width, cond)}
    norms = {"task_embedder.0": dit.task_size, "global_semantic_embedder.0": dit.vision_size}
    for n in range(dit.num_layers):
        layer, attention = f"layers.{n}.", f"layers.{n}.attention."
        shapes |= {f"{attention}{name}.weight": (width, width) for name in ("wq", "wo")}
        shapes |= {f"{attention}{name}.weight": (narrow, width) for name in ("wk", "wv", "wk_ii", "wv_ii")}
        shapes |= {f"{attention}{name}.weight": (narrow, dit.caption_size) for name in ("wk_y", "wv_y")}
        shapes |= {attention + name: (dit.num_attention_heads,) for name in ("gate", "gate_for_ii")}
        norms |= {attention + "q_norm": width}
        norms |= {attention + name: narrow for name in ("k_norm", "ky_norm", "kii_norm")}
        shapes |= {f"{layer}feed_forward.{name}.weight": (ffn, width) for name in ("w1", "w3")}
        shapes[layer + "feed_forward.w2.weight"] = (width, ffn)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "attention_input_norm"):
            shapes[f"{layer}{name}.weight"] = (width,)
        shapes[layer + "attention_y_norm.weight"] = (dit.caption_size,)
        shapes[layer + "adaLN_modulation.1.weight"] = (4 * width, cond)
        shapes[layer + "input_image_proj.weight"] = (width, dit.vision_size)
        shapes[layer + "y_pool_proj.weight"] = (width, cond)
        norms[layer + "in_conv.0"] = width
        shapes[layer + "in_conv.1.weight"] = (width, width)
        shapes[layer + "out_conv.0.weight"] = (width // 2, width)
        shapes[layer + "out_conv.2.weight"] = (width // 4, width // 2)
        shapes[layer + "out_conv.4.weight"] = (1, width // 4)
    for name, size in norms.items():
        shapes |= {f"{name}.{kind}": (size,) for kind in ("weight", "bias")}
    biased = [key for key in shapes if ".mlp." in key or "embedder.1" in key or "final_layer" in key]
    biased += [key for key in shapes if "adaLN" in key or "out_conv" in key or "in_conv.1" in key]
    return shapes | {key.replace("weight", "bias"): shapes[key][:1] for key in biased}


def projector_shapes(inside: ProjectorConfig, *, hidden: int, rows: int, out: int) -> dict[str, tuple[int, ...]]:
    """The published ``TextFcLayer``, mode transformer: ``nn.Transformer`` between two linear layers, and queries."""
    with torch.device("meta"):
        layer = nn.ModuleDict(
            {
                "in_fc": nn.Linear(hidden, inside.hidden_size),
                "tfm": nn.Transformer(
                    batch_first=True, norm_first=True, d_model=inside.hidden_size, num_encoder_layers=inside.num_layers,
                    num_decoder_layers=inside.num_layers, dim_feedforward=inside.ffn_hidden_size, nhead=4, dropout=0.0,
                ),
                "out_fc": nn.Linear(inside.hidden_size, out),
            }
        )  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    return shapes | {"query_embs": (1, rows, inside.hidden_size)}


def released_shapes(image: ImageGeneratorConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    dit, inside = image.dit, image.projectors
    caption = projector_shapes(inside, hidden=hidden, rows=inside.num_caption_rows, out=dit.caption_size)
    task = projector_shapes(inside, hidden=hidden, rows=3, out=dit.task_size)
    return {
        **{f"image_generator.model.{key}": shape for key, shape in dit_shapes(dit).items()},
        **{f"image_hidden_fcs.0.{key}": shape for key, shape in caption.items()},
        **{f"task_hidden_fcs.0.{key}": shape for key, shape in task.items()},
        "visual_hidden_fcs.0.model.weight": (dit.vision_size, hidden),
        "visual_hidden_fcs.0.model.bias": (dit.vision_size,),
    }


def drawn(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: (0.2 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}


def write_release(folder: Path, dtype: torch.dtype = torch.bfloat16, **others: Tensor) -> Path:
    """A dense model with encoders and a picture generator, its VAE among the weights; nothing of ours in config.json."""
    write_dense(folder, OMNI, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | drawn(released_shapes(TINY, OMNI.hidden_size), dtype) | VAE | others, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    del config["megatron_omni"]
    (folder / "config.json").write_text(json.dumps(config | {"tune_image_generator": True}))
    return folder


def write_pixwizard(folder: Path, *, prefix: str = "") -> Path:
    folder.mkdir(parents=True)
    state = {prefix + key: value for key, value in drawn(dit_shapes(WIZARD), torch.bfloat16).items()}
    torch.save(state, folder / "consolidated_ema.00-of-01.pth")
    torch.save({"x": torch.zeros(1)}, folder / "consolidated.00-of-01.pth")  # not what it draws with
    return folder


def sizes(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> int:
    return sum(torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith(prefix))


def test_the_released_shapes_are_the_table() -> None:
    """Full size; the counts of image.md sections 1.1 and 2.1."""
    expected = released_shapes(RELEASED, 3584)
    entries = expand(image_rows(ModelConfig(image=RELEASED)))
    found = {key: tuple(shape) for entry in entries for key, shape in zip(entry.theirs, entry.shapes, strict=True)}
    assert found.pop("image_generator.null_caption.weight") == (1, 2048)
    assert found == expected
    assert sizes(expected, "image_generator.model.") == 2_011_441_976
    assert sum(key.startswith("image_generator.model.") for key in expected) == 1003
    assert sizes(expected, "image_hidden_fcs.") == 273_147_392
    assert sizes(expected, "task_hidden_fcs.") == 271_135_488
    assert sizes(expected, "visual_hidden_fcs.") == 3_671_040
    assert {entry.ours.split(".")[1] for entry in entries} == {"dit", "caption", "task", "visual", "null_caption"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_release_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    opened = open_sources(language=write_release(tmp_path / "theirs", dtype))
    image = opened.model.image
    assert image == TINY, "sizes are read off the weights, the rest is the published arithmetic"
    assert (image.release, image.image_token_repeat, image.blank_source, image.sampling.steps) == (True, 2, "white", 59)
    (line,) = roundtrip(
        opened.parts, Recipe(model=opened.model), wanted=opened.wanted, layout=Layout(tp=2, pp=2), work=tmp_path
    )
    assert line.startswith(f"uni_moe: {len(load_file(tmp_path / 'theirs' / 'model.safetensors'))} tensors")


def test_what_is_imported_is_what_was_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By our names; the caption without words is the first row of the second entry of the file."""
    theirs = write_release(tmp_path / "theirs")
    blank = torch.randn(2, 7, DIT.caption_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.save(blank, tmp_path / "blank_caps.pt")
    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    words = ["--hf", str(theirs), "--blank-captions", str(tmp_path / "blank_caps.pt")]
    assert main(["import", *words, "--out", ours]) == 0 and main(["verify", ours]) == 0
    assert "zeros" not in caplog.text
    before, read = load_file(theirs / "model.safetensors"), open_ours(tmp_path / "ours").reader
    for name, key in (
        ("image.dit.layers.1.attention.wk_ii.weight", "image_generator.model.layers.1.attention.wk_ii.weight"),
        ("image.caption.tfm.decoder.norm.bias", "image_hidden_fcs.0.tfm.decoder.norm.bias"),
        ("image.task.query_embs", "task_hidden_fcs.0.query_embs"),
        ("image.visual.model.weight", "visual_hidden_fcs.0.model.weight"),
    ):
        assert torch.equal(read.read(name), before[key].to(read.read(name).dtype)), name
    assert torch.equal(read.read("image.null_caption.weight").float(), blank[1, :1].float())
    assert main(["export", "--checkpoint", ours, "--out", str(back)]) == 0 and main(["verify", str(back)]) == 0
    after = load_file(back / "model.safetensors")
    assert torch.equal(after.pop("image_generator.null_caption.weight"), blank[1, :1])
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    config = json.loads((back / "config.json").read_text())
    assert config["tune_image_generator"] is True and config["megatron_omni"]["model"]["image"]["release"] is True
    again = open_sources(language=back)  # now with the caption among the weights
    assert len(again.parts) == 1 and again.model == open_ours(tmp_path / "ours").recipe.model
    with pytest.raises(ConversionError, match=r"--blank-captions .*: for a released picture generator alone"):
        open_sources(language=back, blank_captions=tmp_path / "blank_caps.pt")


def test_without_that_file_it_is_zeros_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = open_sources(language=write_release(tmp_path / "theirs"))
    import_checkpoint(opened.parts, Recipe(model=opened.model), tmp_path / "ours", wanted=opened.wanted)
    assert "no --blank-captions blank_caps.pt" in caplog.text
    assert "1 weights of generators (image_generator) are carried along unused" in caplog.text  # the VAE
    assert not open_ours(tmp_path / "ours").reader.read("image.null_caption.weight").any()


@pytest.mark.parametrize(("place", "prefix"), [("", ""), ("consolidated_ema.00-of-01.pth", "model.")])
def test_pixwizards_file_is_read_and_comes_back(tmp_path: Path, place: str, prefix: str) -> None:
    folder = write_pixwizard(tmp_path / "theirs", prefix=prefix)
    opened = open_sources(language=None, image=folder / place if place else folder)
    assert opened.model.image is not None and opened.model.image.dit == WIZARD and opened.model.moe is None
    (line,) = roundtrip(opened.parts, Recipe(model=opened.model), wanted=opened.wanted, layout=Layout(), work=tmp_path)
    assert line.startswith(f"pixwizard: {len(dit_shapes(WIZARD))} tensors of {folder}")


def test_the_command_takes_the_generator_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a release without its language model; and PixWizard's, whose names are ours behind image.dit."""
    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    assert main(["import", "--image", str(write_release(tmp_path / "theirs")), "--out", ours]) == 0
    assert main(["verify", ours]) == 0 and "tensors made again from" in capsys.readouterr().out
    recipe = open_ours(tmp_path / "ours").recipe.model
    assert recipe.image == TINY and recipe.hidden_size == OMNI.hidden_size and recipe.vision is not None
    assert main(["export", "--checkpoint", ours, "--out", str(back)]) == 0 and main(["verify", str(back)]) == 0
    after, before = load_file(back / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert after.keys() - before.keys() == {"image_generator.null_caption.weight"}
    assert after.keys() & before.keys() == {
        key for key in before if key.startswith("image_generator.") or "_hidden_fcs" in key
    }
    assert all(torch.equal(after[key], before[key]) for key in after.keys() & before.keys())
    again = open_sources(language=None, image=back)
    assert again.model == recipe
    assert main(["export", "--checkpoint", ours, "--to", "pixwizard", "--out", str(tmp_path / "dit")]) == 0
    bare = load_file(tmp_path / "dit" / "model.safetensors")
    assert {f"image_generator.model.{key}" for key in bare} == {k for k in before if "generator.model." in k}
    folder = write_pixwizard(tmp_path / "pixwizard")
    assert main(["import", "--image", str(folder), "--out", str(tmp_path / "wizard")]) == 0
    assert set(open_ours(tmp_path / "wizard").reader.tensors) == {f"image.dit.{key}" for key in dit_shapes(WIZARD)}


def test_a_generator_of_ours_comes_back_with_what_the_release_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Positions and learned nulls; each is said to be passed over there."""
    image = dataclasses.replace(
        ImageGeneratorConfig(), dit=DIT, projectors=dataclasses.replace(PROJECTORS, input_positions=True)
    )
    model = dataclasses.replace(MODEL, image=image)
    shapes = {e.theirs[0]: e.shapes[0] for e in expand(image_rows(model))}
    assert shapes["image_hidden_fcs.0.input_positions"] == (32, 16)
    assert shapes["image_generator.null_task.weight"] == (2, 12)
    (tmp_path / "theirs").mkdir()
    save_file(drawn(shapes, torch.float32), tmp_path / "theirs" / "model.safetensors")
    from megatron_omni.checkpoint.uni_moe_image import image_config

    (tmp_path / "theirs" / "config.json").write_text(json.dumps(image_config(model, "float32")))
    opened = open_sources(language=None, image=tmp_path / "theirs")
    assert opened.model.image == image
    import_checkpoint(opened.parts, Recipe(model=opened.model), tmp_path / "ours", wanted=opened.wanted)
    back = load_file(export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back") / "model.safetensors")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    assert before.keys() == back.keys() and all(torch.equal(before[key], back[key]) for key in before)
    assert "model.image.release=false" in caplog.text and "input_positions=true" in caplog.text


def test_each_setting_that_the_published_code_does_not_follow_is_one_line() -> None:
    noisy = dataclasses.replace(RELEASED, dit=DiTConfig(noisy_selection=True))
    assert other_drawing(ModelConfig(image=noisy)) == []
    for changed, said in (
        ({"image_token_repeat": 1}, "a block of 32 image tokens (always 64 there)"),
        ({"release": False}, "release=false"),
        ({"blank_source": "none"}, "blank_source=none"),
        ({"dit": DiTConfig(num_layers=12, noisy_selection=True)}, "model.image.dit: num_layers=12"),
        ({"dit": DiTConfig()}, "noisy_selection=false"),
        ({"projectors": ProjectorConfig(num_layers=2, input_positions=False)}, "model.image.projectors: num_layers=2"),
        ({"sampling": dataclasses.replace(RELEASED.sampling, guided_channels=0)}, "guided_channels=0"),
    ):
        (line,) = other_drawing(ModelConfig(image=dataclasses.replace(noisy, **changed)))
        assert said in line


def test_every_key_is_accounted_for(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    model, wq = "image_generator.model.", "image_generator.model.layers.0.attention.wq.weight"
    for changed, message in (
        ({model + "layers.0.extra": torch.zeros(2)}, r"'image_generator\.model\.layers\.0\.extra' has no place"),
        ({"image_hidden_fcs.1.in_fc.bias": torch.zeros(2)}, r"'image_hidden_fcs\.1\.in_fc\.bias' has no place"),
        ({wq: None}, r"wq\.weight' of shape \[32, 32\], found none"),
        ({wq: torch.zeros(32, 31)}, r"wq\.weight': expected shape \[32, 32\], found \[32, 31\]"),
        ({"task_hidden_fcs.0.query_embs": torch.zeros(1, 4, 16)}, r"expected shape \[1, 3, 16\], found \[1, 4, 16\]"),
        ({"image_hidden_fcs.0.query_embs": torch.zeros(16)}, r"query_embs': expected \[1, rows, width\]"),
        (
            {model + "layers.0.attention.gate": torch.zeros(5)},
            "5 heads of 32 channels.*no generator of PixWizard's kind",
        ),
        ({model + "layers.0.attention.gate": None}, r"expected a vector 'layers\.0\.attention\.gate'.*found none"),
        ({model + "layers.999999999.x": torch.zeros(2)}, "1000000000 layers do not fit its"),
    ):
        edited = {key: value for key, value in (tensors | changed).items() if value is not None}
        save_file(edited, folder / "model.safetensors")
        with pytest.raises(ConversionError, match=message):
            opened = open_sources(language=folder)
            import_checkpoint(opened.parts, Recipe(model=opened.model), tmp_path / "out", wanted=opened.wanted)
        assert not (tmp_path / "out").exists()


def test_a_release_without_the_generators_weights_draws_nothing(tmp_path: Path) -> None:
    """A part of them is carried there and back (test_export.py); the flag alone makes no generator."""
    folder = write_dense(tmp_path / "theirs", OMNI)
    change_config(folder, tune_image_generator=True)
    assert open_sources(language=folder).model.image is None


def test_upcycling_leaves_it_out(tmp_path: Path) -> None:
    source = open_dense("base", write_release(tmp_path / "theirs"))
    assert source.model.image == TINY
    assert merged_model({"base": source}, trunk="base").image is None


class Code:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


def test_bad_files_are_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, blank = write_release(tmp_path / "theirs"), tmp_path / "blank_caps.pt"

    def refused(*words: str) -> str:
        assert main(["import", *words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("error:") == 1 and "Traceback" not in said
        return said

    for value, message in (
        (torch.zeros(2, 7, 23), "expected a tensor [2, tokens, 24], found [2, 7, 23]"),
        (torch.zeros(1, 7, 24), "found [1, 7, 24]"),
        (torch.full((2, 7, 24), float("inf")), "no finite numbers"),
        (torch.zeros(2, 7, 24, dtype=torch.long), "no finite numbers"),
        ({"a": torch.zeros(1)}, "found dict"),
        (Code(), "not readable as a tensor"),
    ):
        torch.save(value, blank)
        assert message in refused("--image", str(folder), "--blank-captions", str(blank))
    assert "no such file" in refused("--hf", str(folder), "--blank-captions", str(tmp_path / "nowhere"))
    assert "leave the other sources out" in refused("--image", str(folder), "--hf", str(folder))
    assert "for a released picture generator alone" in refused(
        "--image", str(write_pixwizard(tmp_path / "wizard")), "--blank-captions", str(blank)
    )
    assert "does not exist" in refused("--image", str(tmp_path / "nowhere"))
    torch.save({"x_embedder.weight": Code()}, tmp_path / "code.pth")
    assert "refused: not a file of plain tensors" in refused("--image", str(tmp_path / "code.pth"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    assert "found neither" in refused("--image", str(tmp_path / "other.pth"))


def test_a_run_that_learned_to_draw_goes_out_and_comes_back(draws: Trained, tmp_path: Path) -> None:
    """Its running means, which it draws with; nulls and positions included. Read back it is the same model."""
    ours = open_ours(draws.run_dir)
    assert any(name.startswith(MEANS) for name in ours.reader.tensors)
    export_checkpoint(ours, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["tune_image_generator"] is True
    opened = open_sources(language=tmp_path / "theirs")
    assert opened.model.image == ours.recipe.model.image and len(opened.parts) == 1
    import_checkpoint(opened.parts, Recipe(model=opened.model), tmp_path / "back", wanted=opened.wanted)
    again = open_ours(tmp_path / "back").reader
    names = [name for name in again.tensors if name.startswith("image.")]
    assert {name.split(".")[1] for name in names} == {"dit", "caption", "task", "visual", "null_caption", "null_task"}
    assert all(torch.equal(again.read(name), ours.reader.read(name)) for name in names)
    mean = next(name for name in ours.reader.tensors if name.startswith(MEANS))
    assert torch.equal(again.read(mean.removeprefix(MEANS)), TorchDistReader(ours.directory).read(mean))
