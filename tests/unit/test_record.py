"""Records: accepted shapes, and one named error for every kind of bad row."""

from dataclasses import replace

import pytest

from megatron_omni.data.decode.media import MediaBytes
from megatron_omni.data.record import Message, RecordError, internal_error, parse_record, record_of_parts

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def test_a_row_becomes_a_record():
    row = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "<image>\n<audio> and <image>"},
            {"role": "assistant", "content": "two"},
        ],
        "images": ["a.png", "b/c.png"],
        "audios": ["x.ogg"],
        "id": 7,
        "task": "relation",
    }
    record = parse_record(row, where="f.jsonl:3", source="pairs")
    assert record.messages[2] == Message("assistant", "two")
    assert record.images == ("a.png", "b/c.png") and record.audios == ("x.ogg",) and record.videos == ()
    assert (record.id, record.source, record.where, record.answer) == ("7", "pairs", "f.jsonl:3", "two")
    assert record.extra == {"task": "relation"}


def test_sharegpt_rows_become_the_same_record():
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    converted = parse_record({"conversations": turns, "system": "be brief", "image": "a.png"})
    direct = parse_record(
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "<image>\nwhat?"},
                {"role": "assistant", "content": "a cat"},
            ],
            "images": ["a.png"],
        }
    )
    assert converted == direct


def test_marks_say_which_answers_are_learned():
    for mark in ({"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0, "loss": False}):
        record = parse_record({"messages": [USER | mark, ANSWER | mark, USER, ANSWER | {"weight": 1, "train": True}]})
        assert [message.learned for message in record.messages if message.role == "assistant"] == [False, True], mark
        assert record.has_answer and not parse_record({"messages": [USER, ANSWER | mark]}).has_answer
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False, "weight": None}]
    assert not parse_record({"conversations": turns}).has_answer


def test_a_null_is_not_there():
    plain = {"messages": [{"role": "user", "content": "<image>q"}, ANSWER], "images": ["a.png"]}
    expected = parse_record(plain)
    for more in (
        dict.fromkeys(("system", "id", "image", "audios", "video", "conversations", "tools", "task")),
        {"image": []}, {"image": ""}, {"images": "a.png"}, {"images": None, "image": "a.png"}, {"tools": [], "functions": ""},
        {"messages": [turn | dict.fromkeys(("tool_calls", "weight", "name")) for turn in plain["messages"]]},
    ):  # fmt: skip
        assert replace(parse_record(plain | more), extra={}) == expected, more
    assert parse_record(plain | {"id": 3.0}).id == "3.0"  # a table's column of numbers with a hole


def test_what_nobody_foresaw_is_a_row_error_with_one_traceback(caplog):
    said = []
    for number in range(3):
        try:
            {}["caf\udce9"]
        except KeyError as error:
            said.append(str(internal_error(f"a.tar:caf\udce9{number}", error)))
    assert len(caplog.records) == 1 and caplog.records[0].exc_info
    assert said[2] == (
        "a.tar:caf\\udce92: error = \"KeyError: 'caf\\\\udce9'\": is a fault of the program; report it with the traceback in "
        "the log"
    )


def test_a_question_without_an_answer_is_a_record():
    assert parse_record({"messages": [USER]}).answer == ""


