"""The demo's video, sampled with each preset: how near it is to the dense one, and at what density."""

import demo_video
import pytest
from svg2_pack.svg2_core.metrics import psnr

# preset: least PSNR in dB, most density. No step and no block is dense.
TARGETS = {"quality": (46, 0.11), "balanced": (42, 0.06), "turbo": (38, 0.025)}
STEPS = 8


@pytest.fixture(scope="module")
def model(host):
    return demo_video.model()


def test_presets_keep_the_picture(model):
    """benchmarks/sweep_presets.py has other seeds and another clip."""
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    dense = demo_video.frames(demo_video.sample(model, steps=STEPS))
    found = {}
    for preset, (least, most) in TARGETS.items():
        patched, stats = SVG2SparseAttention.execute(model, preset=preset, min_tokens=0).result
        found[preset] = psnr(demo_video.frames(demo_video.sample(patched, steps=STEPS)), dense)
        report = stats.latest()
        assert report.sparse_share == 1 and report.cold_calls == 0
        assert report.density <= most and found[preset] >= least, (preset, report.density, found)
        rows = [[cell for cell in row if cell is not None] for row in report.density_by_block_and_step]
        means = [sum(row) / len(row) for row in rows]
        assert means[0] > 2 * means[1] and max(means[1:]) < 1.05 * min(means[1:]), "the first block has a larger share"
    assert found["quality"] > found["balanced"] > found["turbo"]
