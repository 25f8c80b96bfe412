"""Dense checkpoints into a mixture: where every tensor comes from, what is drawn, and what is refused."""

import dataclasses
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.export import open_ours
from megatron_omni.checkpoint.families import open_language, open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.ledger import tensor_digest
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.checkpoint.upcycle import UpcycledSource, upcycle
from megatron_omni.checkpoint.upcycle_sources import OursSource
from megatron_omni.checkpoint.verify import verify
from megatron_omni.cli.upcycle import main
from megatron_omni.config.run import Recipe
from megatron_omni.data.tokenizer import ALL_SPECIALS, load_tokenizer
from tests.distributed.test_omni_layouts import MODEL as TINY_OMNI
from tests.parity import foreign
from tests.unit.dense_checkpoints import (
    FIRST_NEW,
    MODEL,
    NUM_NEW,
    change,
    change_config,
    omni,
    tensors_of,
    write_dense,
    write_tokenizer,
)

ROOT = Path(__file__).resolve().parents[2]
OMNI = omni(MODEL, TINY_OMNI)
LAYER = "model.layers.1.mlp."
EXPERT = LAYER + "dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts."
NEW_ROWS = slice(FIRST_NEW, FIRST_NEW + NUM_NEW)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four sources with one trunk; the warm-up runs have encoders, the base has none."""
    root = tmp_path_factory.mktemp("dense")
    base = write_dense(root / "base")
    return {
        "vision": write_dense(root / "vision", OMNI, seed=1, like=base),
        "speech1": write_dense(root / "speech1", OMNI, seed=2, like=base),
        "speech2": write_dense(root / "speech2", OMNI, seed=3, like=base),
        "base": base,
    }


@pytest.fixture(scope="module")
def mixture(dense: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upcycle(dense, tmp_path_factory.mktemp("mixture"))


def released(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of ours under the released names."""
    source = OursSource(open_ours(directory))
    return {key: source.read(key) for key in source.infos()}


