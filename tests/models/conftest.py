"""The helpers beside the tests (demo_video, recorded_attention) are imported by their names."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def recorded(host):
    """q, k, v of four self-attention calls of the shipped checkpoint: blocks 1 and 5, early and late in its sample."""
    import demo_video
    from recorded_attention import record

    return record(demo_video.model(), blocks=(1, 5), steps=(4, 16))
