"""How fast a speech generator speaks: real-time factor, its shares, the first sound, and that memory does not grow.

    python -m benchmarks.bench_speak --json FILE [--checkpoint DIR --codec DIR] [--seconds 20] [--batches 1 8]
        [--threads 1] [--long 150]

Without a checkpoint: random weights of the shape of recipes/tiny/speech (4 blocks of width 192, 4 experts of 512, 2 a token,
1024 codes) and a random codec of recipes/tiny/codec's shape (--codec names another); what is said is noise of the same cost.
A text of so many words is spoken that about ``--seconds`` of sound come, in pieces that continue from each other: alone, and
with as many others as ``--batches`` says. Times are wall time of one process with ``--threads`` threads; on a busy machine
compare ``cpu_factor``, the process' CPU time. ``--long``: seconds of one long text, and the memory after a fifth of it and at
its end. The file holds

    [{batch, seconds, real_time_factor, cpu_factor, engine, codec, python, first_sound_s, first_piece_s, ms_per_step}]
    [{long_seconds, rss_mib_at_fifth, rss_mib_at_end}]

``engine``, ``codec`` and ``python`` are shares of the wall time; the last is what is left: pieces, events, samples.
"""

import argparse
import json
import platform
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

WORDS = "one two three four five six seven eight nine ten"
PIECE_CODES = 80
"""Of a random model's piece: two seconds."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--codec", type=Path)
    parser.add_argument("--voice", default="any")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--long", type=float, default=0.0)
    options = parser.parse_args(arguments)
    from megatron_omni.platform.device import install

    install()
    import torch

    torch.set_num_threads(options.threads)
    model, codec, tokenizer, prompt = _opened(options)
    rows: list[dict[str, Any]] = [
        {"machine": platform.processor(), "torch": torch.__version__, "threads": options.threads}
    ]
    pieces = max(1, round(options.seconds * codec.codes_per_second / PIECE_CODES))
    _spoken(model, codec, tokenizer, prompt, batch=1, pieces=1)
    for batch in options.batches:
        rows.append(_spoken(model, codec, tokenizer, prompt, batch=batch, pieces=pieces))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.long:
        rows.append(_long(model, codec, tokenizer, prompt, seconds=options.long))
        print(json.dumps(rows[-1]), file=sys.stderr)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _opened(options: argparse.Namespace) -> tuple[Any, Any, Any, str]:
    """Model, codec, tokenizer and prompt."""
    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.generation.voices import codec_for, prompt_for

    if options.checkpoint is None:
        return _random(options.codec)
    checkpoint = open_checkpoint(options.checkpoint)
    config = checkpoint.recipe.model.speech
    if config is None:
        raise SystemExit(f"{options.checkpoint}: no speech generator")
    prompt = prompt_for(config, WORDS, voice=config.voices[0] if config.voices else options.voice)
    return checkpoint.load_model(), codec_for(config, options.codec), checkpoint.builder.tokenizer, prompt


def _random(folder: Path | None) -> tuple[Any, Any, Any, str]:
    import tempfile

    import torch

    from megatron_omni.config.generators import CodecConfig, SpeechConfig
    from megatron_omni.config.model import ModelConfig, MoEConfig
    from megatron_omni.config.run import Recipe
    from megatron_omni.data.tokenizer import load_tokenizer, train_sentencepiece
    from megatron_omni.models.build import build_model
    from megatron_omni.models.generators.codec import Codec, load_codec
    from megatron_omni.parallel.groups import initialize
    from megatron_omni.platform.seeds import named_generator

    path = Path(tempfile.mkdtemp(prefix="bench_speak_")) / "tokenizer.model"
    train_sentencepiece([f"{WORDS}. any"] * 20, path, vocab_size=310, model_type="bpe")
    moe = MoEConfig(
        num_routed_experts=4, num_null_experts=0, num_shared_experts=0, top_k=2, moe_ffn_hidden_size=512,
        sample_experts=False, gradient_estimator="none", input_jitter=0.0,
    )  # fmt: skip
    codec_config = CodecConfig(
        sample_rate=16_000, encoder="mel", strides=[4, 4, 5, 5], num_codes=1024, code_size=32, encoder_hidden_size=176,
        hidden_size=192, ffn_hidden_size=576, num_layers=4, num_bandwidths=1, dropout=0.0,
    )  # fmt: skip
    codec = load_codec(folder) if folder is not None else Codec(codec_config).eval()
    if folder is None:
        codec.draw_weights(lambda name: named_generator(0, name))
        codec.codebook.start(torch.randn(4096, 32), generator=named_generator(0, "start"))
    # Every piece of ten words has the same number of codes, whatever the random weights say.
    speech = SpeechConfig(num_codes=codec.config.num_codes, text_vocab_size=320, text_hidden_size=128, max_codes=PIECE_CODES,
                          least_codes_per_token=1000, most_codes_per_token=1000)  # fmt: skip
    model = ModelConfig(
        num_layers=4, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6, num_query_groups=2, kv_channels=32,
        mrope_section=[16, 0, 0], rotary_base=1e4, vocab_size=speech.ids.num_outputs, make_vocab_size_divisible_by=64,
        output_bias=True, moe=moe, vision=None, audio=None, speech=speech,
    )  # fmt: skip
    recipe = Recipe(model=model)
    recipe.optim.precision = "fp32"
    return build_model(recipe, initialize(recipe.parallel)), codec, load_tokenizer(str(path)), "any"


def _speaker(model: Any, codec: Any, tokenizer: Any, batch: int) -> Any:
    from megatron_omni.generation.engine import Engine
    from megatron_omni.generation.speaking import speech_limits
    from megatron_omni.generation.speech import Speaker

    config = model.language.model_config.speech
    limits = speech_limits(config, batch_size=batch)
    engine = Engine(model, tokenizer=tokenizer, pg=model.language.pg_collection, limits=limits)
    return Speaker(engine, codec, tokenizer, config)


def _spoken(model: Any, codec: Any, tokenizer: Any, prompt: str, *, batch: int, pieces: int) -> dict[str, Any]:
    from megatron_omni.generation.speech import PieceEvent, SoundEvent
    from megatron_omni.generation.utterance import Utterance

    speaker = _speaker(model, codec, tokenizer, batch)
    one = Utterance(name="0", prompt=prompt, text=f"{WORDS}. " * pieces)
    samples, first = 0, {}
    start, cpu = time.perf_counter(), time.process_time()
    for event in speaker.events(replace(one, name=str(n)) for n in range(batch)):
        first.setdefault(type(event), time.perf_counter() - start)
        samples += len(event.wave) if isinstance(event, SoundEvent) else 0
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    speaker.engine.close()
    seconds = samples / codec.sample_rate
    steps = seconds * codec.codes_per_second / batch
    return {
        "batch": batch,
        "seconds": round(seconds, 2),
        "real_time_factor": round(wall / seconds, 4),
        "cpu_factor": round(cpu / seconds, 4),
        "engine": round(speaker.engine.step_seconds / wall, 3),
        "codec": round(speaker.codec_seconds / wall, 3),
        "python": round(1 - (speaker.engine.step_seconds + speaker.codec_seconds) / wall, 3),
        "first_sound_s": round(first[SoundEvent], 3),
        "first_piece_s": round(first[PieceEvent], 3),
        "ms_per_step": round(1000 * speaker.engine.step_seconds / steps, 3),
    }


def _long(model: Any, codec: Any, tokenizer: Any, prompt: str, *, seconds: float) -> dict[str, Any]:
    """One text, and the process' memory while it is spoken."""
    from megatron_omni.generation.speech import SoundEvent
    from megatron_omni.generation.utterance import Utterance

    speaker = _speaker(model, codec, tokenizer, 1)
    speaker.submit(Utterance(name="long", prompt=prompt), open=True)
    words = tokenizer.encode(f"{WORDS}. ")
    samples, at_fifth = 0, 0.0
    while samples < seconds * codec.sample_rate:
        speaker.feed("long", words)
        while speaker.busy:
            samples += sum(len(event.wave) for event in speaker.step() if isinstance(event, SoundEvent))
        if not at_fifth and samples > seconds * codec.sample_rate / 5:
            at_fifth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speaker.engine.close()
    end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"long_seconds": seconds, "rss_mib_at_fifth": round(at_fifth, 1), "rss_mib_at_end": round(end, 1)}


if __name__ == "__main__":
    sys.exit(main())
