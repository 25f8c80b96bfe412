"""Drawing from hidden states: a picture is what it is asked for, in any company; guidance, sizes, sources, files."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_omni.config.buckets import buckets
from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.generation import drawn_answers
from megatron_omni.generation.drawn_answers import NO_PICTURE, DrawnFacts, Progress, first_error
from megatron_omni.generation.drawn_files import _line
from megatron_omni.generation.image import Picture, draw
from megatron_omni.generation.picture import (
    PictureSettings,
    PictureWanted,
    drawn_size,
    numbered,
    parse_guidance,
    parse_size,
)
from megatron_omni.generation.png import facts_of, png_bytes, write_png
from megatron_omni.models.generators.image import ImageGenerator
from megatron_omni.models.generators.vae import PictureCodec, load_picture_codec
from megatron_omni.platform.seeds import named_generator
from tests.drawing import BLOCK, IMAGE, make_codec

WIDTH = 20
SETTINGS = PictureSettings(steps=3, shift=1.5, text_guidance=2.0, image_guidance=1.0, guided_channels=0, seed=7)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> PictureCodec:
    folder = tmp_path_factory.mktemp("codec")
    make_codec(folder)
    return load_picture_codec(folder)


def config_of(**changes: Any) -> ImageGeneratorConfig:
    config = recipe_from_dict({"model": {"image": IMAGE}}).model.image
    assert config is not None
    return replace(config, **changes)


def generator_of(config: ImageGeneratorConfig) -> ImageGenerator:
    image = ImageGenerator(config, WIDTH, visual=True).eval()
    with torch.no_grad():
        for name, parameter in image.named_parameters():  # gates let something through
            parameter.copy_(torch.randn(parameter.shape, generator=named_generator(0, name)) * 0.3)
    return image


@pytest.fixture(scope="module")
def image() -> ImageGenerator:
    return generator_of(config_of())


def random(*names: Any, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=named_generator(3, *names))


def picture(number: int, **changes: Any) -> Picture:
    fields: dict[str, Any] = {
        "name": f"r{number}", "size": (16, 16), "settings": SETTINGS, "hidden": random("h", number, shape=(BLOCK, WIDTH)),
    }  # fmt: skip
    return Picture(**(fields | changes))


def with_source(number: int, size: tuple[int, int] = (16, 16), rows: int = 4) -> Picture:
    pixels = (random("s", number, shape=(3, size[1], size[0])) * 60 + 128).clamp(0, 255).to(torch.uint8)
    return picture(number, size=size, source=pixels, vision=random("v", number, shape=(rows, WIDTH)))


def drawn(image: ImageGenerator, codec: PictureCodec, pictures: list[Picture], **settings: Any) -> list[Tensor]:
    found = dict(draw(image, codec, pictures, **settings))
    return [found[i] for i in range(len(pictures))]


def test_a_picture_is_the_same_bits_in_any_company(image: ImageGenerator, codec: PictureCodec) -> None:
    """Two sizes, sources with four rows and with eight, other settings, in batches of any size (image.md 8.10)."""
    pictures = [
        picture(0), with_source(1), picture(2, size=(24, 8)), with_source(3, rows=8), picture(4),
        picture(5, settings=replace(SETTINGS, steps=2)), with_source(6, size=(24, 8)), picture(7), picture(8),
    ]  # fmt: skip
    alone = [drawn(image, codec, [one])[0] for one in pictures]
    assert [tuple(one.shape) for one in alone] == [(3, p.size[1], p.size[0]) for p in pictures]
    assert all(one.dtype == torch.uint8 and float(one.float().std()) > 3 for one in alone)
    for batch_size in (1, 2, 8):
        for one, found in zip(alone, drawn(image, codec, pictures, batch_size=batch_size), strict=True):
            assert torch.equal(one, found)
    backwards = drawn(image, codec, pictures[::-1])[::-1]
    assert all(torch.equal(one, found) for one, found in zip(alone, backwards, strict=True))


def test_a_picture_depends_on_what_it_is_asked_for(image: ImageGenerator, codec: PictureCodec) -> None:
    first = with_source(0)
    assert first.source is not None and first.vision is not None
    changed = [
        first,
        replace(first, number=1),
        replace(first, name="another"),
        replace(first, settings=replace(SETTINGS, seed=8)),
        replace(first, settings=replace(SETTINGS, steps=4)),
        replace(first, settings=replace(SETTINGS, text_guidance=3.0)),
        replace(first, settings=replace(SETTINGS, image_guidance=2.0)),
        replace(first, settings=replace(SETTINGS, shift=1.0)),
        replace(first, source=255 - first.source),
        replace(first, vision=first.vision + 1),
        replace(first, hidden=random("other", shape=(BLOCK, WIDTH))),
    ]
    found = drawn(image, codec, changed)
    assert len({one.numpy().tobytes() for one in found}) == len(changed)
    assert torch.equal(found[0], drawn(image, codec, [with_source(0)])[0])


def test_guidance_is_that_of_its_definition(image: ImageGenerator, codec: PictureCodec) -> None:
    """v = v_u + s_i (v_i - v_u) + s_t (v_c - v_i), by the generator's forward of each branch, in Euler steps by hand."""
    settings = replace(SETTINGS, text_guidance=3.0, image_guidance=1.5, shift=1.0, steps=2)
    one = replace(with_source(2), settings=settings)
    assert one.source is not None and one.hidden is not None and one.vision is not None
    conditions = image.conditions(one.hidden[None], [one.vision])
    x0 = torch.randn(3, 4, 4, generator=named_generator(7, "draw", "r2", 0))
    source = codec.encode(one.source[None])
    x = x0[None]
    with torch.no_grad():
        for step in range(2):
            t = torch.tensor([step / 2])
            v = {
                branch: image.dit(x, t, source=x0[None] if branch == "u" else source, **conditions.inputs([0], branch))
                for branch in ("c", "i", "u")
            }
            x = x + 0.5 * (v["u"] + 1.5 * (v["i"] - v["u"]) + 3.0 * (v["c"] - v["i"]))
    difference = (drawn(image, codec, [one])[0].int() - codec.decode(x)[0].int()).abs()
    assert int(difference.max()) <= 1, "roundings apart"


