"""What the clusters of one step look like: how large they are, and which tokens of the video belong together."""

import torch

from .ops.kmeans import Clusters

Groups = list[tuple[Clusters, Clusters]]  # query and key clusters, for each chunk of heads in order


class ClusterPicture:
    """Per block, the clusters of the last call it was given. Kept on the device, nothing here waits for it before `sizes`.

    Of a block at 75,600 tokens, 40 heads, 300/1000 clusters this is 0.4 MB.
    """

    def __init__(self):
        self._sizes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._labels: dict[str, torch.Tensor] = {}

    def take(self, block: str, groups: Groups, grid: tuple[int, int, int]) -> None:
        """Note the sizes of all clusters, and the query clusters of row 0, head 0 over the `grid` (frames, rows, columns)."""
        queries = groups[0][0]
        self._sizes[block] = tuple(torch.cat([chunk[i].sizes.flatten() for chunk in groups]) for i in (0, 1))
        frames, rows, columns = grid
        tokens = queries.order.shape[-1]
        if frames * rows * columns != tokens:  # references among them: no one knows which
            self._labels.pop(block, None)
            return
        order, sizes = queries.order[0, 0].long(), queries.sizes[0, 0]
        names = torch.arange(sizes.shape[0], dtype=torch.int16, device=order.device)
        labels = torch.empty(tokens, dtype=torch.int16, device=order.device)
        labels[order] = torch.repeat_interleave(names, sizes, output_size=tokens)  # the size given: no wait for it
        self._labels[block] = labels.view(grid)

    def sizes(self) -> tuple[list[int], list[int]]:
        """Histograms of query and key cluster sizes over all blocks and heads, in powers of two.

        Entry 0 counts empty clusters, entry i >= 1 those of 2**(i-1) <= size < 2**i tokens.
        """
        return tuple(_histogram([pair[i] for pair in self._sizes.values()]) for i in (0, 1))

    def labels(self) -> dict[str, torch.Tensor]:
        """For each block that has one: int16 `[frames, rows, columns]` on the CPU, each token's query cluster."""
        return {block: labels.cpu() for block, labels in self._labels.items()}


def _histogram(sizes: list[torch.Tensor]) -> list[int]:
    if not sizes:
        return []
    _, exponents = torch.frexp(torch.cat([s.cpu() for s in sizes]).double())  # size = m * 2**e, 0.5 <= m < 1
    return torch.bincount(exponents.long()).tolist()
