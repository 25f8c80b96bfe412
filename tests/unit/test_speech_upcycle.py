"""Dense speech generators into the mixture: which expert is whose, whose trunk, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_omni.chain import load_chain, run_upcycle
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.uni_moe_speech import PREFIX
from megatron_omni.checkpoint.upcycle import upcycle
from megatron_omni.checkpoint.upcycle_sources import OursSource
from megatron_omni.checkpoint.verify import verify
from megatron_omni.cli.upcycle import main
from megatron_omni.config.run import Recipe
from tests.unit.dense_checkpoints import write_dense, write_tokenizer
from tests.unit.test_speech_conversion import EXPERTS, FFN, LAYERS, WIDTH, drawn, tiny_shapes

NAMES = ("jenny", "brian", "xiaoxiao", "mixed")
EXPERT = PREFIX + "layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.{name}_proj.weight"


def write_generator(directory: Path, *, seed: int, prefix: str = PREFIX, dtype: torch.dtype = torch.float32) -> Path:
    """A dense generator as released, with a tokenizer."""
    directory.mkdir(parents=True)
    tensors = {
        prefix + k.removeprefix(PREFIX): v for k, v in drawn(tiny_shapes(experts=0), seed=seed, dtype=dtype).items()
    }
    torch.save(tensors, directory / "speech_gen_ep2.bin")
    (directory / "config.json").write_text(json.dumps({"transformer_attention_heads": 14}))
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The second one as a run of ours, the third without the prefix in its names."""
    root = tmp_path_factory.mktemp("dense")
    made = [
        write_generator(root / name, seed=seed, prefix="" if name == "xiaoxiao" else PREFIX)
        for seed, name in enumerate(NAMES)
    ]
    opened = open_sources(language=None, speech=made[1])
    ours = root / "brian_run"
    import_checkpoint(
        opened.parts, Recipe(model=opened.model), ours, wanted=opened.wanted, layout=Layout(tp=2), tokenizer=made[1]
    )
    return [made[0], ours, *made[2:]]


def released(directory: Path) -> dict[str, Tensor]:
    source = OursSource(open_ours(directory))
    return {key: source.read(key) for key in source.infos()}


def theirs(seed: int) -> dict[str, Tensor]:
    return drawn(tiny_shapes(experts=0), seed=seed)


@pytest.mark.parametrize("trunk", [None, 0])
def test_every_tensor_comes_from_where_it_should(
    dense: list[Path], trunk: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [] if trunk is None else ["--trunk", str(dense[trunk])]
    out = tmp_path / "out"
    assert main(["--experts", *map(str, dense), "--out", str(out), *words, "--ep", "2"]) == 0
    made, sources = released(out), [theirs(seed) for seed in range(4)]
    expected = {k: v for k, v in sources[3 if trunk is None else trunk].items() if ".mlp." not in k}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name in ("gate", "up", "down"):
                value = sources[expert][f"{PREFIX}layers.{layer}.mlp.{name}_proj.weight"]
                expected[EXPERT.format(layer=layer, expert=expert, name=name)] = value
    gates = {key: value for key, value in made.items() if "gate.wg" in key}
    assert len(gates) == LAYERS and made.keys() == expected.keys() | gates.keys()
    assert all(torch.equal(made[key], value) for key, value in expected.items())
    drawn_gates = torch.cat([gate.flatten() for gate in gates.values()])
    assert drawn_gates.shape == (LAYERS * EXPERTS * WIDTH,) and float(drawn_gates.std()) == pytest.approx(0.02, rel=0.1)
    assert "the trunk of expert2 differs from that of" in caplog.text
    lines = verify(out)
    assert lines[1].startswith("speech_gen: ") and lines[1].endswith("all equal")


def test_the_mixture_has_the_released_shape_and_goes_back(dense: list[Path], tmp_path: Path) -> None:
    paths = {f"expert{i + 1}": path for i, path in enumerate(dense)}
    upcycle(paths, tmp_path / "out", trunk="expert4")
    opened = open_ours(tmp_path / "out")
    moe = opened.recipe.model.moe
    assert moe is not None and opened.recipe.model.speech is not None
    assert (moe.num_routed_experts, moe.num_null_experts, moe.num_shared_experts, moe.top_k) == (4, 0, 0, 2)
    assert (moe.moe_ffn_hidden_size, moe.sample_experts, moe.input_jitter) == (FFN, False, 0.0)
    back = open_sources(language=None, speech=export_checkpoint(opened, tmp_path / "back"))
    assert {k.removeprefix(PREFIX) for k in back.parts[0].source.infos()} == set(tiny_shapes())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experts", "0"], "a mixture is made of two or more"),
        (["--experts", "0", "1", "--base", "0"], "leave out --base, --vision and --speech"),
        (["--experts", "0", "1", "--trunk", "text"], "text is a language model; only models of one kind"),
        (["--base", "text", "--speech", "0"], "jenny: is a speech generator, and"),
        (["--speech", "0"], "expected the base model, found none"),
        (["--experts", "0", "1", "model.moe.num_shared_experts=1"], "a speech generator has routed experts alone"),
        (["--experts", "0", "1", "--token-rows", "mean"], "is not trained; leave it out"),
        (["--experts", "0", "other"], "jenny: model.vocab_size: expected 24 as in"),
        (["--experts", "0", "predecessor"], "is a predecessor with a text table of its own"),
        (["--experts", "0", "mixture"], "is a mixture of experts already"),
        (["--experts", "0", "1", "--trunk", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_error(
    dense: list[Path], tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dense(tmp_path / "text")
    for name, shapes in (
        ("predecessor", tiny_shapes(experts=0, own_table=True)),
        ("mixture", tiny_shapes()),
        ("other", {k: (24, *s[1:]) if s[0] == 29 else s for k, s in tiny_shapes(experts=0).items()}),
    ):
        (tmp_path / name).mkdir()
        torch.save(drawn(shapes), tmp_path / name / "speech_gen_ep2.bin")
        (tmp_path / name / "config.json").write_text(json.dumps({"transformer_attention_heads": 14}))
        write_tokenizer(tmp_path / name)
    places = {
        "0": dense[0],
        "1": dense[1],
        **{n: tmp_path / n for n in ("text", "predecessor", "mixture", "other", "nowhere")},
    }
    given = [str(places.get(word, word)) for word in words]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and not (tmp_path / "out").exists()


def test_a_chain_merges_generators(dense: list[Path], tmp_path: Path) -> None:
    """Experts in the order of the stage, the trunk of the one that it names."""
    file = tmp_path / "chain.yaml"
    experts = ", ".join(map(str, dense))
    for given, message in (
        ("{vision: a}", "has no base, and no experts"),
        (f"{{experts: [{experts}], base: a}}", "leave out base, vision and speech"),
        (f"{{experts: [{experts}], trunk: a}}", "trunk: 'a' is none of its experts"),
    ):
        file.write_text(f"run_dir: {tmp_path}/run\nstages:\n  - {{name: upcycle, upcycle: {given}}}\n")
        with pytest.raises(ValueError, match=message):
            load_chain(file)
    file.write_text(
        f"run_dir: {tmp_path}/run\nstages:\n  - {{name: upcycle, upcycle: {{experts: [{experts}], trunk: {dense[0]}}}}}\n"
    )
    chain = load_chain(file)
    directory = run_upcycle(chain, chain.stages[0])
    report = json.loads((directory / "upcycle.json").read_text())
    assert report["trunk"] == "expert1" and report["sources"]["expert4"] == str(dense[3])
