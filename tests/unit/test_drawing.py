"""Rows that draw: marks and targets, tasks and sources, the block in the template, sizes with and without an index, tars."""

import contextlib
import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.drawing import GENERATE, RowAt
from megatron_omni.data.prepare import index_files
from megatron_omni.data.record import Record, RecordError, parse_record
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sources import open_source, open_sources
from megatron_omni.data.tokenizer import ALL_SPECIALS, load_tokenizer, train_sentencepiece
from tests.unit.tiny_data import CORPUS, row, tiny_recipe, tokenizer_file, write_image, write_source

RUN = "".join([*(f"[TASK{i}]" for i in range(3)), *(f"[IMG{i}]" for i in range(32))])
TWICE = RUN + "".join(f"[IMG{i}]" for i in range(32))


def drawing_tokenizer(folder) -> str:
    path = folder / "drawing.model"
    if not path.exists():
        train_sentencepiece(CORPUS, path, vocab_size=295 + 40, specials=ALL_SPECIALS)
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    made = tiny_recipe(tmp_path, [])
    made.data.tokenizer = drawing_tokenizer(tmp_path)
    return made


def refused(given: dict, **fields) -> RecordError:
    with pytest.raises(RecordError) as caught:
        parse_record(given, where="f.jsonl:4")
    assert str(caught.value).startswith("f.jsonl:4: ")
    for name, value in fields.items():
        assert getattr(caught.value, name) == value, caught.value
    return caught.value


# ------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize("mark", [GENERATE, "<image>", RUN, TWICE], ids=["generate", "image", "run", "two runs"])
def test_a_drawn_picture_is_read_from_each_of_its_spellings(mark):
    record = parse_record(row("draw a cat", f"<think>grey</think><answer>Here: {mark}</answer>", targets=["cat.png"]))
    answer = record.messages[1]
    assert answer.pieces() == ["<think>grey</think><answer>Here: ", "generate", "</answer>"]
    assert answer.content == "<think>grey</think><answer>Here: <generate></answer>" and answer.num_drawn == 1
    assert answer.media() == [] and record.targets == ("cat.png",) and record.picture_sources == (None,)
    assert record.drawing.task_of(None) == "text_to_image"


def test_without_targets_the_same_text_is_text():
    content = f"write {GENERATE}, <image> or {RUN}"
    record = parse_record(row("how?", content, task="sorting", instruction="none"))
    assert record.messages[1].pieces() == [content] and record.drawing is None
    assert record.extra == {"task": "sorting", "instruction": "none"}  # such columns are not ours alone


def test_a_users_words_never_draw():
    record = parse_record(row(f"what is {GENERATE} or {RUN}?", GENERATE, targets=["a.png"]))
    assert record.messages[0].pieces() == [f"what is {GENERATE} or {RUN}?"]


@pytest.mark.parametrize(
    "answer, targets", [("no mark", ["a.png"]), (f"{GENERATE}<image>", ["a.png"]), (GENERATE, ["a", "b"])]
)
def test_marks_and_targets_must_be_as_many(answer, targets):
    error = refused(row("draw", answer, targets=targets), reason="marker_count", field="targets")
    assert "write one <generate> for each file" in str(error)


def test_the_authors_rows_are_read():
    given = {
        "conversations": [{"from": "human", "value": "<image>\nedit"}, {"from": "gpt", "value": f"Here is the image: {RUN}"}],
        "images": "source.jpg", "image_gen": "target.jpg", "golden_task_embedding": None,
    }  # fmt: skip
    record = parse_record(given)
    assert (record.images, record.targets, record.picture_sources) == (("source.jpg",), ("target.jpg",), (0,))
    assert (
        record.messages[1].content == "Here is the image: <generate>" and record.drawing.task_of(0) == "image_to_image"
    )
    error = refused(
        {**given, "golden_caption_embedding": "c.pt"}, reason="unsupported_key", field="golden_caption_embedding"
    )
    assert "FILE.npy" in str(error) and "teachers" in str(error)
    refused({**given, "targets": ["b.jpg"]}, reason="bad_drawing", field="targets / image_gen")


def test_the_source_is_the_last_picture_of_the_turn_before():
    turns = [
        {"role": "user", "content": "<image> and <image>: put the first into the second"},
        {"role": "assistant", "content": GENERATE},
        {"role": "user", "content": "now a cat"},
        {"role": "assistant", "content": f"two: {GENERATE} {GENERATE}"},
        {"role": "user", "content": "<image>this"},
        {"role": "assistant", "content": GENERATE},
    ]
    given = {"messages": turns, "images": ["0", "1", "2"], "targets": ["a", "b", "c", "d"]}
    record = parse_record(given)
    assert record.picture_sources == (1, None, None, 2)
    assert parse_record({**given, "task": "text_to_image"}).picture_sources == (None,) * 4
    refused({**given, "task": "edit"}, reason="no_source", field="task")
    assert parse_record({**given, "task": "collage"}).drawing.task == "collage"


