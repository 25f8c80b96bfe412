"""Answer a prompt with a trained checkpoint: text, images, audio and video in, text out, and speech and pictures.

    python -m megatron_omni.cli.generate CHECKPOINT --image cat.png --audio q.wav --prompt "What is this?" --out DIR
    torchrun --nproc-per-node 2 -m megatron_omni.cli.generate CHECKPOINT --jsonl records.jsonl --out DIR \
        parallel.tensor_model_parallel_size=2
    python -m megatron_omni.cli.generate CHECKPOINT --prompt "Say hello." --speak hello.wav --voice Jenny \
        --speaker SPEECH_CHECKPOINT --codec CODEC_DIR --out DIR
    python -m megatron_omni.cli.generate CHECKPOINT --prompt "Make the cat a dog." --source cat.png --draw dog.png --out DIR

One prompt writes DIR/answer.txt and prints the answer. ``--jsonl`` answers every record: DIR/answers.jsonl has a line
{"record", "id", "answer"} for each, in order, or {"record", "id", "reason", "error"} for one that cannot be used; such
records are counted and never end the run. Lines are written as they come, and the same command goes on after the last
of them (generation/answers.py). How tokens are chosen and what ends an answer: the options of a request to the server,
and the same checks (generation/request.py). With --n or --logprobs a line has "samples", too, and one prompt writes
them to DIR/answer.json. Exit status 2 for bad input, with one ``error:`` line, and where no record could be
used, or an answer was not spoken or drawn. torch is imported after the command line has been accepted, so ``--help``
answers at once.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_omni.cli.draw_options import add_drawing, picture_wanted
from megatron_omni.cli.speech_options import add_speech, speech_wanted
from megatron_omni.cli.starting import Parser, check_directory, refused, run_on_ranks, say_starting
from megatron_omni.config.outcome import EXIT_BAD_INPUT
from megatron_omni.generation.picture import PictureWanted
from megatron_omni.generation.request import Sampling, Wanted
from megatron_omni.generation.utterance import SpeechWanted

if TYPE_CHECKING:
    from megatron_omni.data.record import Record

MEDIA_KINDS = ("image", "audio", "video")
_MARKERS = re.compile(f"<({'|'.join(MEDIA_KINDS)})>")
OVERRIDES = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.pipeline_layout",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.distributed_timeout_seconds",
    "data.system_prompt",
    "data.system_template",
    "data.voice_request",
    "data.seq_length",
    "data.video_fps",
    "data.min_frames",
    "data.max_frames",
    "data.max_frames_with_audio",
    "data.frame_choice",
    "data.use_video_sound",
)
"""Fields of the checkpoint's recipe that mean something when generating."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line, checked as far as that goes without reading a file's content."""

    checkpoint: Path
    out: Path
    parts: tuple[str | tuple[str, str], ...] | None
    """The user's turn of --prompt, --image, --audio and --video, texts and (kind, path); None in --jsonl mode."""
    media_separator: str
    jsonl: Path | None
    wanted: Wanted
    batch_size: int
    deterministic: bool
    think: bool | None
    speech: SpeechWanted | None
    sound: str
    """Where answers are heard: a file, or a directory in --jsonl mode."""
    drawing: PictureWanted | None
    picture: str
    """Where they are seen, likewise."""
    overrides: list[str]