def test_the_branch_of_nothing_is_not_computed_at_image_guidance_one(
    image: ImageGenerator, codec: PictureCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    velocity = image.dit.velocity
    monkeypatch.setattr(image.dit, "velocity", lambda x, t, **kw: (rows.append(len(x)), velocity(x, t, **kw))[1])
    for text, source, branches in ((2.0, 1.0, 2), (2.0, 1.5, 3), (1.0, 1.0, 1), (0.0, 1.0, 1)):
        rows.clear()
        settings = replace(SETTINGS, text_guidance=text, image_guidance=source)
        drawn(image, codec, [replace(with_source(i), settings=settings) for i in range(2)])
        assert rows == [2 * branches] * SETTINGS.steps


def test_steps_are_told_and_can_end_it(image: ImageGenerator, codec: PictureCodec) -> None:
    told: list[int] = []
    drawn(image, codec, [picture(i) for i in range(3)], batch_size=2, on_step=told.append)
    assert told == [1, 2, 3] * 2

    def enough(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(image, codec, [picture(0)], on_step=enough)


def test_without_a_source_it_may_be_white(codec: PictureCodec) -> None:
    blank, white = generator_of(config_of()), generator_of(config_of(blank_source="white"))
    one = picture(0)
    shown = replace(one, source=torch.full((3, 16, 16), 255, dtype=torch.uint8))
    assert torch.equal(drawn(white, codec, [one])[0], drawn(white, codec, [shown])[0])
    assert not torch.equal(drawn(white, codec, [one])[0], drawn(blank, codec, [one])[0])


def test_released_branches_have_the_projectors_own_rows_and_scaled_scores(codec: PictureCodec) -> None:
    """The same weights draw otherwise: task rows 1 and 2 stand for the branches without words, scores depend on the size."""
    ours, theirs = generator_of(config_of()), generator_of(config_of(release=True))
    assert theirs.null_task is None
    pictures = [picture(0), picture(1, size=(24, 8))]
    for mine, released in zip(drawn(ours, codec, pictures), drawn(theirs, codec, pictures), strict=True):
        assert not torch.equal(mine, released)
    channels = replace(SETTINGS, guided_channels=2)
    guided = drawn(ours, codec, [picture(0), replace(picture(0), settings=channels)])
    assert not torch.equal(*guided)


def test_noise_in_the_choice_of_vision_rows_is_the_pictures_own(codec: PictureCodec) -> None:
    config = config_of()
    noisy = generator_of(replace(config, dit=replace(config.dit, noisy_selection=True)))
    pictures = [with_source(i, rows=8) for i in range(3)]
    together = drawn(noisy, codec, pictures)
    assert all(torch.equal(drawn(noisy, codec, [one])[0], found) for one, found in zip(pictures, together, strict=True))
    assert not torch.equal(drawn(generator_of(config), codec, pictures[:1])[0], together[0])


def test_teachers_stand_in_for_projectors(codec: PictureCodec) -> None:
    image = ImageGenerator(config_of(), WIDTH, visual=True, projectors=False).eval()
    with torch.no_grad():
        for name, parameter in image.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=named_generator(0, name)) * 0.3)
    taught = {"task": random("t", shape=(1, 6)), "caption": random("c", shape=(5, 10))}
    one = replace(picture(0), hidden=None, teachers=taught)
    other = replace(one, teachers=taught | {"visual": random("n", shape=(4, 8))})
    assert not torch.equal(*drawn(image, codec, [one, other]))
    with pytest.raises(ValueError, match="no projectors"):
        drawn(image, codec, [picture(0)])


