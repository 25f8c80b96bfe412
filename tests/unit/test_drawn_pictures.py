"""Pictures of task generative: targets and sources at one size, what is read from disk, and what does not fit it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_omni.config.generative import GenerativeConfig, GenerativeLosses
from megatron_omni.config.pictures import DiTConfig, ImageGeneratorConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.builders import sample_builder
from megatron_omni.data.drawing import GENERATE
from megatron_omni.data.errors import RecipeError, RecordError
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.picture_arrays import cut_facts, hidden_facts
from megatron_omni.data.preflight import inspect
from megatron_omni.data.preflight_page import page
from megatron_omni.data.record import Record, parse_record
from megatron_omni.data.row_files import write_rows
from megatron_omni.data.sample import Sample
from megatron_omni.data.sources import open_source
from tests.unit.test_drawing import drawing_tokenizer
from tests.unit.tiny_data import row, tiny_recipe, write_image, write_source

T, H = 35, 64


def recipe_of(folder: Path, *, conditions: str = "model", image: dict | None = None, **losses) -> Recipe:
    """Pictures of about 32 x 32, in steps of 16."""
    recipe = tiny_recipe(folder, [])
    recipe.data.tokenizer, recipe.task, recipe.model.hidden_size = drawing_tokenizer(folder), "generative", H
    dit = DiTConfig(task_size=6, caption_size=8, vision_size=4)
    recipe.model.image = ImageGeneratorConfig(dit=dit, base_size=32, **(image or {}))
    recipe.generative = GenerativeConfig(conditions=conditions, losses=GenerativeLosses(**losses))
    return recipe


def record_of(folder: Path, question: str = "draw", answer: str = GENERATE, **fields) -> Record:
    """The record of a row whose files lie in ``folder``."""
    config = write_source(folder, "one", [row(question, answer, **fields)])
    return open_source(config, digest="")[0]


def built(folder: Path, record: Record, **config) -> Sample:
    return sample_builder(recipe_of(folder, **config)).build_sample(record)


def ramp(path: Path, width: int, height: int) -> None:
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    Image.fromarray((255 * np.stack([x, y, 0 * x], 2)).astype(np.uint8)).save(path)


def latents(folder: Path, arrays: list[torch.Tensor], *, fingerprint: str = "vae one", **facts) -> Path:
    path = folder / "x.latents.safetensors"
    known = cut_facts(recipe_of(folder).model.image)
    write_rows(path, arrays, kind="latents", fingerprint=fingerprint, about={**known, **facts})
    return path


# ------------------------------------------------------------------------------------------------ with a language model


def test_a_picture_has_its_block_its_pixels_and_the_rows_of_its_source(tmp_path):
    write_image(tmp_path / "other.png", size=(56, 28))
    ramp(tmp_path / "source.png", 60, 60)
    ramp(tmp_path / "target.png", 120, 120)
    record = record_of(
        tmp_path, "<image> and <image>: edit", f"so {GENERATE} it is", images=["other.png", "source.png"],
        targets=["target.png"], task="edit",
    )  # fmt: skip
    sample = built(tmp_path, record)
    (picture,) = sample.drawn
    block = sample_builder(recipe_of(tmp_path)).sizes.block
    assert sample.input_ids[picture.offsets].tolist() == list(block) and len(picture.offsets) == T
    assert picture.task == "edit" and picture.hidden is None and picture.teachers == {}
    assert picture.target.shape == picture.source.shape == (3, 32, 32) and picture.target.dtype == torch.uint8
    assert (picture.target.int() - picture.source.int()).abs().max() <= 8  # the same part of both
    # The first picture has two tiles of 4 rows, the source as many as it has tiles.
    assert picture.vision_rows == (8, len(sample.tiles) * 4) and sample.num_bytes > picture.num_bytes > 2 * 3 * 32 * 32
    assert sample.without_labels().drawn == ()


def test_a_task_of_text_has_no_source_and_an_answer_that_is_not_learned_no_picture(tmp_path):
    write_image(tmp_path / "a.png", size=(64, 32))
    record = record_of(tmp_path, "<image>", images=["a.png"], targets=["a.png"], task="text_to_image")
    (picture,) = built(tmp_path, record).drawn
    assert picture.source is None and picture.vision_rows is None and picture.target.shape == (3, 16, 32)
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": GENERATE, "weight": 0},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": GENERATE},
    ]  # fmt: skip
    config = write_source(tmp_path, "two", [{"messages": turns, "targets": ["gone.png", "a.png"]}])
    (picture,) = built(tmp_path, open_source(config, digest="")[0]).drawn
    assert picture.offsets[0] > T  # the second block


def test_what_no_loss_asks_for_is_not_read(tmp_path):
    record = record_of(tmp_path, targets=["gone.png"], teachers={"task": "gone.npy"})
    (picture,) = built(tmp_path, record, flow=0.0).drawn
    assert picture.target is None and picture.teachers == {}
    recipe = recipe_of(tmp_path)
    recipe.task = "supervised"
    assert sample_builder(recipe).build_sample(record).drawn == ()


def test_pictures_that_do_not_fit_are_skips_with_their_reason(tmp_path):
    ramp(tmp_path / "long.png", 170, 40)
    ramp(tmp_path / "small.png", 8, 40)
    ramp(tmp_path / "a.png", 40, 40)
    ramp(tmp_path / "b.png", 40, 60)
    for fields, reason in (
        ({"targets": ["long.png"]}, "bad_aspect"),
        ({"targets": ["small.png"]}, "too_small"),
        ({"targets": ["a.png"], "images": ["b.png"]}, "misaligned"),
    ):
        record = record_of(tmp_path, "<image>" if "images" in fields else "draw", **fields)
        with pytest.raises(RecordError, match=r"one\.jsonl:1: ") as caught:
            built(tmp_path, record)
        assert caught.value.reason == reason


def test_a_source_is_damaged_once_for_both_who_see_it(tmp_path):
    Image.effect_noise((28, 28), 50).convert("RGB").resize((32, 32)).save(tmp_path / "a.png")
    degrade = {"kind": "hole", "size": 12, "fill": 1.0}
    sample = built(tmp_path, record_of(tmp_path, "<image>repair", targets=["a.png"], task="inpaint", degrade=degrade))
    (picture,) = sample.drawn
    assert (
        int((picture.source != picture.target).any(0).sum()) <= 144 and int((picture.source == 255).all(0).sum()) >= 144
    )
    assert int((sample.tiles == 255).all(1).sum()) > 60  # the encoder sees the hole as well


# ------------------------------------------------------------------------------------------------ latents


def test_latents_take_the_place_of_pictures(tmp_path):
    arrays = [torch.randn(4, 4, 4), torch.randn(4, 4, 4), torch.randn(4, 2, 4)]
    name = latents(tmp_path, arrays).name
    write_image(tmp_path / "s.png")
    both = {"target": f"{name}#0", "source": f"{name}#1"}
    record = record_of(tmp_path, "<image>", images=["s.png"], targets=["gone.png"], latents=both)
    (picture,) = built(tmp_path, record).drawn
    assert torch.equal(picture.target, arrays[0]) and torch.equal(picture.source, arrays[1])
    for wrong in ({"target": f"{name}#0"}, {"target": f"{name}#0", "source": f"{name}#2"}):
        with pytest.raises(RecordError) as caught:
            built(tmp_path, record_of(tmp_path, "<image>", images=["s.png"], targets=["gone.png"], latents=wrong))
        assert caught.value.reason == "bad_latents"
    for number, reason in ((7, "unreadable_rows"),):
        with pytest.raises(RecordError, match="holds 3 arrays") as caught:
            built(tmp_path, record_of(tmp_path, targets=["gone.png"], latents={"target": f"{name}#{number}"}))
        assert caught.value.reason == reason


def test_latents_of_another_vae_or_cut_end_the_run(tmp_path):
    record = record_of(
        tmp_path, targets=["gone.png"], latents={"target": f"{latents(tmp_path, [torch.ones(4, 4, 4)]).name}#0"}
    )
    built(tmp_path, record, image={"vae_fingerprint": "vae one"})
    with pytest.raises(
        RecipeError, match=r"x\.latents\.safetensors: latents of the VAE with fingerprint vae one.* VAE two"
    ):
        built(tmp_path, record, image={"vae_fingerprint": "two"})
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "vae.json").write_text(json.dumps({"fingerprint": "three"}))
    with pytest.raises(RecipeError, match="VAE three"):
        built(tmp_path, record, image={"vae": str(tmp_path / "vae")})
    with pytest.raises(RecipeError, match=r"latents made with size_step = 16, and this recipe has 32"):
        built(tmp_path, record, image={"size_step": 32})
    latents(tmp_path, [torch.ones(3, 4, 4)])
    with pytest.raises(RecipeError, match="latent_channels = 4"):
        built(tmp_path, record)
    latents(tmp_path, [torch.full((4, 4, 4), torch.nan)])
    with pytest.raises(RecordError, match="not finite"):
        built(tmp_path, record)


# ------------------------------------------------------------------------------------------------ without a language model


def cached_record(folder: Path, *, tokens: int = T, hidden_size: int = H, fingerprint: str = "lm one") -> Record:
    name = latents(folder, [torch.ones(4, 4, 4), torch.zeros(4, 4, 4)]).name
    write_rows(
        folder / "x.hidden.safetensors", [torch.randn(tokens, hidden_size).bfloat16(), torch.ones(8, hidden_size).bfloat16()],
        kind="hidden", fingerprint=fingerprint, about=hidden_facts(recipe_of(folder)),
    )  # fmt: skip
    return record_of(
        folder, "<image>edit", images=["gone.png"], targets=["gone.png"],
        latents={"target": f"{name}#0", "source": f"{name}#1"},
        hidden={"rows": "x.hidden.safetensors#0", "vision": "x.hidden.safetensors#1"},
    )  # fmt: skip


def test_cached_states_need_nothing_but_themselves(tmp_path):
    record = cached_record(tmp_path)  # its pictures are gone
    builder = sample_builder(recipe_of(tmp_path, conditions="cached"))
    sample = builder.build_sample(record)
    (picture,) = sample.drawn
    assert sample.input_ids.tolist() == list(builder.sizes.block) and builder.size(record).tokens == sample.length == T
    assert picture.hidden.shape == (T, H) and picture.vision.shape == (8, H) and picture.vision_rows is None
    assert picture.offsets.tolist() == list(range(T)) and sample.tiles is None and (sample.labels == -100).all()
    with pytest.raises(RecordError) as caught:
        builder.build_sample(record_of(tmp_path, targets=["gone.png"], latents={"target": "x.latents.safetensors#0"}))
    assert caught.value.reason == "no_hidden" and "prepare --hidden" in str(caught.value)
    for text in (row("what?", "a cat"),):
        for function in (builder.size, builder.build_sample):
            with pytest.raises(RecordError) as caught:
                function(parse_record(text))
            assert caught.value.reason == "no_target"


def test_cached_states_of_another_model_end_the_run(tmp_path):
    config = {"conditions": "cached", "image": {"hidden_fingerprint": "lm two"}}
    with pytest.raises(
        RecipeError, match=r"x\.hidden\.safetensors: hidden states of .* lm one, and this run has .* lm two"
    ):
        built(tmp_path, cached_record(tmp_path), **config)
    built(tmp_path, cached_record(tmp_path, fingerprint="lm two"), **config)
    for tokens, size in ((T - 1, H), (T, H + 1)):
        with pytest.raises(RecipeError, match=rf"\[{tokens}, {size}\], and this model has \[{T}, {H}\]"):
            built(tmp_path, cached_record(tmp_path, tokens=tokens, hidden_size=size), conditions="cached")
    recipe = recipe_of(tmp_path, conditions="cached")
    recipe.data.system_prompt = "be brief"
    with pytest.raises(RecipeError, match=r"made with system_turn = '', and this recipe has 'be brief'"):
        sample_builder(recipe).build_sample(cached_record(tmp_path))
    builder = sample_builder(recipe_of(tmp_path, conditions="cached"))
    builder.build_sample(cached_record(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(RecipeError, match="one checkpoint for all data"):  # the run knows the first one's by now
        builder.build_sample(cached_record(other, fingerprint="lm three"))


def test_teachers_are_read_where_they_are_asked_for(tmp_path):
    np.save(tmp_path / "t.npy", np.ones((3, 6), np.float16))
    np.save(tmp_path / "flat.npy", np.ones(6))
    write_rows(tmp_path / "c.safetensors", [torch.ones(5, 8)], kind="teachers", fingerprint="pair")
    write_image(tmp_path / "a.png", size=(32, 32))
    teachers = {"task": "t.npy", "caption": "c.safetensors#0", "visual": "gone.npy"}
    record = record_of(tmp_path, targets=["a.png"], teachers=teachers)
    (picture,) = built(tmp_path, record, align_task=1.0, align_caption=1.0).drawn
    assert {name: tuple(rows.shape) for name, rows in picture.teachers.items()} == {"task": (3, 6), "caption": (5, 8)}
    assert all(rows.dtype == torch.float32 for rows in picture.teachers.values())
    record = record_of(tmp_path, targets=["a.png"], teachers={**teachers, "task": "flat.npy", "visual": None})
    sample = built(tmp_path, record, conditions="teachers")
    assert sample.length == T and sample.drawn[0].teachers["task"].shape == (1, 6)
    assert sample.drawn[0].target.shape == (3, 32, 32)


@pytest.mark.parametrize(
    "content, reason",
    [
        (np.ones((2, 6)), "bad_teacher"), (np.ones((3, 5)), "bad_teacher"), (np.full((3, 6), np.nan), "not_finite"),
        (np.ones((3, 6), np.int64), "unreadable_rows"), (b"no array", "unreadable_rows"), (None, "unreadable_rows"),
        (np.array([{}], dtype=object), "unreadable_rows"), (np.ones((0, 6)), "unreadable_rows"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_be_used_cost_their_record(tmp_path, content, reason):
    path = tmp_path / "t.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    write_image(tmp_path / "a.png", size=(32, 32))
    record = record_of(tmp_path, targets=["a.png"], teachers={"task": "t.npy"})
    with pytest.raises(RecordError) as caught:
        built(tmp_path, record, align_task=1.0)
    assert caught.value.reason == reason and caught.value.field == "teachers.task"


def test_a_record_that_teaches_nothing_is_left_out(tmp_path):
    record = record_of(tmp_path, targets=["gone.png"])
    for config in ({"flow": 0.0, "lm": 0.0, "align_task": 1.0}, {"conditions": "teachers"}):
        write_image(tmp_path / "gone.png", size=(32, 32))
        with pytest.raises(RecordError) as caught:
            built(tmp_path, record, **config)
        assert caught.value.reason == "no_teacher"


def test_a_loader_gives_batches_of_pictures(tmp_path):
    np.save(tmp_path / "t.npy", np.ones((3, 6)))
    np.save(tmp_path / "c.npy", np.ones((2, 8)))
    for i in range(3):
        ramp(tmp_path / f"{i}.png", 32 + 16 * i, 32)
    fields = {"teachers": {"task": "t.npy", "caption": "c.npy"}}
    rows = [row("draw", GENERATE, targets=[f"{i}.png"], **fields) for i in range(3)] + [row("what?", "a cat")]
    recipe = recipe_of(tmp_path, conditions="teachers")
    recipe.data.sources = [write_source(tmp_path, "all", rows)]
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    batches = loader.next_step()
    assert sum(batch.num_images for batch in batches) == 8 and loader.report()["no_target"] >= 2
    drawn = batches[0].drawn
    assert drawn.places.shape == (2, T) and drawn.teachers["caption"].shape == (2, 2, 8)
    shapes = {tuple(target.shape) for batch in batches for target in batch.drawn.targets}
    assert shapes == {(3, 32, 32), (3, 16, 32)}


def test_bad_rows_are_counted_skips_and_the_run_goes_on(tmp_path):
    write_image(tmp_path / "a.png", size=(32, 32))
    write_image(tmp_path / "long.png", size=(200, 20))
    write_image(tmp_path / "dot.png", size=(1, 1))
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "gif.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    bad = {
        "missing_media": {"targets": ["gone.png"]}, "unreadable_media": {"targets": ["gif.png"]},
        "bad_aspect": {"targets": ["long.png"]}, "too_small": {"targets": ["dot.png"]},
        "marker_count": {"targets": ["a.png", "a.png"]}, "no_source": {"targets": ["a.png"], "task": "edit"},
        "path_escape": {"targets": ["../a.png"]}, "bad_drawing": {"targets": ["a.png"], "degrade": "rust"},
        "unreadable_rows": {"targets": ["a.png"], "latents": {"target": "bad.png.safetensors#0"}},
        "unsupported_key": {"targets": ["a.png"], "golden_task_embedding": "x.pt"},
    }  # fmt: skip
    rows = [row("draw", GENERATE, **fields) for fields in bad.values()]
    rows += [row("draw", GENERATE, targets=["a.png"]), row("what?", "a cat")]
    recipe = recipe_of(tmp_path)
    recipe.data.sources, recipe.data.max_bad_fraction = [write_source(tmp_path, "all", rows)], 1.0
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    batches = [batch for _ in range(3) for batch in loader.next_step()]
    assert set(loader.report()) == set(bad)
    counts = {(batch.num_images, batch.num_samples) for batch in batches}
    assert all(images <= samples for images, samples in counts) and sum(batch.num_images for batch in batches) > 6


def test_a_preflight_shows_what_is_to_be_drawn(tmp_path):
    np.save(tmp_path / "t.npy", np.ones((3, 6)))
    np.save(tmp_path / "c.npy", np.ones((2, 8)))
    write_image(tmp_path / "a.png", size=(64, 32))
    fields = {
        "targets": ["a.png"],
        "teachers": {"task": "t.npy", "caption": "c.npy"},
        "task": "deblur",
        "degrade": "blur",
    }
    recipe = recipe_of(tmp_path, conditions="teachers")
    recipe.train_iters = 2
    recipe.data.sources = [write_source(tmp_path, "all", [row("<image>", GENERATE, **fields) for _ in range(4)])]
    found = inspect(recipe, num_samples=2, num_steps=2, encoder_rows=lambda sample: (0, 0))
    assert not found.problems  # a sample without labels learns pictures
    shown = page(found, title="x")
    for said in ("source (deblur), 32 x 16", "to draw (deblur), 32 x 16"):
        assert said in shown
