"""The benchmark's generated activations: in the right form, and alike to the captured ones they stand for."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import quality
from activations import activations, load

GRID = (13, 12, 20)  # 3,120 tokens, of which results/quality*.csv holds what the captures measured
HEADS = range(0, 12, 2)  # of each block and noise level the first
ROWS = 200


@pytest.fixture(scope="module")
def measured():
    """Errors and structure of some generated heads: (rows as in quality.csv, rows as in quality_structure.csv)."""
    heads = list(quality.generated(3120, GRID))
    found = {index: quality.measure(heads[index], index, ROWS, positions=index in (0, 6)) for index in HEADS}
    errors = [{"head": str(index), **row} for index, (table, _) in found.items() for row in table]
    return [{k: str(v) for k, v in row.items()} for row in errors], [shape for _, shape in found.values()]


def captured(name: str) -> list[dict]:
    rows = quality.read(name)
    return [
        row for row in rows if row["source"] == "captured" and row["tokens"] == "3120" and int(row["head"]) in HEADS
    ]


def test_shapes_strides_and_types():
    for token_major, strides in ((False, (3 * 547 * 128, 547 * 128, 128, 1)), (True, (3 * 547 * 128, 128, 3 * 128, 1))):
        for x in activations((3, 9, 20), 3, text=7, dtype=torch.float16, token_major=token_major):
            assert x.shape == (1, 3, 547, 128) and x.stride() == strides and x.dtype == torch.float16
            assert x.isfinite().all()
    with pytest.raises(ValueError, match="64"):
        activations(GRID, 1, head_dim=64)


def test_a_seed_says_all_and_its_heads_are_the_same_in_longer_lists():
    first, again, longer, other = (activations((4, 6, 10), h, seed=s) for h, s in ((2, 5), (2, 5), (3, 5), (2, 6)))
    for a, b, c, d in zip(first, again, longer, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c[:, :2]) and not torch.equal(a, d)


def test_no_two_heads_are_equal():
    heads = 2 * len(load()["mean"]) + 2
    for x in activations((3, 6, 10), heads, text=3):
        flat = x[0].float().flatten(1)
        alike = torch.nn.functional.normalize(flat) @ torch.nn.functional.normalize(flat).T
        assert (alike - torch.eye(heads)).abs().max() < 0.9


def test_text_is_dozens_of_vectors_of_the_videos_scale():
    for x in activations((3, 6, 10), 2, text=256):
        text, video = x[0, 0, :256].float(), x[0, 0, 256:].float()
        assert 0.8 < text.norm(dim=1).mean() / video.norm(dim=1).mean() < 1.25
        far = torch.cdist(text, text) > 0.2 * text.norm(dim=1).mean()
        assert 24 <= (~far).float().sum(1).reciprocal().sum() <= 64  # how many groups of near copies


@pytest.mark.parametrize("column, tolerance", [("dropped", 0.25), ("stand_in", 0.3)])
def test_error_against_density_agrees_with_the_captures(measured, column, tolerance):
    reference = captured("quality.csv")
    for density in quality.DENSITIES:
        key = {"grouping": "clusters", "target": density}
        got, expected = (quality.mean(rows, column, **key) for rows in (measured[0], reference))
        assert abs(got - expected) < tolerance * expected, f"{column} at {density}: {got:.3f}, captured {expected:.3f}"


def test_clusters_beat_position_blocks_as_on_the_captures(measured):
    for rows in (measured[0], captured("quality.csv")):
        for grouping in ("strips", "cubes"):
            blocks, clusters = (
                [float(r["stand_in"]) for r in rows if r["head"] in "06" and (r["grouping"], r["target"]) == (g, "0.1")]
                for g in (grouping, "clusters")
            )
            assert sum(blocks) > 1.3 * sum(clusters)


def test_structure_agrees_with_the_captures(measured):
    reference = captured("quality_structure.csv")
    for column in measured[1][0]:
        got = sum(row[column] for row in measured[1]) / len(HEADS)
        expected = quality.mean(reference, column)
        assert abs(got - expected) < 0.25 * expected, f"{column}: {got:.3f}, captured {expected:.3f}"
