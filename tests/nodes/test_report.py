"""SVG2Report: text and file say what the run's report says, and the pictures show it in the right places."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from svg2_pack.svg2_core.stats import RunReport, StatsHandle, StepReport
from tiny_wan import latent, sample

DENSITY = [[None, 0.1, 0.2], [None, None, 0.05]]
REASONS = [["warmup", None, None], ["warmup", "dense_block", None]]
LATENT = {"samples": torch.zeros(1, 16, 2, 8, 8), "batch_index": [0]}
LABELS = torch.tensor([[[0, 0, 1], [2, 2, 1]], [[3, 3, 1], [2, 2, 2]]], dtype=torch.int16)  # 2 frames, 2 x 3 tokens
RUN = RunReport(
    tokens=12, density=0.35 / 3, sparse_share=0.5, sparse_calls=3, dense_calls={"warmup": 2, "dense_block": 1}, backend="triton",
    steps=[StepReport(0, 1.0, False, 2.0, None), StepReport(1, 0.6, True, 1.0, 0.1), StepReport(2, 0.3, True, 0.9, 0.125)],
    block_labels=["0", "1"], density_by_block_and_step=DENSITY, seconds=3.9, completed=True, reasons_by_block_and_step=REASONS,
    settings={"preset": "balanced", "top_p": 0.8, "dense_blocks": ""}, device="cuda", dense_call_ms=8.0, sparse_call_ms=2.0,
    attention_speedup=4.0, step_speedup=2.1, q_cluster_sizes=[0, 2, 5, 9], k_cluster_sizes=[1, 3, 8],
    overlays={"0": LABELS, "1": LABELS.flip(0)},
)  # fmt: skip


@pytest.fixture
def show(temp):
    """`show(stats or report, samples, **inputs)` -> pages, summary, what the JSON file holds (None without one)."""
    from svg2_pack.nodes.report import SVG2Report

    def run(stats, samples=LATENT, **inputs):
        if not isinstance(stats, StatsHandle):
            report, stats = stats, StatsHandle()
            stats.add(report)
        output = SVG2Report.execute(samples=samples, stats=stats, **inputs)
        passed, plots, text = output.result
        assert passed is samples and output.ui["text"] == (text,)
        assert len(output.ui["images"]) == len(plots)
        for page, shown in zip(plots, output.ui["images"], strict=True):
            assert Image.open(temp / shown["subfolder"] / shown["filename"]).size == (page.shape[1], page.shape[0])
        files = output.ui["svg2_json"]
        assert all(file["type"] == "temp" for file in files) and len(files) <= 1
        return (
            plots,
            text,
            json.loads((temp / files[0]["subfolder"] / files[0]["filename"]).read_text()) if files else None,
        )

    return run


def close(pixel, color, tolerance=1.5 / 255) -> bool:
    return np.abs(np.asarray(pixel, dtype=float) - np.asarray(color, dtype=float)).max() <= tolerance


def rgb(hexadecimal: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(hexadecimal[1:]))


def test_a_sampled_run(wan, svg2, show):
    patched, stats = svg2(wan, top_p=0.3, warmup_steps=1, dense_blocks="0")
    samples = {"samples": sample(patched)}
    before = samples["samples"].clone()
    plots, text, file = show(stats, samples)
    assert torch.equal(samples["samples"], before) and set(samples) == {"samples"}

    report = stats.latest()
    assert file == json.loads(json.dumps(report.to_dict())) and file["sparse_calls"] == 6
    assert (
        report.summary in text
        and "dense, 3 calls: warm-up: the first sampling steps stay dense" in text
        and "top_p 0.3" in text
    )
    assert "320 tokens" in text and "did not finish" not in text
    assert "attention: " in text and "than a dense call in this run" in text, "on a CPU, too"
    assert plots.shape == (3, 960, 1280, 3) and plots.min() >= 0 and plots.max() <= 1
    assert "attention error: " in text and f"block {max((1, 2), key=lambda b: sum(file['error_by_block_and_step'][b][1:]))} " in text
    assert set(report.overlays) == {"1", "2"}, "the last page shows a block that ran sparse"
    again, *_, second = show(stats, samples, overlay_block=2)
    assert torch.equal(again, plots) and second == file, "2 is the middle one"
    assert not torch.equal(show(stats, samples, overlay_block=1)[0][2], plots[2])


def test_the_latest_run_is_shown(wan, svg2, show):
    patched, stats = svg2(wan, warmup_steps=1)
    sample(patched, steps=2)
    sample(patched, steps=3, shape=latent(3, 12, 12))
    _, text, file = show(stats)
    assert len(file["steps"]) == 3 and file["tokens"] == 108 and "108 tokens" in text


def test_switched_off_or_not_sampled(wan, svg2, show):
    patched, stats = svg2(wan, enabled=False)
    sample(patched, steps=1)
    for handle in (stats, svg2(wan)[1]):
        plots, text, file = show(handle)
        assert len(plots) == 1 and file is None and "No run is recorded" in text and "switched off" in text
        assert plots.std() > 0.01, "the page says so too"


def test_bypassed(temp):
    """A bypassed node hands on its model but no stats: that is no error of the prompt, and the page says why it is empty."""
    from svg2_pack.nodes.report import SVG2Report

    given = SVG2Report.execute(samples=LATENT)
    assert given.result[0] is LATENT and "bypassed" in given.result[2] and len(given.result[1]) == 1
    assert list(SVG2Report.INPUT_TYPES()["required"]) == ["samples"]


def test_an_interrupted_run(wan, svg2, show):
    patched, stats = svg2(wan, warmup_steps=0)

    def interrupt(step, *_):
        if step == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(patched, callback=interrupt)
    _, text, file = show(stats)
    assert text.startswith("The run did not finish") and file["completed"] is False and len(file["steps"]) == 2


def test_a_run_that_announces_nothing(show):
    empty = replace(RUN, steps=[], block_labels=[], density_by_block_and_step=[], reasons_by_block_and_step=[], sparse_calls=0,
                    density=None, dense_calls={}, overlays={}, q_cluster_sizes=[], k_cluster_sizes=[])  # fmt: skip
    plots, text, file = show(empty)
    assert len(plots) == 1 and "do not announce their evaluations" in text and file["steps"] == []
    assert len(show(replace(empty, completed=False))[0]) == 1, "failed before its first step"
    assert len(show(replace(empty, steps=RUN.steps[:1]))[0]) == 1, "steps, but no attention of the video's"


def test_speed_is_told_where_it_means_something(show):
    _, text, _ = show(RUN)
    assert "attention: 4.00x faster than a dense call in this run (2.00 ms instead of 8.00 ms a call)" in text
    assert "steps: 2.10x faster" in text and "settings: preset balanced, top_p 0.8, dense_blocks none" in text
    assert "attention: 4.00x faster" in show(replace(RUN, device="cpu"))[1]
    assert "faster" not in show(replace(RUN, attention_speedup=None, step_speedup=None))[1]


def test_slower_is_not_faster(show):
    from svg2_pack.nodes.report import headline

    slow = replace(RUN, attention_speedup=0.5, step_speedup=0.8, sparse_call_ms=16.0)
    text = show(slow)[1]
    assert "attention: 2.00x slower than a dense call in this run (16.00 ms instead of 8.00 ms a call)" in text
    assert "steps: 1.25x slower than this run's dense steps" in text and "faster" not in text
    assert "attention 2.0x slower than a dense call in this run" in headline(slow)[0]
    assert "attention 4.0x faster than a dense call in this run" in headline(RUN)[0]


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pictures_of_other_than_three_channels(host, channels):
    """Masks as pictures are shades of grey; what follows red, green and blue is left out."""
    from svg2_pack.nodes.telling.plots.canvas import fit
    from svg2_pack.nodes.telling.similarity import rgb as three

    frame = torch.rand(6, 8, channels)
    expected = frame[..., :3] if channels == 4 else frame[..., :1].repeat(1, 1, 3)
    assert torch.equal(three(frame), expected)
    assert (fit(frame, 8, 6) == (expected * 255).round().byte().numpy()).all()


def test_notices_are_told(show):
    plain, _, _ = show(RUN)
    plots, text, _ = show(replace(RUN, notices=["a kernel failed and was retired"]))
    assert "note: a kernel failed and was retired" in text
    orange = (plots[0] - torch.tensor(rgb("#ffb454")) / 255).abs().amax(-1) < 0.01
    assert orange.any() and not ((plain[0] - torch.tensor(rgb("#ffb454")) / 255).abs().amax(-1) < 0.01).any()


@pytest.mark.parametrize(("theme", "ground"), [("dark", "#17191d"), ("light", "#ffffff")])
def test_themes(show, theme, ground):
    plots, _, _ = show(RUN, theme=theme)
    share = ((plots - torch.tensor(rgb(ground)) / 255).abs().amax(-1) < 0.002).float().mean(dim=(1, 2))
    assert (share > 0.4).all()


def test_cells_of_the_heat_map(host):
    """Colours are matplotlib's viridis of density over the end of the scale; each reason has a hatching of its own."""
    import matplotlib
    from svg2_pack.nodes.telling.plots.canvas import THEMES, Canvas
    from svg2_pack.nodes.telling.plots.heat_map import draw_heat_map, top_of

    report = replace(RUN, density_by_block_and_step=[*DENSITY, [None] * 3],
                     reasons_by_block_and_step=[*REASONS, ["kernel_failed", None, "past_end"]], block_labels=["0", "1", "2"])  # fmt: skip
    assert top_of(report, "density") == top_of(replace(RUN, density_by_block_and_step=DENSITY[::-1]), "density") == 0.2
    theme = THEMES["dark"]
    canvas = Canvas(500, 300, theme)
    draw_heat_map(canvas, report, [100, 140, 180, 220], [10, 50, 90, 130])
    pixels = np.array(canvas.image)

    def cell(row, column):
        return pixels[10 + 40 * row : 49 + 40 * row, 100 + 40 * column : 139 + 40 * column]

    viridis = matplotlib.colormaps["viridis"]
    for row, column, density in ((0, 1, 0.1), (0, 2, 0.2), (1, 2, 0.05)):
        assert close(cell(row, column)[2, 2], 255 * np.array(viridis(density / 0.2)[:3]), 6)
    for row, column, line in (
        (0, 0, theme.hatch),
        (1, 0, theme.hatch),
        (1, 1, theme.hatch),
        (2, 0, theme.warning),
        (2, 2, theme.hatch),
    ):
        colors = {tuple(map(int, c)) for c in cell(row, column).reshape(-1, 3)}
        assert colors == {rgb(theme.neutral), rgb(line)}, (row, column)
    looks = {bytes(np.all(cell(*at) == rgb(theme.neutral), axis=-1)) for at in ((0, 0), (1, 1), (2, 0), (2, 2))}
    assert len(looks) == 4
    assert (cell(2, 1)[1:-1] == rgb(theme.background)).all(), "not seen in that step: empty"
    assert np.array_equal(cell(0, 0), cell(1, 0)), "one region"