@pytest.mark.parametrize("task", ["edit", "denoise", "edges", "depth"])
def test_a_task_with_a_source_needs_one(task):
    error = refused(row("make it", GENERATE, targets=["a.png"], task=task), reason="no_source")
    assert "write <image> there" in str(error)


def test_what_is_known_of_a_picture_is_named_by_file_and_number():
    record = parse_record(
        row(
            "<image>edit", GENERATE, images=["s.png"], targets=["t.png"], instruction="a dog",
            latents={"target": "x.latents.safetensors#0", "source": "x.latents.safetensors#1"},
            teachers={"task": "t.npy", "caption": "c.safetensors#3"}, hidden={"rows": "x.hidden.safetensors#2"},
        )
    )  # fmt: skip
    drawing = record.drawing
    assert drawing.latents == (
        {"target": RowAt("x.latents.safetensors", 0), "source": RowAt("x.latents.safetensors", 1)},
    )
    assert drawing.teachers == ({"task": RowAt("t.npy"), "caption": RowAt("c.safetensors", 3)},)
    assert [str(at) for at in drawing.hidden[0].values()] == ["x.hidden.safetensors#2"]
    assert drawing.instruction == "a dog" and record.extra == {}


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"targets": [3]}, "targets"), ({"targets": {"a": 1}}, "targets"), ({"task": "no name!"}, "task"),
        ({"instruction": 3}, "instruction"), ({"latents": "x#0"}, "latents"), ({"latents": [{}, {}]}, "latents"),
        ({"latents": {"target": "a.npy"}}, "latents.target"), ({"teachers": {"taste": "a.npy"}}, "teachers"),
        ({"hidden": {"rows": 7}}, "hidden.rows"), ({"degrade": "rust"}, "degrade"),
        ({"degrade": {"kind": "noise", "sigma": -1}}, "degrade.sigma"),
        ({"degrade": {"kind": "noise", "sigma": [0.3, 0.1]}}, "degrade.sigma"),
        ({"degrade": {"kind": "blur", "file": "rain.png"}}, "degrade"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fields, field):
    refused(row("draw", GENERATE, **{"targets": ["a"], **fields}), reason="bad_drawing", field=field)


def test_a_run_of_more_tokens_than_a_block_has_is_named():
    error = refused(row("draw", f"{RUN}[IMG32]", targets=["a.png"]), reason="bad_drawing", field="messages[1]")
    assert "[IMG32]" in str(error)
    refused(row("draw", RUN[:-9], targets=["a.png"]), reason="marker_count")


ODD = [
    0,
    True,
    -1,
    1e99,
    "",
    "x",
    [],
    [[]],
    [None],
    {},
    {"kind": []},
    {"kind": "noise", "sigma": []},
    {"task": {}},
    [{}],
    [{"rows": []}],
]


@pytest.mark.parametrize(
    "key", ["targets", "image_gen", "task", "instruction", "degrade", "teachers", "latents", "hidden"]
)
def test_no_value_of_a_key_is_a_fault_of_ours(key):
    for value in ODD:
        with contextlib.suppress(RecordError):
            parse_record(row("<image>", GENERATE, **{"targets": ["a"], "images": ["b"], key: value}))


def test_files_from_the_net_are_refused():
    refused(row("draw", GENERATE, targets=["https://x/y.png"]), reason="remote_media", field="targets")
    refused(
        row("d", GENERATE, targets=["a"], teachers={"task": "s3://b/c.npy"}),
        reason="remote_media",
        field="teachers.task",
    )


def test_an_answer_that_draws_is_not_spoken():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": GENERATE, "speech": {"speaker": "A"}}]
    refused({"messages": turns, "targets": ["a.png"]}, reason="bad_drawing", field="messages[1].speech")


def test_paths_that_leave_the_root_are_refused(tmp_path):
    for name, fields in (
        ("targets", {"targets": ["../a.png"]}),
        ("latents", {"targets": ["a.png"], "latents": {"target": "../x.safetensors#0"}}),
        ("degrade", {"targets": ["a.png"], "degrade": {"kind": "rain", "file": "/rain.png"}}),
    ):
        question = "<image>" if name == "degrade" else "draw"
        source = open_source(write_source(tmp_path, name, [row(question, GENERATE, **fields)]), digest="")
        with pytest.raises(RecordError) as caught:
            source[0]
        assert caught.value.reason == "path_escape", caught.value


