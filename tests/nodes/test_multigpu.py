"""The host's multi-GPU split: each conditioning in a thread of its own, on a copy of the model of its own.

CPU devices of different numbers stand for the GPUs: they are unequal to the host, and one and the same to torch.
"""

import functools
import gc
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
import tiny_wan
import torch
from svg2_pack.svg2_core.cache import CentroidCache, Centroids, Key
from svg2_pack.svg2_core.metrics import rel_l2
from svg2_pack.svg2_core.reasons import Reason
from svg2_pack.svg2_core.stats import RunStats

VARIANTS = {v.name: v for v in tiny_models.VARIANTS}
@pytest.fixture(autouse=True)
def no_comparison(monkeypatch):
    """The devices go in step here: a dense call that one of them makes for comparison would wait for the other's."""
    monkeypatch.setattr(RunStats, "reference_watch", lambda *args: None)


SPARSE = {"warmup_steps": 0, "dense_blocks": "", "top_p": 0.3}
STEPS = 2


@pytest.fixture(scope="module")
def made(host):
    """`made(name)` -> the variant's model, which the host can copy."""

    @functools.cache
    def make(name):
        model = VARIANTS[name].build()
        model.cached_patcher_init = (lambda **_: VARIANTS[name].build(), ())
        return model

    yield make
    gc.collect()
    strike_off_the_dead()


@pytest.fixture
def split(host, monkeypatch):
    """`split(model, devices)` -> what the host's node MultiGPU CFG Split makes of it."""
    import comfy.model_base
    import comfy.model_management
    import comfy.multigpu

    devices = [torch.device("cpu"), *(torch.device("cpu", i) for i in range(3))]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)
    # One device, too, answers each conditioning in a call of its own: then all must be bit-identical.
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: float("inf"))
    yield lambda model, devices=2: comfy.multigpu.create_multigpu_deepclones(model, devices)
    strike_off_the_dead()


def strike_off_the_dead():
    """Patchers die while their models are listed as loaded, and then the host collects garbage before each sampling."""
    from comfy.model_management import current_loaded_models as loaded

    loaded[:] = [entry for entry in loaded if not entry.is_dead()]


class InStep:
    """Another node, which lets `threads` evaluations go on only together: all begin, then all are in the same call.

    It notes who they were, and the lengths of the calls that pass through it. error: raised on the first device, in its
    first call; from then on nobody waits.
    """

    def __init__(self, threads: int, error: BaseException | None = None):
        self.barrier, self.error, self.apart = threading.Barrier(threads, timeout=60), error, False
        self.threads, self.lengths = set(), Counter()

    def __call__(self, model):
        from comfy.patcher_extension import WrappersMP

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", self.begin)
        model.model_options["transformer_options"]["optimized_attention_override"] = self.attend
        return model

    def begin(self, executor, *args, **kwargs):
        self.threads.add(threading.get_ident())
        self.barrier.wait()
        return executor(*args, **kwargs)

    def attend(self, func, q, k, v, heads, **kwargs):
        self.lengths[k.shape[-2]] += 1
        if not self.apart:
            self.barrier.wait()
            self.apart = self.error is not None
            if self.apart and kwargs["transformer_options"]["multigpu_thread_device"] == torch.device("cpu"):
                raise self.error
        return func(q, k, v, heads, **kwargs)


def sample(name, model, **kwargs):
    if name != "wan2.1 vace":  # whose control video has the size of its latent
        kwargs["shape"] = VARIANTS[name].latent()[:, :, :3, :12, :12]
    with torch.inference_mode():  # as the host's queue does
        return tiny_models.sample(VARIANTS[name], model, steps=STEPS, cfg=3.0, **kwargs)


def networks(model):
    return [m.model.diffusion_model for m in [model, *model.get_additional_models_with_key("multigpu")]]


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for network in networks(model) for module in network.modules())


# Cosmos has no block index in the host; Mochi does not announce its evaluations either; HunyuanVideo's mask of a padded
# prompt is looked at once per evaluation; VACE announces a block's index twice.
@pytest.mark.parametrize(
    "name, svg2_first",
    [("cosmos t2v", True), ("mochi t2v", False), ("hunyuan_video t2v padded", True), ("wan2.1 vace", False)],
)
def test_two_devices_equal_one(made, svg2, split, name, svg2_first):
    patched, stats = svg2(made(name), **SPARSE)
    expected, one = sample(name, patched), stats.latest()
    dense = sample(name, made(name))
    assert one.density < 0.8 and rel_l2(expected, dense) > 1e-3, "nothing was sparse: this proves nothing"

    together = InStep(2)
    if svg2_first:
        model = split(together(patched))
    else:
        model, stats = svg2(split(together(made(name))), **SPARSE)
    assert torch.equal(sample(name, model), expected)
    two = stats.latest()
    assert two is not one and two.completed and len(together.threads) == 2
    assert two.sparse_calls == 2 * STEPS * VARIANTS[name].blocks
    for field in ("sparse_calls", "dense_calls", "block_labels", "density_by_block_and_step", "tokens", "notices"):
        assert getattr(two, field) == getattr(one, field), field
    assert [s.density for s in two.steps] == [s.density for s in one.steps]
    assert hooks(model) == 0