class _AppendMedium(argparse.Action):
    """Keep --image, --audio and --video in the order in which they were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.media = [*namespace.media, (self.dest, values)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="megatron-omni generate",
        description="Answer a prompt with text, images, audio and video from a trained checkpoint.",
        epilog="The sizes of the layout default to 1 whatever the checkpoint was trained on; what is left of the world "
        "size shares the records of --jsonl.",
    )
    p.add_argument("checkpoint", type=Path, help="run directory, or one of its checkpoints/iter_* directories")
    for kind in MEDIA_KINDS:
        p.add_argument(
            f"--{kind}",
            action=_AppendMedium,
            metavar="FILE",
            help=f"may be repeated; stands where the prompt has <{kind}>, or before a prompt without that marker",
        )
    add_media_separator(p)
    p.add_argument("--prompt", metavar="TEXT", help="text of the user's turn")
    p.add_argument("--jsonl", type=Path, metavar="FILE", help="answer every record of this file instead of one prompt")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the answer is written")
    p.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    p.add_argument(
        "--min-new-tokens", type=int, default=0, metavar="N", help="tokens before which no end token is chosen"
    )
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus to sample from (default 1, all)")
    p.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="most likely tokens to sample from (default 0, all)"
    )
    p.add_argument("--min-p", type=float, default=0.0, metavar="P",
                   help="least probability, as a share of the most likely token's (default 0)")  # fmt: skip
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R",
                   help="divides logits of tokens of prompt and answer (default 1)")  # fmt: skip
    p.add_argument("--presence-penalty", type=float, default=0.0, metavar="A",
                   help="taken from logits of tokens that the answer has (default 0)")  # fmt: skip
    p.add_argument("--frequency-penalty", type=float, default=0.0, metavar="A",
                   help="the same for each time that it has them (default 0)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling (default 0)")
    p.add_argument("--n", type=int, default=1, metavar="N", help="samples of each prompt (default 1)")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT",
                   help="ends the answer and is no part of it; may be repeated")  # fmt: skip
    p.add_argument("--stop-id", action="append", default=[], type=int, metavar="ID",
                   help="token that ends the answer, beside the tokenizer's end tokens; may be repeated")  # fmt: skip
    p.add_argument("--ignore-eos", action="store_true", help="the tokenizer's end tokens do not end an answer")
    p.add_argument("--logprobs", type=int, metavar="N",
                   help="write log-probabilities of the tokens and of the N most likely ones at their places")  # fmt: skip
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="answers computed together (default 16)")
    p.add_argument(
        "--deterministic", action="store_true", help="the same bits whatever is answered beside it (one rank; slow)"
    )
    add_think(p)
    add_speech(p)
    add_drawing(p)
    p.add_argument("overrides", nargs="*", metavar="key=value", help=f"one of {', '.join(OVERRIDES)}")
    p.set_defaults(media=[])
    return p


def add_media_separator(p: argparse.ArgumentParser) -> None:
    """The option of everything that puts files into a turn for the user."""
    p.add_argument("--media-separator", default=" ", metavar="TEXT",
                   help="between a medium and a text without white space there, as in training (default: a space)")  # fmt: skip


def add_think(p: argparse.ArgumentParser) -> None:
    """The switch of everything that asks a checkpoint."""
    p.add_argument("--think", action=argparse.BooleanOptionalAction, default=None,
                   help="ask for a thought before the answer, or begin the answer behind an empty one (default: as the "
                   "checkpoint's recipe asks, and evaluation tasks)")  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> Request:
    """The checked command line. ValueError names what is wrong."""
    args = parser().parse_intermixed_args(argv)
    drawing = picture_wanted(args)
    if args.source is not None:  # the last picture of the turn
        args.media = [*args.media, ("image", args.source)]
    if args.jsonl is not None and (args.media or args.prompt is not None):
        raise ValueError("--jsonl brings its own prompts and media; leave out --prompt, --image, --audio and --video")
    if args.jsonl is None and args.prompt is None and not args.media:
        raise ValueError("nothing to answer: give --prompt (and media), or --jsonl")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; it must be at least 1")
    wanted = Wanted(
        sampling=Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)}),
        stop=tuple(args.stop),
        stop_ids=tuple(args.stop_id),
        text=True,
        **{name: getattr(args, name) for name in ("max_new_tokens", "min_new_tokens", "n", "ignore_eos", "logprobs")},
    )
    for override in args.overrides:
        if override.partition("=")[0] not in OVERRIDES:
            raise ValueError(f"override {override!r}: generation knows {', '.join(OVERRIDES)}")
    files = [args.jsonl] if args.jsonl is not None else [Path(path) for _, path in args.media]
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    check_directory(args.checkpoint)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: exists and is no directory")
    return Request(
        checkpoint=args.checkpoint,
        out=args.out,
        parts=None if args.jsonl is not None else user_parts(args.prompt or "", args.media),
        media_separator=args.media_separator,
        jsonl=args.jsonl,
        wanted=wanted,
        batch_size=args.batch_size,
        deterministic=args.deterministic,
        think=args.think,
        speech=speech_wanted(args),
        sound=args.speak or "",
        drawing=drawing,
        picture=args.draw or "",
        overrides=args.overrides,
    )


def user_parts(prompt: str, media: Sequence[tuple[str, str]]) -> tuple[str | tuple[str, str], ...]:
    """One user turn, texts and (kind, path) in their order; ``media`` of kinds without a marker in ``prompt`` come first.

    ValueError where a kind has markers, but not as many as files.
    """
    unmarked = []
    for kind in MEDIA_KINDS:
        marker = f"<{kind}>"
        num_markers = len(re.findall(re.escape(marker), prompt))
        num_files = sum(k == kind for k, _ in media)
        if num_markers == 0:
            unmarked.append(kind)
        elif num_markers != num_files:
            raise ValueError(
                f"the prompt has {num_markers} {marker} marker(s) for {num_files} --{kind} file(s); "
                f"give one file for each marker, or leave {marker} out to put the files first"
            )
    files = {kind: iter([path for k, path in media if k == kind]) for kind in MEDIA_KINDS}
    before = [(kind, next(files[kind])) for kind, _ in media if kind in unmarked]
    pieces = _MARKERS.split(prompt)
    return (*before, *((piece, next(files[piece])) if i % 2 else piece for i, piece in enumerate(pieces)))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, answer, and turn what happened into an exit status."""
    try:
        request = parse(argv)
    except ValueError as error:
        return refused(error)
    say_starting("generate", request.checkpoint)
    return run_on_ranks(partial(run, request))