def copied(dense: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Sources that a test may damage."""
    base = write_dense(tmp_path / "base")
    return {"vision": write_dense(tmp_path / "vision", seed=1, like=base), "base": base}


def test_every_tensor_comes_from_where_it_should(dense: dict[str, Path], mixture: Path) -> None:
    made, sources = released(mixture), {name: tensors_of(path) for name, path in dense.items()}
    expected: dict[str, Tensor] = {}
    for key, value in sources["base"].items():
        if ".mlp." not in key:
            expected[key] = value
    for layer in range(MODEL.num_layers):
        prefix = f"model.layers.{layer}.mlp."
        for number, name in enumerate(("vision", "speech1", "speech2", "base")):
            for projection in ("gate", "up", "down"):
                theirs = sources[name][f"{prefix}{projection}_proj.weight"]
                expected[
                    f"{prefix}dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts.{number}.{projection}_proj.weight"
                ] = theirs
        for number, part in enumerate((slice(0, 6), slice(6, 12))):  # an eighth of 48 each, disjoint
            for projection in ("gate", "up"):
                theirs = sources["base"][f"{prefix}{projection}_proj.weight"]
                expected[f"{prefix}fixed_real_moe.{number}.{projection}_proj.weight"] = theirs[part]
            down = sources["base"][f"{prefix}down_proj.weight"]
            expected[f"{prefix}fixed_real_moe.{number}.down_proj.weight"] = down[:, part]
    expected |= {k: v for k, v in sources["vision"].items() if k.startswith("vision_")}
    expected |= {k: v for k, v in sources["speech1"].items() if k.startswith("audio_")}
    gates = {key for key in made if key.endswith("mlp.gate.weight")}
    assert len(gates) == MODEL.num_layers and made.keys() == expected.keys() | gates
    for key, value in expected.items():
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = value[:FIRST_NEW].double().mean(0).to(value.dtype)
            value = value.clone()
            value[NEW_ROWS] = mean
        assert torch.equal(made[key], value), key


def test_the_gate_is_drawn_with_the_seed_and_nothing_else(
    dense: dict[str, Path], mixture: Path, tmp_path: Path
) -> None:
    base = {"base": dense["base"]}
    again = upcycle(base, tmp_path / "again", overrides=["model.moe.num_null_experts=4"], layout=None)
    other = upcycle(base, tmp_path / "other", seed=1)
    gates = [released(d)["model.layers.0.mlp.gate.weight"] for d in (mixture, again, other)]
    assert gates[0].shape == (7, 32) and gates[1].shape == (7, 32)
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[2], gates[0][: gates[2].shape[0]])
    values = torch.cat([g.flatten() for g in gates])
    assert float(values.std()) == pytest.approx(0.02, rel=0.1) and abs(float(values.mean())) < 0.003


def test_the_report_and_the_tokenizer(dense: dict[str, Path], mixture: Path) -> None:
    report = json.loads((mixture / "upcycle.json").read_text())
    assert report["experts"] == ["vision", "speech1", "speech2", "base"] and report["trunk"] == "base"
    reader = TorchDistReader(mixture)
    assert {line["key"] for line in report["tensors"]} == set(reader.tensors)
    for line in report["tensors"]:
        tensor = reader.read(line["key"], index=line.get("expert"))
        assert tensor_digest(tensor.contiguous()) == line["sha256"] and list(tensor.shape) == line["shape"]
        for part in line["from"]:
            drawn = part["as"].endswith("mlp.gate.weight")
            assert (part["source"] is None) == drawn and part["how"]
            if not drawn:
                assert part["key"] in tensors_of(dense[part["source"]])
    tokenizer = load_tokenizer(mixture / "tokenizer")
    saved = json.loads((mixture / "tokenizer" / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in saved["added_tokens"]}
    assert all(ids[name] == tokenizer.specials[name] for name in ALL_SPECIALS)
    assert report["new_token_rows"] == {n: i for n, i in ids.items() if i >= FIRST_NEW}
    config = json.loads((mixture / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"][str(FIRST_NEW)]["content"] == "<|audio_start|>"
    assert commit.find(mixture) == mixture, "the manifest holds the report and the tokenizer"


def test_a_vocabulary_without_room_grows(tmp_path: Path) -> None:
    small = write_dense(tmp_path / "small", dataclasses.replace(MODEL, vocab_size=280))
    directory = upcycle({"base": small}, tmp_path / "out")
    model = open_ours(directory).recipe.model
    assert model.vocab_size == FIRST_NEW + NUM_NEW > 280
    made, before = released(directory)["lm_head.weight"], tensors_of(small)["lm_head.weight"]
    assert torch.equal(made[:FIRST_NEW], before[:FIRST_NEW])
    assert torch.equal(made[NEW_ROWS], before[:FIRST_NEW].double().mean(0).float().expand(NUM_NEW, -1))


def test_rows_that_are_kept_must_be_there(tmp_path: Path) -> None:
    small = write_dense(tmp_path / "small", dataclasses.replace(MODEL, vocab_size=280))
    with pytest.raises(ValueError, match=rf"small: expected rows for {FIRST_NEW + NUM_NEW} token ids, found 280"):
        upcycle({"base": small}, tmp_path / "out", token_rows="keep")


def test_token_rows_are_kept_where_asked_for(dense: dict[str, Path], tmp_path: Path) -> None:
    made = released(upcycle({"base": dense["base"]}, tmp_path / "out", token_rows="keep"))
    assert torch.equal(made["lm_head.weight"], tensors_of(dense["base"])["lm_head.weight"])


def test_a_run_of_ours_is_a_source(dense: dict[str, Path], mixture: Path, tmp_path: Path) -> None:
    """The same result from distributed checkpoints as from the directories that they were imported from."""
    runs = {}
    for name, path in dense.items():
        model, part = open_language(path)
        runs[name] = tmp_path / name
        import_checkpoint(
            [part], Recipe(model=model), runs[name], wanted=part.rows, layout=Layout(tp=2, pp=2), tokenizer=path
        )
    made, before = released(upcycle(runs, tmp_path / "out")), released(mixture)
    assert made.keys() == before.keys() and all(torch.equal(made[key], before[key]) for key in made)
    ledger = commit.find(runs["base"])
    assert ledger is not None
    (ledger / "conversion.json").unlink()  # as a run's own checkpoint: it has trained these rows
    commit.write_manifest(ledger)
    kept = released(upcycle(runs, tmp_path / "kept"))["lm_head.weight"]
    assert torch.equal(kept, tensors_of(dense["base"])["lm_head.weight"])


def test_trained_rows_of_special_tokens_survive_an_import(
    dense: dict[str, Path], mixture: Path, tmp_path: Path
) -> None:
    """A directory whose tokenizer has the tokens brings rows for them, whether it is imported first or not."""
    hf = copied(dense, tmp_path)["base"]
    shutil.copyfile(mixture / "tokenizer" / "tokenizer.json", hf / "tokenizer.json")
    model, part = open_language(hf)
    import_checkpoint([part], Recipe(model=model), tmp_path / "ours", wanted=part.rows, tokenizer=hf)
    for number, source in enumerate((hf, tmp_path / "ours")):
        made = released(upcycle({"base": source}, tmp_path / f"kept{number}"))
        assert torch.equal(made["lm_head.weight"], tensors_of(hf)["lm_head.weight"])
        made = released(upcycle({"base": source}, tmp_path / f"mean{number}", token_rows="mean"))
        assert torch.equal(made["lm_head.weight"][NEW_ROWS], released(mixture)["lm_head.weight"][NEW_ROWS])


def test_a_joined_model_is_a_source_although_its_carried_layers_have_no_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen2.5, SigLIP and Whisper imported into one: SigLIP's last layer and the rest of its head stay behind."""
    foreign.siglip(tmp_path / "eyes")
    opened = open_sources(language=write_dense(tmp_path / "hf"), vision=tmp_path / "eyes", draw_seed=1)
    recipe = Recipe(model=opened.model)
    import_checkpoint(opened.parts, recipe, tmp_path / "ours", wanted=opened.wanted, tokenizer=tmp_path / "hf")
    made = upcycle({"base": tmp_path / "ours"}, tmp_path / "mixture")
    assert "carried weights that the released layout has no place for" in caplog.text
    theirs = next(v for k, v in tensors_of(tmp_path / "eyes").items() if k.endswith("post_layernorm.weight"))
    assert torch.equal(released(made)["vision_tower.vision_tower.vision_model.post_layernorm.weight"], theirs)


def test_trunk_is_the_named_source_and_differences_are_measured(
    dense: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = copied(dense, tmp_path)
    key = "model.layers.1.self_attn.o_proj.weight"
    before = tensors_of(sources["base"])[key]
    change(sources["vision"], lambda tensors: tensors[key].mul_(1.25))
    made = upcycle(sources, tmp_path / "out", trunk="vision")
    assert torch.equal(released(made)[key], before * 1.25)
    expected = float((before * 0.25).norm() / (before * 1.25).norm())
    (gap,) = json.loads((made / "upcycle.json").read_text())["differences"]
    assert (gap["source"], gap["part"], gap["num_tensors"], gap["key"]) == ("base", "trunk", 1, key)
    assert gap["largest"] == pytest.approx(expected, rel=1e-5)
    assert "the trunk of base differs" in caplog.text and f"{expected:.3g} in {key}" in caplog.text


def test_a_trunk_that_is_not_used_may_not_be_damaged(dense: dict[str, Path], tmp_path: Path) -> None:
    sources = copied(dense, tmp_path)
    change(sources["vision"], lambda tensors: tensors["model.norm.weight"][2:3].fill_(math.nan))
    with pytest.raises(ValueError, match=r"vision/model\.safetensors: 'model\.norm\.weight': expected finite.*found 1"):
        upcycle(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_makes_every_tensor_again(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the dense checkpoints; a directory that happens to be called ``upcycled`` is none of them."""
    sources = copied(dense, tmp_path)
    made = upcycle(sources, tmp_path / "upcycled", seed=5)
    monkeypatch.chdir(tmp_path)
    assert verify(Path("upcycled"))[1].endswith("tensors made again from upcycled, all equal")
    weights = sources["vision"] / "model.safetensors"
    before = weights.read_bytes()
    change(sources["vision"], lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][:1].add_(1e-3))
    with pytest.raises(CheckpointError, match=r"vision/model\.safetensors: is not the file that was converted"):
        verify(Path("upcycled"))
    weights.write_bytes(before)
    report = json.loads((made / "upcycle.json").read_text())
    (made / "upcycle.json").write_text(json.dumps(report | {"seed": 6}))
    commit.write_manifest(made)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.gate\.weight do not make the checkpoint's"):
        verify(Path("upcycled"))
    sources["vision"].rename(tmp_path / "gone")
    assert f"{sources['vision']} is not here" in verify(Path("upcycled"))[1]


def test_encoders_that_are_left_out_are_compared_and_equal_trunks_are_not_mentioned(
    dense: dict[str, Path], mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gaps = json.loads((mixture / "upcycle.json").read_text())["differences"]
    used = {"vision": "vision", "audio": "speech1"}
    assert {(gap["part"], gap["source"]) for gap in gaps} == {
        (part, name) for part in used for name in ("vision", "speech1", "speech2") if name != used[part]
    }
    for gap in gaps:
        ours, theirs = tensors_of(dense[used[gap["part"]]]), tensors_of(dense[gap["source"]])
        keys = [key for key in ours if key.startswith(f"{gap['part']}_")]
        distances = {key: float((ours[key] - theirs[key]).norm() / ours[key].norm()) for key in keys}
        assert gap["num_tensors"] == len(keys) and gap["largest"] == pytest.approx(max(distances.values()), rel=1e-5)
        assert gap["key"] == max(distances, key=distances.__getitem__)
    other = write_dense(
        tmp_path / "other", dataclasses.replace(OMNI, vision=dataclasses.replace(OMNI.vision, ffn_hidden_size=20))
    )
    change(other, lambda tensors: tensors.update({"speech_generator.norm.weight": torch.ones(3)}))
    upcycle({"vision": dense["vision"], "speech1": other, "base": dense["base"]}, tmp_path / "out")
    assert f"the audio of vision differs from that of speech1, which is used: {len(keys)} tensors" in caplog.text
    assert f"left out: {other}: its vision encoder, which is not configured" in caplog.text
    assert f"left out: {other}: 1 weights of generators" in caplog.text


# ------------------------------------------------------------------------------------------------ bad input


def spoil(sources: dict[str, Path], what: str) -> None:
    gate = "model.layers.0.mlp.gate_proj.weight"
    vision = sources["vision"]
    match what:
        case "tokenizer":
            write_tokenizer(vision, swap=True)
        case "special":
            file = vision / "tokenizer.json"
            file.write_text(file.read_text().replace("<|image_pad|>", "<|other_pad|>"))
        case "shape":
            change(vision, lambda t: t.update({gate: t[gate][:40]}))
        case "missing":
            change(vision, lambda t: t.pop(gate))
        case "unknown":
            change(vision, lambda t: t.update({"model.layers.0.lora_A": torch.zeros(2)}))
        case "architecture":
            change_config(vision, model_type="llama")
        case "size":
            write_dense(vision, dataclasses.replace(MODEL, num_layers=1), seed=1)
        case "rotary":
            change_config(vision, rope_theta=10_000.0)
        case "nan":
            change(vision, lambda t: t[gate][3].fill_(math.nan))
        case "nan slice":
            change(sources["base"], lambda t: t[gate][7].fill_(math.inf))
        case "mixture":
            change_config(vision, **moe_fields())
        case "added token":
            for source, number in ((vision, 0), (sources["base"], 1)):
                content = json.loads((source / "tokenizer.json").read_text())
                word = {**content["added_tokens"][0], "content": f"<tool{number}>", "special": False}
                content["added_tokens"].append({**word, "id": FIRST_NEW})
                (source / "tokenizer.json").write_text(json.dumps(content))
        case "truncated":
            weights = vision / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-64])
        case "no tokenizer":
            (sources["base"] / "tokenizer.json").unlink()
        case "nowhere":
            (vision / "config.json").unlink()


def moe_fields() -> dict[str, Any]:
    from megatron_omni.checkpoint.uni_moe import config_to_theirs
    from megatron_omni.config.data import DataConfig
    from megatron_omni.config.model import MoEConfig

    mixture = dataclasses.replace(MODEL, moe=MoEConfig(moe_ffn_hidden_size=48, moe_shared_expert_intermediate_size=6))
    return config_to_theirs(mixture, DataConfig(), tokens={})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tokenizer", r"vision: another tokenizer than .*base"),
        ("added token", r"vision: another tokenizer than .*base.*: found vocabulary"),
        ("special", r"vision: another tokenizer than .*base.*'<\|"),
        (
            "shape",
            r"model\.safetensors: 'model\.layers\.0\.mlp\.gate_proj\.weight': expected shape \[48, 32\], found \[40",
        ),
        (
            "missing",
            r"vision: expected the key 'model\.layers\.0\.mlp\.gate_proj\.weight' of shape \[48, 32\], found none",
        ),
        ("unknown", r"model\.safetensors: the key 'model\.layers\.0\.lora_A' has no place"),
        ("architecture", r"config\.json: model_type: expected one of .*found 'llama'"),
        ("size", r"vision: model\.num_layers: expected 2 as in .*base, found 1"),
        ("rotary", r"vision: model\.rotary_base: expected 1000000\.0 as in .*base, found 10000\.0"),
        ("nan", r"model\.safetensors: 'model\.layers\.0\.mlp\.gate_proj\.weight': expected finite weights, found 32"),
        ("nan slice", r"base/model\.safetensors: 'model\.layers\.0\.mlp\.gate_proj\.weight': expected finite"),
        ("mixture", r"vision: is a mixture of experts already"),
        ("truncated", r"model\.safetensors: truncated"),
        ("no tokenizer", r"base: expected a tokenizer .*found none"),
        ("nowhere", r"vision"),
    ],
)
def test_bad_sources_are_one_error_and_leave_nothing(
    dense: dict[str, Path], tmp_path: Path, what: str, message: str
) -> None:
    sources = copied(dense, tmp_path)
    spoil(sources, what)
    with pytest.raises(ValueError, match=message):
        upcycle(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe=null", "makes a mixture"),
        ("model.moe.num_routed_experts=3", "there are 1 dense checkpoints"),
        ("model.moe.moe_ffn_hidden_size=24", "routed experts are the feed-forward parts as they are, 48 wide"),
        ("model.moe.num_shared_experts=9", "no 54 disjoint columns"),
        ("model.hidden_size=16", "model.hidden_size=16: the sources have 32"),
        ("model.moe.num_nul_experts=1", "did you mean 'num_null_experts'"),
    ],
)
def test_settings_that_cannot_be_had_by_copying(
    dense: dict[str, Path], tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle({"base": dense["base"]}, tmp_path / "out", overrides=[override])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_or_full_disk_leaves_nothing_and_a_rerun_works(
    dense: dict[str, Path], tmp_path: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = UpcycledSource.read, 0

    def failing(self: UpcycledSource, key: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 20:
            raise failure
        return read(self, key)

    monkeypatch.setattr(UpcycledSource, "read", failing)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        upcycle(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert upcycle(dense, tmp_path / "out").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_and_is_status_130(dense: dict[str, Path], tmp_path: Path, number: int) -> None:
    """In a process of its own, in the middle of writing."""

    def run() -> None:
        read, count = UpcycledSource.read, 0

        def stopped(self: UpcycledSource, key: str) -> Tensor:
            nonlocal count
            count += 1
            if count == 20:
                assert list((tmp_path / "out").rglob("*.distcp")), "nothing is being written"
                os.kill(os.getpid(), number)
            return read(self, key)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        UpcycledSource.read = stopped  # type: ignore[method-assign]
        words = ["--base", str(dense["base"]), "--out", str(tmp_path / "out")]
        os._exit(runpy.run_path(str(ROOT / "tools" / "upcycle.py"))["main"](words))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 130 and not (tmp_path / "out").exists()
    assert upcycle({"base": dense["base"]}, tmp_path / "out").is_dir()


def run_tool(*words: str | Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """tools/upcycle.py; ``limit`` is the largest file in KiB that it may write."""
    shell = f"ulimit -f {limit}; " if limit is not None else ""
    command = f'{shell}exec "$0" "$@"'
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command, sys.executable, "-W", "ignore", "tools/upcycle.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


def run_forked(*words: str | Path, log: Path) -> int:
    """Exit status of the tool in a forked process, which imports nothing again; its stderr goes to ``log``."""

    def run() -> None:
        with log.open("w") as sys.stderr:
            status = main([str(word) for word in words])
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "the tool hangs"
    return process.exitcode


def test_the_tool_answers_with_an_exit_status(dense: dict[str, Path], mixture: Path, tmp_path: Path) -> None:
    sources = ["--base", dense["base"], "--vision", dense["vision"], "--speech", dense["speech1"], dense["speech2"]]
    done = run_tool(*sources, "--out", tmp_path / "out", "--tp", "2", "--ep", "2")
    assert done.returncode == 0, done.stderr
    made, before = released(tmp_path / "out"), released(mixture)
    assert all(torch.equal(made[key], before[key]) for key in before)
    log = tmp_path / "log"
    assert run_forked(*sources, "--out", tmp_path / "out", log=log) == 2
    assert "holds a checkpoint already" in log.read_text()
    words = ("--out", tmp_path / "other", "--trunk", "speech7", *sources, "model.moe.top_p=0.9")
    assert run_forked(*words, log=log) == 2
    assert "--trunk speech7" in (said := log.read_text()) and "Traceback" not in said


def test_a_disk_that_fills_up_is_one_error(dense: dict[str, Path], tmp_path: Path) -> None:
    done = run_tool("--base", dense["base"], "--out", tmp_path / "out", limit=40)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert str(tmp_path / "out") in done.stderr and not (tmp_path / "out").exists()
