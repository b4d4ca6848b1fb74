"""A thread pool for the heads of a call on a CPU: each head is computed by one thread.

Most of a call's operations are too small, or too serial, to be shared well among the cores; whole heads are not.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def side_by_side(work: Callable, items: Iterable, at_most: int | None = None) -> list:
    """[work(item) for item in items], on as many threads as torch computes with or there are items, and no more than
    `at_most`; the first error is raised.

    Each thread has its share of torch's threads, whatever `at_most` is, so that every item comes out to the same bits; and
    the caller's gradient and inference modes. One item, or one thread of torch's, is done by the caller.
    """
    items = list(items)
    threads = torch.get_num_threads()
    workers = min(len(items), threads)
    if workers < 2:
        return [work(item) for item in items]
    share, workers = threads // workers, min(workers, at_most or workers)
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def one(item):
        # Both are a thread's own, as the number of threads is.
        with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
            return work(item)

    try:
        futures = [_pool(workers, share).submit(one, item) for item in items]
        done = [future.exception() for future in futures]  # waits for all: none may outlive the call
    finally:
        torch.set_num_threads(threads)  # what the next new thread of the process starts with
    for error in done:
        if error is not None:
            raise error
    return [future.result() for future in futures]


@lru_cache(maxsize=8)
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "svg2", initializer=_begin, initargs=(threads,))


def _begin(threads: int) -> None:
    """A new thread takes the process's number of threads at its first look, even after it was given another: look first."""
    torch.get_num_threads()
    torch.set_num_threads(threads)
