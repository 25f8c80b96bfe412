"""Speaking: codes are those of forwards without a cache, whatever is spoken beside them and on every layout; sound comes
while codes do, all of it and in order.

A random mixture of two layers, a random codec of 16 samples a code, and a tokenizer of a few words.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample
from megatron_omni.data.speech_pieces import pieces, spoken_ids
from megatron_omni.data.speech_sequence import speech_sample
from megatron_omni.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_omni.generation.batches import generate_windows
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.request import Sampling, Wanted
from megatron_omni.generation.speaking import SoundFiles, said_of, speak_all, speech_limits
from megatron_omni.generation.speech import (
    PieceEvent,
    SoundEvent,
    Speaker,
    SpeechEvent,
    SpokenEvent,
    Utterance,
    code_limits,
)
from megatron_omni.models.build import build_model
from megatron_omni.models.generators.codec import Codec, StreamingDecoder
from megatron_omni.segments import prefix
from tests.distributed.generation_requests import extended
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_speech import MIXTURE, tiny_codec

CONFIG = SpeechConfig(
    num_codes=32, text_vocab_size=320, text_hidden_size=20, prefix_codes=6, least_prefix_codes=3, max_codes=40,
    min_split_tokens=2, max_split_tokens=4, least_codes_per_token=1.5, most_codes_per_token=4.0,
)  # fmt: skip
WORDS = "one two three four five six seven eight nine ten"
SAMPLED = Sampling(temperature=0.7, seed=3)
UTTERANCES = [
    Utterance(name="long", prompt="voice: Jenny;", text=f"{WORDS}, {WORDS}. {WORDS}! {WORDS}"),
    Utterance(name="sampled", prompt="voice: Brian;", text=f"two one. {WORDS}.", sampling=SAMPLED),
    Utterance(name="none", prompt="voice: Brian;", text=f"two one. {WORDS}.", sampling=SAMPLED, context="none"),
    Utterance(name="nothing", prompt="voice: Jenny;", text=" ... !? "),
    Utterance(name="empty", prompt="voice: Jenny;"),
    Utterance(name="word", prompt="any", text="seven"),
]
Told = dict[str, list[SpeechEvent]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speaking") / "tokenizer.model"
    train_sentencepiece([f"{WORDS}, {WORDS}. voice: Jenny; Brian!"] * 50, path, vocab_size=320, model_type="bpe")
    return path


def built(rank: Rank, path: Path, **parallel: int) -> tuple[Any, Tokenizer]:
    sizes = {f"{name}_model_parallel_size": size for name, size in parallel.items()}
    recipe = Recipe(model=replace(MIXTURE, speech=CONFIG), parallel=ParallelConfig(**sizes))
    recipe.optim.precision = "fp32"
    return build_model(recipe, rank.initialize(recipe.parallel)), load_tokenizer(str(path))


def by_name(events: Iterable[SpeechEvent]) -> Told:
    told: Told = {}
    for event in events:
        told.setdefault(event.name, []).append(event)
    return told


def pieces_in(told: Told, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    return [(e.text, e.codes, e.cut) for e in told[name] if isinstance(e, PieceEvent)]


def sound_of(events: Iterable[SpeechEvent]) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(event.wave for event in events if isinstance(event, SoundEvent))])


def one_rank(rank: Rank, path: Path) -> dict[str, Any]:
    model, tokenizer = built(rank, path)
    pg, codec = model.language.pg_collection, tiny_codec()

    def speaker(limits: EngineLimits | None = None, **settings: Any) -> Speaker:
        engine = Engine(model, tokenizer=tokenizer, pg=pg, limits=limits or speech_limits(CONFIG, batch_size=8))
        return Speaker(engine, codec, tokenizer, CONFIG, **settings)

    result: dict[str, Any] = {"alone": {}}
    for utterance in UTTERANCES:
        result["alone"] |= by_name(speaker(speech_limits(CONFIG, batch_size=1)).events([utterance]))
    result["together"] = by_name(speaker().events(UTTERANCES))
    tight = speaker(EngineLimits(max_running=4, max_batch_tokens=48, cache_tokens=224))
    result["tight"] = by_name(tight.events(UTTERANCES))
    result["set back"] = tight.engine.state().set_back
    result["fixed"] = by_name(
        speaker(replace(speech_limits(CONFIG, batch_size=4), decoding="fixed")).events(UTTERANCES)
    )
    result["release"] = by_name(speaker(release=True).events(UTTERANCES[:1]))
    result["speak"] = list(speaker().speak(UTTERANCES[0].text, UTTERANCES[0].prompt))
    result["fed"] = fed(speaker(), tokenizer)
    result["cancelled"] = cancelled(speaker())
    result["kept"] = most_kept(speaker())
    result["refused"] = refusals(
        speaker(), speaker(EngineLimits(max_running=2, max_batch_tokens=20, cache_tokens=4096))
    )
    model.eval()
    result["expected"] = {name: expected(model, tokenizer, name, result["alone"]) for name in ("long", "word")}
    result["scored"] = scored(model, tokenizer)
    result["by one forward"] = [by_one_forward(model, prompt, chosen) for prompt, chosen, _ in result["scored"]]
    result["expected release"] = expected(model, tokenizer, "long", result["release"], release=True)
    result["decoded"] = {name: decoded(codec, told) for name, told in result["alone"].items()}
    with torch.no_grad():
        model.language.output_layer.weight[0, 0] = torch.nan
    result["spoilt"] = by_name(speaker().events(UTTERANCES[:1]))
    result["pieces"] = {
        u.name: [spoken_ids(p, tokenizer) for p in pieces(u.text, tokenizer, CONFIG)] for u in UTTERANCES
    }
    return result


@torch.no_grad()
def expected(model: Any, tokenizer: Tokenizer, name: str, told: Told, *, release: bool = False) -> list[Any]:
    """(codes that were spoken, the best of those allowed by one forward over each piece, whether it ends)."""
    ids, found, before = CONFIG.ids, [], []
    utterance = next(u for u in UTTERANCES if u.name == name)
    for text, codes, cut in pieces_in(told, name):
        sample = speech_sample(
            ids,
            prompt=tokenizer.encode(str(utterance.prompt)),
            prefix=() if release else before[-CONFIG.prefix_codes :],
            text=text,
            codes=codes,
        )
        if release:
            sample = replace(sample, attention=None)
        logits = model(collate([sample], pad_id=ids.padding), step=0, stochastic=False, compute_loss=False)[0]
        logits = logits[sample.length - len(codes) - 1 : sample.length].clone()
        allowed = torch.zeros(len(logits), ids.num_outputs, dtype=torch.bool)
        allowed[:, : ids.num_codes] = True
        least, most = code_limits(CONFIG, len(text))
        allowed[least:, ids.codes_end] = True
        best = logits.masked_fill(~allowed, -torch.inf).argmax(-1).tolist()
        found.append((list(codes), best[:-1], best[-1] == ids.codes_end, cut, len(codes), least, most))
        before += codes
    return found


def decoded(codec: Codec, events: list[SpeechEvent]) -> tuple[torch.Tensor, torch.Tensor]:
    """What was heard, and the sound of all codes pushed into a decoder at once."""
    decoder = StreamingDecoder(codec)
    codes = [code for event in events if isinstance(event, PieceEvent) for code in event.codes]
    return sound_of(events), torch.cat([decoder.push(codes), decoder.finish()])


def fed(speaker: Speaker, tokenizer: Tokenizer) -> list[SpeechEvent]:
    """The long text token by token, a step of the engine after each."""
    speaker.submit(replace(UTTERANCES[0], text=""), open=True)
    events: list[SpeechEvent] = []
    assert not speaker.busy, "an open text that says nothing yet"
    for token in tokenizer.encode(str(UTTERANCES[0].text)):
        speaker.feed("long", [token])
        assert speaker.busy
        events += speaker.step()
    while speaker.busy:
        events += speaker.step()
    speaker.feed("long", end=True)
    while speaker.busy:
        events += speaker.step()
    return events


def cancelled(speaker: Speaker) -> dict[str, Any]:
    for utterance in UTTERANCES[:2]:
        speaker.submit(utterance)
    events = [event for _ in range(5) for event in speaker.step()]
    speaker.cancel("long")
    speaker.cancel("unknown")
    while speaker.busy:
        events += speaker.step()
    return {"told": by_name(events), "taken": speaker.engine.state().cache_tokens}


def most_kept(speaker: Speaker) -> tuple[int, int]:
    """Codes that are kept of a text of many pieces at any time, and all of its codes."""
    speaker.submit(Utterance(name="very long", prompt="any", text=f"{WORDS}. " * 12))
    kept, events = 0, []
    while speaker.busy:
        events += speaker.step()
        for speech in speaker._speeches.values():
            under_way = sum(len(piece.codes) for piece in speech.under_way)
            kept = max(kept, under_way + len(speech.before) + len(speech.decoder._codes))
    (end,) = (event for event in events if isinstance(event, SpokenEvent))
    return kept, end.codes


def refusals(speaker: Speaker, small: Speaker) -> dict[str, str]:
    def said(speaker: Speaker, **changes: Any) -> str:
        try:
            speaker.submit(replace(UTTERANCES[0], **changes))
        except ValueError as error:
            return str(error)
        return ""

    told = {
        "no prompt": said(speaker, prompt=""),
        "long prompt": said(speaker, prompt="one " * 2000),
        "foreign": said(speaker, text=[10_000]),
        "context": said(speaker, context="all"),
        "small": said(small, prompt="one two three four five six seven eight nine ten"),
    }
    speaker.submit(UTTERANCES[0])
    told["name"] = said(speaker)
    try:
        other = tiny_codec()
        other.config.num_codes = 64
        Speaker(speaker.engine, other, speaker.tokenizer, CONFIG)
    except ValueError as error:
        told["codec"] = str(error)
    return told


@pytest.fixture(scope="module")
def found(tokenizer: Path) -> dict[str, Any]:
    return run_ranks(one_rank, 1, tokenizer)[0]


def test_codes_are_those_of_forwards_without_a_cache(found: dict[str, Any]) -> None:
    ends = set()
    for name in ("long", "word"):
        for codes, best, end_is_best, cut, count, least, most in found["expected"][name]:
            assert codes == best
            assert least <= count <= most and cut == (count == most)
            assert cut or end_is_best
            ends.add(cut)
    assert ends == {True, False}, "some pieces end, some are cut"


def test_pieces_are_those_of_training(found: dict[str, Any]) -> None:
    for name, wanted in found["pieces"].items():
        assert [list(text) for text, _, _ in pieces_in(found["alone"], name)] == wanted
    assert len(found["pieces"]["long"]) > 4


@pytest.mark.parametrize("company", ["together", "tight", "fixed"])
def test_company_changes_nothing(found: dict[str, Any], company: str) -> None:
    assert found["set back"] > 0
    for utterance in UTTERANCES:
        name = utterance.name
        assert pieces_in(found[company], name) == pieces_in(found["alone"], name), name
        assert torch.equal(sound_of(found[company][name]), sound_of(found["alone"][name]))


def test_sound_is_whole_and_comes_while_codes_do(found: dict[str, Any]) -> None:
    for name, (heard, whole) in found["decoded"].items():
        assert torch.equal(heard, whole)
        end = found["alone"][name][-1]
        assert isinstance(end, SpokenEvent) and end.samples == len(heard) == 16 * end.codes
    events = found["alone"]["long"]
    first = next(i for i, event in enumerate(events) if isinstance(event, SoundEvent))
    spoken = sum(len(event.codes) for event in events[:first] if isinstance(event, PieceEvent))
    assert spoken <= 50, "the first sound waits for no more than a window and what is seen behind it"
    assert torch.equal(torch.cat(found["speak"]), sound_of(events))


def test_a_text_that_says_nothing_ends_without_sound(found: dict[str, Any]) -> None:
    for name in ("nothing", "empty"):
        (end,) = found["together"][name]
        assert end == SpokenEvent(name=name, pieces=0, codes=0, samples=0, cut=0)


def test_context_changes_all_but_the_first_piece(found: dict[str, Any]) -> None:
    (first, *others), (first_alone, *alone) = (pieces_in(found["alone"], name) for name in ("sampled", "none"))
    assert first == first_alone and len(others) > 1
    assert all(a[0] == b[0] and a[1] != b[1] for a, b in zip(others, alone, strict=True))


def test_the_released_way_has_neither_context_nor_mask(found: dict[str, Any]) -> None:
    for codes, best, *_ in found["expected release"]:
        assert codes == best
    assert pieces_in(found["release"], "long") != pieces_in(found["alone"], "long")


def test_a_text_that_comes_token_by_token_is_spoken_alike(found: dict[str, Any]) -> None:
    told = by_name(found["fed"])
    assert pieces_in(told, "long") == pieces_in(found["alone"], "long")
    assert torch.equal(sound_of(told["long"]), sound_of(found["alone"]["long"]))


def test_cancelling_ends_one_and_leaves_the_others(found: dict[str, Any]) -> None:
    told = found["cancelled"]["told"]
    assert told["long"][-1].cancelled and not told["sampled"][-1].cancelled and found["cancelled"]["taken"] == 0
    assert pieces_in(told, "sampled") == pieces_in(found["alone"], "sampled")


def test_what_is_kept_does_not_grow_with_the_text(found: dict[str, Any]) -> None:
    kept, codes = found["kept"]
    assert kept <= CONFIG.max_codes + CONFIG.prefix_codes + 40 + 40 + 10 and codes > 3 * kept


def test_what_cannot_be_spoken_is_refused(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert "prompt has no token" in refused["no prompt"] and "at most 1000" in refused["long prompt"]
    assert "token 10000 of the prompt or the text" in refused["foreign"] and "context is 'all'" in refused["context"]
    assert "raise max_batch_tokens (20)" in refused["small"]
    assert "'long'" in refused["name"] and "the codec has 64 codes" in refused["codec"]


def test_numbers_that_are_none_end_the_utterance(found: dict[str, Any]) -> None:
    (end,) = found["spoilt"]["long"]
    assert isinstance(end, SpokenEvent) and "not finite" in str(end.error)


# --------------------------------------------------------------------------------------------------------------- layouts


def scored(model: Any, tokenizer: Tokenizer) -> list[tuple[Sample, list[int], list[float]]]:
    """Prompts of two lengths, what was chosen after them, computed together, and its log-probabilities; on every rank."""
    ids = CONFIG.ids
    wanted = Wanted(max_new_tokens=20, logprobs=0, ignore_eos=True, banned_ids=(ids.codes_end, ids.padding))
    prompts = [
        speech_sample(
            ids, prompt=tokenizer.encode("any"), prefix=range(n), text=tokenizer.encode(WORDS[: 7 * n]), codes=None
        )
        for n in (1, 5)
    ]
    (window,) = generate_windows(
        model, prompts.__getitem__, range(2), wanted=wanted, tokenizer=tokenizer, pg=model.language.pg_collection
    )
    answers = [window[1][n][0] for n in range(2)]
    return [(prompt, answer.ids, answer.logprobs) for prompt, answer in zip(prompts, answers, strict=True)]


@torch.no_grad()
def by_one_forward(model: Any, prompt: Sample, chosen: list[int]) -> list[float]:
    """Log-probabilities of what was ``chosen`` after ``prompt``, without a cache."""
    whole = replace(extended(prompt, chosen), attention=prefix(prompt.length - 1, len(chosen) + 1))
    logits = model(collate([whole], pad_id=0), step=0, stochastic=False, compute_loss=False)[0]
    logprobs = logits[prompt.length - 1 : whole.length - 1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(chosen).unsqueeze(1)).squeeze(1).tolist()


def test_log_probabilities_are_those_of_one_forward(found: dict[str, Any]) -> None:
    for (_, chosen, told), expected in zip(found["scored"], found["by one forward"], strict=True):
        assert len(chosen) == 20 and not {CONFIG.ids.codes_end, CONFIG.ids.padding} & set(chosen)
        np.testing.assert_allclose(told, expected, rtol=0, atol=1e-5)


def on_layout(rank: Rank, path: Path, parallel: dict[str, int], out: Path) -> tuple[dict[str, SpokenEvent], Told, Any]:
    """How all ended, on every rank, and what this one heard; its sounds in files; log-probabilities."""
    model, tokenizer = built(rank, path, **parallel)
    logprobs = [told for *_, told in scored(model, tokenizer)]
    codec, events = tiny_codec(), []
    with SoundFiles(lambda name: out / f"{name}.wav", codec.sample_rate) as files:

        def take(event: SpeechEvent) -> None:
            events.append(event)
            files.take(event)

        ended = speak_all(model, UTTERANCES, codec=codec, tokenizer=tokenizer, batch_size=2, take=take)
    return ended, by_name(events), logprobs


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}], ids=str)
def test_every_layout_says_the_same(
    parallel: dict[str, int], tokenizer: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    (ended, first, logprobs), (also, second, others) = run_ranks(on_layout, 2, tokenizer, parallel, tmp_path)
    told = first | second
    for ours, theirs, (*_, alone) in zip(logprobs, others, found["scored"], strict=True):
        np.testing.assert_allclose([ours, theirs], [alone, alone], rtol=0, atol=1e-5)
    assert ended == also == {name: found["alone"][name][-1] for name in found["alone"]}
    for utterance in UTTERANCES:
        assert pieces_in(told, utterance.name) == pieces_in(found["alone"], utterance.name), utterance.name
        said = said_of(ended[utterance.name], utterance, file="x.wav", sample_rate=1600)
        path = tmp_path / f"{utterance.name}.wav"
        assert path.exists() == ("error" not in said)
        if path.exists():
            assert path.stat().st_size == 44 + 2 * ended[utterance.name].samples
