"""Log-probabilities and entropies against their definition in float64, with every gradient: whole, in chunks, on two
ranks; the memory of a chunked loss; what one rank computes without chunks is torch's cross entropy to the bit.
"""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.ops.token_log_probs import token_log_probs
from megatron_omni.parallel import groups
from tests.distributed.harness import Rank, run_ranks

ROWS, WIDTH, COLUMNS, VOCAB = 23, 12, 40, 37
"""Three columns are padding."""


@pytest.fixture
def alone():
    """A group of one."""
    pg = groups.initialize(ParallelConfig())
    yield pg.tp
    groups.destroy()


def problem(rows=ROWS, width=WIDTH, columns=COLUMNS, vocab=VOCAB, scale=2.0):
    """Hidden states, weight, targets, and the gradients of both results, in float64."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight = torch.randn(columns, width, generator=g, dtype=torch.float64) * scale
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[0], targets[1] = 0, vocab - 1
    return hidden, weight, targets, *torch.randn(2, rows, generator=g, dtype=torch.float64)


def definition(hidden, weight, targets, vocab=VOCAB):
    """As the head of the file says it, of the columns that are no padding."""
    p = torch.softmax(hidden @ weight[:vocab].t(), dim=1)
    return p[torch.arange(len(p)), targets].log(), -(p * p.log()).sum(1)


def compute(hidden, weight, targets, gradients, *, vocab=VOCAB, group=None, with_entropy=True, chunk_elements=2**26):
    """Results and the gradients of hidden states and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if group is None:
        results = definition(hidden, weight, targets, vocab)
    else:
        results = token_log_probs(
            lambda rows: rows @ weight.t(), hidden, targets, parameters=[weight], num_columns=len(weight),
            vocab_size=vocab, group=group, with_entropy=with_entropy, chunk_elements=chunk_elements,
        )  # fmt: skip
    results, gradients = results[: 1 + with_entropy], gradients[: 1 + with_entropy]
    return *results, *torch.autograd.grad(results, (hidden, weight), [g.to(results[0]) for g in gradients])


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("rows_of_a_chunk", [100, 5, 1], ids=["whole", "5-rows", "1-row"])
def test_results_and_gradients_are_those_of_the_definition(alone, rows_of_a_chunk, with_entropy):
    """23 rows in chunks of 5 leave a short one; the elements of a chunk are halved where entropy is asked for."""
    hidden, weight, targets, *gradients = problem()
    right = compute(hidden, weight, targets, gradients, with_entropy=with_entropy)
    elements = rows_of_a_chunk * COLUMNS * (1 + with_entropy)
    got = compute(hidden, weight, targets, gradients, group=alone, with_entropy=with_entropy, chunk_elements=elements)
    for ours, exact in zip(got, right, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)
    assert not got[-1][VOCAB:].any(), "padding columns got a gradient"


def _share(rank: Rank, chunk_elements: int, with_entropy: bool):
    group = rank.initialize(ParallelConfig(tensor_model_parallel_size=2)).tp
    hidden, weight, targets, *gradients = problem()
    share = weight.chunk(2)[rank.index]
    *results, hidden_grad, weight_grad = compute(
        hidden, share, targets, gradients, group=group, with_entropy=with_entropy, chunk_elements=chunk_elements
    )
    dist.all_reduce(hidden_grad)  # as a column-parallel layer does; the logits here are a plain product
    rank_parts = [torch.empty_like(weight_grad) for _ in range(2)]
    dist.all_gather(rank_parts, weight_grad)
    gathered = torch.cat(rank_parts)
    return [t.detach() for t in (*results, hidden_grad, gathered)]


