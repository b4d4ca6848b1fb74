"""Graphs that nobody thought of: drawn by a seed, sampled with and without SVG2.

No exception, no NaN, no silent dense run; where everything is selected, or the node is off, the sample equals the one without.
`SVG2_GRAPHS=300 python scripts/test.py tests/nodes/test_random_graphs.py` draws more.
"""

import json
import os

import pytest
import random_graphs
import torch
from svg2_pack.svg2_core.metrics import rel_l2

COUNT = int(os.environ.get("SVG2_GRAPHS", 24))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_graph(model, seed):
    graph = random_graphs.draw(seed)
    try:
        dense, _ = random_graphs.sample(graph, model(graph.model), sparse=False)
    except Exception as error:  # the host's own, such as two padded prompts of HunyuanVideo in one batch
        with pytest.raises(type(error)):
            random_graphs.sample(graph, model(graph.model), sparse=True)
        return
    sample, stats = random_graphs.sample(graph, model(graph.model), sparse=True)
    assert sample.isfinite().all() or not dense.isfinite().all(), graph
    inputs = graph.inputs
    if not inputs["enabled"]:
        assert torch.equal(sample.nan_to_num(), dense.nan_to_num()) and stats.latest() is None, graph
        return
    report = stats.latest()
    assert report.completed and json.dumps(report.to_dict()) and report.summary, graph
    assert report.sparse_calls > 0 or report.notices, f"a silent dense run: {report.summary}; {graph}"
    exact = inputs.get("density") == 1 or inputs.get("top_p") == 1
    if dense.isfinite().all() and (exact or report.sparse_calls == 0):
        # Step caches decide by thresholds: what is off by rounding may skip another step.
        limit = 1e-3 if not {"easy_cache", "lazy_cache"} & {*graph.before, *graph.after} else 0.2
        assert rel_l2(sample, dense) <= limit, (graph, report)


def test_graphs_are_of_all_kinds():
    """Of the first hundred: models, and nodes before and after."""
    graphs = [random_graphs.draw(seed) for seed in range(100)]
    assert len({graph.model for graph in graphs}) >= 12
    for where in ("before", "after"):
        assert {name for graph in graphs for name in getattr(graph, where)} >= set(random_graphs.NODES) - {"second_svg2", "compiled"}