def test_what_cannot_be_drawn_is_refused(image: ImageGenerator, codec: PictureCodec) -> None:
    bad = {
        r"size is 12x16.*size_step = 8": picture(0, size=(12, 16)),
        r"size is 0x16": picture(0, size=(0, 16)),
        r"must be \[3, 16, 16\]": picture(0, source=torch.zeros(3, 8, 8, dtype=torch.uint8)),
        r"6 hidden states; a block of this model has 7": picture(0, hidden=torch.zeros(6, WIDTH)),
        r"give one of the two": picture(0, hidden=None),
        r"steps=0": picture(0, settings=replace(SETTINGS, steps=0)),
        r"r0.*NaN": picture(0, hidden=torch.full((BLOCK, WIDTH), torch.nan)),
    }
    for message, one in bad.items():
        with pytest.raises(ValueError, match=message):
            drawn(image, codec, [one])


# ----------------------------------------------------------------------------------------------- what is asked, and files


def test_settings_that_cannot_be_are_refused() -> None:
    bad: dict[str, dict[str, Any]] = {
        "steps is 0": {"steps": 0},
        "steps is 10000": {"steps": 10_000},
        "text_guidance is -1": {"text_guidance": -1.0},
        "image_guidance is nan": {"image_guidance": float("nan")},
        "text_guidance is 1000": {"text_guidance": 1000.0},
        "shift is 0": {"shift": 0.0},
        "size is 0x16": {"size": (0, 16)},
        "most is 0": {"most": 0},
    }
    for message, settings in bad.items():
        with pytest.raises(ValueError, match=message):
            PictureWanted(**settings)
    sampling = config_of().sampling
    assert PictureWanted().settings(sampling) == PictureSettings(
        steps=4, shift=1.0, text_guidance=2.0, image_guidance=1.0, guided_channels=0, seed=0
    )
    wanted = PictureWanted(steps=9, text_guidance=0.0, image_guidance=3.0, shift=2.0, seed=5)
    assert wanted.settings(sampling) == PictureSettings(
        steps=9, shift=2.0, text_guidance=0.0, image_guidance=3.0, guided_channels=0, seed=5
    )


