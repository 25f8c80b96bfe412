"""The parts of measure.py: what is asked of a speech generator, and what is kept of its answers.

Each rank has the rows of the texts that it spoke; :func:`gathered` brings them together.
"""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from examples.quickstart.assets import SAMPLE_RATE
from examples.speak.corpus import said_of
from examples.speak.listen import Listener, heard_style, right_of, row
from examples.speak.report import REFERENCE
from examples.speak.sounds import ANY, NORMAL, PROMPT_WORDS, VOICES, Said, prompt_word, wave_of
from megatron_omni.data.spoken import voice_prompt
from megatron_omni.generation.request import Sampling
from megatron_omni.generation.speech import PieceEvent, SoundEvent, SpeechEvent, Utterance
from megatron_omni.models.generators.codec import Codec
from megatron_omni.scoring.voice import measure

TEMPERATURE = 0.7
BATCH = 32
SHOWN = 10
"""Sounds of a part that are kept to listen to."""
STREAMED = 8
WHOLE_SECONDS, END_SECONDS = 150, 20
"""Of one long text, by how long its first words are, and of its two ends that are to have one voice."""
Rows = list[dict[str, Any]]


class Spoken:
    """Collects what a speaker says."""

    def __init__(self) -> None:
        self._sound: dict[str, list[torch.Tensor]] = {}
        self._pieces: dict[str, list[PieceEvent]] = {}

    def take(self, event: SpeechEvent) -> None:
        """Keep sound and pieces."""
        if isinstance(event, SoundEvent):
            self._sound.setdefault(event.name, []).append(event.wave)
        elif isinstance(event, PieceEvent):
            self._pieces.setdefault(event.name, []).append(event)

    def wave(self, name: str) -> np.ndarray:
        """The whole sound of an utterance."""
        parts = self._sound.get(name, [])
        return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)

    def pieces(self, name: str, hop: int) -> list[tuple[np.ndarray, PieceEvent]]:
        """Its pieces, each with its part of the sound."""
        found = self._pieces.get(name, [])
        ends = np.cumsum([0, *(len(piece.codes) for piece in found)]) * hop
        whole = self.wave(name)
        return [(whole[a:b], piece) for a, b, piece in zip(ends, ends[1:], found)]

    def names(self) -> list[str]:
        """Utterances that were spoken here."""
        return list(self._pieces)


class Questions:
    """The held-out sets."""

    def __init__(self, data: Path, codec: Codec, limit: int | None) -> None:
        self._rate, self._hop = codec.sample_rate, codec.hop_size
        self.sets = {name: _rows_of(data / "eval" / f"{name}.jsonl")[:limit] for name in ("named", "styled", "long")}

    def said(self, name: str) -> list[list[Said]]:
        """Pieces of every text of a set."""
        return [said_of(one) for one in self.sets[name]]

    def natural(self, said: Said, number: int) -> np.ndarray:
        """The recording, at the codec's rate."""
        return wave_of(said, np.random.default_rng([40, number]), rate=self._rate, hop=self._hop)


def _rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ of a speech generator


Speak = Callable[..., Spoken]
"""Utterances -> what was said of them on this rank."""


