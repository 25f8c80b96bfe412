"""The process that makes sound: ``python -m megatron_omni.serve.speaker_process LINK CHECKPOINT CODEC PIECES``, started by
``megatron-omni serve``.

A speech generator on one rank of its own and its codec (a folder, or nothing: the one that the checkpoint names); PIECES are
computed together. LINK is an inherited descriptor, the pair of sockets to the process that speaks HTTP (speech_link.py). It
takes no signals: when the other end is closed, it leaves.
"""

import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_omni.serve.maker import run
from megatron_omni.serve.speech_link import (
    Hold,
    Say,
    Silence,
    SpeakerReady,
    Told,
    ToSpeaker,
)

if TYPE_CHECKING:
    from megatron_omni.serve.utterances import Utterances

IDLE_SECONDS = 1.0


def serve(link: Connection, path: str, codec_folder: str, pieces: int) -> None:
    """Load and speak; EOFError where the other end is closed, ValueError where it cannot be loaded."""
    from megatron_omni.platform.device import install

    install()
    from megatron_omni.data.index import tokenizer_digest
    from megatron_omni.generation.engine import Engine
    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.generation.speaking import speech_limits
    from megatron_omni.generation.speech import Speaker
    from megatron_omni.generation.voices import codec_for
    from megatron_omni.serve.utterances import Utterances

    checkpoint = open_checkpoint(Path(path))
    config, tokenizer = checkpoint.recipe.model.speech, checkpoint.builder.tokenizer
    if config is None:
        raise ValueError(f"{path}: a language model, no speech generator: give one to --speaker")
    codec = codec_for(config, Path(codec_folder) if codec_folder else None)
    limits = speech_limits(config, batch_size=pieces)
    with (
        Engine(checkpoint.load_model(), tokenizer=tokenizer, pg=checkpoint.pg, limits=limits) as engine,
        engine.leading(),
    ):
        utterances = Utterances(Speaker(engine, codec, tokenizer, config))
        link.send(
            SpeakerReady(
                name=run_name(checkpoint.directory),
                created=int(checkpoint.directory.stat().st_mtime),
                voices=tuple(config.voices),
                sample_rate=codec.config.sample_rate,
                tokenizer=tokenizer_digest(tokenizer.path),
            )
        )
        speak_for(link, utterances)


def speak_for(link: Connection, utterances: "Utterances") -> None:
    """Messages in, steps, events out; EOFError where the other end is closed."""
    while True:
        seconds = 0.0 if utterances.busy else IDLE_SECONDS
        while link.poll(seconds):
            take(utterances, link.recv())
            seconds = 0.0
        for event in utterances.step() if utterances.busy else ():
            link.send(event)


def take(utterances: "Utterances", message: ToSpeaker) -> None:
    """One message."""
    match message:
        case Say():
            utterances.say(message)
        case Told():
            utterances.told(message)
        case Hold():
            utterances.hold(message.name, message.on)
        case Silence():
            utterances.silence(message.name)


def run_name(directory: Path) -> str:
    """Of the run that a checkpoint belongs to."""
    parts = directory.resolve().parts
    return parts[-3] if len(parts) > 2 and parts[-2] == "checkpoints" else parts[-1]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], serve, who="the speaker"))
