"""One flipped bit, in any file that a conversion has written, is found by ``verify``: imports, mixtures, exports.

``make stress`` (OMNI_STRESS=1) flips a hundred bits of every file instead of one.
"""

import os
import random
from pathlib import Path

import pytest
import torch

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.upcycle import upcycle
from megatron_omni.checkpoint.verify import verify
from megatron_omni.config.run import Recipe
from tests.distributed.test_omni_layouts import MODEL as TINY_OMNI
from tests.unit.dense_checkpoints import MODEL, change, omni, write_dense

FLIPS = 100 if os.environ.get("OMNI_STRESS") == "1" else 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory of each kind, with everything that may be in it: carried weights, shards, a tokenizer."""
    root = tmp_path_factory.mktemp("written")
    hf = write_dense(root / "hf", omni(MODEL, TINY_OMNI))
    change(hf, lambda tensors: tensors.update({"speech_generator.norm.weight": torch.ones(3)}))
    opened = open_sources(language=hf)
    import_checkpoint(
        opened.parts, Recipe(model=opened.model), root / "import", wanted=opened.wanted, layout=Layout(tp=2),
        tokenizer=hf,
    )  # fmt: skip
    upcycle({"vision": hf, "base": hf}, root / "mixture", layout=Layout(ep=2))
    export_checkpoint(open_ours(root / "import"), root / "export", max_shard_bytes=100_000)
    return {kind: root / kind for kind in ("import", "mixture", "export")}


@pytest.mark.parametrize("kind", ["import", "mixture", "export"])
def test_one_flipped_bit_in_any_file_is_found(written: dict[str, Path], kind: str) -> None:
    directory, pick, unseen = written[kind], random.Random(11), []
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    assert len(files) >= (8 if kind == "export" else 10)
    assert verify(directory)[-1].endswith("all equal")
    for file in files:
        content = file.read_bytes()
        for _ in range(FLIPS):
            bit = pick.randrange(8 * len(content))
            file.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
            try:
                verify(directory)
            except (CheckpointError, ValueError):
                continue
            unseen.append(f"bit {bit} of {file.relative_to(directory)}")
        file.write_bytes(content)
    assert not unseen
    verify(directory)
