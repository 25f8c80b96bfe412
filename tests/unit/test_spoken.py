"""Spoken answers: what a record may say, what the model learns of it, and the turn taken apart again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.chain.handed import row_of
from megatron_omni.data.pairs import PairBuilder, sides
from megatron_omni.data.prepare import index_files
from megatron_omni.data.record import Message, RecordError, parse_record
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sources import open_sources, parse_line
from megatron_omni.data.speech_request import asked_to_speak, released_request
from megatron_omni.data.spoken import CodesAt, Speech
from megatron_omni.data.template import MediaSpans, answer_ids, count_text_tokens, render
from megatron_omni.data.tokenizer import ALL_SPECIALS, SPEECH_SPECIALS, Tokenizer, load_tokenizer, train_sentencepiece
from megatron_omni.generation.speech_turn import SpeechReader, SpokenTurn, parse_speech
from megatron_omni.positions import PositionRule, TextSpan
from tests.unit.tiny_data import tiny_recipe, write_source

RULE = PositionRule(pooled_side=2, num_query_tokens=20, audio_group_seconds=3.0, theta=2.0)
START, END, MIDDLE, _ = SPEECH_SPECIALS
JENNY = {"speaker": "Jenny"}
CORPUS = ["Language: English; Speaker: Jenny; a cat and a dog", "user assistant what <think> is it </think>?"] * 4


def make_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(train_sentencepiece(CORPUS, folder / "s.model", vocab_size=340, specials=ALL_SPECIALS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tok"))


def row(speech, content="a cat", **extra) -> dict:
    answer = {"role": "assistant", "content": content, "speech": speech}
    return {"messages": [{"role": "user", "content": "what is it?"}, answer], **extra}


def speech_of(speech, content="a cat") -> Speech:
    found = parse_record(row(speech, content)).messages[-1].speech
    assert found is not None
    return found


def spoken(prompt="Language: English; Speaker: Jenny;", words="a cat", content=None) -> Message:
    return Message("assistant", content or words, speech=Speech(spoken=words, prompt=prompt))


# ------------------------------------------------------------------------------------------------ records


def test_prompt_and_words_of_a_spoken_answer():
    jenny = speech_of(JENNY)
    assert (jenny.prompt, jenny.spoken) == ("Language: English; Speaker: Jenny;", "a cat")
    assert speech_of(JENNY, "80 GB 一只猫").prompt == "Language: Chinese; Speaker: Jenny;"
    assert speech_of({"speaker": "Brian", "language": "French"}).prompt == "Language: French; Speaker: Brian;"
    assert speech_of({"style": "An old man; he speaks.", "language": "English"}).prompt == "An old man; he speaks."
    assert speech_of({"speaker": "Jenny", "text": "eighty", "style": None}, "80").spoken == "eighty"
    assert speech_of(JENNY, "<think>\nhm\n</think>\n\na dog").spoken == "a dog"
    piece = speech_of({**JENNY, "file": "x.wav", "codes": "t.codes.safetensors#17", "start": 3, "stop": 9})
    assert (piece.file, piece.codes, piece.start, piece.stop) == ("x.wav", CodesAt("t.codes.safetensors", 17), 3, 9)
    listed = speech_of({**JENNY, "codes": [5, 0, 7], "start": 2})
    assert (listed.codes, listed.start, listed.stop) == ((5, 0, 7), 2, None)


@pytest.mark.parametrize(
    ("speech", "field", "reason"),
    [
        ("Jenny", "speech", "bad_speech"),
        ({}, "speech.speaker / style", "bad_speech"),
        ({"speaker": "a", "style": "b"}, "speech.speaker / style", "bad_speech"),
        ({"speaker": "Jen;ny"}, "speech.speaker", "bad_speech"),
        ({"speaker": ""}, "speech.speaker", "bad_speech"),
        ({"speaker": "a", "language": "En\nglish"}, "speech.language", "bad_speech"),
        ({"style": "\ud800"}, "speech.style", "bad_speech"),
        ({"speaker": "a", "voice": "b"}, "speech", "unsupported_key"),
        ({"speaker": "a", "text": 3}, "speech.text", "bad_speech"),
        ({"speaker": "a", "file": "http://x/y.wav"}, "speech.file", "remote_media"),
        ({"speaker": "a", "codes": []}, "speech.codes", "bad_speech"),
        ({"speaker": "a", "codes": [1, True]}, "speech.codes", "bad_speech"),
        ({"speaker": "a", "codes": [1, -1]}, "speech.codes", "bad_speech"),
        ({"speaker": "a", "codes": "x.safetensors"}, "speech.codes", "bad_speech"),
        ({"speaker": "a", "codes": [1, 2], "stop": 3}, "speech.stop", "bad_speech"),
        ({"speaker": "a", "codes": [1, 2], "start": 2}, "speech.stop", "bad_speech"),
        ({"speaker": "a", "codes": [1, 2], "start": 1, "stop": 1}, "speech.stop", "bad_speech"),
        ({"speaker": "a", "codes": [1, 2], "start": 0.5}, "speech.start", "bad_speech"),
        ({"speaker": "a", "start": 1}, "speech.start / stop", "bad_speech"),
    ],
)  # fmt: skip
def test_what_a_spoken_answer_may_not_say(speech, field, reason):
    with pytest.raises(RecordError) as error:
        parse_record(row(speech), where="f.jsonl:2")
    assert (error.value.field, error.value.reason) == (f"messages[1].{field}", reason)


def test_only_answers_are_spoken_and_only_with_words():
    with pytest.raises(RecordError, match=r"messages\[0\]\.speech .* is no answer"):
        parse_record({"messages": [{"role": "user", "content": "hi", "speech": JENNY}]})
    with pytest.raises(RecordError, match=r"messages\[1\]\.speech\.text .* says nothing"):
        parse_record(row(JENNY, "<think> hm </think>"))


def test_files_of_a_spoken_answer_stay_under_the_root(tmp_path):
    def read(speech):
        return parse_line(json.dumps(row(speech)).encode(), where="w", source="s", root=tmp_path).messages[-1].speech

    found = read({**JENNY, "file": "a/x.wav", "codes": "c.safetensors#2"})
    assert (found.file, found.codes) == (str(tmp_path / "a/x.wav"), CodesAt(str(tmp_path / "c.safetensors"), 2))
    for speech, field in (({**JENNY, "file": "../x.wav"}, "file"), ({**JENNY, "codes": "/c.safetensors#2"}, "codes")):
        with pytest.raises(RecordError, match=rf"messages\[1\]\.speech\.{field}") as error:
            read(speech)
        assert error.value.reason == "path_escape"


def test_a_row_is_written_back_as_it_was(tmp_path):
    for speech in (
        {**JENNY, "language": "English", "text": "eighty", "file": "x.wav", "codes": "c.safetensors#2", "start": 1, "stop": 4},
        {"style": "slowly", "text": "a cat", "codes": [1, 2]},
    ):  # fmt: skip
        record = parse_line(json.dumps(row(speech)).encode(), where="w", source="s", root=tmp_path)
        assert row_of(record, tmp_path)["messages"][-1]["speech"] == speech


# ------------------------------------------------------------------------------------------------ the turn


def test_the_turn_literally(tokenizer):
    messages = [Message("user", "what?"), spoken(), Message("user", "and?"), replace(spoken(), learned=False)]
    rendered = render(messages, MediaSpans(), tokenizer=tokenizer, rule=RULE)
    turn = f"{START}Language: English; Speaker: Jenny;{MIDDLE}a cat{END}<|im_end|>"
    answer = f"<|im_start|>assistant\n{turn}\n"
    assert tokenizer.decode(rendered.input_ids, skip_special=False) == (
        f"<|im_start|>user\nwhat?<|im_end|>\n{answer}<|im_start|>user\nand?<|im_end|>\n{answer}"
    )
    learned = [i for i, is_answer in zip(rendered.input_ids, rendered.is_answer) if is_answer]
    assert tokenizer.decode(learned, skip_special=False) == turn
    assert rendered.spans == [TextSpan(len(rendered.input_ids))]
    assert count_text_tokens(messages, tokenizer) == len(rendered.input_ids)


def test_a_thought_stands_before_the_speech(tokenizer):
    for thought in ("<think>\nit barks\n</think>\n\n", "<think>\n\n</think>\n\n"):
        ids = answer_ids(spoken(words="a dog", content=f"{thought}a dog"), tokenizer)
        assert tokenizer.decode(ids[: ids.index(tokenizer.special(START))]) == thought
        assert parse_speech(ids, tokenizer)[0].text == tuple(tokenizer.encode("a dog"))


@settings(max_examples=50)
@given(prompt=st.text(min_size=1), words=st.text(min_size=1), spelled=st.sampled_from([*SPEECH_SPECIALS, "<|im_end|>"]))
def test_what_is_written_is_read_back(tokenizer, prompt, words, spelled):
    """Names of special tokens in either text are ordinary characters."""
    prompt, words = prompt + spelled, spelled + words
    ids = answer_ids(spoken(prompt, words), tokenizer)
    assert sum(map(tokenizer.is_special, ids)) == 3
    expected = SpokenTurn(tuple(tokenizer.encode(prompt)), tuple(tokenizer.encode(words)))
    assert parse_speech(ids, tokenizer) == [expected]


def test_what_no_record_holds_has_a_defined_result(tokenizer):
    start, middle, end, stop = map(tokenizer.special, (START, MIDDLE, END, "<|im_end|>"))

    def parsed(*ids):
        return [(turn.prompt, turn.text, turn.ended) for turn in parse_speech(ids, tokenizer)]

    assert parsed(300, middle, end, 301) == []
    assert parsed(start, 300, middle, 301, 302) == [((300,), (301, 302), False)]
    assert parsed(start, 300, middle, 301, stop, 302) == [((300,), (301,), False)]
    assert parsed(start, 300) == [((300,), (), False)] and parsed(start, 300, end) == [((300,), (), True)]
    assert parsed(start, 300, middle, 301, middle, 302, end) == [((300,), (301, 302), True)]
    twice = parsed(start, 300, middle, 301, start, 302, middle, 303, end, 304, start, middle, end)
    assert twice == [((300,), (301,), False), ((302,), (303,), True), ((), (), True)]
    reader = SpeechReader(tokenizer)
    over = [reader.push(token) is not None for token in (299, start, 300, middle, 301, end, 302)]
    assert over == [False] * 5 + [True, False] and reader.written == [299, 302]


# ------------------------------------------------------------------------------------------------ samples


@pytest.fixture
def recipe(tmp_path):
    make_tokenizer(tmp_path)
    recipe = tiny_recipe(tmp_path, [])
    return replace(
        recipe,
        model=replace(recipe.model, vocab_size=384),
        data=replace(recipe.data, tokenizer=str(tmp_path / "s.model")),
    )


def test_a_sample_and_its_size_from_row_and_index(recipe, tmp_path):
    source = write_source(tmp_path, "said", [row({**JENNY, "codes": "c.safetensors#0"}), row({"style": "slowly"})])
    builder = SampleBuilder(recipe)
    index_files([Path(source.path)], builder.tokenizer.path)
    [opened] = open_sources([source], tokenizer=builder.tokenizer)
    assert opened.facts(0) is not None
    for number in range(2):
        sample = builder.build_sample(opened[number])
        assert builder.size(opened[number]).tokens == builder.row_size(opened, number).tokens == sample.length
        labels = sample.labels[sample.labels != IGNORE_LABEL].tolist()
        said = opened[number].messages[-1]
        assert labels == [*answer_ids(said, builder.tokenizer), builder.tokenizer.special("<|im_end|>")]


def test_a_tokenizer_without_the_marks_refuses_the_record(tmp_path):
    builder = SampleBuilder(tiny_recipe(tmp_path, []))
    for read in (builder.size, builder.build_sample):
        with pytest.raises(RecordError, match=r"messages\[1\]\.speech .* has no <\|speech_start\|>") as error:
            read(parse_record(row(JENNY)))
        assert error.value.reason == "no_speech_tokens"
    with pytest.raises(ValueError, match=r"has no special token '<\|speech_start\|>'"):
        parse_speech([1, 2], builder.tokenizer)


def test_a_spoken_answer_may_be_preferred_to_a_typed_one(recipe):
    record = parse_record(row(JENNY, rejected_response="a cat"))
    builder = PairBuilder(replace(recipe, task="preference"))
    sample = builder.build_sample(record)
    assert sample.length == builder.size(record).tokens
    chosen = answer_ids(record.messages[-1], builder.tokenizer)
    labels = sample.labels[sample.labels != IGNORE_LABEL].tolist()
    assert labels[: len(chosen)] == chosen
    said = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a cat", "speech": JENNY}]
    with pytest.raises(RecordError, match="is the chosen answer"):
        sides(parse_record(row(JENNY, rejected_messages=said)))
    said[1]["speech"] = {"speaker": "Brian"}
    assert sides(parse_record(row(JENNY, rejected_messages=said))).same_prompt


# ------------------------------------------------------------------------------------------------ asking for it

READ_IN_JENNY = (
    "You should read user's query in Jenny's voice.\nGenerate in the following format: <speech start> token indicates the "
    "beginning of the speech response, followed by the text prompt. <prompt end> token indicates the end of the text prompt "
    "and the start of the speech output. <speech end> token indicates the end of the speech output."
)
ANSWER_AS_JENNY = READ_IN_JENNY.replace(
    "read user's query in Jenny's voice.\nGenerate",
    "listen to the user's question and respond in Jenny's voice.\nAnswer",
)
ANSWER_AS_BRIAN = (
    "请理解用户给出的语音问题并用Brian音色进行回答。\n回答的格式如下：<speech start>字符表示语音回复的起始，文本提示词开始，"
    "<prompt end>字符表示文本提示词结束语音输出开始，<speech end>字符表示语音输出结束。"
)


def asked(content, **how):
    media = {"audios": ["a.wav"]} if "<audio>" in content else {}
    return asked_to_speak(parse_record({"messages": [{"role": "user", "content": content}], **media}), **how).messages[
        -1
    ]


def test_the_released_wording_to_the_letter():
    assert asked("hello", voice="Jenny", purpose="read").content == f"hello\n{READ_IN_JENNY}"
    assert asked("<audio>", voice="Jenny").content == f"<audio>\n{ANSWER_AS_JENNY}"
    assert asked("<audio>", voice="Jenny").pieces() == ["", "audio", f"\n{ANSWER_AS_JENNY}"]
    assert released_request(voice="Brian", language="Chinese") == ANSWER_AS_BRIAN
    assert asked("这是什么", voice="Brian").content == f"这是什么\n{ANSWER_AS_BRIAN}"
    assert "respond in the following style: slowly <audio>." in asked("hi", style="slowly <audio>").pieces()[-1]


def test_a_recipes_own_wording_and_what_cannot_be_asked():
    assert asked("what?", voice="slt", wording="answer as {voice}.").content == "what?\nanswer as slt."
    for how in ({}, {"voice": "a", "style": "b"}, {"wording": "as {voice}"}):
        with pytest.raises(ValueError, match="one of the two"):
            asked("what?", **how)
    with pytest.raises(ValueError, match="no wording to read in Chinese is published"):
        released_request(voice="a", purpose="read", language="Chinese")
    with pytest.raises(RecordError, match="asks nothing"):
        asked_to_speak(parse_record(row(JENNY)), voice="Jenny")
