"""A speech generator of random weights with its codec, as commands find one on disk."""

from pathlib import Path

from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.config.run import Recipe
from megatron_omni.models.generators.codec import save_codec
from tests.distributed.tiny_speech import tiny_codec
from tests.unit.test_speech_conversion import CODES
from tests.unit.test_speech_upcycle import write_generator


def write_speaker(root: Path) -> tuple[Path, Path]:
    """Folders of a generator that knows Jenny and Brian, and of its codec. It is imported as released ones are."""
    fingerprint = save_codec(tiny_codec(CODES), root / "codec")
    hf = write_generator(root / "released", seed=1)
    opened = open_sources(language=None, speech=hf)
    speech = opened.model.speech
    assert speech is not None
    speech.codec, speech.codec_fingerprint, speech.voices = str(root / "codec"), fingerprint, ["Jenny", "Brian"]
    speech.most_codes_per_token, speech.max_codes = 4.0, 60
    import_checkpoint(opened.parts, Recipe(model=opened.model), root / "speaker", wanted=opened.wanted, tokenizer=hf)
    return root / "speaker", root / "codec"
