"""Options of answers with pictures, and what is wrong with them. No torch."""

import argparse
from pathlib import Path

from megatron_omni.cli.speech_options import check_out
from megatron_omni.generation.picture import Begin, PictureWanted, parse_guidance, parse_size

_ONLY = ("source", "size", "steps", "guidance", "draw_begin", "draw_lead", "most_pictures", "vae")


def add_drawing(p: argparse.ArgumentParser) -> None:
    """Options of answers with pictures."""
    p.add_argument("--draw", metavar="FILE", help="draw the answer into NAME.png (NAME_0.png, ... where it has several); a "
                   "directory with --jsonl")  # fmt: skip
    p.add_argument("--source", metavar="FILE", help="the picture that is changed: the last one of the prompt")
    p.add_argument("--size", metavar="WxH", help="pixels, of which the nearest size of the model is drawn (default: the source's "
                   "aspect, or a square)")  # fmt: skip
    p.add_argument("--steps", type=int, metavar="N", help="Euler steps (default: as the recipe says)")
    p.add_argument(
        "--guidance", metavar="A,B", help="by the words, and by the source; 1 is none (default: as the recipe says)"
    )
    p.add_argument("--draw-begin", choices=("block", "model", "record"), help="what an answer begins with: a picture (default), "
                   "whatever the model writes (default with --think), or what the record's own answer has before it")  # fmt: skip
    p.add_argument(
        "--draw-lead", default="", metavar="TEXT", help="text of the answer before a picture that comes at once"
    )
    p.add_argument(
        "--most-pictures", type=int, metavar="N", help="of an answer that the model begins itself (default 4)"
    )
    p.add_argument(
        "--vae", type=Path, metavar="DIR", help="folder of the codec of pictures (default: that of the recipe)"
    )


def picture_wanted(args: argparse.Namespace) -> PictureWanted | None:
    """How pictures are to be drawn. ValueError for options that mean nothing without --draw, or do not go together."""
    if args.draw is None:
        for name in _ONLY:
            if getattr(args, name) not in (None, ""):
                raise ValueError(f"--{name.replace('_', '-')} means nothing without --draw FILE")
        return None
    if args.speak is not None:
        raise ValueError("--draw and --speak: an answer is drawn or spoken; leave one of them out")
    if args.source is not None and args.jsonl is not None:
        raise ValueError("--jsonl brings its own pictures; leave out --source")
    begin: Begin = args.draw_begin or ("model" if args.think else "block")
    if begin == "record" and args.jsonl is None:
        raise ValueError("--draw-begin record: there is no record; it is for --jsonl")
    if begin == "block" and args.think:
        raise ValueError(
            "--draw-begin block: the picture would stand before the thought; leave out --think, or say model"
        )
    if args.draw_lead and begin != "block":
        raise ValueError(
            f"--draw-lead stands before a picture that comes at once, and --draw-begin is {begin}: leave one out"
        )
    if Path(args.draw).suffix.lower() not in (("",) if args.jsonl is not None else (".png",)):
        raise ValueError(f"--draw {args.draw}: name a directory with --jsonl" if args.jsonl is not None else
                         f"--draw {args.draw}: pictures are PNG files; name it NAME.png")  # fmt: skip
    check_out("--draw", args.draw, directory=args.jsonl is not None)
    words, source = (None, None) if args.guidance is None else parse_guidance(args.guidance, "--guidance")
    if args.vae is not None and not args.vae.is_dir():
        raise ValueError(f"--vae {args.vae}: no such directory")
    try:
        return PictureWanted(
            size=None if args.size is None else parse_size(args.size, "--size"),
            steps=args.steps,
            text_guidance=words,
            image_guidance=source,
            seed=args.seed,
            begin=begin,
            lead=args.draw_lead,
            most=4 if args.most_pictures is None else args.most_pictures,
            vae=args.vae,
        )
    except ValueError as error:
        raise ValueError(f"--draw: {error}") from error
