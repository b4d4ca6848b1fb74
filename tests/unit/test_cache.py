"""CentroidCache and the fp16 packing of what it keeps."""

import pytest
import torch
from svg2_pack.svg2_core.cache import CentroidCache, Centroids, Key
from svg2_pack.svg2_core.presets import preset_config
from torch._subclasses.fake_tensor import FakeTensorMode


def packed_row(*fields: torch.Tensor) -> Centroids:
    """Of a call of one row."""
    [row] = Centroids.pack(*(x[None] for x in fields))
    return row


def entry(value=0.0, heads=2, c_q=3, c_k=5, d=8) -> Centroids:
    """(3 + 5) * 2 * 8 values of 2 bytes: 256 bytes."""
    return packed_row(torch.full((heads, c_q, d), value), torch.full((heads, c_k, d), value))


def key(name: str) -> Key:
    """Of a place of that name."""
    return Key("positive", name)


def test_packing():
    q, k = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    packed = packed_row(q, k)
    assert packed.q.dtype == packed.k.dtype == torch.float16
    assert (packed.q.float() - q).abs().max() <= q.abs().max() * 2**-11
    assert (packed.k.float() - k).abs().max() <= k.abs().max() * 2**-11
    assert packed.nbytes == 256


def test_packing_clamps_what_fp16_cannot_hold():
    q = torch.tensor([[[1e6, -1e6, 65504.0, -65520.0, 1e38, 2.5]]])
    packed = packed_row(q, -q)
    assert packed.q[0, 0].tolist() == [65504.0, -65504.0, 65504.0, -65504.0, 65504.0, 2.5]
    assert torch.equal(packed.k, -packed.q)


def test_packing_copies():
    q = torch.zeros(1, 1, 4, dtype=torch.float16)
    packed = packed_row(q, q)
    q += 1
    assert (packed.q == 0).all()


def test_put_and_get():
    cache = CentroidCache()
    first, second = entry(1), entry(2)
    cache.put(Key("positive", ("double", 3, 0)), first)
    cache.put(Key("negative", ("double", 3, 0)), second)
    assert cache.get(Key("positive", ("double", 3, 0))) is first
    assert cache.get(Key("negative", ("double", 3, 0))) is second
    assert cache.get(Key("positive", ("double", 4, 0))) is None
    assert len(cache) == 2 and cache.used_bytes == 512


def test_an_entry_replaces_its_own_past():
    cache = CentroidCache(limit_bytes=256)
    cache.put(key("a"), entry(1))
    newer = entry(2)
    cache.put(key("a"), newer)
    assert cache.get(key("a")) is newer
    assert len(cache) == 1 and cache.used_bytes == 256


def test_full_means_new_entries_start_cold():
    """Two fit; the third is refused, the two stay and may still be renewed."""
    cache = CentroidCache(limit_bytes=600)
    for name in "abc":
        cache.put(key(name), entry())
    assert [cache.get(key(name)) is not None for name in "abc"] == [True, True, False]
    newer = entry(3)
    cache.put(key("a"), newer)
    assert cache.get(key("a")) is newer and cache.used_bytes == 512


def test_a_replacement_that_does_not_fit_leaves_the_count_right():
    cache = CentroidCache(limit_bytes=600)
    cache.put(key("a"), entry())
    cache.put(key("b"), entry())
    cache.put(key("a"), entry(heads=4))  # 512 bytes in place of 256
    assert cache.used_bytes == sum(cache.get(key(name)).nbytes for name in "ab" if cache.get(key(name))) <= 600
    cache.put(key("c"), entry(heads=1, c_q=1, c_k=1))
    assert cache.get(key("c")) is not None


def test_a_smaller_replacement_makes_room():
    cache = CentroidCache(limit_bytes=512)
    cache.put(key("a"), entry(heads=4))
    cache.put(key("a"), entry(heads=2))
    cache.put(key("b"), entry(heads=2))
    assert cache.get(key("b")) is not None and cache.used_bytes == 512


