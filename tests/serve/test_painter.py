"""What is drawn together, what is begun at all, and how a chat answer waits for its pictures; without processes."""

from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from megatron_omni.generation.blocks import as_bytes
from megatron_omni.generation.image import Picture, draw
from megatron_omni.generation.picture import PictureWanted
from megatron_omni.generation.png import facts_of
from megatron_omni.generation.request import BlockEvent, FinishedEvent, TokenEvent, Usage
from megatron_omni.models.generators.vae import PictureCodec, load_picture_codec
from megatron_omni.platform.seeds import named_generator
from megatron_omni.serve import maker, painter_process
from megatron_omni.serve.drawn_answers import DrawnAnswer
from megatron_omni.serve.errors import ApiError
from megatron_omni.serve.jobs import Built
from megatron_omni.serve.link import ModelFacts
from megatron_omni.serve.maker import MakerFailed
from megatron_omni.serve.painter import Painter
from megatron_omni.serve.picture_link import (
    Forget,
    Paint,
    Painted,
    PictureOptions,
    PictureSource,
    ToPainter,
)
from tests.distributed.harness import Rank, run_ranks
from tests.drawing import BLOCK, make_codec
from tests.trained import Trained
from tests.unit.test_draw import WIDTH, config_of, generator_of

SOURCE = PictureSource(size=(16, 16), pixels=None, note="", prompt="draw red")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> PictureCodec:
    make_codec(tmp_path_factory.mktemp("codec"))
    return load_picture_codec(tmp_path_factory.getbasetemp() / "codec0")


def hidden_of(name: str, sample: int = 0) -> torch.Tensor:
    return torch.randn(BLOCK, WIDTH, generator=named_generator(0, name, sample))


def paint(name: str, *, sample: int = 0, source: PictureSource = SOURCE, **options: Any) -> Paint:
    return Paint(
        name=name, sample=sample, number=0, hidden=as_bytes(hidden_of(name, sample)), vision=b"", source=source,
        options=PictureOptions(**options),
    )  # fmt: skip


class Messages:
    """What comes between steps, by the number of the step (over all batches)."""

    def __init__(self) -> None:
        self.at: dict[int, list[ToPainter]] = {}
        self.steps = 0

    def __call__(self) -> list[ToPainter]:
        self.steps += 1
        return self.at.get(self.steps, [])


def painter_of(codec: PictureCodec, messages: Messages, **settings: Any) -> Painter:
    settings = {"model": "m", "batch_size": 4, "receive": messages} | settings
    return Painter(generator_of(config_of()), codec, **settings)


def names(painted: list[Painted]) -> list[tuple[str, int]]:
    return [(one.name, one.sample) for one in painted]


def test_what_is_alike_is_drawn_together_and_the_oldest_first(codec: PictureCodec) -> None:
    messages = Messages()
    painter = painter_of(codec, messages)
    wide = replace(SOURCE, size=(32, 8))
    for one in (
        paint("a", seed=1),
        paint("wide", source=wide),
        paint("b", sample=1, seed=2),
        paint("slow", steps=9),
        paint("c"),
    ):
        painter.take(one)
    first = list(painter.pictures())
    assert names(first) == [("a", 0), ("b", 1), ("c", 0)] and messages.steps == 4
    assert names(list(painter.pictures())) == [("wide", 0)] and names(list(painter.pictures())) == [("slow", 0)]
    assert messages.steps == 4 + 4 + 9 and not painter.busy and list(painter.pictures()) == []
    alone = painter_of(codec, Messages())
    alone.take(paint("b", sample=1, seed=2))
    assert [one.data for one in alone.pictures()] == [first[1].data], "beside others the same file"


def test_a_picture_is_that_of_the_library(codec: PictureCodec, tmp_path: Path) -> None:
    painter = painter_of(codec, Messages())
    painter.take(paint("a", sample=2, seed=5, steps=3, text_guidance=3.0, image_guidance=2.0))
    (painted,) = painter.pictures()
    wanted = PictureWanted(steps=3, text_guidance=3.0, image_guidance=2.0, seed=5)
    picture = Picture(
        name="0", number=8, size=(16, 16), settings=wanted.settings(config_of().sampling), hidden=hidden_of("a", 2)
    )
    ((_, pixels),) = draw(generator_of(config_of()), codec, [picture])
    (tmp_path / "a.png").write_bytes(painted.data)
    with Image.open(tmp_path / "a.png") as shown:
        assert (numpy.asarray(shown) == pixels.permute(1, 2, 0).numpy()).all()
    prompt, facts = facts_of(tmp_path / "a.png")
    assert prompt == "draw red" and (facts["model"], facts["number"], facts["steps"]) == ("m", 8, 3)


def test_pictures_that_nobody_waits_for_are_not_begun_or_end_at_once(codec: PictureCodec) -> None:
    messages = Messages()
    painter = painter_of(codec, messages)
    for name in ("a", "b", "c"):
        painter.take(paint(name, steps=9))
    painter.take(Forget("b"))
    messages.at = {2: [Forget("a")], 4: [Forget("c"), paint("d")]}
    assert list(painter.pictures()) == [] and messages.steps == 4, "ended when the last was forgotten"
    assert names(list(painter.pictures())) == [("d", 0)]
    messages.at = {messages.steps + 1: [Forget("e")]}
    painter.take(paint("e"))
    painter.take(paint("f"))
    assert ("f", 0) in names(list(painter.pictures())), "what another waits for goes on"


