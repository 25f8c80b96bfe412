"""Convert checkpoints: Hugging Face directories to distributed checkpoints of ours, back, and checks of both.

megatron-omni convert import --hf QWEN --out DIR --tp 2 --pp 2
megatron-omni convert import --hf QWEN --vision SIGLIP --audio WHISPER --draw-projectors 0 --out DIR
megatron-omni convert import --speech speech_gen/speech_gen_ep2.bin --tokenizer QWEN --out DIR
megatron-omni convert import --hf QWEN_0.5B --text-table QWEN_VL_3B --out DIR
megatron-omni convert import --image PIXWIZARD_OR_UNI_MOE --out DIR
megatron-omni convert export --checkpoint RUN --out DIR
megatron-omni convert roundtrip --hf QWEN --tp 2 --pp 2
megatron-omni convert verify DIR
megatron-omni convert verify DIR --record-loss recipes/tiny/quickstart.yaml seed=1
megatron-omni convert codec WAVTOKENIZER.ckpt --yaml CONFIG.yaml --out DIR
megatron-omni convert codec DIR --out RELEASED
megatron-omni convert codec runs/codec --out DIR --dtype fp16                # or runs/picture_codec
megatron-omni convert codec runs/codec --out DIR --local 30 8 --recordings FILE.flac FILE.flac

Exit status: 0 done, 2 bad input (one line ``error: ...``), 1 anything else. docs/checkpoints.md says what is written.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_omni.config.outcome import EXIT_BAD_INPUT, EXIT_FAILURE

if TYPE_CHECKING:
    from megatron_omni.checkpoint.families import OpenedSources
    from megatron_omni.checkpoint.layout import Layout

EXIT_INTERRUPTED = 130
FAMILIES = (
    "qwen2", "siglip", "whisper", "projectors", "uni_moe", "speech_gen", "speech_trunk", "text_table", "image_gen", "pixwizard",
)  # fmt: skip
EXPORTED = ("qwen2", "siglip", "whisper", "projectors", "uni_moe", "speech_gen", "image_gen", "pixwizard")


def parser() -> argparse.ArgumentParser:
    """Arguments of the five commands."""
    top = argparse.ArgumentParser(
        prog="megatron-omni convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Hugging Face directories to a distributed checkpoint")
    _add_sources(importing)
    importing.add_argument("--out", type=Path, required=True, help="directory to make; init_from takes it")
    importing.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto rounds nothing")
    importing.add_argument("--tokenizer", type=Path, help="directory with the tokenizer (default: --hf)")
    exporting = commands.add_parser("export", help="a checkpoint of ours to a Hugging Face directory")
    exporting.add_argument("--checkpoint", type=Path, required=True, help="run, imported directory or iter_*")
    exporting.add_argument("--out", type=Path, required=True, help="directory to make")
    exporting.add_argument(
        "--to",
        choices=EXPORTED,
        help="layout (default: qwen2 for a text model, speech_gen or image_gen for a generator alone, else uni_moe)",
    )
    exporting.add_argument("--like", type=Path, help="imported checkpoint that a trained one started from")
    exporting.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    exporting.add_argument("--max-shard-gb", type=float, default=5.0, help="size of one safetensors file")
    both_ways = commands.add_parser("roundtrip", help="import, export, compare every tensor; leaves nothing")
    _add_sources(both_ways)
    both_ways.add_argument("--work", type=Path, help="directory on the disk to use")
    verifying = commands.add_parser("verify", help="check a converted directory against its ledger and its sources")
    verifying.add_argument("path", type=Path)
    verifying.add_argument(
        "--source", action="append", default=[], metavar="FAMILY=DIR", help="where a source lies now"
    )
    verifying.add_argument(
        "--record-loss", metavar="RECIPE", help="record the first step's loss of this recipe; key=value words change it"
    )
    codec = commands.add_parser(
        "codec", help="WavTokenizer's released files or a trained run to a codec's folder, or such a folder back"
    )
    codec.add_argument("source", type=Path, help="released checkpoint, folder with it, run, or folder of a codec")
    codec.add_argument("--yaml", type=Path, help="its configuration (default: the one that lies beside it)")
    codec.add_argument("--dtype", choices=("fp32", "fp16"), help="of the weights of a run (default fp32)")
    codec.add_argument("--local", type=int, nargs=2, default=[], metavar=("BEFORE", "AFTER"),
        help="codes that the decoder may hear around each: sound is then the same streamed and whole")  # fmt: skip
    codec.add_argument("--recordings", type=Path, nargs="+", default=[], help="sound for the statistics of --local")
    codec.add_argument("--pictures", type=Path, nargs="+", default=[],
        help="of a run that trained a codec of pictures: those that set the latents' scale and the smoothing")  # fmt: skip
    codec.add_argument(
        "--out", type=Path, required=True, help="directory to make, for model.speech.codec or model.image.vae"
    )
    return top


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument("--hf", type=Path, help="Qwen2.5 or Uni-MoE-2.0-Omni directory")
    command.add_argument("--vision", type=Path, help="SigLIP directory")
    command.add_argument("--audio", type=Path, help="Whisper directory")
    command.add_argument("--projectors", type=Path, help="file or directory with vision_aligner.*, audio_aligner.*")
    command.add_argument("--draw-projectors", type=int, metavar="SEED", help="draw them as a run of that seed does")
    command.add_argument(
        "--speech", type=Path, help="speech generator: speech_gen_ep2.bin, its folder, or a Uni-MoE-2.0-Omni directory"
    )
    command.add_argument(
        "--text-table", type=Path, help="makes --hf (Qwen2.5-0.5B) the start of a generator that reads text by the word "
        "embeddings in this directory (Qwen2.5-VL-3B)"
    )  # fmt: skip
    command.add_argument("--image", type=Path, help="what draws, alone: a Uni-MoE-2.0-Omni directory, or PixWizard's "
        "consolidated_ema.00-of-01.pth or its folder; model.image.weights takes what is written")  # fmt: skip
    command.add_argument("--blank-captions", type=Path, help="blank_caps.pt of the published code, which --hf and --image of "
        "a release need to guide as it does")  # fmt: skip
    command.add_argument("--query-tokens", type=int, help="audio tokens a chunk (default: 20 for 3 seconds)")
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert"), ("etp", "expert tensor")):
        command.add_argument(f"--{name}", type=int, default=1, help=f"{meaning} parallel size of what is written")


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, and turn what happened into an exit status."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if rest and (options.command != "verify" or not all("=" in word and word[0] != "-" for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages; faults of small ones cost more than copying
    from megatron_omni.checkpoint.commit import CheckpointError

    run = {
        "import": run_import,
        "export": run_export,
        "roundtrip": run_roundtrip,
        "verify": run_verify,
        "codec": run_codec,
    }
    try:
        run[options.command](options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print("interrupted: nothing that looks finished is left; a rerun starts clean", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def run_import(options: argparse.Namespace) -> None:
    """``import``."""
    from megatron_omni.checkpoint.convert import import_checkpoint
    from megatron_omni.checkpoint.tokenizer_files import find_tokenizer
    from megatron_omni.config.run import Recipe

    opened = _open(options)
    place = options.tokenizer or options.hf or (options.speech if options.speech and options.speech.is_dir() else None)
    tokenizer = find_tokenizer(place) if place is not None and place.is_dir() else place
    if tokenizer is None and (options.hf is not None or options.speech is not None):
        logging.warning(
            "%s: holds no tokenizer; training needs data.tokenizer, or import again with --tokenizer",
            place or options.speech,
        )
    written = import_checkpoint(
        opened.parts,
        Recipe(model=opened.model),
        options.out,
        wanted=opened.wanted,
        layout=_layout(options),
        dtype=options.dtype,
        tokenizer=tokenizer,
    )
    print(f"wrote {written}; start from it with init_from={options.out}")


def run_export(options: argparse.Namespace) -> None:
    """``export``."""
    from megatron_omni.checkpoint.export import export_checkpoint, open_ours

    opened = open_ours(options.checkpoint, like=options.like)
    written = export_checkpoint(
        opened,
        options.out,
        family=options.to,
        dtype=options.dtype,
        max_shard_bytes=int(options.max_shard_gb * 1e9),
    )
    print(f"wrote {written}")


def run_roundtrip(options: argparse.Namespace) -> None:
    """``roundtrip``."""
    from megatron_omni.checkpoint.verify import roundtrip
    from megatron_omni.config.run import Recipe

    opened = _open(options)
    recipe = Recipe(model=opened.model)
    for line in roundtrip(opened.parts, recipe, wanted=opened.wanted, layout=_layout(options), work=options.work):
        print(line)


def run_verify(options: argparse.Namespace) -> None:
    """``verify``."""
    from megatron_omni.checkpoint.codec_folders import is_codec, is_picture_codec, verify_codec
    from megatron_omni.checkpoint.verify import verify

    if (is_codec(options.path) or is_picture_codec(options.path)) and options.record_loss is None:
        print(verify_codec(options.path))
        return
    pairs = [pair.partition("=") for pair in options.source]
    if wrong := [family for family, _, place in pairs if family not in FAMILIES or not place]:
        raise ValueError(f"--source {wrong[0]}: expected FAMILY=DIR with FAMILY one of {', '.join(FAMILIES)}")
    for line in verify(options.path, sources={family: Path(place) for family, _, place in pairs}):
        print(line)
    if options.record_loss is None:
        return
    from megatron_omni.config.load import load_recipe
    from megatron_omni.platform.device import install

    recipe = load_recipe(options.record_loss, [*options.overrides, f"init_from={options.path}"])
    install()
    from megatron_omni.tasks.supervised import SupervisedTask
    from megatron_omni.training.first_loss import record_first_loss

    loss = record_first_loss(recipe, SupervisedTask(recipe.data.sources))
    print(f"first-step loss {loss:.6f}, recorded beside the checkpoint")


def run_codec(options: argparse.Namespace) -> None:
    """``codec``."""
    from megatron_omni.checkpoint.codec_folders import convert_codec

    for line in convert_codec(
        options.source,
        options.out,
        yaml=options.yaml,
        dtype=options.dtype,
        span=options.local,
        recordings=options.recordings,
        pictures=options.pictures,
    ):
        print(line)


def _open(options: argparse.Namespace) -> "OpenedSources":
    from megatron_omni.checkpoint.families import open_sources

    return open_sources(
        language=options.hf,
        vision=options.vision,
        audio=options.audio,
        projectors=options.projectors,
        draw_seed=options.draw_projectors,
        query_tokens=options.query_tokens,
        speech=options.speech,
        text_table=options.text_table,
        image=options.image,
        blank_captions=options.blank_captions,
    )


def _layout(options: argparse.Namespace) -> "Layout":
    from megatron_omni.checkpoint.layout import Layout

    return Layout(tp=options.tp, pp=options.pp, ep=options.ep, etp=options.etp)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
