"""Shared by the tests on models."""

import pytest


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
