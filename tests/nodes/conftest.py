"""The node, and small models of the host's exact architecture."""

import pytest
import tiny_wan
import torch


@pytest.fixture(scope="session")
def wan(host):
    """A random Wan text-to-video ModelPatcher: 3 blocks, 320 tokens at the default latent. Patch clones, not it."""
    return tiny_wan.random_wan()


@pytest.fixture(scope="session")
def dense_sample(wan):
    """Four Euler steps of `wan` without SVG2."""
    return tiny_wan.sample(wan)


@pytest.fixture
def svg2(host):
    """`svg2(model, **inputs)` runs the node as ComfyUI does; min_tokens is 0 unless given. -> (model, stats handle)"""
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    def patch(model, **inputs):
        return SVG2SparseAttention.execute(model, **{"min_tokens": 0, **inputs}).result

    return patch


@pytest.fixture
def two_threads():
    """Torch computes with two, so that a CPU answers two heads side by side and has one to give up."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def temp(host, tmp_path):
    """The host's folder for previews, for this test alone."""
    import folder_paths

    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_temp_directory(before)
