"""``megatron-omni convert codec``: WavTokenizer's released files, or a run that trained a codec, to a codec's folder, and such
a folder back to the released files. A run that trained a codec of pictures becomes such a codec's folder (generators/vae.py).

Output is written beside its place under a hidden name and renamed when it is whole; an existing result is never overwritten.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.convert import check_space, disk_errors
from megatron_omni.checkpoint.export import find_directory
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.checkpoint.wavtokenizer import find_released, read_released, write_released
from megatron_omni.config.load import load_recipe
from megatron_omni.data.decode.cpu import decode_audio, decode_image
from megatron_omni.models.generators.codec import Codec, load_codec, save_codec
from megatron_omni.models.generators.codec_files import CONFIG_FILE, WEIGHTS_FILE
from megatron_omni.models.generators.conv_vae import ConvCodec
from megatron_omni.models.generators.conv_vae_calibration import calibrate
from megatron_omni.models.generators.local_decoder import localise
from megatron_omni.models.generators.vae import CONFIG_FILE as PICTURES_FILE
from megatron_omni.models.generators.vae import WEIGHTS_FILE as PICTURE_WEIGHTS
from megatron_omni.models.generators.vae import load_picture_codec
from megatron_omni.models.generators.vae_files import save_conv_codec

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""Of the weights of a trained codec's folder."""
RUN_CONFIG = "run_config.yaml"


def is_codec(folder: Path) -> bool:
    """Whether ``folder`` is a codec's."""
    return (folder / CONFIG_FILE).is_file()


def is_picture_codec(folder: Path) -> bool:
    """Whether ``folder`` is that of a codec of pictures that was trained here."""
    return (folder / PICTURES_FILE).is_file()


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
    pictures: Sequence[Path] = (),
) -> Iterator[str]:
    """Write ``out`` from ``source``; lines that say what was done. ConversionError for what does not fit.

    ``dtype``: of a trained codec's weights, a key of ``DTYPES``; None: fp32. ``span``: make the codec local, with the
    statistics of ``recordings`` (models/generators/local_decoder.py); a codec's folder then becomes one, not a release.
    ``pictures``: of a codec of pictures, those whose latents are to have a mean square of 1 (``latent_scale``), and no grid when
    they are decoded (``smoothing``).
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
    if pictures and not is_run(source):
        raise ConversionError(f"--pictures: for a run that trained a codec of pictures; {source} is none")
    if is_run(source):
        yield from _trained(source, out, dtype or "fp32", local, pictures)
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
    codec = load_picture_codec(folder) if is_picture_codec(folder) else load_codec(folder)
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


def _trained(
    source: Path, out: Path, dtype: str, local: Callable[[Codec], Codec] | None, pictures: Sequence[Path]
) -> Iterator[str]:
    directory = find_directory(source, check=True)
    recipe = load_recipe(directory / RUN_CONFIG)
    if recipe.model.picture_codec is not None:
        yield _trained_on_pictures(directory, out, dtype, local is not None, pictures)
        return
    if pictures:
        raise ConversionError(f"--pictures: {directory} trained no codec of pictures; leave it out")
    if recipe.model.codec is None:
        raise ConversionError(
            f"{directory}: of task={recipe.task}, no codec; name a run of task=codec or picture_codec"
        )
    codec, reader = Codec(recipe.model.codec), TorchDistReader(directory)
    codec.load_state_dict({name: reader.read(f"codec.{name}") for name in codec.state_dict()})
    codec = local(codec) if local is not None else codec
    about = {"run_config_sha256": commit.sha256(directory / RUN_CONFIG), "seed": recipe.seed, "step": directory.name}
    fingerprint = _whole(codec, out, lambda place: save_codec(codec, place, dtype=DTYPES[dtype], about=about))
    size = (out / WEIGHTS_FILE).stat().st_size
    yield f"wrote {out / WEIGHTS_FILE} of {directory}, {size} bytes, fingerprint {fingerprint}; model.speech.codec={out} takes it"


def _trained_on_pictures(directory: Path, out: Path, dtype: str, local: bool, pictures: Sequence[Path]) -> str:
    if local:
        raise ConversionError(f"--local: {directory} trained a codec of pictures, which is local already; leave it out")
    recipe, reader = load_recipe(directory / RUN_CONFIG), TorchDistReader(directory)
    assert recipe.model.picture_codec is not None
    codec = ConvCodec(recipe.model.picture_codec)
    codec.load_state_dict({name: reader.read(f"picture_codec.{name}") for name in codec.state_dict()})
    if pictures:
        calibrate(codec, _read(codec, pictures), noise=recipe.picture_codec.latent_noise)
    about = {"run_config_sha256": commit.sha256(directory / RUN_CONFIG), "seed": recipe.seed, "step": directory.name}
    fingerprint = _whole(codec, out, lambda place: save_conv_codec(codec, place, dtype=DTYPES[dtype], about=about))
    size = (out / PICTURE_WEIGHTS).stat().st_size
    return (
        f"wrote {out / PICTURE_WEIGHTS} of {directory}, {size} bytes, fingerprint {fingerprint}; model.image.vae={out} takes it, "
        f"with latent_scale={codec.latent_scale:g}, downsampling={codec.downsampling}, dit.latent_channels={codec.latent_channels}"
    )


def _read(codec: ConvCodec, pictures: Sequence[Path]) -> Iterator[torch.Tensor]:
    """Pixels [1, 3, H, W]; what a side has too much is cut off."""
    for path in pictures:
        pixels = torch.from_numpy(np.array(decode_image(str(path)))).permute(2, 0, 1)
        height, width = (length // codec.downsampling * codec.downsampling for length in pixels.shape[1:])
        yield pixels[None, :, :height, :width]


def _back(source: Path, out: Path) -> Iterator[str]:
    codec = load_codec(source)
    files = _whole(codec, out, lambda place: write_released(codec, place))
    yield f"wrote {', '.join(str(out / file.name) for file in files)}; weights that nothing runs are written as zeros"


def _whole[T](codec: Codec | ConvCodec, out: Path, write: Callable[[Path], T]) -> T:
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
