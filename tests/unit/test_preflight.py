"""The preflight page: it shows what training computes with, counts what is wrong, and lets no record write HTML."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.cli.preflight import encoder_rows, main
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.run import Recipe
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.plan import Cursor
from megatron_omni.data.preflight import Preflight, inspect
from megatron_omni.data.preflight_page import page, positions, text_of
from tests.unit.tiny_data import row, tiny_recipe, write_image, write_sound, write_source

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> \u202eevil'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("corpus")
    write_image(folder / "a.png", size=(28, 56))
    write_sound(folder / "a.wav", 1.5)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    sources = [
        write_source(folder, "text", [row(f"what do you hear {i}?", "a cat") for i in range(12)], weight=2.0),
        write_source(folder, "image", [row("<image> what?", EVIL, images=["a.png"]) for _ in range(6)]),
        write_source(folder, "audio", [row("<audio> what?", audios=["a.wav"]) for _ in range(6)]),
        write_source(
            folder, "damaged",
            [row("<image> a", images=["a.png"]), row("<image> b", images=["cut.png"]), row("<image> c", images=[])],
        ),
    ]  # fmt: skip
    recipe = tiny_recipe(folder, sources, packing=True, micro_batch_size=1, global_batch_size=4)
    recipe.train_iters = 50
    recipe.model.hidden_size = 64
    return recipe


@pytest.fixture(scope="module")
def seen(recipe: Recipe) -> Preflight:
    return inspect(recipe, num_samples=3, num_steps=6, encoder_rows=encoder_rows(recipe))


class Tags(HTMLParser):
    """Tags, image sources and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


def test_placeholders_agree_with_what_the_encoders_give(seen: Preflight) -> None:
    text, image, audio, _ = seen.sources
    assert all(example.agrees for report in seen.sources for example in report.examples)
    assert {example.visual_rows for example in image.examples} == {2 * 4}  # 28 x 56: two tiles of four tokens
    assert {example.audio_rows for example in audio.examples} == {2 * 20}  # 1.5 s: two chunks
    assert {example.visual_placeholders + example.audio_placeholders for example in text.examples} == {0}


def test_a_disagreement_is_a_problem(recipe: Recipe) -> None:
    """Of either encoder, and named by the source that has it."""
    right = encoder_rows(recipe)
    off = inspect(
        recipe, num_samples=1, num_steps=1, encoder_rows=lambda s: (right(s)[0] + 1 if right(s)[0] else 0, right(s)[1])
    )
    said = "1 samples whose placeholders and encoder rows disagree"
    assert [p for p in off.problems if "disagree" in p] == [f"image: {said}", f"damaged: {said}"]
    assert "DISAGREE" in page(off, title="x")
    deaf = inspect(recipe, num_samples=1, num_steps=1, encoder_rows=lambda s: (right(s)[0], 0))
    assert [p for p in deaf.problems if "disagree" in p] == [f"audio: {said}"]
    assert "DISAGREE" in page(deaf, title="x")


def test_packing_and_lengths_are_those_of_the_loader(recipe: Recipe) -> None:
    lenient = replace(recipe, data=replace(recipe.data, max_bad_fraction=1.0), train_iters=6)
    seen = inspect(lenient, num_samples=1, num_steps=1, encoder_rows=encoder_rows(recipe))
    loader = StepLoader(lenient, data_rank=0, data_size=1)
    real = computed = samples = 0
    for _ in range(6):
        for batch in loader.next_step():
            real += int((batch.segment_ids >= 0).sum())
            computed += recipe.data.seq_length * batch.input_ids.shape[0]
            samples += batch.num_samples
    loader.close()
    assert seen.packing.is_whole and seen.packing.planned_steps == 6
    assert seen.packing.efficiency == pytest.approx(real / computed, rel=0.02)  # headers may differ from decoding
    assert seen.packing.samples == pytest.approx(samples, rel=0.05)
    assert sum(len(report.lengths) for report in seen.sources) == seen.packing.samples


