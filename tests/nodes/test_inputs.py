"""Bad input gets a clear error at the node, naming the input and what it accepts."""

import pytest


@pytest.mark.parametrize(
    "name, value, accepts",
    [
        ("q_clusters", -1, "from 1 to"),
        ("k_clusters", -5, "from 1 to"),
        ("k_clusters", 100_000, "to 8192"),
        ("density", 1.5, "at most 1"),
        ("density", -0.1, "above 0"),
        ("density", float("nan"), "above 0"),
        ("top_p", 1.5, "at most 1"),
        ("top_p", -0.1, "above 0"),
        ("top_p", float("nan"), "above 0"),
        ("warmup_steps", -2, "0 or more"),
        ("min_k_ratio", 1.2, "0 to 1"),
        ("min_k_ratio", -0.5, "0 to 1"),
        ("kmeans_init_iters", -1, "at least 1"),
        ("kmeans_iters", -1, "at least 1"),
        ("end_percent", 1.1, "0 to 1"),
        ("min_tokens", -2, "0 or more"),
        ("dense_blocks", "3-x", "0-2,-1"),
        ("dense_blocks", "0,,1", "0-2,-1"),
        ("dense_blocks", "5-2", "backwards"),
        ("compensation", "linear", "off or centroid or first_order"),
        ("preset", "ultra", "balanced"),
        ("backend", "rocm", "triton"),
    ],
)
def test_errors_name_the_input(wan, svg2, name, value, accepts):
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        svg2(wan, **{name: value})
    assert accepts in str(error.value)


def test_two_rules_at_once_are_an_error_that_names_both(wan, svg2):
    with pytest.raises(ValueError, match=r"density.*top_p.*0\.1.*0\.5"):
        svg2(wan, density=0.1, top_p=0.5)


@pytest.mark.parametrize("preset", ["auto", "quality", "turbo", "paper"])
def test_setting_one_rule_puts_it_in_force(wan, svg2, preset):
    """top_p is the paper's rule with any preset, density the rule of errors; what else the preset says stays."""
    from svg2_pack.nodes.patching.override import Override
    from svg2_pack.svg2_core.presets import preset_config

    def config(**inputs):
        override = svg2(wan, preset=preset, **inputs)[0].model_options["transformer_options"]["optimized_attention_override"]
        assert isinstance(override, Override)
        return override.settings.config

    base = preset_config(preset, "wan_t2v")
    by_mass, by_error = config(top_p=0.4), config(density=0.07)
    assert (by_mass.density, by_mass.top_p, by_mass.compensation) == (None, 0.4, base.compensation)
    assert (by_error.density, by_error.compensation) == (0.07, base.compensation)
    assert config().density == base.density and config().top_p == base.top_p


def test_the_schema_is_the_contract(host):
    """Ids and defaults of saved workflows: a change here needs a migration (DESIGN: contracts)."""
    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    schema = SVG2SparseAttention.GET_SCHEMA()
    assert schema.node_id == "SVG2SparseAttention" and schema.category == "model/patch/svg2"
    assert {i.id: i.default for i in schema.inputs if i.id != "model"} == {
        "enabled": True, "preset": "auto", "q_clusters": 0, "k_clusters": 0, "top_p": 0.0, "warmup_steps": -1,
        "min_k_ratio": -1.0, "kmeans_init_iters": 0, "kmeans_iters": 0, "end_percent": 1.0, "dense_blocks": "auto",
        "min_tokens": -1, "compensation": "auto", "backend": "auto", "dense_attention": "auto", "density": 0.0,
    }  # fmt: skip
    assert [o.io_type for o in schema.outputs] == ["MODEL", "SVG2_STATS"]
    assert all(i.tooltip for i in schema.inputs)


def test_defaults_of_execute_are_the_schemas(host):
    import inspect

    from svg2_pack.nodes.sparse_attention import SVG2SparseAttention

    defaults = {n: p.default for n, p in inspect.signature(SVG2SparseAttention.execute).parameters.items() if n != "model"}
    assert defaults == {i.id: i.default for i in SVG2SparseAttention.GET_SCHEMA().inputs if i.id != "model"}