def test_everything_selected_equals_dense(made, svg2, split):
    model = made("cosmos t2v")
    patched, stats = svg2(model, **{**SPARSE, "top_p": 1.0})
    assert rel_l2(sample("cosmos t2v", split(patched)), sample("cosmos t2v", model)) <= 1e-4
    assert stats.latest().sparse_calls == 2 * STEPS * 3 and stats.latest().dense_calls == {}


@pytest.mark.parametrize("devices", [2, 4])
def test_four_conditionings(wan, svg2, split, monkeypatch, devices):
    """Two or one on each device: one half of the picture has a prompt of its own."""
    monkeypatch.setattr(wan, "cached_patcher_init", (lambda **_: tiny_wan.random_wan(), ()))
    left = tiny_wan.conditioning(seed=2)
    left[0][1].update({"area": (5, 8, 16, 0, 8, 0), "strength": 1.0, "set_area_to_bounds": False})
    inputs = {"positive": tiny_wan.conditioning(seed=1) + left, "cfg": 2.0, "steps": STEPS}
    patched, stats = svg2(wan, **SPARSE)
    expected, one = tiny_wan.sample(patched, **inputs), stats.latest()
    together = InStep(devices)
    assert torch.equal(tiny_wan.sample(split(together(patched), devices), **inputs), expected)
    assert stats.latest().sparse_calls == one.sparse_calls == 4 * STEPS * 3 and len(together.threads) == devices


def test_each_device_keeps_its_own_centroids(made, svg2, split, monkeypatch):
    from svg2_pack.svg2_core import session

    kept = []

    class Recorded(session.CentroidCache):
        def get(self, key):
            entry = super().get(key)
            kept.append((threading.get_ident(), key, entry is not None))
            return entry

    monkeypatch.setattr(session, "CentroidCache", Recorded)
    patched, _ = svg2(made("cosmos t2v"), **SPARSE)
    sample("cosmos t2v", split(InStep(2)(patched)))
    threads = {thread for thread, *_ in kept}
    seen = [[(key, warm) for t, key, warm in kept if t == thread] for thread in threads]
    assert len(seen) == 2 and not {k for k, _ in seen[0]} & {k for k, _ in seen[1]}
    for calls in seen:
        assert [key.place[0] for key, _ in calls] == ["0", "1", "2"] * STEPS
        assert [warm for _, warm in calls] == [False] * 3 + [True] * 3


def test_a_node_added_later_does_not_displace_us(made, svg2, split):
    """Ours is put on top for each device's evaluations: once above the other node is enough."""
    patched, stats = svg2(made("cosmos t2v"), **SPARSE)
    expected = sample("cosmos t2v", patched)
    alone, together = InStep(1), InStep(2)
    assert torch.equal(sample("cosmos t2v", alone(patched)), expected)
    assert torch.equal(sample("cosmos t2v", split(together(patched))), expected)
    assert stats.latest().sparse_calls == 2 * STEPS * 3
    assert together.lengths == alone.lengths, "each dense call passes the other node once"
    assert len(together.threads) == 2


@pytest.mark.parametrize("kind", ["RuntimeError", "InterruptProcessingException"])
def test_a_failure_on_one_device(made, svg2, split, kind):
    import comfy.model_management

    error = getattr(comfy.model_management, kind, RuntimeError)("of one device")
    patched, stats = svg2(made("cosmos t2v"), **SPARSE)
    expected = sample("cosmos t2v", patched)
    model = split(patched)
    with pytest.raises(type(error), match="of one device"):
        sample("cosmos t2v", InStep(2, error)(model))
    assert not stats.latest().completed and stats.latest().sparse_calls > 0
    assert hooks(model) == 0
    assert torch.equal(sample("cosmos t2v", model), expected) and stats.latest().completed


