"""Options of answers that are heard and of everything that speaks, and what is wrong with them. No torch."""

import argparse
from pathlib import Path

from megatron_omni.cli.starting import check_directory
from megatron_omni.generation.request import Sampling
from megatron_omni.generation.utterance import SpeechWanted


def add_speech(p: argparse.ArgumentParser) -> None:
    """Options of answers that are heard."""
    p.add_argument("--speak", metavar="FILE", help="speak the answer's spoken turn into NAME.wav, NAME.pcm (samples alone) or "
                   "-, the standard output; a directory with --jsonl")  # fmt: skip
    p.add_argument("--speaker", type=Path, metavar="DIR", help="checkpoint of the speech generator that speaks")
    p.add_argument("--voice", metavar="NAME", help="ask for this voice, and begin the answer as a spoken turn in it "
                   "(default: as the model writes it)")  # fmt: skip
    p.add_argument("--style", metavar="TEXT", help="the same in a voice that is described")
    p.add_argument(
        "--language", metavar="NAME", help="of the spoken turn, with --voice (default: by the question's script)"
    )
    p.add_argument(
        "--speech-temperature", type=float, default=0.0, metavar="T", help="of the codes; 0 (default) is greedy"
    )
    add_speaking(p)


def add_speaking(p: argparse.ArgumentParser) -> None:
    """Options of everything that speaks."""
    p.add_argument("--codec", type=Path, metavar="DIR", help="folder of the codec (default: that of the speech generator's "
                   "recipe)")  # fmt: skip
    p.add_argument("--context", choices=("prefix", "none"), default="prefix",
                   help="what a piece of a long text begins with: the sound before it (default), or nothing")  # fmt: skip
    p.add_argument("--release", action="store_true", help="speak as the authors' published code does: no context, and a "
                   "prompt and a text that do not see what follows in them; to compare")  # fmt: skip


def check_out(option: str, out: str, *, directory: bool) -> None:
    """ValueError where sound cannot be written to ``out``."""
    path = Path(out)
    if directory and (out == "-" or (path.exists() and not path.is_dir())):
        raise ValueError(f"{option} {out}: with --jsonl it is a directory")
    if not directory and out != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"{option} {out}: name a file in a directory that is there")


def speech_wanted(args: argparse.Namespace) -> SpeechWanted | None:
    """How answers are to be spoken. ValueError for options that mean nothing without --speak, or do not go together."""
    if args.speak is None:
        for name in ("speaker", "voice", "style", "language", "codec", "release"):
            if getattr(args, name):
                raise ValueError(f"--{name} means nothing without --speak FILE")
        return None
    if args.speaker is None:
        raise ValueError("--speak needs --speaker DIR, the checkpoint of a speech generator")
    if args.n > 1:
        raise ValueError(f"--n is {args.n}; with --speak it is 1")
    if args.voice is not None and args.style is not None:
        raise ValueError("give --voice or --style, not both")
    if (args.voice or args.style) and args.think:
        raise ValueError("--voice and --style begin the answer as a spoken turn, before which there is no thought: leave "
                         "out --think")  # fmt: skip
    check_out("--speak", args.speak, directory=args.jsonl is not None)
    check_directory(args.speaker)
    return SpeechWanted(
        speaker=args.speaker,
        codec=args.codec,
        voice=args.voice,
        style=args.style,
        language=args.language,
        context=args.context,
        release=args.release or None,
        sampling=Sampling(temperature=args.speech_temperature, seed=args.seed),
    )
