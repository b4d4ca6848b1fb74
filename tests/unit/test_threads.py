"""Heads side by side: every item is done once, modes go along, errors come back, and torch's threads are left as they were."""

import threading
import time

import pytest
import torch
from svg2_pack.svg2_core import Layout, SVG2Config, svg2_attention
from svg2_pack.svg2_core.threads import side_by_side


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order(threads):
    assert side_by_side(lambda i: i * i, range(9)) == [i * i for i in range(9)]
    assert side_by_side(lambda i: i, []) == []


def test_threads_are_shared_out_and_given_back(threads):
    barrier = threading.Barrier(2)

    def work(_):
        if threads > 1:
            barrier.wait(10)  # both at once
        return threading.get_ident(), torch.get_num_threads()

    done = side_by_side(work, range(2))
    assert {count for _, count in done} == {max(1, threads // 2)}
    assert len({who for who, _ in done}) == min(2, threads)
    assert torch.get_num_threads() == threads
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [threads], "a new thread of the process starts with what it would have had"


def test_at_most_so_many_at_once_with_the_same_share(threads):
    running, most, lock = [0], [0], threading.Lock()

    def work(i):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return i, torch.get_num_threads()

    assert side_by_side(work, range(4), at_most=1) == [(i, 1) for i in range(4)], "one at a time has the thread it had of four"
    assert most == [1]
    side_by_side(work, range(4), at_most=2)
    assert most == [min(2, threads)]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_caller_s_modes_go_along(threads, mode):
    with mode():
        expected = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        assert side_by_side(lambda _: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()), range(3)) == [expected] * 3


def test_the_first_error_is_raised_after_all_have_ended(threads):
    ended = []

    def work(i):
        if i == 1:
            raise MemoryError("no room")
        ended.append(i)

    with pytest.raises(MemoryError, match="no room"):
        side_by_side(work, range(4))
    assert set(ended) <= {0, 2, 3} and (threads == 1 or len(ended) == 3)


def test_a_call_is_the_same_bits_on_any_number_of_workers():
    q, k, v = (torch.randn(2, 3, 700, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    config = SVG2Config(density=0.2, q_clusters=9, k_clusters=30)

    def call():
        return svg2_attention(q, k, v, Layout(0, 700), config, backend="sdpa")

    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):  # one head after the other, or all at once, each on one thread
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].out, results[1].out) and torch.equal(results[0].density, results[1].density)
