"""Centroids carried from step to step."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch

DEFAULT_LIMIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Centroids:
    """Centroids of one batch row of one block: `q` `[H, Cq, D]` and `k` `[H, Ck, D]`, fp16."""

    q: torch.Tensor
    k: torch.Tensor

    @staticmethod
    def pack(q: torch.Tensor, k: torch.Tensor) -> "Centroids":
        return Centroids(_to_fp16(q), _to_fp16(k))

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.k.nbytes


def _to_fp16(x: torch.Tensor) -> torch.Tensor:
    # A bf16 model may have activations past fp16's range; a clipped start is a start, an infinite one is not.
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()


class CentroidCache:
    """Maps a key (block, conditioning, row, ...) to its last centroids, within `limit_bytes`.

    When full, new entries are refused and their blocks start cold each step: steady, where evicting the least recently
    used would evict every entry just before its use (the blocks of a model are visited in a cycle).
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._entries: dict[Hashable, Centroids] = {}

    def get(self, key: Hashable) -> Centroids | None:
        return self._entries.get(key)

    def put(self, key: Hashable, entry: Centroids) -> None:
        old = self._entries.get(key)
        used = self.used_bytes + entry.nbytes - (old.nbytes if old else 0)
        if used > self.limit_bytes:
            return
        self._entries[key] = entry
        self.used_bytes = used

    def clear(self) -> None:
        self._entries.clear()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)
