"""Metrics against numbers done by hand."""

import math

import pytest
import torch
from svg2_pack.svg2_core.metrics import psnr, rel_l2


def test_rel_l2():
    assert rel_l2(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert rel_l2(torch.tensor([3.0, 9.0]), torch.tensor([3.0, 4.0])) == pytest.approx(1.0)
    assert rel_l2(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(1.0)


def test_rel_l2_of_half_precision_is_computed_in_double():
    """A sum of 65,536 squares of 4 overflows fp16."""
    assert rel_l2(torch.full((65536,), 2.5).half(), torch.full((65536,), 2.0).half()) == pytest.approx(0.25)


def test_psnr():
    zeros = torch.zeros(100)
    assert psnr(zeros, zeros) == math.inf
    assert psnr(zeros + 0.1, zeros) == pytest.approx(20, abs=1e-5)
    assert psnr(zeros + 0.01, zeros) == pytest.approx(40, abs=1e-5)
    assert psnr(zeros + 25.5, zeros, peak=255) == pytest.approx(20, abs=1e-5)