def turn_record(request: Request) -> "Record":
    """The record of the one prompt; the server makes it of the parts of a message in the same way."""
    from megatron_omni.data.record import record_of_parts

    turn: Any = "user", request.parts
    return record_of_parts([turn], where="command line", separator=request.media_separator)


def run(request: Request) -> int:
    """Answer ``request`` and write the result, on rank 0; the exit status."""
    from megatron_omni.data.sources import JsonlSource
    from megatron_omni.generation.answers import answer_all, answer_one
    from megatron_omni.generation.drawn_answers import AnswerDrawer
    from megatron_omni.generation.engine import EngineLimits
    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.generation.spoken_answers import AnswerSpeaker

    checkpoint = open_checkpoint(request.checkpoint, overrides=request.overrides)
    settings: dict[str, Any] = {"wanted": request.wanted, "batch_size": request.batch_size, "out": request.out}
    settings |= {"limits": EngineLimits(deterministic=request.deterministic), "think": request.think}
    if checkpoint.recipe.model.speech is not None:
        raise ValueError(
            f"{request.checkpoint}: a speech generator, which answers nothing; megatron-omni speak says a text"
        )
    if request.speech is not None:
        settings |= {"speech": AnswerSpeaker(request.speech, checkpoint), "sound": request.sound}
    if request.drawing is not None:
        settings |= {"drawing": AnswerDrawer(request.drawing, checkpoint), "picture": request.picture}
    if request.jsonl is None:
        return 0 if answer_one(checkpoint, turn_record(request), **settings) else EXIT_BAD_INPUT
    for folder in filter(None, (request.sound, request.picture)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    changes = [word for word in request.overrides if word.startswith("data.")]
    source = JsonlSource(request.jsonl, name=str(request.jsonl))
    return 0 if answer_all(checkpoint, source, changes=changes, **settings) else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
