"""Centroids carried from step to step."""

import threading
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

    When full, entries that no call of this step or the last one used are dropped (a moving context window leaves them
    behind). If that is not enough the new entry is refused, and its block starts cold each step: steady, where evicting
    the least recently used would evict every entry just before its use (a model's blocks are visited in a cycle).
    Several threads may share it, one per GPU.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.now = 0  # the current sampling step; the run sets it
        self._entries: dict[Hashable, Centroids] = {}
        self._used_at: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Centroids | None:
        with self._lock:
            if key in self._entries:
                self._used_at[key] = self.now
            return self._entries.get(key)

    def put(self, key: Hashable, entry: Centroids) -> None:
        with self._lock:
            self._remove(key)
            if self.used_bytes + entry.nbytes > self.limit_bytes:
                for stale in [k for k, step in self._used_at.items() if step < self.now - 1]:
                    self._remove(stale)
            if self.used_bytes + entry.nbytes > self.limit_bytes:
                return
            self._entries[key] = entry
            self._used_at[key] = self.now
            self.used_bytes += entry.nbytes

    def _remove(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._used_at[key]
            self.used_bytes -= entry.nbytes

    def drop(self, device: torch.device) -> bool:
        """Give up what lies on a device; True if there was any."""
        with self._lock:
            there = [key for key, entry in self._entries.items() if entry.q.device == device]
            for key in there:
                self._remove(key)
            return bool(there)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._used_at.clear()
            self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)