# ------------------------------------------------------------------------------------------------ samples


def draw_record(folder, answer: str = GENERATE, question: str = "draw", **fields) -> Record:
    fields = {key: [str(folder / name) for name in names] for key, names in fields.items()}
    return parse_record(row(question, answer, **fields))


def test_the_block_is_learned_like_the_text_around_it(tmp_path, recipe):
    write_image(tmp_path / "a.png")
    builder = SampleBuilder(recipe)
    record = draw_record(tmp_path, f"the cat{GENERATE}and a dog", targets=["a.png"])
    sample, tokenizer = builder.build_sample(record), builder.tokenizer
    ids = sample.input_ids.tolist()
    learned = [token for token in sample.labels.tolist() if token != IGNORE_LABEL]
    block = [tokenizer.special(name) for name in (*(f"[TASK{i}]" for i in range(3)), *(f"[IMG{i}]" for i in range(32)))]
    assert learned == [
        *tokenizer.encode("the cat"),
        *block,
        *tokenizer.encode("and a dog"),
        tokenizer.special("<|im_end|>"),
    ]
    start = ids.index(block[0])
    assert ids[start : start + 35] == block and builder.size(record).tokens == sample.length
    assert builder.size(record).drawn == 1
    assert sample.position_ids[0].tolist() == list(range(sample.length))  # tokens of a block are text


def test_the_block_is_the_generators(tmp_path, recipe):
    recipe.model.image = ImageGeneratorConfig(image_token_repeat=2, num_image_tokens=4)
    write_image(tmp_path / "a.png")
    builder = SampleBuilder(recipe)
    record = draw_record(tmp_path, targets=["a.png"])
    names = ["[TASK0]", "[TASK1]", "[TASK2]", *(f"[IMG{i}]" for i in range(4)), *(f"[IMG{i}]" for i in range(4))]
    sample = builder.build_sample(record)
    assert list(builder.sizes.block) == [builder.tokenizer.special(name) for name in names]
    assert sample.labels[sample.labels != IGNORE_LABEL].tolist()[:-1] == list(builder.sizes.block)
    assert builder.size(record).tokens == sample.length


def test_users_and_models_texts_can_never_become_the_block(tmp_path, recipe):
    recipe.data.seq_length = 1000
    builder = SampleBuilder(recipe)
    specials = {token for name, token in builder.tokenizer.specials.items() if name.startswith(("[IMG", "[TASK"))}
    record = parse_record({"messages": [
        {"role": "system", "content": f"{RUN} <generate>"}, {"role": "user", "content": f"<generate> {TWICE}"},
        {"role": "assistant", "content": f"{RUN}{GENERATE}"},
    ]})  # fmt: skip
    assert not specials & set(builder.build_sample(record).input_ids.tolist())


def test_a_prompt_asks_for_the_picture_and_keeps_those_before(tmp_path, recipe):
    builder = SampleBuilder(recipe)
    turns = [("user", "a cat"), ("assistant", f"here {GENERATE}"), ("user", "a dog"), ("assistant", GENERATE)]
    given = {"messages": [{"role": role, "content": text} for role, text in turns], "targets": ["a.png", "b.png"]}
    record = parse_record(given)
    prompt = builder.build_prompt(record)  # opens no target
    assert prompt.input_ids.tolist().count(builder.sizes.block[0]) == 1
    assert builder.prompt_size(Record(messages=record.messages[:3])).tokens == prompt.length
    assert not getattr(prompt, "drawn", ())


def test_a_tokenizer_without_the_tokens_is_named(tmp_path):
    write_image(tmp_path / "a.png")
    builder = SampleBuilder(tiny_recipe(tmp_path, []))
    for function in (builder.size, builder.build_sample):
        with pytest.raises(RecordError, match=r"has no \[IMG0\]") as caught:
            function(draw_record(tmp_path, targets=["a.png"]))
        assert caught.value.reason == "no_image_tokens"


def test_a_target_that_is_missing_or_damaged_is_a_skip(tmp_path, recipe):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    builder = SampleBuilder(recipe)
    for name, reason in (("gone.png", "missing_media"), ("bad.png", "unreadable_media")):
        with pytest.raises(MediaError) as caught:
            builder.size(draw_record(tmp_path, targets=[name]))
        assert caught.value.reason == reason
    kept = {"target": str(tmp_path / "x.safetensors#0")}  # its latents are there in its place
    record = parse_record(row("draw", GENERATE, targets=["gone.png"], latents=kept))
    assert builder.size(record).drawn == 1


