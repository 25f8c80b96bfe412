"""A random Hugging Face directory in the shape of Qwen2.5-7B: bf16 safetensors in shards, config.json, a small tokenizer.

python benchmarks/make_checkpoint.py DIR [--layers 28] [--shards 4] [--seed 0] [--hidden 3584]

Weights are random bits with magnitudes around 0.005, pieces of one pool; 28 layers are 15.2 GB.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy
import tokenizers
import torch

from megatron_omni.checkpoint.hf_config import mrope_section, qwen2_config
from megatron_omni.checkpoint.names import expand, qwen2_rows
from megatron_omni.checkpoint.progress import ByteProgress
from megatron_omni.checkpoint.tensor_files import SafetensorsWriter
from megatron_omni.config.model import ModelConfig

BLOCK = 1 << 22


def shape_of_7b(*, layers: int, scale: int = 1) -> ModelConfig:
    """Qwen2.5-7B with ``layers`` layers; ``scale`` divides every width (8 for a trial run)."""
    heads = 28 // scale if scale in (1, 2, 4, 7) else 4
    return ModelConfig(
        num_layers=layers,
        hidden_size=128 * heads,
        ffn_hidden_size=18944 // scale // 8 * 8,
        num_attention_heads=heads,
        num_query_groups=4 if heads % 4 == 0 else 1,
        mrope_section=mrope_section(128),
        moe=None,
        vision=None,
        audio=None,
    )


def random_pool(generator: numpy.random.Generator) -> numpy.ndarray:
    """Bits of bf16 values: random signs and mantissas, exponents 2^-9 .. 2^-6."""
    words = generator.integers(0, 1 << 64, 4 * BLOCK // 4, numpy.uint64).view(numpy.uint16)
    return (words & 0x81FF) | 0x3B00


def random_tensor(shape: tuple[int, ...], pool: numpy.ndarray, generator: numpy.random.Generator) -> torch.Tensor:
    """Random pieces of ``pool`` joined: drawn faster than a disk writes."""
    count = math.prod(shape)
    bits = numpy.empty(count, numpy.uint16)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        first = int(generator.integers(0, len(pool) - size))
        bits[start : start + size] = pool[first : first + size]
    return torch.from_numpy(bits.view(numpy.int16)).view(torch.bfloat16).reshape(shape)


def make(directory: Path, model: ModelConfig, *, shards: int, seed: int) -> int:
    """Write the directory; the bytes of its weights."""
    directory.mkdir(parents=True)
    shapes = [(k, s) for e in expand(qwen2_rows(model)) for k, s in zip(e.theirs, e.shapes)]
    total = sum(2 * math.prod(shape) for _, shape in shapes)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(shards)]
    done = 0
    for key, shape in shapes:
        groups[min(done * shards // total, shards - 1)].append((key, shape))
        done += 2 * math.prod(shape)
    generator, progress, weight_map = numpy.random.default_rng(seed), ByteProgress("make", total), {}
    pool = random_pool(generator)
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        writer = SafetensorsWriter(directory / name, [(key, torch.bfloat16, shape) for key, shape in group])
        for key, shape in group:
            tensor = random_tensor(shape, pool, generator)
            writer.write(key, tensor)
            progress.add(2 * tensor.numel())
            weight_map[key] = name
        writer.finish()
    progress.finish()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(qwen2_config(model, "bfloat16"), indent=2))
    alphabet = {chr(i): i for i in range(256)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[])).save(str(directory / "tokenizer.json"))
    return total


def main() -> int:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=1, help="divide every width, for a trial run")
    options = parser.parse_args()
    model = shape_of_7b(layers=options.layers, scale=options.scale)
    print(f"{make(options.directory, model, shards=options.shards, seed=options.seed) / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