def test_a_device_still_busy_when_another_fails(made, svg2, split, monkeypatch):
    """The host waits 5 s for it; at full size an evaluation takes longer. Here the host does not wait at all."""
    import comfy.multigpu

    def stop(pool):
        for queue in pool._work_queues.values():
            queue.put(None)
        workers.extend(pool._workers)

    def busy(func, *args, **kwargs):
        if kwargs["transformer_options"]["multigpu_thread_device"] == torch.device("cpu"):
            inside.wait(60)
            raise RuntimeError("of one device")
        inside.set()
        over.wait(60)
        return func(*args, **kwargs)

    workers, inside, over = [], threading.Event(), threading.Event()
    monkeypatch.setattr(comfy.multigpu.MultiGPUThreadPool, "shutdown", stop)
    patched, stats = svg2(made("cosmos t2v"), **SPARSE)
    expected = sample("cosmos t2v", patched)
    model = split(patched)
    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = busy
    with pytest.raises(RuntimeError, match="of one device"):
        sample("cosmos t2v", other)
    report = stats.latest()
    over.set()
    for worker in workers:
        worker.join(60)
    assert len(stats.reports()) == 2 and not report.completed and report.sparse_calls > 0
    assert hooks(model) == 0 and torch.equal(sample("cosmos t2v", model), expected)


def test_both_short_of_memory_at_once(made, svg2, split, monkeypatch, two_threads):
    """Each goes on with fewer heads; that the other did so first is no reason to give up."""
    from svg2_pack.svg2_core import session

    whole, both, heads = session.svg2_attention, threading.Barrier(2, timeout=60), []

    def short(*args, heads_at_a_time=None, **kwargs):
        heads.append(heads_at_a_time)
        if heads_at_a_time is None:
            both.wait()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*args, heads_at_a_time=heads_at_a_time, **kwargs)

    patched, stats = svg2(made("cosmos t2v"), **SPARSE)
    expected = sample("cosmos t2v", patched)
    monkeypatch.setattr(session, "svg2_attention", short)
    assert torch.equal(sample("cosmos t2v", split(patched)), expected)
    assert stats.latest().dense_calls == {} and heads.count(None) == 2


# What the threads share, hammered.


@pytest.fixture
def hammer():
    """`hammer(function)` -> the results of function(0 ... 3), each in a thread of its own, all begun together."""
    interval, start = sys.getswitchinterval(), threading.Barrier(4)

    def begin(function, i):
        start.wait()
        return function(i)

    sys.setswitchinterval(1e-6)  # the interpreter changes threads as often as it can
    with ThreadPoolExecutor(4) as pool:
        yield lambda function: list(pool.map(begin, [function] * 4, range(4)))
    sys.setswitchinterval(interval)


class Slow:
    """A reason for a dense call that gives the other threads time between reading a count and writing it."""

    def __hash__(self):
        time.sleep(1e-4)
        return 0

    @property
    def sentence(self):
        time.sleep(1e-3)
        return "slow"


def test_counts_add_up(hammer):
    stats, density = RunStats(), torch.tensor(0.5)

    def count(i):
        for n in range(1000):
            stats.sparse_call(n % 3, f"{i}", 10 + i, density, "torch")
            stats.dense_call(Reason.WARMUP, f"{n % 5}")

    hammer(count)
    report = stats.report(True)
    assert report.sparse_calls == 4 * 1000 and report.dense_calls == {"warmup": 4 * 1000} and report.tokens == 13
    assert set(report.block_labels) == {"0", "1", "2", "3", "4"}

    stats, slow = RunStats(), Slow()
    firsts = hammer(lambda i: sum(stats.dense_call(slow) for _ in range(20)))
    assert sum(firsts) == 1, "one call is the first of its reason, for one line in the log"
    assert stats.dense == {slow: 4 * 20}


def test_a_report_while_another_device_still_counts(hammer):
    """A failed run is summed up at once, though another device may be in the midst of an evaluation."""
    stats, density = RunStats(), torch.tensor(0.5)

    def count(i):
        if i == 0:
            return [stats.report(False) for _ in range(20)]
        for n in range(1000):
            stats.sparse_call(n % 3, f"{i}.{n}", 10, density, "torch")
        return []

    for report in hammer(count)[0]:
        assert len(report.block_labels) == len(report.density_by_block_and_step) == report.sparse_calls


def test_the_cache_knows_its_size(hammer):
    entry = Centroids(torch.zeros(1, 2, 4, dtype=torch.float16), torch.zeros(1, 2, 4, dtype=torch.float16))
    cache = CentroidCache(limit_bytes=100 * entry.nbytes)

    def use(i):
        for n in range(2000):
            cache.now = n // 50
            cache.put(Key(i if n % 2 else "of all", n % 40), entry)
            cache.get(Key("of all", n % 40))

    hammer(use)
    assert cache.used_bytes == len(cache) * entry.nbytes <= cache.limit_bytes
    assert set(cache._used_at) == set(cache._since) == set(cache._entries)
    assert {Key(name, place) for place, names in cache._siblings.items() for name in names} == set(cache._entries)
