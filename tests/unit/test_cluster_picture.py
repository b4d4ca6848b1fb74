"""What is kept of the clusters, against counting them by hand."""

import torch
from svg2_pack.svg2_core.cluster_picture import ClusterPicture, Groups
from svg2_pack.svg2_core.ops.kmeans import Clusters


def clusters(labels: torch.Tensor, n: int) -> Clusters:
    """Clusters of given labels `[B, H, N]`."""
    order = labels.argsort(dim=-1, stable=True).int()
    sizes = torch.nn.functional.one_hot(labels, n).sum(-2)
    offsets = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()
    return Clusters(order, offsets, torch.zeros(*labels.shape[:2], n, 4))


def groups(*chunks) -> Groups:
    """Of chunks of heads, (labels, number of clusters) for each, the same for queries and keys."""
    return Groups.of_chunks([Groups.of(clusters(*chunk), clusters(*chunk)) for chunk in chunks])


def test_labels_lie_over_the_grid():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (2, 3, 24), generator=g)
    labels[labels == 4] = 5  # an empty cluster
    picture = ClusterPicture()
    picture.take("3", groups((labels, 7)), (2, 3, 4))
    assert torch.equal(picture.labels()["3"].long(), labels[0, 0].view(2, 3, 4))


def test_the_first_chunk_of_heads_and_the_last_call_count():
    a, b = torch.zeros(1, 1, 8, dtype=torch.long), torch.arange(8).view(1, 1, 8)
    picture = ClusterPicture()
    picture.take("0", groups((a, 8)), (1, 2, 4))
    picture.take("0", groups((b, 8), (a, 8)), (1, 2, 4))
    assert picture.labels()["0"].flatten().tolist() == list(range(8))
    q_sizes, _ = picture.sizes()
    assert q_sizes == [7, 8, 0, 0, 1]  # of the second call: 8 of one token; 7 empty and one of 8 tokens


def test_sizes_by_powers_of_two():
    sizes = [0, 1, 2, 3, 4, 7, 8, 100]
    labels = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])[None, None]
    picture = ClusterPicture()
    picture.take("0", groups((labels, 8)), (1, 1, sum(sizes)))
    expected = [0] * 8
    for size in sizes:
        expected[0 if size == 0 else next(i for i in range(1, 9) if 2 ** (i - 1) <= size < 2**i)] += 1
    assert picture.sizes() == (expected, expected)


def test_references_in_the_sequence_have_no_place_on_the_grid():
    labels = torch.zeros(1, 1, 10, dtype=torch.long)
    picture = ClusterPicture()
    picture.take("0", groups((labels, 2)), (1, 2, 4))
    assert picture.labels() == {} and picture.sizes()[0] == [1, 0, 0, 0, 1]


def test_nothing_taken():
    assert ClusterPicture().labels() == {} and ClusterPicture().sizes() == ([], [])