def test_markers_in_answers_are_text():
    row = {"messages": [USER, {"role": "assistant", "content": "use the <video> tag"}]}
    assert parse_record(row).answer == "use the <video> tag"


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ([1], "bad_type", r"f:9: row = \[1\]: is not a JSON object; write"),
        ({}, "no_messages", "neither is given"),
        ({"messages": [USER], "conversations": []}, "no_messages", "both are given"),
        ({"messages": []}, "bad_type", r"messages = \[\]: is no list of turns"),
        ({"messages": "hi"}, "bad_type", "messages = 'hi': is no list of turns"),
        ({"messages": ["hi"]}, "bad_type", r"messages\[0\] = 'hi': is no object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown_role", r"role = 'robot': .*use one of"),
        ({"messages": [{"content": "x"}]}, "unknown_role", r"messages\[0\].role = None"),
        ({"messages": [{"role": "human", "content": "x"}]}, "unknown_role", "'human': is an unknown role"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown_role", r"conversations\[0\].from = 'bot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "bad_type", r"messages\[0\].content = 5: is no text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "bad_text", "surrogate"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty_answer", r"content = ' \\n'"),
        ({"messages": [USER, {"role": "system", "content": "s"}]}, "bad_roles", "system turn is not the first"),
        ({"messages": [{"role": "system", "content": "s"}]}, "bad_roles", "has no user turn"),
        ({"messages": [USER, ANSWER], "system": 3}, "bad_type", "system = 3: is no text"),
        ({"messages": [USER, ANSWER], "id": []}, "bad_type", r"id = \[\]"),
        ({"messages": [USER, ANSWER], "images": {"path": "a.png"}}, "bad_type", "is no list of file names"),
        ({"messages": [USER, {"role": "tool", "content": "21 C"}]}, "tool_turn", r"messages\[1\].role = 'tool': turns of"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "tool_turn", "turns of tools are not supported"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"id": "1"}]}]}, "tool_turn", r"messages\[1\].tool_calls = "),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "tool_turn", "tools = .*leave such records out"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "so"}]}, "unsupported_key", "into the answer's text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "content_parts", "write one text"),
        ({"messages": [USER, ANSWER], "system": [{"type": "text", "text": "hi"}]}, "content_parts", "system = "),
        ({"messages": [USER, ANSWER], "images": ["https://x.org/a.png"]}, "remote_media", "is a URL.*download it"),
        ({"messages": [USER, ANSWER], "image": "data:image/png;base64,AAAA"}, "remote_media", "is a URL.*download it"),
        ({"messages": [USER, ANSWER], "videos": ["s3://bucket/a.mp4"]}, "remote_media", "'s3://bucket/a.mp4': is a URL"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "bad_mark", r"messages\[1\].weight = 0.5: .*write 1 or true"),
        ({"messages": [USER, ANSWER | {"train": "false"}]}, "bad_mark", "train = 'false'"),
        ({"messages": [USER, ANSWER | {"loss": True, "weight": 0}]}, "bad_mark", "contradict"),
        ({"messages": [USER | {"train": True}, ANSWER]}, "bad_mark", "a user turn cannot be learned"),
        ({"messages": [USER, ANSWER], "images": [""]}, "bad_type", "is no list of file names"),
        ({"messages": [USER, ANSWER], "image": "a", "images": ["a"]}, "bad_type", "both are given"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "marker_count", r"1 file\(s\) for 0 <image> marker\(s\)"),
        (
            {"messages": [{"role": "user", "content": "<video><video>"}, ANSWER], "videos": ["a"]},
            "marker_count",
            r"videos = \['a'\]: 1 file\(s\) for 2 <video>",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "<audio>"}], "audios": ["a"]},
            "marker_count",
            r"for 0 <audio> .*the 1 in answers do not count",
        ),
    ],
)  # fmt: skip
def test_bad_rows_are_named(row, reason, message):
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(row, where="f:9")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("f:9: ")


def test_a_huge_value_is_shortened_in_the_message():
    with pytest.raises(RecordError) as caught:
        parse_record({"messages": "x" * 10_000})
    assert len(str(caught.value)) < 200
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RecordError, match=r"messages = \{'a': \[\[\[\["):
        parse_record({"messages": "x", "id": nested} | {"messages": {"a": nested}})


def test_a_turn_in_parts_keeps_their_order_and_takes_no_marker_from_its_text():
    picture, clip, second = (MediaBytes(name, b"x") for name in ("a", "b", "c"))
    record = record_of_parts(
        [
            ("system", ["<audio> is a tag"]),
            ("user", [("video", clip), "see <image>", " and", ("image", picture), ("image", second)]),
        ],
        where="request",
    )
    assert [message.pieces() for message in record.messages] == [
        ["<audio> is a tag"],
        ["", "video", "see <image> and", "image", "", "image", ""],
    ]
    assert record.images == (picture, second) and record.videos == (clip,) and record.audios == ()


@pytest.mark.parametrize(
    ("roles", "message"), [(["user", "system"], "not the first turn"), (["system"], "has no user turn")]
)
def test_turns_in_parts_obey_the_order_of_roles(roles, message):
    with pytest.raises(RecordError, match=message):
        record_of_parts([(role, ["x"]) for role in roles], where="request")
