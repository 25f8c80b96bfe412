"""What asks a speech generator for a voice: the prompt of a voice by name or of a style, and the codec of its codes.

A checkpoint knows the voices of its training data (``model.speech.voices``) and the fingerprint of the codec whose codes it
learned (``model.speech.codec_fingerprint``). Where it knows none, any name is taken.
"""

from pathlib import Path

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.data.spoken import language_of, voice_prompt
from megatron_omni.models.generators.codec import Codec, load_codec
from megatron_omni.platform.device import device


def prompt_for(
    config: SpeechConfig, text: str, *, voice: str | None = None, style: str | None = None, language: str | None = None
) -> str:
    """The prompt for speaking ``text`` in a ``voice`` or a ``style``, exactly one. ``language``: that of the text's script
    where None. ValueError for neither or both, and a voice that is not known."""
    if (voice is None) == (style is None):
        raise ValueError(f"give a voice or a style, one of the two{_known(config)}")
    if style is not None:
        if not style.strip():
            raise ValueError("style is empty; describe one")
        return style
    assert voice is not None
    if config.voices and voice not in config.voices:
        raise ValueError(f"voice is {voice!r}, which this speech generator has not learned{_known(config)}")
    if not voice.strip() or ";" in voice:
        raise ValueError(f"voice is {voice!r}; a name has no semicolon and is not empty")
    return voice_prompt(speaker=voice, language=language or language_of(text))


def _known(config: SpeechConfig) -> str:
    return f"; its voices are {', '.join(config.voices)}" if config.voices else ""


def codec_for(config: SpeechConfig, folder: Path | None) -> Codec:
    """The codec in ``folder``, or in that of ``config``, on this rank's device. ValueError where there is none, or it is
    another one than the speech generator learned."""
    where = folder or (Path(config.codec) if config.codec else None)
    if where is None:
        raise ValueError("the checkpoint names no codec (model.speech.codec); name its folder with --codec")
    if not where.is_dir():
        raise ValueError(f"{where}: no such codec folder; name it with --codec")
    codec = load_codec(where)
    if config.codec_fingerprint is not None and codec.fingerprint != config.codec_fingerprint:
        raise ValueError(
            f"{where}: its fingerprint is {codec.fingerprint[:12]}, and the speech generator learned codes of the codec "
            f"{config.codec_fingerprint[:12]}; name that one's folder with --codec"
        )
    return codec.to(device())