def test_what_cannot_be_drawn_is_said_of_that_picture(codec: PictureCodec) -> None:
    painter = painter_of(codec, Messages())
    painter.take(paint("bad", steps=0))
    painter.take(paint("good"))
    bad, good = painter.pictures()
    assert bad.refused and "steps is 0" in (bad.error or "") and good.error is None and good.data[:4] == b"\x89PNG"
    painter.take(replace(paint("nan"), hidden=as_bytes(torch.full((BLOCK, WIDTH), torch.nan))))
    (broken,) = painter.pictures()
    assert not broken.refused and "NaN" in (broken.error or "")


def test_the_process_says_why_it_cannot_draw(draws: Trained, trained: Trained, tmp_path: Path) -> None:
    """What the server then tells its clients, and ends with."""
    make_codec(tmp_path / "other", seed=9)
    for run, codec, why in (
        (draws, tmp_path / "other", "made with the codec of pictures"),
        (draws, tmp_path, "no codec of pictures here"),
        (trained, "", "draws nothing"),
    ):
        (told,) = run_ranks(failing, 1, str(run.run_dir), str(codec))
        assert isinstance(told, MakerFailed) and why in told.message


def failing(rank: Rank, run: str, codec: str) -> Any:
    ours, theirs = Pipe()
    words = [str(theirs.fileno()), run, codec, "2"]
    assert maker.run(words, painter_process.serve, who="what draws") == 1
    return ours.recv()


# ------------------------------------------------------------------------------------------------ chat answers

FACTS = ModelFacts(
    name="m",
    created=0,
    fingerprint="f",
    seq_length=9,
    vocab_size=9,
    input_modalities=("text",),
    output_modalities=("text",),
)
END = Usage(prompt=1, cached=0, completion=2)


def answer_of(told: list[Paint], n: int = 1, note: str = "") -> DrawnAnswer:
    return DrawnAnswer(
        "chat", FACTS, {"chat": Built(tokens={"text": 1})}, n=n, logprobs=False, seed=0, stop_ids=(), token_bytes={},
        source=replace(SOURCE, note=note), options=PictureOptions(seed=4), paint=told.append,
    )  # fmt: skip


def text(words: str, sample: int = 0) -> TokenEvent:
    return TokenEvent(name="chat", sample=sample, id=1, text=words)


def block(number: int, sample: int = 0) -> BlockEvent:
    return BlockEvent(name="chat", sample=sample, number=number, hidden=b"h", vision=b"v")


def painted(number: int, sample: int = 0, **settings: Any) -> Painted:
    return Painted(name="chat", sample=sample, number=number, data=bytes([number]), **settings)


def ended(sample: int = 0) -> FinishedEvent:
    return FinishedEvent(name="chat", sample=sample, reason="stop", usage=END)


def deltas(answer: DrawnAnswer) -> list[tuple[str, Any]]:
    found = []
    for chunk in answer.chunks(usage=False):
        choice = chunk["choices"][0]
        delta = choice["delta"]
        kind = (
            "images"
            if "images" in delta
            else "content"
            if delta.get("content")
            else "end"
            if choice["finish_reason"]
            else "head"
        )
        found.append((kind, [p["index"] for p in delta["images"]] if kind == "images" else delta.get("content")))
    return found


def test_an_answer_goes_on_while_its_pictures_are_drawn_and_ends_with_the_last() -> None:
    told: list[Paint] = []
    answer = answer_of(told, note="another size")
    answer.take([text("Here: "), block(0)])
    assert deltas(answer) == [("head", ""), ("content", "Here: ")]
    assert [(one.sample, one.number, one.hidden, one.vision, one.options.seed) for one in told] == [
        (0, 0, b"h", b"v", 4)
    ]
    answer.take([text("and "), block(1), painted(1), text("so"), ended()])
    assert not answer.complete and deltas(answer) == [("content", "and so")], "the first is not there"
    answer.take([painted(0)])
    assert answer.complete and deltas(answer) == [("images", [0, 1]), ("end", None)]
    (choice,) = answer.body()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == "Here: and so"
    assert [part["image_url"]["url"] for part in choice["message"]["images"]] == [
        "data:image/png;base64,AA==", "data:image/png;base64,AQ=="
    ]  # fmt: skip
    assert choice["message"]["annotations"] == [{"type": "note", "note": "another size"}]
    assert answer.usage()["completion_tokens_details"]["images"] == 2


def test_samples_wait_for_their_own_pictures() -> None:
    answer = answer_of([], n=2)
    answer.take([block(0, 0), block(0, 1), ended(0), ended(1), painted(0, 1)])
    assert not answer.complete
    answer.take([painted(0, 0)])
    assert answer.complete
    assert all(len(choice["message"]["images"]) == 1 for choice in answer.body()["choices"])
    plain = answer_of([])
    plain.take([text("no picture"), ended()])
    assert plain.complete and "images" not in plain.body()["choices"][0]["message"]


def test_a_picture_that_fails_ends_the_answer() -> None:
    for refused, status in ((True, 400), (False, 500)):
        answer = answer_of([])
        answer.take([block(0)])
        with pytest.raises(ApiError) as caught:
            answer.take([painted(0, error="no", refused=refused)])
        assert caught.value.status == status
