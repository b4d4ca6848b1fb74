"""SVG2Compare against scikit-image, numbers done by hand, and pixels."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

NOISE = "two dense attention backends"


@pytest.fixture
def compare(temp):
    """`compare(reference, candidate, **inputs)` -> strip, psnr, ssim, report, having looked at what the node shows."""
    from svg2_pack.nodes.compare import SVG2Compare

    def run(reference, candidate, **inputs):
        output = SVG2Compare.execute(reference, candidate, **inputs)
        strip, *_, report = output.result
        assert output.ui["text"] == (report,)
        [shown] = output.ui["images"]
        pixels = np.array(Image.open(temp / shown["subfolder"] / shown["filename"]))
        assert shown["type"] == "temp" and (pixels == (strip[0].numpy() * 255).astype(np.uint8)).all()
        return output.result

    return run


def video(frames=3, height=40, width=56, seed=0) -> torch.Tensor:
    """Smooth shapes, so that SSIM has something to see."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(frames, 3, height // 8, width // 8, generator=g)
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1).movedim(1, -1)


def noisy(clean: torch.Tensor, amount: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(9)
    return (clean + amount * torch.randn(clean.shape, generator=g)).clamp(0, 1)


def test_numbers_are_those_of_scikit_image(compare):
    clean = video()
    other = torch.stack([noisy(frame, amount) for frame, amount in zip(clean, (0.02, 0.05, 0.2), strict=True)])
    _, psnr, ssim, report = compare(clean, other)
    assert psnr == pytest.approx(peak_signal_noise_ratio(clean.numpy(), other.numpy(), data_range=1), abs=1e-3)
    pairs = [(x.numpy(), y.numpy()) for x, y in zip(clean, other, strict=True)]
    decibels = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]
    similar = [
        structural_similarity(x, y, data_range=1, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False)
        for x, y in pairs
    ]
    assert ssim == pytest.approx(np.mean(similar), abs=1e-4) and similar[0] - similar[2] > 0.1
    for i in range(3):
        assert f"frame {i + 1}: PSNR {decibels[i]:.1f} dB, SSIM {similar[i]:.4f}" in report
    assert f"lowest {decibels[2]:.1f} dB in frame 3" in report and "measured on cpu" in report
    assert compare(other, clean)[1:3] == (psnr, ssim), "neither input is special"


def test_overall_psnr_is_of_the_mean_error(compare):
    """Frames at 20 dB and equal: half the error of 20 dB, which is 23.01 dB; the mean of the decibels is infinite."""
    reference = torch.full((2, 16, 16, 3), 0.5)
    candidate = reference.clone()
    candidate[0] += 0.1
    _, psnr, _, report = compare(reference, candidate)
    assert psnr == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
    assert "frame 1: PSNR 20.0 dB" in report and "frame 2: PSNR equal, SSIM 1.0000" in report


@pytest.mark.parametrize(
    ("decibels", "says"),
    [(40, f"closer than {NOISE}"), (34.1, f"closer than {NOISE}"), (33.9, f"within the noise between {NOISE}"),
     (27.1, f"within the noise between {NOISE}"), (26.9, "visible differences are possible"), (12, "seed, prompt and steps")],
)  # fmt: skip
def test_the_verdict_knows_the_noise(compare, decibels, says):
    reference = torch.full((1, 16, 16, 3), 0.4)
    _, psnr, _, report = compare(reference, reference + 10 ** (-decibels / 20))
    assert psnr == pytest.approx(decibels, abs=1e-3)
    first = report.partition("\n")[0]
    assert first.startswith(f"{decibels:.1f} dB: ") and says in first and "27-34 dB" in first
    assert sum(verdict in first for verdict in (f"closer than {NOISE}", f"within the noise between {NOISE}", "visible differences")) == 1


def test_identical_videos(compare):
    _, psnr, ssim, report = compare(video(), video())
    assert psnr == math.inf and ssim == 1 and report.startswith("identical: every pixel is equal")


def test_one_pixel_is_not_identical(compare):
    other = video()
    other[2, 5, 5, 1] += 1e-4
    _, psnr, _, report = compare(video(), other)
    assert 90 < psnr < math.inf and report.startswith(f"{psnr:.1f} dB: closer")


@pytest.mark.parametrize("shape", [(2, 40, 56, 3), (3, 40, 48, 3), (3, 32, 56, 3), (3, 40, 56, 4)], ids=str)
def test_different_shapes_are_an_error_that_names_them(compare, shape):
    with pytest.raises(ValueError, match="reference and candidate") as error:
        compare(video(), torch.zeros(shape))
    assert "(3, 40, 56, 3)" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(0, 40, 56, 3), (1, 10, 56, 3), (1, 56, 10, 3)], ids=str)
