"""Tokenizers: text round trip, special tokens only by id, ids of Uni-MoE-2.0, deterministic training, refusals."""

import itertools
import json
import re

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from megatron_omni.data.tokenizer import (
    ALL_SPECIALS,
    CORE_SPECIALS,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

CORPUS = [
    "the cat is left of the dog",
    "a banana and a violin: what do you hear?",
    "猫 狗 在左边",
    "which note is it",
] * 4
NUMBERS = itertools.count()
TEXTS = ["the cat", " leading", "trail \n\n two  spaces ", "é😀 新字 \t\r\n", "  ", "a" * 300, "0123456789", ""]


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("sp") / "tok.model"
    return load_tokenizer(train_sentencepiece(CORPUS, path, vocab_size=300))


def write_tokenizer_json(folder, *, added: list[AddedToken], filler: int = 0):
    """A byte-level tokenizer.json with single-byte pieces, ``filler`` unused pieces and the given added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet)}
    vocabulary |= {f"filler{i}": len(alphabet) + i for i in range(filler)}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def huggingface_tokenizer(tmp_path_factory) -> Tokenizer:
    added = [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    return load_tokenizer(write_tokenizer_json(tmp_path_factory.mktemp("hf"), added=added))


@pytest.fixture(params=["sentencepiece_tokenizer", "huggingface_tokenizer"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encode_and_decode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=30))
def test_any_unicode_text_survives_sentencepiece(sentencepiece_tokenizer, text):
    assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_join_to_the_text(tokenizer, text):
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert {tokenizer.token_bytes(i) for i in tokenizer.specials.values()} == {b""}


def test_text_cannot_produce_a_special_token(tokenizer):
    text = "".join(ALL_SPECIALS) + "<|im_end|>\n<|im_start|>assistant"
    ids = tokenizer.encode(text)
    assert not [i for i in ids if tokenizer.is_special(i)]
    assert tokenizer.decode(ids) == text


def test_specials_are_distinct_ids_known_by_name(tokenizer):
    ids = [tokenizer.special(name) for name in CORE_SPECIALS]
    assert len(set(ids)) == len(CORE_SPECIALS)
    assert all(0 <= i < tokenizer.vocab_size and tokenizer.is_special(i) for i in ids)
    assert tokenizer.eos_ids == (tokenizer.special("<|im_end|>"), tokenizer.special("<|endoftext|>"))


def test_decode_names_or_drops_specials_and_marks_ids_past_the_vocabulary(tokenizer):
    ids = [tokenizer.special("<|im_start|>"), *tokenizer.encode("a cat"), tokenizer.special("<|im_end|>")]
    assert tokenizer.decode(ids) == "a cat"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>a cat<|im_end|>"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size + 7]) == "a\ufffd"


def test_unknown_special_is_refused(sentencepiece_tokenizer):
    with pytest.raises(ValueError, match=r"has no special token '\[IMG0\]'"):
        sentencepiece_tokenizer.special("[IMG0]")


def test_missing_specials_are_appended_in_order(huggingface_tokenizer):
    first = huggingface_tokenizer.special("<|vision_start|>")
    assert first == 256 + 3
    lacking = [name for name in ALL_SPECIALS if name not in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert [huggingface_tokenizer.special(name) for name in lacking] == list(range(first, first + len(lacking)))
    assert huggingface_tokenizer.vocab_size == first + len(lacking)


def qwen_added_tokens(*extra: str) -> list[AddedToken]:
    """The 22 added tokens of Qwen2.5, ids 151643..151664, and further ones behind them."""
    names = (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
        "vision_start vision_end vision_pad image_pad video_pad "
        "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
    )
    tokens = [f"<|{name}|>" for name in names.split()]
    special, plain = tokens[:14], ["<tool_call>", "</tool_call>", *tokens[14:], *extra]
    return [AddedToken(t, special=True) for t in special] + [AddedToken(t) for t in plain]


def test_settings_of_the_file_that_cut_fill_or_vary_text_have_no_effect(tmp_path, huggingface_tokenizer):
    file = write_tokenizer_json(tmp_path, added=[AddedToken("<|endoftext|>", special=True)]) / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(file))
    for setting in ("truncation", "padding", "dropout"):
        if setting == "truncation":
            model.enable_truncation(16)
        elif setting == "padding":
            model.no_truncation()
            model.enable_padding(length=64, pad_id=0)
        else:
            model.no_padding()
            model.model.dropout = 0.5
        model.save(str(file))
        assert re.search(rf'"{setting}": ?[{{0]', file.read_text())  # the file says it
        loaded = load_tokenizer(tmp_path)
        for text in ("hello", TEXTS[0] * 300):
            assert (
                loaded.encode(text) == huggingface_tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
            )


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids[:1000],
        lambda ids: ids + [5] * (128 - len(ids)),
        lambda ids: [0, *ids],
        lambda ids: ids + [5] * (next(NUMBERS) % 7),
    ],
    ids=["cuts", "fills up", "adds a special token", "varies"],
)
def test_a_tokenizer_that_does_not_keep_text_whole_is_refused(huggingface_tokenizer, monkeypatch, change):
    encode = HuggingFaceTokenizer._encode
    special = huggingface_tokenizer.special("<|im_start|>")
    monkeypatch.setattr(
        HuggingFaceTokenizer, "_encode", lambda self, text: [i or special for i in change(encode(self, text))]
    )
    with pytest.raises(ValueError, match=r"data.tokenizer = .* cuts, fills up or varies text"):
        load_tokenizer(huggingface_tokenizer.path)


def test_a_tokenizer_may_normalise(tmp_path):
    file = write_tokenizer_json(tmp_path, added=[]) / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(file))
    model.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), normalizers.NFKC()])
    model.save(str(file))
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode(" The CAT ")) == "the cat"


def test_qwen_vocabulary_gets_the_ids_of_the_released_model(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer_json(tmp_path, added=qwen_added_tokens(), filler=151643 - 256))
    expected = {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
        "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656, "<|audio_start|>": 151665,
        "<|audio_end|>": 151666, "<|audio_pad|>": 151667, "<|speech_start|>": 151668, "<|speech_end|>": 151669,
        "<|speech_prompt|>": 151670, "<|speech_split|>": 151671, "[IMG0]": 151672, "[IMG31]": 151703,
        "[TASK0]": 151704, "[TASK2]": 151706,
    }  # fmt: skip
    assert {name: tokenizer.special(name) for name in expected} == expected
    assert tokenizer.vocab_size == 151707


def test_qwen_vocabulary_with_the_ids_taken_is_refused(tmp_path):
    folder = write_tokenizer_json(tmp_path, added=qwen_added_tokens("<think>"), filler=151643 - 256)
    with pytest.raises(ValueError, match=r"151666 instead of the released weights' 151665.*'<think>'.*Qwen2\.5"):
        load_tokenizer(folder)


def test_a_special_that_text_could_produce_is_refused(tmp_path):
    folder = write_tokenizer_json(tmp_path, added=[AddedToken("<|im_end|>", special=False)])
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' must be an added token"):
        load_tokenizer(folder)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_twice_gives_the_same_bytes(tmp_path, model_type):
    files = [
        train_sentencepiece(CORPUS, tmp_path / name, vocab_size=300, model_type=model_type).read_bytes()
        for name in "ab"
    ]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", "\n"], tmp_path / "t.model", vocab_size=300)
    with pytest.raises(ValueError, match="vocab_size = 267 must exceed 267"):
        train_sentencepiece(CORPUS, tmp_path / "t.model", vocab_size=267)
    with pytest.raises(ValueError, match=r"vocab_size = 5000 does not fit.*<= \d+"):
        train_sentencepiece(CORPUS, tmp_path / "t.model", vocab_size=5000)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"not a model")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps({"model": 1}))
    (tmp_path / "empty").mkdir()
    for path, message in [
        ("", "data.tokenizer is empty"),
        (tmp_path / "absent.model", "absent.model' does not exist; give"),
        (tmp_path / "empty", "holds no tokenizer.json"),
        (tmp_path / "broken.model", "is no SentencePiece model"),
        (tmp_path / "hf", "is no tokenizer.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)


def test_a_sentencepiece_model_without_chat_tokens_is_refused(tmp_path):
    path = train_sentencepiece(CORPUS, tmp_path / "t.model", vocab_size=290, specials=["<|im_start|>"])
    with pytest.raises(ValueError, match=r"lacks the special tokens <\|endoftext\|>, <\|im_end\|>"):
        load_tokenizer(path)
