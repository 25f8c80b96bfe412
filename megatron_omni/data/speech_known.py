"""What a speech generator is to know of its training data: the voices of its records, and whose codes they are.

A run fills ``model.speech.voices`` and ``model.speech.codec_fingerprint`` in where its recipe leaves them open, so that its
checkpoints can list their voices and refuse another codec. Of a large source the first :data:`RECORDS_READ` records are read.
"""

from collections.abc import Iterable, Iterator

from megatron_omni.config.run import Recipe
from megatron_omni.data.codes import codec_fingerprint, open_codes
from megatron_omni.data.record import RecordError
from megatron_omni.data.sizes import spoken_answer
from megatron_omni.data.sources import Source, open_sources
from megatron_omni.data.spoken import CodesAt, Speech

RECORDS_READ = 20_000


def known_from_data(recipe: Recipe) -> tuple[list[str], str | None]:
    """(names of the voices, sorted; fingerprint of the codec, None where no file of codes names one)."""
    speech = recipe.model.speech
    assert speech is not None
    voices: set[str] = set()
    fingerprint = codec_fingerprint(speech.codec) if speech.codec is not None else None
    for answer in _spoken(open_sources(recipe.data.sources)):
        if answer.speaker is not None:
            voices.add(answer.speaker)
        if fingerprint is None and isinstance(answer.codes, CodesAt):
            fingerprint = open_codes(answer.codes.file).fingerprint
    return sorted(voices), fingerprint


def _spoken(sources: Iterable[Source]) -> Iterator[Speech]:
    for source in sources:
        for row in range(min(len(source), RECORDS_READ)):
            try:
                answer = spoken_answer(source[row])
            except RecordError:  # the loader says so
                continue
            if answer is not None:
                yield answer
