"""Flow matching: direction, Euler, guidance, buckets, times, and the loss with its report."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from megatron_omni.config.pictures import DiTConfig
from megatron_omni.losses.flow import flow_loss, flow_report, flow_report_names, picture_losses
from megatron_omni.models.generators.dit import DiT
from megatron_omni.models.generators.flow import (
    Guidance,
    buckets,
    draw_times,
    euler,
    grid,
    guided,
    nearest_bucket,
    path,
    selection_noise,
    target,
)
from megatron_omni.models.generators.sampling import BranchConditions, sample

DOUBLE = torch.float64


def _pictures(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE), torch.randn(
        *shape, generator=generator, dtype=DOUBLE
    )


def test_one_is_data_and_the_target_leads_there() -> None:
    x1, x0 = _pictures(4, 3, 2, 2)
    assert torch.equal(path(x1, x0, torch.ones(4)), x1) and torch.equal(path(x1, x0, torch.zeros(4)), x0)
    t = torch.tensor([0.0, 0.25, 0.5, 0.9], dtype=DOUBLE)
    x_t = path(x1, x0, t)
    torch.testing.assert_close(x_t[1], 0.25 * x1[1] + 0.75 * x0[1], rtol=0, atol=1e-15)
    perfect = target(x1, x0)
    assert picture_losses(perfect, target(x1, x0)).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(x_t + (1 - t.view(-1, 1, 1, 1)) * perfect, x1, rtol=0, atol=1e-14)
    for steps in (1, 3):
        torch.testing.assert_close(euler(lambda x, t: perfect, x0, steps), x1.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_its_definition(shift) -> None:
    x0 = torch.tensor([[[[0.5]]], [[[-1.0]]]])
    seen = []

    def velocity(x, t):
        seen.append(t.tolist())
        return torch.sin(3 * x) + t.view(-1, 1, 1, 1)

    told: list[int] = []
    found = euler(velocity, x0, 4, shift, on_step=told.append)
    times = [t / (t + shift - shift * t) for t in (0, 0.25, 0.5, 0.75, 1)]
    x = [0.5, -1.0]
    for a, b in pairwise(times):
        x = [v + (b - a) * (math.sin(3 * v) + a) for v in x]
    assert found.flatten().tolist() == pytest.approx(x, abs=1e-6)
    assert [t[0] for t in seen] == pytest.approx(times[:4]) and told == [1, 2, 3, 4]
    assert (times[1] < 0.25) == (shift > 1)  # more steps near the noise


def test_bad_sampling() -> None:
    for steps in (0, 10_000):
        with pytest.raises(ValueError, match=f"steps={steps}: must be 1 to 1000"):
            grid(steps)
    with pytest.raises(ValueError, match="shift=0"):
        grid(5, 0)
    for fields in ({"text": -1.0}, {"image": -0.5}, {"text": math.nan}):
        with pytest.raises(ValueError, match="guidance"):
            Guidance(**fields)
    with pytest.raises(ValueError, match="guided_channels=-1"):
        Guidance(channels=-1)


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize(
    ("text", "image", "needed"),
    [(1, 1, "c"), (4, 1, "ci"), (4, 1.5, "ciu"), (0, 1, "i"), (2, 2, "cu"), (0, 0, "u"), (0, 3, "iu"), (3, 0, "ciu")],
)
def test_guidance_is_the_formula_and_what_is_skipped_changes_nothing(text, image, needed, channels) -> None:
    generator = torch.Generator().manual_seed(1)
    v = {name: torch.randn(2, 4, 3, 3, generator=generator, dtype=DOUBLE) for name in "ciu"}
    wanted = v["u"] + image * (v["i"] - v["u"]) + text * (v["c"] - v["i"])
    if channels:
        wanted = torch.cat([wanted[:, :3], v["c"][:, 3:]], dim=1)
        needed = needed if "c" in needed else "c" + needed
    guidance = Guidance(text=text, image=image, channels=channels)
    asked = []

    def velocity(names, x, t):
        asked.append("".join(names))
        return [v[name] for name in names]

    found = guided(velocity, guidance)(v["c"], torch.zeros(2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    assert asked == [needed]
    assert torch.equal(guidance.combine(v), found)


def test_times() -> None:
    def drawn(time: str, shift: float = 1.0) -> torch.Tensor:
        return draw_times(SimpleNamespace(time=time, shift=shift), torch.Generator().manual_seed(0), 20_000)

    uniform = drawn("uniform")
    assert torch.equal(uniform, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    normal = drawn("logit_normal")
    assert torch.equal(normal, torch.randn(20_000, generator=torch.Generator().manual_seed(0)).sigmoid())
    torch.testing.assert_close(drawn("uniform", 3.0), 3 * uniform / (1 + 2 * uniform))
    assert drawn("logit_normal", 3.0).mean() > normal.mean() + 0.1  # more near the data
    assert drawn("uniform", 9.0).min() >= 0 and drawn("uniform", 9.0).max() <= 1


def test_noise_of_the_choice_is_gumbel() -> None:
    noise = selection_noise(torch.Generator().manual_seed(0), 40, 1000)
    assert noise.shape == (40, 1000) and noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)


@pytest.mark.parametrize(("base", "step"), [(64, 16), (100, 16), (768, 16), (256, 32)])
def test_buckets_are_their_definition(base, step) -> None:
    wanted = set()
    for w in range(step, base * base, step):
        for h in range(step, base * base // w + 1, step):
            if (w + step) * (h + step) > base * base // step**2 * step**2 and max(w, h) <= 4 * min(w, h):
                wanted.add((w, h))
    found = buckets(base, step, 4.0)
    assert set(found) == wanted and len(found) == len(wanted)
    assert {(h, w) for w, h in found} == wanted
    assert all(w * h <= base * base for w, h in found)


def test_buckets_of_the_release() -> None:
    sizes = buckets(768, 16, 4.0)
    assert sizes[:2] == ((1536, 384), (1520, 384)) and sizes[-1] == (384, 1536)
    assert {(1536, 384), (1472, 384), (1472, 400), (768, 768), (752, 784), (384, 1536)} <= set(sizes)
    assert len(sizes) == 145


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((768, 768), (768, 768)), ((1, 1), (768, 768)), ((3000, 3000), (768, 768)), ((1920, 1080), (1024, 576)),
        ((1080, 1920), (576, 1024)), ((20_000, 1), (1536, 384)), ((1, 20_000), (384, 1536)), ((640, 480), (880, 656)),
    ],
)  # fmt: skip
def test_nearest_bucket(size, wanted) -> None:
    sizes = buckets(768, 16, 4.0)
    found = nearest_bucket(*size, sizes)
    assert found == wanted
    aspect = math.log(size[0] / size[1])
    closest = min(abs(math.log(w / h) - aspect) for w, h in sizes)
    assert abs(math.log(found[0] / found[1]) - aspect) == pytest.approx(closest, abs=1e-9)


def test_no_bucket() -> None:
    with pytest.raises(ValueError, match="0x5"):
        nearest_bucket(0, 5, buckets(64, 16, 4.0))
    with pytest.raises(ValueError, match="base_size=8"):
        buckets(8, 16, 4.0)
    with pytest.raises(ValueError, match=r"max_aspect=0\.5"):
        buckets(64, 16, 0.5)


def test_the_loss_is_a_sum_over_pictures_and_its_report_adds_up() -> None:
    small, large = torch.full((2, 3, 2, 2), 2.0), torch.full((1, 3, 8, 8), 3.0)
    losses = torch.cat([picture_losses(v, torch.zeros_like(v)) for v in (small, large)])
    assert losses.tolist() == [4, 4, 9]  # a picture's size does not count
    parts = [flow_loss(losses[:1], num_images=3), flow_loss(losses[1:], num_images=3)]
    assert sum(parts).item() == pytest.approx(17 / 3) and flow_loss(losses[:0], num_images=0).item() == 0
    names = ["edit", "rain"]
    table = flow_report(losses, torch.tensor([0.1, 0.25, 1.0]), ["rain", "other", "rain"], names)
    assert flow_report_names(names) == [
        "flow loss", "flow loss/task/edit", "flow loss/task/rain", "flow loss/t0", "flow loss/t1", "flow loss/t2",
        "flow loss/t3",
    ]  # fmt: skip
    assert table.tolist() == [[17, 3], [0, 0], [13, 2], [4, 1], [4, 1], [0, 0], [9, 1]]
    split = flow_report(losses[:2], torch.tensor([0.1, 0.25]), ["rain", "other"], names)
    assert torch.equal(split + flow_report(losses[2:], torch.tensor([1.0]), ["rain"], names), table)


# ------------------------------------------------------------------------------------------------------------ drawing

TINY = DiTConfig(
    hidden_size=32, num_layers=2, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=48, condition_size=24,
    caption_size=12, task_size=8, vision_size=10, kept_vision_tokens=3, latent_channels=4, learn_sigma=False,
)  # fmt: skip


def _dit() -> DiT:
    dit, generator = DiT(TINY).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in dit.parameters():
            weight.normal_(std=0.4 if weight.ndim == 1 else weight.shape[1] ** -0.5, generator=generator)
    return dit


def _drawing(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    mask = torch.ones(count, 4, dtype=torch.bool)
    return {
        "x0": draw(4, 4, 6), "source": draw(4, 4, 6), "caption": draw(4, 12), "caption_mask": mask, "task": draw(3, 8),
        "null_caption": draw(4, 12), "null_mask": mask & (torch.arange(4) < 1), "vision": draw(5, 10),
    }  # fmt: skip


def three_branches(x0, *, source, caption, caption_mask, null_caption, null_mask, task, vision) -> dict:
    null = {"caption": null_caption, "caption_mask": null_mask}
    given = {"caption": caption, "caption_mask": caption_mask}
    return {
        "c": BranchConditions(source=source, task=task[:, 0], vision=vision, **given),
        "i": BranchConditions(source=source, task=task[:, 1], vision=vision, **null),
        "u": BranchConditions(source=x0, task=task[:, 2], vision=torch.zeros_like(vision), **null),
    }


@pytest.mark.parametrize(("text", "image"), [(1, 1), (4, 1), (4, 1.5)])
def test_drawing_is_three_branches_by_hand(text, image) -> None:
    dit, given = _dit(), _drawing(2)
    found = sample(
        dit, given["x0"], three_branches(**given), steps=3, guidance=Guidance(text=text, image=image), shift=2
    )
    x, x0 = given["x0"], given["x0"]
    for a, b in pairwise(grid(3, 2)):

        def v(row, caption, mask, source, vision, x=x, a=a):
            t = torch.full((2,), a)
            task = given["task"][:, row]
            with torch.no_grad():
                return dit(x, t, source=source, caption=caption, caption_mask=mask, task=task, vision=vision)

        v_c = v(0, given["caption"], given["caption_mask"], given["source"], given["vision"])
        v_i = v(1, given["null_caption"], given["null_mask"], given["source"], given["vision"])
        v_u = v(2, given["null_caption"], given["null_mask"], x0, torch.zeros(2, 5, 10))
        x = x + (b - a) * (v_u + image * (v_i - v_u) + text * (v_c - v_i))
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_the_third_branch_costs_nothing_at_scale_one() -> None:
    dit, given, pictures = _dit(), _drawing(2), []
    dit.x_embedder.register_forward_hook(lambda module, args, out: pictures.append(len(out)))
    for text, image, branches in ((4, 1, 2), (1, 1, 1), (4, 1.5, 3)):
        pictures.clear()
        conditions = three_branches(**given)
        needed = {name: conditions[name] for name in Guidance(text=text, image=image).branches}
        sample(dit, given["x0"], needed, steps=3, guidance=Guidance(text=text, image=image))
        assert pictures == [2 * branches] * 3


def test_a_picture_is_the_same_alone_and_among_others() -> None:
    dit, given = _dit(), _drawing(5)
    whole = sample(dit, given["x0"], three_branches(**given), steps=3, guidance=Guidance(text=3, image=1.5))
    for place in (0, 3):
        one = {name: value[place : place + 1] for name, value in given.items()}
        alone = sample(dit, one["x0"], three_branches(**one), steps=3, guidance=Guidance(text=3, image=1.5))
        assert torch.equal(alone[0], whole[place])