def test_a_curriculum_is_planned_to_its_end_and_a_long_one_estimated_phase_by_phase(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text alone in the first steps, then pictures and sound: what the first steps show holds for them alone."""
    text, image, audio, _ = recipe.data.sources
    sources = [
        replace(text, weight=1.0, reweight={300: 0.2}),
        replace(image, weight=1.0, from_sample=300, reweight={600: 0.5}),
        replace(audio, weight=1.0, from_sample=600),
    ]
    long = replace(recipe, data=replace(recipe.data, sources=sources), train_iters=120)
    rows = encoder_rows(recipe)
    whole = inspect(long, num_samples=1, num_steps=10, encoder_rows=rows)
    monkeypatch.setattr("megatron_omni.data.preflight.WHOLE_RUN", 0)
    guess = inspect(long, num_samples=1, num_steps=10, encoder_rows=rows)
    assert whole.packing.is_whole and not guess.packing.is_whole
    assert whole.packing.planned_steps == 120 and guess.packing.planned_steps == 30
    assert guess.packing.run_steps == 120
    first = StepLoader(long, data_rank=0, data_size=1)
    naive = 120 * first.plan(Cursor(0)).num_samples
    first.close()
    assert naive > 1.3 * whole.total_samples  # what the first step alone would say
    assert guess.total_samples == pytest.approx(whole.total_samples, rel=0.05)
    assert guess.packing.efficiency == pytest.approx(whole.packing.efficiency, abs=0.05)
    for exact, estimate in zip(whole.sources, guess.sources, strict=True):
        assert estimate.share == pytest.approx(exact.share, abs=0.02)
        assert estimate.lengths and min(exact.lengths) <= min(estimate.lengths) <= max(exact.lengths)
        assert exact.share == pytest.approx(len(exact.lengths) / whole.total_samples, abs=0.03)


def test_epochs_follow_the_mixture(seen: Preflight) -> None:
    shares = [report.share for report in seen.sources]
    assert shares == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.03)
    for report in seen.sources:
        assert report.epochs == pytest.approx(report.share * seen.total_samples / report.rows, rel=0.02)


def test_epochs_that_end_before_the_run_are_a_problem(seen: Preflight) -> None:
    assert seen.last_sample is None and not any("epochs" in problem for problem in seen.problems)
    half = replace(seen.packing, run_steps=seen.recipe.train_iters // 2)
    ended = replace(seen, last_sample=round(seen.total_samples / 2), packing=half)
    said = f"after {ended.last_sample:,} samples: the run ends there, at about step {seen.recipe.train_iters // 2} of"
    assert any(said in problem for problem in ended.problems)


def test_bad_records_come_with_reasons(seen: Preflight) -> None:
    damaged = seen.sources[3]
    assert (damaged.tried, len(damaged.examples)) == (3, 1)
    assert {bad.reason for bad in damaged.bad} == {"unreadable_media", "marker_count"}
    assert all("damaged.jsonl" in bad.message for bad in damaged.bad)
    assert any(problem.startswith("damaged: 2 of 3") for problem in seen.problems)
    assert sum(seen.planned_skips.values()) > 0


def test_the_loss_mask_is_the_samples_own(seen: Preflight) -> None:
    for report in seen.sources:
        for example in report.examples:
            learned = sum(piece.count for piece in example.pieces if piece.learned)
            assert learned == int((example.sample.labels != IGNORE_LABEL).sum()) == example.learned_tokens > 0
            assert sum(piece.count for piece in example.pieces) == example.sample.length


def test_records_cannot_write_html(seen: Preflight) -> None:
    text = page(seen, title=EVIL)
    parsed = Tags(text)
    assert "script" not in parsed.tags and "onerror" not in {name for name, _ in parsed.attributes}
    assert "\u202e" not in text and "\\u202e" in parsed.words
    sources = [value or "" for name, value in parsed.attributes if name in ("src", "href")]
    assert sources and all(value.startswith(("data:image/png;base64,", "#source")) for value in sources)
    assert "default-src 'none'" in text
    assert text_of("a<b>&'\"\x00") == "a&lt;b&gt;&amp;&#x27;&quot;\\u0000"


def test_positions_are_drawn_unless_they_are_plain() -> None:
    plain = torch.arange(5).expand(3, 5)
    assert "<svg" not in positions(plain) and "0 to 4" in positions(plain)
    assert positions(torch.stack([plain[0], plain[0] // 2, plain[0] // 2])).count("<polyline") == 3


def test_command(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.model.audio is not None
    # Sizes that the command's validation accepts: 20 tokens stand for 3 seconds.
    audio = replace(recipe.model.audio, chunk_seconds=3.0)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(replace(recipe, model=replace(recipe.model, audio=audio))))
    out = tmp_path / "page.html"
    arguments = [str(tmp_path / "recipe.yaml"), "--samples", "1", "--steps", "2", "--out", str(out)]
    assert main([*arguments, "data.max_bad_fraction=1"]) == 0
    assert out.read_text().count("<h2 id=source") == 4
    assert "tokens that are no padding" in capsys.readouterr().out
    assert main([*arguments, "--samples", "3"]) == 1
    assert main([*arguments, "data.tokenizer=nowhere"]) == 2
    assert "data.tokenizer" in capsys.readouterr().err
