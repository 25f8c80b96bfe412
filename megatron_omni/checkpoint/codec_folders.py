"""``megatron-omni convert codec``: WavTokenizer's released files, or a run that trained a codec, to a codec's folder, and such
a folder back to the released files.

Output is written beside its place under a hidden name and renamed when it is whole; an existing result is never overwritten.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.convert import check_space, disk_errors
from megatron_omni.checkpoint.export import find_directory
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.checkpoint.wavtokenizer import find_released, read_released, write_released
from megatron_omni.config.load import load_recipe
from megatron_omni.data.decode.cpu import decode_audio
from megatron_omni.models.generators.codec import Codec, load_codec, save_codec
from megatron_omni.models.generators.codec_files import CONFIG_FILE, WEIGHTS_FILE
from megatron_omni.models.generators.local_decoder import localise

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""Of the weights of a trained codec's folder."""
RUN_CONFIG = "run_config.yaml"


def is_codec(folder: Path) -> bool:
    """Whether ``folder`` is a codec's."""
    return (folder / CONFIG_FILE).is_file()


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run's, or a checkpoint."""
    return (folder / commit.CHECKPOINTS).is_dir() or (folder / commit.MANIFEST).is_file()


def convert_codec(
    source: Path,
    out: Path,
    *,
    yaml: Path | None = None,
    dtype: str | None = None,
    span: Sequence[int] = (),
    recordings: Sequence[Path] = (),
) -> Iterator[str]:
    """Write ``out`` from ``source``; lines that say what was done. ConversionError for what does not fit.

    ``dtype``: of a trained codec's weights, a key of ``DTYPES``; None: fp32. ``span``: make the codec local, with the
    statistics of ``recordings`` (models/generators/local_decoder.py); a codec's folder then becomes one, not a release.
    """
    if bool(span) != bool(recordings):
        raise ConversionError(
            "--local and --recordings: each needs the other; a span, and sound to take statistics from"
        )
    if not source.exists():
        raise ConversionError(f"{source}: no such file or folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConversionError(f"{out}: exists already; choose another --out or remove it")
    if yaml is not None and (is_codec(source) or is_run(source)):
        raise ConversionError(f"--yaml {yaml}: {source} has its configuration in it; leave it out")
    if dtype is not None and not is_run(source) and not (span and is_codec(source)):
        raise ConversionError(f"--dtype {dtype}: for a run that trained a codec alone; {source} is none")
    local = partial(_localised, span=span, recordings=recordings) if span else None
    if is_run(source):
        yield from _trained(source, out, dtype or "fp32", local)
    elif is_codec(source) and local is not None:
        codec = local(load_codec(source))
        fingerprint = _whole(codec, out, lambda place: save_codec(codec, place, dtype=DTYPES[dtype or "fp32"]))
        yield f"wrote {out / WEIGHTS_FILE}, fingerprint {fingerprint}; its codes are those of {source}"
    elif is_codec(source):
        yield from _back(source, out)
    elif local is not None:
        raise ConversionError(f"--local: {source} is neither a codec's folder nor a run; convert it to a folder first")
    else:
        yield from _in(*find_released(source, yaml), out)


def verify_codec(folder: Path) -> str:
    """Read ``folder`` whole; ValueError where files and fingerprint do not belong together."""
    codec = load_codec(folder)
    count = sum(value.numel() for value in codec.state_dict().values())
    return f"{folder}: {count} values, all finite, fingerprint {codec.fingerprint}: as written"


def _in(checkpoint: Path, yaml: Path, out: Path) -> Iterator[str]:
    released = read_released(checkpoint, yaml)
    about = {"source": checkpoint.name, "source_sha256": commit.sha256(checkpoint), "architecture": "WavTokenizer"}
    fingerprint = _whole(released.codec, out, lambda place: save_codec(released.codec, place, about=about))
    dropped = ", ".join(f"{count} of {start}" for start, count in sorted(released.dropped.items()))
    total = released.used + sum(released.dropped.values())
    yield f"{checkpoint}: {total} weights, {released.used} used, dropped: {dropped or 'none'}"
    yield f"wrote {out / WEIGHTS_FILE}, fingerprint {fingerprint}; model.speech.codec={out} takes it"


def _localised(codec: Codec, *, span: Sequence[int], recordings: Sequence[Path]) -> Codec:
    rate = codec.sample_rate
    return localise(codec, (torch.from_numpy(decode_audio(path, sample_rate=rate)) for path in recordings), span)


def _trained(source: Path, out: Path, dtype: str, local: Callable[[Codec], Codec] | None) -> Iterator[str]:
    directory = find_directory(source, check=True)
    recipe = load_recipe(directory / RUN_CONFIG)
    if recipe.model.codec is None:
        raise ConversionError(f"{directory}: of task={recipe.task}, no codec; name a run of task=codec")
    codec, reader = Codec(recipe.model.codec), TorchDistReader(directory)
    codec.load_state_dict({name: reader.read(f"codec.{name}") for name in codec.state_dict()})
    codec = local(codec) if local is not None else codec
    about = {"run_config_sha256": commit.sha256(directory / RUN_CONFIG), "seed": recipe.seed, "step": directory.name}
    fingerprint = _whole(codec, out, lambda place: save_codec(codec, place, dtype=DTYPES[dtype], about=about))
    size = (out / WEIGHTS_FILE).stat().st_size
    yield f"wrote {out / WEIGHTS_FILE} of {directory}, {size} bytes, fingerprint {fingerprint}; model.speech.codec={out} takes it"


def _back(source: Path, out: Path) -> Iterator[str]:
    codec = load_codec(source)
    files = _whole(codec, out, lambda place: write_released(codec, place))
    yield f"wrote {', '.join(str(out / file.name) for file in files)}; weights that nothing runs are written as zeros"


def _whole[T](codec: Codec, out: Path, write: Callable[[Path], T]) -> T:
    """``write`` into a hidden folder that becomes ``out``."""
    check_space(out, sum(value.numel() * 4 for value in codec.state_dict().values()))
    hidden = out.with_name(f".{out.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        with disk_errors(out):
            result = write(hidden)
            commit.flush_tree(hidden)
            if out.exists():
                out.rmdir()
            hidden.rename(out)
            return result
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