@pytest.mark.parametrize("rows_of_a_chunk", [100, 5], ids=["whole", "5-rows"])
def test_two_ranks_share_the_vocabulary(rows_of_a_chunk):
    """With entropy and its gradient; the second rank has the padding, and each has rows without a target of its own."""
    hidden, weight, targets, *gradients = problem()
    right = compute(hidden, weight, targets, gradients)
    for got in run_ranks(_share, 2, rows_of_a_chunk * COLUMNS, True):
        for ours, exact in zip(got, right, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def _tops(rank: Rank, chunk_elements: int):
    """Which targets are the most probable ones, and the gradients beside them: with entropy and without."""
    group = rank.initialize(ParallelConfig(tensor_model_parallel_size=rank.world_size)).tp
    hidden, weight, targets, *gradients = problem()
    targets[:9] = (hidden @ weight[:VOCAB].t()).argmax(1)[:9]
    share = weight.chunk(group.size())[group.rank()]
    found = []
    for with_entropy in (False, True):
        leaf, own = hidden.clone().requires_grad_(), share.clone().requires_grad_()
        results = token_log_probs(
            lambda rows, own=own: rows @ own.t(), leaf, targets, parameters=[own], num_columns=len(own), vocab_size=VOCAB,
            group=group, with_entropy=with_entropy, with_top=True, chunk_elements=chunk_elements,
        )  # fmt: skip
        assert (results.entropy is not None) == with_entropy and not results.is_top.requires_grad
        results.log_prob.backward(gradients[0])
        found.append((results.is_top, own.grad))
    return found


@pytest.mark.parametrize("rows_of_a_chunk", [100, 5], ids=["whole", "5-rows"])
def test_targets_with_the_largest_logit_are_told(rows_of_a_chunk):
    """By whole logits and in chunks, on one rank and on two; the gradients stay."""
    hidden, weight, targets, gradient, _ = problem()
    best = (hidden @ weight[:VOCAB].t()).argmax(1)
    targets[:9] = best[:9]
    right = targets == best
    assert 9 <= right.sum() < len(right)
    exact = compute(hidden, weight, targets, [gradient], with_entropy=False)[-1]
    elements = rows_of_a_chunk * COLUMNS
    for world_size in (1, 2):
        for both in zip(*run_ranks(_tops, world_size, elements), strict=True):
            assert all(torch.equal(is_top, right) for is_top, _ in both)
            torch.testing.assert_close(torch.cat([grad for _, grad in both]), exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_are_as_exact_as_the_whole(alone, dtype):
    """Error against float64, of results and gradients in the norm: at most twice that of whole logits in this dtype."""
    hidden, weight, targets, *gradients = problem(rows=300, width=64, columns=320, vocab=311, scale=0.3)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    right = compute(hidden.double(), weight.double(), targets, gradients, vocab=311)
    whole = compute(hidden, weight, targets, gradients, vocab=311, group=alone)
    chunked = compute(hidden, weight, targets, gradients, vocab=311, group=alone, chunk_elements=2 * 9 * 320)
    for name, exact, one, many in zip(("log p", "entropy", "d hidden", "d weight"), right, whole, chunked, strict=True):
        allowed = 2 * (one.double() - exact).norm()
        assert (many.double() - exact).norm() <= allowed, name


def test_without_chunks_it_is_cross_entropy_to_the_bit(alone):
    """So that a run whose logits are few computes what it always did."""
    hidden, weight, targets, gradient, _ = problem(rows=200, width=64, columns=320, vocab=311, scale=0.3)
    hidden, weight, gradient = (t.float() for t in (hidden, weight, gradient))
    got = compute(hidden, weight, targets, [gradient], vocab=311, group=alone, with_entropy=False)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logits = (hidden @ weight.t()).masked_fill(torch.arange(320) >= 311, torch.finfo(torch.float32).min)
    losses = F.cross_entropy(logits, targets, reduction="none")
    right = (-losses, *torch.autograd.grad(-losses, (hidden, weight), gradient))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, right, strict=True))


def test_no_row_and_frozen_parameters(alone):
    """A micro-batch without labels; a frozen vocabulary leaves the gradient of hidden states alone."""
    hidden, weight, targets, gradient, _ = problem()
    empty = compute(hidden[:0], weight, targets[:0], [gradient[:0]], group=alone, with_entropy=False)
    assert [tuple(t.shape) for t in empty] == [(0,), (0, WIDTH), (COLUMNS, WIDTH)]
    assert not empty[-1].any()
    leaf = hidden.clone().requires_grad_()
    found, *_ = token_log_probs(
        lambda rows: rows @ weight.t(), leaf, targets, parameters=[weight], num_columns=COLUMNS, vocab_size=VOCAB,
        group=alone, chunk_elements=5 * COLUMNS,
    )  # fmt: skip
    found.backward(gradient)
    right = compute(hidden, weight, targets, [gradient], with_entropy=False)
    torch.testing.assert_close(leaf.grad, right[1], rtol=1e-11, atol=1e-12)


PEAK = """
import sys
from contextlib import nullcontext
from itertools import accumulate
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from megatron_omni.ops.token_log_probs import token_log_probs
from megatron_omni.platform.allocator import keep_freed_memory
ROWS, WIDTH, VOCAB = int(sys.argv[1]), 1, 152_064
torch.set_num_threads(1)
if counted := sys.argv[2] == "counted":
    keep_freed_memory()  # what is used again need not be zeroed again, which would be half of the time
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
weight = torch.randn(VOCAB, WIDTH, requires_grad=True)

def most_resident():  # not ru_maxrss, which a process inherits from the one that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

before = most_resident()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) if counted else nullcontext() as measured:
    found, *_ = token_log_probs(
        lambda rows: rows @ weight.t(), hidden, torch.zeros(ROWS, dtype=torch.int64), parameters=[weight],
        num_columns=VOCAB, vocab_size=VOCAB - 300, group=dist.group.WORLD,
    )
    found.sum().backward()
assert weight.grad is not None and hidden.grad is not None
if counted:
    events = measured.profiler.kineto_results.events()
    print(max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")))
else:
    print(most_resident() - before)
"""


@pytest.mark.parametrize(
    ("rows", "how"),
    [pytest.param(16_384, "counted", id="16384-rows-counted"), pytest.param(1024, "resident", id="1024-rows-resident")],
)
def test_the_full_vocabulary_stays_under_a_gibibyte(rows, how):
    """A packed row of labels, whose whole logits are 9.3 GiB a copy: bytes that torch has handed out. Whole logits of 1,024
    rows, three times over, would be 1.7 GiB: what the process has resident.
    """
    done = subprocess.run([sys.executable, "-c", PEAK, str(rows), how], capture_output=True, text=True, check=True)
    assert 2**29 < int(done.stdout) < 2**30, "three copies of a chunk of 2^26 logits, and little beside them"
