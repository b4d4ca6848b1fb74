"""Same seed, same settings, same machine: bit-identical, whatever ran before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_wan import conditioning, latent, sample

ROOT = Path(__file__).resolve().parents[2]


def test_two_runs_are_bit_identical(wan, svg2):
    patched, _ = svg2(wan)
    assert torch.equal(sample(patched), sample(patched))


def test_result_equals_a_fresh_process_whatever_ran_before(wan, svg2, tmp_path):
    patched, stats = svg2(wan)

    def interrupt(step, *_):
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(patched, callback=interrupt)
    assert not stats.latest().completed
    sample(patched, shape=latent(3, 18, 22))  # another resolution
    sample(patched, seed=7, positive=conditioning(seed=5))  # another video
    after = sample(patched)

    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "models")!r}]
import conftest, torch
script = conftest._load("host_script", conftest.ROOT / "scripts" / "host.py")
script.activate(script.find(), cpu=not torch.cuda.is_available())
import tiny_wan
from svg2_pack.nodes.sparse_attention import SVG2SparseAttention
torch.use_deterministic_algorithms(True)
patched, _ = SVG2SparseAttention.execute(tiny_wan.random_wan(), min_tokens=0).result
torch.save(tiny_wan.sample(patched), {str(tmp_path / "fresh.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert torch.equal(after, torch.load(tmp_path / "fresh.pt"))


def test_a_sampler_inside_another_sees_its_own_run(wan, svg2):
    patched, _ = svg2(wan)
    alone, other_alone = sample(patched), sample(patched, seed=3)
    inner = {}

    def sample_another(step, *_):
        if step == 2:
            current = wan.model.current_patcher  # the host forgets it when the inner sampling ends
            inner["result"] = sample(patched, seed=3)
            wan.model.current_patcher = current

    outer = sample(patched, callback=sample_another)
    assert torch.equal(inner["result"], other_alone)
    assert torch.equal(outer, alone)


def test_nothing_stays_on_the_model(wan, svg2):
    before = set(wan.model_options["transformer_options"])
    patched, _ = svg2(wan)
    sample(patched)
    assert set(wan.model_options["transformer_options"]) == before, "the original model is untouched"
    assert set(patched.model_options["transformer_options"]) == before | {"optimized_attention_override"}


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_leaves_nothing_behind(wan, svg2, monkeypatch, interrupted):
    import gc
    import weakref

    from svg2_pack.nodes.patching import patch

    runs = []
    whole = patch.Run.__init__

    def remember(self, *args, **kwargs):
        whole(self, *args, **kwargs)
        runs.append(weakref.ref(self))

    def interrupt(step, *_):
        if interrupted and step == 2:
            raise InterruptedError

    monkeypatch.setattr(patch.Run, "__init__", remember)
    patched, _ = svg2(wan)
    try:
        sample(patched, callback=interrupt)
    except InterruptedError:
        assert interrupted
    gc.collect()
    assert len(runs) == 1 and runs[0]() is None


def test_batched_and_split_guidance_agree(wan, svg2, monkeypatch):
    """The host runs both conditionings in one batch or in two calls, as memory allows."""
    patched, stats = svg2(wan)
    batched = sample(patched, cfg=3.0)
    calls = stats.latest().sparse_calls
    monkeypatch.setattr(wan.model, "memory_required", lambda *args, **kwargs: float("inf"))
    split = sample(patched, cfg=3.0)
    assert stats.latest().sparse_calls == 2 * calls, "the second run must really have been split"
    dense_gap = (sample(wan, cfg=3.0) - batched).norm()
    assert (split - batched).norm() <= 1e-3 * batched.norm() < dense_gap
