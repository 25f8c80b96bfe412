"""Speak text with a trained speech generator: text in, sound out.

    python -m megatron_omni.cli.speak CHECKPOINT --text "Good morning." --voice Jenny --out morning.wav
    python -m megatron_omni.cli.speak CHECKPOINT --text-file book.txt --voice Jenny --out - | aplay
    torchrun --nproc-per-node 2 -m megatron_omni.cli.speak CHECKPOINT --jsonl texts.jsonl --out DIR

The sound is written while it is made: WAV (16-bit PCM, mono), or samples alone into NAME.pcm; ``-`` is the standard output.
A line of JSON says {"file", "seconds", "codes", "pieces", "cut", "prompt"}, and {"first_sound_seconds",
"real_time_factor"} of one text. ``--jsonl`` speaks every line {"text", "voice" | "style", "language", "id"} of a file into
DIR/NUMBER.wav, and its lines go into DIR/spoken.jsonl, in order; stopped, the same command goes on with the lines that are not
spoken yet (generation/spoken_lines.py). Exit status 2 for bad input: a text that has neither a
letter nor a digit, an unknown voice, a codec of other codes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_omni.cli.speech_options import add_speaking, check_out
from megatron_omni.cli.starting import Parser, check_directory, refused, run_on_ranks, say_starting
from megatron_omni.config.outcome import EXIT_BAD_INPUT
from megatron_omni.generation.request import Sampling

if TYPE_CHECKING:
    from megatron_omni.config.generators import SpeechConfig
    from megatron_omni.generation.speaking import SoundFiles
    from megatron_omni.generation.speech import Utterance

OVERRIDES = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.pipeline_layout",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.distributed_timeout_seconds",
    "model.speech.prefix_codes",
    "model.speech.max_codes",
    "model.speech.min_split_tokens",
    "model.speech.max_split_tokens",
    "model.speech.least_codes_per_token",
    "model.speech.most_codes_per_token",
)
"""Fields of the checkpoint's recipe that mean something when speaking."""
KEYS = ("text", "voice", "style", "language", "id")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A text and how it is to be spoken."""

    text: str
    voice: str | None = None
    style: str | None = None
    language: str | None = None
    id: str | None = None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(prog="megatron-omni speak", description="Speak text with a trained speech generator.")
    p.add_argument("checkpoint", type=Path, help="run directory, or one of its checkpoints/iter_* directories")
    p.add_argument("--text", metavar="TEXT", help="what to say")
    p.add_argument("--text-file", metavar="FILE", help="a file to say; - reads the standard input")
    p.add_argument("--jsonl", type=Path, metavar="FILE", help="say every line's text instead")
    p.add_argument("--voice", metavar="NAME", help="a voice of the training data")
    p.add_argument("--style", metavar="TEXT", help="or a description of one")
    p.add_argument("--language", metavar="NAME", help="of the text, as the records named it (default: by its script)")
    p.add_argument("--out", required=True, metavar="FILE", help="NAME.wav, NAME.pcm (samples alone) or - for the standard "
                   "output; a directory with --jsonl")  # fmt: skip
    add_speaking(p)
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus to sample from (default 1, all)")
    p.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="most likely codes to sample from (default 0, all)"
    )
    p.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling (default 0)")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="pieces computed together (default 8)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help=f"one of {', '.join(OVERRIDES)}")
    return p


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked command line; ``lines`` are its texts. ValueError names what is wrong."""
    args = parser().parse_intermixed_args(argv)
    given = [name for name in ("text", "text_file", "jsonl") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError("give what to say: one of --text, --text-file and --jsonl")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; it must be at least 1")
    for override in args.overrides:
        if override.partition("=")[0] not in OVERRIDES:
            raise ValueError(f"override {override!r}: speaking knows {', '.join(OVERRIDES)}")
    check_directory(args.checkpoint)
    check_out("--out", args.out, directory=args.jsonl is not None)
    args.sampling = Sampling(
        **{
            f.name: getattr(args, f.name)
            for f in fields(Sampling)
            if f.name in ("temperature", "top_p", "top_k", "seed")
        }
    )
    args.lines = lines_of(args)
    for number, line in enumerate(args.lines, 1):
        try:
            "".join(filter(None, (line.text, line.voice, line.style, line.language))).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {number} is no valid Unicode; write it in UTF-8") from error
    return args


def lines_of(args: argparse.Namespace) -> list[Line]:
    """The texts to say. ValueError names the line of a file."""
    voice = {name: getattr(args, name) for name in ("voice", "style", "language")}
    if args.jsonl is None:
        return [Line(text=args.text if args.text is not None else _read(args.text_file), **voice)]
    from megatron_omni.foreign import parse_json

    lines = []
    for number, row in enumerate(_read(str(args.jsonl)).splitlines(), 1):
        where = f"{args.jsonl}:{number}"
        said = parse_json(row.encode(), where)
        known = isinstance(said, dict) and not said.keys() - set(KEYS) and "text" in said
        if not known or not all(isinstance(value, str) for value in said.values()):
            raise ValueError(
                f'{where}: expected {{"text": "..."}} and of {", ".join(KEYS[1:])} what is wanted, all texts'
            )
        lines.append(Line(**{**(voice if "voice" not in said and "style" not in said else {}), **said}))
    if not lines:
        raise ValueError(f"{args.jsonl}: no line")
    return lines


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode()
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: no UTF-8 at byte {error.start}; convert it") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, speak, and turn what happened into an exit status."""
    try:
        args = parse(argv)
    except ValueError as error:
        return refused(error)
    say_starting("speak", args.checkpoint)
    return run_on_ranks(partial(run, args))


def run(args: argparse.Namespace) -> int:
    """Speak, on all ranks; the exit status."""
    import torch.distributed as dist

    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.generation.speaking import SoundFiles, said_of, speak_all
    from megatron_omni.generation.spoken_lines import speak_lines
    from megatron_omni.generation.voices import codec_for

    checkpoint = open_checkpoint(args.checkpoint, overrides=args.overrides)
    config = checkpoint.recipe.model.speech
    if config is None:
        raise ValueError(
            f"{args.checkpoint}: no speech generator (model.speech); megatron-omni generate --speak has one"
        )
    utterances = utterances_of(args, config)
    codec = codec_for(config, args.codec)
    common: dict[str, Any] = {"codec": codec, "batch_size": args.batch_size, "release": args.release or None}
    if args.jsonl:
        ids = [line.id for line in args.lines]
        settings = settings_of(args)
        return told(args, *speak_lines(checkpoint, utterances, ids, out=Path(args.out), settings=settings, **common))
    model = checkpoint.load_model()
    with SoundFiles(lambda name: args.out, codec.sample_rate) as files:
        ended = speak_all(
            model,
            utterances,
            tokenizer=checkpoint.builder.tokenizer,
            take=files.take,
            before=files.started,
            **common,
        )
    if dist.get_rank() != 0:
        return 0
    (utterance,) = utterances
    line = said_of(ended[utterance.name], utterance, file=args.out, sample_rate=codec.sample_rate)
    line |= timed(files, line)
    print(json.dumps(line, ensure_ascii=False), file=sys.stderr if args.out == "-" else sys.stdout)
    return EXIT_BAD_INPUT if "error" in line else 0


def utterances_of(args: argparse.Namespace, config: "SpeechConfig") -> list["Utterance"]:
    """What is to be spoken. ValueError names the line whose voice cannot be, and a lone text that says nothing."""
    from megatron_omni.generation.speech import Utterance
    from megatron_omni.generation.voices import prompt_for

    if not args.jsonl and not any(map(str.isalnum, args.lines[0].text)):
        raise ValueError("the text has neither a letter nor a digit: there is nothing to say")
    utterances = []
    for number, line in enumerate(args.lines):
        try:
            prompt = prompt_for(config, line.text, voice=line.voice, style=line.style, language=line.language)
        except ValueError as error:
            raise ValueError(f"{args.jsonl}:{number + 1}: {error}" if args.jsonl else str(error)) from error
        utterances.append(
            Utterance(name=str(number), prompt=prompt, text=line.text, sampling=args.sampling, context=args.context)
        )
    return utterances


def timed(files: "SoundFiles", line: dict[str, Any]) -> dict[str, float]:
    """How fast it was."""
    if files.first_sound_seconds is None or not line.get("seconds"):
        return {}
    factor = files.seconds / line["seconds"]
    return {"first_sound_seconds": round(files.first_sound_seconds, 3), "real_time_factor": round(factor, 3)}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the sound of a line depends on beside itself, as JSON has it."""
    changes = sorted(word for word in args.overrides if word.startswith("model."))
    return {**asdict(args.sampling), "context": args.context, "release": args.release, "changes": changes}


def told(args: argparse.Namespace, rows: Sequence[dict[str, Any]], there: int) -> int:
    """Say what became of the lines of a file, of which some were ``there``, on rank 0; the exit status."""
    import torch.distributed as dist

    if dist.get_rank() != 0:
        return 0
    spoken = sum("error" not in row for row in rows)
    cut = sum(row.get("cut", 0) for row in rows)
    before = f", {there} lines from an earlier start" if there else ""
    print(f"{spoken} of {len(rows)} texts spoken into {args.out}, {cut} pieces cut at their limit{before}")
    return 0 if spoken else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
