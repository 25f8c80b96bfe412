"""Streamed text: joined it is the whole text, never half a character, never a part of a stop string."""

import random
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omni.config.thinking import THINK, THINK_END
from megatron_omni.data.tokenizer import Tokenizer, load_tokenizer
from megatron_omni.generation.text import Piece, TextStream
from tests.unit.tiny_data import tokenizer_file

STOPS = ["\n\n", "the", "he", "é", "日本", "ab", "abab", "a", " cat", "</think>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tokenizer_file(tmp_path_factory.mktemp("text")))


def pieces_of(stream: TextStream, ids: list[int]) -> list[Piece]:
    """Pieces up to the one that found a stop string, the rest's included where none did."""
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if pieces[-1].stop is not None:
            return pieces
    return [*pieces, stream.flush()]


def whole(text: str, stops: list[str]) -> str:
    """``text`` before the first stop string in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def test_ten_thousand_streams_of_random_tokens_are_the_whole_text(tokenizer: Tokenizer) -> None:
    """Without hypothesis, which takes ten times as long for one; the two tests below shrink what they find."""
    pick = random.Random(0)
    for number in range(10_000):
        ids = [pick.randrange(tokenizer.vocab_size + 3) for _ in range(pick.randrange(1, 16))]
        stops = pick.sample(STOPS, pick.choice((0, 1, 3)))
        told = "".join(piece.text for piece in pieces_of(TextStream(tokenizer, stop=stops), ids))
        assert told == whole(tokenizer.decode(ids), stops), f"stream {number}: {ids}, stops {stops}"


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_of_random_tokens_are_the_whole_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=25))
    stops = data.draw(st.lists(st.sampled_from(STOPS), max_size=3, unique=True))
    pieces = pieces_of(TextStream(tokenizer, stop=stops), ids)
    assert "".join(piece.text for piece in pieces) == whole(tokenizer.decode(ids), stops)
    assert all(piece.reasoning == "" for piece in pieces)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_of_random_text_are_the_whole_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab the\n\u00e9日本😀", max_size=20))
    stops = data.draw(st.lists(st.sampled_from(STOPS), max_size=3, unique=True))
    pieces = pieces_of(TextStream(tokenizer, stop=stops), tokenizer.encode(text))
    assert "".join(piece.text for piece in pieces) == whole(text, stops)
    for piece in pieces:
        assert "\ufffd" not in piece.text, "half a character"


def test_a_possible_stop_string_is_held_back_until_it_is_decided(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=["xyz"])
    told = [stream.add(token).text for letter in "axyxyq" for token in tokenizer.encode(letter)]
    assert told == ["a", "", "", "xy", "", "xyq"]
    found = [stream.add(token) for letter in "bxyz" for token in tokenizer.encode(letter)]
    assert [piece.text for piece in found] == ["b", "", "", ""]
    assert found[-1].stop == "xyz"


def test_a_stop_string_at_the_first_character_leaves_no_text(tokenizer: Tokenizer) -> None:
    pieces = pieces_of(TextStream(tokenizer, stop=["ca"]), tokenizer.encode("cat"))
    assert [piece.text for piece in pieces if piece.text] == []
    assert pieces[-1].stop == "ca"


def test_characters_of_several_tokens_come_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) == 4, "this vocabulary writes it in bytes"
    stream = TextStream(tokenizer)
    assert [stream.add(token).text for token in ids] == ["", "", "", "😀"]
    assert [stream.add(token).text for token in ids[:3]] == ["", "", ""]
    assert stream.flush().text == tokenizer.decode(ids[:3])


def test_thought_is_told_apart_by_its_marks(tokenizer: Tokenizer) -> None:
    assert THINK not in tokenizer.specials, "by text here"
    text = f"well {THINK}a cat < b{THINK_END}the answer"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, reasoning=True)
    pieces = pieces_of(stream, ids)
    assert "".join(piece.text for piece in pieces) == "well the answer"
    assert "".join(piece.reasoning for piece in pieces) == "a cat < b"
    unsplit = pieces_of(TextStream(tokenizer), ids)
    assert "".join(piece.text for piece in unsplit) == text


class WithMarks:
    """A tokenizer whose marks of thought are special tokens."""

    specials: ClassVar = {THINK: 1000, THINK_END: 1001}

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def is_special(self, token: int) -> bool:
        return token >= 1000

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def text_of(self, token: int) -> str:
        return self.tokenizer.text_of(token)


def test_special_marks_of_thought_are_told_apart_by_their_ids(tokenizer: Tokenizer) -> None:
    typed, said = tokenizer.encode("a</think>b"), tokenizer.encode("the dog")
    stream = TextStream(WithMarks(tokenizer), reasoning=True)  # type: ignore[arg-type]
    pieces = pieces_of(stream, [1000, *typed, 1001, *said])
    assert "".join(piece.reasoning for piece in pieces) == "a</think>b", "text is no mark"
    assert "".join(piece.text for piece in pieces) == "the dog"
    assert stream.num_reasoning_tokens == len(typed) + 2


def test_stop_strings_hold_in_thought_too(tokenizer: Tokenizer) -> None:
    pieces = pieces_of(TextStream(tokenizer, stop=["cat"], reasoning=True), tokenizer.encode(f"{THINK}a cat"))
    assert (pieces[-1].stop, "".join(p.reasoning for p in pieces)) == ("cat", "a ")