def test_words_of_the_command_line() -> None:
    assert parse_size("768x512") == (768, 512) == parse_size(" 768X512 ")
    assert parse_guidance("4") == (4.0, None) and parse_guidance("4,1.5") == (4.0, 1.5)
    for text in ("", "768", "0x5", "-1x5", "1.5x2", "1x2x3"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            parse_size(text)
    for text in ("", "a", "1,2,3", "1,", "inf"):
        with pytest.raises(ValueError, match="one number, or two"):
            parse_guidance(text)


def test_a_size_that_no_bucket_has_is_the_nearest_and_said() -> None:
    config = ImageGeneratorConfig()
    sizes = buckets(768, 16, 4.0)
    assert drawn_size(config, None, None) == ((768, 768), "")
    assert drawn_size(config, (768, 768), (10, 20)) == ((768, 768), "")
    for wanted in ((512, 512), (1000, 300), (20_000, 1), (1, 1), (501, 499)):
        size, note = drawn_size(config, wanted, None)
        assert size in sizes and f"{wanted[0]}x{wanted[1]}" in note and f"drawn at {size[0]}x{size[1]}" in note
    size, note = drawn_size(config, None, (1600, 900))
    assert size in sizes and abs(size[0] / size[1] - 16 / 9) < 0.05 and note == ""


def test_files_of_several_pictures_are_numbered() -> None:
    assert numbered("a/b.png", [1]) == [["a/b.png"]] and numbered("b.png", [0]) == [[]]
    assert numbered("a/b.png", [2, 0, 1]) == [["a/b_0.png", "a/b_1.png"], [], ["a/b_2.png"]]
    assert numbered("b.png", [0, 1]) == [[], ["b.png"]]


def test_a_file_says_how_it_was_drawn(tmp_path: Path) -> None:
    pixels = (random("p", shape=(3, 8, 16)) * 50 + 100).clamp(0, 255).to(torch.uint8)
    facts = {"seed": 3, "steps": 4, "text_guidance": 2.0}
    write_png(tmp_path / "a.png", pixels, facts, prompt="draw “red”\0 日本")
    assert facts_of(tmp_path / "a.png") == ("draw “red” 日本", facts)
    with Image.open(tmp_path / "a.png") as shown:
        assert (shown.format, shown.mode, shown.size) == ("PNG", "RGB", (16, 8))
        assert shown.tobytes() == pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(io.BytesIO(png_bytes(pixels, {}))) as shown:
        assert "prompt" not in shown.info
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="says nothing of how it was drawn"):
        facts_of(tmp_path / "b.png")


def test_what_a_line_says_of_pictures_that_are_missing_or_of_another_size() -> None:
    one = DrawnFacts(sample=0, number=0, facts={}, note="drawn at 16x16")
    two = replace(one, sample=1, note="", error="NaN")
    assert _line([["a.png"], ["b.png"]], [one, two], first_error({3: [one, two]}, 3)) == {
        "images": ["a.png"], "drawing": {"error": "NaN", "note": "drawn at 16x16"},
    }  # fmt: skip
    assert _line([["a.png"]], [replace(one, note="")], None) == {"images": ["a.png"]}
    assert _line([[]], [], first_error({3: []}, 3)) == {"images": [], "drawing": {"error": NO_PICTURE}}
    assert first_error({}, 3) == NO_PICTURE and first_error({3: [one]}, 3) is None


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [0.0]
    monkeypatch.setattr(drawn_answers.time, "monotonic", lambda: now[0])
    for stream, seconds, wanted in (
        (Terminal(), 1.0, "[#####...............] drawing 1/4 pictures, step 0/10   \r"),
        (io.StringIO(), 11.0, "drawing 1/4 pictures, step 5/10\n"),
    ):
        shown = Progress(4, 10, stream=stream)
        shown.done()
        now[0] += seconds
        shown.step(0 if isinstance(stream, Terminal) else 5)
        shown.step(6)  # too soon for another word
        assert stream.getvalue() == wanted
        shown.finish()
        assert stream.getvalue().endswith("\n")