def test_bars_of_the_steps(host):
    """A bar is as high as its share of the axis; one that dwarfs the others is cut off."""
    from svg2_pack.nodes.telling.plots.canvas import THEMES, Canvas
    from svg2_pack.nodes.telling.plots.steps import draw_density, draw_seconds

    theme = THEMES["light"]

    def height(draw, report, column, color=None):
        canvas = Canvas(500, 300, theme)
        draw(canvas, report, [100, 140, 180, 220], 50, 150)
        middle = np.array(canvas.image)[50:150, 100 + 40 * column + 18]
        return int((middle == rgb(color)).all(-1).sum()) if color else int((middle != 255).any(-1).sum())

    assert (
        abs(height(draw_density, RUN, 1) - 50) <= 2 and abs(height(draw_density, RUN, 2) - 63) <= 2
    )  # of an axis to 20%
    assert height(draw_density, RUN, 0) == 100, "a dense step is hatched all the way"
    assert abs(height(draw_seconds, RUN, 1, theme.series[0]) - 50) <= 1  # 1 s of an axis to 2 s
    slow = replace(RUN, steps=[replace(RUN.steps[0], seconds=60.0), *RUN.steps[1:]])
    assert abs(height(draw_seconds, slow, 1, theme.series[0]) - 100 / 3) <= 1, "3 s: three times the median"


