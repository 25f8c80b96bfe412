"""The guard of host waits sees every operation that would wait for a device, in both directions, and nothing else."""

import threading
from collections.abc import Callable

import pytest
import torch

from megatron_omni.batch import label_places
from megatron_omni.ops.grouped_gemm import grouped_gemm_reference
from megatron_omni.ops.permute import build_permutation
from megatron_omni.platform.host_waits import HostWaited, HostWaits

X = torch.arange(6.0)
MASK = X > 2
COUNTS = torch.tensor([1, 2, 3])


def backward(y: torch.Tensor) -> None:
    y.sum().backward()


WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "bool": lambda: bool(X[0] > 0),
    "if": lambda: 1 if X[0] else 0,
    "float": lambda: float(X[0]),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "nonzero": lambda: X.nonzero(),
    "boolean index": lambda: X[MASK],
    "boolean assignment": lambda: X.clone().__setitem__(MASK, torch.zeros(3)),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: X.unique(),
    "bincount": lambda: torch.bincount(COUNTS),
    "repeat_interleave": lambda: torch.repeat_interleave(COUNTS, COUNTS),
    "equal": lambda: torch.equal(X, X),
    "permutation": lambda: build_permutation(MASK.view(2, 3)),
    "synchronize": lambda: torch.cuda.synchronize(),
    "event": lambda: torch.cuda.Event().synchronize(),
    "stream": lambda: torch.cuda.current_stream().synchronize(),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_seen_and_refused(name: str) -> None:
    with HostWaits() as waits:
        WAITING[name]()
    assert waits.counts.total() >= 1
    with pytest.raises(HostWaited), HostWaits(allowed={}):
        WAITING[name]()


def test_waits_of_a_backward_are_seen() -> None:
    x = X.clone().requires_grad_()
    chosen, scattered = x[MASK], torch.zeros(6).masked_scatter(MASK, x * 2)
    with HostWaits() as waits:
        backward(chosen)
        backward(scattered)
    assert {operation for _, operation in waits.operations} >= {"masked_scatter_backward"}
    assert waits.counts.total() >= 2


def test_what_does_not_wait_is_not_counted() -> None:
    x = X.clone().requires_grad_()
    places = label_places(torch.tensor([[1, -100, 2]]))
    with HostWaits(allowed={}) as waits:
        backward(x.index_select(0, places) + x[COUNTS[:2]])
        backward(x.new_zeros(6).index_copy(0, places, x[:2] * 2))
        torch.repeat_interleave(COUNTS, COUNTS, output_size=6)
        build_permutation(MASK.view(2, 3), num_assignments=3)
        assert len(x) == 6 and x.shape[0] and x.numel() and x.requires_grad
        X.masked_fill(MASK, 0).where(MASK, 1)
        filled = x * 2
        filled[MASK] = 0.0
        backward(filled)
        x.new_zeros(3).copy_(X[:3])[0] = 1.0
    assert not waits.counts


def test_a_wait_has_the_name_of_the_function_of_the_package_that_it_is_in() -> None:
    with HostWaits() as waits:
        label_places(torch.tensor([[1]]))  # in HOST_CODE: a batch is made in host memory
        grouped_gemm_reference(X.view(3, 2), torch.ones(1, 2, 4), torch.tensor([0, 3]))
    assert dict(waits.counts) == {"megatron_omni.ops.grouped_gemm:_spans": 1}


def test_other_threads_do_not_count_and_everything_is_put_back() -> None:
    before = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy", "__array__")}
    synchronize = torch.cuda.synchronize
    with HostWaits(allowed={}):
        thread = threading.Thread(target=X.tolist)
        thread.start()
        thread.join()
    assert all(getattr(torch.Tensor, name) is method for name, method in before.items())
    assert torch.cuda.synchronize is synchronize
    X.tolist()


def test_the_count_of_a_site_is_its_limit() -> None:
    said = r"elsewhere waits for the device \(Tensor\.tolist\), for time 3 of 2 allowed"
    with pytest.raises(HostWaited, match=said), HostWaits(allowed={"elsewhere": 2}):
        for _ in range(3):
            X.tolist()
