"""Time the MoE layer and its ops on your own shape, against every alternative that is installed.

python tools/bench_moe.py --shape qwen3-30b --scale 4 --tokens 2048 --dtype bf16
python tools/bench_moe.py --hidden 1024 --ffn 2816 --experts 8 --tokens 2048 --mean-k 2 --null-share 0.2 --json out.json
python tools/bench_moe.py --shape uni-moe-2 --scale 4 --linear      # time against assignments and null share

Every contender's result is checked before it is timed. All sides run with glibc's malloc keeping its memory and with
huge pages (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, THP_MEM_ALLOC_ENABLE), as training does: without them,
first touches of fresh pages are what is measured. Exit status: 0 done, 1 one of our own ops gave a wrong result, 2 bad
input.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.moe_shapes import NAMED, Shape  # noqa: E402
from benchmarks.warm_heap import shared_environment, with_warm_heap  # noqa: E402

OPS = ("permute", "unpermute", "permute+unpermute", "grouped_gemm", "expert_mlp", "topp_route", "layer")
SIZES = ("hidden", "ffn", "experts", "tokens", "mean_k", "null_share", "skew", "fixed_k")
EXIT_BAD_INPUT = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=tuple(NAMED), help="a named shape; the sizes below override it")
    p.add_argument("--scale", type=int, default=1, help="divide hidden and ffn of the shape by this, to fit a laptop")
    for name, text in (("hidden", "model width"), ("ffn", "width of an expert"), ("experts", "routed experts")):
        p.add_argument(f"--{name}", type=int, help=text)
    p.add_argument("--tokens", type=int, help="tokens of a micro-batch")
    p.add_argument("--mean-k", type=float, help="slots per token, null ones included, on average")
    p.add_argument("--null-share", type=float, help="share of the slots that are null, in [0, 1)")
    p.add_argument("--skew", type=float, help="popularity of expert r is r^-SKEW; 0 is balanced")
    p.add_argument("--fixed-k", action=argparse.BooleanOptionalAction, help="as many experts for every token")
    p.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    p.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    p.add_argument("--repeats", type=int, default=7, help="rounds, of which the median is reported (default 7)")
    p.add_argument("--op", action="append", choices=OPS, help="measure this op only; may be repeated")
    p.add_argument(
        "--linear", action="store_true", help="the layer's time against mean k 1 to 4 and null share 0 to 0.5"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    return p


def shape_of(options: argparse.Namespace) -> Shape:
    """What to measure; ValueError with field, value and fix where it cannot be."""
    if options.shape is None:
        missing = [n for n in ("hidden", "ffn", "experts", "tokens", "mean_k") if getattr(options, n) is None]
        if missing:
            names = ", ".join("--" + n.replace("_", "-") for n in missing)
            raise ValueError(f"{names}: not given; name a shape (--shape {'|'.join(NAMED)}) or give all sizes")
    for name in ("hidden", "ffn", "experts", "tokens", "mean_k", "scale", "threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be positive")
    if options.null_share is not None and not 0 <= options.null_share < 1:
        raise ValueError(f"--null-share {options.null_share}: must lie in [0, 1); 0.5 makes every second slot null")
    if options.skew is not None and options.skew < 0:
        raise ValueError(f"--skew {options.skew}: must not be negative; 0 is balanced")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {options.device}: use cpu or cuda")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json {options.json}: its directory does not exist; create it first")
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    shape = replace(NAMED[options.shape].scaled(options.scale), **sizes) if options.shape else Shape(**sizes)
    shape.check()
    return shape


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; the exit status."""
    options = parser().parse_args(arguments)
    try:
        return measure(shape_of(options), options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def measure(shape: Shape, options: argparse.Namespace) -> int:
    """Run what was asked for."""
    from megatron_omni.platform.device import accelerator_present, install

    install()
    from benchmarks import bench_moe, bench_moe_linear

    if options.device == "cuda" and not accelerator_present():
        raise ValueError("--device cuda: no CUDA device is usable here; use --device cpu")
    settings = {k: getattr(options, k) for k in ("dtype", "device", "threads", "repeats")}
    print("environment of all sides: " + " ".join(f"{k}={v}" for k, v in shared_environment().items()))
    if options.linear:
        report = bench_moe_linear.run(shape, **settings)
        print(bench_moe_linear.table(report))
    else:
        report = bench_moe.run(shape, ops=options.op or OPS, **settings)
        print(bench_moe.table(report))
        print(bench_moe.recommendation(report))
    if options.json is not None:
        bench_moe.write_json(report, options.json)
    return int(any(f" {bench_moe.OURS}:" in what for what in report.wrong))


if __name__ == "__main__":
    with_warm_heap()
    sys.exit(main())
