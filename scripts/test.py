"""Run the tests: `python scripts/test.py [pytest's arguments]`. Sets everything up on its first call."""

import os
import sys

import environment
import host


def main() -> int:
    environment.ensure()
    os.chdir(host.ROOT)
    sys.path.pop(0)  # scripts/: its module names are not the tests' business

    import pytest

    return pytest.main(sys.argv[1:])


if __name__ == "__main__":
    host.guarded(main)