def test_scales(host):
    from svg2_pack.nodes.telling.plots import scales
    from svg2_pack.nodes.telling.plots.histogram import size_range

    assert [scales.nice_top(v) for v in (0, 0.034, 0.2, 0.21, 0.99, 7, 61000)] == pytest.approx(
        [1, 0.04, 0.2, 0.3, 1, 8, 80000]
    )
    assert (
        scales.every(4, 10) == [0, 1, 2, 3]
        and scales.every(60, 12) == list(range(0, 60, 5))
        and scales.every(50, 1) == [0]
    )
    assert [scales.seconds(v) for v in (0, 0.0042, 3.456, 123.4)] == ["0", "4.2 ms", "3.46 s", "123 s"]
    assert [scales.count(v) for v in (0, 950, 12_300, 3_400_000)] == ["0", "950", "12.3k", "3.4M"]
    assert (
        scales.tick_percent(0.075) == "7.5%"
        and scales.percent(0.123) == "12%"
        and scales.percent(0.0123, 0.02) == "1.2%"
    )
    assert [size_range(i) for i in (0, 1, 2, 3, 9, 10, 11)] == ["0", "1", "2-3", "4-7", "256-511", "512-1k", "1k-2k"]


def test_bars_of_the_histogram(host):
    from svg2_pack.nodes.telling.plots.canvas import THEMES, Canvas
    from svg2_pack.nodes.telling.plots.histogram import draw_histogram

    canvas = Canvas(600, 200, THEMES["light"])
    draw_histogram(canvas, [0, 5, 10], [0, 0, 2, 8], (50, 20, 350, 120))  # 3 columns of 96 pixels: 1, 2-3, 4-7 tokens
    pixels = np.array(canvas.image)[20:120]
    queries, keys = ((pixels == rgb(color)).all(-1).sum(0) for color in THEMES["light"].series)
    assert [int(queries[50 + 96 * i + 25]) for i in range(3)] == [50, 100, 0]
    assert [int(keys[50 + 96 * i + 65]) for i in range(3)] == [0, 20, 80]