def test_nothing_to_compare_is_an_error(compare, shape):
    with pytest.raises(ValueError, match="11x11") as error:
        compare(torch.zeros(shape), torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_values_that_are_not_numbers(compare):
    broken = noisy(video(), 0.05)
    broken[1, 3, 3, 0], broken[2, 0, 0, 2] = math.nan, math.inf
    strip, psnr, ssim, report = compare(video(), broken, amplify=1)
    assert math.isnan(psnr) and math.isnan(ssim) and strip.isfinite().all()
    assert strip[0, -285:].amax() == 1, "white in the difference"
    assert report.startswith("not comparable: ") and "(NaN or infinite) in candidate, frame 2, 3." in report
    assert "frame 2: PSNR unknown, SSIM unknown" in report and "frame 1: PSNR 2" in report
    assert "in reference, frame 2, 3; candidate, frame 2, 3." in compare(broken, broken)[3], "equal or not"


def test_progress_and_cancel(host, monkeypatch):
    """A step of progress per frame, and Cancel is heard after the frame at hand."""
    import comfy.utils
    from comfy.model_management import (
        InterruptProcessingException,
        interrupt_current_processing,
        processing_interrupted,
    )
    from svg2_pack.nodes.compare import measure

    told = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: told.append((value, total)))
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    measure(video(5), video(5))
    assert told == [(i, 5) for i in range(1, 6)]

    told.clear()

    def cancel(value, total, *_, **__):
        told.append(value)
        interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel)
    with pytest.raises(InterruptProcessingException):
        measure(video(5), video(5))
    assert told == [1] and not processing_interrupted()


def test_half_precision_and_views(compare):
    clean = video()
    other = noisy(clean, 0.05)
    whole = compare(clean, other)
    half = compare(clean.half(), other.movedim(0, 1).contiguous().movedim(1, 0).half())
    assert half[1] == pytest.approx(whole[1], abs=0.05) and half[2] == pytest.approx(whole[2], abs=0.01)


@pytest.mark.parametrize(("frames", "columns"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4])])
def test_the_strip_shows_both_and_the_amplified_difference(compare, frames, columns):
    """Frame i of the reference is grey i / 10; the candidate's red is larger by (i + 1) / 100."""
    from svg2_pack.nodes.telling.plots.strip import GAP, NAMES

    reference = (torch.arange(5) / 10)[:, None, None, None].expand(5, 64, 64, 3)
    candidate = reference.clone()
    candidate[..., 0] += (torch.arange(5)[:, None, None] + 1) / 100
    strip = compare(reference, candidate, frames=frames, amplify=25)[0][0]
    cell = (strip.shape[1] - NAMES) // len(columns)
    side = cell - GAP
    assert strip.shape[1] - NAMES == cell * len(columns) and strip.shape[0] > 3 * side
    for column, i in enumerate(columns):
        x = NAMES + column * cell + side // 2
        middles = [strip.shape[0] - (2 - row) * (side + GAP) - GAP - side // 2 for row in range(3)]
        grey, more = i / 10, (i + 1) / 100
        expected = [[grey] * 3, [grey + more, grey, grey], [min(1, 25 * more), 0, 0]]
        assert torch.allclose(strip[middles, x], torch.tensor(expected), atol=0.5 / 255 + 1e-6)


class FakeLPIPS(torch.nn.Module):
    """Stands for the package: the mean difference, of inputs as it wants them."""

    made = 0

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex"
        FakeLPIPS.made += 1

    def forward(self, x, y):
        assert x.shape == y.shape == (1, 3, 16, 16) and x.min() >= -1 and x.max() <= 1 and not torch.is_grad_enabled()
        return (x - y).abs().mean()[None, None, None, None]


def test_lpips_only_where_nothing_is_to_be_downloaded(compare, monkeypatch, tmp_path):
    reference = torch.full((2, 16, 16, 3), 0.5)
    candidate = reference + torch.tensor([0.1, 0.3])[:, None, None, None]
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "LPIPS not computed: the package lpips is not installed" in compare(reference, candidate)[3]

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLPIPS))
    monkeypatch.setattr(FakeLPIPS, "made", 0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    text = compare(reference, candidate)[3]
    assert "LPIPS not computed: AlexNet's weights (alexnet-owt-" in text and FakeLPIPS.made == 0

    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    text = compare(reference, candidate)[3]
    assert "LPIPS 0.4000 mean, highest 0.6000 in frame 2" in text and ", LPIPS 0.2000" in text
    assert "the package lpips failed (AssertionError" in compare(video(), noisy(video(), 0.1))[3], "of another size"
