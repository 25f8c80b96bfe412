"""The process that draws: ``python -m megatron_omni.serve.painter_process LINK CHECKPOINT VAE PICTURES``, started by
``megatron-omni serve``.

What draws of a checkpoint (``image.*``) on one rank of its own, and its codec of pictures (a folder, or nothing: the one that the
recipe names); so many PICTURES are drawn together. LINK is an inherited descriptor, the pair of sockets to the process that speaks
HTTP (picture_link.py). It takes no signals: when the other end is closed, it leaves.
"""

import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_omni.serve.maker import run
from megatron_omni.serve.picture_link import PainterReady, ToPainter


def serve(link: Connection, path: str, codec_folder: str, pictures: int) -> None:
    """Load and draw; EOFError where the other end is closed, ValueError where it cannot be loaded."""
    from megatron_omni.platform.device import device, install

    install()
    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.models.generators.vae import load_picture_codec
    from megatron_omni.serve.painter import Painter

    checkpoint = open_checkpoint(Path(path))
    config = checkpoint.recipe.model.image
    if config is None:
        raise ValueError(f"{path}: the model draws nothing (model.image is null)")
    folder = codec_folder or config.vae
    if folder is None:
        raise ValueError(f"{path}: names no codec of pictures (model.image.vae is null); give its folder with --vae")
    codec = load_picture_codec(folder)
    codec.check(config)
    painter = Painter(
        checkpoint.load_generator().image.eval(),
        codec.to(device()),
        model="/".join(checkpoint.directory.parts[-3:]),
        batch_size=pictures,
        receive=lambda: received(link),
    )
    link.send(PainterReady(fingerprint=codec.fingerprint))
    while True:
        if not painter.busy:
            painter.take(link.recv())
        for message in received(link):
            painter.take(message)
        for painted in painter.pictures():
            link.send(painted)


def received(link: Connection) -> Iterator[ToPainter]:
    """Messages that have come."""
    while link.poll():
        yield link.recv()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], serve, who="what draws"))