class Measure:
    """Measures one checkpoint; all ranks call the parts together, each has the rows of its own texts."""

    def __init__(self, speak: Speak, questions: Questions, listener: Listener, codec: Codec) -> None:
        self._speak, self._questions, self._listener, self._codec = speak, questions, listener, codec
        self.shown: dict[str, np.ndarray] = {}

    def named(self) -> Rows:
        """See the module."""
        asked = [said for (said,) in self._questions.said("named")]
        rows = self._one_piece("named", asked, [_prompt(said.voice) for said in asked])
        return [rows[n] | {"codes_natural": self._codes(asked[n], n)} for n in sorted(rows)]

    def swapped(self) -> Rows:
        """See the module."""
        asked = [said for (said,) in self._questions.said("named")]
        voices = [VOICES[(VOICES.index(said.voice) + 1) % len(VOICES)] for said in asked]
        rows = self._one_piece("swapped", asked, [_prompt(voice) for voice in voices], with_prompts=False)
        return [rows[n] | {"swapped": voices[n]} for n in sorted(rows)]

    def styled(self) -> Rows:
        """See the module."""
        asked = [said for (said,) in self._questions.said("styled")]
        prompts = [one["messages"][-1]["speech"]["style"] for one in self._questions.sets["styled"]]
        spoken = self._speak(_utterances("styled", asked, prompts))
        rows = []
        for name in spoken.names():
            number = int(name.rpartition(".")[2])
            said, wave = asked[number], spoken.wave(name)
            normal = self._questions.natural(replace(said, style=NORMAL), number)
            found = heard_style(wave, normal, self._codec.sample_rate)
            self._show(f"styled.{number}", wave, number)
            rows.append({"number": number, "prompt": prompts[number], "right": right_of(found, said.style)})
        return rows

    def joins(self) -> Rows:
        """See the module."""
        asked, rows = self._questions.said("long"), []
        sampling = Sampling(temperature=TEMPERATURE, seed=1)
        for kind in (ANY, "voice"):
            for context in ("prefix", "none"):
                utterances = [
                    Utterance(
                        name=f"{kind}.{context}.{n}", text=" ".join(one.text for one in said), sampling=sampling,
                        prompt=_prompt(ANY if kind == ANY else said[0].voice), context=context,
                    )
                    for n, said in enumerate(asked)
                ]  # fmt: skip
                spoken = self._speak(utterances)
                for name in spoken.names():
                    number = int(name.rpartition(".")[2])
                    self._show(name, spoken.wave(name), number)
                    pieces = spoken.pieces(name, self._codec.hop_size)
                    rows.append(
                        {"number": number, "kind": kind, "context": context} | self._neighbours(asked[number], pieces)
                    )
        return rows

    def _neighbours(self, said: Sequence[Said], pieces: Sequence[tuple[np.ndarray, PieceEvent]]) -> dict[str, Any]:
        return joined(self._listener, said, [wave for wave, _ in pieces], self._codec.sample_rate) | {
            "cut": sum(piece.cut for _, piece in pieces)
        }

    def stream(self) -> Rows:
        """See the module; rank 0 alone has rows."""
        rows = []
        for number, said in enumerate(one[0] for one in self._questions.said("named")[:STREAMED]):
            utterance = Utterance(name="stream", text=said.text, prompt=_prompt(said.voice))
            start, spoken, facts = time.perf_counter(), Spoken(), {}

            def take(event: SpeechEvent, spoken: Spoken = spoken, start: float = start, facts: Any = facts) -> None:
                spoken.take(event)
                if isinstance(event, SoundEvent):
                    facts.setdefault("first_sound_s", time.perf_counter() - start)
                facts["seconds"] = time.perf_counter() - start

            self._speak([utterance], take=take, batch_size=1)
            if spoken.names():
                wave = spoken.wave("stream")
                codes = [code for _, piece in spoken.pieces("stream", self._codec.hop_size) for code in piece.codes]
                whole = self._codec.decode(torch.tensor([codes]))[0].numpy()
                same = len(wave) == len(whole)
                noise = float(((wave - whole) ** 2).sum()) if same else float("inf")
                snr = 10 * np.log10(max(float((whole**2).sum()), 1e-12) / max(noise, 1e-12))
                rows.append(
                    {
                        "number": number,
                        "snr_db": snr,
                        "same_samples": same,
                        "sound": len(wave) / self._codec.sample_rate,
                    }
                    | facts
                )
        return rows

    def whole(self) -> Rows:
        """See the module; rank 0 alone has a row."""
        texts = [one.text for said in self._questions.said("long") for one in said]
        voice, hop, rate = VOICES[0], self._codec.hop_size, self._codec.sample_rate
        pieces = max(1, round(WHOLE_SECONDS / (self._codes(self._questions.said("named")[0][0], 0) * hop / rate)))
        text = " ".join(texts[n % len(texts)] for n in range(pieces)) if texts else ""
        memory: list[float] = []
        spoken = Spoken()

        def take(event: SpeechEvent) -> None:
            spoken.take(event)
            if isinstance(event, PieceEvent):
                memory.append(resident_mib())

        self._speak([Utterance(name="whole", text=text, prompt=_prompt(voice))], take=take, batch_size=1)
        if not spoken.names():
            return []
        wave, ends = spoken.wave("whole"), END_SECONDS * rate
        self.shown["whole"] = wave
        return [
            {
                "number": 0,
                "voice": voice,
                "sound": len(wave) / rate,
                "pieces": len(memory),
                "cut": sum(piece.cut for _, piece in spoken.pieces("whole", hop)),
                "named": self._listener.named([wave[:ends], wave[-ends:]], rate),
                "memory_mib": [round(memory[len(memory) // 5]), round(memory[-1])],
            }
        ]

    def _one_piece(
        self, part: str, asked: Sequence[Said], prompts: Sequence[str], *, with_prompts: bool = True
    ) -> dict[int, dict[str, Any]]:
        """By number; ``with_prompts``: words of the prompt are listened for."""
        spoken = self._speak(_utterances(part, asked, prompts))
        names, rate = spoken.names(), self._codec.sample_rate
        waves = [spoken.wave(name) for name in names]
        read = self._listener.of_prompt(waves, rate) if with_prompts else [[] for _ in waves]
        rows = {}
        judged = zip(names, waves, self._listener.heard(waves, rate), self._listener.named(waves, rate), read)
        for name, wave, heard, named, of_prompt in judged:
            number = int(name.rpartition(".")[2])
            pieces = [piece for _, piece in spoken.pieces(name, self._codec.hop_size)]
            self._show(f"{part}.{number}", wave, number)
            rows[number] = row(
                asked[number], heard, named, number=number, of_prompt=of_prompt,
                codes=sum(len(piece.codes) for piece in pieces), cut=sum(piece.cut for piece in pieces),
            )  # fmt: skip
        return rows

    def _codes(self, said: Said, number: int) -> int:
        return len(self._questions.natural(said, number)) // self._codec.hop_size

    def _show(self, name: str, wave: np.ndarray, number: int) -> None:
        if number < SHOWN:
            self.shown[name] = wave


def joined(listener: Listener, said: Sequence[Said], waves: Sequence[np.ndarray], rate: int) -> dict[str, Any]:
    """Of the pieces of a text: voices, errors, words, and what pitch and loudness are."""
    measured = [measure(wave, rate) for wave in waves]
    rows = [row(one, heard, None) for one, heard in zip(said, listener.heard(waves, rate))]
    return {
        "named": listener.named(waves, rate),
        "errors": sum(one["errors"] for one in rows) + sum(len(one.words) for one in said[len(waves) :]),
        "words": sum(len(one.words) for one in said),
        "pitch_octaves": [one.pitch_octaves for one in measured],
        "loudness_db": [one.loudness_db for one in measured],
    }


def _prompt(voice: str) -> str:
    return voice_prompt(speaker=voice, language="English")


def _utterances(part: str, asked: Sequence[Said], prompts: Sequence[str]) -> list[Utterance]:
    return [
        Utterance(name=f"{part}.{n}", text=said.text, prompt=prompt)
        for n, (said, prompt) in enumerate(zip(asked, prompts))
    ]


# ------------------------------------------------------------------------------------------------ of nature and codec


def reference(
    questions: Questions, listener: Listener, codec: Codec, *, share: slice, planted: int
) -> tuple[dict[str, dict[str, Rows]], dict[str, np.ndarray]]:
    """Rows of natural recordings and of what the codec makes of them, and sounds to listen to."""
    found: dict[str, dict[str, Rows]] = {}
    shown: dict[str, np.ndarray] = {}
    for kind in REFERENCE:

        def sound(said: Said, number: int, kind: str = kind) -> np.ndarray:
            wave = questions.natural(said, number)
            if kind == "natural":
                return wave
            return codec.decode(codec.encode(torch.from_numpy(wave)[None]))[0].numpy()

        rate = codec.sample_rate
        numbered = list(enumerate(said for (said,) in questions.said("named")))[share]
        waves = [sound(said, n) for n, said in numbered]
        judged = zip(
            numbered, listener.heard(waves, rate), listener.named(waves, rate), listener.of_prompt(waves, rate),
            listener.freely(waves, rate),
        )  # fmt: skip
        named = [
            row(said, heard, voice, number=n, of_prompt=read, free=free)
            for (n, said), heard, voice, read, free in judged
        ]
        shown |= {f"{kind}.{n}": wave for (n, _), wave in zip(numbered, waves) if n < SHOWN}
        styled = []
        for n, said in list(enumerate(said for (said,) in questions.said("styled")))[share]:
            style = heard_style(sound(said, n), questions.natural(replace(said, style=NORMAL), n), rate)
            styled.append({"number": n, "right": right_of(style, said.style)})
        joins = [
            {"number": n} | joined(listener, said, [sound(one, 3 * n + k) for k, one in enumerate(said)], rate)
            for n, said in list(enumerate(questions.said("long")))[share]
        ]
        found[kind] = {"named": named, "styled": styled, "joins": joins}
    found["planted"] = {"named": _planted(questions, listener, range(planted)[share], shown)}
    return found, shown


def _planted(questions: Questions, listener: Listener, numbers: range, shown: dict[str, np.ndarray]) -> Rows:
    """Recordings in which the prompt is read aloud before the words."""
    asked = [said for (said,) in questions.said("named")]
    rows = []
    for n in numbers:
        said = asked[n % len(asked)]
        name = PROMPT_WORDS.index("flite" if said.voice.startswith("flite") else "espeak")
        before = [part for k in (0, 1, 2, name) for part in (prompt_word(said.voice, k), np.zeros(1600, np.float32))]
        wave = np.concatenate([*before, wave_of(said, np.random.default_rng(n), rate=SAMPLE_RATE, hop=400)])
        rows.append({"number": n, "of_prompt": listener.of_prompt([wave], SAMPLE_RATE)[0]})
        if n < 3:
            shown[f"planted.{n}"] = wave
    return rows


def speaking(checkpoint: Any, codec: Codec) -> Speak:
    """Speaks with a checkpoint; all ranks call what it returns together."""
    from megatron_omni.generation.speaking import speak_all

    model, tokenizer = checkpoint.load_model(), checkpoint.builder.tokenizer

    def speak(utterances: Sequence[Utterance], *, take: Any = None, batch_size: int = BATCH) -> Spoken:
        spoken = Spoken()
        speak_all(model, utterances, codec=codec, tokenizer=tokenizer, batch_size=batch_size, take=take or spoken.take)
        return spoken

    return speak


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def gathered(rows: Any) -> list[Any]:
    """Of all ranks."""
    import torch.distributed as dist

    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, rows)
    return box


def write_sounds(folder: Path, sounds: dict[str, np.ndarray], rate: int) -> None:
    """Ogg Vorbis files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, wave in sounds.items():
        if len(wave):
            # In blocks: libsndfile keeps all that one call encodes to Vorbis on the stack.
            with soundfile.SoundFile(folder / f"{name}.ogg", "w", rate, 1) as file:
                for block in np.split(np.clip(wave, -1, 1), range(rate, len(wave), rate)):
                    file.write(block)
