"""Answers into sound, token by token: turns one after the other, answers without any, listeners who are slow.

A random speech generator on one rank; what is compared is its sound for the same text, which is the same each time.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.record import Message
from megatron_omni.data.spoken import Speech, voice_prompt
from megatron_omni.data.template import answer_ids
from megatron_omni.data.tokenizer import ALL_SPECIALS, Tokenizer, load_tokenizer, train_sentencepiece
from megatron_omni.generation.engine import Engine
from megatron_omni.generation.speaking import speech_limits
from megatron_omni.generation.speech import Speaker
from megatron_omni.generation.wav import wav_header
from megatron_omni.models.build import build_model
from megatron_omni.serve.speaker_process import take
from megatron_omni.serve.speech_client import SpeechClient
from megatron_omni.serve.speech_link import (
    Hold,
    Say,
    Silence,
    Sounded,
    SpeakerReady,
    SpeechEvent,
    Spoken,
    Told,
    ToSpeaker,
    Transcribed,
)
from megatron_omni.serve.utterances import AHEAD, Utterances
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_speech import MIXTURE, tiny_codec

CONFIG = SpeechConfig(
    num_codes=32, text_vocab_size=360, text_hidden_size=20, prefix_codes=6, least_prefix_codes=3, max_codes=40,
    min_split_tokens=2, max_split_tokens=4, least_codes_per_token=1.5, most_codes_per_token=4.0, voices=["Jenny"],
)  # fmt: skip
HEADER = wav_header(tiny_codec().config.sample_rate)
WORDS = "one two three four five six seven eight nine ten"
Heard = dict[str, list[SpeechEvent]]


def say(name: str, text: str | None = None, **settings: Any) -> Say:
    wanted = {"form": "wav", "voice": "Jenny", "style": None, "temperature": 0.0, "seed": 0} | settings
    return Say(name=name, text=text, **wanted)


def hear(utterances: Utterances, *messages: ToSpeaker, steps: int = 100_000) -> Heard:
    """What follows from these messages, until nothing more does."""
    for message in messages:
        take(utterances, message)
    heard: Heard = {}
    while utterances.busy and (steps := steps - 1):
        for event in utterances.step():
            heard.setdefault(event.name, []).append(event)
    return heard


def sound(events: Sequence[SpeechEvent]) -> bytes:
    """Samples, without the header in front of the first."""
    return b"".join(event.data for event in events if isinstance(event, Sounded)).removeprefix(HEADER)


def transcript(events: Sequence[SpeechEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Transcribed))


def spoken(text: str, content: str | None = None, prompt: str = "") -> Message:
    prompt = prompt or voice_prompt(speaker="Jenny", language="English")
    return Message("assistant", content or text, speech=Speech(spoken=text, prompt=prompt))


def check(rank: Rank, path: str) -> None:
    recipe = Recipe(model=replace(MIXTURE, speech=CONFIG))
    recipe.optim.precision = "fp32"
    model, tokenizer = build_model(recipe, rank.initialize(recipe.parallel)), load_tokenizer(path)
    pg = model.language.pg_collection
    limits = speech_limits(CONFIG, batch_size=4)
    with Engine(model, tokenizer=tokenizer, pg=pg, limits=limits) as engine, engine.leading():
        utterances = Utterances(Speaker(engine, tiny_codec(), tokenizer, CONFIG))
        whole = {text: sound(hear(utterances, say("x", text))["x"]) for text in ("seven two", f"{WORDS}.", "one")}
        assert all(whole.values()) and len(set(whole.values())) == 3
        for case in CASES:
            case(utterances, tokenizer, whole)
            assert not utterances._sounds and not utterances.busy, case.__name__


def turns_follow_each_other(utterances: Utterances, tokenizer: Tokenizer, whole: dict[str, bytes]) -> None:
    """Token by token, with text around them, the second not ended."""
    first, second = (answer_ids(spoken(text), tokenizer) for text in ("seven two", f"{WORDS}."))
    ids = [*tokenizer.encode("ten "), *first, *tokenizer.encode(" nine"), *second[:-1]]
    heard = hear(utterances, say("a"), *(Told("a", (token,)) for token in ids), Told("a", (), True))["a"]
    assert sound(heard) == whole["seven two"] + whole[f"{WORDS}."]
    assert transcript(heard) == f"seven two{WORDS}."
    end = heard[-1]
    assert isinstance(end, Spoken) and end.error is None and end.pieces > 2
    assert end.codes * tiny_codec().config.hop_size == round(end.seconds * tiny_codec().config.sample_rate)


def sound_comes_before_the_answer_ends(utterances: Utterances, tokenizer: Tokenizer, whole: dict[str, bytes]) -> None:
    ids = answer_ids(spoken(f"{WORDS}."), tokenizer)
    early = hear(utterances, say("a"), Told("a", tuple(ids[:-3])))["a"]
    assert sound(early) and not isinstance(early[-1], Spoken)
    late = hear(utterances, Told("a", tuple(ids[-3:]), True))["a"]
    assert sound(early) + sound(late) == whole[f"{WORDS}."]


def an_answer_without_turns_is_spoken_whole(
    utterances: Utterances, tokenizer: Tokenizer, whole: dict[str, bytes]
) -> None:
    ids = tokenizer.encode("<think>\nten nine\n</think>\n\nseven two")
    assert hear(utterances, say("a"), Told("a", tuple(ids))) == {}
    heard = hear(utterances, Told("a", (), True))["a"]
    assert sound(heard) == whole["seven two"] and transcript(heard) == "seven two"
    silent = hear(utterances, say("a"), Told("a", (), True))["a"]
    assert sound(silent) == b"" and isinstance(silent[-1], Spoken) and silent[-1].error is None


def a_turn_without_a_prompt_takes_the_voice_that_was_asked_for(
    utterances: Utterances, tokenizer: Tokenizer, whole: dict[str, bytes]
) -> None:
    ids = answer_ids(spoken("seven two", prompt="one"), tokenizer)
    bare = [token for i, token in enumerate(ids) if i not in range(1, 1 + len(tokenizer.encode("one")))]
    assert sound(hear(utterances, say("a"), Told("a", tuple(bare), True))["a"]) == whole["seven two"]
    assert sound(hear(utterances, say("a"), Told("a", tuple(ids), True))["a"]) != whole["seven two"]


def a_slow_listener_holds_his_own_sound(utterances: Utterances, tokenizer: Tokenizer, whole: dict[str, bytes]) -> None:
    text = f"{WORDS}. " * 6
    expected = sound(hear(utterances, say("b", text))["b"])
    early = hear(utterances, say("a", text), steps=6).get("a", [])
    held = hear(utterances, Hold("a", True), say("c", "one"))
    assert sound(held["c"]) == whole["one"]
    early += held.get("a", [])
    assert 0 < len(sound(early)) < len(expected) and not utterances.busy
    assert sound(early) + sound(hear(utterances, Hold("a", False))["a"]) == expected


def white_space_that_no_piece_holds_stalls_nothing(
    utterances: Utterances, tokenizer: Tokenizer, whole: dict[str, bytes]
) -> None:
    text = "one" + " \n" * AHEAD + "two" + "\n " * AHEAD + "three"
    end = hear(utterances, say("a", text))["a"][-1]
    assert isinstance(end, Spoken) and end.error is None and end.pieces >= 1


def what_is_not_heard_is_not_spoken(utterances: Utterances, tokenizer: Tokenizer, whole: dict[str, bytes]) -> None:
    hear(utterances, say("a", f"{WORDS}. " * 6), steps=4)
    assert hear(utterances, Silence("a"), Silence("b"), Told("a", (1,)), Hold("a", True)) == {}


def what_cannot_be_spoken_says_why(utterances: Utterances, tokenizer: Tokenizer, whole: dict[str, bytes]) -> None:
    for said, message in (
        (say("a", "one", voice="Nobody"), "has not learned; its voices are Jenny"),
        (say("a", "one", voice=None, style="ten " * 2000), "at most 1000"),
    ):
        end = hear(utterances, said)["a"][-1]
        assert isinstance(end, Spoken) and end.error is not None and message in end.error


CASES: tuple[Callable[[Utterances, Tokenizer, dict[str, bytes]], None], ...] = (
    turns_follow_each_other,
    sound_comes_before_the_answer_ends,
    an_answer_without_turns_is_spoken_whole,
    a_turn_without_a_prompt_takes_the_voice_that_was_asked_for,
    a_slow_listener_holds_his_own_sound,
    white_space_that_no_piece_holds_stalls_nothing,
    what_is_not_heard_is_not_spoken,
    what_cannot_be_spoken_says_why,
)


def test_answers_become_sound(tmp_path: Path) -> None:
    """All of :data:`CASES` with one model."""
    text = [f"{WORDS}. <think> </think> {voice_prompt(speaker='Jenny', language='English')}"]
    path = train_sentencepiece(text * 50, tmp_path / "t.model", vocab_size=360, model_type="bpe", specials=ALL_SPECIALS)
    run_ranks(check, 1, str(path))


@pytest.mark.parametrize(("tokenizer", "same"), [("aa", True), ("bb", False), ("", True)])
def test_a_speaker_of_another_tokenizer_is_none(tokenizer: str, same: bool, capfd: pytest.CaptureFixture[str]) -> None:
    import asyncio

    async def told() -> str | None:
        ours, theirs = Pipe()
        client = SpeechClient(ours)
        theirs.send(SpeakerReady(name="s", created=0, voices=(), sample_rate=24_000, tokenizer="aa"))
        waiting = asyncio.ensure_future(client.until_it_ends(tokenizer))
        await asyncio.wait([waiting], timeout=0.2 if same else 20)
        assert waiting.done() != same
        waiting.cancel()
        asyncio.get_running_loop().remove_reader(ours.fileno())
        client.close()
        return client.failed

    failed = asyncio.run(told())
    assert (failed is None) == same and ("tokenizer is another" in capfd.readouterr().err) != same
