"""``megatron-omni convert codec``: WavTokenizer's released files to a codec's folder, and such a folder back.

Output is written beside its place under a hidden name and renamed when it is whole; an existing result is never overwritten.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.convert import check_space, disk_errors
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.wavtokenizer import find_released, read_released, write_released
from megatron_omni.models.generators.codec import Codec, load_codec, save_codec
from megatron_omni.models.generators.codec_files import CONFIG_FILE, WEIGHTS_FILE


def is_codec(folder: Path) -> bool:
    """Whether ``folder`` is a codec's."""
    return (folder / CONFIG_FILE).is_file()


def convert_codec(source: Path, out: Path, *, yaml: Path | None = None) -> Iterator[str]:
    """Write ``out`` from ``source``; lines that say what was done. ConversionError for what does not fit."""
    if not source.exists():
        raise ConversionError(f"{source}: no such file or folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConversionError(f"{out}: exists already; choose another --out or remove it")
    if is_codec(source):
        if yaml is not None:
            raise ConversionError(f"--yaml {yaml}: {source} is a codec's folder, which has its configuration in it")
        yield from _back(source, out)
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


def _back(source: Path, out: Path) -> Iterator[str]:
    codec = load_codec(source)
    files = _whole(codec, out, lambda place: write_released(codec, place))
    yield f"wrote {', '.join(str(out / file.name) for file in files)}; weights that nothing runs are written as zeros"


def _whole[T](codec: Codec, out: Path, write: Callable[[Path], T]) -> T:
    """``write`` into a hidden folder that becomes ``out``."""
    check_space(out, sum(value.numel() * 4 for value in codec.state_dict().values()))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with disk_errors(out):
            result = write(partial)
            commit.flush_tree(partial)
            if out.exists():
                out.rmdir()
            partial.rename(out)
            return result
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