def test_nothing_fits():
    cache = CentroidCache(limit_bytes=0)
    cache.put(key("a"), entry())
    assert cache.get(key("a")) is None and len(cache) == 0 and cache.used_bytes == 0


def test_clear():
    cache = CentroidCache(limit_bytes=256)
    cache.put(key("a"), entry())
    cache.clear()
    assert cache.get(key("a")) is None and len(cache) == 0 and cache.used_bytes == 0
    cache.put(key("b"), entry())
    assert cache.get(key("b")) is not None


# A conditioning without a past.

PLACE = ("3", 0, 75_600)


def test_a_sibling_of_an_earlier_step_serves():
    cache = CentroidCache()
    cache.now = 1
    known = entry(1)
    cache.put(Key("positive", PLACE), known)
    assert cache.get(Key("negative", PLACE)) is None, "in the first step it must not matter who came first"
    cache.now = 2
    assert cache.get(Key("negative", PLACE)) is known
    assert cache.get(Key("negative", ("4", 0, 75_600))) is None
    own = entry(2)
    cache.put(Key("negative", PLACE), own)
    assert cache.get(Key("negative", PLACE)) is own and cache.get(Key("positive", PLACE)) is known


def test_a_conditioning_that_does_not_fit_starts_from_its_sibling_at_each_step():
    cache = CentroidCache(limit_bytes=256)
    for step in range(3):
        cache.now = step
        cache.put(Key("positive", PLACE), entry(step))
        cache.put(Key("negative", PLACE), entry(9))
        found = cache.get(Key("negative", PLACE))
        assert found is None if step == 0 else (found.q == step).all()
    assert cache.refused == 3


def test_the_oldest_sibling_is_taken_and_one_that_is_gone_is_not():
    cache = CentroidCache()
    for name in ("first", "second"):
        cache.put(Key(name, PLACE), entry())
    cache.now = 1
    assert cache.get(Key("third", PLACE)) is cache.get(Key("first", PLACE))
    assert cache.drop(torch.device("cpu"))
    assert cache.get(Key("third", PLACE)) is None and cache.used_bytes == 0 and len(cache) == 0


# What a run keeps, at the sizes people use.

SIZES = [  # blocks, heads, head dimension, video tokens: the settings by model of web/docs/models.md
    ("Wan 14B 720p", 40, 40, 128, 75_600), ("Wan 14B 480p", 40, 40, 128, 32_760), ("Wan 1.3B 480p", 30, 12, 128, 32_760),
    ("Wan 14B 640 x 640", 40, 40, 128, 33_600), ("Wan 2.2 5B 704p", 30, 24, 128, 27_280), ("HunyuanVideo 720p", 60, 24, 128, 118_800),
    ("HunyuanVideo 480p", 60, 24, 128, 30_210), ("HunyuanVideo 1.5 720p", 54, 16, 128, 111_600), ("Cosmos-Predict2 480p", 28, 16, 128, 38_160),
]  # fmt: skip


@pytest.mark.parametrize("preset", ["quality", "balanced", "turbo"])
@pytest.mark.parametrize("name, blocks, heads, d, tokens", SIZES, ids=[size[0] for size in SIZES])
def test_every_block_fits_with_cfg(name, blocks, heads, d, tokens, preset):
    config = preset_config(preset, "other")
    cache = CentroidCache()
    with FakeTensorMode():
        q, k = (torch.empty(heads, count, config.metric_directions) for count in config.cluster_counts(tokens))
        projections = (torch.empty(heads, d, config.metric_directions) for _ in "qk")
        row = packed_row(q, k, *projections)
    for _ in range(2):  # a replacement must fit beside the others, too
        for block in range(blocks):
            for conditioning in ("positive", "negative"):
                cache.put(Key(conditioning, block), row)
    assert len(cache) == 2 * blocks and cache.refused == 0
    assert cache.used_bytes <= cache.limit_bytes
