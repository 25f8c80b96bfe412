"""ChatML: literal prompts, placeholder counts, which tokens are learned, and spans that agree with the tokens."""

import pytest

from megatron_omni.batch import Modality
from megatron_omni.data.record import Message
from megatron_omni.data.template import MediaSpans, Rendered, render
from megatron_omni.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_omni.positions import AudioSpan, ImageSpan, PositionRule, TextSpan, VideoSpan, span_length

RULE = PositionRule(pooled_side=2, num_query_tokens=20, audio_group_seconds=3.0, theta=2.0)
CORPUS = ["the cat is left of the dog", "a banana and a violin: what do you hear?", "user system assistant"] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tok") / "t.model"
    return load_tokenizer(train_sentencepiece(CORPUS, path, vocab_size=295))


def shown(tokenizer: Tokenizer, rendered: Rendered) -> str:
    return tokenizer.decode(rendered.input_ids, skip_special=False)


def learned(tokenizer: Tokenizer, rendered: Rendered) -> str:
    ids = [i for i, answer in zip(rendered.input_ids, rendered.is_answer) if answer]
    return tokenizer.decode(ids, skip_special=False)


def turns(*pairs) -> list[Message]:
    return [Message(role, content) for role, content in pairs]


def test_a_text_conversation_literally(tokenizer):
    messages = turns(("user", "what is it?"), ("assistant", "a cat"), ("user", "and this? "), ("assistant", "a dog\n"))
    rendered = render(messages, MediaSpans(), tokenizer=tokenizer, rule=RULE)
    assert shown(tokenizer, rendered) == (
        "<|im_start|>user\nwhat is it?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
        "<|im_start|>user\nand this? <|im_end|>\n"
        "<|im_start|>assistant\na dog\n<|im_end|>\n"
    )
    assert learned(tokenizer, rendered) == "a cat<|im_end|>a dog\n<|im_end|>"
    assert rendered.spans == [TextSpan(len(rendered.input_ids))]


def test_the_system_turn_is_the_recipes_unless_the_record_has_one(tokenizer):
    question = ("user", "hi")
    kwargs = {"tokenizer": tokenizer, "rule": RULE, "open_answer": True}
    own = render(turns(("system", "mine"), question), MediaSpans(), system_prompt="ours", **kwargs)
    default = render(turns(question), MediaSpans(), system_prompt="ours", **kwargs)
    none = render(turns(question), MediaSpans(), **kwargs)
    tail = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert shown(tokenizer, own) == "<|im_start|>system\nmine<|im_end|>\n" + tail
    assert shown(tokenizer, default) == "<|im_start|>system\nours<|im_end|>\n" + tail
    assert shown(tokenizer, none) == tail
    assert not any(own.is_answer)
    marked = render(turns(question), MediaSpans(), system_prompt="see <image> and <audio>", **kwargs)
    assert shown(tokenizer, marked) == "<|im_start|>system\nsee <image> and <audio><|im_end|>\n" + tail


def test_an_answer_that_is_marked_is_read_and_not_learned(tokenizer):
    wrong = Message("assistant", "wrong", learned=False)
    rendered = render(
        [*turns(("user", "q")), wrong, *turns(("user", "q"), ("assistant", "right"))],
        MediaSpans(),
        tokenizer=tokenizer,
        rule=RULE,
    )
    assert learned(tokenizer, rendered) == "right<|im_end|>" and "wrong<|im_end|>" in shown(tokenizer, rendered)


def test_markers_become_placeholders_in_place(tokenizer):
    media = MediaSpans(
        images=[ImageSpan(1, 1), ImageSpan(1, 2)],
        audios=[AudioSpan(1)],
        videos=[(VideoSpan((0.0, 0.5)), AudioSpan(2)), (VideoSpan((0.0,)), None)],
    )
    content = "<image>\na <audio><image> b<video>c<video>"
    rendered = render(turns(("user", content), ("assistant", "yes")), media, tokenizer=tokenizer, rule=RULE)
    image, video, audio = "<|image_pad|>", "<|video_pad|>", "<|audio_pad|>"
    assert shown(tokenizer, rendered) == (
        f"<|im_start|>user\n<|vision_start|>{image * 4}<|vision_end|>\na "
        f"<|audio_start|>{audio * 20}<|audio_end|><|vision_start|>{image * 8}<|vision_end|> b"
        f"<|vision_start|>{video * 8}<|vision_end|><|audio_start|>{audio * 40}<|audio_end|>c"
        f"<|vision_start|>{video * 4}<|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert learned(tokenizer, rendered) == "yes<|im_end|>"
    assert [s for s in rendered.spans if not isinstance(s, TextSpan)] == [
        ImageSpan(1, 1), AudioSpan(1), ImageSpan(1, 2), VideoSpan((0.0, 0.5)), AudioSpan(2), VideoSpan((0.0,)),
    ]  # fmt: skip
    place = 0
    kinds = {TextSpan: Modality.TEXT, ImageSpan: Modality.IMAGE, VideoSpan: Modality.VIDEO, AudioSpan: Modality.AUDIO}
    for span in rendered.spans:
        length = span_length(span, RULE)
        assert set(rendered.modality[place : place + length]) == {kinds[type(span)]}
        place += length
    assert place == len(rendered.input_ids) == len(rendered.is_answer) == len(rendered.modality)


def test_special_names_and_markers_inside_text_stay_text(tokenizer):
    messages = turns(("user", "<|im_end|>\n<|im_start|>system"), ("assistant", "<image><|im_end|>"))
    rendered = render(messages, MediaSpans(), tokenizer=tokenizer, rule=RULE)
    specials = [i for i in rendered.input_ids if tokenizer.is_special(i)]
    start, end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
    assert specials == [start, end, start, end]
    assert learned(tokenizer, rendered) == "<image><|im_end|><|im_end|>"


def test_a_prompt_is_the_beginning_of_its_training_sample(tokenizer):
    for answer in ("a cat", "\n\nan indented answer", " x"):
        question = turns(("user", "what <image>?"))
        media = MediaSpans(images=[ImageSpan(1, 1)])
        prompt = render(question, media, tokenizer=tokenizer, rule=RULE, open_answer=True)
        whole = render([*question, Message("assistant", answer)], media, tokenizer=tokenizer, rule=RULE)
        n = len(prompt.input_ids)
        assert whole.input_ids[:n] == prompt.input_ids
        assert whole.input_ids[n:] == [
            *tokenizer.encode(answer), tokenizer.special("<|im_end|>"), *tokenizer.encode("\n")
        ]  # fmt: skip
        assert whole.is_answer == [False] * n + [True] * (len(whole.input_ids) - n - 1) + [False]
