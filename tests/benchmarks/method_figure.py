"""Draw how the method works, from one real call: `python tests/benchmarks/method_figure.py` writes web/docs/img/method.png.

The call is the demo checkpoint's block 3, head 0, at step 10 of 20 of the demo's video, clustered cold as the balanced
preset does. Clusters in the two maps are in the order of their tokens' mean place in the video, and as wide as they have
tokens: an area is a number of query-key pairs.
"""

import itertools
from dataclasses import replace

import common

common.need_torch()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import PICTURES, ROOT, start  # noqa: E402

WIDTH, HEIGHT, MARGIN, SIDE, GAP = 1600, 640, 40, 344, 48
BLOCK, STEP, HEAD = 3, 10, 0
EXACT, STAND_IN = (0, 114, 178), (233, 225, 206)


def call():
    """(q, k, v) `[1, 1, N, D]` of the head, and the sampled video's frames `[F, H, W, 3]`."""
    import demo_video
    from recorded_attention import record

    model = demo_video.model()
    [inputs] = record(model, blocks=(BLOCK,), steps=(STEP,))
    return [x[:, HEAD : HEAD + 1] for x in inputs], demo_video.frames(demo_video.sample(model))


def spread(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> np.ndarray:
    """A map of clusters `[Cq, Ck]` as SIDE x SIDE pixels in which a cluster is as wide as its share of the tokens."""
    places = (torch.arange(SIDE) + 0.5) / SIDE
    index = [torch.searchsorted(sizes.cumsum(0).double() / sizes.sum(), places) for sizes in (rows, columns)]
    return matrix[index[0]][:, index[1]].numpy()


def by_place(groups) -> torch.Tensor:
    """Clusters in the order of their tokens' mean index."""
    bounds = groups.offsets[0, 0].tolist()
    means = [groups.order[0, 0, a:b].double().mean() if b > a else torch.tensor(0.0) for a, b in itertools.pairwise(bounds)]
    return torch.stack([m.double() for m in means]).argsort()


def draw(inputs, frames):
    from svg2_pack.nodes.telling.plots.canvas import THEMES, Canvas, fit
    from svg2_pack.nodes.telling.plots.overlay import all_clusters, enlarge, many_colors
    from svg2_pack.svg2_core import Layout, svg2_attention
    from svg2_pack.svg2_core.cluster_picture import ClusterPicture
    from svg2_pack.svg2_core.clustering import cluster
    from svg2_pack.svg2_core.metrics import rel_l2
    from svg2_pack.svg2_core.ops.moments import moments
    from svg2_pack.svg2_core.ops.select import select_by_error
    from svg2_pack.svg2_core.presets import preset_config
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = inputs
    grid, layout, config = (13, 12, 20), Layout(0, q.shape[2]), preset_config("balanced", "wan_i2v")
    dense = scaled_dot_product_attention(q, k, v)
    result = svg2_attention(q, k, v, layout, config)
    errors = {"first_order": rel_l2(result.out, dense)}
    for other in ("centroid", "off"):
        errors[other] = rel_l2(svg2_attention(q, k, v, layout, replace(config, compensation=other)).out, dense)
    of_groups = {"scale": q.shape[-1] ** -0.5, "backend": "torch"}
    queries, keys, _ = cluster(q, k, [None], config, first_head=0, **of_groups)
    known = moments(q, k, v, queries, keys, directions=config.variance_directions, **of_groups)
    selected = select_by_error(queries, keys, known, density=config.density, **of_groups)[0][0, 0]
    logits = queries.centroids[0, 0] @ keys.centroids[0, 0].T * of_groups["scale"] + known.log_mass[0, 0]
    scores = logits.softmax(-1)

    rows, columns = by_place(queries), by_place(keys)
    sizes = queries.sizes[0, 0][rows], keys.sizes[0, 0][columns]
    estimate = spread(scores[rows][:, columns].log10(), *sizes)
    chosen = spread(selected[rows][:, columns], *sizes)

    picture = ClusterPicture()
    picture.take("block", result.groups, grid)
    labels = picture.labels()["block"]

    page = Canvas(WIDTH, HEIGHT, THEMES["light"])
    lefts = [MARGIN + i * (SIDE + GAP - 8) for i in range(4)]
    titles = ("1  cluster", "2  estimate", "3  select", "4  attend")
    texts = (
        f"k-means groups the queries, and the keys, that are alike, in every head and across frames: "
        f"here {len(sizes[0])} groups of queries, in colours.",
        f"One pass of the query groups' centroids over the keys says what each of the {len(sizes[0])} x {len(sizes[1])} pairs of "
        "groups weighs, and how much it varies inside.",
        f"The pairs that would be represented worst are taken: {result.density.item():.0%} of the area. "
        "Sorted by group, they are whole blocks, which a GPU is good at.",
        f"The chosen pairs are computed exactly; of the others, each group of {q.shape[2] // len(sizes[1])} or so keys stands in "
        "by its moments. Above: relative error of this call against dense attention, by what stands in.",
    )
    for left, title, text in zip(lefts, titles, texts, strict=True):
        page.text(left, 28, title, 30)
        page.paragraph(left, 482, text, SIDE, 19, page.theme.muted)

    # 1: three frames, one above the other.
    colors, height = many_colors(int(labels.max()) + 1), 108
    width = height * 320 // 192
    for i, t in enumerate((1, 6, 11)):
        top = 90 + i * (height + 10)
        frame = fit(frames[t * (len(frames) - 1) // 12], width, height)
        page.picture(lefts[0], top, frame)
        tokens = enlarge(labels[t].long().numpy(), SIDE - width - 8, height)
        page.picture(lefts[0] + width + 8, top, all_clusters(tokens, None, colors))
    # 2: the estimate, from 1/10 of an even share to 30 times it.
    low, high = -4.0, -0.8
    light = 1 - ((estimate - low) / (high - low)).clip(0, 1)[..., None]
    shades = (np.array([8, 48, 107]) * (1 - light) + np.array([247, 251, 255]) * light).round().astype(np.uint8)
    page.picture(lefts[1], 90, shades)
    # 3: what is computed exactly, and what by stand-ins.
    page.picture(lefts[2], 90, np.where(chosen[..., None], EXACT, STAND_IN).astype(np.uint8))
    for left in lefts[1:3]:
        page.frame((left, 90, left + SIDE, 90 + SIDE), page.theme.grid)
        page.text(left + SIDE / 2, 90 + SIDE + 18, "keys, by group", 17, page.theme.muted, "mm")
        page.upright_text(left - 14, 90 + SIDE / 2, "queries, by group", 17)
    # 4: the two errors as bars.
    names = {"off": "nothing (dropped)", "centroid": "their centroids", "first_order": "first order"}
    for i, (name, error) in enumerate(sorted(errors.items(), key=lambda pair: -pair[1])):
        top = 110 + i * 110
        page.text(lefts[3], top, names[name], 20)
        color = EXACT if name == "first_order" else (150, 150, 150)
        page.box((lefts[3], top + 32, lefts[3] + (SIDE - 70) * error / max(errors.values()), top + 68), color)
        page.text(lefts[3] + (SIDE - 70) * error / max(errors.values()) + 10, top + 50, f"{error:.2f}", 22, anchor="lm")
    return page.image, errors


def main() -> None:
    start()
    with torch.no_grad():
        image, errors = draw(*call())
    target = PICTURES / "method.png"
    image.quantize(128).save(target, optimize=True)
    print(target.relative_to(ROOT), errors)


if __name__ == "__main__":
    main()
