"""Where long text is cut: golden lists in English and Chinese, nothing lost, nothing inside of a word or a number."""

import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.data.speech_pieces import PieceSplitter, ended, pieces, spoken_ids
from megatron_omni.data.tokenizer import ALL_SPECIALS, load_tokenizer, train_sentencepiece

CONFIG = SpeechConfig()
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
ENGLISH = [
    "Dr. Smith paid $1,234.56,", " the price in the year 2026;", " then he left the town!",
    ' "Why did he go?"', " she asked me, looking up (quite lost.)", " We read www.example.org for version 3.14 of it.",
]  # fmt: skip
CHINESE = [
    "今天天气很好，",
    "我们去公园吧。",
    "你知道圆周率是3.14吗？",
    "他花了一百二十三万元，",
    "买房子！“然后呢？”",
    "大家都回家了。",
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A byte-level tokenizer that splits as Qwen's does, with a token for every English word and Chinese character here."""
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    characters = ["".join(ENGLISH), WORDS, *(c for c in "".join(CHINESE) if c > "\u3000")]
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=list(ALL_SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    model.train_from_iterator(characters * 2, trainer)
    folder = tmp_path_factory.mktemp("qwen")
    model.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """SentencePiece with a token a letter, three bytes a Chinese character."""
    path = tmp_path_factory.mktemp("letters") / "t.model"
    return load_tokenizer(
        train_sentencepiece([WORDS], path, vocab_size=256 + 1 + len(ALL_SPECIALS) + 17, specials=ALL_SPECIALS)
    )


def texts(text, tokenizer, config=CONFIG) -> list[str]:
    return [tokenizer.decode(piece) for piece in pieces(text, tokenizer, config)]


def test_golden_english(qwen):
    assert texts("".join(ENGLISH), qwen) == ENGLISH


def test_golden_chinese(qwen):
    assert texts("".join(CHINESE), qwen) == CHINESE


def test_least_tokens_before_a_cut(qwen):
    text = "one two three. four five six. seven eight."
    assert texts(text, qwen) == ["one two three. four five six.", " seven eight."]
    wide = SpeechConfig(min_split_tokens=4, max_split_tokens=16)
    assert texts(text, qwen, wide) == ["one two three.", " four five six.", " seven eight."]


def test_forced_cut_at_a_word(qwen, letters):
    cut = [" ".join(WORDS.split()[:16]), " seventeen and one more."]
    assert texts("".join(cut), qwen) == cut
    assert texts("one two three four five", letters) == ["one two three four ", "five."]


def test_a_new_line_ends_and_stays_with_its_sentence(qwen):
    assert texts("one two three four five six\n\nseven eight", qwen) == [
        "one two three four five six\n\n",
        "seven eight.",
    ]
    assert texts("one two three four five six.\nseven eight", qwen) == [
        "one two three four five six.\n",
        "seven eight.",
    ]


@pytest.mark.parametrize(
    "number", ["3.14159", "1,234,567", "12 000 000", "三万五千", "3万", "二〇二六", "50%", "10:30", "1.5.2"]
)
def test_no_cut_inside_of_a_number(qwen, letters, number):
    for tokenizer in (qwen, letters):
        for before in range(1, 24):
            text = f"{'ab ' * before}{number} {'cd ' * 20}"
            found = texts(text, tokenizer)
            assert len(found) > 1 and sum(number in piece for piece in found) == 1, found


@pytest.mark.parametrize("word", ["extraordinary", "www.a.org/b?c=d,e", "don't", "U.S.A", "well-known", "naïve"])
def test_no_cut_inside_of_a_word(qwen, letters, word):
    for tokenizer in (qwen, letters):
        for before in range(1, 24):
            found = texts(f"{'ab ' * before}{word} {'cd ' * 20}", tokenizer)
            assert len(found) > 1 and sum(word in piece for piece in found) == 1, found


def test_marks_and_quotes_stay_with_their_sentence(qwen):
    assert texts('One two three four five?!" (six) seven eight', qwen) == [
        'One two three four five?!"',
        " (six) seven eight.",
    ]
    assert texts("one two three four five... six", qwen) == ["one two three four five...", " six."]
    assert texts("one two three four five six. 😀 !!", qwen) == ["one two three four five six. 😀 !!"]


@pytest.mark.parametrize(
    "text, end",
    [("cat", "cat."), ("cat!", "cat!"), ('"cat."', '"cat."'), ("猫。", "猫。"), ("cat \n", "cat."), ("cat:", "cat:")],
)
def test_the_last_piece_has_an_end(qwen, letters, text, end):
    for tokenizer in (qwen, letters):
        assert texts(text, tokenizer) == [end]
        assert tokenizer.decode(spoken_ids(f"  {text}", tokenizer, last=True)) == end


def test_a_piece_has_the_tokens_that_it_has_alone(qwen):
    first, second = pieces("one two three four five six. seven eight.", qwen, CONFIG)
    assert spoken_ids(second, qwen) == qwen.encode("seven eight.") != second
    assert spoken_ids(first, qwen) == first == ended(first, qwen)


@pytest.mark.parametrize("text", ["", " ", "\n", "...", "?!", "。。。", "😀 !", "!" * 5000])
def test_nothing_to_say_is_no_piece(qwen, letters, text):
    assert texts(text, qwen) == texts(text, letters) == []


@pytest.mark.parametrize("unit", ["x", "a ", "你", "the cat. ", "สวัสดี", "a!!!!!!!!!!!!!!!!!!"])
def test_fifty_thousand_characters(qwen, letters, unit):
    text = (unit * 50_000)[:50_000]
    for tokenizer in (qwen, letters):
        start = time.process_time()
        found = pieces(text, tokenizer, CONFIG)
        assert "".join(map(tokenizer.decode, found)).startswith(text.rstrip())
        assert max(map(len, found)) <= 2 * 4 * CONFIG.max_split_tokens + 3
        assert time.process_time() - start < 20


def test_marks_without_end_are_left_out(qwen):
    (piece,) = texts("cat " + "!" * 50_000 + " dog", qwen, SpeechConfig(max_split_tokens=2, min_split_tokens=1))[:1]
    assert piece.startswith("cat") and len(piece) < 60


TEXT = st.lists(
    st.sampled_from([*'ab1你一。，.,?! \n"”(“', "one", " two", "3.5", "www.a.b", "... ", "é", "😀", "สวั", "e\u0301"]),
    max_size=80,
).map("".join)


@given(TEXT, st.integers(1, 6), st.integers(6, 16))
def test_together_the_pieces_are_the_text(qwen, letters, text, least, most):
    config = SpeechConfig(min_split_tokens=least, max_split_tokens=most)
    for tokenizer in (qwen, letters):
        tokens = tokenizer.encode(text)
        splitter = PieceSplitter(tokenizer, config)
        came = [splitter.push(token) for token in tokens]
        found = [piece for piece in (*came, splitter.finish()) if piece is not None]
        assert found == pieces(text, tokenizer, config)
        together = [token for piece in found for token in piece]
        if not any(map(str.isalnum, text)):
            assert together == []
        elif ended(tokens, tokenizer) == tokens:
            assert together == tokens
        else:
            assert tokenizer.decode(together) == text.rstrip() + "."
        for piece in found:
            assert any(map(str.isalnum, tokenizer.decode(piece))) and "\ufffd" not in tokenizer.decode(piece)


def test_one_token_of_look_ahead(qwen):
    """A piece is known when the token behind it came."""
    splitter = PieceSplitter(qwen, CONFIG)
    first, second = pieces("one two three four five six. seven eight.", qwen, CONFIG)
    came = [splitter.push(token) for token in (*first, second[0])]
    assert came == [None] * len(first) + [first]
    assert [splitter.push(token) for token in second[1:]] == [None] * (len(second) - 1)
    assert splitter.finish() == second and splitter.finish() is None