def test_a_damaged_source_is_made_of_the_target(tmp_path, recipe):
    Image.effect_noise((28, 28), 60).convert("RGB").save(tmp_path / "clean.png")
    builder = SampleBuilder(recipe)

    def tiles(degrade, **more) -> torch.Tensor:
        given = row("<image>\nrepair", GENERATE, targets=[str(tmp_path / "clean.png")], degrade=degrade, **more)
        return builder.build_sample(parse_record(given)).tiles

    plain = builder.build_sample(parse_record(row("<image>", images=[str(tmp_path / "clean.png")]))).tiles
    noisy = tiles({"kind": "noise", "sigma": 0.2}, id="a")
    assert not torch.equal(noisy, plain) and torch.equal(noisy, tiles({"kind": "noise", "sigma": 0.2}, id="a"))
    assert not torch.equal(noisy, tiles({"kind": "noise", "sigma": 0.2}, id="b"))  # another sample, other noise
    hole = tiles({"kind": "hole", "size": 10, "fill": 1.0})
    assert int((hole != plain).any(dim=1).sum()) <= 100 and int((hole == 255).all(dim=1).sum()) >= 100


# ------------------------------------------------------------------------------------------------ indexes and tars


def test_sizes_from_an_index_are_those_from_headers(tmp_path, recipe):
    write_image(tmp_path / "a.png", size=(40, 28))
    rows = [
        row("draw", GENERATE, targets=["a.png"]),
        row("<image>edit", f"so: {GENERATE}", images=["a.png"], targets=["a.png"]),
        row("<image>what?", images=["a.png"]),
        row("draw", GENERATE, targets=["gone.png"]),
        row("draw", "nothing", targets=["a.png"]),
    ]
    config = write_source(tmp_path, "rows", rows)
    builder = SampleBuilder(recipe)
    (plain,) = open_sources([config], tokenizer=builder.tokenizer)
    before = [builder.row_size(plain, i) for i in range(3)]
    index_files([tmp_path / "rows.jsonl"], recipe.data.tokenizer)
    (indexed,) = open_sources([config], tokenizer=builder.tokenizer)
    assert [builder.row_size(indexed, i) for i in range(3)] == before
    assert indexed.facts(1).targets == ((40, 28),) and [size.drawn for size in before] == [1, 1, 0]
    for i, reason in ((3, "missing_media"), (4, "marker_count")):
        with pytest.raises(RecordError) as caught:
            indexed.facts(i)
        assert caught.value.reason == reason


def test_targets_lie_in_tars(tmp_path, recipe):
    def png(level: int, size: tuple[int, int]) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", size, (level,) * 3).save(out, "PNG")
        return out.getvalue()

    edit = row("<image>darker", GENERATE, targets=["target.png"], task="edit")
    clean = row("<image>repair", GENERATE, targets=["png"], degrade={"kind": "hole", "size": 28, "fill": 0.0})
    members = [
        ("0.source.png", png(200, (28, 28))), ("0.target.png", png(50, (30, 20))), ("0.json", json.dumps(edit).encode()),
        ("1.png", png(99, (28, 28))), ("1.json", json.dumps(clean).encode()),
        ("2.png", png(99, (28, 28))), ("2.json", json.dumps(row("d", GENERATE, targets=["jpg"])).encode()),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    builder = SampleBuilder(recipe)
    index_files([tmp_path / "x.tar"], recipe.data.tokenizer)
    (source,) = open_sources([SourceConfig(name="x", path=str(tmp_path / "x.tar"))], tokenizer=builder.tokenizer)
    record = source[0]
    assert [file.load().name.rpartition("0.")[2] for file in (*record.images, *record.targets)] == [
        "source.png",
        "target.png",
    ]
    assert source.facts(0).targets == ((30, 20),) and builder.row_size(source, 0) == builder.size(record)
    assert builder.build_sample(record).tiles.unique().tolist() == [200]
    assert builder.build_sample(source[1]).tiles.unique().tolist() == [0]
    with pytest.raises(RecordError) as caught:
        source[2]
    assert caught.value.reason == "missing_media"


def test_the_quickstarts_tokenizer_is_left_alone(tmp_path):
    assert set(load_tokenizer(tokenizer_file(tmp_path)).specials).isdisjoint({"[IMG0]", "[TASK0]"})
