"""CentroidCache and the fp16 packing of what it keeps."""

import torch
from svg2_pack.svg2_core.cache import CentroidCache, Centroids


def entry(value=0.0, heads=2, c_q=3, c_k=5, d=8) -> Centroids:
    """(3 + 5) * 2 * 8 values of 2 bytes: 256 bytes."""
    return Centroids.pack(torch.full((heads, c_q, d), value), torch.full((heads, c_k, d), value))


def test_packing():
    q, k = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    packed = Centroids.pack(q, k)
    assert packed.q.dtype == packed.k.dtype == torch.float16
    assert (packed.q.float() - q).abs().max() <= q.abs().max() * 2**-11
    assert (packed.k.float() - k).abs().max() <= k.abs().max() * 2**-11
    assert packed.nbytes == 256


def test_packing_clamps_what_fp16_cannot_hold():
    q = torch.tensor([[[1e6, -1e6, 65504.0, -65520.0, 1e38, 2.5]]])
    packed = Centroids.pack(q, -q)
    assert packed.q[0, 0].tolist() == [65504.0, -65504.0, 65504.0, -65504.0, 65504.0, 2.5]
    assert torch.equal(packed.k, -packed.q)


def test_packing_copies():
    q = torch.zeros(1, 1, 4, dtype=torch.float16)
    packed = Centroids.pack(q, q)
    q += 1
    assert (packed.q == 0).all()


def test_put_and_get():
    cache = CentroidCache()
    first, second = entry(1), entry(2)
    cache.put(("double", 3, 0), first)
    cache.put(("double", 3, 1), second)
    assert cache.get(("double", 3, 0)) is first
    assert cache.get(("double", 3, 1)) is second
    assert cache.get(("double", 4, 0)) is None
    assert len(cache) == 2 and cache.used_bytes == 512


def test_an_entry_replaces_its_own_past():
    cache = CentroidCache(limit_bytes=256)
    cache.put("a", entry(1))
    newer = entry(2)
    cache.put("a", newer)
    assert cache.get("a") is newer
    assert len(cache) == 1 and cache.used_bytes == 256


def test_full_means_new_entries_start_cold():
    """Two fit; the third is refused, the two stay and may still be renewed."""
    cache = CentroidCache(limit_bytes=600)
    for name in "abc":
        cache.put(name, entry())
    assert [cache.get(name) is not None for name in "abc"] == [True, True, False]
    newer = entry(3)
    cache.put("a", newer)
    assert cache.get("a") is newer and cache.used_bytes == 512


def test_a_replacement_that_does_not_fit_leaves_the_count_right():
    cache = CentroidCache(limit_bytes=600)
    cache.put("a", entry())
    cache.put("b", entry())
    cache.put("a", entry(heads=4))  # 512 bytes in place of 256
    assert cache.used_bytes == sum(cache.get(name).nbytes for name in "ab" if cache.get(name)) <= 600
    cache.put("c", entry(heads=1, c_q=1, c_k=1))
    assert cache.get("c") is not None


def test_a_smaller_replacement_makes_room():
    cache = CentroidCache(limit_bytes=512)
    cache.put("a", entry(heads=4))
    cache.put("a", entry(heads=2))
    cache.put("b", entry(heads=2))
    assert cache.get("b") is not None and cache.used_bytes == 512


def test_nothing_fits():
    cache = CentroidCache(limit_bytes=0)
    cache.put("a", entry())
    assert cache.get("a") is None and len(cache) == 0 and cache.used_bytes == 0


def test_clear():
    cache = CentroidCache(limit_bytes=256)
    cache.put("a", entry())
    cache.clear()
    assert cache.get("a") is None and len(cache) == 0 and cache.used_bytes == 0
    cache.put("b", entry())
    assert cache.get("b") is not None
