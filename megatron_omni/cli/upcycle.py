"""Dense checkpoints into one mixture of experts: each source's feed-forward part becomes a routed expert.

    megatron-omni upcycle --base DIR --vision DIR --speech DIR DIR --out DIR [--trunk NAME] [model.moe.top_p=0.7 ...]
    megatron-omni upcycle --experts DIR DIR DIR DIR --out DIR [--trunk DIR]          speech generators

A source is a Hugging Face directory (Qwen2.5, or a dense model in the Uni-MoE layout), a run directory, or one checkpoint
of a run. Routed experts are ordered vision, speech ..., base; shared experts are disjoint slices of the base's feed-forward
part. Speech generators (three of a single voice and the mixed one) have no roles: --experts are the routed experts in their
order, and the trunk is that of the last unless --trunk names another. What lies in DIR/checkpoints afterwards starts a run
with init_from=DIR on any layout, and goes to Hugging Face with megatron-omni convert export.
upcycle.json says of every tensor where it came from.

Exit status: 0 done, 2 for sources or settings that do not fit, 1 for a disk that cannot take the result, 130 interrupted.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="megatron-omni upcycle",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--base", type=Path, metavar="DIR", help="base model: last routed expert, shared")
    made.add_argument("--vision", type=Path, metavar="DIR", help="dense model after its vision warm-up: first expert")
    made.add_argument("--speech", type=Path, nargs="+", default=[], metavar="DIR", help="after speech warm-ups")
    made.add_argument(
        "--experts", type=Path, nargs="+", default=[], metavar="DIR",
        help="dense speech generators, a routed expert each, the mixed one last",
    )  # fmt: skip
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="run directory to make")
    made.add_argument(
        "--trunk", metavar="NAME",
        help="whose attention, norms and embeddings are taken: base, vision, speech1, speech2, ... (default base); with "
        "--experts a directory (default the last of them)",
    )  # fmt: skip
    made.add_argument(
        "--token-rows", choices=["auto", "mean", "keep"], default="auto",
        help="rows of special tokens that the trunk's tokenizer file lacks: the mean of the others, or as they are "
        "(auto: mean for a Hugging Face trunk, keep for a run's, which trained them)",
    )  # fmt: skip
    made.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto rounds nothing")
    made.add_argument("--seed", type=int, default=3407, help="of the gates (default 3407)")
    for name, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert"), ("etp", "expert tensor")):
        made.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{what}-parallel size to write for")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields, such as model.moe.top_p=0.8")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    words = parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages; faults of small ones cost more than copying

    from megatron_omni.checkpoint.commit import CheckpointError

    # --speech and --experts take all the words that follow them, settings included.
    given = [*words.speech, *words.experts]
    settings = [str(word) for word in given if str(word).startswith(("model.", "data.")) and "=" in word.name]
    try:
        from megatron_omni.checkpoint.layout import Layout
        from megatron_omni.checkpoint.upcycle import upcycle

        paths, experts, trunk = _sources(words, settings)
        directory = upcycle(
            paths,
            words.out,
            trunk=trunk,
            experts=experts,
            overrides=[*settings, *words.overrides],
            layout=Layout(tp=words.tp, pp=words.pp, ep=words.ep, etp=words.etp),
            dtype=words.dtype,
            seed=words.seed,
            token_rows=words.token_rows,
        )
    except KeyboardInterrupt:
        print("interrupted: nothing that looks finished is left; a rerun starts clean", file=sys.stderr)
        return 130
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"wrote {directory}")
    return 0


def _sources(words: argparse.Namespace, settings: list[str]) -> tuple[dict[str, Path], list[str], str]:
    """Sources by name, names of the experts, name of the trunk. ValueError for options that do not go together."""
    generators = [word for word in words.experts if str(word) not in settings]
    if generators:
        if words.base or words.vision or words.speech:
            raise ValueError("--experts: speech generators have no roles; leave out --base, --vision and --speech")
        return _speech_sources(generators, None if words.trunk is None else Path(words.trunk))
    if words.base is None:
        raise ValueError("--base: expected the base model, found none; speech generators are named by --experts")
    speech = [word for word in words.speech if str(word) not in settings]
    paths = {"vision": words.vision} if words.vision is not None else {}
    paths |= {f"speech{i + 1}": path for i, path in enumerate(speech)}
    paths |= {"base": words.base}
    return paths, list(paths), words.trunk or "base"


def _speech_sources(generators: list[Path], trunk: Path | None) -> tuple[dict[str, Path], list[str], str]:
    """Names as ``upcycle`` takes them: expert1, expert2, ..., and trunk where that is none of the experts."""
    if len(generators) < 2:
        raise ValueError(f"--experts {generators[0]}: a mixture is made of two or more; name the others too")
    paths = {f"expert{i + 1}": path for i, path in enumerate(generators)}
    experts = list(paths)
    if trunk is None:
        return paths, experts, experts[-1]
    same = [name for name, path in paths.items() if path.absolute() == trunk.absolute()]
    return (paths, experts, same[0]) if same else (paths | {"trunk": trunk}, experts, "trunk")


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
