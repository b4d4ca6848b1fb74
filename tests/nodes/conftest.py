"""The node, and small models of the host's exact architecture."""

import functools

import pytest
import tiny_models
import tiny_wan
import torch


@pytest.fixture(scope="session")
def wan(host):
    """A random Wan text-to-video ModelPatcher: 3 blocks, 320 tokens at the default latent. Patch clones, not it."""
    return tiny_wan.random_wan()


@pytest.fixture(scope="session")
def model(host):
    """`model(name)`: the tiny model of that variant, built once. Patch clones, not it."""
    variants = {v.name: v for v in tiny_models.VARIANTS}
    return functools.cache(lambda name: variants[name].build())


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
def room(host, monkeypatch):
    """`room(memory)`: from now on the host has so many bytes for a model; 0.1 is its own value for none."""
    import comfy.model_management as mm

    load = mm.LoadedModel.model_load

    def give(memory, unload=True):
        if unload:
            mm.unload_all_models()
        monkeypatch.setattr(mm.LoadedModel, "model_load", lambda self, _=0, **kwargs: load(self, memory, **kwargs))

    yield give
    mm.unload_all_models()


@pytest.fixture
def with_lora(host):
    """`with_lora(model, *dimensions)`: a clone with a patch of each weight of the blocks that has so many (matrices: 2, norms: 1)."""

    def patch(model, *dimensions):
        g, weights = torch.Generator().manual_seed(0), model.model.state_dict()
        shapes = {k: w.shape for k, w in weights.items() if "blocks" in k and k.endswith(".weight") and w.dim() in dimensions}
        assert {len(shape) for shape in shapes.values()} == set(dimensions)
        patches = {k: ("diff", (0.2 * torch.randn(s, generator=g) * s[-1] ** (-0.5 * (len(s) - 1)),)) for k, s in shapes.items()}
        model = model.clone()
        assert len(model.add_patches(patches)) == len(shapes)
        return model

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
