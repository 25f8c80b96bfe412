"""``prepare --latents --hidden``: what is on disk is what the models make in a step, and a step on it has the same losses."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megatron_omni.checkpoint.commit import MANIFEST, find, sha256
from megatron_omni.config.generators import PictureCodecConfig
from megatron_omni.config.load import load_recipe
from megatron_omni.config.run import Recipe
from megatron_omni.data.builders import sample_builder
from megatron_omni.data.drawing import GENERATE
from megatron_omni.data.picture_cache import Making, PictureRows, cache_pictures
from megatron_omni.data.row_files import open_rows, write_rows
from megatron_omni.data.sources import parse_line
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from megatron_omni.models.generators.conv_vae import ConvCodec
from megatron_omni.models.generators.vae_files import save_conv_codec
from megatron_omni.parallel.groups import destroy
from megatron_omni.platform.seeds import named_generator
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import WORDS, chat, tiny_recipe, tiny_values, train_rank

FROZEN = [
    "vision", "audio", "projectors", "attention", "norms", "experts", "shared_experts", "gate", "ffn", "embeddings", "output",
    "new_token_rows",
]  # fmt: skip
IMAGE = {
    "dit": {
        "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48,
        "condition_size": 16, "caption_size": 12, "task_size": 8, "vision_size": 10, "kept_vision_tokens": 3,
        "latent_channels": 3,
    },
    "projectors": {
        "hidden_size": 24, "num_attention_heads": 4, "num_layers": 1, "ffn_hidden_size": 40, "num_caption_rows": 4,
    },
    "downsampling": 4, "latent_scale": 1.0, "size_step": 8, "base_size": 16,
}  # fmt: skip
LM, RECIPE, CACHED = "lm", "draw.yaml", "cached.yaml"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Eight rows that draw, of three sizes, with sources, damage and two pictures in one row; behind them three that cannot."""
    noise = np.random.default_rng(0)
    for i, size in enumerate([(16, 16), (40, 40), (32, 16), (24, 48)]):
        Image.fromarray(noise.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{i}.png")
    rows = [
        {**chat(f"draw {word}", f"here {GENERATE}"), "targets": [f"{i}.png"], "task": "text_to_image"}
        for i, word in enumerate(WORDS[:4])
    ]
    rows += [
        {**chat("<image> edit", GENERATE), "images": ["1.png"], "targets": ["0.png"], "task": "edit"},
        {**chat("<image> repair", GENERATE), "targets": ["2.png"], "task": "denoise", "degrade": "noise", "id": "7"},
        {**chat("<image> two", f"{GENERATE} and {GENERATE}"), "images": ["3.png"], "targets": ["3.png", "3.png"]},
        {**chat("a <generate>", GENERATE), "targets": ["1.png"]},
    ]
    bad = [
        {**chat("draw", GENERATE), "targets": ["gone.png"]},
        {**chat("draw", "nothing"), "targets": ["0.png"]},
        chat("what", "text"),
    ]
    return rows + bad


def corpus_of(folder: Path) -> Path:
    folder.mkdir()
    rows = [json.dumps(row) + "\n" for row in rows_of(folder)]
    (folder / "draw.jsonl").write_text("".join(rows))
    (folder / "usable.jsonl").write_text("".join(rows[:8]))
    lines = [" ".join(WORDS), "draw here edit repair two a what text"] * 20
    train_sentencepiece(lines, folder / "tokenizer.model", vocab_size=330, specials=ALL_SPECIALS)
    for name, seed in (("vae", 0), ("other_vae", 1)):
        sizes = {
            "latent_channels": 3,
            "channels": [6, 8],
            "encoder_blocks": [0, 0],
            "decoder_blocks": [0, 0],
            "pixel_channels": 4,
        }
        codec = ConvCodec(PictureCodecConfig(**sizes)).eval()
        codec.draw_weights(lambda parameter, seed=seed: named_generator(seed, parameter))
        save_conv_codec(codec, folder / name)
    return folder


def recipe_file(folder: Path, name: str, path: str, conditions: str) -> None:
    values = json.loads(json.dumps(tiny_values()))
    values["model"] |= {"image": {**IMAGE, "vae": str(folder / "vae")}, "audio": None, "vocab_size": 352}
    values["model"]["moe"] |= {"moe_aux_loss_coeff": 0.0, "moe_aux_loss_coeff_min": 0.0}
    values |= {
        "task": "generative",
        "train_iters": 6,
        "freeze": FROZEN,
        "run_dir": str(folder / name.partition(".")[0]),
    }
    values["generative"] = {"conditions": conditions, "losses": {"lm": 0.0, "flow": 1.0}, "drop": 0.0}
    data = {"sources": [{"name": "draw", "path": str(folder / path)}], "tokenizer": str(folder / "tokenizer.model")}
    values["data"] |= data | {"global_batch_size": 4, "max_bad_fraction": 1.0}
    if conditions == "model":
        values |= {"init_from": str(folder / LM), "init_allow_missing": ["image.*"]}
    else:
        values["model"]["image"]["vae"] = None  # nothing but the generator is there
        values |= {
            "init_from": str(folder / LM),
            "init_allow_missing": ["image.*"],
            "init_allow_extra": ["language.*", "vision.*"],
        }
    values["optim"] |= {"lr": 0.02, "lr_warmup_iters": 0}
    (folder / name).write_text(yaml.safe_dump(values))


def made(rank: Rank, folder: Path) -> dict[str, Any]:
    """Everything in one process: a language model, the command, a run with it in the step and one on what is on disk."""
    from megatron_omni.cli import prepare

    def command(*words: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = prepare.main([str(word) for word in words])
        return status, out.getvalue(), err.getvalue()

    language = tiny_recipe(
        folder, folder / LM, train_iters=1, model__audio=None, model__vocab_size=352, model__init_method_std=0.3,
        data__sources=[{"name": "t", "path": str(folder / "text.jsonl")}],
    )  # fmt: skip
    assert train_rank(rank, language) == 0
    destroy()
    asked = [folder / RECIPE, "--data", folder / "draw.jsonl", "--workers", 1]
    found: dict[str, Any] = {"done": command(*asked, "--latents", folder / "vae", "--hidden", folder / LM)}
    found["bytes"] = {path.name: path.read_bytes() for path in sorted(folder.glob("draw.drawn-*"))}
    found["again"] = command(*asked, "--latents", folder / "vae", "--hidden", folder / LM)
    found["wrong"] = command(*asked, "--latents", folder / "other_vae")
    found["vocabulary"] = command(*asked, "--hidden", folder / LM, "model.rotary_base=777")
    for name in (RECIPE, CACHED):
        recipe = load_recipe(folder / name, [])
        found[name] = flow_losses(rank, recipe)
        assert recipe.model.image is not None  # as the run filled it in, and wrote it down
        found[f"{name} knows"] = recipe.model.image.vae_fingerprint, recipe.model.image.hidden_fingerprint
    path = folder / "draw.drawn-00000.hidden.safetensors"
    kept, whole = open_rows(path, "hidden"), path.read_bytes()
    swapped = [kept.array(i).flip(0) for i in range(len(kept))]
    write_rows(path, swapped, kind="hidden", fingerprint=kept.fingerprint, about=kept.about)
    found["swapped"] = flow_losses(rank, load_recipe(folder / CACHED, [f"run_dir={folder / 'swapped'}"]))
    path.write_bytes(whole)
    return found


def flow_losses(rank: Rank, recipe: Recipe) -> list[float]:
    assert train_rank(rank, recipe) == 0
    destroy()
    lines = (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["flow loss"] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = corpus_of(tmp_path_factory.mktemp("cache") / "corpus")
    (folder / "text.jsonl").write_text("".join(json.dumps(chat("draw", " ".join(WORDS))) + "\n" for _ in range(8)))
    recipe_file(folder, RECIPE, "usable.jsonl", "model")
    recipe_file(folder, CACHED, "draw.drawn-*.jsonl", "cached")
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return run_ranks(made, 1, folder)[0]


def test_the_command_says_what_it_made_and_left_out(folder: Path, result: dict[str, Any]) -> None:
    status, out, err = result["done"]
    assert status == 0, err
    assert f"latents and hidden of {folder / 'draw.jsonl'}: 8 rows, 9 pictures" in out
    for reason, number in (("missing_media", 1), ("marker_count", 1), ("no_target", 1)):
        assert f"left out ({reason}): {number}" in out
    assert f"{folder / 'draw.jsonl'}:9: " in out and "no such file" in out
    assert "media: 9 drawn, 3 image; " in out  # the index of what was written
    assert sorted(result["bytes"]) == [
        "draw.drawn-00000.hidden.safetensors", "draw.drawn-00000.jsonl", "draw.drawn-00000.jsonl.index",
        "draw.drawn-00000.latents.safetensors",
    ]  # fmt: skip


def test_made_again_nothing_changes(folder: Path, result: dict[str, Any]) -> None:
    status, out, _ = result["again"]
    assert status == 0 and "8 rows, 9 pictures" in out and "left out (marker_count): 1" in out
    assert {path.name: path.read_bytes() for path in folder.glob("draw.drawn-*")} == result["bytes"]


def test_models_of_another_recipe_are_refused(result: dict[str, Any]) -> None:
    for name, message in (("wrong", "name the same VAE in both"), ("vocabulary", "model.rotary_base=777")):
        status, _, err = result[name]
        assert status == 2 and message in err, err


def test_latents_are_those_of_the_pictures_that_training_cuts(folder: Path, result: dict[str, Any]) -> None:
    from megatron_omni.models.generators.vae import load_picture_codec

    codec = load_picture_codec(folder / "vae")
    builders = [sample_builder(load_recipe(folder / name, [])) for name in (RECIPE, CACHED)]
    plain = (folder / "draw.jsonl").read_bytes().splitlines()[:8]
    kept = (folder / "draw.drawn-00000.jsonl").read_bytes().splitlines()
    for before, after in zip(plain, kept, strict=True):
        records = [parse_line(line, where="", source="", root=folder) for line in (before, after)]
        pixels, latents = (builder.build_sample(record).drawn for builder, record in zip(builders, records))
        for one, other in zip(pixels, latents, strict=True):
            assert one.task == other.task and torch.equal(codec.encode(one.target[None])[0], other.target)
            assert (one.source is None) == (other.source is None)
            if one.source is not None:
                assert torch.equal(codec.encode(one.source[None])[0], other.source)
                assert len(other.vision) == one.vision_rows[1] - one.vision_rows[0]
    file = open_rows(folder / "draw.drawn-00000.hidden.safetensors", "hidden")
    directory = find(folder / LM)
    assert directory is not None and file.fingerprint == sha256(directory / MANIFEST)
    assert result[f"{RECIPE} knows"] == (codec.fingerprint, None)
    assert result[f"{CACHED} knows"] == (codec.fingerprint, file.fingerprint)


def test_steps_on_what_is_on_disk_have_the_losses_of_those_with_the_models(result: dict[str, Any]) -> None:
    with_models, cached, swapped = result[RECIPE], result[CACHED], result["swapped"]
    assert len(with_models) == 6 and cached == pytest.approx(with_models, rel=1e-4)
    assert abs(swapped[-1] / cached[-1] - 1) > 3e-3  # what is on disk matters: gates begin closed, so not at once


def test_half_the_disk_and_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that counts: what is made already is not made again, what is damaged is."""

    class Counting:
        fingerprint, calls = "one", 0

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return pixels[:, ::4, ::4].float() / 255

    monkeypatch.setattr("megatron_omni.data.picture_cache.SHARD", 3)
    for file in folder.glob("?.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "x.jsonl").write_bytes((folder / "draw.jsonl").read_bytes())
    vae = Counting()
    making = Making(recipe=load_recipe(folder / RECIPE, []), latents=vae, half=True)
    found = cache_pictures(PictureRows(tmp_path / "x.jsonl"), making)
    assert [path.name for path in found.paths] == [f"x.drawn-0000{i}.jsonl" for i in range(4)]
    assert (found.num_rows, found.num_pictures, vae.calls) == (9, 9, 13)  # the row of text stays as it is
    file = open_rows(tmp_path / "x.drawn-00000.latents.safetensors", "latents")
    assert file.array(0).dtype == torch.float16 and len(file) == 3
    again = cache_pictures(PictureRows(tmp_path / "x.jsonl"), making)
    assert vae.calls == 13 and (again.num_rows, again.skipped) == (found.num_rows, found.skipped)
    path = tmp_path / "x.drawn-00001.latents.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    cache_pictures(PictureRows(tmp_path / "x.jsonl"), making)
    assert vae.calls == 13 + 5 and path.read_bytes() == whole
    vae.fingerprint = "two"
    cache_pictures(PictureRows(tmp_path / "x.jsonl"), making)
    assert vae.calls == 13 + 5 + 13
    with pytest.raises(ValueError, match="unpack it"):
        PictureRows(tmp_path / "x.tar")
