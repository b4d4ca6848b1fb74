"""The cache of centroids that are carried from one sampling step to the next."""

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch

DEFAULT_LIMIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Centroids:
    """What one batch row of one block carries to the next step, all fp16.

    q `[H, Cq, W]`, k `[H, Ck, W]`: centroids in the space in which clusters are made; k is None where another call of the block
    keeps them. q_projection, k_projection `[H, D, W]`: what takes tokens there; None where that is the tokens' own space.
    """

    q: torch.Tensor
    k: torch.Tensor | None
    q_projection: torch.Tensor | None = None
    k_projection: torch.Tensor | None = None

    @staticmethod
    def pack(
        q: torch.Tensor, k: torch.Tensor | None = None, q_projection: torch.Tensor | None = None, k_projection: torch.Tensor | None = None
    ) -> list["Centroids"]:
        """Of a call's rows, from the fields `[B, H, ...]` of all of them."""
        named = {"q": q, "k": k, "q_projection": q_projection, "k_projection": k_projection}
        fields = [x for x in named.values() if x is not None]
        # A bf16 model may have activations past fp16's range; a clipped start is a start, an infinite one is not.
        limit = torch.finfo(torch.float16).max
        clipped = torch._foreach_clamp_max(torch._foreach_clamp_min(fields, -limit), limit)  # of all in one launch
        packed = [torch.empty_like(x, dtype=torch.float16) for x in fields]
        torch._foreach_copy_(packed, clipped)
        named.update(zip((name for name, x in named.items() if x is not None), packed, strict=True))
        return [Centroids(**{name: x if x is None else x[i] for name, x in named.items()}) for i in range(len(q))]

    @staticmethod
    def cat(parts: tuple["Centroids", ...]) -> "Centroids":
        """Of all heads, from chunks of them in order."""
        if len(parts) == 1:
            return parts[0]
        fields = zip(*((part.q, part.k, part.q_projection, part.k_projection) for part in parts), strict=True)
        return Centroids(*(None if field[0] is None else torch.cat(field) for field in fields))

    def of_heads(self, heads: slice) -> "Centroids":
        return Centroids(*(None if x is None else x[heads] for x in self.tensors()))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors() if x is not None)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """q, k and their projections, None for those that are not there."""
        return self.q, self.k, self.q_projection, self.k_projection


class Key(NamedTuple):
    """The key of an entry: a place (block, row, tokens, device, ...) and one of the conditionings that are evaluated there."""

    conditioning: Hashable
    place: Hashable


class CentroidCache:
    """Maps a key to its last centroids, within `limit_bytes`.

    When full, entries that no call of this step or the last one used are dropped (a moving context window leaves them
    behind). If that is not enough the new entry is refused, and its block starts cold each step: steady, where evicting
    the least recently used would evict every entry just before its use (a model's blocks are visited in a cycle).
    Several threads may share it, one per GPU.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.refused = 0  # entries that did not fit
        self.now = 0  # the current sampling step; the run sets it
        self._entries: dict[Key, Centroids] = {}
        self._used_at: dict[Key, int] = {}
        self._since: dict[Key, int] = {}  # the step of its first entry
        self._siblings: dict[Hashable, dict[Hashable, None]] = {}  # of a place: its conditionings, the oldest first
        self._lock = threading.Lock()

    def get(self, key: Key) -> Centroids | None:
        """The key's own past; without one, that of another conditioning at its place, known since an earlier step.

        Of an earlier step, for in one step the conditionings may come in one batch or one after the other, as memory allows:
        the result must not depend on it.
        """
        with self._lock:
            found = key if key in self._entries else None
            for conditioning in self._siblings.get(key.place, ()) if found is None else ():
                sibling = Key(conditioning, key.place)
                if self._since[sibling] < self.now:
                    found = sibling
                    break
            if found is None:
                return None
            self._used_at[found] = self.now
            return self._entries[found]

    def put(self, key: Key, entry: Centroids) -> None:
        with self._lock:
            since = self._since.get(key, self.now)
            self._remove(key)
            if self.used_bytes + entry.nbytes > self.limit_bytes:
                for stale in [k for k, step in self._used_at.items() if step < self.now - 1]:
                    self._remove(stale)
            if self.used_bytes + entry.nbytes > self.limit_bytes:
                self.refused += 1
                return
            self._entries[key] = entry
            self._used_at[key], self._since[key] = self.now, since
            self._siblings.setdefault(key.place, {})[key.conditioning] = None
            self.used_bytes += entry.nbytes

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._used_at[key], self._since[key], self._siblings[key.place][key.conditioning]
            if not self._siblings[key.place]:
                del self._siblings[key.place]
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
            for kept in (self._entries, self._used_at, self._since, self._siblings):
                kept.clear()
            self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)