def test_clusters_lie_over_their_tokens(host):
    from svg2_pack.nodes.telling.plots import overlay

    big = overlay.enlarge(LABELS[0].numpy(), 30, 20)
    assert big.shape == (20, 30) and big[9, 19] == 0 and big[9, 20] == 1 and big[10, 19] == 2 and big[19, 29] == 1
    assert overlay.largest(LABELS) == [2, 1, 0, 3], "5, 3, 2 and 2 tokens over both frames; ties by number"
    assert overlay.largest(LABELS, 2) == [2, 1]
    # Wan: 5 latent frames are 17 frames, the first of them one, each other four.
    assert [overlay.frame_of(t, 5, 17) for t in range(5)] == [0, 4, 8, 12, 16] and overlay.frame_of(0, 1, 1) == 0
    assert overlay.frames_shown(21, 4) == [0, 7, 13, 20] and overlay.frames_shown(2, 4) == [0, 1]

    colors = overlay.many_colors(300)
    assert len(np.unique(colors, axis=0)) == 300
    frame = np.full((20, 30, 3), 100, dtype=np.uint8)
    picture = overlay.all_clusters(big, frame, colors)
    assert close(picture[5, 5], (colors[0].astype(float) + 100) / 2, 1) and close(
        picture[5, 25], (colors[1].astype(float) + 100) / 2, 1
    )
    assert (picture[9, 5] < picture[5, 5]).all(), "a border"
    assert close(overlay.all_clusters(big, None, colors)[15, 5], colors[2], 0)
    chosen = overlay.chosen_clusters(big, None, [2, 1])
    assert close(chosen[15, 5], overlay.SIX[0], 0) and close(chosen[5, 25], overlay.SIX[1], 0)
    assert len(set(chosen[5, 5])) == 1, "the others are grey"


def test_the_overlay_follows_images_and_block(show):
    """The video is on the page where it is given, and only the first video of a batch."""
    green = torch.zeros(5, 32, 48, 3)
    green[..., 1] = 1
    red = green.roll(-1, dims=-1)

    def share(page, color):
        return ((page - torch.tensor(color)).abs().amax(-1) < 0.01).float().mean().item()

    plain, over = show(RUN)[0][1], show(RUN, images=green)[0][1]
    assert share(plain, (0.0, 1.0, 0.0)) == 0 and share(over, (0.0, 1.0, 0.0)) > 0.03
    two = show(RUN, {"samples": torch.zeros(2, 16, 2, 8, 8)}, images=torch.cat((green, red)))[0][1]
    assert torch.equal(two, over)
    assert torch.equal(show(RUN, overlay_block=1)[0][1], plain), "-1 is the middle one"
    assert not torch.equal(show(RUN, overlay_block=0)[0][1], plain)


def test_a_block_without_clusters(host):
    from svg2_pack.nodes.report import choose_block

    assert choose_block(RUN, -1)[0] == "1" and choose_block(RUN, 0)[0] == "0"
    label, sentence = choose_block(RUN, 7)
    assert label is None and "of block 7" in sentence and sentence.endswith("Blocks that did: 0, 1.")
    label, sentence = choose_block(replace(RUN, overlays={}), -1)
    assert label is None and "references" in sentence


def test_large_and_small_runs(show):
    """60 blocks by 50 steps, 1 by 1, 2000 steps: pages of one size, and nothing is written beyond the margins."""
    rng = np.random.default_rng(0)
    steps = [StepReport(i, 1 - i / 50, True, 1.0, 0.1) for i in range(50)]
    labels = [f"{i}.1" for i in range(60)]
    large = replace(RUN, steps=steps, block_labels=labels, density_by_block_and_step=rng.random((60, 50)).tolist(),
                    reasons_by_block_and_step=[[None] * 50] * 60, overlays=dict.fromkeys(labels, LABELS))  # fmt: skip
    small = replace(
        RUN, steps=steps[:1], block_labels=["0"], density_by_block_and_step=[[0.1]], reasons_by_block_and_step=[[None]]
    )
    many = replace(large, steps=[replace(steps[0], index=i) for i in range(2000)], block_labels=["0"],
                   density_by_block_and_step=[[0.1] * 2000], reasons_by_block_and_step=[[None] * 2000])  # fmt: skip
    for report in (large, small, many):
        plots, _, _ = show(report, images=torch.rand(9, 48, 32, 3))
        assert plots.shape == (2, 960, 1280, 3) and plots.isfinite().all()
        for margin in (plots[:, :, :12], plots[:, :, -12:], plots[:, :12], plots[:, -4:]):
            assert (margin == plots[0, 0, 0]).all()
