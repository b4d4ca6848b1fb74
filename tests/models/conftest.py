"""Shared by the tests on models."""

import pytest


def pytest_collection_modifyitems(config, items):
    """Without `-m models`, test_families.py has each variant once, and some with other settings, too."""
    if "models" in config.option.markexpr:
        return
    left_out = {item for item in items if item.get_closest_marker("models") and _is_of_the_whole_table(item)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _is_of_the_whole_table(item) -> bool:
    families, of = item.module, item.callspec.params
    other_settings = any(of.get(name, value) != value for name, value in families.IN_EVERY_RUN.items())
    return other_settings and of["made"].name not in families.SETTINGS_OF


@pytest.fixture(scope="session")
def all_recorded(host):
    """q, k, v of nine self-attention calls of the shipped checkpoint: blocks 1, 3, 5 at steps 4, 10, 16 of its sample."""
    import demo_video
    from recorded_attention import record

    return record(demo_video.model())


@pytest.fixture(scope="session")
def recorded(all_recorded):
    """Four of them: blocks 1 and 5, early and late."""
    return [all_recorded[i] for i in (0, 2, 6, 8)]
