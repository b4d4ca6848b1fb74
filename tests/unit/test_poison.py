"""The suite's own guard: uninitialised memory is NaN during tests, so a result that was never written shows."""

import torch


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(7).isnan().all()
    assert torch.empty(7, dtype=torch.bfloat16).isnan().all()
    assert torch.empty_like(torch.ones(2, 3).T).isnan().all()
    assert (torch.empty(7, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
