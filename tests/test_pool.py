"""The output pool of the CPU kernels: reuse, bounds, trimming, and outputs that behave as any tensor does."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import skip_unless_loaded

from dl4ds_kernels import _extension
from dl4ds_kernels.functional import add_act, bn_act

X = torch.randn(4, 64, 32, 32)  # 1 MiB
NBYTES = X.numel() * 4


@pytest.fixture(autouse=True)
def host() -> Iterator[Any]:
    """The module with the counters, its pool empty; the limit is put back."""
    skip_unless_loaded("cpu")
    module = _extension.host()
    gc.collect()
    limit = module.pool_stats()["limit_bytes"]
    module.pool_trim()
    yield module
    module.pool_set_limit(limit)
    module.pool_trim()


def call() -> torch.Tensor:
    return add_act(X, X, backend="cpu")


EXPECTED = torch.relu(X + X)


def test_freed_outputs_are_reused(host: Any) -> None:
    out = call()
    first = out.data_ptr()
    before = host.pool_stats()
    assert before["used_bytes"] >= NBYTES
    del out
    assert host.pool_stats()["idle_bytes"] >= NBYTES
    out = call()
    after = host.pool_stats()
    assert out.data_ptr() == first and after["hits"] == before["hits"] + 1 and after["misses"] == before["misses"]


def test_live_outputs_are_never_shared(host: Any) -> None:
    outputs = [call() for _ in range(8)]
    assert len({out.data_ptr() for out in outputs}) == 8
    assert all(torch.equal(out, EXPECTED) for out in outputs)
    view = outputs[0][1:2]
    outputs.clear()
    later = [call() for _ in range(8)]
    assert torch.equal(view, EXPECTED[1:2])
    assert view.data_ptr() - X[0].numel() * 4 not in {out.data_ptr() for out in later}


HUGE_PAGE = 2 << 20


def test_idle_memory_stays_near_the_peak_of_use(host: Any) -> None:
    """Ever larger outputs between small ones that stay: freed space that nothing fits into does not pile up."""
    kept = []
    for n in range(1, 25):
        x = X[:1].expand(n, -1, -1, -1).contiguous()
        add_act(x, x, backend="cpu")
        kept.append(add_act(X[:1], X[:1], backend="cpu"))
        stats = host.pool_stats()
        assert stats["used_bytes"] + stats["idle_bytes"] <= stats["peak_used_bytes"] * 3 / 2 + HUGE_PAGE
    assert stats["used_bytes"] == len(kept) * NBYTES // 4 and stats["idle_bytes"] <= NBYTES * 7 + HUGE_PAGE
    assert all(torch.equal(out, EXPECTED[:1]) for out in kept)


def test_freed_neighbours_make_room_for_a_larger_output(host: Any) -> None:
    outputs = [call() for _ in range(4)]
    first, misses = outputs[0].data_ptr(), host.pool_stats()["misses"]
    for place in (1, 3, 0, 2):  # each order of neighbours: none, none, behind, on both sides
        outputs[place] = None
    x = X.repeat(4, 1, 1, 1)
    out = add_act(x, x, backend="cpu")
    assert out.data_ptr() == first and host.pool_stats()["misses"] == misses
    assert torch.equal(out, EXPECTED.repeat(4, 1, 1, 1))


def test_the_lowest_free_range_is_taken(host: Any) -> None:
    outputs = [call() for _ in range(4)]
    low, high = outputs[0].data_ptr(), outputs[2].data_ptr()
    del outputs[2], outputs[0]
    assert low < high
    again = [call(), call()]
    assert [out.data_ptr() for out in again] == [low, high]
    assert all(torch.equal(out, EXPECTED) for out in (*outputs, *again))


def test_a_pass_of_odd_sizes_settles_after_the_first(host: Any) -> None:
    """Sizes as in a DenseNet, each kept until the end, with short-lived ones in between: no new pages in later passes."""
    misses = []
    for _ in range(4):
        kept = []
        for channels in range(17, 64, 3):
            x = X[:, :channels].contiguous()
            kept.append(add_act(x, x, backend="cpu"))
            add_act(kept[-1], kept[-1], backend="cpu")
        assert all(torch.equal(out, EXPECTED[:, : out.shape[1]]) for out in kept)
        misses.append(host.pool_stats()["misses"])
    assert misses[1:] == [misses[0]] * 3


def test_packed_weights_are_no_part_of_the_pool(host: Any) -> None:
    """They stay, so they neither raise the peak of which idle memory may be a share, nor lie idle when they are freed."""
    before = host.pool_stats()
    packed = torch.ops.dl4ds_kernels.conv_bn_act_pack(torch.randn(1024, 1024, 1, 1), 1, 1)
    assert packed.numel() >= 1024 * 1024 and packed.data_ptr() % 64 == 0
    assert host.pool_stats() == before
    del packed
    assert host.pool_stats() == before


def test_limit_and_trim(host: Any) -> None:
    outputs = [call() for _ in range(4)]
    host.pool_set_limit(NBYTES + NBYTES // 2)
    outputs.clear()
    assert 0 < host.pool_stats()["idle_bytes"] <= NBYTES + NBYTES // 2
    assert host.pool_trim() > 0
    assert host.pool_stats()["idle_bytes"] == 0


def test_pool_turned_off(host: Any) -> None:
    host.pool_set_limit(0)
    out = call()
    stats = host.pool_stats()
    assert torch.equal(out, EXPECTED) and stats["used_bytes"] == 0
    del out
    assert host.pool_stats()["idle_bytes"] == 0


def test_small_outputs_do_not_come_from_the_pool(host: Any) -> None:
    out = add_act(X[:1, :1], X[:1, :1], backend="cpu")
    assert host.pool_stats()["used_bytes"] == 0 and torch.equal(out, EXPECTED[:1, :1])


def test_outputs_outlive_a_trim(host: Any) -> None:
    out = call()
    host.pool_trim()
    host.pool_set_limit(0)
    assert torch.equal(out, EXPECTED)


def test_release_in_another_thread(host: Any) -> None:
    box = [call() for _ in range(4)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert host.pool_stats()["used_bytes"] == 0
    assert torch.equal(call(), EXPECTED)


def test_threads_share_the_pool(host: Any) -> None:
    wrong: list[int] = []

    def loop(seed: int) -> None:
        x = X * seed
        for _ in range(20):
            if not torch.equal(add_act(x, x, backend="cpu"), torch.relu(x + x)):
                wrong.append(seed)

    threads = [threading.Thread(target=loop, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and host.pool_stats()["used_bytes"] == 0


def test_outputs_are_ordinary_tensors(host: Any) -> None:
    out = call()
    assert torch.equal(copy.deepcopy(out), EXPECTED)
    assert torch.equal(torch.from_numpy(out.numpy()), EXPECTED)
    assert out.data_ptr() % 64 == 0 and out.untyped_storage().nbytes() >= NBYTES
    out.mul_(2)
    assert torch.equal(out, EXPECTED * 2)
    out.share_memory_()
    assert out.is_shared() and torch.equal(out, EXPECTED * 2)
    array = call().numpy()  # the array keeps the memory after the tensor is gone
    fresh = call()
    assert torch.equal(torch.from_numpy(array), EXPECTED) and fresh.data_ptr() != array.ctypes.data


def test_outputs_with_gradients_are_of_the_pool(host: Any) -> None:
    """Also an addition that keeps a mask: a block of its own would fault every page in, at every step."""
    x = X.clone().requires_grad_()
    outputs = [add_act(x, X, backend="cpu"), bn_act(x, None, None, training=True, backend="cpu")]
    assert host.pool_stats()["used_bytes"] >= 2 * NBYTES
    assert all(out.requires_grad for out in outputs)


def test_gradients_and_saved_masks_come_back(host: Any) -> None:
    """A training loop settles: no block is lost from step to step."""
    x = X.clone().requires_grad_()
    used = []
    for _ in range(5):
        x.grad = None
        add_act(x, x * 2, backend="cpu").sum().backward()
        used.append(host.pool_stats()["used_bytes"])
    assert len(set(used[1:])) == 1
    x.grad = None
    assert host.pool_stats()["used_bytes"] == 0
