"""``make speak``: what is never trained on, sounds made by rule and heard by rule, and scores of rows that are known."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # examples/ is not installed

from examples.quickstart.assets import load_assets  # noqa: E402
from examples.quickstart.compose import is_held_out  # noqa: E402
from examples.speak import report, run  # noqa: E402
from examples.speak.corpus import FAST_SIZES, SIZES, compose_chunk, said_of  # noqa: E402
from examples.speak.corpus import Chunk as Part  # noqa: E402
from examples.speak.listen import errors, heard_style, right_of  # noqa: E402
from examples.speak.parts import write_sounds  # noqa: E402
from examples.speak.sounds import (  # noqa: E402
    DECOYS,
    NORMAL,
    PROMPT_WORDS,
    QUESTIONS,
    STYLES,
    VOICES,
    Said,
    Style,
    draw_words,
    is_held_out_style,
    prompt_word,
    question,
    style_texts,
    trained_styles,
    wave_of,
)  # fmt: skip
from megatron_omni.config.generators import CodecConfig  # noqa: E402
from megatron_omni.config.load import load_recipe  # noqa: E402
from megatron_omni.data.codes import CodesFile  # noqa: E402
from megatron_omni.models.generators.codec import Codec, save_codec  # noqa: E402
from megatron_omni.platform.seeds import named_generator  # noqa: E402

RATE, HOP = 16_000, 400


def sound(said: Said, seed: int = 0) -> np.ndarray:
    return wave_of(said, np.random.default_rng(seed), rate=RATE, hop=HOP)


def test_what_is_held_out_is_never_trained_on() -> None:
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        for _ in range(50):
            words = draw_words(rng, 3, held_out=held_out)
            assert len(set(words)) == 3 and all(is_held_out(a, b) == held_out for a, b in pairwise(words))
    for voice in VOICES:
        taught = {text for style in trained_styles(voice) for text in style_texts(voice, style)}
        others = {text for style in STYLES if is_held_out_style(voice, style) for text in style_texts(voice, style)}
        assert NORMAL in trained_styles(voice) and others and not taught & others
        for name in ("pitch", "rate", "loudness"):  # every class is described, in some other combination
            assert {getattr(style, name) for style in trained_styles(voice)} == {getattr(s, name) for s in STYLES}


def test_sounds_are_whole_codes_of_the_words() -> None:
    said = Said((0, 1, 2), "flite_slt")
    wave = sound(said)
    assert said.text == "cat dog horse." and len(wave) % HOP == 0 and not wave[:HOP].any()
    start = HOP
    for word in said.words:  # each begins where the codes before it end
        recorded = load_assets().words["flite_slt"][word]
        assert np.allclose(wave[start : start + len(recorded)], recorded * 0.67, atol=1e-6)
        rest = wave[start + len(recorded) :]
        silent = int(np.flatnonzero(rest)[0]) if rest.any() else len(rest)
        assert 2 * HOP <= silent < 5 * HOP
        start += len(recorded) + silent


@pytest.mark.parametrize("voice", VOICES)
def test_styles_are_heard_as_they_were_made(voice: str) -> None:
    rng = np.random.default_rng(VOICES.index(voice))
    right = []
    for style in [*rng.choice(np.array(STYLES, dtype=object), 5, replace=False), NORMAL]:
        said = Said(draw_words(rng, 3, held_out=True), voice, style)
        right.append(right_of(heard_style(sound(said), sound(replace(said, style=NORMAL)), RATE), style))
    assert np.mean(right) > 0.94, right
    assert heard_style(np.zeros(RATE, np.float32), sound(Said((1,), voice)), RATE) is None
    assert right_of(None, NORMAL) == 0 and right_of(Style("low"), Style("high")) == pytest.approx(2 / 3)


def test_assets_have_prompts_and_questions() -> None:
    for voice in VOICES:
        assert all(0.1 < len(prompt_word(voice, n)) / RATE < 1.2 for n in range(len(PROMPT_WORDS)))
    for voice in load_assets().train_voices:
        # a chunk of the quickstart's audio encoder hears all of it
        assert all(0.3 < len(question(voice, source)) / RATE < 2.1 for source in QUESTIONS)
    words = [word.lower() for word in (*load_assets().english, *PROMPT_WORDS, *DECOYS)]
    assert len(words) == len(set(words)) == 64 + 5 + 64


def test_records_name_their_codes(tmp_path: Path) -> None:
    codec = Codec(CodecConfig(
        sample_rate=RATE, num_codes=64, code_size=8, encoder="mel", strides=[4, 4, 5, 5], encoder_hidden_size=32,
        num_mel_bins=20, hidden_size=64, ffn_hidden_size=64, num_layers=1,
    ))  # fmt: skip
    codec.draw_weights(lambda name: named_generator(0, name))
    codec.codebook.start(codec.encoder(named_noise()).detach()[0], generator=named_generator(0, "start"))
    save_codec(codec.eval(), tmp_path / "codec")
    from examples.speak import corpus

    sizes = {"flite_rms": 2, "long": 2, "anneal": 4, "eval/styled": 2}
    counts = corpus.compose(tmp_path, codec=tmp_path / "codec", seed=0, sizes=sizes, processes=1)
    assert counts == {"flite_rms": 2, "long": 6, "anneal": 2, "eval/styled": 2}
    rows = [json.loads(line) for line in (tmp_path / "train" / "long.jsonl").read_text().splitlines()]
    file = CodesFile(tmp_path / "train" / "long.codes.safetensors")
    assert file.fingerprint == codec.fingerprint and len(file) == 2
    for number in (0, 1):  # the pieces of a text follow each other in its codes
        pieces = [row["messages"][-1]["speech"] for row in rows[3 * number : 3 * number + 3]]
        assert {piece["codes"] for piece in pieces} == {f"long.codes.safetensors#{number}"}
        bounds = [piece["start"] for piece in pieces] + [pieces[-1]["stop"]]
        assert (
            [piece["stop"] for piece in pieces] == bounds[1:] and bounds[0] == 0 and bounds[-1] == file.length(number)
        )
    asked = json.loads((tmp_path / "eval" / "styled.jsonl").read_text().splitlines()[0])
    (said,) = said_of(asked)
    assert is_held_out_style(said.voice, said.style) and "codes" not in asked["messages"][-1]["speech"]
    again = compose_chunk(Part(str(tmp_path / "codec"), 0, "long", 1, 2))
    assert again[0].codes == file.codes(1).tolist()


def named_noise():
    import torch

    return torch.randn(1, RATE, generator=named_generator(0, "noise"))


def test_stages_have_the_sources_that_the_driver_moves() -> None:
    assert set(FAST_SIZES) == set(SIZES)
    for name, (file, start, sources) in run.STAGES.items():
        recipe = load_recipe(ROOT / run.RECIPES / file)
        assert [source.name for source in recipe.data.sources] == list(sources), name
        assert recipe.run_dir == str(run.OUT / name)
        begins = {"quickstart": str(run.QUICKSTART)}.get(start, str(run.OUT / start))
        assert recipe.init_from == (None if name == "single" else begins)
        if name != "loop":
            assert recipe.model.vocab_size == recipe.model.speech.ids.num_outputs
    assert set(run.EXPERTS) == {"voice_a", "voice_b", "voice_c", "several"} and run.EXPERTS[-1] == "several"


def piece(kind: str, context: str, named: list[str], errors_made: int = 0, pitch: float = 0.1) -> dict:
    return {
        "number": 0, "kind": kind, "context": context, "named": named, "errors": errors_made, "words": 9, "cut": 0,
        "pitch_octaves": [7.0, 7.0 + pitch, 7.0], "loudness_db": [-20.0, -22.0, -20.0],
    }  # fmt: skip


def test_scores_of_joins() -> None:
    rows = [
        piece("any", "prefix", ["a", "a", "a"]),
        piece("any", "prefix", ["b", "b", "c"]),
        piece("any", "none", ["a", "b", "b"]),
        piece("voice", "prefix", ["a", "a", "a"], 3, pitch=0.06),
        piece("voice", "none", ["a", "a", "a"], 2, pitch=0.5),
    ]
    natural = [{"pitch_octaves": [7.0, 7.1, float("nan")], "loudness_db": [-20.0, -21.0, -20.0]}]
    assert report.join_scores(rows, natural) == {
        "prefix": 0.75, "none": 0.5, "f0_ratio": 0.6, "energy_ratio": 2.0, "wer_shift": 0.1111, "most_common_first": 0.5,
        "count": 4,
    }  # fmt: skip


def test_scores_of_words_voices_and_streams() -> None:
    assert errors(["cat", "dog", "horse"], ["cat", "horse", "pig"]) == 2 and errors(["cat"], []) == 1
    rows = [
        {"said": ["cat", "dog"], "errors": 1, "named": "a", "voice": "a", "swapped": "b"},
        {"said": ["cat", "dog"], "errors": 0, "named": "b", "voice": "a", "swapped": "b"},
    ]
    assert report.named_scores(rows) == {"wer": 0.25, "voice": 0.5, "count": 2}
    assert report.swap_scores(rows) == {"swap_new": 0.5, "swap_old": 0.5}
    streamed = [
        {"snr_db": 30.0, "same_samples": True, "seconds": 0.3, "sound": 1.0, "first_sound_s": 0.2},
        {"snr_db": 28.5, "same_samples": False, "seconds": 0.9, "sound": 2.0, "first_sound_s": 0.4},
    ]
    assert report.stream_scores(streamed) == {
        "snr_db": 28.5, "same_samples": False, "rtf": 0.4, "first_sound_s": 0.3
    }  # fmt: skip
    row = {"sound": 150.04, "pieces": 70, "cut": 1, "named": ["a", "a"], "memory_mib": [800, 801]}
    whole = {"sound_s": 150.0, "pieces": 70, "cut": 1, "same_voice": True, "memory_mib": [800, 801]}
    assert report.whole_scores([row]) == whole and report.whole_scores([]) == {}
    assert not report.whole_scores([row | {"named": ["a", "b"]}])["same_voice"]
    assert not report.whole_scores([row | {"named": [None, None]}])["same_voice"]
    asked = [{"voice": True, "right": True, "by_ear": True}, {"voice": True, "right": False, "by_ear": True}]
    assert report.loop_scores(asked) == {"voice": 1.0, "right_text": 0.5, "right_by_ear": 1.0, "count": 2}


def test_a_sound_of_minutes_is_written(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 8000 * 120).astype(np.float32)  # at once it overflows the stack
    write_sounds(tmp_path, {"long": wave, "none": wave[:0]}, 8000)
    assert [path.name for path in tmp_path.iterdir()] == ["long.ogg"]
    assert soundfile.info(tmp_path / "long.ogg").frames == len(wave)


def test_the_least_used_expert(tmp_path: Path) -> None:
    loads = {"layer_0": (0.4, 0.6), "layer_1": (0.9, 0.1)}
    values = {
        f"moe/load/{layer}/text/expert_{n}": share for layer, shares in loads.items() for n, share in enumerate(shares)
    }
    old = {name: 0.0 for name in values}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n} | (values if n > 6 else old)) + "\n" for n in range(1, 9)))
    assert report.expert_use(path) == 0.1
