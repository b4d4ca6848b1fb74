"""The documents' table of errors and the figure of the method, made again from the shipped checkpoint by the scripts that made them."""

import csv
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"

pytestmark = pytest.mark.xdist_group("recorded")  # one recording serves all


@pytest.fixture
def script(monkeypatch):
    """`script(name)`: that script of tests/benchmarks as a module; the pack and the host are set up already."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    loaded = {"common": importlib.import_module("common")}
    monkeypatch.setattr(loaded["common"], "start", lambda: None)

    def load(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def rows(text: str) -> dict[str, list[float]]:
    """The numbers of the rows in the table between the script's marks, by their first cell (a share)."""
    found = {}
    table = text.split("<!-- attention_error -->")[1].split("<!-- /attention_error -->")[0]
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if re.fullmatch(r"[\d.]+%?", cells[0]):
            found[cells[0]] = [float(number.rstrip("%")) for cell in cells[1:] for number in cell.split(" / ")]
    return found


def test_the_table_of_errors(script, all_recorded, monkeypatch, tmp_path):
    """One of its rows, made of all nine calls: at equal density each way is nearer to dense than the one before."""
    module = script("attention_error")
    monkeypatch.setattr(module, "start", lambda: None)
    monkeypatch.setattr(module, "DENSITIES", (0.05,))
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    page = "web/docs/measurements.md"
    (tmp_path / page).parent.mkdir(parents=True)
    (tmp_path / page).write_text("<!-- attention_error -->\n<!-- /attention_error -->\n")
    monkeypatch.setattr("recorded_attention.record", lambda patcher: all_recorded)
    module.main()

    claimed, made = rows((ROOT / page).read_text(encoding="utf-8")), rows((tmp_path / page).read_text())
    assert set(made) == {"5%"} < set(claimed)
    # A table, not bits: another number of threads sums in another order, and a bisection ends within 3%.
    assert claimed["5%"] == pytest.approx(made["5%"], rel=0.05, abs=0.01)
    of_mass, of_error, dropped, centroids, first, share = made["5%"]
    assert of_mass == pytest.approx(5, rel=0.1) and 4.9 <= of_error <= 5
    assert centroids <= 0.5 * dropped and first <= 0.35 * centroids and share == pytest.approx(first / centroids, abs=0.01)
    assert claimed["10%"][-1] <= 0.32
    with open(tmp_path / "attention_error.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3


def test_the_figure(script, all_recorded):
    """Its errors are those of its call, and its map's area is the density that it names."""
    from svg2_pack.svg2_core import Layout, svg2_attention
    from svg2_pack.svg2_core.metrics import rel_l2
    from svg2_pack.svg2_core.presets import preset_config

    module = script("method_figure")
    inputs = [x[:, :1] for x in all_recorded[4]]
    image, errors = module.draw(inputs, torch.rand(49, 192, 320, 3, generator=torch.Generator().manual_seed(0)))
    dense = scaled_dot_product_attention(*(x.double() for x in inputs))
    result = svg2_attention(*inputs, Layout(0, inputs[0].shape[2]), preset_config("balanced", "wan_i2v"))
    assert errors["first_order"] == pytest.approx(rel_l2(result.out.double(), dense), rel=1e-3)
    assert 0 < errors["first_order"] < errors["centroid"] < errors["off"]
    pixels = torch.tensor(list(image.getdata()), dtype=torch.uint8).view(image.height, image.width, 3)
    left = module.MARGIN + 2 * (module.SIDE + module.GAP - 8)
    drawn = (pixels[90 : 90 + module.SIDE, left : left + module.SIDE] == torch.tensor(module.EXACT, dtype=torch.uint8)).all(-1)
    assert drawn.float().mean().item() == pytest.approx(result.density.item(), abs=0.02)
