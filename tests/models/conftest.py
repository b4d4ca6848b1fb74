"""Shared by the tests on models."""

import pytest


@pytest.fixture(scope="session")
def recorded(host):
    """q, k, v of four self-attention calls of the shipped checkpoint: blocks 1 and 5, early and late in its sample."""
    import demo_video
    from recorded_attention import record

    return record(demo_video.model(), blocks=(1, 5), steps=(4, 16))
